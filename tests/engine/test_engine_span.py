"""Spans against transformers in one process, and against themselves split otherwise."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import Chain, random_ids, reference
from checkpoints import CONTEXT, FAMILIES, HIDDEN, VOCAB, tiny_model
from ralmq.workers.engine import step
from ralmq.workers.engine.checkpoint import Checkpoint, Entry
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.span import Row, Span
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

BOUND = 1e-4
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
Made = tuple[Path, PreTrainedModel]
Make = Callable[..., Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tiny checkpoint and the transformers model that wrote it, made once for the same arguments."""

    @functools.cache
    def made(family: str, **changes: Any) -> Made:
        model = tiny_model(family, **changes)
        path = tmp_path_factory.mktemp(family)
        model.save_pretrained(path)
        return path, model

    return made


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_and_splitting_changes_no_bit(make: Make, family: str, tied: bool) -> None:
    path, model = make(family, tie_word_embeddings=tied)
    ids = random_ids(45)
    whole = Chain(path, 1).decode(ids, 21, [7, 3, 12])
    assert (whole - reference(model, ids)).abs().max() < BOUND
    assert whole.std() > 0.2  # logits that say something
    for parts in (2, 3, 4):
        assert torch.equal(Chain(path, parts).decode(ids, 21, [7, 3, 12]), whole)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
        ("qwen3", {"attention_bias": True}),
        ("gpt2", {"activation_function": "gelu"}),
        ("gpt2", {"n_inner": 100, "activation_function": "relu"}),
        ("mistral", {"sliding_window": CONTEXT}),
        ("opt", {"enable_bias": False, "activation_function": "gelu"}),
        ("gemma2", {"attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0}),
        ("gemma3_text", {"attention_bias": True, "final_logit_softcapping": 2.0}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
        ("mixtral", {"num_experts_per_tok": 1, "head_dim": 32}),
        ("qwen3_moe", {"norm_topk_prob": True, "attention_bias": True}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen2", {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}}),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 4.0, "truncate": False}}),
        ("llama", {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}}),
        ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 0.9, "beta_slow": 0.5}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)
def test_every_switch_of_a_family(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, 2, **changes)
    model.save_pretrained(tmp_path)
    ids = random_ids(100)
    got = Chain(tmp_path, 2).decode(ids, 90, [4, 5, 0, 1, 6, 2, 3])
    assert (got - reference(model, ids)).abs().max() < BOUND


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Tensor, steps: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers with its own cache, and the margin between the best two logits at each."""
    tokens, margins, cache, ids = [], [], None, prompt
    for _ in range(steps):
        out = model(ids[None], past_key_values=cache, use_cache=True)
        best = out.logits[0, -1].topk(2).values
        cache = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
        margins.append(float(best[0] - best[1]))
        ids = torch.tensor(tokens[-1:])
    return tokens, margins


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_a_batch_are_those_of_transformers(make: Make, family: str, parts: int) -> None:
    path, model = make(family)
    prompts = [random_ids(n, seed=n) for n in (1, 5, 16, 33)]
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    chain = Chain(path, parts)
    rows = [Row(0, len(prompt), list(range(4 * i, 4 * i + 4))) for i, prompt in enumerate(prompts)]
    ends = torch.tensor([row.count for row in rows]).cumsum(0) - 1
    hidden = chain.forward(rows, torch.cat(prompts))
    logits = chain.spans[-1].head(hidden, ends)
    compared = 0
    for place in range(24):
        for i, (tokens, margins) in enumerate(expected):
            if margins[place] > BOUND:
                assert int(logits[i].argmax()) == tokens[place]
                compared += 1
        # The reference's tokens go on, so that a near-tie does not end the comparison.
        ids = torch.tensor([tokens[place] for tokens, _ in expected])
        rows = [Row(row.position + row.count, 1, row.blocks) for row in rows]
        logits = chain.logits(rows, ids)
    assert compared > 80


def test_a_mixed_step_gives_what_each_row_gives_alone(make: Make) -> None:
    path, _ = make("llama")
    ids = [random_ids(40, seed=i) for i in range(4)]
    tables = [[3, 1, 2], [4, 5, 6], [9, 8, 7], [10, 11, 12]]
    alone = [Chain(path).decode(sequence, 40, table) for sequence, table in zip(ids, tables, strict=True)]
    chain = Chain(path)
    for sequence, table, done in ((0, 0, 30), (1, 1, 12), (2, 2, 7)):
        chain.forward([Row(0, done, tables[table])], ids[sequence][:done])
    rows = [
        Row(30, 1, tables[0]),
        Row(12, 20, tables[1]),  # a later chunk of a prompt
        Row(7, 1, tables[2]),
        Row(0, 33, tables[3]),
    ]
    pieces = [sequence[row.position : row.position + row.count] for sequence, row in zip(ids, rows, strict=True)]
    mixed = chain.logits(rows, torch.cat(pieces))
    parts = [whole[row.position : row.position + row.count] for whole, row in zip(alone, rows, strict=True)]
    assert (mixed - torch.cat(parts)).abs().max() < 1e-5


def test_a_short_row_beside_a_long_one(tmp_path: Path) -> None:
    """The padding of a short row is then longer than the block of keys that an attention kernel takes at once."""
    model = tiny_model("llama", 2, max_position_embeddings=2048)
    model.save_pretrained(tmp_path)
    long, short = random_ids(1500), random_ids(4, seed=1)
    chain = Chain(tmp_path, blocks=96)
    chain.forward([Row(0, 1499, list(range(94)))], long[:-1])
    chain.forward([Row(0, 3, [95])], short[:-1])
    got = chain.logits([Row(3, 1, [95]), Row(1499, 1, list(range(94)))], torch.stack((short[-1], long[-1])))
    expected = torch.stack((reference(model, short)[-1], reference(model, long)[-1]))
    assert (got - expected).abs().max() < BOUND


def test_long_rows_of_one_token_attend_one_by_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is padded to the longest; prompts stay as they are, and short rows together."""
    config = read_config(make("llama")[0])
    monkeypatch.setattr(step, "SHORT", 64 * 2 * config.kv_heads * config.head_dim * 4)
    rows = [Row(5, 1, [0]), Row(200, 1, list(range(13))), Row(7, 9, [1]), Row(63, 1, [4] * 4), Row(64, 1, [5] * 5)]

    def read(rows: list[Row], changes: dict[str, Any], **options: Any) -> list[tuple[int, int]]:
        """Rows and blocks of each group."""
        made = step.plan(rows, replace(config, **changes), None, torch.float32, torch.device("cpu"), **options)
        return sorted((group.batch, len(group.views[max(group.views)].table)) for group in made.groups)

    assert read(rows, {}) == [(1, 1), (1, 5), (1, 13), (2, 8)]
    assert read(rows, {"windows": (0, 20)}) == [(1, 1), (1, 2), (1, 3), (2, 4)]
    assert read(rows, {"windows": (20,)}) == [(1, 1), (4, 12)]  # none of them reads much
    assert read([rows[0], rows[1]], {}, width=16) == [(2, 32)]  # one shape, whatever the rows are
    for windows in ((), (20,)):
        only = replace(config, windows=windows)
        alone = step.plan(rows[:1], only, None, torch.float32, torch.device("cpu"))
        assert [view.mask for view in alone.groups[0].views.values()] == [None]
    elsewhere = step.plan(rows, config, None, torch.float32, torch.device("meta"))
    assert sorted(group.batch for group in elsewhere.groups) == [1, 4]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_blocks_that_another_sequence_used_change_nothing(make: Make, family: str) -> None:
    path, _ = make(family)
    chain = Chain(path, 2, blocks=4)
    fresh = chain.decode(random_ids(37), 20, [2, 0, 3])
    chain.decode(random_ids(60, seed=5), 50, [0, 1, 2, 3])
    assert torch.equal(chain.decode(random_ids(37), 20, [2, 0, 3]), fresh)


def test_two_sequences_may_share_the_blocks_of_a_common_prefix(make: Make) -> None:
    path, model = make("llama")
    prefix, ends = random_ids(32), [random_ids(6, seed=i) for i in (1, 2)]
    chain = Chain(path, 2)
    chain.forward([Row(0, 32, [5, 9])], prefix)
    got = chain.logits([Row(32, 6, [5, 9, 1]), Row(32, 6, [5, 9, 2])], torch.cat(ends))
    expected = torch.cat([reference(model, torch.cat((prefix, end)))[32:] for end in ends])
    assert (got - expected).abs().max() < BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_input_is_what_enters_the_last_mlp(make: Make, family: str) -> None:
    path, model = make(family)
    seen: list[Tensor] = []
    layers = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}.get(family, "model.layers")
    last_layer = model.get_submodule(layers)[-1]
    mlp = last_layer.fc1 if family == "opt" else last_layer.mlp
    hook = mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].view(-1, HIDDEN)))
    ids = random_ids(30)
    reference(model, ids)
    hook.remove()
    first, last = Chain(path, 2).spans
    rows = [Row(0, 30, [1, 0])]
    hidden, entered = last.forward(rows, first.forward(rows, ids), ffn_input=True)
    assert entered.shape == (30, HIDDEN)
    assert (entered - seen[0]).abs().max() < BOUND
    assert torch.equal(hidden, last.forward(rows, first.forward(rows, ids)))


