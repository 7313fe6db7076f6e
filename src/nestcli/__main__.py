"""Entry point of `python -m nestcli` and of the `nest` script."""

import os
import sys


def main() -> None:
    """Start the application. Ctrl-C during the imports prints one line and exits with 130, as it does later."""
    _speak_utf8()
    try:
        from nestcli.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped by Ctrl-C\n")
        sys.exit(130)
    run()


def _speak_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding.

    File names, manifests and messages are UTF-8 everywhere. In another encoding, names in the output would be wrong.
    Worker processes inherit $PYTHONUTF8.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  (our own program)


if __name__ == "__main__":
    main()
