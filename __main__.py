"""`python -m ralmq` and the command `ralmq`: they begin here, so that Ctrl-C while they import is no traceback."""

import sys

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended


def main() -> None:
    """Runs the command that the arguments name."""
    try:
        from .cli.main import app

        app(prog_name="ralmq")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
