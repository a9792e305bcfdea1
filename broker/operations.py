"""What the broker answers itself, beside its status: drain and quarantine. Knows bodies, no frames."""

from typing import Any

from ..schema.errors import Refused
from ..schema.frame import Prefix
from .records import Peer
from .requests import Requests
from .roster import Roster

DRAIN = "ralmq.drain"
LIST = "ralmq.quarantine.list"
RETRY = "ralmq.quarantine.retry"


class Operations:
    """The services by which a running cluster is looked after."""

    def __init__(self, requests: Requests, roster: Roster) -> None:
        self._requests = requests
        self._roster = roster
        requests.builtins.update({DRAIN: self._drain, LIST: self._list, RETRY: self._retry})

    def _drain(self, now: float, asker: Peer, prefix: Prefix, body: dict[str, Any]) -> dict[str, Any]:
        """`worker`: a name, or the beginning of names. Each is asked to end as by SIGTERM."""
        named = body.get("worker")
        workers = self._roster.named(named) if isinstance(named, str) and named else []
        if not workers:
            raise Refused(f"no worker has a name that begins with {str(named)[:40]!r}: see `ralmq status`")
        for worker in workers:
            self._roster.ask_to_leave(worker)
        return {"workers": [worker.name for worker in workers]}

    def _list(self, now: float, asker: Peer, prefix: Prefix, body: dict[str, Any]) -> dict[str, Any]:
        return {"quarantine": self._requests.quarantine.listed(now)}

    def _retry(self, now: float, asker: Peer, prefix: Prefix, body: dict[str, Any]) -> None:
        """`id`: of a request in quarantine. Its answer is the answer."""
        self._requests.retry(now, asker, prefix, body.get("id"))
