"""What a newcomer to remote modules does wrong: each mistake is said in a line that tells what to do instead."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ralmq
import torch
from ralmq.errors import ConnectionClosed, NoService, Refused
from ralmq.remote.home import close, connect
from ralmq.remote.tensor import to_worker
from remote_served import Served
from tokenizers import Tokenizer
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
Wrong = list[tuple[Callable[[], Any], type[Exception], str]]


def refused(wrong: Wrong) -> None:
    """Each raises this error, in one line with these words."""
    for call, kind, words in wrong:
        with pytest.raises(kind, match=words) as found:
            call()
        assert type(found.value) is kind and "\n" not in str(found.value)


def test_what_is_no_token_id_is_said_before_anything_is_sent(served: Served, asked: list[str]) -> None:
    pytest.importorskip("transformers")
    model = ralmq.from_pretrained("demo", {"one": "1GiB", "two": "1GiB"})
    size, text = int(model.config["vocab_size"]), ["a", "b"]
    asked.clear()
    long = torch.long
    wrong: Wrong = []
    for take in (model, model.generate):
        wrong += [
            (lambda take=take: take("text"), TypeError, r"not text: .*from_file\('.*tokenizer.json'\).encode"),
            (lambda take=take: take([text]), TypeError, "not text"),
            (lambda take=take: take({"input_ids": [[1]]}), TypeError, 'give its "input_ids"'),
            (lambda take=take: take(None), TypeError, "lists of whole numbers"),
            (lambda take=take: take([[1 << 70]]), Refused, "lists of one length.*Overflow"),
            (lambda take=take: take(torch.rand(1, 4)), TypeError, "whole numbers, not torch.float32"),
            (lambda take=take: take([[True]]), TypeError, "whole numbers, not torch.bool"),
            (lambda take=take: take([]), Refused, "no token id"),
            (lambda take=take: take(torch.zeros(1, 0, dtype=long)), Refused, "no token id"),
            (lambda take=take: take([[1, 2], [3]]), Refused, "pad shorter rows on the left"),
            (lambda take=take: take(torch.zeros(1, 1, 2, dtype=long)), Refused, r"\[rows, tokens\], not \[1, 1, 2\]"),
            (lambda take=take: take([[1, size]]), IndexError, f"token id {size} is not in the vocabulary of {size}"),
            (lambda take=take: take([[1, -3]]), IndexError, f"token id -3 .* 0 to {size - 1}"),
            (lambda take=take: take(np.array([[size]], np.uint16)), IndexError, f"token id {size} is not"),
        ]
    wrong += [(lambda: model([1, 2]), Refused, r"\[rows, tokens\], not \[2\]")]
    for count in (-1, 1.5, "8", None):
        wrong.append((lambda count=count: model.generate([1, 2], count), Refused, f"max_new_tokens={count!r}: "))
    refused(wrong)
    assert not asked and len(wrong) == 33
    ids = torch.tensor(Tokenizer.from_file(model.tokenizer).encode("def add(").ids)
    assert model.generate(ids, 0).tolist() == [ids.tolist()]
    expected = model.generate(ids, 3).tolist()
    assert len(expected[0]) == len(ids) + 3
    for same in (ids.tolist(), ids.to(torch.int16), ids.numpy(), [ids.tolist()], to_worker(ids, "two")):
        assert model.generate(same, np.int64(3)).tolist() == expected
    with pytest.raises(IndexError):  # what lies on a worker is looked at there
        model(to_worker(torch.tensor([[size]]), "one")).logits.to_here()


def test_without_a_vocabulary_or_files_ids_are_looked_at_all_the_same() -> None:
    from ralmq.remote.model.prompts import checked

    assert checked([[70_000]], 0, "tokenizer.json").tolist() == [[70_000]]
    with pytest.raises(IndexError, match="token id -1 is not in any vocabulary"):
        checked([[-1]], 0, "tokenizer.json")


def test_torch_says_what_to_do_with_what_is_on_a_worker(served: Served) -> None:
    one, two = ralmq.remote_copy(nn.Linear(3, 3), "one"), ralmq.remote_copy(nn.Linear(3, 3), "two")
    both, local = ralmq.DataParallel([one, two]), nn.Sequential(nn.ReLU())
    step, chain = r"RemoteTensor \(on a worker: use ralmq.RemoteOptimizer", r"call modules one after the other"
    wrong: Any = [
        (lambda: torch.optim.SGD(one.parameters(), lr=0.1), TypeError, step),
        (lambda: torch.optim.AdamW([{"params": one.parameters()}]), TypeError, step),
        (lambda: torch.optim.Adam(one.named_parameters()), TypeError, step),
        (lambda: nn.Sequential(one, nn.ReLU()), TypeError, rf"RemoteModule \(on a worker: {chain}"),
        (lambda: nn.ModuleList([nn.ReLU(), one]), TypeError, chain),
        (lambda: local.add_module("more", one), TypeError, chain),
        (lambda: setattr(local, "0", one), TypeError, chain),
        (lambda: nn.Sequential(both), TypeError, rf"DataParallel \(on a worker: {chain}"),
    ]
    refused(wrong)
    held = nn.Module()
    held.inner = one  # an attribute like any
    x = torch.ones(2, 3)
    assert torch.equal(held.inner(x).to_here(), one(x).to_here()) and not list(held.parameters())


def test_an_optimizer_says_what_it_takes(served: Served) -> None:
    one, two = ralmq.remote_copy(nn.Linear(3, 3), "one"), ralmq.remote_copy(nn.Linear(3, 3), "two")
    group, whole, own = (
        "one RemoteOptimizer for each group",
        r"not their parameters: give \[module\]",
        "of this process",
    )

    def made(proxies: Any) -> ralmq.RemoteOptimizer:
        return ralmq.RemoteOptimizer("sgd", proxies, lr=0.1)

    optimizer = made([one, two])
    state = optimizer.state_dict()
    several = {**state, "param_groups": state["param_groups"] * 2}
    refused(
        [
            (lambda: made([{"params": one}, {"params": two}]), Refused, group),
            (lambda: made({"params": [one]}), Refused, group),
            (lambda: optimizer.add_param_group({"params": [one]}), Refused, group),
            (lambda: optimizer.load_state_dict(several), Refused, f"of 2 groups: .*{group}"),
            (lambda: made(one.parameters()), Refused, whole),
            (lambda: made(next(iter(one.parameters()))), Refused, whole),
            (lambda: made([torch.ones(1)]), Refused, f"Tensor {own}"),
            (lambda: made([nn.Linear(1, 1)]), Refused, f"Linear {own}"),
            (lambda: made(nn.Linear(1, 1).parameters()), Refused, "not a generator"),
            (lambda: made(one), Refused, r"into \[ \]"),
            (lambda: made([]), Refused, "nothing to optimize"),
        ]
    )
    own_state = torch.optim.SGD(nn.Linear(1, 1).parameters(), momentum=0.9).state_dict() | {"state": {0: {}}}
    with pytest.raises(Refused, match="there is no 0"):
        optimizer.load_state_dict(own_state)


def test_a_tensor_stays_on_its_worker_until_to_here(served: Served) -> None:
    x = to_worker(torch.arange(3.0), "one")
    received = served.home.received
    for same in (x.cpu(), x.to("cpu"), x.to(torch.float64).to("cpu")):
        assert (same.worker, same.device) == ("one", torch.device("cpu"))
    assert served.home.received == received
    with pytest.raises(AttributeError, match="no numpy: fetch the tensor with to_here"):
        x.numpy()
    assert x.to_here().numpy().tolist() == [0, 1, 2] and served.home.received == received + 12


def test_a_state_says_which_names_do_not_match_as_torch_does(served: Served) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    remote, own = ralmq.remote_copy(module, "one"), module.state_dict()
    states: list[dict[str, torch.Tensor]] = [
        {name: tensor + 1 for name, tensor in own.items()},
        {"0.weight": torch.full((2, 3), 5.0), "other": torch.ones(1)},
        {},
    ]
    for strict, state in [(True, states[0]), *[(False, state) for state in states]]:
        found, expected = remote.load_state_dict(state, strict=strict), module.load_state_dict(state, strict=strict)
        assert (found.missing_keys, found.unexpected_keys) == (expected.missing_keys, expected.unexpected_keys)
        assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in remote.state_dict().items())
    for strict, state in ((True, states[1]), (False, {"0.weight": torch.ones(2, 2)})):
        with pytest.raises(RuntimeError) as theirs:
            module.load_state_dict(state, strict=strict)
        with pytest.raises(RuntimeError) as raised:
            remote.load_state_dict(state, strict=strict)
        assert str(raised.value) == str(theirs.value)
    odd: Any = {"0.weight": remote.get_parameter("0.weight")}
    listed: Any = list(own.items())
    refused(
        [
            (lambda: remote.load_state_dict(odd), TypeError, "0.weight of the state is a RemoteTensor.*to_here"),
            (lambda: remote.load_state_dict(listed), TypeError, "not a list: see state_dict"),
        ]
    )


def test_a_worker_that_is_not_there_is_named_with_those_that_are(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ralmq.remote.home.OPENING", 0.3)
    command = re.escape(f"`ralmq worker module -o name=nobody --broker {served.url}`; there are one, three, two")
    x = to_worker(torch.ones(1), "one")
    calls: list[Callable[[], Any]] = [
        lambda: ralmq.remote_copy(nn.Linear(1, 1), "nobody"),
        lambda: ralmq.remote("nn.ReLU", "nobody"),
        lambda: x.to_worker("nobody"),
        lambda: ralmq.from_pretrained("demo", {"nobody": "1GiB"}),
    ]
    refused([(call, NoService, command) for call in calls])
    monkeypatch.setattr("ralmq.remote.peer.MOST", 2)
    refused([(calls[0], NoService, r"there are one, three, \.\.\.$")])

    async def unsaid(*, deadline: float) -> dict[str, Any]:
        raise Refused("status is for others")

    monkeypatch.setattr(served.home.client, "status", unsaid)
    refused([(calls[0], NoService, "name=nobody .*; see `ralmq status`$")])
    assert x.to_here().tolist() == [1]


def test_what_is_used_after_close_says_so(served: Served) -> None:
    one, x = ralmq.remote_copy(nn.Linear(3, 3), "one"), to_worker(torch.ones(2, 3), "one")
    optimizer, made = ralmq.RemoteOptimizer("sgd", [one], lr=0.1), one(x)
    assert made.shape == (2, 3)
    home = served.home
    close()
    try:
        calls: list[Callable[[], Any]] = [
            *(x.to_here, lambda: x + 1, lambda: x.shape, lambda: x.to_worker("two"), lambda: asyncio.run(x.fetch())),
            *(lambda: one(torch.ones(2, 3)), one.state_dict, one.parameters, made.sum, made.backward, optimizer.step),
            lambda: home.peer("one"),
        ]
        again = "connection was closed.*connect.*copy modules and tensors to them again"
        refused([(call, ConnectionClosed, again) for call in calls])
        assert "failed: ConnectionClosed" in repr(x) and repr(one) == "RemoteModule(Linear, worker='one')"
    finally:
        served.home = connect(served.url, deadline=60)
    anew = ralmq.remote_copy(nn.Linear(3, 3), "one")
    refused([(lambda: anew(x), ConnectionClosed, again)])
    assert anew(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("all_reduce.py", []),
        ("all_reduce.py", ["many"]),
        ("all_reduce.py", ["0"]),
        ("ask.py", ["--help"]),
        ("data_parallel_inference.py", []),
        ("data_parallel_training.py", ["one", "one"]),
        ("hf_over_two_workers.py", ["--help"]),
        ("hf_over_two_workers.py", ["demo", "one"]),
        ("pipeline_training.py", ["one", "two"]),
        ("remote_copy.py", ["one"]),
    ],
)
def test_examples_print_how_to_use_them(name: str, arguments: list[str]) -> None:
    assert said(name, *arguments).startswith(f"usage: python {name} ")


def test_examples_print_what_is_wrong_with_a_name(served: Served, tmp_path: Path) -> None:
    """A worker, a directory or a file that is not there: nothing is computed and no traceback is seen."""
    environment = {"RALMQ_BROKER": served.url}
    assert "-o name=nobody " in said("remote_copy.py", "one", "nobody", **environment)
    assert "no such directory" in said("hf_over_two_workers.py", str(tmp_path / "none"), "one", "two", **environment)
    rows = str(tmp_path / "rows.jsonl")
    assert "name a .jsonl file" in said("data_parallel_inference.py", "demo", rows, rows, **environment)


def said(name: str, *arguments: str, **environment: str) -> str:
    """The one line that an example ends with."""
    ended = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1 and not ended.stdout
    (line,) = ended.stderr.splitlines()
    return line
