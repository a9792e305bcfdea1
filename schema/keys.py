"""Key files and the list of who is let in. Knows files and their form; makes no key, and knows no socket.

A folder that `ralmq keys init` made holds the broker's own key, the list of those it lets in, and one file a peer.
The file of a peer is all that its machine needs: its own pair and the broker's public key. Keys are Z85 text.
"""

import json
import os
import re
import stat
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from .errors import Refused

KEYS_VARIABLE: Final = "RALMQ_KEYS"  # of the environment: a folder of keys, or the key file of one peer
BROKER_FILE: Final = "broker.key"
ALLOWED_FILE: Final = "allowed.json"
SUFFIX: Final = ".key"
CLIENT, WORKER, ADMIN = ROLES = ("client", "worker", "admin")
RESERVED: Final = "ralmq."  # services of the broker itself
STATUS: Final = "ralmq.status"
PLACE: Final = "ralmq.place"  # which layers a stage that joins is to take
CLUSTER: Final = "ralmq.cluster"  # what the cluster's file has for a machine that joins
FOR_WORKERS: Final = (PLACE, CLUSTER)
EVERYTHING: Final = ("*",)
_KEY: Final = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A peer that is let in.

    Attributes:
        role: client asks; worker also offers services; admin also commands the broker.
        offers: patterns of services that a worker may offer, such as `search:*`; a stage offers `lm:MODEL`.
        revoked: kept in the list, so that its name is known, and let in no more.
    """

    name: str
    role: str
    public: str
    offers: tuple[str, ...] = EVERYTHING
    revoked: bool = False

    def may_offer(self, service: str) -> bool:
        return self.role == WORKER and any(fnmatchcase(service, pattern) for pattern in self.offers)

    def may_ask(self, service: str) -> bool:
        """What the broker itself answers is for an admin, its status apart, and what a machine asks to join."""
        joins = self.role == WORKER and service in FOR_WORKERS
        return self.role == ADMIN or service == STATUS or joins or not service.startswith(RESERVED)


@dataclass(frozen=True, slots=True)
class PeerKey:
    """What a client or worker connects with; `broker` is the public key that the broker must prove to have."""

    public: str
    secret: str = field(repr=False)
    broker: str


@dataclass(frozen=True, slots=True)
class BrokerKey:
    """What a broker proves itself with."""

    public: str
    secret: str = field(repr=False)


def key_for(url: str, given: str | os.PathLike[str] | None, *, works: bool) -> PeerKey | None:
    """The key to connect with, or None: ipc and inproc never need one, tcp has one where `given` or $RALMQ_KEYS says.

    Args:
        given: a key file, or a folder of keys, of which a worker uses worker.key and who asks admin.key; "" for none.

    Raises:
        Refused: the file is missing, no key file, or others may read it.
    """
    if given is None:
        given = os.environ.get(KEYS_VARIABLE, "")
    if not os.fspath(given) or not url.startswith("tcp://"):
        return None
    path = Path(given).expanduser()
    if path.is_dir():
        path /= f"{WORKER if works else ADMIN}{SUFFIX}"
    document = _private(path)
    return PeerKey(*(_key(document, name, path) for name in ("public", "secret", "broker")))


def broker_key(folder: Path) -> BrokerKey:
    """The key of a broker.

    Raises:
        Refused: as `key_for`, or no folder of keys.
    """
    if folder.is_file():
        raise Refused(f"{folder} is the key file of one peer: a broker needs the folder that `ralmq keys init` made")
    path = folder / BROKER_FILE
    document = _private(path)
    return BrokerKey(*(_key(document, name, path) for name in ("public", "secret")))


def read_entries(folder: Path) -> list[Entry]:
    """The whole list, in the order in which it was written.

    Raises:
        Refused: it is missing or broken.
    """
    path = folder / ALLOWED_FILE
    listed = _document(path).get("keys")
    if not isinstance(listed, list):
        raise Refused(f"{path}: holds no list of keys: make a folder of keys with `ralmq keys init`")
    return [_entry(item, path) for item in listed]


def allowed(entries: list[Entry]) -> dict[str, Entry]:
    """By public key, those that are let in."""
    return {entry.public: entry for entry in entries if not entry.revoked}


def is_name(text: str) -> bool:
    """Whether a peer may be called so: its key file is named after it."""
    return _NAME.fullmatch(text) is not None and text != BROKER_FILE.removesuffix(SUFFIX)


def _entry(item: Any, path: Path) -> Entry:
    if isinstance(item, dict):
        name, role, offers = item.get("name"), item.get("role"), item.get("offers", list(EVERYTHING))
        texts = isinstance(offers, list) and all(isinstance(pattern, str) for pattern in offers)
        if isinstance(name, str) and is_name(name) and role in ROLES and texts:
            return Entry(name, role, _key(item, "public", path), tuple(offers), item.get("revoked", False) is not False)
    raise Refused(f"{path}: an entry has no name, role or offers that can be read: list it with `ralmq keys list`")


def _private(path: Path) -> dict[str, Any]:
    """A file that holds a secret key."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}: name a key file, or a folder made by `ralmq keys init`") from None
    if stat.S_IMODE(mode) & 0o077:
        raise Refused(f"{path}: others may read this secret key: `chmod 600 {path}`")
    return _document(path)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}: name a folder made by `ralmq keys init`") from None
    except (ValueError, RecursionError):  # without the text: it may be a secret
        raise Refused(f"{path}: is no key file: make one with `ralmq keys add`") from None
    if not isinstance(document, dict):
        raise Refused(f"{path}: is no key file: make one with `ralmq keys add`")
    return document


def _key(document: dict[str, Any], name: str, path: Path) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        raise Refused(f"{path}: its {name} key is missing or broken: make a new file with `ralmq keys add`")
    return value
