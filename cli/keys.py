"""`ralmq keys`: makes, lists and revokes keys; nothing else in the package makes one. Knows their files only."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..schema.errors import Refused
from ..schema.keys import (
    ADMIN,
    ALLOWED_FILE,
    BROKER_FILE,
    CLIENT,
    EVERYTHING,
    KEYS_VARIABLE,
    ROLES,
    SUFFIX,
    WORKER,
    Entry,
    broker_key,
    is_name,
    read_entries,
)
from .shared import Json, print_json, show_help

keys = typer.Typer(
    help="Keys of a broker that other machines reach.", invoke_without_command=True, rich_markup_mode=None
)
Folder = Annotated[
    Path | None,
    typer.Option("--keys", envvar=KEYS_VARIABLE, metavar="DIR", help="Folder of keys. [default: ~/.config/ralmq/keys]"),
]


@keys.callback()
def _group(context: typer.Context) -> None:
    """Keys of a broker that other machines reach."""
    show_help(context)


@keys.command()
def init(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="[default: ~/.config/ralmq/keys]")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave a folder that has keys as it is.")] = False,
) -> None:
    """Make a folder of keys: the broker's, and one for each role: client, worker, admin."""
    place = (folder or default_folder()).expanduser()
    if (place / BROKER_FILE).exists():
        if keep:
            typer.echo(f"{place}: has keys")
            return
        raise Refused(f"{place}: has keys already: add to them with `ralmq keys add`, or name another folder")
    place.mkdir(parents=True, exist_ok=True)
    if not any(place.iterdir()):
        place.chmod(0o700)
    public, secret = _pair()
    entries = [_made(place, public, Entry(role, role, "")) for role in (CLIENT, WORKER, ADMIN)]
    _write_entries(place, entries)
    _write(place / BROKER_FILE, {"public": public, "secret": secret})  # the last: the folder is whole once it is there
    typer.echo(f"{place}: made {', '.join([BROKER_FILE, *(f'{role}{SUFFIX}' for role in ROLES)])}")
    typer.echo(f"start the broker with `ralmq broker --bind tcp://0.0.0.0:5555 --keys {place}`, and give each machine")
    typer.echo(f"the one file that it needs: `ralmq worker ... --keys worker{SUFFIX}` (or $RALMQ_KEYS)")


@keys.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the peer; its file is NAME.key.")],
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help=f"{', '.join(ROLES)}.")] = CLIENT,
    offers: Annotated[
        list[str] | None,
        typer.Option("--offers", metavar="PATTERN", help="What a worker may offer, as 'search:*'; repeatable."),
    ] = None,
    folder: Folder = None,
) -> None:
    """Make a key and let it in; a running broker takes it within a second."""
    if not is_name(name):
        raise Refused(f"{name!r} is no name of a key: use letters, digits, dots, dashes, and not `broker`")
    if role not in ROLES:
        raise Refused(f"{role} is no role: there are {', '.join(ROLES)}")
    if offers and role != WORKER:
        raise Refused(f"--offers is for workers, and {name} is to be a {role}: leave it away, or add --role worker")
    with _changing(folder) as (place, entries):
        if any(entry.name == name and not entry.revoked for entry in entries):
            raise Refused(f"a key {name} is let in already: revoke it first, or choose another name")
        entry = _made(place, broker_key(place).public, Entry(name, role, "", tuple(offers or EVERYTHING)))
        _write_entries(place, [*(other for other in entries if other.name != name), entry])
    typer.echo(f"{place / name}{SUFFIX}: take it to the machine that is to connect, and name it with --keys")


@keys.command("list")
def list_(folder: Folder = None, as_json: Json = False) -> None:
    """Show who is let in."""
    _, entries = _opened(folder)
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    from rich.console import Console

    from .tables import keys_table

    Console().print(keys_table(entries))


@keys.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `ralmq keys list` shows it.")],
    folder: Folder = None,
) -> None:
    """Let a key in no more; a running broker ends its connections within a second."""
    with _changing(folder) as (place, entries):
        if not any(entry.name == name and not entry.revoked for entry in entries):
            known = ", ".join(entry.name for entry in entries if not entry.revoked) or "none"
            raise Refused(f"no key {name} is let in: there are {known}")
        _write_entries(place, [replace(entry, revoked=entry.revoked or entry.name == name) for entry in entries])
        (place / f"{name}{SUFFIX}").unlink(missing_ok=True)
    typer.echo(f"{name} is revoked")


def default_folder() -> Path:
    """$XDG_CONFIG_HOME/ralmq/keys, by default under ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ralmq" / "keys"


def _opened(folder: Path | None) -> tuple[Path, list[Entry]]:
    place = (folder or default_folder()).expanduser()
    broker_key(place)
    return place, read_entries(place)


@contextmanager
def _changing(folder: Path | None) -> Iterator[tuple[Path, list[Entry]]]:
    """The same, for one command at a time: of two that wrote the list they read, one would undo the other."""
    place, _ = _opened(folder)
    lock = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _opened(place)
    finally:
        os.close(lock)


def _made(place: Path, broker: str, entry: Entry) -> Entry:
    """Makes the pair of a peer, and its file."""
    public, secret = _pair()
    document = {"name": entry.name, "role": entry.role, "public": public, "secret": secret, "broker": broker}
    _write(place / f"{entry.name}{SUFFIX}", document)
    return replace(entry, public=public)


def _pair() -> tuple[str, str]:
    import zmq

    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _write_entries(place: Path, entries: list[Entry]) -> None:
    _write(place / ALLOWED_FILE, {"keys": [asdict(entry) for entry in entries]})


def _write(path: Path, document: dict[str, Any]) -> None:
    """Replaces a file at once; nobody but its owner can ever read it."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1) + "\n")
        file.flush()
        os.fsync(descriptor)
    fresh.replace(path)
