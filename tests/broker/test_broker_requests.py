"""The life of a request: credit, queue, fences, answers, streams, cancel, resends."""

from itertools import pairwise

import msgpack
import numpy as np
import pytest
from broker_driver import EPOCH, Broker, codes, ident, only, shown
from ralmq.broker.limits import RECORD
from ralmq.broker.services import BUSY_CEILING
from ralmq.broker.transitions import REMEMBERED
from ralmq.schema.codec import encode
from ralmq.schema.frame import LENGTHS
from ralmq.schema.limits import HEAD, MAX_ATTEMPT
from ralmq.schema.message import Cancel, Credit, Error, Final, Gone, Partial, Request


@pytest.fixture
def broker() -> Broker:
    broker = Broker()
    broker.hello("client")
    return broker


def test_a_request_goes_to_the_worker_and_its_answer_back_untouched(broker: Broker) -> None:
    broker.hello("w", "echo")
    question = Request("echo", body={"x": 1}, tensors=[np.arange(5000)])
    frames = encode(question, id=ident("r"), epoch=broker.epoch, deadline=500)
    given = only(broker.raw("client", frames))
    assert given.to == "w" and len(given.frames) == 2
    assert all(sent is came for sent, came in zip(given.frames, frames, strict=True)), "not even copied"
    answer = encode(Final({"y": 2}, tensors=[np.ones(5000)]), id=ident("r"), epoch=broker.epoch)
    back = only(broker.raw("w", answer))
    assert back.to == "client" and all(sent is came for sent, came in zip(back.frames, answer, strict=True))
    assert broker.open() == 0 and broker.worker("w")["in_flight"] == 0


def test_answers_come_in_any_order_each_to_its_asker(broker: Broker) -> None:
    broker.hello("other")
    broker.hello("w", "echo", capacity=4)
    for peer, name in (("client", "a"), ("other", "b"), ("client", "c")):
        broker.ask(peer, "echo", name)
    order = [only(broker.end("w", name, mark=name)) for name in ("c", "b", "a")]
    assert [(out.to, out.message.body["mark"]) for out in order] == [("client", "c"), ("other", "b"), ("client", "a")]


def test_only_requests_spend_credit_and_an_end_gives_it_back(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=2)
    assert shown(broker.ask("client", "echo", "a")) == [("w", "Request", "a", 0)]
    broker.say("w", Partial(), "a")
    broker.say("w", Partial(), "a", sequence=1)
    assert shown(broker.ask("client", "echo", "b")) == [("w", "Request", "b", 0)]
    assert broker.ask("client", "echo", "c") == []
    assert broker.ask("client", "echo", "d") == []
    assert shown(broker.end("w", "a")) == [("client", "Final", "a", 0), ("w", "Request", "c", 0)]
    assert shown(broker.say("w", Error("worker_failed"), "b")) == [
        ("client", "Error", "b", 0),
        ("w", "Request", "d", 0),
    ]
    assert broker.worker("w")["in_flight"] == 2


