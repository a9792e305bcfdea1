"""The broker's mind: messages in, messages out, time as an argument. Knows no socket, clock, random or asyncio."""

from typing import Any

from ..schema.codec import decode, encode
from ..schema.errors import Malformed, Refused
from ..schema.frame import RETURN, Prefix, read_prefix
from ..schema.keys import Entry
from ..schema.limits import MAX_FRAMES, NO_ID
from ..schema.message import Beat, Error, Gone, Kind
from .limits import Limits
from .operations import Operations
from .pipelines import Pipelines
from .place import Places
from .records import Frames, Peer, Sent
from .requests import Requests
from .roster import Roster
from .sharing import Sharing
from .status import snapshot

STATUS = "ralmq.status"
DIED = "died or was cut off"


class Core:
    """One broker. `step` takes a message, `lost` a disconnection, `tick` the time; each returns what is to be sent.

    Args:
        epoch: names this incarnation (u32); must differ from earlier ones of the same address.
        now: seconds of any monotonic clock, as in all later calls.
    """

    def __init__(self, epoch: int, now: float, limits: Limits | None = None) -> None:
        self.epoch = epoch
        self.limits = limits or Limits()
        self.pipelines = Pipelines(epoch)
        self._out: list[Sent] = []
        self.requests = Requests(self._out, self.pipelines, epoch, self.limits, now)
        self.roster = Roster(self._out, self.requests, self.pipelines, epoch, self.limits)
        self.requests.builtins[STATUS] = lambda now, asker, prefix, body: self.status(now)
        Operations(self.requests, self.roster)
        Places(self.requests, self.roster, self.pipelines)
        Sharing(self.requests)
        self._peers = self.roster.peers
        self.started = now
        self._beat_at = now
        self._handlers = {
            Kind.REQUEST: self._request,
            Kind.PARTIAL: self._partial,
            Kind.FINAL: self._final,
            Kind.ERROR: self._final,
            Kind.STEP: self._step,
            Kind.CREDIT: self._credit,
            Kind.CANCEL: self._cancel,
            Kind.BEAT: self._beat,
            Kind.BYE: self._bye,
        }

    def step(self, now: float, key: bytes, frames: Frames) -> list[Sent]:
        """One message (frames, bytes-like) from the peer with routing id `key`."""
        prefix: Prefix | None = None
        try:
            prefix = read_prefix(frames[0])
            if len(frames) > MAX_FRAMES:
                raise Malformed(f"more than {MAX_FRAMES} frames: join tensors or send fewer")
            peer = self._peers.get(key)
            handler = self._handlers.get(prefix.kind)
            if peer is not None and handler is not None and prefix.epoch == self.epoch:
                handler(now, peer, prefix, frames)
            elif prefix.kind == Kind.HELLO:
                self.roster.hello(now, key, decode(frames)[1])
            elif peer is None or prefix.epoch != self.epoch:
                self._tell(key, Gone("say HELLO first"), NO_ID, 0)
                if peer is not None:  # it will take all that it shares with the broker for void
                    self.roster.lose(now, peer, "spoke to an earlier broker")
            else:
                raise Malformed(f"a broker takes no message of kind {prefix.kind}: the other side may be newer")
        except Refused as error:
            self.requests.counts[error.code] += 1
            identity, attempt = (prefix.id, prefix.attempt) if prefix is not None else (NO_ID, 0)
            self._tell(key, Error(error.code, error.message[:2000]), identity, attempt)
        if self.requests.left:
            return self._flush(now)
        sent = self._out.copy()
        self._out.clear()
        return sent

    def introduce(self, now: float, key: bytes, entry: Entry) -> list[Sent]:
        """Whose key a connection has; told before its first message, and where keys rule, for each connection."""
        other = self.roster.entries.get(key, entry) != entry
        sent = self.lost(now, key, "has another key") if other else []
        self.roster.entries[key] = entry
        return sent

    def count(self, what: str) -> None:
        """Counts what the shell sees and the core does not."""
        self.requests.counts[what] += 1

    def lost(self, now: float, key: bytes, reason: str = DIED) -> list[Sent]:
        """The connection of a peer is gone, or it does not take what is sent to it."""
        self.roster.entries.pop(key, None)
        peer = self.roster.peers.get(key)
        if peer is not None:
            self.requests.counts["lost_peers"] += 1
            self._tell(key, Gone(reason), NO_ID, 0)  # it may live, and a HELLO of its own may be under way already
            self.roster.lose(now, peer, reason)
        return self._flush(now)

    def tick(self, now: float) -> list[Sent]:
        """What time demands; call it about every 10 ms."""
        self.requests.tick(now)
        if now - self._beat_at >= self.limits.beat:
            self.requests.measure(now, now - self._beat_at)
            self._beat_at = now
            self.roster.hung(now)
            self.requests.beats += 1
            beat = encode(Beat(self.requests.beats), epoch=self.epoch)
            self._out += [(key, beat) for key in self.roster.peers]
        return self._flush(now)

    def measured(self, memory: int) -> None:
        """How many bytes of memory the broker's process has; above the watermark no new work is taken."""
        self.requests.measured(memory)

    def greet(self, key: bytes) -> list[Sent]:
        """A BEAT for one peer, to find out whether it can still be reached."""
        self._tell(key, Beat(self.requests.beats), NO_ID, 0)
        return self._flush(0.0)

    def status(self, now: float) -> dict[str, Any]:
        """The broker as `ralmq status` shows it; plain data."""
        return snapshot(now, self.started, self.epoch, self.roster, self.requests, self.pipelines)

    # -- one method a kind

    def _request(self, now: float, peer: Peer, prefix: Prefix, frames: Frames) -> None:
        self.requests.accept(now, peer, prefix, frames)

    def _partial(self, now: float, peer: Peer, prefix: Prefix, frames: Frames) -> None:
        self.requests.partial(peer, prefix, frames)

    def _final(self, now: float, peer: Peer, prefix: Prefix, frames: Frames) -> None:
        self.requests.finish(now, peer, prefix, frames)

    def _step(self, now: float, peer: Peer, prefix: Prefix, frames: Frames) -> None:
        """STEP goes to the next stage, or back to the leader; the id fences off other incarnations."""
        pipeline = peer.pipeline
        target = None
        if pipeline is not None and pipeline.id == prefix.id:
            target = pipeline.leader.key if prefix.flags & RETURN else pipeline.after.get(peer.key)
        if target is None:
            self.requests.counts["fenced"] += 1
            self._tell(peer.key, Gone("this pipeline is over"), prefix.id, 0)
        else:
            self._out.append((target, frames))

    def _credit(self, now: float, peer: Peer, prefix: Prefix, frames: Frames) -> None:
        self.requests.credit(peer, prefix, decode(frames)[1].until)

    def _cancel(self, now: float, peer: Peer, prefix: Prefix, frames: Frames) -> None:
        self.requests.cancel(now, peer, prefix)

    def _beat(self, now: float, peer: Peer, prefix: Prefix, frames: Frames) -> None:
        self.roster.beat(now, peer, decode(frames)[1])

    def _bye(self, now: float, peer: Peer, prefix: Prefix, frames: Frames) -> None:
        self.roster.bye(now, peer)

    # -- inside

    def _flush(self, now: float) -> list[Sent]:
        left = self.requests.left
        while left:
            self.roster.left(now, left.pop())
        sent = self._out.copy()
        self._out.clear()
        return sent

    def _tell(self, key: bytes, message: Any, identity: bytes, attempt: int) -> None:
        self._out.append((key, encode(message, id=identity, attempt=attempt, epoch=self.epoch)))
