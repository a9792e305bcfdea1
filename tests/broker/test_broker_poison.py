"""Requests whose workers are lost: suspects go on alone, the guilty one is given up and listed, no other is harmed."""

import pytest
from broker_driver import Broker, codes, ident, only, shown
from ralmq.broker.quarantine import SHOWN
from ralmq.schema.codec import decode
from ralmq.schema.errors import Poisoned
from ralmq.schema.message import Bye, Cancel, Error, Final, Partial, Request


@pytest.fixture
def broker() -> Broker:
    broker = Broker()
    broker.hello("client")
    return broker


def poisoned(broker: Broker, name: str = "poison", **options: object) -> Error:
    """Has a request's workers die until it is given up."""
    broker.hello("w0", "echo")
    broker.ask("client", "echo", name, body={"secret": "do not show"}, **options)
    for n in (1, 2):
        broker.hello(f"w{n}", "echo")
        assert ("w" + str(n), "Request", name, n) in shown(broker.lost(f"w{n - 1}"))
    sent = [out for out in broker.lost("w2") if out.to == "client"]
    message = only(sent).message
    assert isinstance(message, Error)
    return message


def listed(broker: Broker) -> list[dict[str, object]]:
    answer = only(broker.ask("client", "ralmq.quarantine.list", f"list {broker.now}"))
    assert isinstance(answer.message, Final)
    return list(answer.message.body["quarantine"])


def retry(broker: Broker, what: object, name: str) -> list[object]:
    return list(broker.ask("client", "ralmq.quarantine.retry", name, body={"id": what}, deadline=5.0))


def test_a_request_whose_workers_die_three_times_is_given_up_and_listed(broker: Broker) -> None:
    error = poisoned(broker)
    assert error.code == "poisoned" and "3 workers of echo" in error.message and "quarantine" in error.message
    assert Poisoned.fault == "caller" and not Poisoned.retryable
    broker.wait(2.0)
    (entry,) = listed(broker)
    assert entry["id"] == ident("poison").hex() and entry["service"] == "echo" and entry["asker"] == "client"
    assert entry["age_s"] == pytest.approx(2.0) and "3 workers" in str(entry["why"]) and entry["kept"] is True
    assert "do not show" not in str(entry), "never what it contains"
    assert broker.core.status(broker.now)["broker"]["quarantine"] == 1 and broker.count("poisoned") == 1


def test_a_suspect_goes_alone_and_a_worker_is_kept_free_for_it(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=3)
    for name in ("a", "b"):
        broker.ask("client", "echo", name)
    broker.hello("v", "echo", capacity=3)
    for name in ("c", "d"):
        assert only(broker.ask("client", "echo", name)).to == "v"
    assert broker.lost("w") == [], "v has something in hand"
    assert broker.ask("client", "echo", "e") == [], "and is kept from new work, so that it will have nothing"
    assert broker.end("v", "c")[1:] == []
    assert shown(broker.end("v", "d"))[1:] == [("v", "Request", "a", 1)]
    assert shown(broker.end("v", "a", attempt=1))[1:] == [("v", "Request", "b", 1)]
    assert shown(broker.end("v", "b", attempt=1))[1:] == [("v", "Request", "e", 0)]
    assert only(broker.ask("client", "echo", "f")).to == "v", "its whole capacity is back"


def test_the_others_of_a_worker_that_died_are_not_given_up_with_the_guilty_one(broker: Broker) -> None:
    broker.hello("w0", "echo", capacity=9)
    names = ["a", "poison", "b", "c"]
    for name in names:
        broker.ask("client", "echo", name)
    ended: dict[str, str] = {}
    broker.hello("w1", "echo", capacity=9)
    todo = broker.lost("w0")
    while todo:
        out = todo.pop(0)
        name = out.prefix.id.strip(b".").decode()
        if isinstance(out.message, Error | Final):
            ended[name] = getattr(out.message, "code", "final")
        elif isinstance(out.message, Request) and name == "poison":
            todo += broker.hello(f"w{int(out.to[1:]) + 1}", "echo", capacity=9)
            todo += broker.lost(out.to)
        elif isinstance(out.message, Request):
            todo += broker.end(out.to, name, attempt=out.prefix.attempt)
    assert ended == {"a": "final", "b": "final", "c": "final", "poison": "poisoned"}


