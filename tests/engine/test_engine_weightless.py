"""Models built without weights: nothing of the process changes, whatever other threads build."""

import threading

import pytest
import torch
from ralmq.workers.engine.weightless import without_weights
from torch import nn

transformers = pytest.importorskip("transformers")
CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}


def described() -> object:
    return transformers.CONFIG_MAPPING["llama"](**CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parameters_have_the_dtype_and_no_memory(dtype: torch.dtype) -> None:
    model = without_weights(described(), dtype)
    assert {(found.dtype, found.device.type) for found in model.parameters()} == {(dtype, "meta")}
    assert model.config.dtype == dtype and not model.training
    told = transformers.AutoModelForCausalLM.from_config(described(), dtype=dtype)
    ours, theirs = dict(model.named_buffers()), dict(told.named_buffers())
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_the_default_dtype_of_the_process_is_never_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of all threads: two that each put it back in the other's order leave the wrong one for good."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", seen.append)
    without_weights(described(), torch.float16)
    assert seen == []


def test_what_other_threads_build_meanwhile_has_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, made = threading.Event(), threading.Event()
    real = nn.Embedding.__init__

    def slow(self: nn.Embedding, *args: object, **kwargs: object) -> None:
        if threading.current_thread() is not threading.main_thread() and not entered.is_set():
            entered.set()
            assert made.wait(60)
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.Embedding, "__init__", slow)
    building = threading.Thread(target=without_weights, args=(described(), torch.float16))
    building.start()
    assert entered.wait(60)
    layer = nn.Linear(3, 4)
    made.set()
    building.join(60)
    assert layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
