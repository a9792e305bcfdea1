"""Past keys and values in our blocks, in the shape in which transformers' layers ask for them. Imports transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .pool import BLOCK


class Store:
    """Keys [slots, heads, width] and values of each layer, whatever width they have; a slot is block id * 16 + place.

    Zeroed at the start, because a masked slot still enters the product with the values.
    """

    def __init__(self, shapes: list[tuple[Tensor, Tensor]], blocks: int) -> None:
        """`shapes`: of each layer one token's keys and values, [1, heads, 1, width]."""
        self.blocks = blocks
        self.layers = [
            tuple(torch.zeros(blocks * BLOCK, *kind.shape[1::2], dtype=kind.dtype, device=kind.device) for kind in pair)
            for pair in shapes
        ]
        self.bytes_per_block = sum(kind.nbytes for pair in shapes for kind in pair) * BLOCK


class Past(Cache):  # type: ignore[misc]
    """One call's cache: `past` [batch, longest] slots, older tokens left of younger ones, and `new` [batch * count]."""

    def __init__(self, store: Store, past: Tensor, new: Tensor) -> None:
        super().__init__(layers=[_Layer(pair, past, new) for pair in store.layers])


class Probe(Cache):  # type: ignore[misc]
    """Notes the keys and values that one token leaves in each layer."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_Noting() for _ in range(layers)])

    def shapes(self) -> list[tuple[Tensor, Tensor] | None]:
        """Of each layer, None where it left none."""
        return [layer.seen for layer in self.layers]


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's tokens. It has no window of its own: the model's mask hides what is outside."""

    is_sliding = False

    def __init__(self, pair: tuple[Tensor, ...], past: Tensor, new: Tensor) -> None:
        super().__init__()
        self._pair = pair
        self._past = past
        self._new = new
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes what is new, [batch, heads, count, width], and returns it behind what is cached."""
        both = []
        for kept, states in zip(self._pair, (key_states, value_states), strict=True):
            # What is not finite would reach rows that have the block later, masked or not.
            clean = states.transpose(1, 2).reshape(-1, *kept.shape[1:]).nan_to_num(0.0, 0.0, 0.0)
            kept.index_copy_(0, self._new, clean)
            old = kept.index_select(0, self._past.reshape(-1)).view(*self._past.shape, *kept.shape[1:])
            both.append(torch.cat((old.transpose(1, 2), states), 2))
        return both[0], both[1]

    def get_seq_length(self) -> int:
        return self._past.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._past.shape[1] + query_length, 0

    def get_max_length(self) -> int:
        return -1


class _Noting(CacheLayerMixin):  # type: ignore[misc]
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.seen: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.seen is not None or key_states.dim() != 4:
            raise TypeError("a layer keeps something else than one key and value a token")
        self.seen = key_states.detach(), value_states.detach()
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1
