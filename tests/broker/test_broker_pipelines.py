"""Pipelines formed from spans: STEPs, fences, loss, spares, drain."""

from typing import Any

import pytest
from broker_driver import Broker, Out, codes, only, shown
from ralmq.schema.frame import RETURN
from ralmq.schema.limits import NO_ID
from ralmq.schema.message import Beat, Bye, Cancel, Credit, Error, Final, Form, Gone, Partial, Step


@pytest.fixture
def broker() -> Broker:
    broker = Broker()
    broker.hello("client")
    return broker


def formed(sent: list[Out]) -> tuple[bytes, list[str]]:
    """The pipeline that FORM tells of, and its stages in order."""
    forms = [out for out in sent if isinstance(out.message, Form)]
    ids = {out.prefix.id for out in forms}
    assert len(ids) == 1 and [out.message.place for out in forms] == list(range(len(forms)))
    assert {out.message.stages for out in forms} == {len(forms)}
    return ids.pop(), [out.to for out in forms]


def pair(broker: Broker, **offer: object) -> bytes:
    """Two stages, formed."""
    broker.stage("s0", 0, 2, **offer)
    return formed(broker.stage("s1", 2, 4, **offer))[0]


def test_stages_that_cover_all_layers_form_a_pipeline_in_any_order(broker: Broker) -> None:
    assert shown(broker.stage("last", 3, 4, blocks=50)) == [("last", "Welcome", "", 0)]
    assert shown(broker.stage("first", 0, 1, rows=4)) == [("first", "Welcome", "", 0)]
    sent = broker.stage("middle", 1, 3)
    pipeline, stages = formed(sent)
    assert stages == ["first", "middle", "last"] and pipeline != NO_ID
    form = sent[1].message
    assert (form.model, form.kv_blocks, form.max_rows) == ("m", 50, 4), "the smallest of all"
    assert only(broker.ask("client", "lm:m", "a")).to == "first"
    assert broker.worker("middle")["layers"] == [1, 3, 4]


def test_one_stage_may_be_all(broker: Broker) -> None:
    assert formed(broker.stage("whole", 0, 4))[1] == ["whole"]


def test_only_equal_fingerprints_and_models_join(broker: Broker) -> None:
    broker.stage("a0", 0, 2, fingerprint="a")
    assert shown(broker.stage("b1", 2, 4, fingerprint="b")) == [("b1", "Welcome", "", 0)]
    assert shown(broker.stage("c1", 2, 4, fingerprint="a", model="n")) == [("c1", "Welcome", "", 0)]
    assert formed(broker.stage("a1", 2, 4, fingerprint="a"))[1] == ["a0", "a1"]


def test_long_spans_are_preferred_and_overlaps_left_out(broker: Broker) -> None:
    broker.stage("short", 0, 1)
    broker.stage("odd", 1, 3)
    broker.stage("long", 0, 3)
    assert formed(broker.stage("end", 3, 4))[1] == ["long", "end"]
    assert broker.worker("short")["state"] == "spare"


def test_a_second_set_of_stages_is_a_second_pipeline(broker: Broker) -> None:
    first = pair(broker)
    broker.stage("t1", 2, 4)
    second, stages = formed(broker.stage("t0", 0, 2))
    assert stages == ["t0", "t1"] and second != first
    leaders = [only(broker.ask("client", "lm:m", f"r{n}")).to for n in range(4)]
    assert leaders == ["s0", "t0", "s0", "t0"]


def test_steps_go_to_the_next_stage_and_back_to_the_leader(broker: Broker) -> None:
    broker.stage("s0", 0, 1)
    broker.stage("s1", 1, 2)
    pipeline = formed(broker.stage("s2", 2, 4))[0]
    for sender, flags, target in (("s0", 0, "s1"), ("s1", 0, "s2"), ("s2", RETURN, "s0")):
        out = only(broker.say(sender, Step(batch=3), pipeline, flags=flags))
        assert (out.to, out.message.batch, out.prefix.flags) == (target, 3, flags)


