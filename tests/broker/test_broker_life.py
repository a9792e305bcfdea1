"""Peers that come, die, hang, come back, drain; and what becomes of their requests."""

import pytest
from broker_driver import EPOCH, Broker, codes, ident, only, shown
from ralmq.schema.codec import encode
from ralmq.schema.limits import NO_ID
from ralmq.schema.message import Beat, Bye, Cancel, Error, Final, Gone, Hello, Partial, Request, Welcome


@pytest.fixture
def broker() -> Broker:
    broker = Broker()
    broker.hello("client")
    return broker


def test_hello_is_answered_with_epoch_and_rhythm() -> None:
    broker = Broker(beat=0.25)
    welcome = only(broker.hello("client"))
    assert welcome.to == "client" and welcome.prefix.epoch == EPOCH
    assert welcome.message == Welcome(beat_ms=250, name="client")
    assert shown(broker.hello("client")) == [("client", "Welcome", "", 0)], "HELLO twice is welcomed twice"
    assert broker.core.status(broker.now)["broker"]["clients"] == 1


def test_whoever_said_no_hello_is_told_so() -> None:
    broker = Broker()
    gone = only(broker.say("stranger", Beat()))
    assert isinstance(gone.message, Gone) and gone.prefix.id == NO_ID
    assert shown(broker.ask("stranger", "echo", "a")) == [("stranger", "Gone", "", 0)]
    assert broker.lost("stranger") == []


def test_messages_of_another_epoch_are_fenced_off(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=2)
    broker.hello("w2", "echo")
    assert shown(broker.ask("client", "echo", "a", epoch=EPOCH - 1)) == [("client", "Gone", "", 0)]
    assert shown(broker.ask("client", "echo", "a")) == [("client", "Gone", "", 0)], "both sides forget"
    broker.hello("client")
    broker.ask("client", "echo", "b")
    sent = broker.say("w", Final(), "b", epoch=EPOCH + 1)
    assert shown(sent) == [("w", "Gone", "", 0), ("w2", "Request", "b", 1)]


@pytest.mark.parametrize(
    ("offer", "word"),
    [
        ({"services": ("echo",), "capacity": 0}, "capacity"),
        ({"services": ("ralmq.status",), "capacity": 1}, "ralmq."),
        ({"services": ("echo",), "capacity": 1, "span": ("m", "f", 0, 1, 1, 1, 1, 1)}, "span"),
    ],
)
def test_an_offer_that_cannot_be_is_refused(broker: Broker, offer: dict[str, object], word: str) -> None:
    hello = Hello(ident("nonce"), "w", **offer)  # type: ignore[arg-type]
    refusal = only(broker.say("w", hello))
    assert refusal.message.code == "malformed" and word in refusal.message.message
    assert broker.core.status(broker.now)["workers"] == []


def test_bytes_that_are_no_message_get_an_error_and_change_nothing(broker: Broker) -> None:
    assert codes(broker.raw("client", [b"junk"])) == ["malformed"]
    assert codes(broker.raw("client", [bytes(36)])) == ["malformed"]
    good = encode(Request("echo"), id=ident("a"), epoch=EPOCH)
    refusal = only(broker.raw("client", good + [b""] * 64))
    assert refusal.message.code == "malformed" and refusal.prefix.id == ident("a")
    assert codes(broker.say("client", Welcome())) == ["malformed"], "a kind that only the broker sends"
    assert broker.count("malformed") == 4


def test_requests_of_a_dead_idempotent_worker_go_to_another_before_what_came_later(broker: Broker) -> None:
    broker.hello("w1", "echo", capacity=3)
    for name in ("a", "b", "c", "later"):
        broker.ask("client", "echo", name)
    broker.hello("w2", "echo", capacity=1)  # takes `later`
    assert broker.lost("w1") == []
    assert broker.count("requeued") == 3 and broker.count("lost_peers") == 1
    order, done = [], "later"
    while sent := broker.end("w2", done, attempt=int(done != "later"))[1:]:
        done = only(sent).prefix.id.strip(b".").decode()
        order.append((done, only(sent).prefix.attempt))
    assert order == [("a", 1), ("b", 1), ("c", 1)]


def test_requests_of_a_dead_worker_are_spread_over_those_that_have_nothing_in_hand(broker: Broker) -> None:
    broker.hello("w1", "echo", capacity=4)
    for n in range(3):
        broker.ask("client", "echo", f"r{n}")
    for worker in ("w2", "w3"):
        broker.hello(worker, "echo", capacity=4)
    again = broker.lost("w1")
    assert sorted(out.to for out in again) == ["w2", "w3"] and {out.prefix.attempt for out in again} == {1}


