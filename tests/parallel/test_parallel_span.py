"""Ranks that compute one span: the same logits as one rank alone, so many collectives, and no byte read twice."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, VOCAB, tiny
from ralmq.workers.engine.checkpoint import Checkpoint
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.errors import CheckpointError, RankLost
from ralmq.workers.engine.ranked import RankSpan
from ralmq.workers.engine.shard import SlicedCheckpoint, fits, part, share_of
from ralmq.workers.engine.span import Row, Span
from rank_threads import Pipeline, pipeline, ranked

BOUND = 1e-5
TOKENS = 12
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def written(family: str) -> Path:
        return tiny(family, tmp_path_factory.mktemp("ranks") / family)

    return written


def ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within 1e-5; hidden states are larger than 1, and so is their bound."""
    assert (got - wanted).abs().max() <= BOUND * max(1.0, float(wanted.abs().max()))


def same(got: Pipeline, wanted: Pipeline, prompt: torch.Tensor) -> None:
    """Greedy ids are equal, a near tie aside, and so are logits."""
    tokens, logits = wanted.greedy(prompt, TOKENS)
    others, found = got.greedy(prompt, TOKENS)
    top = logits.topk(2).values
    steady = next((place for place in range(TOKENS) if top[place, 0] - top[place, 1] < 1e-4), TOKENS)
    assert others[:steady] == tokens[:steady] and steady > TOKENS // 2
    assert (found - logits)[:steady].abs().max() < BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_two_and_four_ranks_give_what_one_gives(made: Made, family: str) -> None:
    path = made(family)
    with pipeline(path, 1, 1) as alone:
        for ranks in (2, 4):
            with pipeline(path, ranks, 1) as several:
                same(several, alone, ids(21))


@pytest.mark.parametrize(("family", "ranks"), [("llama", 2), ("llama", 4), ("gpt2", 4), ("gemma2", 2)])
def test_stages_of_ranks(made: Made, family: str, ranks: int) -> None:
    with pipeline(made(family), 1, 1) as alone, pipeline(made(family), ranks, 2) as several:
        same(several, alone, ids(19, 1))


