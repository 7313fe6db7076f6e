"""`python -m nestcli` is `nest`; the `nest` script starts here too."""

import os
import sys


def main() -> None:
    """Start the application. Ctrl-C while it is imported ends as it does later: in one line, with 130."""
    _speak_utf8()
    try:
        from nestcli.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped by Ctrl-C\n")
        sys.exit(130)
    run()


def _speak_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale has another encoding.

    Names of files, manifests and messages are UTF-8 everywhere: read as another encoding, their names would be wrong in
    what is written. $PYTHONUTF8 is passed on to the processes that work.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  (ourselves)


if __name__ == "__main__":
    main()
