"""`ralmq.place` in the core: who joins is told which layers to take; simulated time."""

from typing import Any

import pytest
from broker_driver import Broker, only
from ralmq.broker import place
from ralmq.schema.keys import ADMIN, CLIENT, WORKER, Entry
from ralmq.schema.message import Beat, Bye
from ralmq.schema.plan.model import Model

GB = 10**9
SIZES = Model("m", (GB,) * 4, (GB,) * 4, kv=1000, first=GB, last=GB)


class Joining(Broker):
    """A broker that stages ask for layers, each over a connection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def place(self, who: str, gb: float, speed: float = 10.0, of: int = 0, **more: Any) -> dict[str, Any]:
        """One question; the answer's body."""
        if who.encode() not in self.core.roster.peers:
            self.hello(who)
        self._count += 1
        question = {"who": who, "sizes": SIZES.as_map(), "fingerprint": "f", "memory": int(gb * GB), "speed": speed}
        body = {**question, "kv_tokens": 16, "of": of, **more}
        return dict(only(self.ask(who, "ralmq.place", f"q{self._count}", body=body)).message.body)

    def layers(self, who: str, gb: float, speed: float = 10.0, of: int = 0, **more: Any) -> tuple[int, int]:
        answer = self.place(who, gb, speed, of, **more)
        return answer["first"], answer["last"]


@pytest.fixture
def broker() -> Joining:
    return Joining()


def test_those_that_are_to_come_are_waited_for_and_planned_together(broker: Joining) -> None:
    """Twice the speed, about twice the layers; the head counts as one."""
    assert broker.place("fast", 9, 20.0, of=3)["why"] == "waits for the other stages: 1 of 3 are here"
    broker.now += 1.0
    assert "2 of 3" in broker.place("slow", 9, 10.0, of=3)["why"]
    broker.now += 1.0
    found = {
        "slow too": broker.layers("slow too", 9, 10.0, of=3),
        "fast": broker.layers("fast", 9, 20.0, of=3),
        "slow": broker.layers("slow", 9, 10.0, of=3),
    }
    assert sorted(found.values()) in ([(0, 1), (1, 3), (3, 4)], [(0, 2), (2, 3), (3, 4)], [(0, 1), (1, 2), (2, 4)])
    assert found["fast"][1] - found["fast"][0] == 2


def test_without_a_number_the_broker_waits_until_nobody_new_comes(broker: Joining) -> None:
    assert broker.place("a", 4)["why"] == "waits whether others join"
    broker.now += 1.5
    assert "wait" in broker.place("b", 4)
    broker.now += 1.0
    assert "wait" in broker.place("a", 4), "b came 1 s ago"
    broker.now += 1.0
    assert sorted([broker.layers("a", 4), broker.layers("b", 4)]) == [(0, 2), (2, 4)]


def test_two_that_join_at_once_do_not_take_the_same_layers(broker: Joining) -> None:
    """One layer and the head lack a stage, two could take them: one does, until its lease ends."""
    broker.stage("s", 0, 3)
    broker.place("a", 9)
    broker.place("b", 9)
    broker.now += 2.0
    first = broker.layers("a", 9)
    assert first == (3, 4)
    assert "wait" in broker.place("b", 9)
    for _ in range(20):
        broker.now += 1.0
        assert "wait" in broker.place("b", 9) or broker.now > broker.start + 12
    assert broker.layers("b", 9) == (3, 4), "a was silent for longer than its lease"


def test_a_stage_that_has_loaded_needs_no_lease_any_more(broker: Joining) -> None:
    for who in ("a", "b"):
        broker.place(who, 4, of=2)
    spans = {who: broker.layers(who, 4, of=2) for who in ("a", "b")}
    for who, span in spans.items():
        broker.stage(f"stage {who}", *span, labels={"place": who})
        broker.lost(who)
    broker.now += 4.0
    assert broker.core.status(broker.now)["pipelines"][0]["formed"]
    broker.lost("stage a")
    broker.say("stage b", Beat(1))
    assert broker.layers("a again", 4, of=2) == spans["a"], "two are here: it and the other stage"


def test_who_loads_tells_a_new_broker_what_it_was_given(broker: Joining) -> None:
    assert broker.layers("a", 9, held=[0, 2]) == (0, 2)
    broker.place("b", 9)
    broker.now += 2.0
    assert broker.layers("a", 9) == (0, 2)
    assert broker.layers("b", 9) == (2, 4)


