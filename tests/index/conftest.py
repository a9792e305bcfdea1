"""Small indexes, a word tokenizer and the stand-in scorer, for the tests of workers/index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_scorer import Scorer
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.writer import write_index
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture
def scorer() -> Scorer:
    return Scorer()


@pytest.fixture
def words() -> Tokenizer:
    """Splits at spaces; the word w7 is token 7."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture
def stream() -> TokenStream:
    """Three documents of 7, 1 and 12 tokens."""
    return TokenStream(np.arange(100, 120, dtype=np.int32), ("a.txt", "b.txt", "c.txt"), np.array([0, 7, 8]))


@pytest.fixture
def build(tmp_path: Path, stream: TokenStream) -> Callable[..., Path]:
    """Writes an index of `stream` (17 entries of 4 random numbers unless told otherwise) and gives its path."""

    def made(at: str = "docs", **changed: Any) -> Path:
        entries = stream.entries()
        vectors = np.random.default_rng(1).normal(size=(len(entries), 4)).astype(np.float32)
        given: dict[str, Any] = {"vectors": vectors, "stream": stream, "entries": entries}
        out = tmp_path / at
        write_index(out, **{"name": "docs", **given, "model": "tiny", "fingerprint": "abc", **changed})
        return out

    return made