def test_steps_of_another_incarnation_are_fenced_off(broker: Broker) -> None:
    old = pair(broker)
    broker.stage("spare", 2, 4)
    broker.lost("s1")
    refused = only(broker.say("s0", Step(), old))
    assert isinstance(refused.message, Gone) and refused.to == "s0" and refused.prefix.id == old
    broker.stage("outside", 0, 2)
    assert isinstance(only(broker.say("outside", Step(), old)).message, Gone)
    assert isinstance(only(broker.say("client", Step(), old)).message, Gone)
    assert broker.count("fenced") == 3


def test_a_step_beyond_the_last_stage_goes_nowhere(broker: Broker) -> None:
    pipeline = pair(broker)
    assert isinstance(only(broker.say("s1", Step(), pipeline)).message, Gone)


def test_any_stage_may_answer_and_the_leader_gets_the_credit_back(broker: Broker) -> None:
    pair(broker)
    broker.ask("client", "lm:m", "a")
    broker.ask("client", "lm:m", "b")
    assert broker.worker("s0")["in_flight"] == 2 and broker.worker("s1")["in_flight"] == 0
    assert shown(broker.say("s1", Partial(), "a")) == [("client", "Partial", "a", 0)]
    assert shown(broker.say("s1", Final(), "a")) == [("client", "Final", "a", 0)]
    assert shown(broker.say("s0", Error("refused"), "b")) == [("client", "Error", "b", 0)]
    assert broker.worker("s0")["in_flight"] == 0


def test_a_stage_of_another_pipeline_may_not_answer(broker: Broker) -> None:
    pair(broker)
    broker.stage("t0", 0, 2)
    broker.stage("t1", 2, 4)
    broker.ask("client", "lm:m", "a")
    assert broker.say("t1", Final(), "a") == []
    assert shown(broker.say("t1", Partial(), "a")) == [("t1", "Gone", "a", 0)]
    assert broker.open() == 1


def test_cancel_and_credit_go_to_the_leader_alone(broker: Broker) -> None:
    pair(broker)
    broker.ask("client", "lm:m", "a", window=4)
    assert shown(broker.say("client", Credit(8), "a")) == [("s0", "Credit", "a", 0)]
    assert shown(broker.say("client", Cancel(), "a")) == [("client", "Error", "a", 0), ("s0", "Cancel", "a", 0)]
    assert broker.say("s1", Partial(), "a") == [], "a token that was on its way: no need to tell"
    assert broker.say("s1", Beat(1, 1, ((b"a".ljust(16, b"."), 0),))) == []  # type: ignore[arg-type]
    assert broker.worker("s0")["in_flight"] == 1
    broker.say("s1", Final(), "a")  # it was just done: as good an acknowledgement
    assert broker.worker("s0")["in_flight"] == 0


def test_the_last_stage_asks_on_behalf_of_a_generation(broker: Broker) -> None:
    pair(broker)
    broker.hello("index", "search:docs")
    broker.ask("client", "lm:m", "a")
    assert only(broker.ask("s1", "search:docs", "knn", parent="a")).to == "index"
    assert shown(broker.end("index", "knn")) == [("s1", "Final", "knn", 0)]
    broker.ask("s1", "search:docs", "knn2", parent="a")
    sent = shown(broker.say("s1", Final(), "a"))
    assert sent == [("client", "Final", "a", 0), ("s1", "Error", "knn2", 0), ("index", "Cancel", "knn2", 0)]


@pytest.mark.parametrize("dead", ["s0", "s1"])
def test_a_lost_stage_ends_its_pipeline_and_a_spare_takes_its_place(broker: Broker, dead: str) -> None:
    old = pair(broker)
    place = int(dead[1])
    broker.stage("spare", 2 * place, 2 * place + 2)
    broker.ask("client", "lm:m", "a")
    sent = broker.lost(dead)
    survivor = "s1" if dead == "s0" else "s0"
    assert codes(sent) == ["worker_lost"] and dead in next(out.message.message for out in sent if out.to == "client")
    gone = next(out for out in sent if isinstance(out.message, Gone))
    assert gone.to == survivor and gone.prefix.id == old
    new, stages = formed(sent)
    assert new != old and sorted(stages) == sorted([survivor, "spare"])
    assert shown(sent).index((survivor, "Gone", shown([gone])[0][2], 0)) < [out.to for out in sent].index("spare")
    assert only(broker.ask("client", "lm:m", "b")).to == stages[0]


