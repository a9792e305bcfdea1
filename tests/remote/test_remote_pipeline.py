"""Pipeline training: gradients of the unsplit model, and slots counted from what the workers ran."""

import pytest
import ralmq
import torch
from ralmq.errors import Refused
from ralmq.remote.pipeline import Pipeline
from ralmq.remote.schedule import SCHEDULES, Action, bubble, formula, kept, slots
from remote_served import NAMES, Served
from torch import nn
from torch.nn import functional


def parts(stages: int) -> list[nn.Module]:
    torch.manual_seed(stages)
    made: list[nn.Module] = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)) for _ in range(stages - 1)]
    return [*made, nn.Linear(6, 4)]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("micro", [1, 4, 8])
def test_gradients_and_bubble(served: Served, schedule: str, stages: int, micro: int) -> None:
    modules = parts(stages)
    proxies = [ralmq.remote_copy(module, name) for module, name in zip(modules, NAMES, strict=False)]
    pipeline = Pipeline(proxies, functional.cross_entropy, schedule)
    generator = torch.Generator().manual_seed(micro)
    x, target = torch.randn(10, 6, generator=generator), torch.randint(0, 4, (10,), generator=generator)
    before = served.home.received
    report = pipeline.step(x, target, micro_batches=micro)
    assert served.home.received == before
    whole = functional.cross_entropy(nn.Sequential(*modules)(x), target)
    whole.backward()
    assert report.loss == pytest.approx(float(whole), abs=1e-5)
    for module, proxy in zip(modules, proxies, strict=True):
        for own, found in zip(module.parameters(), proxy.parameters(), strict=True):
            assert found.grad is not None
            torch.testing.assert_close(found.grad.to_here(), own.grad, rtol=1e-5, atol=1e-5)
    assert report.bubble == pytest.approx(report.expected) == pytest.approx((stages - 1) / (micro + stages - 1))
    assert report.orders == SCHEDULES[schedule](stages, micro)
    most = [min(stages - stage, micro) if schedule == "1f1b" else micro for stage in range(stages)]
    assert report.kept == most
    assert f"= {report.expected:.3f}" in str(report) and f"bubble {report.bubble:.3f}" in str(report)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_slots_of_any_size(schedule: str) -> None:
    for stages in range(1, 7):
        for micro in range(1, 12):
            table = slots(SCHEDULES[schedule](stages, micro))
            assert bubble(table) == pytest.approx(formula(stages, micro))
            assert all(sum(action is not None for action in row) == 2 * micro for row in table)


def test_orders_that_never_end_are_found() -> None:
    with pytest.raises(ValueError, match="never ends"):
        slots([[Action("B", 0, 0), Action("F", 0, 0)]])
    assert kept([Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 1), Action("B", 0, 0)]) == 2


def test_a_worse_order_has_a_larger_bubble() -> None:
    one_by_one = [
        [Action(kind, stage, micro) for micro in range(4) for kind in ("F", "B")] for stage in range(2)
    ]  # stage 0 waits for each micro-batch to come back
    assert bubble(slots(one_by_one)) > formula(2, 4)


def test_several_steps_train(served: Served) -> None:
    modules = parts(2)
    proxies = [ralmq.remote_copy(module, name) for module, name in zip(modules, NAMES, strict=False)]
    optimizer = ralmq.RemoteOptimizer("adamw", proxies, lr=0.02)
    own = torch.optim.AdamW(nn.Sequential(*modules).parameters(), lr=0.02)
    pipeline = Pipeline(proxies, functional.cross_entropy)
    x, target = torch.randn(9, 6), torch.randint(0, 4, (9,))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(pipeline.step(x, target, micro_batches=4).loss)
        optimizer.step()
        own.zero_grad()
        functional.cross_entropy(nn.Sequential(*modules)(x), target).backward()
        own.step()
    assert losses[-1] < losses[0]
    for module, proxy in zip(modules, proxies, strict=True):
        for name, tensor in proxy.state_dict().items():
            torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_two_stages_on_one_worker(served: Served) -> None:
    modules = parts(2)
    proxies = [ralmq.remote_copy(module, "one") for module in modules]
    report = Pipeline(proxies, functional.cross_entropy).step(torch.randn(8, 6), torch.randint(0, 4, (8,)))
    assert report.bubble == pytest.approx(0.2)


def test_bad_input_is_refused(served: Served) -> None:
    proxy = ralmq.remote_copy(nn.Linear(6, 4), "one")
    with pytest.raises(Refused, match="micro-batches"):
        Pipeline([proxy], functional.cross_entropy).step(torch.randn(2, 6), torch.zeros(2, dtype=torch.long), 3)
    with pytest.raises(Refused, match="detach"):
        Pipeline([proxy], functional.cross_entropy).step(
            torch.randn(2, 6, requires_grad=True), torch.zeros(2, dtype=torch.long), 2
        )
    with pytest.raises(Refused, match="1f1b"):
        Pipeline([proxy], functional.cross_entropy, "zigzag")
    with pytest.raises(Refused, match="stage"):
        Pipeline([], functional.cross_entropy)


def test_the_cause_of_a_failed_step_is_told(served: Served) -> None:
    """And the next one is not the worse for it."""
    modules = parts(2)
    proxies = [ralmq.remote_copy(module, name) for module, name in zip(modules, NAMES, strict=False)]
    target = torch.zeros(8, dtype=torch.long)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Pipeline([ralmq.remote_copy(nn.Linear(6, 5), "one"), proxies[1]], functional.cross_entropy).step(
            torch.randn(8, 6), target
        )
    proxies[1].zero_grad()
    x = torch.randn(8, 6)
    Pipeline(proxies, functional.cross_entropy).step(x, target)
    functional.cross_entropy(nn.Sequential(*modules)(x), target).backward()
    for own, found in zip(modules[1].parameters(), proxies[1].parameters(), strict=True):
        torch.testing.assert_close(found.grad.to_here(), own.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
