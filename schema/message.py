"""The vocabulary: one frozen dataclass per message kind, and the table KINDS. Knows fields, not bytes.

The prefix (id, attempt, sequence, epoch, deadline; see frame.py) travels beside every message and is not repeated here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple

from .checks import facts, flag, identifier, in_body, integer, integers, list_of, mapping, maybe, note, routing, text
from .errors import Malformed
from .limits import (
    FEATURES,
    MAX_ACTIVE,
    MAX_ATTEMPT,
    MAX_DEADLINE_MS,
    MAX_ERROR_TEXT,
    MAX_NAME,
    MAX_REASON,
    MAX_ROWS,
    MAX_SERVICES,
)

PLEASE = 1  # attempt of the BYE by which the broker asks a worker to drain; that of a BYE that lets it go is 0
U31 = 0x7FFF_FFFF
U63 = 0x7FFF_FFFF_FFFF_FFFF

NAME = text(MAX_NAME, 1)
NUMBER = integer(0, U31)
COUNTER = integer(0, U63)


class Span(NamedTuple):
    """What a stage offers: layers `first` up to, not including, `last` of `layers` of one checkpoint."""

    model: str
    fingerprint: str
    first: int
    last: int
    layers: int
    kv_blocks: int
    max_rows: int
    context: int


class Direct(NamedTuple):
    """Where a peer takes messages from its neighbours without the broker.

    `host` is equal for peers that may share memory and a local socket, `near` that socket; `far` is tcp://host:port or
    "", `key` the CURVE public key of that port or "".
    """

    host: str
    key: str
    near: str
    far: str


class Row(NamedTuple):
    """One sequence's share of a STEP: `length` tokens from absolute `position` on; `blocks` is its block table."""

    id: bytes
    attempt: int
    position: int
    length: int
    blocks: tuple[int, ...]


class Start(NamedTuple):
    """First STEP of a sequence: index of its row, how many prompt ids, and the parameters for the last stage."""

    row: int
    length: int
    params: dict[str, Any]


class Return(NamedTuple):
    """What the last stage tells the leader of one row: the token sampled (-1: none), and whether that was the last."""

    id: bytes
    attempt: int
    token: int
    done: bool


class Active(NamedTuple):
    """One attempt that a worker serves at the time of its BEAT."""

    id: bytes
    attempt: int


def _tuple_of(cls: Any, *checks: Any) -> Any:
    """A check for a NamedTuple that travels as a positional array; entries of a later version are passed over."""

    def inner(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) < len(checks):
            raise Malformed(f"expected {cls.__name__} with {len(checks)} entries")
        return cls(*[check(entry) for check, entry in zip(checks, value, strict=False)])

    return inner


def _span(value: Any) -> Span:
    span: Span = _SPAN_FIELDS(value)
    if not span.first < span.last <= span.layers:
        raise Malformed(f"a span must hold first < last <= layers, got {span.first}, {span.last}, {span.layers}")
    return span


_SPAN_FIELDS = _tuple_of(Span, NAME, text(64), NUMBER, NUMBER, NUMBER, NUMBER, NUMBER, NUMBER)
_ADDRESS = text(MAX_NAME)
_DIRECT = _tuple_of(Direct, _ADDRESS, text(40), _ADDRESS, _ADDRESS)
_BLOCKS = integers(0, U31, MAX_ROWS)
_ROW = _tuple_of(Row, identifier, integer(0, MAX_ATTEMPT), NUMBER, NUMBER, _BLOCKS)
_START = _tuple_of(Start, NUMBER, NUMBER, mapping)
_RETURN = _tuple_of(Return, identifier, integer(0, MAX_ATTEMPT), integer(-1, U31), flag)
_ACTIVE = _tuple_of(Active, identifier, integer(0, MAX_ATTEMPT))


@dataclass(frozen=True, slots=True)
class Hello:
    """A peer announces itself. `nonce` names the incarnation of the peer; a worker offers services or a span."""

    nonce: Annotated[bytes, routing(identifier)]
    name: Annotated[str, routing(NAME)]
    features: Annotated[int, routing(NUMBER)] = FEATURES
    pid: Annotated[int, routing(NUMBER)] = 0
    services: Annotated[tuple[str, ...], routing(list_of(NAME, MAX_SERVICES))] = ()
    capacity: Annotated[int, routing(NUMBER)] = 0
    idempotent: Annotated[bool, routing(flag)] = False
    stall_ms: Annotated[int, routing(NUMBER)] = 30_000
    labels: Annotated[dict[str, Any], routing(facts)] = field(default_factory=dict)
    span: Annotated[Span | None, routing(maybe(_span))] = None
    direct: Annotated[Direct | None, routing(maybe(_DIRECT))] = None


@dataclass(frozen=True, slots=True)
class Welcome:
    """The broker's answer to HELLO; its epoch, in the prefix, goes into everything the peer sends from now on."""

    features: Annotated[int, routing(NUMBER)] = FEATURES
    beat_ms: Annotated[int, routing(integer(1, 3_600_000))] = 1000
    name: Annotated[str, routing(text(MAX_NAME))] = ""


@dataclass(frozen=True, slots=True)
class Beat:
    """Progress of a peer: steps done, whether work is in hand, and the attempts it serves.

    The broker counts its BEATs in `progress`; `heard` is the last of them that the peer has got, and with it all that
    was sent before.
    """

    progress: Annotated[int, routing(COUNTER)] = 0
    busy: Annotated[int, routing(NUMBER)] = 0
    active: Annotated[tuple[Active, ...], routing(list_of(_ACTIVE, MAX_ACTIVE))] = ()
    gauges: Annotated[dict[str, Any], routing(facts)] = field(default_factory=dict)
    heard: Annotated[int, routing(COUNTER)] = 0


