"""Where the layers of a model go, whose files they come from, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ralmq
import torch
from ralmq.errors import Refused
from ralmq.remote.model.placing import Place, placed, slots_of
from ralmq.remote.owner.pretrained import Pretrained
from ralmq.schema.plan.model import Model
from ralmq.workers.models import resolve
from remote_served import Served

MiB = 1 << 20
MODEL = Model("m", (10 * MiB,) * 8, (10 * MiB,) * 8, kv=1024, first=5 * MiB, last=5 * MiB)
DEMO = resolve("demo")[1]


def cuts(workers: Any, **options: Any) -> list[tuple[str, str, int, int]]:
    given: dict[str, Any] = {"balanced": True, "no_split": (), **options}
    found = placed(MODEL, slots_of(workers), 1024, **given)
    assert [place.first for place in found] == [0, *[place.last for place in found[:-1]]] and found[-1].last == 8
    return [(place.worker, place.device, place.first, place.last) for place in found]


def test_layers_are_spread_evenly_or_fill_one_device_after_the_other() -> None:
    workers = {"w1": {"cuda:0": "40MiB", "cuda:1": "50MiB"}, "w2": "1GiB"}
    assert [cut[:2] for cut in cuts(workers)] == [("w1", "cuda:0"), ("w1", "cuda:1"), ("w2", "")]
    assert [last - first for *_, first, last in cuts(workers)] in ([3, 3, 2], [2, 3, 3], [3, 2, 3])
    # 5 MiB of embedding and 11 MiB for a layer with the cache of 1,024 tokens
    assert cuts(workers, balanced=False) == [("w1", "cuda:0", 0, 3), ("w1", "cuda:1", 3, 7), ("w2", "", 7, 8)]
    assert cuts({"w1": 10 << 30, "w2": "1GiB"}, balanced=False) == [("w1", "", 0, 8)]


def test_runs_that_stay_together_are_not_cut() -> None:
    workers = {"w1": "1GiB", "w2": "1GiB"}
    assert cuts(workers) == [("w1", "", 0, 4), ("w2", "", 4, 8)]
    assert cuts(workers, no_split=[(3, 6)]) in (
        [("w1", "", 0, 3), ("w2", "", 3, 8)],
        [("w1", "", 0, 6), ("w2", "", 6, 8)],
    )
    assert placed(MODEL, slots_of({"w": "1GiB"}), 1024, balanced=True, no_split=[(0, 8)]) == [
        Place("w", "", 0, 8, 8 * 11 * MiB + 10 * MiB)
    ]


@pytest.mark.parametrize(
    ("workers", "options", "said"),
    [
        ({"w1": "20MiB", "w2": "20MiB"}, {}, "too little"),
        ({"w1": "20MiB", "w2": "20MiB"}, {"balanced": False}, "find no place"),
        ({"w1": "60MiB", "w2": "60MiB"}, {"no_split": [(0, 8)]}, "does not fit"),
        ({"w1": "1GiB"}, {"no_split": [(3, 9)]}, "runs of layers"),
        ({"w1": "1GiB"}, {"no_split": ["OPTDecoderLayer"]}, "never split"),
        ({"w1": "1GiB"}, {"no_split": [3]}, "runs of layers"),
        ({"w1": "1GiB"}, {"no_split": [(0, "2")]}, "runs of layers"),
        ({"w1": "much"}, {}, "w1"),
        ({"w1": 1e9}, {}, "whole bytes"),
        ({"w1": True}, {}, "whole bytes"),
        ({}, {}, "at least one worker"),
    ],
)
def test_what_does_not_fit_or_is_no_memory_is_refused(workers: Any, options: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        cuts(workers, **options)


@pytest.fixture
def copied(served: Served) -> Path:
    """A model in the folder of the worker three, and another directory with the same one."""
    if not (served.models / "small").exists():
        shutil.copytree(DEMO, served.models / "small")
    return served.models / "small"


def test_a_worker_reads_its_own_copy_and_gets_the_tensors_else(served: Served, copied: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shutil.copytree(DEMO, tmp_path / "small")
    ids = torch.arange(10)[None]
    model = ralmq.from_pretrained(tmp_path / "small", {"one": "1GiB", "three": "1GiB"})
    files = sum(file.stat().st_size for file in DEMO.glob("*.safetensors"))
    assert set(model.sent) == {"one"} and 0.4 * files < model.sent["one"] < 0.8 * files
    whole = ralmq.from_pretrained("small", {"three": "1GiB"})  # nothing of that name is here
    assert whole.sent == {} and len(whole.proxies) == 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits.to_here(), whole(ids).logits.to_here())
    config = (tmp_path / "small" / "config.json").read_text()
    (tmp_path / "small" / "config.json").write_text(config.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    other = ralmq.from_pretrained(tmp_path / "small", {"three": "1GiB"})  # not the model that it has
    assert set(other.sent) == {"three"}


def test_only_results_come_to_the_caller(served: Served) -> None:
    pytest.importorskip("transformers")
    model = ralmq.from_pretrained("demo", {"one": "1GiB", "two": "1GiB"})
    assert model.sent == {}  # every worker has the embedded one
    before = served.home.received
    out = model.generate(torch.arange(10)[None], 8, eos_ids=())
    assert out.shape == (1, 18)
    assert served.home.received - before == 8 * 8  # eight ids
    model(torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    assert served.home.received - before == 8 * 8


def test_memory_of_caches_is_freed(served: Served) -> None:
    pytest.importorskip("transformers")
    import gc
    import time

    model = ralmq.from_pretrained("demo", {"one": "1GiB", "two": "1GiB"})
    gc.collect()
    counts = []
    for _ in range(2):
        model.generate(torch.arange(10)[None], 8)
        gc.collect()
        until = time.monotonic() + 10
        while served.held("one") > 20 and time.monotonic() < until:
            time.sleep(0.05)
        counts.append(served.held("one"))
    assert max(counts) <= 20  # eight tokens make a hundred values


def test_what_a_worker_does_not_have_is_refused(served: Served, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="one has no model small"):
        ralmq.from_pretrained("small", {"one": "1GiB", "three": "1GiB"})
    for name in ("..", "../small", "/etc", ".", ""):
        assert Pretrained(str(served.models))._path(name) is None
    with pytest.raises(Refused, match="no such directory"):
        Pretrained(str(tmp_path / "none"))
    with pytest.raises(Refused, match="does not fit"):
        ralmq.from_pretrained("demo", {"one": "1MiB", "two": "1MiB"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bamba"}, "is not trained over workers"),
        ({"num_attention_heads": "four"}, "does not read this config"),
    ],
)
def test_no_family_but_those_on_the_list_is_built(served: Served, change: dict[str, Any], said: str) -> None:
    """What a caller sends as a config chooses among classes of transformers' that are on the list, and no code."""
    pytest.importorskip("transformers")
    from ralmq.remote.owner.spans import Span
    from ralmq.workers.engine.fields import read_json

    with pytest.raises(Refused, match=said):
        Span({**read_json(DEMO / "config.json"), **change}, 0, 3, torch.float32)
    span = Span(
        {**read_json(DEMO / "config.json"), "_attn_implementation": "hub/kernel", "attn_implementation": "hub/kernel"},
        0,
        3,
        torch.float32,
    )
    assert span.model.config._attn_implementation == "sdpa"