def test_requests_wait_while_layers_are_missing(broker: Broker) -> None:
    pair(broker)
    broker.lost("s1")
    assert broker.ask("client", "lm:m", "a", deadline=6.0) == []
    assert broker.wait(5.0) == [], "a stage offers the model: no need for the grace"
    sent = broker.stage("s1 again", 2, 4)
    assert formed(sent)[1] == ["s0", "s1 again"] and sent[-1].to == "s0" and shown(sent)[-1][1:3] == ("Request", "a")


@pytest.mark.parametrize(
    ("spans", "missing"),
    [
        ([(0, 2)], "2-3 of 4"),
        ([(1, 2), (3, 4)], "0-0 of 4, 2-2 of 4"),
        ([(0, 3), (2, 4)], "none, but spans do not join"),
    ],
)
def test_a_deadline_names_the_missing_layers(broker: Broker, spans: list[tuple[int, int]], missing: str) -> None:
    for first, last in spans:
        broker.stage(f"s{first}", first, last)
    broker.stage("foreign", 0, 2, model="n")
    broker.ask("client", "lm:m", "a", deadline=1.0)
    ((_, error),) = broker.wait(1.1)
    assert error.message.code == "deadline" and missing in error.message.message
    status = broker.core.status(broker.now)["pipelines"]
    assert [entry["formed"] for entry in status] == [False, False] and missing in status[0]["missing"]


def test_a_model_of_billions_of_layers_costs_nothing(broker: Broker) -> None:
    broker.stage("s", 5, 7, layers=2_000_000_000)
    assert broker.core.status(broker.now)["pipelines"][0]["missing"] == "0-4 of 2000000000, 7-1999999999 of 2000000000"


def test_without_any_stage_a_model_is_an_unknown_service(broker: Broker) -> None:
    broker.wait(4.0)
    assert codes(broker.ask("client", "lm:m", "a")) == ["no_service"]
    pair(broker)
    broker.lost("s0")
    broker.lost("s1")
    broker.ask("client", "lm:m", "b")
    assert [out.message.code for _, out in broker.wait(11.0)] == ["no_service"]


def test_a_pipeline_of_idempotent_stages_has_its_requests_repeated(broker: Broker) -> None:
    pair(broker, idempotent=True)
    broker.hello("index", "search:docs")
    broker.stage("t0", 0, 2, idempotent=True)
    broker.ask("client", "lm:m", "a")
    broker.ask("s1", "search:docs", "knn", parent="a")
    sent = broker.lost("s0")
    assert ("index", "Cancel", "knn", 0) in shown(sent) and ("s1", "Error", "knn", 0) in shown(sent)
    assert ("t0", "Request", "a", 1) in shown(sent)


@pytest.mark.parametrize("who", ["s0", "s1"])
def test_a_draining_stage_lets_its_pipeline_end_what_it_has(broker: Broker, who: str) -> None:
    old = pair(broker)
    spare = 2 * int(who[1])
    broker.stage("spare", spare, spare + 2)
    broker.ask("client", "lm:m", "a")
    assert broker.say(who, Bye()) == []
    assert broker.ask("client", "lm:m", "b") == [], "it waits for the pipeline that comes"
    sent = broker.say("s1", Final(), "a")
    assert shown(sent)[0] == ("client", "Final", "a", 0)
    assert [out.to for out in sent if isinstance(out.message, Gone) and out.prefix.id == old] == ["s0", "s1"]
    assert [out.to for out in sent if isinstance(out.message, Bye)] == [who]
    stages = formed(sent)[1]
    assert who not in stages and "spare" in stages
    assert shown(sent)[-1] == (stages[0], "Request", "b", 0)


def test_a_stage_without_a_pipeline_may_go_at_once(broker: Broker) -> None:
    broker.stage("s0", 0, 2)
    assert shown(broker.say("s0", Bye())) == [("s0", "Bye", "", 0)]
    assert broker.core.status(broker.now)["pipelines"] == []


