"""Which layers the stages of a local cluster get."""

from pathlib import Path

from checkpoints import tiny
from ralmq.cluster.local import parts


def test_stages_of_a_small_head_have_as_many_layers(tmp_path: Path) -> None:
    path = str(tiny("llama", tmp_path / "llama"))
    assert parts(path, 2) == ["layers=0:2", "layers=2:4"]
    assert parts(path, 4) == [f"layers={place}:{place + 1}" for place in range(4)]
    assert parts(path, 1) == ["stage=0/1"] and parts(path, 0) == []


def test_a_head_that_takes_as_long_as_layers_counts_as_such(tmp_path: Path) -> None:
    path = str(tiny("llama", tmp_path / "llama", 6, vocab_size=100_000))  # 12.8 MB, beside layers of 4
    assert parts(path, 2) == ["layers=0:5", "layers=5:6"]


def test_more_stages_than_layers_are_left_to_the_stages_to_refuse(tmp_path: Path) -> None:
    path = str(tiny("llama", tmp_path / "llama", 2))
    assert parts(path, 3) == ["stage=0/3", "stage=1/3", "stage=2/3"]
