"""Replicas on several workers: gradients of the whole batch, the same steps everywhere."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ralmq
import torch
from ralmq.errors import NoService, Refused, WorkerLost
from ralmq.remote.home import connect
from ralmq.remote.owner import replicas
from ralmq.remote.owner.replicas import bunches
from remote_served import Served
from serving import broker, free_url, worker
from torch import nn
from torch.nn.functional import mse_loss

NAMES = ["one", "two", "three"]


@pytest.fixture(autouse=True)
def _seeded(served: Served) -> None:
    torch.manual_seed(0)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def spread(module: nn.Module, count: int) -> ralmq.DataParallel:
    return ralmq.DataParallel([ralmq.remote_copy(module, worker=name) for name in NAMES[:count]])


def grads(proxy: ralmq.RemoteModule) -> list[torch.Tensor]:
    return [parameter.grad.to_here() for parameter in proxy.parameters() if parameter.grad is not None]


def same(found: list[torch.Tensor], expected: list[torch.Tensor], near: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=0)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rows", [12, 7])
def test_gradients_are_those_of_the_whole_batch(count: int, rows: int) -> None:
    """Also of parts of different sizes, and the same bits on each worker."""
    module = block()
    parallel = spread(module, count)
    x, y = torch.randn(rows, 6), torch.randn(rows, 3)
    local = x.clone().requires_grad_()
    expected = mse_loss(module(local), y)
    expected.backward()
    given = x.clone().requires_grad_()
    out = parallel(given)
    torch.testing.assert_close(out.to_here().detach(), module(x).detach(), atol=1e-6, rtol=0)
    loss = mse_loss(out, y)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    found = [grads(proxy) for proxy in parallel.proxies]
    same(found[0], [parameter.grad for parameter in module.parameters() if parameter.grad is not None], 1e-6)
    assert all(torch.equal(one, other) for own in found[1:] for one, other in zip(found[0], own, strict=True))
    assert given.grad is not None and local.grad is not None
    torch.testing.assert_close(given.grad, local.grad, atol=1e-6, rtol=0)


def test_several_buckets_and_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bunches([5, 5, 5]) == [(0, 3)] and bunches([]) == []
    monkeypatch.setattr(replicas, "LARGEST", 10)
    assert bunches([5, 5, 5, 20, 1]) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    module = block()
    parallel = spread(module, 3)
    x = torch.randn(6, 6)
    parallel(x).sum().backward()
    module(x).sum().backward()
    same(grads(parallel.proxies[2]), [own.grad for own in module.parameters() if own.grad is not None], 1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_are_those_of_one_process_and_equal_everywhere(kind: str) -> None:
    module = block()
    parallel = spread(module, 2)
    optimizer = ralmq.RemoteOptimizer(kind, [parallel], lr=0.05)
    make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    reference = make(module.parameters(), lr=0.05)
    for _ in range(5):
        x, y = torch.randn(8, 6), torch.randn(8, 3)
        for step, forward, zero in ((optimizer, parallel, parallel), (reference, module, module)):
            zero.zero_grad()
            mse_loss(forward(x), y).backward()
            if step is optimizer:
                norm = optimizer.clip_grad_norm(0.1)
            else:
                assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(module.parameters(), 0.1)), abs=1e-6)
            step.step()
    states = [list(proxy.state_dict().values()) for proxy in parallel.proxies]
    same(states[0], list(module.state_dict().values()), 1e-6)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_gradients_add_up_over_passes_with_and_without_exchange() -> None:
    module = block()
    parallel = spread(module, 2)
    batches = [(torch.randn(4, 6), torch.randn(4, 3)) for _ in range(3)]
    for x, y in batches:
        mse_loss(module(x), y).backward()
    expected = [own.grad for own in module.parameters() if own.grad is not None]
    for x, y in batches:  # exchanged in each pass
        mse_loss(parallel(x), y).backward()
    same(grads(parallel.proxies[1]), expected, 1e-6)
    parallel.zero_grad()
    for number, (x, y) in enumerate(batches):
        if number < 2:
            with parallel.no_sync():
                mse_loss(parallel(x), y).backward()
        else:
            apart = [grads(proxy)[0] for proxy in parallel.proxies]
            assert not torch.equal(*apart)
            mse_loss(parallel(x), y).backward()
    same(grads(parallel.proxies[0]), expected, 1e-6)


def test_an_exchange_asks_no_more_than_it_must(
    served: Served, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two replicas, and of few elements, two calls of each; else three. And the same bits either way."""
    x, default = torch.randn(6, 6), replicas.FEW
    found = {}
    for count, few, calls in ((2, 0, 4), (3, default, 6), (3, 0, 9)):
        monkeypatch.setattr(replicas, "FEW", few)
        torch.manual_seed(1)
        parallel = spread(block(), count)
        parallel(x).sum().backward()
        found[count, few] = grads(parallel.proxies[0])
        asked.clear()
        parallel.average()
        assert len(asked) == calls
    assert all(torch.equal(one, other) for one, other in zip(found[3, default], found[3, 0], strict=True))


