"""T5 against transformers: the encoder's states, the decoder's logits in spans, chunks and batches, what is refused."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import tiny
from engine.t5_models import KINDS, VOCAB, logits_of, states_of, t5, t5_model
from ralmq.workers.engine import t5_span
from ralmq.workers.engine.checkpoint import Checkpoint
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.errors import CheckpointError
from ralmq.workers.engine.span import Span
from ralmq.workers.engine.split import span_tensors, split
from ralmq.workers.engine.t5_encoder import T5Encoder
from ralmq.workers.engine.t5_span import CrossRow, T5Span
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

CHUNKS = [[5, 9, 3, 77, 20, 1], [40, 1], [7] * 19 + [90, 12, 1]]
Loaded = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = t5(request.param, tmp_path_factory.mktemp("t5") / request.param)
    return path, AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()


def spans_of(path: Path, count: int, blocks: int = 64) -> list[T5Span]:
    layers = read_config(path).layers
    cuts = [layers * place // count for place in range(count + 1)]
    return [T5Span.load(path, first, last, blocks=blocks) for first, last in pairwise(cuts)]


def row_of(states: torch.Tensor, position: int, count: int, blocks: list[int]) -> CrossRow:
    """Positions count states first."""
    n = len(states)
    given = states[position : min(position + count, n)] if position < n else None
    return CrossRow(position, count, blocks, n, given)


def run(spans: Sequence[T5Span], rows: list[CrossRow], ids: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocab]; what is at the places of states is not to be used."""
    x = torch.tensor(list(ids))
    for span in spans:
        x = span.forward(rows, x)
        rows = [CrossRow(row.position, row.count, row.blocks, row.cross) for row in rows]
    return spans[-1].head(x)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """As near as sums in another order are, where the largest logit of some models is 20."""
    torch.testing.assert_close(found, wanted, atol=float(2e-4 * wanted.abs().max()), rtol=1e-4)


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_encoder_gives_the_states_of_each_chunk_alone(model: Loaded) -> None:
    path, oracle = model
    torch.testing.assert_close(T5Encoder(path)(CHUNKS), states_of(oracle, CHUNKS), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("chunk", [7, 64])
def test_spans_give_the_logits_of_the_whole_decoder(model: Loaded, count: int, chunk: int) -> None:
    """States and prompt in chunks of any size, of which one holds both, then token by token."""
    path, oracle = model
    states, ids = states_of(oracle, CHUNKS), [0, *random_ids(50, 1)]
    spans, blocks, n = spans_of(path, count), list(range(9, 0, -1)), len(states)
    tokens = [0] * n + ids
    found: list[torch.Tensor] = []
    prompt = n + 30
    cuts = [*range(0, prompt, chunk), *range(prompt, len(tokens) + 1)]
    for begin, end in pairwise(cuts):
        found.append(run(spans, [row_of(states, begin, end - begin, blocks)], tokens[begin:end]))
    close(torch.cat(found)[n:], logits_of(oracle, states, ids))


@pytest.mark.parametrize("long", [t5_span.LONG, 0])
def test_sequences_of_other_chunks_share_a_step(model: Loaded, monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    """Single tokens, a prompt, and a row of states alone, each with as many states as it has. Where they read much,
    single tokens attend one by one."""
    monkeypatch.setattr(t5_span, "LONG", long)
    path, oracle = model
    spans = spans_of(path, 2)
    many = [states_of(oracle, CHUNKS[:place]) for place in (1, 2, 3)]
    texts = [[0, *random_ids(length, length)] for length in (3, 20, 33)]
    tables = [[0, 1, 2], [10, 11, 12, 13], [30, 29, 28, 27, 26, 25]]
    for states, ids, blocks in list(zip(many, texts, tables, strict=True))[:2]:
        run(spans, [row_of(states, 0, len(states) + len(ids) - 1, blocks)], [0] * len(states) + ids[:-1])
    singles = [
        row_of(states, len(states) + len(ids) - 1, 1, blocks)
        for states, ids, blocks in list(zip(many, texts, tables, strict=True))[:2]
    ]
    whole = row_of(many[2], 0, len(many[2]) + len(texts[2]), tables[2])
    alone = row_of(many[0], 0, 4, [40])
    ids = [texts[0][-1], *[0] * len(many[2]), *texts[2], *[0] * 4, texts[1][-1]]
    groups = spans[0]._plan([singles[0], whole, alone, singles[1]]).groups
    assert [group.batch for group in groups] == ([2, 1] if long else [1, 1, 1])
    logits = run(spans, [singles[0], whole, alone, singles[1]], ids)
    wanted = [logits_of(oracle, states, ids) for states, ids in zip(many, texts, strict=True)]
    close(logits[0], wanted[0][-1])
    close(logits[-1], wanted[1][-1])
    close(logits[1 + len(many[2]) : -5], wanted[2])


def test_what_enters_the_last_mlp_and_the_states_pass_through(model: Loaded) -> None:
    path, oracle = model
    states = states_of(oracle, CHUNKS)
    n = len(states)
    first, last = spans_of(path, 2)
    hidden = first.forward([row_of(states, 0, n + 3, [0, 1, 2])], torch.tensor([0] * n + [0, 4, 5]))
    assert torch.equal(hidden[:n], states)
    before = hidden.clone()
    out, entered = last.forward([CrossRow(0, n + 3, [0, 1, 2], n)], hidden, ffn_input=True)
    assert torch.equal(hidden, before) and torch.equal(out[:n], states)
    assert not entered[:n].any() and entered[n:].abs().sum(1).min() > 0


def test_a_stage_reads_its_own_tensors_alone(model: Loaded, tmp_path: Path) -> None:
    path, _ = model
    checkpoint, config = Checkpoint(path), read_config(path)
    names = span_tensors(checkpoint, config, 2, 4)
    assert not any(name.startswith(("encoder.", "decoder.block.0.layer.1", "decoder.block.1")) for name in names)
    first, last = split(path, 2, tmp_path / "parts")
    states, ids = torch.randn(5, 48), [0, 3, 4]
    tokens, rows = [0] * 5 + ids, [row_of(states, 0, 8, [0])]
    wanted = run(spans_of(path, 2), rows, tokens)
    parts = [T5Span.load(first, 0, 2, blocks=4), T5Span.load(last, 2, 4, blocks=4)]
    assert torch.equal(run(parts, rows, tokens)[5:], wanted[5:])
    assert Checkpoint(first).fingerprint() == checkpoint.fingerprint()


def test_an_earlier_transformers_config_is_read_alike(tmp_path: Path) -> None:
    """It tells by tie_word_embeddings whether the head's input is scaled, and names no scale."""
    for kind in ("v1.0", "v1.1"):
        path = t5(kind, tmp_path / kind)
        now = read_config(path)
        text = (path / "config.json").read_text()
        tied = "true" if kind == "v1.0" else "false"
        text = text.replace('"tie_word_embeddings": true', f'"tie_word_embeddings": {tied}')
        (path / "config.json").write_text(
            "\n".join(line for line in text.splitlines() if "scale_decoder_outputs" not in line)
        )
        assert read_config(path) == now


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a decoder-only model, it has no encoder"):
        T5Encoder(tiny("llama", tmp_path / "llama"))
    path = t5("v1.0", tmp_path / "t5")
    with pytest.raises(ValueError, match="is an encoder-decoder; T5Span is for those"):
        Span.load(path, 0, 4, blocks=1)
    with pytest.raises(ValueError, match="is no encoder-decoder"):
        T5Span.load(tmp_path / "llama", 0, 4, blocks=1)
    with pytest.raises(ValueError, match="deterministic is of decoder-only models"):
        T5Span.load(path, 0, 4, blocks=1, deterministic=4)
    with pytest.raises(ValueError, match="at least one token"):
        T5Encoder(path)([[]])
    with pytest.raises(ValueError, match="0 to 127"):
        T5Encoder(path)([[128]])
    model = t5_model("v1.0", relative_attention_num_buckets=6)
    model.save_pretrained(tmp_path / "odd")
    with pytest.raises(CheckpointError, match="multiple of 4"):
        read_config(tmp_path / "odd")
