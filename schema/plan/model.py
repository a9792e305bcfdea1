"""What a planner needs of a model: bytes of each layer and of its ends. Knows no file and no tensor."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Final

from ..errors import Refused

MOST: Final = 4096  # layers
LARGEST: Final = 1 << 60  # bytes
BLOCK: Final = 16  # tokens of a KV block


@dataclass(frozen=True, slots=True)
class Model:
    """Bytes as they lie in memory, in the dtype in which stages hold them.

    Attributes:
        layers: weights of each layer.
        reads: bytes of them that one token reads: fewer than all where only some experts run.
        kv: keys and values of one token in one layer.
        first: embedding and positions, which the first span holds; a token reads next to nothing of them.
        last: norm and head, which the last span holds; a token reads all of it.
        shared: bytes of a tied embedding, held once where one span has both ends.
        each: what every span holds.
    """

    name: str
    layers: tuple[int, ...]
    reads: tuple[int, ...]
    kv: int
    first: int
    last: int
    shared: int = 0
    each: int = 0

    def as_map(self) -> dict[str, Any]:
        """It as it travels; `model_of` is the way back."""
        return {**asdict(self), "layers": list(self.layers), "reads": list(self.reads)}


def model_of(body: Any) -> Model:
    """A model from plain data of somebody else.

    Raises:
        Refused: a field is missing or no size.
    """
    if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
        raise Refused("the sizes of a model are a map with its name: send what `Model.as_map` gives")
    layers, reads = (_sizes(body.get(name), name) for name in ("layers", "reads"))
    if not 0 < len(layers) == len(reads) <= MOST:
        raise Refused(f"a model has 1 to {MOST} layers, with as many sizes in `layers` as in `reads`")
    ends = [_sizes([body.get(name, 0)], name)[0] for name in ("kv", "first", "last", "shared", "each")]
    return Model(body["name"], layers, reads, *ends)


def _sizes(values: Any, name: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value <= LARGEST for value in values):
        raise Refused(f"{name} of a model's sizes: give numbers of bytes")
    return tuple(values)


class Load:
    """What spans of a model hold and read when each layer keeps keys and values of `kv_tokens` tokens, in blocks."""

    def __init__(self, model: Model, kv_tokens: int) -> None:
        self.model = model
        self.layers = len(model.layers)
        self.kv_tokens = -(-kv_tokens // BLOCK) * BLOCK
        self._held = [0, *accumulate(model.layers)]
        self._read = [0, *accumulate(model.reads)]

    def weights(self, first: int, last: int) -> int:
        """Bytes of weights of layers `first` to `last` - 1, with the ends that they have."""
        if first >= last:
            return 0
        model = self.model
        begins, ends = first == 0, last == self.layers
        held = self._held[last] - self._held[first] + model.each
        held += (model.first if begins else 0) + (model.last if ends else 0)
        return held - (model.shared if begins and ends else 0)

    def cache(self, first: int, last: int) -> int:
        """Bytes of keys and values."""
        return max(0, last - first) * self.model.kv * self.kv_tokens

    def kv_mib(self, first: int, last: int, processes: int = 1) -> int:
        """The option `kv_mib` of a stage with these layers, tensor parallel over so many processes."""
        return max(1, -(-self.cache(first, last) // (processes << 20)))

    def memory(self, first: int, last: int) -> int:
        """Bytes of both."""
        return self.weights(first, last) + self.cache(first, last)

    def read(self, first: int, last: int) -> int:
        """Bytes of weights that one token reads there."""
        if first >= last:
            return 0
        return self._read[last] - self._read[first] + (self.model.last if last == self.layers else 0)