def test_the_first_ones_weights_go_to_all_and_nothing_comes_here(served: Served) -> None:
    one, two = ralmq.remote_copy(block(), worker="one"), ralmq.remote_copy(block(), worker="two")
    before = served.home.received
    parallel = ralmq.DataParallel([one, two])
    mse_loss(parallel(torch.randn(8, 6)), torch.randn(8, 3)).backward()
    assert served.home.received == before
    first, second = (list(proxy.state_dict().values()) for proxy in parallel.proxies)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def test_frozen_and_unused_parameters_get_no_gradient() -> None:
    parallel = spread(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 2)
    parallel.requires_grad_(False, ["0.weight"])
    parallel(torch.randn(4, 2)).sum().backward()
    for proxy in parallel.proxies:
        assert {name for name, own in proxy.named_parameters() if own.grad is not None} == {
            "0.bias",
            "1.weight",
            "1.bias",
        }
    parallel.proxies[0].requires_grad_(False, ["1.bias"])
    with pytest.raises(Refused, match="same parameters"):
        parallel.average()


@pytest.mark.parametrize("when", ["before the loss", "before the way back", "in the way back", "before the step"])
def test_a_replica_that_is_killed_is_an_error_and_no_wait(tmp_path: Path, when: str) -> None:
    url = free_url()
    replica = {name: worker(tmp_path, url, "module", name=name) for name in "ab"}
    with broker(tmp_path, url), replica["a"], replica["b"] as lost:
        home = connect(url, wait=30, deadline=60, default=False)
        try:
            until(lambda: copied(url, "a") and copied(url, "b"))
            parallel = ralmq.DataParallel([ralmq.remote_copy(block(), name, broker=url) for name in "ab"])
            optimizer = ralmq.RemoteOptimizer("sgd", [parallel], lr=0.1)
            given = torch.randn(4, 6, requires_grad=True)

            def kill(now: str) -> None:
                if now == when:
                    lost.send(signal.SIGKILL)

            given.register_hook(lambda grad: kill("in the way back"))
            begun = time.monotonic()
            with pytest.raises(WorkerLost):
                out = parallel(given * 1)
                kill("before the loss")
                loss = mse_loss(out, torch.randn(4, 3))
                float(loss.detach())
                kill("before the way back")
                loss.backward()
                kill("before the step")
                optimizer.step()
                optimizer.step()  # the first may have been done
            assert time.monotonic() - begun < 30
            assert parallel.proxies[0](torch.randn(2, 6)).to_here().shape == (2, 3)
        finally:
            home.close()


def copied(url: str, name: str) -> bool:
    try:
        ralmq.remote("nn.Identity", name, broker=url)
    except NoService:
        return False
    return True


def test_what_are_no_replicas_is_refused() -> None:
    one = ralmq.remote_copy(nn.Linear(2, 2), worker="one")
    with pytest.raises(Refused, match="two workers at least"):
        ralmq.DataParallel([one])
    with pytest.raises(Refused, match="on one of its own"):
        ralmq.DataParallel([one, ralmq.remote_copy(nn.Linear(2, 2), worker="one")])
    with pytest.raises(Refused, match="no replica"):
        ralmq.DataParallel([one, ralmq.remote_copy(nn.Linear(2, 3), worker="two")])
    parallel = ralmq.DataParallel([one, ralmq.remote_copy(nn.Linear(2, 2), worker="two")])
    with pytest.raises(ValueError, match="at least 2"):
        parallel(torch.randn(1, 2))
    with pytest.raises(ValueError, match="one number of rows"):
        parallel(torch.randn(4, 2), torch.randn(3, 2))
    with pytest.raises(RuntimeError):  # on a worker
        parallel(torch.randn(4, 3)).to_here()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_goes_on_from_its_saved_state(kind: str) -> None:
    """As one that never stopped; replicas and modules on one worker too."""
    options: dict[str, Any] = {"momentum": 0.9} if kind == "sgd" else {}
    x, y = torch.randn(8, 6), torch.randn(8, 3)

    def steps(one: Any, two: Any, optimizer: ralmq.RemoteOptimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            mse_loss(two(one(x)), y).backward()
            optimizer.step()

    first, second = block(), nn.Linear(3, 3)
    one, two = spread(first, 2), ralmq.remote_copy(second, worker="one")
    optimizer = ralmq.RemoteOptimizer(kind, [one, two], lr=0.05, **options)
    steps(one, two, optimizer, 3)
    optimizer.set_lr(0.01)
    state, weights = optimizer.state_dict(), (one.state_dict(), two.state_dict())
    key = "exp_avg" if kind == "adamw" else "momentum_buffer"
    assert f"0.0.weight.{key}" in state["state"] and f"1.bias.{key}" in state["state"]
    first.load_state_dict(weights[0])
    second.load_state_dict(weights[1])
    again = ralmq.DataParallel([ralmq.remote_copy(first, name) for name in ("two", "three")])
    other = ralmq.remote_copy(second, worker="three")
    resumed = ralmq.RemoteOptimizer(kind, [again, other], lr=0.5, **options)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.01
    steps(one, two, optimizer, 3)
    steps(again, other, resumed, 3)
    for mine, theirs in ((one, again), (two, other)):
        same(list(theirs.state_dict().values()), list(mine.state_dict().values()), 1e-7)
    with pytest.raises(Refused, match="other parameters"):
        ralmq.RemoteOptimizer(kind, [two], lr=0.1).load_state_dict(state)