def test_a_draining_pipeline_that_loses_a_stage_lets_the_drained_go(broker: Broker) -> None:
    pair(broker)
    broker.ask("client", "lm:m", "a")
    broker.say("s0", Bye())
    sent = broker.lost("s1")
    assert codes(sent) == ["worker_lost"]
    assert [out.to for out in sent if isinstance(out.message, Bye)] == ["s0"]


@pytest.mark.parametrize("spare", [0, 2, None])
def test_all_stages_drain_together(broker: Broker, spare: int | None) -> None:
    pair(broker)
    broker.ask("client", "lm:m", "a")
    if spare is not None:
        broker.stage("spare", spare, spare + 2)
    broker.say("s0", Bye())
    broker.say("s1", Bye())
    sent = broker.say("s1", Final(), "a")
    assert sorted(out.to for out in sent if isinstance(out.message, Bye)) == ["s0", "s1"]
    assert not [out for out in sent if isinstance(out.message, Form)]


def test_the_stage_that_hangs_is_found_and_not_those_that_wait_for_it(broker: Broker) -> None:
    pair(broker, stall_ms=3000)
    broker.stage("spare", 2, 4, stall_ms=3000)
    broker.ask("client", "lm:m", "a")
    sent: list[Out] = []
    for second in range(8):
        if second < 2:
            broker.say("s1", Beat(second, 0))  # then it stands still, with nothing in hand that it said
        sent += [out for _, out in broker.wait(0.5)]
        broker.busy("s0", min(second, 1), ("a", 0))  # waits for it from then on
        sent += [out for _, out in broker.wait(0.5)]
        if sent:
            break
    gone = [out.to for out in sent if isinstance(out.message, Gone) and out.prefix.id == NO_ID]
    assert gone == ["s1"] and formed(sent)[1] == ["s0", "spare"]
    assert broker.wait(2.5) == [], "the survivor begins anew"


def test_status_lists_pipelines_and_what_their_stages_do(broker: Broker) -> None:
    pair(broker)
    broker.stage("spare", 2, 4)
    (entry,) = broker.core.status(broker.now)["pipelines"]
    assert entry == {"model": "m", "formed": True, "stages": ["s0", "s1"], "missing": "", "bubble": [None, None]}
    assert [broker.worker(name)["state"] for name in ("s0", "s1", "spare")] == ["ready", "ready", "spare"]
    broker.ask("client", "lm:m", "a")
    broker.say("s1", Bye())
    assert broker.worker("s1")["state"] == "draining"


def test_a_leader_that_survives_its_pipeline_has_all_its_credit_again(broker: Broker) -> None:
    pair(broker)
    for name in ("a", "b"):
        broker.ask("client", "lm:m", name)
    broker.say("client", Cancel(), "a")  # not acknowledged yet
    broker.lost("s1")
    assert broker.worker("s0")["in_flight"] == 0
    assert broker.say("s0", Error("cancelled"), "a") == []
    assert broker.worker("s0")["in_flight"] == 0 and broker.count("fenced") == 1


@pytest.mark.parametrize(
    ("work", "computed", "bubbles"),
    [
        (10.0, (8.0, 2.5), [0.2, 0.75]),
        (4, (5.0, "much"), [0.0, 1.0]),
        (0, (1, 1), [None, None]),
        (True, (-1, 1e300), [1.0, 1.0]),
    ],
)
def test_bubbles_are_the_time_that_a_stage_stood_idle(broker: Broker, work: Any, computed: Any, bubbles: Any) -> None:
    """As a share of that in which the leader had work; a gauge may be anything."""
    broker.stage("s0", 0, 2)
    broker.stage("s1", 2, 4)
    assert broker.core.status(broker.now)["pipelines"][0]["bubble"] == [None, None]
    broker.say("s0", Beat(1, 0, (), {"work_s": work, "compute_s": computed[0]}))
    broker.say("s1", Beat(1, 0, (), {"compute_s": computed[1]}))
    assert broker.core.status(broker.now)["pipelines"][0]["bubble"] == bubbles
