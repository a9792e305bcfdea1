"""Gradients in unusual graphs, against the same in one process."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import ralmq
import torch
from ralmq.remote.tensor import RemoteTensor, to_worker
from remote_served import NAMES, Served
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def pair(seed: int, worker: str) -> tuple[nn.Linear, Any]:
    """A layer, and its copy on a worker."""
    torch.manual_seed(seed)
    layer = nn.Linear(4, 4)
    return layer, ralmq.remote_copy(layer, worker)


def here(value: Any) -> Any:
    return value.to_here() if isinstance(value, RemoteTensor) else value


def grad(module: Any) -> Any:
    return here(module.get_parameter("weight").grad)


def rows() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(7))


def test_gradients_of_chosen_inputs_leave_parameters_alone(served: Served) -> None:
    """torch.autograd.grad, and backward(inputs=...): other gradients are as before, and no pass adds to a later one."""
    (first, one), (second, two) = pair(0, "one"), pair(1, "two")
    x, y = rows().requires_grad_(), rows().requires_grad_()
    found: dict[str, list[torch.Tensor]] = {}
    for name, (a, b) in {"local": (first, second), "remote": (one, two)}.items():
        hidden = a(x)
        loss = here((b(hidden.tanh()) * y + hidden).pow(2).sum())
        (alone,) = torch.autograd.grad(loss, y, retain_graph=True)
        both = torch.autograd.grad(loss, (x, y), retain_graph=True)
        assert grad(a) is None and grad(b) is None
        loss.backward(inputs=[x], retain_graph=True)
        assert grad(a) is None and grad(b) is None and y.grad is None
        loss.backward()
        assert x.grad is not None and y.grad is not None
        found[name] = [alone, *both, x.grad, y.grad, grad(a), grad(b)]
        x.grad = y.grad = None
    for one_of, other in zip(found["remote"], found["local"], strict=True):
        torch.testing.assert_close(one_of, other, rtol=1e-5, atol=1e-5)


def test_a_pass_that_failed_leaves_nothing_to_the_next(served: Served) -> None:
    layer, one = pair(0, "one")
    x, failing = rows(), [True]

    def fail(value: torch.Tensor) -> None:
        if failing.pop() if failing else False:
            raise ValueError("within the pass")

    hidden = one(x)
    aside = torch.ones(4, requires_grad=True)
    late = aside * 1
    late.register_hook(fail)
    loss = ((hidden * 1).to_here() * one(late).to_here() + hidden.to_here()).sum()
    with pytest.raises(ValueError, match="within"):
        loss.backward(retain_graph=True)
    assert not failing
    one.zero_grad()
    loss.backward()
    own = layer(x)
    (own * layer(torch.ones(4)) + own).sum().backward()
    torch.testing.assert_close(grad(one), layer.weight.grad, rtol=1e-5, atol=1e-5)


def test_gradients_of_gradients_are_refused(served: Served) -> None:
    _, one = pair(0, "one")
    x = rows().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad((one(x).to_here() * x).sum(), x, create_graph=True)


def test_passes_within_passes(served: Served) -> None:
    layer, one = pair(0, "one")
    x = rows().requires_grad_()
    for module in (layer, one):
        y = checkpoint(lambda value, m=module: here(m(value)).tanh(), x, use_reentrant=True)
        here(module(y)).sum().backward()
    torch.testing.assert_close(grad(one), layer.weight.grad, rtol=1e-5, atol=1e-5)


def test_threads_of_one_program(served: Served) -> None:
    """Calls, and passes through one graph at a time, from several threads."""
    (first, one), (second, two) = pair(0, "one"), pair(1, "two")
    shared = one(rows())
    losses = [two(shared).mul(k).sum() for k in range(1, 5)]
    wrong: list[Any] = []

    def work(loss: RemoteTensor, seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(10):
                loss.backward(retain_graph=True)
                x = torch.randn(2, 4, generator=generator)
                with torch.no_grad():
                    if not torch.equal(two(one(x)).to_here(), second(first(x))):
                        wrong.append(seed)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(loss, seed)) for seed, loss in enumerate(losses)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    second(first(rows())).mul(10 * (1 + 2 + 3 + 4)).sum().backward()
    torch.testing.assert_close(grad(one), first.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad(two), second.weight.grad, rtol=1e-4, atol=1e-4)


def test_what_was_fetched_may_be_changed_in_place(served: Served) -> None:
    layer, one = pair(0, "one")
    for module in (layer, one):
        y = here(module(rows()))
        y += 1
        y.relu_().sum().backward()
    torch.testing.assert_close(grad(one), layer.weight.grad, rtol=1e-5, atol=1e-5)


def test_the_cause_of_a_failed_call_is_told_by_the_way_back(served: Served) -> None:
    _, one = pair(0, "one")
    wrong = one(torch.ones(2, 5)).sum()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wrong.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_leaf_is_its_own_loss(served: Served, dtype: torch.dtype) -> None:
    leaf = to_worker(torch.tensor(2.0, dtype=dtype), "one").requires_grad_()
    leaf.backward()
    assert torch.equal(here(leaf.grad), torch.tensor(1.0, dtype=dtype))
    many = to_worker(torch.ones(3, dtype=dtype), "one").requires_grad_()
    with pytest.raises(RuntimeError, match="scalar"):
        many.backward()


def test_leaves_are_made_and_their_gradients_forgotten_as_in_torch(served: Served) -> None:
    whole = to_worker(torch.ones(3, dtype=torch.int64), "one")
    with pytest.raises(RuntimeError, match="floating point"):
        whole.requires_grad_()
    assert whole.shape == (3,)  # it is as it was
    x, own = to_worker(torch.ones(3), "one"), torch.ones(3)
    for leaf in (x, own):
        leaf.requires_grad = True
        for _ in range(3):
            leaf.pow(2).sum().backward()
            with torch.no_grad():
                leaf -= 0.1 * leaf.grad
            leaf.grad = None
        assert leaf.grad is None and leaf.is_leaf
    torch.testing.assert_close(x.to_here(), own)
    with pytest.raises(TypeError, match=r"backward\(\)"):
        torch.autograd.grad(x.sum(), x)


def test_gradients_on_their_way_are_not_changed(served: Served) -> None:
    """Another worker asks for a gradient that the next call would change in place."""
    one = ralmq.remote("nn.Linear", "one", in_features=1500, out_features=1500, bias=False)
    optimizer = ralmq.RemoteOptimizer("sgd", [one], lr=0.1)
    changes: list[Callable[[], Any]] = [
        lambda: one.zero_grad(set_to_none=False),
        lambda: optimizer.zero_grad(set_to_none=False),
        lambda: optimizer.clip_grad_norm(1e-3),
        lambda: one(torch.ones(1, 1500)).sum().backward(),
    ]
    for change in changes:
        one.zero_grad()
        one(torch.ones(1, 1500)).sum().backward()
        gradient = one.get_parameter("weight").grad
        assert gradient is not None
        moved = gradient.to_worker("two")
        change()
        assert bool((moved == 1).all())


def _views(x: Any, y: Any, z: Any) -> Any:
    whole = x * 1
    part = whole.t().reshape(2, 8)[:, ::2].expand(3, 2, 4)
    return (part * y).pow(2).sum() + whole.unbind(0)[2].sum() + whole.diagonal().prod() + 0 * z.sum()


def _in_place(x: Any, y: Any, z: Any) -> Any:
    changed = x * 2
    alias = changed
    changed += y.sum()
    changed[0] = z[0, :1]
    changed /= 3
    return (alias * x).sum()


def _twice(x: Any, y: Any, z: Any) -> Any:
    return (x @ x + x * x).sum() + torch.cat([y, y], 0).prod(0).sum() + torch.stack([z, z * 2]).logsumexp(0).sum()


def _parts(x: Any, y: Any, z: Any) -> Any:
    values, places = x.max(dim=0)
    with torch.no_grad():
        most = y.amax()
    return (values * places.float()).sum() + (y - most).exp().sum() + z.detach().sum() * x.split(2)[0].sum()


def _casts(x: Any, y: Any, z: Any) -> Any:
    picked = functional.embedding(torch.tensor([0, 3, 3]), x).double().sum().bfloat16().float()
    return picked + torch.where(y > 0, y, -y).sum() + torch.linalg.svd(z).S.sum()


@pytest.mark.parametrize("work", [_views, _in_place, _twice, _parts, _casts])
def test_graphs_over_three_workers(served: Served, work: Callable[..., Any]) -> None:
    torch.manual_seed(3)
    values = [torch.randn(4, 4), torch.randn(3, 2, 4), torch.randn(4, 4)]
    own = [value.clone().requires_grad_() for value in values]
    there = [to_worker(value, name).requires_grad_() for value, name in zip(values, NAMES, strict=True)]
    wanted, found = work(*own), work(*there)
    wanted.backward()
    found.backward()
    torch.testing.assert_close(found.to_here(), wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(own, there, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(here(theirs.grad), mine.grad, rtol=1e-5, atol=1e-5)


def test_copies_of_parts_take_no_gradient_from_each_other(served: Served) -> None:
    """A parameter that is used by itself beside its module, in a pass that is after another one alone."""
    layer, one = pair(0, "one")
    twin = copy.deepcopy(layer)
    x = rows().requires_grad_()
    weight = one.get_parameter("weight")
    loss = (weight * 2).to_here().sum() * one(x).to_here().sum()
    (found,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert weight.grad is None
    loss.backward()
    own = (twin.weight * 2).sum() * twin(x).sum()
    (wanted,) = torch.autograd.grad(own, x, retain_graph=True)
    own.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad(one), twin.weight.grad, rtol=1e-5, atol=1e-5)
