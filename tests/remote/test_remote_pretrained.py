"""Hugging Face models over workers: logits, generation, training and adapters are those of the whole model here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ralmq
import torch
from ralmq.errors import Refused
from ralmq.remote.owner.adapters import Adapted, adapt
from ralmq.remote.owner.spans import FAMILIES as SPANNED
from ralmq.remote.pipeline import Pipeline
from remote_served import Served
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
WORKERS = {"one": "1GiB", "two": "1GiB"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99}
LLAMA = {
    **SIZES,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 99, "n_positions": 64},
    "opt": {**SIZES, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "gemma2": {**LLAMA, "head_dim": 8, "sliding_window": 4},
    "mistral": {**LLAMA, "sliding_window": 4},
    "qwen3": {**LLAMA, "head_dim": 8},
    "phi3": LLAMA,
    "gemma": {**LLAMA, "head_dim": 8},
    "stablelm": LLAMA,
    "olmo2": LLAMA,
}
FAMILIES = ["llama", "gpt2", "opt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each model."""
    found = tmp_path_factory.mktemp("models")
    for family, sizes in CONFIGS.items():
        torch.manual_seed(3)
        special = {"bos_token_id": 1, "eos_token_id": 2}
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if family == "gpt2" else {}
        dropout |= {"dropout": 0.0} if family == "opt" else {}
        config = transformers.CONFIG_MAPPING[family](**sizes, **special, **dropout)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found / family)
    return found


@pytest.fixture(autouse=True)
def _seeded(served: Served) -> Iterator[None]:
    torch.manual_seed(0)
    yield


def local(folder: Path, family: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32).eval()


def ids_of(rows: int = 2, count: int = 9) -> torch.Tensor:
    return torch.randint(3, 99, (rows, count))


def test_every_family_of_the_list_is_tested() -> None:
    assert set(CONFIGS) == SPANNED


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_whole_model(folder: Path, family: str) -> None:
    """Bit for bit, also with hidden states; attentions of the form of attention that has them."""
    model, whole, ids = ralmq.from_pretrained(folder / family, WORKERS), local(folder, family), ids_of()
    assert [(place.worker, place.first, place.last) for place in model.places] == [("one", 0, 2), ("two", 2, 4)]
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True)
        assert torch.equal(model(ids).logits.to_here(), expected.logits)
        found = model(ids, output_hidden_states=True, output_attentions=True)
        whole.set_attn_implementation("eager")
        attentions = whole(ids, output_attentions=True).attentions
    for theirs, ours in ((expected.hidden_states, found.hidden_states), (attentions, found.attentions)):
        assert len(theirs) == len(ours) == (5 if theirs is expected.hidden_states else 4)
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(other.to_here(), one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_generation_with_a_cache_gives_what_the_whole_model_does(folder: Path, family: str) -> None:
    model, whole, ids = ralmq.from_pretrained(folder / family, WORKERS), local(folder, family), ids_of()
    expected = ids
    with torch.no_grad():
        for _ in range(8):  # no cache: the whole text anew for each token
            expected = torch.cat((expected, whole(expected).logits[:, -1:].argmax(-1)), 1)
    assert model.generate(ids, max_new_tokens=8, eos_ids=()).tolist() == expected.tolist()
    stop = int(expected[0, 11])
    ended = model.generate(ids, max_new_tokens=8, eos_ids=[stop])
    first = expected[0, 9:].tolist().index(stop)
    assert ended[0, 9:].tolist()[: first + 1] == expected[0, 9 : 10 + first].tolist()
    assert set(ended[0, 10 + first :].tolist()) <= {stop}
    padded = torch.cat((torch.ones(2, 3, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)), 1)
    assert model.generate(padded, 8, attention_mask=mask, eos_ids=())[:, 12:].tolist() == expected[:, 9:].tolist()
    alone = model.generate(ids[1, 4:], 8, eos_ids=(), attention_mask=torch.ones(5))[0, 5:].tolist()
    uneven = torch.stack((ids[0], torch.cat((torch.ones(4, dtype=torch.long), ids[1, 4:]))))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    found = model.generate(uneven, 8, attention_mask=mask, eos_ids=())[:, 9:].tolist()
    assert found == [expected[0, 9:].tolist(), alone]


def test_what_cannot_be_generated_is_refused(folder: Path) -> None:
    model, ids = ralmq.from_pretrained(folder / "llama", WORKERS), ids_of()
    ends = torch.tensor([[1] * 9, [1] * 8 + [0]])
    for options, said in (
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-310}, "temperature=1e-310"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ({"attention_mask": ends}, "padded on the right"),
        ({"attention_mask": ends[:, :4]}, r"is \[2, 4\] for ids of \[2, 9\]"),
    ):
        with pytest.raises(Refused, match=said):
            model.generate(ids, 2, **options)
    every = model.generate(ids, 2, temperature=1.0, top_k=1000, eos_ids=())
    assert every.tolist() == model.generate(ids, 2, temperature=1.0, eos_ids=()).tolist()