def test_so_many_collectives(made: Made) -> None:
    """Two sums a layer, one for the embedding, one gathering for the head; an order each for step and head."""
    layers = read_config(made("llama")).layers
    for stages in (1, 2):
        with pipeline(made("llama"), 2, stages) as several:
            before = [[group.counts.copy() for group in groups] for groups in several.groups]
            steps = 3
            for place in range(steps):
                several.logits([Row(place, 1, [0])], ids(1))
            for stage, groups in enumerate(several.groups):
                last = stage == stages - 1
                for rank, group in enumerate(groups):
                    counted = group.counts - before[stage][rank]
                    if rank == 0:  # what other ranks have sent by now depends on nothing here
                        assert counted["all_reduce"] == steps * (2 * layers // stages + (stage == 0))
                        assert counted["gather"] == steps * last
                        assert counted["broadcast"] == steps * (1 + last)


def test_a_batch_of_prompts_and_next_tokens(made: Made) -> None:
    """Also one whose order is longer than a packet."""
    rows = [Row(0, 40, [0, 1, 2]), Row(0, 1, [3]), Row(0, 17, [4, 5])]
    wide = [Row(0, 1, [6, *[7] * 300]) for _ in range(20)]
    with pipeline(made("qwen3"), 1, 2) as alone, pipeline(made("qwen3"), 2, 2) as several:
        x = ids(58, 2)
        close(several.logits(rows, x), alone.logits(rows, x))
        x = ids(20, 3)
        close(several.logits(wide, x), alone.logits(wide, x))
        again = [Row(40, 1, [0, 1, 2]), Row(1, 1, [3]), Row(17, 1, [4, 5])]
        close(several.logits(again, ids(3)), alone.logits(again, ids(3)))


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_narrow_weights(made: Made, family: str, dtype: str) -> None:
    """Scales of a part are finer than those of the whole: as near to fp32 as one rank is, not to its bits."""
    x, rows = ids(30, 4), [Row(0, 30, [0, 1])]
    with pipeline(made(family), 1, 1) as exact:
        wanted = exact.logits(rows, x)
    for packed in (False, True):
        with (
            pipeline(made(family), 1, 1, dtype=dtype, packed=packed) as alone,
            pipeline(made(family), 2, 1, dtype=dtype, packed=packed) as several,
        ):
            one, two = ((each.logits(rows, x) - wanted).norm() / wanted.norm() for each in (alone, several))
            assert two < 1.5 * one + 1e-4


def test_packed_weights_of_a_part(tmp_path: Path) -> None:
    """Matrices that are large enough to be laid out for the machine."""
    path = tiny("llama", tmp_path, 1, hidden_size=1024, intermediate_size=1536, num_attention_heads=8, head_dim=128)
    x, rows = ids(5), [Row(0, 5, [0])]
    with pipeline(path, 1, 1) as alone, pipeline(path, 2, 1, packed=True) as several:
        got, wanted = several.logits(rows, x), alone.logits(rows, x)
        assert (got - wanted).norm() / wanted.norm() < 1e-5


def test_each_rank_reads_its_slices_alone(made: Made) -> None:
    """Together they read what one reads, and again only what all of them need."""
    for family in FAMILIES:
        config = read_config(made(family))
        whole = Checkpoint(made(family))
        size = 2
        sliced: dict[str, int] = {}
        zeros: set[str] = set()
        for rank in range(size):
            checkpoint = SlicedCheckpoint(made(family), config, rank, size)
            for name, cut in checkpoint._cuts.items():
                for stored in (n for n in whole.names() if _generic(n) == name):
                    before = checkpoint.read
                    zeros |= {stored} if cut.zero else set()
                    assert whole.entry(stored).shape == cut.shape, stored
                    shape = _local(cut.shape, cut.rows, cut.columns)
                    for _ in checkpoint.slabs(stored, shape):
                        pass
                    sliced[stored] = sliced.get(stored, 0) + checkpoint.read - before
        for stored, got in sliced.items():
            entry = whole.entry(stored)
            # Of what is added to a sum rank 0 has all, by no cut.
            assert got == (0 if stored in zeros else entry.end - entry.begin), stored
        with_all = sum(whole.entry(n).end - whole.entry(n).begin for n in whole.names() if n not in sliced)
        total = sum(whole.entry(n).end - whole.entry(n).begin for n in whole.names())
        # Norms, positions and routers alone are in no slice.
        assert with_all < total / 4, (family, with_all, total)


def _generic(name: str) -> str:
    from ralmq.workers.engine.shard import NUMBER

    return NUMBER.sub("{}", name)


def _local(shape: tuple[int, ...], *ranges: tuple[tuple[int, int], ...] | None) -> tuple[int, ...]:
    sizes = [sum(end - begin for begin, end in some) if some else None for some in ranges]
    return tuple(size or whole for size, whole in zip(sizes, shape, strict=False))


def test_weights_and_cache_of_a_rank_are_a_part(made: Made) -> None:
    for family in ("llama", "gpt2", "phi3"):
        alone = Span.load(made(family), 0, 4, blocks=2)
        ranks = [RankSpan.load(made(family), 0, 4, blocks=2, shard=(rank, 2)) for rank in range(2)]
        assert all(rank.bytes < 0.62 * alone.bytes for rank in ranks)
        assert all(rank.kv_bytes_per_block == alone.kv_bytes_per_block // 2 for rank in ranks)
    # More ranks than kv heads: each has one.
    config = read_config(made("llama"))
    assert [share_of(config, rank, 4).kv_heads for rank in range(4)] == [1] * 4


def test_deterministic_ranks_give_the_same_bits_in_any_batch(made: Made) -> None:
    x = ids(20, 5)
    with pipeline(made("llama"), 2, 1, deterministic=4) as several, pipeline(made("llama"), 1, 1) as alone:
        whole = several.logits([Row(0, 20, [0, 1])], x)
        apart = torch.cat([several.logits([Row(at, 1, [2, 3])], x[at : at + 1]) for at in range(20)])
        assert torch.equal(whole, apart)
        close(whole, alone.logits([Row(0, 20, [0, 1])], x))


def test_what_cannot_be_split_is_refused(made: Made) -> None:
    config = read_config(made("llama"))
    assert [n for n in range(1, 9) if fits(config, n)] == [1, 2, 4]
    with pytest.raises(ValueError, match=r"tp=3 does not split 4 heads and 2 kv heads; give one of 1, 2, 4"):
        Span.load(made("llama"), 0, 4, blocks=1, shard=(0, 3))
    with pytest.raises(ValueError, match="tp is of our own layers, and this model runs on transformers'"):
        Span.load(made("llama"), 0, 4, blocks=1, shard=(0, 2), adapter=True)


def test_parts_cover_everything_once() -> None:
    for n in (1, 7, 50257):
        for size in (1, 2, 3, 4):
            parts = [part(n, rank, size) for rank in range(size)] if size <= n else []
            assert [i for begin, end in parts for i in range(begin, end)] == (list(range(n)) if parts else [])


def test_a_shape_that_is_not_the_models_is_named(made: Made, tmp_path: Path) -> None:
    path = tiny("llama", tmp_path, 2)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"intermediate_size": 96', '"intermediate_size": 100'))
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.mlp.gate_proj.weight has shape \[96, 64\]"):
        RankSpan.load(path, 0, 2, blocks=1, shard=(1, 2))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path, 1)
    loaded = SlicedCheckpoint(path, read_config(path), 1, 2)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50_000])
    with pytest.raises(CheckpointError, match="ends within tensor"):
        for name in loaded.names():
            cut = loaded._cuts.get(_generic(name))
            if cut is not None:
                list(loaded.slabs(name, _local(cut.shape, cut.rows, cut.columns)))


def test_rows_that_do_not_fit_reach_no_rank(made: Made) -> None:
    with ranked(made("llama"), 2, 0, 4, blocks=2) as (span, groups):
        before = groups[0].counts.copy()
        with pytest.raises(ValueError, match="rows list 2 tokens where 1 are given"):
            span.forward([Row(0, 2, [0])], ids(1))
        assert groups[0].counts == before
        assert span.forward([Row(0, 2, [0])], ids(2)).shape == (2, 64)


def test_a_rank_that_has_joined_no_group_says_so(made: Made) -> None:
    span = RankSpan.load(made("llama"), 0, 4, blocks=1, shard=(0, 2))
    with pytest.raises(RankLost, match="not joined"):
        span.forward([Row(0, 1, [0])], ids(1))


def test_orders_keep_values_of_every_dtype(made: Made) -> None:
    """Hidden states travel as they are, in one packet or more."""
    with ranked(made("llama"), 2, 2, 4, blocks=24) as (span, _), pipeline(made("llama"), 1, 2) as alone:
        for n in (1, 200):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(dtype)
                rows = [Row(0, n, list(range(20)))]
                close(span.forward(rows, x), alone.spans[1].forward(rows, x))
