"""What the cluster's file has for each machine, kept for those that join. Knows neither workers nor their options."""

from typing import Any, Final

from ..schema.errors import Refused
from ..schema.frame import Prefix
from ..schema.keys import CLUSTER
from .records import Peer
from .requests import Requests

PUBLISH: Final = f"{CLUSTER}.publish"
MOST: Final = 1000  # machines, and what one of them starts


class Sharing:
    """The services `ralmq.cluster.publish`, for admins, and `ralmq.cluster`. Soft: `ralmq up` says it again."""

    def __init__(self, requests: Requests) -> None:
        self._machines: dict[str, list[Any]] = {}
        requests.builtins.update({PUBLISH: self._publish, CLUSTER: self._get})

    def _publish(self, now: float, asker: Peer, prefix: Prefix, body: dict[str, Any]) -> dict[str, Any]:
        """`machines`: by name, what each starts. It takes the place of what was there."""
        machines = body.get("machines")
        if not isinstance(machines, dict) or not all(isinstance(listed, list) for listed in machines.values()):
            raise Refused("machines: give a map from names to lists of what each of them starts")
        if len(machines) > MOST or any(len(listed) > MOST for listed in machines.values()):
            raise Refused(f"a cluster has at most {MOST} machines that start at most {MOST} processes each")
        self._machines = machines
        return {"machines": sorted(machines)}

    def _get(self, now: float, asker: Peer, prefix: Prefix, body: dict[str, Any]) -> dict[str, Any]:
        """`machine`: its name. `starts` is null where the file has no such machine."""
        return {"machines": sorted(self._machines), "starts": self._machines.get(str(body.get("machine")))}
