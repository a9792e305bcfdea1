"""What several commands share: the --broker option, the event loop with its signals, JSON. Knows no command."""

import asyncio
import json
import math
import os
import re
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from ..schema.address import BROKER_VARIABLE
from ..schema.errors import Refused
from ..schema.keys import KEYS_VARIABLE

T = TypeVar("T")

_TCP: Final = re.compile(r"tcp://(?P<host>\[[^\]\s]+\]|[^\[\]/:*\s]+):(?P<port>[1-9]\d{0,4})")
_MEANT: Final = re.compile(r"(?:[a-z]+:?/+|/*)([^/:*\s]+:[1-9]\d{0,4})/*")  # another scheme, none, a slash too many
LAST_PORT: Final = 65535


def check_broker(url: T) -> T:
    """Refuses what no connection can be made to, before anything that takes time is done for it; None is no address.

    Raises:
        Refused: neither tcp://host:port nor ipc://path.
    """
    text = "" if url is None else str(url)
    found = _TCP.fullmatch(text)
    if url is None or text.removeprefix("ipc://") not in ("", text) or (found and int(found["port"]) <= LAST_PORT):
        return url
    meant = _MEANT.fullmatch(text) if found is None else None
    hint = f"did you mean tcp://{meant[1]}?" if meant else "give tcp://host:port or ipc://path"
    where = f" (of ${BROKER_VARIABLE})" if os.environ.get(BROKER_VARIABLE) == text else ""
    raise Refused(f"{text or 'an empty text'}{where} is no broker address: {hint}")


Broker = Annotated[
    str,
    typer.Option(
        "--broker", envvar=BROKER_VARIABLE, metavar="URL", callback=check_broker, help="Address of the broker."
    ),
]


def _used(path: str | None) -> str | None:
    """In the environment every connection of this process finds it, and so do the processes that it starts."""
    if path is not None:
        os.environ[KEYS_VARIABLE] = path
    return path


Keys = Annotated[
    str | None,
    typer.Option(
        "--keys",
        envvar=KEYS_VARIABLE,
        metavar="PATH",
        callback=_used,
        help="Key file, or folder of `ralmq keys init`, where the broker asks for keys.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine; SIGTERM cancels it as Ctrl-C does, so that what it started is ended in order.

    Raises:
        KeyboardInterrupt, typer.Exit: it was ended by SIGINT or SIGTERM.
    """

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None


def read_array(path: Path, kinds: str, dimensions: Sequence[int], what: str, fault: str) -> Any:
    """The array of a .npy file.

    Args:
        kinds, dimensions: that it may have, kinds as numpy's letters.
        what: it should hold; `fault` is said where it holds something else.

    Raises:
        Refused: no such file, or another one.
    """
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise Refused(f"{path}: no such file; name a .npy file of {what}") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror or 'not a whole file'}); see the file") from None
    except (ValueError, EOFError):
        raise Refused(f"{path}: cannot be read as .npy; write {what} with numpy.save") from None
    if not isinstance(found, np.ndarray) or found.ndim not in dimensions or found.dtype.kind not in kinds:
        raise Refused(f"{path}: {fault} with numpy.save")
    return found


def without_keys() -> None:
    """For commands that start a cluster of their own on loopback."""
    os.environ.pop(KEYS_VARIABLE, None)


def show_help(context: typer.Context) -> None:
    """What a group does when no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def print_json(document: Any) -> None:
    """Prints one document; numbers that JSON does not have become null."""
    print(json.dumps(_plain(document), ensure_ascii=False), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.hex()
    return value