def test_requests_of_a_dead_worker_that_is_not_idempotent_fail(broker: Broker) -> None:
    broker.hello("w1", "pay", idempotent=False, capacity=2)
    broker.hello("w2", "pay", idempotent=False)
    for name in ("a", "b", "c"):
        broker.ask("client", "pay", name)
    failed = broker.lost("w1")
    assert codes(failed) == ["worker_lost"] * 2 and {out.to for out in failed} == {"client"}
    assert "w1" in failed[0].message.message
    assert shown(broker.end("w2", "b")) == [("client", "Final", "b", 0)]


def test_a_resend_is_not_given_to_a_worker_that_is_not_idempotent(broker: Broker) -> None:
    broker.hello("w", "pay", idempotent=False)
    assert codes(broker.ask("client", "pay", "a", attempt=1)) == ["worker_lost"]
    broker.ask("client", "pay", "b")
    assert broker.ask("client", "pay", "c", attempt=1) == []
    broker.ask("client", "pay", "d")
    sent = broker.end("w", "b")
    assert shown(sent) == [("client", "Final", "b", 0), ("client", "Error", "c", 1), ("w", "Request", "d", 0)]


def test_what_a_dead_client_asked_is_released(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=1)
    broker.ask("client", "echo", "a")
    broker.ask("client", "echo", "queued")
    assert shown(broker.lost("client")) == [("w", "Release", "a", 0)]
    assert broker.open() == 0 and broker.count("abandoned") == 2
    assert broker.worker("w")["in_flight"] == 1
    assert broker.end("w", "a") == []
    assert broker.worker("w")["in_flight"] == 0