def test_head_gives_the_wanted_rows_as_fp32(make: Make) -> None:
    path, _ = make("llama")
    span = Span.load(path, 0, 4, dtype="bf16", blocks=4)
    hidden = span.forward([Row(0, 9, [0])], random_ids(9))
    logits = span.head(hidden)
    assert logits.dtype == torch.float32 and logits.shape == (9, VOCAB)
    for want in ([8, 2], torch.tensor([8, 2])):
        assert torch.allclose(span.head(hidden, want), logits[[8, 2]], atol=0.02)
    assert span.head(hidden, []).shape == (0, VOCAB)


def test_forward_leaves_its_input_alone(make: Make) -> None:
    path, _ = make("llama")
    span = Span.load(path, 2, 4, blocks=4)
    x = torch.randn(5, HIDDEN)
    before = x.clone()
    span.forward([Row(0, 5, [0])], x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_near(make: Make, family: str, dtype: str) -> None:
    path, model = make(family)
    ids = random_ids(30)
    span = Span.load(path, 0, 4, dtype=dtype, blocks=4)
    hidden = span.forward([Row(0, 29, [1, 0])], ids[:29])
    hidden = span.forward([Row(29, 1, [1, 0])], ids[29:])
    error = (span.head(hidden)[0] - reference(model, ids)[-1]).abs().max()
    assert hidden.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert 0 < error < (0.15 if dtype == "bf16" else 0.02)


def test_a_half_precision_checkpoint_is_cast_when_loaded(tmp_path: Path) -> None:
    tiny_model("llama").half().save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).entry("model.norm.weight").dtype == "F16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(20)
    got = Chain(tmp_path, 2).decode(ids, 20, [0, 1])
    assert (got - reference(model, ids)).abs().max() < BOUND


