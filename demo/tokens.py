"""The tokenizer of the embedded checkpoint, and documents as rows of token ids. Knows no model."""

import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .corpus import Document

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Sequence[Document], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[list[int]]:
    """Token ids of each document, the end-of-text token in front: a model needs something to start from."""
    end = tokenizer.encode(END_OF_TEXT).ids
    return [[*end, *found.ids] for found in tokenizer.encode_batch([document.text for document in documents])]


def rows(texts: Sequence[Sequence[int]], length: int, order: random.Random | None = None) -> list[list[int]]:
    """The texts one behind the other, cut into rows of `length` + 1 ids that share one id with the next row.

    With `order` the texts, and then the rows, are shuffled and the short rest is dropped; without it the rest is the
    last row, so that every id but the first is predicted exactly once.
    """
    if order is not None:
        texts = order.sample(texts, len(texts))
    stream = [token for text in texts for token in text]
    cut = [stream[at : at + length + 1] for at in range(0, len(stream) - 1, length)]
    if order is None:
        return cut
    full = [row for row in cut if len(row) == length + 1]
    order.shuffle(full)
    return full
