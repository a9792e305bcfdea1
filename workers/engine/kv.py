"""Keys and values of past tokens in raw blocks of 16 tokens; who owns which block is decided elsewhere."""

import torch

from .pool import BLOCK


class KVCache:
    """`blocks` blocks for each of `layers` layers. A slot is block id * 16 + place in the block.

    Zeroed at the start, because a masked slot still enters the product with the values (0 * NaN is NaN).
    `spare` blocks lie behind those that are given out.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str | torch.device,
        spare: int = 0,
    ) -> None:
        self.blocks = blocks
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        width = 2 * kv_heads * head_dim
        size = blocks + spare
        self._layers = [torch.zeros(size, BLOCK * width, dtype=dtype, device=device) for _ in range(layers)]
        self._slots = [layer.view(size * BLOCK, 2 * kv_heads, head_dim) for layer in self._layers]
        self._gathered = torch.empty(0, BLOCK * width, dtype=dtype, device=device)
        self.bytes_per_block = layers * BLOCK * width * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Puts keys and values [n, 2 * kv_heads, head_dim] (keys first) into slots [n].

        What is not finite becomes 0: it would reach rows that have the block later, masked or not.
        """
        self._slots[layer].index_copy_(0, slots, kv.nan_to_num(0.0, 0.0, 0.0))

    def read(
        self, layer: int, table: torch.Tensor, batch: int, seen: slice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [batch, kv_heads, tokens, head_dim], of `batch` equally long block tables laid flat;
        of each table's slots those of `seen`. They are good until the next call."""
        kv = self._gather(layer, table).view(batch, -1, 2, self.kv_heads, self.head_dim)
        if seen is not None:
            kv = kv[:, seen]
        return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)

    def _gather(self, layer: int, table: torch.Tensor) -> torch.Tensor:
        """The blocks of a table. The host's memory is written again and again: the kernel would have to clear pages
        that are new each time, which takes several times as long as the copy. No more of it is kept than a layer has.
        """
        held = self._layers[layer]
        if held.device.type != "cpu" or len(table) > len(held):
            return held.index_select(0, table)
        if len(table) > len(self._gathered):
            with torch.inference_mode(False):  # a tensor for steps and for others
                self._gathered = torch.empty(len(table), held.shape[1], dtype=held.dtype)
        return torch.index_select(held, 0, table, out=self._gathered[: len(table)])