def test_int32_ids_serve(make: Make) -> None:
    path, _ = make("gpt2")
    ids = random_ids(8)
    assert torch.equal(
        Chain(path).logits([Row(0, 8, [0])], ids.int()), Chain(path).logits([Row(0, 8, [0])], ids.long())
    )


@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", True), ("llama", False)])
def test_a_span_opens_its_own_tensors_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool
) -> None:
    path, model = make(family, tie_word_embeddings=tied)
    opened: list[str] = []
    entry = Checkpoint.entry

    def spy(self: Checkpoint, name: str) -> Entry:
        opened.append(name)
        return entry(self, name)

    monkeypatch.setattr(Checkpoint, "entry", spy)
    prefix = "transformer.h." if family == "gpt2" else "model.layers."
    layer = {number: {n for n in Checkpoint(path).names() if n.startswith(f"{prefix}{number}.")} for number in range(4)}
    outside = set(Checkpoint(path).names()) - set().union(*layer.values())
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    at_start = {embedding} | ({"transformer.wpe.weight"} if family == "gpt2" else set())
    at_end = (outside - at_start) | ({embedding} if tied else set())
    total = 0
    for first, last, extra in ((0, 1, at_start), (1, 3, set()), (3, 4, at_end)):
        opened.clear()
        total += Span.load(path, first, last, blocks=1).bytes
        assert set(opened) == set().union(*(layer[number] for number in range(first, last))) | extra
        assert len(opened) == len(set(opened))
    parameters = sum(p.numel() for p in model.parameters()) * 4
    assert total == parameters + (VOCAB * HIDDEN * 4 if tied else 0)
    assert Span.load(path, 0, 4, blocks=1).bytes == parameters