def test_what_does_not_fit_is_told_and_more_are_waited_for(broker: Joining) -> None:
    broker.place("a", 2.5)
    broker.now += 2.0
    for _ in range(2):
        assert "need 5.59 GiB of memory, those who wait have 2.33 GiB: add a worker" in broker.place("a", 2.5)["why"]
    broker.place("b", 4.5)
    broker.now += 1.5
    broker.place("a", 2.5)
    broker.now += 1.0
    assert [broker.layers("b", 4.5), broker.layers("a", 2.5)] in ([(1, 4), (0, 1)], [(0, 3), (3, 4)])


def test_one_too_many_stands_by_for_a_stage_that_it_can_replace(broker: Joining) -> None:
    broker.stage("s0", 0, 3)
    broker.stage("s1", 3, 4)
    broker.place("spare", 3)
    for _ in range(10):
        broker.now += 1.0
        assert "wait" in broker.place("spare", 3)
    broker.now += 1.0
    assert broker.layers("spare", 3) == (3, 4), "layers 0-2 and the embedding need 4 GB"
    broker.place("tiny", 0.5)
    for _ in range(12):
        broker.now += 1.0
        assert "wait" in broker.place("tiny", 0.5)
    assert broker.place("tiny", 0.5)["why"] == "every layer has a stage, and no stage's layers fit its memory"


def test_one_that_holds_all_is_a_second_pipeline(broker: Joining) -> None:
    broker.stage("s0", 0, 3)
    broker.stage("s1", 3, 4)
    broker.place("big", 9)
    for _ in range(10):
        broker.now += 1.0
        broker.place("big", 9)
    broker.now += 1.0
    assert broker.layers("big", 9) == (0, 4)


