"""Drives a core through its public calls, with simulated time; checks its invariants after each."""

from typing import Any, NamedTuple

from ralmq.broker.core import Core
from ralmq.broker.limits import Limits
from ralmq.schema.codec import decode, encode
from ralmq.schema.frame import Prefix
from ralmq.schema.limits import NO_ID
from ralmq.schema.message import Active, Beat, Final, Gone, Hello, Request, Span
from simulation.invariants import invariants

EPOCH = 7


class Out(NamedTuple):
    """One message that the core sent."""

    to: str
    message: Any
    prefix: Prefix
    frames: list[Any]


def ident(name: str) -> bytes:
    """An id that can be read."""
    return name.encode().ljust(16, b".")


class Broker:
    """A core; peers and requests have readable names, times are seconds since its start."""

    def __init__(self, epoch: int = EPOCH, **limits: Any) -> None:
        self.start = self.now = 5000.0
        self.core = Core(epoch, self.now, Limits(**limits))
        self.epoch = epoch

    def hello(self, peer: str, *services: str, **offer: Any) -> list[Out]:
        """HELLO; a worker's capacity is 1 and it is idempotent, where nothing else is said."""
        nonce = ident(offer.pop("nonce", f"nonce {peer}"))
        if services or "span" in offer:
            offer = {"capacity": 1, "idempotent": True, **offer}
        return self.say(peer, Hello(nonce, peer, services=services, **offer))

    def stage(self, peer: str, first: int, last: int, layers: int = 4, **offer: Any) -> list[Out]:
        """HELLO of a stage of the model `m`."""
        model, fingerprint = offer.pop("model", "m"), offer.pop("fingerprint", "f")
        blocks, rows = offer.pop("blocks", 100), offer.pop("rows", 8)
        span = Span(model, fingerprint, first, last, layers, blocks, rows, 64)
        return self.hello(peer, span=span, **{"idempotent": False, "capacity": 4, **offer})

    def ask(self, peer: str, service: str, name: str, **options: Any) -> list[Out]:
        """REQUEST; `deadline` in seconds, `parent` by name."""
        prefix = {key: options.pop(key) for key in ("attempt", "epoch") if key in options}
        deadline = int(options.pop("deadline", 0) * 1000)
        if "parent" in options:
            options["parent"] = ident(options["parent"])
        return self.say(peer, Request(service, **options), name, deadline=deadline, **prefix)

    def end(self, peer: str, name: str, attempt: int = 0, **body: Any) -> list[Out]:
        """FINAL of a worker."""
        return self.say(peer, Final(body), name, attempt=attempt)

    def say(self, peer: str, message: Any, name: str | bytes = NO_ID, **prefix: Any) -> list[Out]:
        """Any message."""
        identity = ident(name) if isinstance(name, str) else name
        return self.raw(peer, encode(message, id=identity, **{"epoch": self.epoch, **prefix}))

    def raw(self, peer: str, frames: list[Any]) -> list[Out]:
        return self._seen(self.core.step(self.now, peer.encode(), frames))

    def lost(self, peer: str) -> list[Out]:
        """The connection is lost; the GONE that a peer gets which lives nevertheless is left out."""
        known = self.count("lost_peers")
        sent = self._seen(self.core.lost(self.now, peer.encode()))
        if self.count("lost_peers") > known:
            gone = sent.pop(0)
            assert gone.to == peer and isinstance(gone.message, Gone) and gone.prefix.id == NO_ID
        return sent

    def tick(self, seconds: float = 0.0) -> list[Out]:
        """One tick, some time later; the BEATs are left out."""
        self.now += seconds
        sent = self._seen(self.core.tick(self.now))
        return [out for out in sent if not isinstance(out.message, Beat)]

    def wait(self, seconds: float) -> list[tuple[float, Out]]:
        """Ticks each 10 ms; what was sent, and how many seconds after the call."""
        begun, found = self.now, []
        end = self.now + seconds
        while self.now < end - 1e-9:
            for out in self.tick(min(0.01, end - self.now)):
                found.append((self.now - begun, out))
        return found

    def busy(self, peer: str, progress: int, *active: tuple[str, int]) -> list[Out]:
        """BEAT of a worker with work in hand, which has heard all BEATs of the broker."""
        listed = tuple(Active(ident(name), leg) for name, leg in active)
        return self.say(peer, Beat(progress, 1, listed, heard=self.core.requests.beats))

    def worker(self, name: str) -> dict[str, Any]:
        """How `status` describes a worker."""
        found = [worker for worker in self.core.status(self.now)["workers"] if worker["name"] == name]
        assert len(found) == 1, (name, found)
        return dict(found[0])

    def count(self, what: str) -> int:
        """One of the broker's counters."""
        return int(self.core.status(self.now)["broker"]["counts"].get(what, 0))

    def open(self) -> int:
        return int(self.core.status(self.now)["broker"]["open_requests"])

    def _seen(self, sent: list[tuple[bytes, list[Any]]]) -> list[Out]:
        invariants(self.core)
        outs = []
        for key, frames in sent:
            prefix, message = decode(frames)
            assert prefix.epoch == self.epoch or prefix.id != NO_ID, "a message of another epoch"
            outs.append(Out(key.decode(), message, prefix, frames))
        return outs


def shown(sent: list[Out]) -> list[tuple[str, str, str, int]]:
    """(to, kind, id, attempt) of each: ids as the tests name them."""
    return [
        (out.to, type(out.message).__name__, out.prefix.id.strip(b".\0").decode(errors="replace"), out.prefix.attempt)
        for out in sent
    ]


def only(sent: list[Out]) -> Out:
    """The one message that was sent."""
    assert len(sent) == 1, shown(sent)
    return sent[0]


def codes(sent: list[Out]) -> list[str]:
    """The codes of the ERRORs among them."""
    return [out.message.code for out in sent if type(out.message).__name__ == "Error"]
