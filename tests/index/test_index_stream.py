"""Token streams and the windows they are cut into."""

import numpy as np
import pytest
from ralmq.workers.datastore.windows import windows
from ralmq.workers.index.stream import TokenStream


def of(*lengths: int) -> TokenStream:
    starts = np.cumsum([0, *lengths[:-1]])
    names = tuple(f"d{number}" for number in range(len(lengths)))
    return TokenStream(np.arange(sum(lengths), dtype=np.int32), names, starts)


def test_entries_are_all_tokens_but_each_documents_last() -> None:
    assert of(3, 0, 1, 2, 0).entries().tolist() == [0, 1, 4]
    assert of(0).entries().tolist() == []


def test_following_stops_at_the_documents_end() -> None:
    found = of(3, 0, 4).following(np.array([0, 2, 3, 6]), width=3)
    assert found.dtype == np.int32
    assert found.tolist() == [[1, 2, -1], [-1, -1, -1], [4, 5, 6], [-1, -1, -1]]


def test_documents_of() -> None:
    assert of(3, 0, 4, 0).documents_of(np.array([0, 2, 3, 6])).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("tokens", "names", "starts", "said"),
    [
        (np.zeros(3, np.int64), ("a",), [0], "tokens must be int32"),
        (np.zeros((3, 1), np.int32), ("a",), [0], "tokens must be int32"),
        (np.zeros(3, np.int32), ("a", "b"), [0], "one for each"),
        (np.zeros(3, np.int32), (), [], "one for each"),
        (np.zeros(3, np.int32), ("a",), [1], "begin at 0"),
        (np.zeros(3, np.int32), ("a", "b", "c"), [0, 2, 1], "never fall"),
        (np.zeros(3, np.int32), ("a", "b"), [0, 4], "stay inside"),
    ],
)
def test_streams_that_are_none(tokens: np.ndarray, names: tuple[str, ...], starts: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenStream(tokens, names, np.array(starts, dtype=np.int64))


@pytest.mark.parametrize("seed", range(30))
def test_windows_score_each_entry_once_with_enough_context(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream = of(*rng.integers(0, 60, 8).tolist())
    size = int(rng.integers(2, 20))
    overlap = int(rng.integers(0, size - 1))
    scored: list[int] = []
    for window in windows(stream, size, overlap):
        number = int(stream.documents_of(np.array([window.start]))[0])
        begin, end = int(stream.starts[number]), int(stream.ends[number])
        assert begin <= window.start < window.stop <= end and window.stop - window.start <= size
        assert window.count > 0
        assert window.keep == (overlap if window.start > begin else 0)
        first = window.start + window.keep
        scored += range(first, first + window.count)
    assert scored == stream.entries().tolist()


def test_windows_of_a_known_document() -> None:
    found = [(window.start, window.stop, window.keep, window.count) for window in windows(of(11), 6, 2)]
    assert found == [(0, 6, 0, 5), (3, 9, 2, 3), (6, 11, 2, 2)]


@pytest.mark.parametrize(("size", "overlap"), [(6, 5), (6, -1), (1, 0)])
def test_windows_that_could_not_move(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        list(windows(of(11), size, overlap))