def test_an_error_that_cannot_be_read_ends_the_request_once_with_one_that_can(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a", attempt=3)
    broker.ask("client", "echo", "b")
    spoilt = encode(Error("worker_failed"), id=ident("a"), attempt=3, epoch=EPOCH)[0][:-1] + b"\xc1"
    sent = broker.raw("w", [spoilt])
    assert shown(sent) == [("client", "Error", "a", 3), ("w", "Request", "b", 0)]
    assert sent[0].message.code == "worker_failed" and "cannot be read" in sent[0].message.message
    assert broker.count("malformed") == 1 and broker.worker("w")["in_flight"] == 1


def test_the_worker_with_the_least_outstanding_work_is_chosen(broker: Broker) -> None:
    for worker in ("w1", "w2", "w3"):
        broker.hello(worker, "echo", capacity=5)
    chosen = [only(broker.ask("client", "echo", f"r{n}")).to for n in range(6)]
    assert chosen == ["w1", "w2", "w3", "w1", "w2", "w3"]
    broker.end("w2", "r1")
    broker.end("w2", "r4")
    assert [only(broker.ask("client", "echo", f"s{n}")).to for n in range(2)] == ["w2", "w2"]


def test_a_worker_of_two_services_is_fed_from_both(broker: Broker) -> None:
    broker.hello("w", "echo", "search:docs")
    broker.ask("client", "echo", "a")
    broker.ask("client", "search:docs", "b")
    broker.ask("client", "echo", "c")
    assert shown(broker.end("w", "a")) == [("client", "Final", "a", 0), ("w", "Request", "c", 0)]
    assert shown(broker.end("w", "c")) == [("client", "Final", "c", 0), ("w", "Request", "b", 0)]


def test_the_queue_takes_priorities_first_then_askers_in_turn(broker: Broker) -> None:
    broker.hello("other")
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    for name in ("a1", "a2", "a3"):
        broker.ask("client", "echo", name)
    for name in ("b1", "b2"):
        broker.ask("other", "echo", name)
    broker.ask("client", "echo", "urgent", priority=9)
    broker.ask("client", "echo", "idle", priority=0)
    order, name = [], "first"
    while sent := broker.end("w", name)[1:]:
        name = only(sent).prefix.id.strip(b".").decode()
        order.append(name)
    assert order == ["urgent", "a1", "b1", "a2", "b2", "a3", "idle"]


def test_a_full_queue_answers_busy_with_a_time_to_ask_again() -> None:
    broker = Broker(queue=3)
    broker.hello("client")
    broker.hello("w", "echo")
    answers = [broker.ask("client", "echo", f"r{n}") for n in range(8)]
    assert [codes(sent) for sent in answers] == [[], [], [], [], ["busy"], ["busy"], ["busy"], ["busy"]]
    after = [only(sent).message.retry_after_ms for sent in answers[4:]]
    assert after[0] > 0 and after == sorted(set(after)), "resends must come back spread out"
    assert broker.open() == 4 and broker.count("busy") == 4
    broker.end("w", "r0")
    assert broker.ask("client", "echo", "r7") == []  # the same attempt, asked again, finds room


def test_the_time_to_ask_again_follows_the_rate_of_the_service() -> None:
    broker = Broker(queue=3)
    broker.hello("client")
    broker.hello("w", "echo")
    for n in range(60):  # 20 a second, and always some that wait
        broker.ask("client", "echo", f"r{n}")
        if n > 2:
            broker.wait(0.05)
            broker.end("w", f"r{n - 3}")
    broker.ask("client", "echo", "queued")
    after = [only(broker.ask("client", "echo", f"s{n}")).message.retry_after_ms for n in range(3)]
    assert [b - a for a, b in pairwise(after)] == [pytest.approx(50, rel=0.3)] * 2
    many = [only(broker.ask("client", "echo", f"t{n}")).message.retry_after_ms for n in range(3000)]
    assert max(many) == pytest.approx(BUSY_CEILING * 1000, abs=1)
    rate = broker.core.status(broker.now)["services"]["echo"]["rate"]
    assert rate == pytest.approx(20, rel=0.1)
    for name in ("r57", "r58", "r59", "queued"):
        broker.end("w", name)
    broker.wait(2.0)
    idle = broker.core.status(broker.now)["services"]["echo"]["rate"]
    broker.wait(10.0)
    assert broker.core.status(broker.now)["services"]["echo"]["rate"] == idle, "idle time is no measurement"


def test_bytes_of_waiting_requests_are_bounded_for_a_peer_and_for_all() -> None:
    broker = Broker(peer_bytes=3000 + 2 * RECORD, queue_bytes=6000 + 2 * RECORD)
    for peer in ("a", "b", "c"):
        broker.hello(peer)
    broker.hello("w", "echo")
    broker.ask("a", "echo", "r0")
    big = {"body": {"x": "y" * 1900}}
    assert broker.ask("a", "echo", "a1", **big) == []
    assert codes(broker.ask("a", "echo", "a2", **big)) == ["busy"]
    assert broker.ask("b", "echo", "b1", body={"x": "y" * 3500}) == [], "a single larger one passes"
    assert codes(broker.ask("c", "echo", "c1", **big)) == ["busy"], "the budget of all services together"
    broker.end("w", "r0")
    assert broker.core.status(broker.now)["broker"]["queued_bytes"] < 4000 + RECORD
    assert broker.ask("c", "echo", "c1", **big) == []
    broker.say("b", Cancel(), "b1")
    assert codes(broker.ask("a", "echo", "a2", **big)) == ["busy"], "what is kept for another worker counts, too"
    broker.end("w", "a1")
    assert broker.ask("a", "echo", "a2", **big) == []


def test_the_same_request_delivered_twice_is_served_once(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=4)
    assert len(broker.ask("client", "echo", "a")) == 1
    assert broker.ask("client", "echo", "a") == []
    broker.end("w", "a")
    assert broker.ask("client", "echo", "a") == []
    assert broker.count("duplicates") == 2 and broker.count("accepted") == 1


def test_what_has_ended_long_ago_is_still_known_as_ended(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "old")
    broker.end("w", "old")
    core, now = broker.core, broker.now
    request, final = (encode(kind, epoch=broker.epoch)[0] for kind in (Request("echo"), Final()))
    for n in range(REMEMBERED):
        identity = b"an ended" + n.to_bytes(8, "big")
        core.step(now, b"client", [request[:12] + identity + request[28:]])
        core.step(now, b"w", [final[:12] + identity + final[28:]])
    assert broker.count("accepted") == REMEMBERED + 1
    assert broker.ask("client", "echo", "old") == []
    assert broker.count("duplicates") == 1


def test_an_id_that_another_peer_uses_is_refused(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=2)
    broker.hello("thief")
    broker.ask("client", "echo", "a")
    assert codes(broker.ask("thief", "echo", "a", attempt=1)) == ["malformed"]
    assert shown(broker.end("w", "a")) == [("client", "Final", "a", 0)]


@pytest.mark.parametrize("message", [Partial(), Final(), Error("worker_failed")])
def test_answers_count_only_from_the_peer_that_serves(broker: Broker, message: object) -> None:
    broker.hello("w", "echo")
    broker.hello("stranger", "echo")
    broker.ask("client", "echo", "a")
    stop = isinstance(message, Partial)  # whoever goes on working is told to stop
    assert shown(broker.say("stranger", message, "a")) == ([("stranger", "Gone", "a", 0)] if stop else [])
    assert shown(broker.say("w", message, "never")) == ([("w", "Gone", "never", 0)] if stop else [])
    assert broker.count("fenced") == 2 and broker.open() == 1
    assert shown(broker.end("w", "a")) == [("client", "Final", "a", 0)]


def test_answers_count_only_under_the_attempt_that_is_under_way(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=2)
    broker.ask("client", "echo", "a", attempt=0)
    sent = broker.ask("client", "echo", "a", attempt=1)
    assert shown(sent) == [("w", "Release", "a", 0), ("w", "Request", "a", 1)]
    assert broker.say("w", Partial(), "a", attempt=0) == [], "it is being ended: nothing more to say"
    assert broker.end("w", "a", attempt=0) == []
    assert broker.worker("w")["in_flight"] == 1, "the old attempt is acknowledged"
    assert shown(broker.end("w", "a", attempt=1)) == [("client", "Final", "a", 1)]
    assert shown(broker.say("w", Partial(), "a", attempt=1)) == [("w", "Gone", "a", 1)]


def test_an_old_attempt_is_not_taken_up_again(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=4)
    broker.ask("client", "echo", "a", attempt=3)
    assert broker.ask("client", "echo", "a", attempt=2) == []
    broker.end("w", "a", attempt=3)
    assert broker.ask("client", "echo", "a", attempt=3) == []
    assert shown(broker.ask("client", "echo", "a", attempt=4)) == [("w", "Request", "a", 4)]


def test_no_leg_of_a_request_is_given_out_twice(broker: Broker) -> None:
    broker.hello("w1", "echo")
    broker.ask("client", "echo", "a")
    broker.hello("w2", "echo", capacity=3)
    assert shown(broker.lost("w1")) == [("w2", "Request", "a", 1)]
    broker.say("client", Cancel(), "a")
    broker.say("w2", Error("cancelled"), "a", attempt=1)
    assert shown(broker.ask("client", "echo", "a", attempt=1)) == [("w2", "Request", "a", 2)]
    assert broker.end("w2", "a", attempt=1) == [], "the acknowledgement of the cancelled leg is no answer"
    back = only(broker.end("w2", "a", attempt=2))
    assert (back.to, back.prefix.attempt) == ("client", 1)


def test_attempts_can_be_used_up(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=3)
    broker.ask("client", "echo", "a", attempt=MAX_ATTEMPT - 1)
    broker.lost("w")
    broker.hello("w", "echo", capacity=3)
    assert broker.count("requeued") == 1
    assert shown(broker.end("w", "a", attempt=MAX_ATTEMPT)) == [("client", "Final", "a", MAX_ATTEMPT - 1)]
    refusal = only(broker.ask("client", "echo", "a", attempt=MAX_ATTEMPT))
    assert refusal.message.code == "malformed" and "draw a new id" in refusal.message.message


def test_the_asker_cancels(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.hello("other")
    broker.ask("client", "echo", "a")
    broker.ask("client", "echo", "waits")
    assert broker.say("other", Cancel(), "a") == [], "only the asker may"
    assert broker.say("client", Cancel(), "a", attempt=1) == [], "another attempt"
    assert broker.say("client", Cancel(), "unknown") == []
    assert shown(broker.say("client", Cancel(), "waits")) == [("client", "Error", "waits", 0)]
    sent = broker.say("client", Cancel(), "a")
    assert shown(sent) == [("client", "Error", "a", 0), ("w", "Cancel", "a", 0)] and codes(sent) == ["cancelled"]
    broker.ask("client", "echo", "next")
    assert broker.worker("w")["in_flight"] == 1, "the credit stays spent until the worker has stopped"
    assert shown(broker.say("w", Error("cancelled"), "a")) == [("w", "Request", "next", 0)]
    assert broker.say("w", Error("cancelled"), "a") == [], "a second acknowledgement frees nothing"
    assert broker.worker("w")["in_flight"] == 1


def test_credit_of_a_stream_goes_to_the_worker_and_never_shrinks(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.hello("other")
    broker.ask("client", "echo", "a", window=8)
    assert shown(broker.say("client", Credit(16), "a")) == [("w", "Credit", "a", 0)]
    for until in (16, 12):
        assert broker.say("client", Credit(until), "a") == []
    assert broker.say("other", Credit(90), "a") == []
    assert broker.say("client", Credit(90), "a", attempt=1) == []
    assert broker.say("client", Credit(90), "unknown") == []
    assert only(broker.say("client", Credit(17), "a")).message.until == 17


def test_credit_that_came_early_or_to_a_lost_worker_is_told_to_the_next(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    broker.ask("client", "echo", "a", window=8)
    assert broker.say("client", Credit(16), "a") == []
    given = broker.end("w", "first")[1:]
    assert shown(given) == [("w", "Request", "a", 0), ("w", "Credit", "a", 0)] and given[1].message.until == 16
    broker.hello("w2", "echo")
    again = broker.lost("w")
    assert shown(again) == [("w2", "Request", "a", 1), ("w2", "Credit", "a", 1)] and again[1].message.until == 16


def test_parts_of_another_leg_reach_the_asker_under_its_own_attempt(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.hello("w2", "echo")
    broker.lost("w")
    part = only(broker.say("w2", Partial({"n": 1}), "a", attempt=1, sequence=5))
    assert (part.to, part.prefix.attempt, part.prefix.sequence, part.message.body) == ("client", 0, 5, {"n": 1})


def test_a_busy_worker_hears_of_attempts_that_nobody_waits_for(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=3)
    for name in ("a", "b"):
        broker.ask("client", "echo", name)
    broker.say("client", Cancel(), "b")
    told = broker.busy("w", 1, ("a", 0), ("b", 0), ("a", 7), ("never", 0))
    assert shown(told) == [("w", "Gone", "a", 7), ("w", "Gone", "never", 0)]
    assert all(isinstance(out.message, Gone) for out in told)


def test_a_request_for_the_broker_itself_is_answered_at_once(broker: Broker) -> None:
    answer = only(broker.ask("client", "ralmq.status", "s"))
    assert isinstance(answer.message, Final) and answer.message.body["broker"]["clients"] == 1
    assert broker.open() == 0


def with_routing(routing: list[object]) -> list[bytes]:
    """A REQUEST whose routing section holds what `encode` would not let pass."""
    head = encode(Request("echo"), id=ident("r"), epoch=EPOCH)[0]
    packed = msgpack.packb(routing)
    return [head[: HEAD - 4] + LENGTHS.pack(len(packed), 0) + packed]


@pytest.mark.parametrize("routing", [[], ["echo", 11], ["echo", 4, -1], [""], [4], ["echo", 4, 0, b"short"], {}, 7])
def test_a_request_whose_routing_is_wrong_is_refused(broker: Broker, routing: list[object]) -> None:
    refusal = only(broker.raw("client", with_routing(routing)))
    assert refusal.message.code == "malformed" and refusal.prefix.id == ident("r")
    assert broker.count("malformed") == 1


def test_a_routing_section_of_an_older_version_has_defaults(broker: Broker) -> None:
    broker.hello("w", "echo")
    assert only(broker.raw("client", with_routing(["echo"]))).to == "w"


def test_routing_sections_are_remembered_up_to_a_bound(broker: Broker) -> None:
    broker.hello("w", *(f"service{n}" for n in range(30)), capacity=9000)
    for n in range(2100):
        request = Request(f"service{n % 30}", n // 30 % 10)
        sent = broker.core.step(broker.now, b"client", encode(request, id=ident(f"r{n}"), epoch=EPOCH))
        assert len(sent) == 1
    for n in range(1100):
        request = Request("service1", window=n)
        sent = broker.core.step(broker.now, b"client", encode(request, id=ident(f"s{n}"), epoch=EPOCH))
        assert len(sent) == 1
    assert broker.open() == 3200
