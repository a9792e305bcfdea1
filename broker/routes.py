"""The routing section of a REQUEST, decoded once for all requests that carry the same bytes."""

from typing import Any, NamedTuple

from ..schema.codec import plan, routing_of
from ..schema.errors import Malformed
from ..schema.frame import LENGTHS, PREFIX
from ..schema.limits import HEAD
from ..schema.message import Request

REMEMBERED = 1024


class Route(NamedTuple):
    """Where a REQUEST wants to go; see message.Request for the fields."""

    service: str
    priority: int
    window: int
    parent: bytes | None
    wait_ms: int


class Routes:
    """Decoded routing sections; nearly all requests of a client carry the same one."""

    def __init__(self) -> None:
        self._known: dict[bytes, Route] = {}

    def read(self, head: Any) -> Route:
        """The checked routing section of frame 0.

        Raises:
            Malformed: no array, no service, or a field out of range.
        """
        size = LENGTHS.unpack_from(head, PREFIX.size)[0]
        raw = bytes(memoryview(head)[HEAD : HEAD + size])
        route = self._known.get(raw)
        if route is None:
            route = _decoded(head)
            if route.parent is None:  # a parent's id makes the section one of a kind
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                self._known[raw] = route
        return route


_DEFAULTS = Request("")


def _decoded(head: Any) -> Route:
    values = routing_of(head)
    if not values:
        raise Malformed("a REQUEST names no service")
    fields = plan(Request)[0]
    values += [getattr(_DEFAULTS, name) for name, _, _ in fields[len(values) :]]
    return Route(*[check(value) for (_, check, _), value in zip(fields, values, strict=False)])