def test_the_shards_of_other_spans_need_not_be_there(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    ids = random_ids(12)
    expected = Chain(tmp_path, 2)
    rows = [Row(0, 12, [0])]
    hidden = expected.spans[0].forward(rows, ids)
    second = Checkpoint(tmp_path)
    needed = {second._files[n] for n in second.names() if n.startswith(("model.layers.2", "model.layers.3"))}
    needed |= {second._files[n] for n in ("model.embed_tokens.weight", "model.norm.weight")}
    others = set(tmp_path.glob("*.safetensors")) - needed
    assert len(others) >= 2
    for shard in others:
        shard.unlink()
    alone = Span.load(tmp_path, 2, 4, blocks=1)
    assert torch.equal(alone.forward(rows, hidden), expected.spans[1].forward(rows, hidden))
    with pytest.raises(ValueError, match="no such file"):
        Span.load(tmp_path, 0, 2, blocks=1)


def test_progress_and_sizes(make: Make) -> None:
    path, _ = make("llama")
    told: list[tuple[int, int]] = []
    span = Span.load(path, 0, 3, blocks=5, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 4) for done in range(5)]
    assert (span.is_first, span.is_last, span.blocks) == (True, False, 5)
    assert span.kv_bytes_per_block == 3 * 16 * 2 * 2 * 16 * 4
    told.clear()
    Span.load(path, 0, 4, blocks=5, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(7)]


@pytest.mark.parametrize(
    ("rows", "tokens", "message"),
    [
        ([Row(0, 3, [0])], 4, "rows list 3 tokens where 4 are given"),
        ([], 0, "rows list 0 tokens"),
        ([Row(16, 1, [0])], 1, "needs 17 tokens but its 1 blocks hold 16"),
        ([Row(0, 1, [])], 1, "0 blocks hold 0"),
        ([Row(CONTEXT, 1, [0] * 17)], 1, f"outside the context of {CONTEXT}"),
        ([Row(-1, 1, [0])], 1, "outside the context"),
        ([Row(0, 0, [0])], 0, "row of 0 tokens"),
        ([Row(0, 1, [64])], 1, "one of the 64 blocks"),
        ([Row(0, 1, [-1])], 1, "one of the 64 blocks"),
    ],
)
def test_rows_that_do_not_fit_are_refused(make: Make, rows: list[Row], tokens: int, message: str) -> None:
    path, _ = make("llama")
    with pytest.raises(ValueError, match=message):
        Span.load(path, 0, 1, blocks=64).forward(rows, random_ids(tokens))


def test_arguments_that_make_no_span_are_refused(make: Make) -> None:
    path, _ = make("llama")
    for first, last in ((0, 5), (2, 2), (-1, 2), (3, 1)):
        with pytest.raises(ValueError, match=f"layers {first}:{last} are not a span of the model's 4 layers"):
            Span.load(path, first, last, blocks=1)
    with pytest.raises(ValueError, match="dtype 'int4' is unknown; use one of fp32, bf16, fp16, int8"):
        Span.load(path, 0, 1, dtype="int4", blocks=1)
    with pytest.raises(ValueError, match="give at least 1"):
        Span.load(path, 0, 1, blocks=0)
    with pytest.raises(ValueError, match="only the last span"):
        Span.load(path, 0, 1, blocks=1).head(torch.zeros(1, HIDDEN))