def test_a_client_that_leaves_is_forgotten_at_once(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    assert shown(broker.say("client", Bye())) == [("w", "Release", "a", 0)]
    assert shown(broker.say("client", Beat())) == [("client", "Gone", "", 0)]


def test_the_same_peer_on_a_new_connection_replaces_the_old_one(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=2)
    broker.ask("client", "echo", "a")
    again = broker.hello("w again", "echo", capacity=2, nonce="nonce w")
    assert shown(again) == [("w again", "Welcome", "", 0), ("w again", "Request", "a", 1)]
    assert broker.lost("w") == [], "the old connection is nobody any more"
    assert shown(broker.end("w again", "a", attempt=0)) == [], "what the old one did is fenced off"
    assert shown(broker.end("w again", "a", attempt=1)) == [("client", "Final", "a", 0)]
    asked = broker.ask("client", "echo", "b")
    assert only(asked).to == "w again"
    assert shown(broker.hello("client 2", nonce="nonce client")) == [
        ("w again", "Release", "b", 0),
        ("client 2", "Welcome", "", 0),
    ]


def test_a_peer_that_announces_something_else_begins_anew(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=2)
    broker.ask("client", "echo", "a")
    assert shown(broker.hello("w", "echo", "more", capacity=1)) == [("w", "Welcome", "", 0), ("w", "Request", "a", 1)]
    assert broker.worker("w")["services"] == ["echo", "more"]
    restarted = broker.hello("w", "echo", nonce="another process")
    assert shown(restarted) == [("w", "Welcome", "", 0), ("w", "Request", "a", 2)]


def test_a_worker_that_was_forgotten_comes_back_by_itself(broker: Broker) -> None:
    """After the broker's restart, or after it was taken for dead: GONE, HELLO, and all works."""
    broker.hello("w", "echo")
    broker.lost("w")
    assert shown(broker.say("w", Beat())) == [("w", "Gone", "", 0)]
    assert shown(broker.say("w", Final(), "old")) == [("w", "Gone", "", 0)]
    broker.hello("w", "echo")
    assert only(broker.ask("client", "echo", "a")).to == "w"


def test_the_broker_beats_to_all_each_interval() -> None:
    broker = Broker(beat=0.5)
    broker.hello("client")
    broker.hello("w", "echo")
    beats = []
    for _ in range(200):
        broker.now += 0.01
        beats += [key for key, frames in broker.core.tick(broker.now) if frames[0][1] == 3]
    assert sorted(beats) == [b"client"] * 4 + [b"w"] * 4 or sorted(beats) == [b"client"] * 3 + [b"w"] * 3
    (key, frames) = broker.core.greet(b"whoever")[0]
    assert key == b"whoever" and frames[0][1] == 3


def test_work_without_progress_past_the_stall_limit_is_a_hung_worker(broker: Broker) -> None:
    broker.hello("w", "echo", stall_ms=3000)
    broker.hello("other", "echo", stall_ms=3000)
    broker.ask("client", "echo", "a")
    for second in range(3):
        assert broker.busy("w", 5, ("a", 0)) == []
        assert broker.wait(1.0) == [], second
    broker.busy("w", 5, ("a", 0))
    assert broker.wait(0.9) == []
    sent = [out for _, out in broker.wait(1.2)]
    assert shown(sent) == [("w", "Gone", "", 0), ("other", "Request", "a", 1)]
    assert sent[0].prefix.id == NO_ID and "progress" in sent[0].message.reason


def test_progress_or_an_empty_hand_keep_a_worker(broker: Broker) -> None:
    broker.hello("w", "echo", stall_ms=3000)
    broker.ask("client", "echo", "a")
    for second in range(10):
        broker.busy("w", second, ("a", 0))
        assert broker.wait(1.0) == []
    broker.end("w", "a")
    broker.say("w", Beat(9, 0))
    assert broker.wait(20.0) == [], "a worker without work need not move"
    broker.ask("client", "echo", "b")
    assert broker.wait(3.0) == [], "nor is it hung the moment it gets some"
    assert "w" in {out.to for _, out in broker.wait(2.0)}


def test_gauges_of_a_worker_are_shown(broker: Broker) -> None:
    broker.hello("w", "echo", labels={"zone": 1}, pid=77)
    broker.say("w", Beat(1, 0, (), {"tokens": 3}))
    described = broker.worker("w")
    assert described["gauges"] == {"tokens": 3} and described["labels"] == {"zone": 1} and described["pid"] == 77
    assert described["state"] == "ready" and described["capacity"] == 1


def test_a_draining_worker_ends_what_it_has_and_gets_nothing_new(broker: Broker) -> None:
    broker.hello("w1", "echo", capacity=2)
    for name in ("a", "b"):
        broker.ask("client", "echo", name)
    assert broker.say("w1", Bye()) == []
    assert broker.worker("w1")["state"] == "draining"
    assert broker.ask("client", "echo", "c") == []
    assert shown(broker.end("w1", "a")) == [("client", "Final", "a", 0)]
    assert broker.say("w1", Bye()) == [], "said twice"
    assert shown(broker.end("w1", "b")) == [("client", "Final", "b", 0), ("w1", "Bye", "", 0)]
    assert shown(broker.hello("w2", "echo")) == [("w2", "Welcome", "", 0), ("w2", "Request", "c", 0)]
    assert shown(broker.say("w1", Beat())) == [("w1", "Gone", "", 0)]


def test_a_worker_with_nothing_open_may_go_at_once(broker: Broker) -> None:
    broker.hello("w", "echo")
    assert shown(broker.say("w", Bye())) == [("w", "Bye", "", 0)]
    broker.hello("w2", "echo")
    broker.ask("client", "echo", "a")
    broker.say("w2", Bye())
    broker.say("client", Cancel(), "a")
    assert broker.worker("w2")["state"] == "draining", "it has not acknowledged yet"
    assert shown(broker.say("w2", Error("cancelled"), "a")) == [("w2", "Bye", "", 0)]


def test_what_a_drained_worker_asked_is_released(broker: Broker) -> None:
    broker.hello("w", "outer")
    broker.hello("inner", "inner")
    broker.ask("w", "inner", "own")
    assert shown(broker.say("w", Bye())) == [("w", "Bye", "", 0), ("inner", "Release", "own", 0)]


def test_a_draining_worker_that_dies_is_a_dead_worker(broker: Broker) -> None:
    broker.hello("w1", "echo")
    broker.ask("client", "echo", "a")
    broker.say("w1", Bye())
    broker.hello("w2", "echo")
    assert shown(broker.lost("w1")) == [("w2", "Request", "a", 1)]


def test_parts_after_the_end_tell_the_worker_to_stop(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.say("client", Cancel(), "a")
    assert broker.say("w", Partial(), "a") == [], "it knows already"
    broker.say("w", Error("cancelled"), "a")
    assert shown(broker.say("w", Partial(), "a")) == [("w", "Gone", "a", 0)]
