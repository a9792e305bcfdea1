"""Token ids as callers give them, checked before anything is sent. Knows no model and no worker."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any, Final

import torch

from ...schema.errors import Refused

_TAKEN: Final = (torch.int32, torch.int64)  # by an embedding


def checked(given: Any, vocabulary: int, tokenizer: str) -> torch.Tensor:
    """Token ids [b, n], or [n], as a tensor of this process.

    Args:
        given: a tensor, an array, or lists of ids.
        vocabulary: how many ids there are; 0 where it is not known.
        tokenizer: the file of the model's tokenizer, for who gives text.

    Raises:
        TypeError: text, or anything else that is no whole number.
        IndexError: an id that is not in the vocabulary.
        Refused: no id at all, or rows of different lengths.
    """
    if _has_text(given):
        how = f"tokenizers.Tokenizer.from_file({tokenizer!r}).encode(text).ids"
        raise TypeError(f"token ids are asked for, not text: {how} gives them")
    if isinstance(given, Mapping):
        raise TypeError('token ids are asked for, not a map: give its "input_ids"')
    try:
        ids = torch.as_tensor(given)
    except ValueError as error:
        raise Refused(
            f"token ids are one tensor, or lists of one length: pad shorter rows on the left, with an attention_mask "
            f"({error})"
        ) from None
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"token ids are lists of whole numbers, as [[1, 2]], or one tensor of them: {error}") from None
    if not ids.numel():
        raise Refused("there is no token id: give one at least, as that of the beginning of a text")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise TypeError(f"token ids are whole numbers, not {ids.dtype}: give a tensor of torch.long")
    ids = ids if ids.dtype in _TAKEN else ids.long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary and high >= vocabulary):
        known = f"the vocabulary of {vocabulary}, 0 to {vocabulary - 1}" if vocabulary else "any vocabulary"
        raise IndexError(f"token id {low if low < 0 else high} is not in {known}: use the model's own tokenizer")
    return ids


def check_count(max_new_tokens: Any) -> None:
    """Raises Refused for what is no number of tokens."""
    if not isinstance(max_new_tokens, Integral) or int(max_new_tokens) < 0:
        raise Refused(f"max_new_tokens={max_new_tokens!r}: give how many tokens may follow, 0 or more")


def _has_text(given: Any) -> bool:
    return isinstance(given, str | bytes) or (isinstance(given, list | tuple) and any(map(_has_text, given)))