@dataclass(frozen=True, slots=True)
class Bye:
    """A peer leaves. A worker sends it to drain; the broker sends it back once nothing of that worker is open.

    The broker's BYE with attempt PLEASE asks a worker to drain.
    """


@dataclass(frozen=True, slots=True)
class Gone:
    """With a zero id: I do not know you, say HELLO. With an id: this attempt, or this pipeline, is over."""

    reason: Annotated[str, routing(note(MAX_REASON))] = ""


@dataclass(frozen=True, slots=True)
class Request:
    """Asks a service. `window`: token credit of a stream (0 = unbounded). `parent`: on behalf of which request.

    `wait_ms`: how long the request may wait for a service that nobody offers yet.
    """

    service: Annotated[str, routing(NAME)]
    priority: Annotated[int, routing(integer(0, 9))] = 4
    window: Annotated[int, routing(NUMBER)] = 0
    parent: Annotated[bytes | None, routing(maybe(identifier))] = None
    wait_ms: Annotated[int, routing(integer(0, MAX_DEADLINE_MS))] = 0
    body: Annotated[dict[str, Any], in_body(mapping)] = field(default_factory=dict)
    tensors: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Partial:
    """A part of an answer; its place among the parts of the attempt is the prefix's `sequence`."""

    body: Annotated[dict[str, Any], in_body(mapping)] = field(default_factory=dict)
    tensors: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Final:
    """The end of an answer, in success."""

    body: Annotated[dict[str, Any], in_body(mapping)] = field(default_factory=dict)
    tensors: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Error:
    """The end of an answer, in failure; `code` is one of errors.CLASSES. `worker`: which one was lost."""

    code: Annotated[str, routing(text(64, 1))]
    message: Annotated[str, routing(note(MAX_ERROR_TEXT))] = ""
    retry_after_ms: Annotated[int, routing(NUMBER)] = 0
    worker: Annotated[str, routing(note(MAX_NAME))] = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    """The asker gives up; the worker ends the request with ERROR cancelled."""

    reason: Annotated[str, routing(note(MAX_REASON))] = ""


@dataclass(frozen=True, slots=True)
class Credit:
    """Flow control of a stream: parts up to, not including, the absolute position `until` may be sent."""

    until: Annotated[int, routing(NUMBER)]


@dataclass(frozen=True, slots=True)
class Form:
    """You are stage `place` of `stages` of the pipeline whose id is in the prefix.

    `onward`: where the next stage, of the last one the first, takes STEPs directly; None: through the broker.
    """

    model: Annotated[str, routing(NAME)]
    place: Annotated[int, routing(NUMBER)]
    stages: Annotated[int, routing(integer(1, 4096))]
    kv_blocks: Annotated[int, routing(NUMBER)]
    max_rows: Annotated[int, routing(NUMBER)]
    onward: Annotated[Direct | None, routing(maybe(_DIRECT))] = None


@dataclass(frozen=True, slots=True)
class Step:
    """One hop of a micro-batch; the prefix's id is the pipeline. Way there: rows and hidden states; back: returns.

    `ended` lists sequences that the last stage is to forget. `batch` numbers the micro-batch; a RETURN that carries
    the number says that it has left the pipeline, one with 0 brings rows that had been parked.

    Tensors on the way there: token ids or hidden states [sum of lengths, d], then int32 prompt ids of `starts`, joined;
    of an encoder-decoder two more, see docs/encoder-decoder.md.
    """

    rows: Annotated[tuple[Row, ...], in_body(list_of(_ROW, MAX_ROWS))] = ()
    starts: Annotated[tuple[Start, ...], in_body(list_of(_START, MAX_ROWS))] = ()
    returns: Annotated[tuple[Return, ...], in_body(list_of(_RETURN, MAX_ROWS))] = ()
    ended: Annotated[tuple[Active, ...], in_body(list_of(_ACTIVE, MAX_ROWS))] = ()
    batch: Annotated[int, in_body(COUNTER)] = 0
    tensors: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Release:
    """The asker of the request is gone: end it. The FINAL or ERROR that follows gives the credit back, no more."""


Message = (
    Hello | Welcome | Beat | Bye | Gone | Request | Partial | Final | Error | Cancel | Credit | Form | Step | Release
)


class Kind:
    """Codes of the kinds, as they stand in the prefix."""

    HELLO: ClassVar[int] = 1
    WELCOME: ClassVar[int] = 2
    BEAT: ClassVar[int] = 3
    BYE: ClassVar[int] = 4
    GONE: ClassVar[int] = 5
    REQUEST: ClassVar[int] = 16
    PARTIAL: ClassVar[int] = 17
    FINAL: ClassVar[int] = 18
    ERROR: ClassVar[int] = 19
    CANCEL: ClassVar[int] = 20
    CREDIT: ClassVar[int] = 21
    FORM: ClassVar[int] = 32
    STEP: ClassVar[int] = 33
    RELEASE: ClassVar[int] = 34


KINDS: dict[int, type[Any]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.BEAT: Beat,
    Kind.BYE: Bye,
    Kind.GONE: Gone,
    Kind.REQUEST: Request,
    Kind.PARTIAL: Partial,
    Kind.FINAL: Final,
    Kind.ERROR: Error,
    Kind.CANCEL: Cancel,
    Kind.CREDIT: Credit,
    Kind.FORM: Form,
    Kind.STEP: Step,
    Kind.RELEASE: Release,
}
CODES: dict[type[Any], int] = {cls: code for code, cls in KINDS.items()}