def loss_of(whole: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = whole(ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def test_sampling_is_that_of_the_definition(folder: Path) -> None:
    """The same tokens as when the logits of a local model go through the definition, token by token."""
    model, whole, ids = ralmq.from_pretrained(folder / "llama", WORKERS), local(folder, "llama"), ids_of()
    found = model.generate(ids, 12, temperature=0.8, top_k=20, top_p=0.9, seed=11, eos_ids=())
    generator, expected = torch.Generator().manual_seed(11), ids
    for _ in range(12):
        with torch.no_grad():
            scores = whole(expected).logits[:, -1].double() / 0.8
        draws = torch.rand(2, 1, dtype=torch.float64, generator=generator)
        rows = []
        for row, draw in zip(scores, draws.flatten().tolist(), strict=True):
            order = row.argsort(descending=True)[:20].tolist()
            weights = torch.softmax(row[order], 0).tolist()
            nucleus = [w for place, w in enumerate(weights) if sum(weights[:place]) < 0.9]
            left = draw * sum(nucleus)
            rows.append(order[next(place for place in range(len(nucleus)) if left < sum(nucleus[: place + 1]))])
        expected = torch.cat((expected, torch.tensor(rows)[:, None]), 1)
    assert found.tolist() == expected.tolist()
    assert model.generate(ids, 12, temperature=0.8, top_k=20, top_p=0.9, seed=12, eos_ids=()).tolist() != found.tolist()


def trained(model: Any, optimizer: Any, whole: Any, reference: Any, ids: torch.Tensor, *, steps: int) -> list[float]:
    """The losses of both, which are the same at each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        reference.zero_grad()
        loss, expected = model(ids, labels=ids).loss, loss_of(whole, ids)
        loss.backward()
        expected.backward()
        optimizer.step()
        reference.step()
        losses.append(float(loss))
        assert losses[-1] == pytest.approx(float(expected), abs=1e-5)
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_train_as_in_one_process(folder: Path, family: str, tmp_path: Path) -> None:
    """Tied embeddings on two workers, too, are one weight with one gradient."""
    model, whole, ids = ralmq.from_pretrained(folder / family, WORKERS), local(folder, family), ids_of(4)
    optimizer = ralmq.RemoteOptimizer("adamw", [model], lr=1e-2)
    reference = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    losses = trained(model, optimizer, whole, reference, ids, steps=5)
    assert losses[-1] < losses[0] - 0.2
    state, theirs = model.state_dict(), whole.state_dict()
    assert set(theirs) - set(state) <= {"lm_head.weight"}
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.to_here(), whole(ids).logits, atol=1e-4, rtol=0)
        model.requires_grad_(False)  # the copy of a tied embedding on the last worker is an old one
        torch.testing.assert_close(model(ids).logits.to_here(), whole(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_as_in_one_process(folder: Path, family: str, tmp_path: Path) -> None:
    """20 steps: the same losses within 1e-5, only adapters have gradients, and nothing else has changed."""
    model, whole, ids = ralmq.from_pretrained(folder / family, WORKERS), local(folder, family), ids_of(4)
    before = model.state_dict()
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj"]
    model.add_adapter(r=4, lora_alpha=16, target_modules=targets, seed=5)
    adapt(
        whole,
        [name for name, _ in whole.named_modules() if name.endswith(tuple(targets))],
        r=4,
        alpha=16,
        dropout=0.0,
        seed=5,
    )
    assert sum(isinstance(part, Adapted) for part in whole.modules()) == (12 if family == "gpt2" else 8)
    optimizer = ralmq.RemoteOptimizer("adamw", [model], lr=1e-2)
    reference = torch.optim.AdamW([own for own in whole.parameters() if own.requires_grad], lr=1e-2)
    losses = trained(model, optimizer, whole, reference, ids, steps=20)
    assert losses[-1] < losses[0]
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_grad == {name for name, own in whole.named_parameters() if own.grad is not None}
    assert all(".lora_A." in name or ".lora_B." in name for name in with_grad)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.save_adapter(tmp_path / "adapter")
    again = ralmq.from_pretrained(folder / family, {"two": "1GiB", "three": "1GiB"}).load_adapter(tmp_path / "adapter")
    assert torch.equal(again(ids).logits.to_here().detach(), model(ids).logits.to_here().detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_in_the_form_of_peft(folder: Path, family: str, tmp_path: Path) -> None:
    """Names and fields."""
    model = ralmq.from_pretrained(folder / family, WORKERS).add_adapter(r=2, lora_alpha=4)
    model.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]) == ("LORA", 2, 4, targets)
    assert config["fan_in_fan_out"] is (family == "gpt2")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}[family]
    inner = "attn" if family == "gpt2" else "self_attn"
    assert set(tensors) == {
        f"base_model.model.{layers}.{layer}.{inner}.{target}.lora_{side}.weight"
        for layer in range(4)
        for target in targets
        for side in "AB"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_adapters_from_here_and_its_own_are_read(folder: Path, family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = ralmq.from_pretrained(folder / family, WORKERS), ids_of()
    model.add_adapter(r=2, lora_alpha=4)
    optimizer = ralmq.RemoteOptimizer("sgd", [model], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(local(folder, family), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.to_here(), theirs(ids).logits, atol=1e-5, rtol=0)
    base = local(folder, family)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "theirs")
    read = ralmq.from_pretrained(folder / family, WORKERS).load_adapter(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits.to_here(), theirs.eval()(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_dtypes_and_named_devices(folder: Path, dtype: str) -> None:
    model, ids = ralmq.from_pretrained(folder / "llama", {"one": {"cpu": "1GiB"}, "two": "1GiB"}, dtype=dtype), ids_of()
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=kind).eval()
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.dtype == kind and torch.equal(logits.to_here(), whole(ids).logits)
    with pytest.raises(Refused, match="dtype int8 is unknown"):
        ralmq.from_pretrained(folder / "llama", WORKERS, dtype="int8")


def test_micro_batches_give_the_gradients_of_the_whole_batch(folder: Path) -> None:
    """The spans are stages of a Pipeline as they are."""

    def loss(logits: Any, ids: torch.Tensor) -> Any:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    model = ralmq.from_pretrained(folder / "opt", WORKERS).add_adapter(r=4, lora_alpha=8)
    ids = ids_of(8)
    whole = loss(model(ids).logits, ids)
    whole.backward()
    expected = {name: own.grad.to_here() for name, own in model.named_parameters() if own.grad is not None}
    model.zero_grad()
    report = Pipeline(model.proxies, loss, schedule="1f1b").step(ids, ids, micro_batches=4)
    assert report.loss == pytest.approx(float(whole.detach()), abs=1e-5)
    found = {name: own.grad.to_here() for name, own in model.named_parameters() if own.grad is not None}
    assert len(expected) == 16 and expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=0)


def test_a_weight_of_two_stages_is_trained_by_no_pipeline(folder: Path) -> None:
    """Each stage would train its own copy of it."""
    model, ids = ralmq.from_pretrained(folder / "gpt2", WORKERS), ids_of(8)
    pipeline = Pipeline(model.proxies, lambda logits, ids: logits.flatten(0, 1).mean())
    with pytest.raises(Refused, match="weight of two stages"):
        pipeline.step(ids, ids)
    model.proxies[0].freeze([model.proxies[0].tied])
    assert pipeline.step(ids, ids).loss != 0


def test_a_cache_goes_on_by_hand(folder: Path) -> None:
    """What `use_cache` gave is what the next call takes, in any number of tokens."""
    model, ids = ralmq.from_pretrained(folder / "gpt2", WORKERS), ids_of(2, 12)
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:9], past=first.past)
        third = model(ids[:, 9:], past=second.past, keep=1)
        assert third.logits.shape == (2, 1, 99)
        torch.testing.assert_close(third.logits.to_here()[:, -1], model(ids).logits.to_here()[:, -1], atol=1e-5, rtol=0)