def test_files_of_adapters_that_do_not_fit_leave_the_model_alone(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    workers = {"one": "1GiB", "two": "1GiB"}
    ralmq.from_pretrained("demo", workers).add_adapter(r=2, target_modules=["q_proj"]).save_adapter(tmp_path)
    told, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(told.read_text()), weights.read_bytes()
    model = ralmq.from_pretrained("demo", workers)
    for change, said in (
        ({"target_modules": ["v_proj"]}, "are not those of this model"),
        ({"target_modules": ["k_proj"]}, "are not those of this model"),
        ({"target_modules": "("}, "a regular expression"),
        ({"r": 3}, "of another rank"),
        ({"r": "2"}, "of another rank"),
        ({"use_qalora": True}, "use_qalora is not read"),
        ({"init_lora_weights": "pissa_niter_4"}, "a changed model"),
        ({"target_modules": ["q_proj", "lm_head"]}, "can have no adapter"),
    ):
        told.write_text(json.dumps({**config, **change}))
        with pytest.raises(Refused, match=said):
            model.load_adapter(tmp_path)
    told.write_text(json.dumps(config))
    weights.write_bytes(b"none")
    with pytest.raises(Refused, match="holds no adapters"):
        model.load_adapter(tmp_path)
    weights.write_bytes(tensors)
    assert model.adapter is None and all(".lora_" not in name for name, _ in model.named_parameters())
    model.load_adapter(tmp_path)
    assert len(model.adapter_names(0)) == 6


def test_adapters_that_cannot_be_are_refused(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = ralmq.from_pretrained("demo", {"one": "1GiB"})
    with pytest.raises(Refused, match="there are down_proj"):
        model.add_adapter(target_modules=["query"])
    with pytest.raises(Refused, match="r of at least 1"):
        model.add_adapter(r=0)
    with pytest.raises(Refused, match="give numbers"):
        model.add_adapter(r=4.5)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="lm_head, which gives the logits"):
        model.add_adapter(target_modules=["q_proj", "lm_head"])
    with pytest.raises(Refused, match="add_adapter first"):
        model.save_adapter(tmp_path)
    with pytest.raises(Refused, match="holds no adapters"):
        model.load_adapter(tmp_path)
    model.add_adapter(target_modules=r".*\.(0|5)\.mlp\.(up|down)_proj")
    assert len(model.adapter_names(0)) == 8
    with pytest.raises(Refused, match="already"):
        model.add_adapter()
