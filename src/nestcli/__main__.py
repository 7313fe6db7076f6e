"""`python -m nestcli` is `nest`; the `nest` script starts here too."""

import sys


def main() -> None:
    """Start the application. Ctrl-C while it is imported ends as it does later: in one line, with 130."""
    try:
        from nestcli.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped by Ctrl-C\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
