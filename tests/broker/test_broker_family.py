"""Requests on behalf of others: deadline and end flow down."""

import pytest
from broker_driver import Broker, codes, ident, only, shown
from ralmq.schema.codec import encode
from ralmq.schema.message import Bye, Cancel, Error, Final, Request


@pytest.fixture
def broker() -> Broker:
    broker = Broker()
    broker.hello("client")
    broker.hello("outer", "outer", capacity=4)
    broker.hello("inner", "inner", capacity=4)
    return broker


def test_a_child_goes_its_own_way(broker: Broker) -> None:
    broker.ask("client", "outer", "p")
    assert shown(broker.ask("outer", "inner", "c", parent="p")) == [("inner", "Request", "c", 0)]
    assert shown(broker.end("inner", "c")) == [("outer", "Final", "c", 0)]
    assert shown(broker.end("outer", "p")) == [("client", "Final", "p", 0)]


@pytest.mark.parametrize("own", [0, 5.0])
def test_a_child_has_at_most_the_deadline_of_its_parent(broker: Broker, own: float) -> None:
    broker.ask("client", "outer", "p", deadline=1.0)
    broker.wait(0.4)
    given = only(broker.ask("outer", "inner", "c", parent="p", deadline=own))
    assert given.prefix.deadline == pytest.approx(600, abs=1)
    sent = [out for _, out in broker.wait(1.0)]
    ends = [(out.to, out.prefix.id.strip(b".")) for out in sent if isinstance(out.message, Error)]
    assert sorted(ends) == [("client", b"p"), ("outer", b"c")]
    stops = [(out.to, out.prefix.id.strip(b".")) for out in sent if isinstance(out.message, Cancel)]
    assert sorted(stops) == [("inner", b"c"), ("outer", b"p")]


def test_an_earlier_deadline_of_a_child_is_its_own(broker: Broker) -> None:
    broker.ask("client", "outer", "p", deadline=1.0)
    assert only(broker.ask("outer", "inner", "c", parent="p", deadline=0.3)).prefix.deadline == 300
    sent = [out for _, out in broker.wait(0.5)]
    assert shown(sent) == [("outer", "Error", "c", 0), ("inner", "Cancel", "c", 0)]
    broker.ask("client", "outer", "q")
    assert only(broker.ask("outer", "inner", "d", parent="q")).prefix.deadline == 0, "none, as its parent"


def test_a_child_asked_in_the_last_moment_has_a_millisecond(broker: Broker) -> None:
    broker.ask("client", "outer", "p", deadline=0.1)
    broker.now += 0.2
    assert only(broker.ask("outer", "inner", "c", parent="p")).prefix.deadline == 1
    assert {out.message.code for out in broker.tick() if isinstance(out.message, Error)} <= {"deadline", "cancelled"}
    assert broker.open() == 0


@pytest.mark.parametrize("way", ["cancel", "final", "error", "lost client", "resend"])
def test_the_end_of_a_parent_ends_its_children(broker: Broker, way: str) -> None:
    broker.ask("client", "outer", "p")
    for name in ("c", "d"):
        broker.ask("outer", "inner", name, parent="p")
    broker.end("inner", "d")
    if way == "cancel":
        sent = broker.say("client", Cancel(), "p")
    elif way == "lost client":
        sent = broker.lost("client")
    elif way == "resend":
        sent = broker.ask("client", "outer", "p", attempt=1)
    else:
        sent = broker.say("outer", Final() if way == "final" else Error("worker_failed"), "p")
    assert ("inner", "Cancel", "c", 0) in shown(sent) and ("outer", "Error", "c", 0) in shown(sent)
    assert [out.message.code for out in sent if out.to == "outer" and isinstance(out.message, Error)] == ["cancelled"]
    assert broker.open() == (1 if way == "resend" else 0)


def test_a_child_in_the_queue_ends_with_its_parent(broker: Broker) -> None:
    broker.hello("slow", "slow")
    broker.ask("client", "slow", "blocks")
    broker.ask("client", "outer", "p")
    broker.ask("outer", "slow", "c", parent="p")
    assert shown(broker.end("outer", "p")) == [("client", "Final", "p", 0), ("outer", "Error", "c", 0)]
    assert broker.core.status(broker.now)["broker"]["queued_bytes"] == 0


def test_children_of_a_lost_worker_end_and_its_request_goes_on(broker: Broker) -> None:
    broker.hello("outer 2", "outer")
    broker.ask("client", "outer", "p")
    broker.ask("outer", "inner", "c", parent="p")
    assert shown(broker.lost("outer")) == [("inner", "Release", "c", 0), ("outer 2", "Request", "p", 1)]
    assert codes(broker.ask("outer", "inner", "d", parent="p")) == []  # unknown now: GONE
    assert codes(broker.ask("inner", "inner", "d", parent="p")) == ["cancelled"], "it does not serve the parent"


def test_who_asks_for_an_ended_parent_is_told_so(broker: Broker) -> None:
    broker.ask("client", "outer", "p")
    broker.end("outer", "p")
    error = only(broker.ask("outer", "inner", "c", parent="p"))
    assert error.message.code == "cancelled" and error.prefix.id == ident("c")


def test_a_worker_that_asks_itself_and_dies(broker: Broker) -> None:
    broker.ask("outer", "outer", "p")
    broker.ask("outer", "outer", "c", parent="p")
    broker.ask("outer", "inner", "g", parent="c")
    assert ("inner", "Cancel", "g", 0) in shown(broker.lost("outer"))
    assert broker.open() == 0
    assert shown(broker.end("inner", "g")) == []


def test_a_worker_that_serves_both_parent_and_child_is_lost(broker: Broker) -> None:
    broker.hello("both", "first", "second", capacity=4, idempotent=False)
    broker.ask("client", "first", "p")
    broker.ask("both", "second", "c", parent="p")
    sent = broker.lost("both")
    assert [(out.to, out.message.code) for out in sent if isinstance(out.message, Error)] == [("client", "worker_lost")]
    assert broker.open() == 0


def test_a_chain_of_thousands_ends_at_once(broker: Broker) -> None:
    broker.hello("deep", "deep", capacity=5000)
    core, now = broker.core, broker.now
    core.step(now, b"client", encode(Request("deep"), id=ident("0"), epoch=broker.epoch))
    for n in range(1, 3000):
        request = Request("deep", parent=ident(str(n - 1)))
        core.step(now, b"deep", encode(request, id=ident(str(n)), epoch=broker.epoch))
    assert broker.open() == 3000
    sent = broker.say("client", Cancel(), "0")
    assert broker.open() == 0 and len(sent) == 6000


def test_a_drained_worker_may_still_ask(broker: Broker) -> None:
    broker.ask("client", "outer", "p")
    broker.say("outer", Bye())
    assert shown(broker.ask("outer", "inner", "c", parent="p")) == [("inner", "Request", "c", 0)]
    broker.end("inner", "c")
    assert shown(broker.end("outer", "p")) == [("client", "Final", "p", 0), ("outer", "Bye", "", 0)]