def test_of_several_workers_only_one_is_kept_and_another_takes_its_place(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    for worker in ("v1", "v2"):
        broker.hello(worker, "echo", capacity=2)
        broker.ask("client", "echo", f"of {worker}")
    broker.lost("w")
    assert only(broker.ask("client", "echo", "b")).to == "v2", "v1 is kept"
    broker.say("v1", Bye())
    assert broker.ask("client", "echo", "c") == [], "v2 is kept instead"
    broker.end("v2", "of v2")
    assert shown(broker.end("v2", "b"))[1:] == [("v2", "Request", "a", 1)]


def test_an_idle_worker_that_comes_takes_the_suspect_and_frees_the_one_kept(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.hello("v", "echo", "other", capacity=2)
    broker.ask("client", "echo", "b")
    broker.lost("w")
    assert broker.ask("client", "other", "c") == [], "kept from all that it offers"
    assert shown(broker.hello("new", "echo"))[1:] == [("new", "Request", "a", 1), ("v", "Request", "c", 0)]


def test_a_suspect_that_is_cancelled_frees_the_worker_that_was_kept(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.hello("v", "echo", capacity=2)
    broker.ask("client", "echo", "b")
    broker.lost("w")
    assert broker.ask("client", "echo", "c") == []
    assert shown(broker.say("client", Cancel(), "a")) == [("client", "Error", "a", 0), ("v", "Request", "c", 0)]


def test_a_suspect_that_is_sent_again_stays_one(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.hello("v", "echo", capacity=2)
    broker.ask("client", "echo", "b")
    broker.lost("w")
    assert broker.ask("client", "echo", "a", attempt=1) == [], "v has something in hand"
    assert shown(broker.end("v", "b"))[1:] == [("v", "Request", "a", 2)]
    broker.hello("x", "echo")
    assert shown(broker.lost("v")) == [("x", "Request", "a", 3)]
    assert codes(broker.lost("x")) == ["poisoned"], "with the one before it was sent again three were lost"


def test_a_suspect_is_not_given_to_a_worker_that_is_not_idempotent(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.lost("w")
    assert codes(broker.hello("v", "echo", idempotent=False)) == ["worker_lost"]
    assert broker.worker("v")["in_flight"] == 0
    assert only(broker.ask("client", "echo", "b")).to == "v"


def test_what_a_worker_calls_poison_is_listed_without_contents(broker: Broker) -> None:
    broker.hello("g", "generate:m", capacity=2)
    for name, code in (("a", "poisoned"), ("b", "worker_failed")):
        broker.ask("client", "generate:m", name)
        broker.say("g", Error(code, "its stages were lost" * 100), name)
    (entry,) = listed(broker)
    assert entry["id"] == ident("a").hex() and entry["kept"] is False and entry["bytes"] == 0
    assert len(str(entry["why"])) == SHOWN
    refusal = only(retry(broker, entry["id"], "r"))  # type: ignore[arg-type]
    assert refusal.message.code == "refused" and "not kept" in refusal.message.message
    assert len(listed(broker)) == 1


def test_a_request_in_quarantine_is_served_again_for_whoever_asks(broker: Broker) -> None:
    poisoned(broker, window=8)
    broker.hello("w", "echo", capacity=3)
    sent = retry(broker, ident("poison").hex()[:9], "again")
    assert shown(sent) == [("w", "Request", "again", 0), ("w", "Credit", "again", 0)]  # type: ignore[arg-type]
    given = sent[0]
    assert given.message.body == {"secret": "do not show"} and given.prefix.deadline == 5000  # type: ignore[attr-defined]
    assert broker.worker("w")["in_flight"] == 1 and broker.ask("client", "echo", "other") == [], "alone"
    assert shown(broker.say("w", Partial({"n": 1}), "again"))[0][:3] == ("client", "Partial", "again")
    assert shown(broker.end("w", "again")) == [("client", "Final", "again", 0), ("w", "Request", "other", 0)]
    assert listed(broker) == [] and broker.count("retried") == 1


def test_a_retry_of_a_child_needs_its_parent_no_more(broker: Broker) -> None:
    broker.hello("outer", "outer")
    broker.ask("client", "outer", "p")
    broker.hello("w0", "echo")
    broker.ask("outer", "echo", "c", parent="p")
    for n in range(3):
        broker.hello(f"w{n + 1}", "echo")
        broker.lost(f"w{n}")
    broker.end("outer", "p")
    assert shown(retry(broker, ident("c").hex(), "r"))[0] == ("w3", "Request", "r", 0)  # type: ignore[arg-type]


def test_a_retry_that_nobody_can_serve_is_told_so(broker: Broker) -> None:
    poisoned(broker)
    broker.wait(12.0)
    assert codes(retry(broker, ident("poison").hex(), "r")) == ["no_service"]  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["", "00", None, 7, "zz"])
def test_a_retry_of_what_is_not_there_is_refused(broker: Broker, what: object) -> None:
    refusal = only(retry(broker, what, "r"))  # type: ignore[arg-type]
    assert refusal.message.code == "refused" and "quarantine list" in refusal.message.message


def test_a_retry_by_a_beginning_that_several_share_is_refused(broker: Broker) -> None:
    for name in ("poison 1", "poison 2"):
        poisoned(broker, name)
    refusal = only(retry(broker, ident("poison").hex()[:6], "r"))  # type: ignore[arg-type]
    assert "2 requests" in refusal.message.message and len(listed(broker)) == 2


def test_the_quarantine_is_bounded_in_entries_and_bytes() -> None:
    broker = Broker(quarantine=2, quarantine_bytes=9000)
    broker.hello("client")
    for n in range(3):
        poisoned(broker, f"p{n}")
    assert [entry["id"] for entry in listed(broker)] == [ident("p1").hex(), ident("p2").hex()]
    broker.hello("w0", "echo")
    broker.ask("client", "echo", "big", body={"x": "y" * 8_000})
    for n in (1, 2):
        broker.hello(f"w{n}", "echo")
        broker.lost(f"w{n - 1}")
    broker.lost("w2")
    broker.wait(1.0)
    assert [entry["kept"] for entry in listed(broker)] == [True, True]
    poisoned(broker, "p3", wait_ms=1)
    broker.ask("client", "echo", "big 2", body={"x": "y" * 8_900})
    for n in (5, 6, 7):
        broker.hello(f"w{n}", "echo")
        if n > 5:
            broker.lost(f"w{n - 1}")
    broker.lost("w7")
    kept = {str(entry["id"]): entry["kept"] for entry in listed(broker)}
    assert kept == {ident("p3").hex(): False, ident("big 2").hex(): True}


def test_the_frames_of_a_retry_keep_what_the_prefix_says_of_them(broker: Broker) -> None:
    """A long body travels in a frame of its own, and a flag says so."""
    broker.hello("w0", "echo")
    broker.ask("client", "echo", "long", body={"x": "y" * 9000})
    for n in (1, 2, 3):
        broker.hello(f"w{n}", "echo")
        broker.lost(f"w{n - 1}")
    given = retry(broker, ident("long").hex(), "r")[0]
    prefix, message = decode(given.frames)  # type: ignore[attr-defined]
    assert len(message.body["x"]) == 9000 and prefix.id == ident("r")


def test_the_leader_that_survives_its_pipeline_takes_as_much_as_before(broker: Broker) -> None:
    for name, first in (("s0", 0), ("s1", 2), ("t1", 2), ("u1", 2)):
        broker.stage(name, first, first + 2, idempotent=True)
    broker.ask("client", "lm:m", "a")
    assert ("s0", "Request", "a", 1) in shown(broker.lost("s1"))
    assert ("s0", "Request", "a", 2) in shown(broker.lost("t1"))
    assert codes(broker.lost("u1")) == ["poisoned"]
    broker.stage("v1", 2, 4, idempotent=True)
    for name in ("b", "c"):
        assert shown(broker.ask("client", "lm:m", name)) == [("s0", "Request", name, 0)]