def test_models_of_the_same_name_are_kept_apart(broker: Joining) -> None:
    broker.stage("s", 0, 4, fingerprint="other")
    broker.place("a", 9)
    broker.now += 2.0
    assert broker.layers("a", 9) == (0, 4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sizes": None}, "sizes of a model"),
        ({"sizes": {**SIZES.as_map(), "layers": [1, -1]}}, "layers of a model's sizes"),
        ({"sizes": {**SIZES.as_map(), "layers": [1]}}, "as many sizes in `layers` as in `reads`"),
        ({"sizes": {**SIZES.as_map(), "layers": [1] * 257, "reads": [1] * 257}}, "256 may be placed"),
        ({"sizes": {**SIZES.as_map(), "name": ""}}, "1 to 128 characters"),
        ({"sizes": {**SIZES.as_map(), "name": "m" * 129}}, "1 to 128 characters"),
        ({"memory": 1 << 60}, "whole numbers"),
        ({"fingerprint": "f" * 65}, "gives itself a name"),
        ({"fingerprint": 7}, "gives itself a name"),
        ({"who": "w" * 65}, "gives itself a name"),
        ({"speed": 1e-200}, "GB/s"),
        ({"speed": 2e6}, "GB/s"),
        ({"memory": -1}, "whole numbers"),
        ({"of": True}, "whole numbers"),
        ({"speed": float("nan")}, "GB/s"),
        ({"who": ""}, "gives itself a name"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(broker: Joining, wrong: dict[str, Any], said: str) -> None:
    broker.hello("a")
    question = {"who": "a", "sizes": SIZES.as_map(), "fingerprint": "f", "memory": 1, "speed": 1.0, "kv_tokens": 1}
    error = only(broker.ask("a", "ralmq.place", "q", body={**question, "of": 0, **wrong})).message
    assert error.code == "refused" and said in error.message


def test_only_so_many_may_wait(broker: Joining) -> None:
    for number in range(64):
        broker.place(f"w{number}", 0.1)
    error = only(
        broker.ask(
            "w0",
            "ralmq.place",
            "x",
            body={
                "who": "one more",
                "sizes": SIZES.as_map(),
                "fingerprint": "f",
                "memory": 1,
                "speed": 1,
                "kv_tokens": 1,
                "of": 0,
            },
        )
    ).message
    assert error.code == "refused" and "64 stages wait" in error.message
    assert "wait" in broker.place("w63", 0.1), "who waits already asks on"


def test_workers_may_ask_and_clients_may_not() -> None:
    broker = Joining()
    for name, role in (("w", WORKER), ("c", CLIENT), ("a", ADMIN)):
        broker.core.introduce(broker.now, name.encode(), Entry(name, role, f"public {name}"))
    assert "wait" in broker.place("w", 9)
    broker.hello("c")
    broker.hello("a")
    for service in ("ralmq.place", "ralmq.cluster", "ralmq.cluster.publish"):
        assert only(broker.ask("c", service, service[-12:])).message.code == "refused"
    listed = only(broker.ask("w", "ralmq.cluster", "r", body={"machine": "m"})).message.body
    assert listed == {"machines": [], "starts": None}
    assert only(broker.ask("w", "ralmq.cluster.publish", "s", body={"machines": {}})).message.code == "refused"
    broker.ask("a", "ralmq.cluster.publish", "t", body={"machines": {"m": [{"worker": "echo"}], "n": []}})
    listed = only(broker.ask("w", "ralmq.cluster", "u", body={"machine": "m"})).message.body
    assert listed == {"machines": ["m", "n"], "starts": [{"worker": "echo"}]}
    broker.ask("a", "ralmq.cluster.publish", "v", body={"machines": {"n": []}})
    listed = only(broker.ask("w", "ralmq.cluster", "x", body={"machine": "m"})).message.body
    assert listed == {"machines": ["n"], "starts": None}, "the last one counts"


def test_what_is_no_plan_is_not_kept() -> None:
    broker = Broker()
    broker.hello("a")
    for number, wrong in enumerate((None, [], {"m": {}}, {"m": [0] * 1001}, {str(n): [] for n in range(1001)})):
        error = only(broker.ask("a", "ralmq.cluster.publish", f"q{number}", body={"machines": wrong})).message
        assert error.code == "refused"


def test_a_stage_s_name_belongs_to_its_key(broker: Joining) -> None:
    for name in ("a", "b"):
        broker.core.introduce(broker.now, name.encode(), Entry(name, WORKER, f"public {name}"))
    broker.place("a", 9)
    broker.hello("b")
    question = {"who": "a", "sizes": SIZES.as_map(), "fingerprint": "f", "memory": 1, "speed": 1.0, "kv_tokens": 1}
    error = only(broker.ask("b", "ralmq.place", "q", body={**question, "of": 0})).message
    assert error.code == "refused" and "another key" in error.message


def test_layers_that_nobody_can_have_been_given_are_passed_over(broker: Joining) -> None:
    for held in ([3, 3], [0, 9], [-1, 3], [1], ["0", "4"], None):
        assert "wait" in broker.place("a", 9, held=held)


def test_one_that_changes_its_model_asks_anew(broker: Joining) -> None:
    assert broker.layers("a", 9, held=[0, 4]) == (0, 4)
    assert "wait" in broker.place("a", 9, fingerprint="g")


def asked(broker: Joining, seconds: float, **who: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those who wait ask again each half second; the last answers."""
    found = {}
    for _ in range(round(2 * seconds)):
        broker.now += 0.5
        found = {name: broker.place(name, **options) for name, options in who.items()}
    return found


def test_layers_missing_in_two_places_are_split_together(broker: Joining) -> None:
    """Two layers before a stage and one behind it: nobody takes half of the first gap while the second has nobody."""
    broker.stage("middle", 2, 3)
    found = asked(broker, 3, a={"gb": 9}, b={"gb": 9})
    assert sorted((answer["first"], answer["last"]) for answer in found.values()) == [(0, 2), (3, 4)]
    assert found["a"]["why"] == "the fastest split of layers 0-1, 3-3 over 2"


def test_one_does_not_fill_two_gaps(broker: Joining) -> None:
    broker.stage("middle", 1, 3)
    told = asked(broker, 4, a={"gb": 9})["a"]["why"]
    assert told == "layers 0-0, 3-3 need 3.73 GiB of memory, those who wait have 8.38 GiB: add a worker"
    found = asked(broker, 3, a={"gb": 9}, b={"gb": 9})
    assert sorted((answer["first"], answer["last"]) for answer in found.values()) == [(0, 1), (3, 4)]


def test_who_comes_back_does_not_wait_for_those_that_are_gone_for_ever(broker: Joining) -> None:
    """Three were to come, and came; then one is lost, and another one begins anew."""
    broker.stage("first", 0, 2, labels={"place": "first"})
    assert broker.place("again", 9, of=3)["why"] == "waits whether others join"
    assert asked(broker, 2, again={"gb": 9, "of": 3})["again"]["first"] == 2


def test_layers_are_kept_until_the_stage_that_has_loaded_them_is_announced(broker: Joining) -> None:
    """It asks a last time, ends that connection and says HELLO over another one, within 3 s."""
    broker.stage("s", 0, 3)
    broker.place("a", 9)
    broker.now += 2.0
    assert broker.layers("a", 9) == (3, 4)
    assert "wait" in asked(broker, 3, b={"gb": 9})["b"]
    assert broker.layers("a", 9, held=[3, 4]) == (3, 4)
    broker.lost("a")
    assert "wait" in asked(broker, 2.5, b={"gb": 9})["b"]
    broker.stage("stage a", 3, 4, labels={"place": "a"})
    assert "wait" in asked(broker, 2, b={"gb": 9})["b"]
    broker.lost("stage a")
    assert asked(broker, 1, b={"gb": 9})["b"]["first"] == 3


def test_who_is_gone_is_not_planned_with(broker: Joining) -> None:
    broker.place("a", 9)
    broker.place("b", 9)
    broker.lost("b")
    broker.now += 2.0
    assert broker.layers("a", 9) == (0, 4)


def test_what_does_not_fit_is_planned_once(broker: Joining, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stages, the same layers: nothing new can come of it; another stage, or a span that is gone, can."""
    plans: list[int] = []
    best = place.best_spans
    monkeypatch.setattr(place, "best_spans", lambda task, states: plans.append(len(task.slots)) or best(task, states))
    broker.stage("s0", 0, 3)
    broker.stage("s1", 3, 4)
    asked(broker, 20, tiny={"gb": 0.5})
    assert plans == [1]
    broker.lost("s1")
    asked(broker, 3, tiny={"gb": 0.5})
    assert plans == [1, 1]
    asked(broker, 3, tiny={"gb": 0.5}, more={"gb": 0.6})
    assert plans == [1, 1, 2]


def test_two_that_stand_by_do_so_for_different_stages(broker: Joining) -> None:
    for place_ in range(2):
        broker.stage(f"s{place_}", place_, place_ + 1)
    broker.stage("s2", 2, 4)
    found = asked(broker, 12, a={"gb": 2.1}, b={"gb": 2.1})
    assert sorted((answer["first"], answer["last"]) for answer in found.values()) == [(0, 1), (1, 2)]
    assert found["a"]["why"] == "every layer has a stage: it stands by for one of them"


def test_one_that_stands_by_takes_as_many_layers_as_it_can(broker: Joining) -> None:
    for number, (first, last) in enumerate(((0, 1), (1, 3), (3, 4))):
        broker.stage(f"s{number}", first, last)
    answer = asked(broker, 12, a={"gb": 2.1})["a"]
    assert (answer["first"], answer["last"]) == (1, 3)


def test_all_keep_as_many_tokens_as_the_one_that_wants_most(broker: Joining) -> None:
    broker.place("a", 4, of=2)
    told = broker.place("b", 4, of=2, kv_tokens=10**6)["why"]
    assert told == "layers 0-3 need 9.31 GiB of memory, those who wait have 7.45 GiB: add a worker"


def test_a_key_asks_for_models_that_it_may_offer_alone() -> None:
    broker = Joining()
    for name, offers in (("w", ("search:*", "lm:m")), ("v", ("search:*",))):
        broker.core.introduce(broker.now, name.encode(), Entry(name, WORKER, f"public {name}", offers))
    assert "wait" in broker.place("w", 9)
    broker.hello("v")
    question = {"who": "v", "sizes": SIZES.as_map(), "fingerprint": "f", "memory": 1, "speed": 1.0, "kv_tokens": 1}
    error = only(broker.ask("v", "ralmq.place", "q", body={**question, "of": 0, "held": [0, 4]})).message
    assert error.code == "refused" and "the key v (worker) may not offer lm:m" in error.message


def test_who_is_announced_needs_no_lease_at_once(broker: Joining) -> None:
    """It is lost again within the time in which its lease would go on; its layers are free."""
    broker.stage("s", 0, 3)
    broker.place("b", 0.1)
    broker.now += 2.0
    broker.layers("a", 9, held=[3, 4])
    broker.lost("a")
    broker.stage("stage a", 3, 4, labels={"place": "a"})
    assert "wait" in asked(broker, 0.5, b={"gb": 9})["b"]
    broker.lost("stage a")
    assert broker.place("b", 9)["first"] == 3


def test_stages_of_other_models_are_no_help(broker: Joining) -> None:
    """Neither are they among those that are to come, nor do they hold layers of this one."""
    broker.place("other", 9, fingerprint="g", held=[0, 4])
    assert broker.place("a", 9, of=2)["why"] == "waits for the other stages: 1 of 2 are here"
    assert broker.place("b", 9, of=2)["why"].startswith("the fastest split of layers 0-3")


def test_a_stage_that_was_told_its_layers_is_none_of_those_to_come(broker: Joining) -> None:
    broker.stage("by hand", 0, 2)
    assert broker.place("a", 9, of=2)["why"] == "waits whether others join"
    broker.stage("asked", 3, 4, labels={"place": "earlier"})
    assert broker.layers("a", 9, of=2) == (2, 3)


def test_layers_of_a_stage_that_leaves_are_free(broker: Joining) -> None:
    broker.stage("s0", 0, 2)
    broker.stage("s1", 2, 4)
    broker.hello("client")
    broker.ask("client", "lm:m", "long")
    broker.place("a", 9)
    broker.say("s1", Bye())
    assert [stage.draining for stage in broker.core.pipelines.stages()] == [False, True], "it ends what it has begun"
    broker.now += 2.0
    assert broker.layers("a", 9) == (2, 4)
