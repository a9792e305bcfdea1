"""Penalties, bias, alternatives and logits hooks at the last stage, by their definition."""

import math
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from ralmq.schema.message import Error, Partial, Return
from ralmq.workers.hooks import LogitsHook
from ralmq.workers.params import Retrieval, Task
from stage.table import HEAD, HIDDEN, VOCAB, Head, key_of, knn, lm, new, run, start, step

pytestmark = pytest.mark.usefixtures("both_ways")


def test_alternatives_travel_with_the_token() -> None:
    last = new()
    parts, _, _ = run(last, start(last, 1, 3, max_tokens=5, top_logprobs=4, temperature=2.0, seed=1), 3)
    for part in parts:
        p = lm(part["position"])
        ids, values = zip(*part["top_logprobs"], strict=True)
        assert list(ids) == np.argsort(-p, kind="stable")[:4].tolist()
        assert np.allclose(values, np.log(p[list(ids)]), atol=1e-5)
        assert abs(part["logprob"] - math.log(p[part["token"]])) < 1e-5, "top_logprobs bring the chosen one's, too"


@pytest.fixture(params=[math.nan, math.inf])
def damaged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states are finite, and one logit behind position 6 is not: any token would be noise without a word."""
    plain = Head.head

    def head(self: Head, hidden: torch.Tensor, want: Any = None) -> torch.Tensor:
        logits = plain(self, hidden, want)
        given = hidden if want is None else hidden[torch.tensor(want)]
        logits[(given == HIDDEN[6]).all(1), 5] = request.param
        return logits

    monkeypatch.setattr(Head, "head", head)


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("task", [{}, {"temperature": 1.0}, {"logprobs": True}, {"top_logprobs": 2}, {"mode": "score"}])
def test_logits_that_are_not_finite_end_their_own_request(task: dict[str, Any]) -> None:
    last = new()
    sick, sound = start(last, 1, 8 if "mode" in task else 7, max_tokens=5, **task), start(last, 2, 3, max_tokens=5)
    outcome = step(last, (sick, 0, 7), (sound, 0, 3))
    ends = {key: message for message, key, _ in outcome.sent}
    assert isinstance(ends[sick], Error) and "its logits are not finite" in ends[sick].message
    assert isinstance(ends[sound], Partial) and ends[sound].body["token"] == lm(3).argmax()
    assert min(outcome.returns, key=lambda row: row.id) == Return(*sick, -1, True) and len(last) == 1


def reference(task: dict[str, Any], prompt: int, limit: int) -> list[int]:
    """Greedy tokens with bias and penalties, by their definition."""
    known = (np.arange(prompt) % VOCAB).tolist()
    made: list[int] = []
    for _ in range(limit):
        logits = (HIDDEN[prompt + len(made) - 1] @ HEAD).double().numpy()
        for token, value in task.get("logit_bias", {}).items():
            logits[token] += value
        for token in set(known + made):
            penalty = task.get("repetition_penalty", 1.0)
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        for token in set(made):
            logits[token] -= task.get("frequency_penalty", 0.0) * made.count(token) + task.get("presence_penalty", 0.0)
        if len(made) < task.get("min_tokens", 0):
            logits[list(task.get("stop_ids", ()))] = -np.inf
        made.append(int(logits.argmax()))
        if made[-1] in task.get("stop_ids", ()):
            break
    return made


@pytest.mark.parametrize(
    "task",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 0.4},
        {"logit_bias": {5: 1.5, 7: -3.0}},
        {"stop_ids": (1, 4, 9, 11), "min_tokens": 9},
        {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.3,
            "logit_bias": {5: 2.0},
            "stop_ids": (3,),
            "min_tokens": 30,
        },
    ],
)
def test_penalties_follow_their_definition_and_a_replay_goes_on_with_them(task: dict[str, Any]) -> None:
    wanted = reference(task, 3, 40)
    plain = reference({}, 3, 40)
    assert wanted != plain[: len(wanted)]
    last = new()
    whole, _, final = run(last, start(last, 1, 3, max_tokens=40, **task), 3)
    assert [part["token"] for part in whole] == wanted
    assert final["finish_reason"] == ("stop" if len(wanted) < 40 else "length")
    assert len(wanted) > task.get("min_tokens", 0)
    for cut in range(1, len(wanted)):
        body = Task(ignore_eos=True, max_tokens=40 - cut, prompt=3, **task)
        prompt = np.asarray([*range(3), *wanted[:cut]], np.int32)
        last.start(
            key_of(9), prompt, {"task": msgpack.packb(body.model_dump(exclude_defaults=True)), "limit": 40 - cut}
        )
        parts, _, _ = run(last, key_of(9), 3 + cut)
        assert parts == whole[cut:]


class Only(LogitsHook):
    """Leaves some ids; fails where told to."""

    name = "only"

    def __call__(self, tokens: Any, values: Any, params: dict[str, Any]) -> Any:
        if params.get("fail_at") == len(tokens):
            raise KeyError("lost")
        if params.get("none_at") == len(tokens):
            return np.full_like(values, -np.inf)
        kept = np.full_like(values, -np.inf)
        kept[params["ids"]] = values[params["ids"]]
        return kept


class NotTwice(LogitsHook):
    """No token of the last three."""

    name = "not_twice"
    on = "probabilities"

    def __call__(self, tokens: Any, values: Any, params: dict[str, Any]) -> Any:
        assert abs(values.sum() - 1.0) < 1e-9 and not tokens.flags.writeable
        values[tokens[-3:]] = 0.0
        return values


HOOKS: dict[str, LogitsHook] = {"only": Only(), "not_twice": NotTwice()}


def test_hooks_change_what_is_drawn_from_in_the_order_of_the_request() -> None:
    last = new(HOOKS)
    ids = [2, 3, 5, 7, 11]
    asked = {"only": {"ids": ids}, "not_twice": {}}
    options = {"max_tokens": 50, "temperature": 1.0, "seed": 3, "top_logprobs": 2}
    key = start(last, 1, 4, hooks=asked, **options)
    parts, _, _ = run(last, key, 4)
    known = [0, 1, 2, 3]
    for part in parts:
        p = np.zeros(VOCAB)
        left = [token for token in ids if token not in known[-3:]]
        p[left] = lm(part["position"])[left]
        p /= p.sum()
        assert part["token"] in left and abs(math.exp(part["logprob"]) - p[part["token"]]) < 1e-9
        assert part["top_logprobs"][0][0] == int(p.argmax())
        known.append(part["token"])
    assert len({part["token"] for part in parts}) == 5


def test_a_hook_that_changes_nothing_changes_nothing() -> None:
    class Same(LogitsHook):
        def __call__(self, tokens: Any, values: Any, params: dict[str, Any]) -> Any:
            return values

    class SameOn(Same):
        on = "probabilities"

    options = {"max_tokens": 60, "temperature": 0.9, "seed": 3, "repetition_penalty": 1.4, "min_p": 0.02}
    last = new({"a": Same(), "b": SameOn()})
    plain, _, _ = run(last, start(last, 1, 4, **options), 4)
    with_it, _, _ = run(last, start(last, 2, 4, hooks={"a": {}, "b": {}}, **options), 4)
    assert with_it == plain


def test_neighbours_come_before_hooks_and_penalties() -> None:
    retrieval = Retrieval(index="i", k=6, knn_lambda=0.4, knn_temperature=7.0)
    last = new(HOOKS)
    ids = [2, 3, 5, 7]
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "logprobs": True, "presence_penalty": 2.0}
    parts, _, _ = run(last, start(last, 1, 5, hooks={"only": {"ids": ids}}, retrieve=retrieval, **options), 5)
    for part in parts:
        p = (0.4 * knn(part["position"], 6, 7.0, 0) + 0.6 * lm(part["position"]))[ids]
        assert abs(math.exp(part["logprob"]) - (p / p.sum())[ids.index(part["token"])]) < 1e-6


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"ids": [3], "fail_at": 4}, "hook only: 'lost'"),
        ({"ids": [3], "none_at": 4}, "hook only: it left no token to draw"),
        ({"ids": [99]}, "hook only: index 99 is out of bounds"),
    ],
)
def test_a_hook_that_raises_ends_its_row_alone(params: dict[str, Any], said: str) -> None:
    last = new(HOOKS)
    keys = [start(last, number, 4, max_tokens=9) for number in (1, 2)]
    bad = start(last, 3, 4, max_tokens=9, hooks={"only": params})
    gone = start(last, 4, 4, max_tokens=9, hooks={"elsewhere": {}})
    outcome = step(last, (keys[0], 0, 4), (bad, 0, 4), (gone, 0, 4), (keys[1], 0, 4))
    said_of = {whose: message for message, whose, _ in outcome.sent}
    assert [type(said_of[key]) for key in (*keys, bad, gone)] == [Partial, Partial, Error, Error]
    assert said in said_of[bad].message and said_of[bad].code == "worker_failed"
    assert "hook elsewhere is not loaded at the last stage" in said_of[gone].message
    assert [row for row in outcome.returns if row.done] == [Return(*bad, -1, True), Return(*gone, -1, True)]
    assert len(last) == 2
