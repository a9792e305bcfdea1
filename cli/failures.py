"""What a failure looks like to the user: one line that names what to mend, and the exit code. Knows no command."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import typer.core
from typer.exceptions import TyperException

from ..schema.errors import NoService, RalmqError, Refused

DEBUG: Final = "RALMQ_DEBUG"  # environment: show tracebacks
BAD_INPUT: Final = 2
FAILED: Final = 1
PREFIX: Final = "ralmq: "  # of the line, so that it is told from what other programs of a pipe say


class Commands(typer.core.TyperGroup):
    """The root group: runs a command and turns whatever it raises into a line and an exit code.

    A command returns None for success, or its exit code.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if os.environ.get(DEBUG) and not isinstance(error, TyperException):
                raise
            code, line = explained(error)
            print(PREFIX + line, file=sys.stderr, flush=True)
        if standalone_mode:
            sys.exit(code or 0)
        return code


def explained(error: Exception) -> tuple[int, str]:
    """Exit code and line of an error: 2 where the input is to be mended, 1 where something failed while running."""
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        return error.exit_code, _line(error.format_message()) + hint
    if isinstance(error, RalmqError):
        return (BAD_INPUT if isinstance(error, Refused | NoService) else FAILED), _line(str(error))
    if isinstance(error, ValueError) and type(error).__module__.startswith("ralmq."):
        return BAD_INPUT, _line(str(error))  # a file or folder that one of our readers refuses
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return FAILED, _line(f"{where}{error.strerror}{_hint(error)}")
    return FAILED, _line(f"{type(error).__name__}: {error}") + " (`ralmq --debug` shows the traceback)"


def _hint(error: OSError) -> str:
    """What to do about it, where that is the same for every file."""
    hints = {
        errno.ENOENT: ": name another place, one that is there",
        errno.ENOTDIR: ": name another place, within a folder",
        errno.EACCES: ": name another place, or see who may use this one (`ls -ld`)",
        errno.EPERM: ": name another place, or see who may use this one (`ls -ld`)",
        errno.EROFS: ": name another place, this one cannot be written to",
        errno.ENOSPC: ": make room there, or name another place",
        errno.EMFILE: ": raise the limit of open files (`ulimit -n`)",
    }
    return hints.get(error.errno or 0, "")


def _line(text: str) -> str:
    return " ".join(text.split())
