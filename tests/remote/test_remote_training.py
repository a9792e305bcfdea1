"""Training through workers against the same in one process: results, gradients, parameters, bytes."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import ralmq
import torch
from ralmq.errors import Refused
from ralmq.remote.tensor import RemoteTensor, to_worker
from remote_served import Served
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

CALLS = 10


def linears(seed: int = 0, size: int = 8) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(seed)
    return nn.Linear(size, size), nn.Linear(size, size)


def chain(first: Any, second: Any, x: Any) -> Any:
    """Ten calls, in turn on the one and the other."""
    for _ in range(CALLS // 2):
        x = second(first(x).tanh()).tanh()
    return x


def rows(count: int = 4, size: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def furthest(remote: Any, local: nn.Module) -> float:
    own = local.state_dict()
    return max(float((found - own[name]).abs().max()) for name, found in remote.state_dict().items())


def grads(remote: Any) -> dict[str, torch.Tensor | None]:
    found = {name: parameter.grad for name, parameter in remote.named_parameters()}
    return {name: None if grad is None else grad.to_here() for name, grad in found.items()}


def assert_grads(remote: Any, local: nn.Module, most: float = 1e-6) -> None:
    wanted = {name: parameter.grad for name, parameter in local.named_parameters()}
    found = grads(remote)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (grad is None) == (found[name] is None), name
        if grad is not None:
            torch.testing.assert_close(found[name], grad, rtol=most, atol=most)


def test_a_chain_of_ten_calls_is_equal_bit_for_bit(served: Served) -> None:
    first, second = linears()
    x = rows()
    one, two = ralmq.remote_copy(first, "one"), ralmq.remote_copy(second, worker="two")
    before = served.home.received
    y = chain(one, two, x)
    assert isinstance(y, RemoteTensor) and y.worker == "two"
    assert y.shape == (4, 8) and served.home.received == before  # what is known of it came without it
    assert torch.equal(y.to_here(), chain(first, second, x))
    assert served.home.received - before == 4 * 8 * 4  # the result, and nothing else


@pytest.mark.parametrize(
    ("kind", "options"), [("sgd", {"momentum": 0.9}), ("sgd", {}), ("adamw", {"weight_decay": 0.1})]
)
def test_five_steps(served: Served, kind: str, options: dict[str, float]) -> None:
    first, second = linears()
    one, two = ralmq.remote_copy(first, "one"), ralmq.remote_copy(second, "two")
    make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    own = make([*first.parameters(), *second.parameters()], lr=0.05, **options)
    theirs = ralmq.RemoteOptimizer(kind, [one, two], lr=0.05, **options)
    x, target = rows(), rows(seed=2)
    before = served.home.received
    for _ in range(5):
        for optimizer, parts in ((own, (first, second)), (theirs, (one, two))):
            optimizer.zero_grad()
            loss = functional.mse_loss(chain(*parts, x), target)
            loss.backward()
            optimizer.step()
    assert served.home.received == before  # no gradient and no activation comes here
    assert float(loss) == pytest.approx(float(functional.mse_loss(chain(first, second, x), target)), rel=0.2)
    assert furthest(one, first) < 1e-6 and furthest(two, second) < 1e-6
    assert furthest(one, linears()[0]) > 1e-3  # they did move


def test_gradients_of_values_that_are_used_twice_and_of_leaves(served: Served) -> None:
    first, second = linears()
    one, two = ralmq.remote_copy(first, "one"), ralmq.remote_copy(second, "two")
    x = rows()
    leaf = x.clone().requires_grad_()
    far = to_worker(x, "three").requires_grad_()

    def work(a: Any, b: Any, given: Any) -> Any:
        hidden = a(given)
        other = b(hidden) * hidden + hidden[:, :1] - given
        parts = other.split(4, dim=-1)
        return (parts[0] @ parts[1].T).pow(2).mean() + hidden.topk(2).values.sum()

    work(first, second, leaf).backward()
    work(one, two, far).backward()
    assert_grads(one, first, 1e-5)
    assert_grads(two, second, 1e-5)
    assert far.grad is not None
    torch.testing.assert_close(far.grad.to_here(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_a_local_module_in_the_middle(served: Served) -> None:
    """Remote, local, remote, with a way around the middle; then a local loss."""
    first, second = linears()
    torch.manual_seed(3)
    middle = nn.Linear(8, 8)
    one, two = ralmq.remote_copy(first, "one"), ralmq.remote_copy(second, "two")
    x = rows().requires_grad_()
    ends = {}
    for name, (a, b) in {"local": (first, second), "remote": (one, two)}.items():
        for where in ("remote loss", "local loss"):
            x.grad = None
            for module in (middle, first, second):
                module.zero_grad()
            one.zero_grad(), two.zero_grad()
            hidden = a(x)
            held = hidden.to_here() if isinstance(hidden, RemoteTensor) else hidden
            out = b(middle(held).relu() + held) + hidden
            out = out.to_here() if where == "local loss" and isinstance(out, RemoteTensor) else out
            out.pow(2).sum().backward()
            assert x.grad is not None and middle.weight.grad is not None
            ends[name, where] = [x.grad.clone(), middle.weight.grad.clone()]
            if name == "remote":
                work = [parameter for _, parameter in (*one.named_parameters(), *two.named_parameters())]
                ends[name, where] += [parameter.grad.to_here() for parameter in work]  # type: ignore[union-attr]
            else:
                ends[name, where] += [found.grad.clone() for found in (*first.parameters(), *second.parameters())]  # type: ignore[union-attr]
    for where in ("remote loss", "local loss"):
        for found, wanted in zip(ends["remote", where], ends["local", where], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_second_way_back_needs_the_graph(served: Served) -> None:
    first, _ = linears()
    one = ralmq.remote_copy(first, "one")
    loss = one(rows()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    twice = first(rows()).sum()
    twice.backward(retain_graph=True)
    twice.backward()
    assert_grads(one, first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        to_worker(rows(), "one").sum().backward()
    with pytest.raises(RuntimeError, match="scalar"):
        one(rows()).backward()
    seed = rows(seed=5)
    one.zero_grad(), first.zero_grad()
    one(rows()).backward(seed)
    first(rows()).backward(seed)
    assert_grads(one, first)


def test_schedules_and_clipping_over_all(served: Served) -> None:
    first, second = linears()
    local = nn.Linear(8, 8)
    twin = copy.deepcopy(local)
    one, two = ralmq.remote_copy(first, "one"), ralmq.remote_copy(second, "two")
    all_own = [*first.parameters(), *second.parameters(), *twin.parameters()]
    own = torch.optim.SGD(all_own[:4], lr=0.5)
    theirs = ralmq.RemoteOptimizer("sgd", [one, two], lr=0.5)
    schedules = [torch.optim.lr_scheduler.StepLR(found, 1, gamma=0.5) for found in (own, theirs)]
    x = rows()
    for _ in range(3):
        own.zero_grad(), theirs.zero_grad(), local.zero_grad(), twin.zero_grad()
        chain(first, second, twin(x)).pow(2).sum().mul(50).backward()
        chain(one, two, local(x)).pow(2).sum().mul(50).backward()
        norm = torch.nn.utils.clip_grad_norm_(all_own, 1.0)
        assert norm > 1 and theirs.clip_grad_norm(1.0, local.parameters()) == pytest.approx(float(norm), rel=1e-5)
        torch.testing.assert_close(local.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-6)
        own.step(), theirs.step()
        for schedule in schedules:
            schedule.step()
    assert theirs.param_groups[0]["lr"] == own.param_groups[0]["lr"] == 0.0625
    assert furthest(one, first) < 1e-6 and furthest(two, second) < 1e-6
    assert math.isfinite(theirs.clip_grad_norm(1e9))
    with pytest.raises(Refused, match="sgd or adamw"):
        ralmq.RemoteOptimizer("lion", [one], lr=0.1)
    for wrong in (one, [{"params": one.parameters()}], one.parameters()):
        with pytest.raises(Refused, match="modules on workers"):
            ralmq.RemoteOptimizer("sgd", wrong, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"item\(\)"):
        ralmq.RemoteOptimizer("sgd", [one], lr=torch.tensor(0.1))  # type: ignore[arg-type]
    with pytest.raises(Refused, match="one group"):
        theirs.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(ValueError, match="learning rate"):
        ralmq.RemoteOptimizer("sgd", [one], lr=-1.0)


def test_frozen_modules_and_modes(served: Served) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    remote = ralmq.remote_copy(module, "one")
    x = rows()
    assert torch.equal(remote.eval()(x).to_here(), module.eval()(x))
    remote.train()
    assert not torch.equal(remote(x).to_here(), module(x))
    remote.freeze(["0.weight", "0.bias"]).eval()
    remote(x).sum().backward()
    found = grads(remote)
    assert found["0.weight"] is None and found["0.bias"] is None and found["3.weight"] is not None
    remote.freeze([])
    assert remote(x).requires_grad
    remote.freeze()
    assert not remote(x).requires_grad
    remote.requires_grad_()
    assert remote(x).requires_grad
    with pytest.raises(KeyError, match="no parameter"):
        remote.freeze(["nothing"])
    with torch.no_grad():
        assert not remote(x).requires_grad


def test_states_travel_in_hashed_pieces(served: Served, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ralmq.remote.chunks.CHUNK", 1000)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 3).to(torch.bfloat16))
    remote = ralmq.remote_copy(module, "one")
    remote.save(tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    own = module.state_dict()
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
    other = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    remote.load_state_dict(other)
    assert all(not tensor.any() for tensor in remote.state_dict().values())
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        remote.load_state_dict({"0.weight": torch.zeros(1)})


def test_structures_of_results(served: Served) -> None:
    remote = ralmq.remote("remote_modules:Odd", "one", size=3)
    x = torch.randn(2, 3, requires_grad=True)
    out = remote(x)
    assert list(out) == ["double", "pair"] and len(out) == 2
    plus, best = out["pair"]
    assert torch.equal(plus.to_here(), x + 1) and torch.equal(best.to_here(), x.argmax(dim=-1))
    (out["double"].sum() + plus.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))  # type: ignore[arg-type]
    whole = remote(x).to_here()
    assert torch.equal(whole["double"], 2 * x)
    (whole["double"].sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 5))  # type: ignore[arg-type]


def test_changes_in_place_under_gradients(served: Served) -> None:
    first, _ = linears()
    one = ralmq.remote_copy(first, "one")

    def work(module: Any, x: torch.Tensor) -> Any:
        hidden = module(x)
        hidden[:, 0] = 0
        hidden *= 2
        return hidden.exp().sum()

    work(first, rows()).backward()
    work(one, rows()).backward()
    assert_grads(one, first, 1e-5)
    leaf = to_worker(rows(), "one").requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        leaf.add_(1)
    hidden = one(rows())
    part = hidden[0]
    part.zero_()
    with pytest.raises(RuntimeError, match="shares its memory"):
        part.to_here()


def test_parameters_can_be_used_by_themselves(served: Served) -> None:
    first, _ = linears()
    one = ralmq.remote_copy(first, "one")
    penalty = sum(parameter.pow(2).sum() for parameter in one.parameters())
    (one(rows()).sum() + penalty).backward()  # type: ignore[operator]
    (first(rows()).sum() + sum(parameter.pow(2).sum() for parameter in first.parameters())).backward()
    assert_grads(one, first, 1e-5)
    names: Iterable[str] = [name for name, _ in one.named_parameters()]
    assert list(names) == ["weight", "bias"]


async def fetched(tensor: RemoteTensor) -> torch.Tensor:
    found: torch.Tensor = await tensor.fetch()
    return found


def test_fetched_from_asynchronous_code(served: Served) -> None:
    import asyncio

    y = to_worker(rows(), "one") * 2
    assert torch.equal(asyncio.run(fetched(y)), rows() * 2)
