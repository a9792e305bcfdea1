"""Some layers of GPT-2, sliced from what from_pretrained gives, on transformers' own code. Knows no message."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel

# How many of the 12 layers the stage without the head has, so that both have the same work: with the whole context the
# head is computed for its last token alone, with a cache it costs as much as 5 to 6 layers.
WHOLE, CACHED = 7, 9


class Part:
    """Layers `first` to `last` - 1; with the embedding, and with final norm and head, where it is told so."""

    def __init__(self, path: str, first: int, last: int, *, embeds: bool, ends: bool) -> None:
        torch.set_num_threads(1)
        model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
        self._layers = model.transformer.h[first:last]
        for number, layer in enumerate(self._layers):
            layer.attn.layer_idx = number
        self._embedding = (model.transformer.wte, model.transformer.wpe) if embeds else None
        self._ends = (model.transformer.ln_f, model.lm_head) if ends else None
        self._caches: dict[int, Any] = {}

    @torch.inference_mode()
    def forward(self, x: Tensor, cache: int | None = None) -> Tensor:
        """Ids [n] (with the embedding) or hidden [1, n, d] -> [1, n, d]; with the KV cache of that number, or none."""
        past = None if cache is None else self._caches.setdefault(cache, DynamicCache())
        if self._embedding is not None:
            words, places = self._embedding
            begin = past.get_seq_length() if past is not None else 0
            x = (words(x) + places(torch.arange(begin, begin + len(x))))[None]
        for layer in self._layers:
            x = layer(x, past_key_values=past, use_cache=past is not None)
        return x

    @torch.inference_mode()
    def best(self, hidden: Tensor) -> int:
        """The most probable next token behind the last of hidden [1, n, d]."""
        assert self._ends is not None
        norm, head = self._ends
        return int(head(norm(hidden[0, -1])).argmax())

    def forget(self) -> None:
        """Drops the KV caches."""
        self._caches.clear()
