"""Workers of one service are replicas: who says that it serves something else is refused beside them."""

import pytest
from broker_driver import Broker, codes, only, shown
from ralmq.schema.message import Beat, Bye


@pytest.fixture
def broker() -> Broker:
    broker = Broker()
    broker.hello("client")
    broker.hello("a", "search:docs", "search:docs/0", labels={"identity": "vectors of 8"})
    return broker


def test_another_identity_is_refused_with_what_to_do(broker: Broker) -> None:
    refused = only(broker.hello("b", "other", "search:docs", labels={"identity": "texts"}))
    assert refused.message.code == "refused"
    for part in ("search:docs is served by a", "another (vectors of 8; this one: texts)", "-o name="):
        assert part in refused.message.message
    status = broker.core.status(broker.now)
    assert [worker["name"] for worker in status["workers"]] == ["a"] and broker.count("other_identity") == 1
    assert set(status["services"]) == {"search:docs", "search:docs/0"}, "nothing is left of what was refused"
    assert shown(broker.ask("b", "search:docs", "x")) == [("b", "Gone", "", 0)], "it is not known"
    assert broker.ask("client", "search:docs", "y")[0].to == "a"


def test_the_same_identity_none_and_other_names_are_welcome(broker: Broker) -> None:
    broker.hello("b", "search:docs", "search:docs/1", labels={"identity": "vectors of 8"})
    broker.hello("c", "search:docs")
    broker.hello("d", "search:docs", labels={"identity": None})
    broker.hello("e", "search:notes", labels={"identity": "texts"})
    assert [worker["name"] for worker in broker.core.status(broker.now)["workers"]] == ["a", "b", "c", "d", "e"]
    assert codes(broker.hello("f", "search:docs", labels={"identity": "texts"})) == ["refused"]


def test_whoever_says_nothing_is_no_rival() -> None:
    broker = Broker()
    broker.hello("a", "search:docs")
    broker.hello("b", "search:docs", labels={"identity": "texts"})
    assert broker.worker("b")["state"] == "ready"


def test_a_worker_that_drains_or_is_lost_makes_room(broker: Broker) -> None:
    broker.hello("client")
    broker.ask("client", "search:docs", "x")
    broker.say("a", Bye())
    assert broker.worker("a")["state"] == "draining"
    assert shown(broker.hello("b", "search:docs", labels={"identity": "texts"})) == [("b", "Welcome", "", 0)]
    broker.lost("b")
    assert shown(broker.hello("c", "search:docs", labels={"identity": "more"})) == [("c", "Welcome", "", 0)]


def test_nobody_is_refused_for_an_earlier_self(broker: Broker) -> None:
    """On the same connection, on another one, and as a process that cannot tell that the broker has not missed it."""
    assert shown(broker.hello("a", "search:docs", nonce="new", labels={"identity": "texts"}))[-1][1] == "Welcome"
    again = broker.hello("a2", "search:docs", nonce="new", labels={"identity": "vectors of 8"})
    assert shown(again)[-1] == ("a2", "Welcome", "", 0)
    assert shown(broker.hello("a3", "search:docs", labels={"identity": "vectors of 8"})) == [("a3", "Welcome", "", 0)]
    assert shown(broker.hello("a3", "search:docs", labels={"identity": "vectors of 8"})) == [("a3", "Welcome", "", 0)]


def test_a_fenced_worker_comes_back_once_the_other_is_gone(broker: Broker) -> None:
    broker.lost("a")
    broker.hello("b", "search:docs", labels={"identity": "texts"})
    offer = ("a", "search:docs", "search:docs/0")
    assert codes(broker.hello(*offer, labels={"identity": "vectors of 8"})) == ["refused"]
    assert shown(broker.say("a", Beat())) == [("a", "Gone", "", 0)], "told to say HELLO again"
    broker.say("b", Bye())
    assert shown(broker.hello(*offer, labels={"identity": "vectors of 8"})) == [("a", "Welcome", "", 0)]
