"""More work than workers: shares, bounds, and what is refused."""

from collections import Counter

import pytest
from broker_driver import Broker, codes, only, shown
from ralmq.broker.limits import RECORD
from ralmq.schema.codec import decode
from ralmq.schema.message import Beat, Bye, Cancel, Final, Gone


@pytest.fixture
def broker() -> Broker:
    broker = Broker(queue=4000)
    broker.hello("client")
    return broker


def served(broker: Broker, count: int) -> list[str]:
    """Names of the requests that are given out one after the other; the worker has the first already."""
    order, name = [], "first"
    for _ in range(count):
        sent = broker.end("w", name)[1:]
        name = only(sent).prefix.id.strip(b".").decode()
        order.append(name)
    return order


def test_askers_take_turns_however_much_each_asks(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    for asker, count in (("greedy", 200), ("modest", 5)):
        broker.hello(asker)
        for n in range(count):
            broker.ask(asker, "echo", f"{asker} {n}")
    order = served(broker, 20)
    assert Counter(name.split()[0] for name in order[:10]) == {"greedy": 5, "modest": 5}
    broker.ask("modest", "echo", "modest late")
    assert "modest late" in served_from(broker, order[-1], 2)


def served_from(broker: Broker, name: str, count: int) -> list[str]:
    order = []
    for _ in range(count):
        name = only(broker.end("w", name)[1:]).prefix.id.strip(b".").decode()
        order.append(name)
    return order


def test_an_asker_that_always_has_one_request_waiting_does_not_starve_the_others(broker: Broker) -> None:
    broker.hello("single")
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    for n in range(10):
        broker.ask("client", "echo", f"c {n}")
    order, name = [], "first"
    for n in range(16):
        broker.ask("single", "echo", f"s {n}")
        name = only(broker.end("w", name)[1:]).prefix.id.strip(b".").decode()
        order.append(name[0])
    assert Counter(order)["c"] >= 7, order


def test_a_step_of_priority_doubles_the_share_and_nothing_starves(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    for n in range(70):
        broker.ask("client", "echo", f"5 {n}", priority=5)
        broker.ask("client", "echo", f"4 {n}", priority=4)
        broker.ask("client", "echo", f"0 {n}", priority=0)
    counts = Counter(name.split()[0] for name in served(broker, 98))
    assert counts == {"5": 64, "4": 32, "0": 2}


def test_a_queue_that_was_empty_begins_anew(broker: Broker) -> None:
    broker.hello("w", "echo")
    for turn in range(3):
        broker.ask("client", "echo", f"first {turn}")
        for n in range(100):
            broker.ask("client", "echo", f"{turn} {n}", priority=n % 10)
        for n in range(100):
            broker.say("client", Cancel(), f"{turn} {n}")
        broker.end("w", f"first {turn}")
    assert broker.open() == 0
    assert only(broker.ask("client", "echo", "last")).to == "w"


def test_requests_that_leave_the_queue_leave_no_trace_in_the_order_of_the_others(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    for n in range(300):
        broker.ask("client", "echo", f"r {n}", priority=n % 10)
    for n in range(300):
        if n % 10 != 4:
            broker.say("client", Cancel(), f"r {n}")
    assert served(broker, 30) == [f"r {n}" for n in range(4, 304, 10)]


def test_many_askers_with_one_request_each_are_served_in_order(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    for n in range(200):
        broker.hello(f"c{n}")
        broker.ask(f"c{n}", "echo", f"r{n}")
    assert served(broker, 200) == [f"r{n}" for n in range(200)]


def test_the_budget_of_a_peer_counts_what_waits_and_what_is_kept_while_it_is_served() -> None:
    broker = Broker(peer_bytes=3 * RECORD)
    for asker in ("client", "other"):
        broker.hello(asker)
    broker.hello("w", "echo", capacity=9)
    broker.hello("once", "once", capacity=9, idempotent=False)
    for n in range(2):
        assert only(broker.ask("client", "echo", f"r{n}")).to == "w"
    refusal = only(broker.ask("client", "echo", "r2"))
    assert refusal.message.code == "busy" and refusal.message.retry_after_ms > 0
    assert "bytes are held for client" in refusal.message.message
    assert only(broker.ask("other", "echo", "o")).to == "w", "each has its own"
    assert broker.core.status(broker.now)["broker"]["held_bytes"] > 3 * RECORD
    broker.end("w", "r0")
    assert only(broker.ask("client", "echo", "r2")).to == "w"
    big = {"x": "y" * (2 * RECORD)}
    broker.hello("third")
    assert only(broker.ask("third", "once", "b0", body=big)).to == "once"
    assert only(broker.ask("third", "once", "b1")).to == "once", "what will not be sent again is not kept"


def test_a_single_larger_request_is_served_where_its_asker_has_no_other() -> None:
    broker = Broker(peer_bytes=3000)
    broker.hello("client")
    broker.hello("w", "echo", capacity=9)
    assert only(broker.ask("client", "echo", "big", body={"x": "y" * 5000})).to == "w"
    assert codes(broker.ask("client", "echo", "next")) == ["busy"]


def test_requests_for_a_name_that_nobody_offers_have_the_same_bounds() -> None:
    broker = Broker(queue=3, peer_bytes=9 * RECORD)
    broker.hello("client")
    broker.wait(4.0)
    for n in range(3):
        assert broker.ask("client", "nobody", f"r{n}", wait_ms=9000) == []
    assert codes(broker.ask("client", "nobody", "r3", wait_ms=9000)) == ["busy"]
    for n in range(4, 9):
        broker.ask("client", f"name {n}", f"r{n}", wait_ms=9000)
    assert codes(broker.ask("client", "another", "r9", wait_ms=9000)) == ["busy"]


def test_what_is_sent_again_is_not_turned_away_by_the_length_of_the_queue() -> None:
    """After its restart the broker gets all at once what it had taken before."""
    broker = Broker(queue=2, queue_bytes=8 * RECORD)
    broker.hello("client")
    sent = [broker.ask("client", "echo", f"r{n}", attempt=1) for n in range(9)]
    assert [codes(one) for one in sent] == [[]] * 7 + [["busy"]] * 2, "but by the memory that there is"
    assert codes(broker.ask("client", "echo", "new")) == ["busy"]
    assert shown(broker.hello("w", "echo"))[1:] == [("w", "Request", "r0", 1)]


def test_who_says_that_all_of_it_is_sent_again_takes_nobodys_place_in_the_queue() -> None:
    broker = Broker(queue=32)
    broker.hello("w", "echo")
    broker.hello("greedy")
    broker.hello("modest")
    broker.ask("greedy", "echo", "first")
    for n in range(100):
        assert broker.ask("greedy", "echo", f"g{n}", attempt=1) == []
    assert [codes(broker.ask("modest", "echo", f"m{n}")) for n in range(32)] == [[]] * 31 + [["busy"]]
    assert codes(broker.ask("greedy", "echo", "new")) == ["busy"], "its own count for it"
    broker.hello("third")
    assert [codes(broker.ask("third", "echo", f"t{n}")) for n in range(2)] == [[], ["busy"]]
    assert codes(broker.ask("third", "echo", "again", attempt=1)) == [], "the queue is full of others"
    broker.say("third", Cancel(), "again", attempt=1)
    broker.say("third", Cancel(), "t0")
    for n in range(100):
        broker.say("greedy", Cancel(), f"g{n}", attempt=1)
    assert served(broker, 3) == ["m0", "m1", "m2"]
    assert codes(broker.ask("greedy", "echo", "g")) == []


def test_a_full_memory_refuses_new_work_and_lets_go_on_what_is_under_way() -> None:
    broker = Broker(memory=1000)
    broker.hello("client")
    broker.hello("outer", "outer", capacity=4)
    broker.hello("w", "echo", capacity=4)
    broker.ask("client", "outer", "p")
    broker.core.measured(1001)
    refusal = only(broker.ask("client", "echo", "a"))
    assert refusal.message.code == "busy" and "memory" in refusal.message.message
    assert codes(broker.ask("client", "echo", "b", attempt=1)) == ["busy"]
    assert isinstance(only(broker.ask("client", "ralmq.status", "s")).message, Final)
    assert shown(broker.ask("outer", "echo", "child", parent="p")) == [("w", "Request", "child", 0)]
    assert broker.core.status(broker.now)["broker"]["memory_bytes"] == 1001
    broker.core.measured(1000)
    assert only(broker.ask("client", "echo", "a")).to == "w"


def test_without_a_watermark_no_memory_is_full() -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "echo")
    broker.core.measured(1 << 60)
    assert only(broker.ask("client", "echo", "a")).to == "w"


def test_a_request_that_its_worker_does_not_list_is_lost() -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "echo", capacity=3)
    broker.hello("once", "once", capacity=3, idempotent=False)
    broker.ask("client", "echo", "a")
    broker.ask("client", "echo", "b")
    broker.ask("client", "once", "c")
    for beat in range(5):
        assert broker.busy("w", beat, ("b", 0)) == [], "it may have left before the request came"
    broker.tick(1.0)
    for beat in range(5):
        assert broker.say("w", Beat(beat, 1)) == [], "a long request may still be on its way, and the BEAT behind it"
    assert broker.busy("w", 6, ("a", 0), ("b", 0)) == []
    told = broker.busy("w", 7, ("b", 0))
    assert shown(told) == [("w", "Gone", "a", 0)] and isinstance(told[0].message, Gone)
    assert broker.count("unlisted") == 1 and broker.worker("w")["in_flight"] == 1
    assert shown(broker.end("w", "b"))[1:] == [("w", "Request", "a", 1)], "alone"
    assert broker.end("w", "a", attempt=0) == [], "the late answer changes nothing"
    sent = broker.say("once", Beat(2, 0, heard=1))
    assert shown(sent) == [("once", "Gone", "c", 0), ("client", "Error", "c", 0)] and codes(sent) == ["worker_lost"]


def test_what_a_worker_has_heard_before_a_request_says_nothing_of_it() -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "echo")
    for _ in range(3):
        broker.tick(1.0)
    broker.ask("client", "echo", "a")
    assert broker.say("w", Beat(1, 0, heard=3)) == [] and broker.open() == 1
    (greeting,) = broker.core.greet(b"w")
    assert decode(greeting[1])[1].progress == 3, "also what only asks whether it is there says how many came before"
    broker.tick(1.0)
    assert shown(broker.say("w", Beat(2, 0, heard=4)))[0] == ("w", "Gone", "a", 0)


def test_a_cancelled_request_that_a_beat_does_not_list_gives_its_credit_back() -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.say("client", Cancel(), "a")
    broker.ask("client", "echo", "b")
    broker.tick(1.0)
    assert broker.say("w", Beat(1, 0)) == []
    assert shown(broker.say("w", Beat(2, 0, heard=1))) == [("w", "Gone", "a", 0), ("w", "Request", "b", 0)]


def test_a_list_that_is_cut_off_says_nothing_of_what_is_not_in_it() -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "echo", capacity=200)
    for n in range(130):
        broker.ask("client", "echo", f"r{n}")
    for beat in range(4):
        broker.tick(1.0)
        assert broker.busy("w", beat, *((f"r{n}", 0) for n in range(128))) == []
    assert broker.count("unlisted") == 0


def test_what_a_lost_request_asked_on_the_same_worker_ends_with_it() -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "outer", "inner", capacity=4)
    broker.ask("client", "outer", "p")
    broker.ask("w", "inner", "c", parent="p")
    broker.tick(1.0)
    sent = broker.say("w", Beat(2, 1, heard=1))
    assert ("w", "Error", "c", 0) in shown(sent) and ("w", "Request", "p", 1) in shown(sent)


def test_a_worker_is_asked_to_drain_by_its_name_or_how_names_begin(broker: Broker) -> None:
    for worker in ("echo-1", "echo-12", "other-1"):
        broker.hello(worker, "echo")
    sent = broker.ask("client", "ralmq.drain", "d1", body={"worker": "echo-1"})
    assert [(out.to, out.message) for out in sent] == [("echo-1", Bye()), ("client", Final({"workers": ["echo-1"]}))]
    assert sent[0].prefix.attempt == 1, "that of a BYE that lets a worker go is 0"
    sent = broker.ask("client", "ralmq.drain", "d2", body={"worker": "echo"})
    assert [out.to for out in sent] == ["echo-1", "echo-12", "client"]
    for wrong in ("nobody", "client", "", 7):
        refusal = only(broker.ask("client", "ralmq.drain", f"d {wrong}", body={"worker": wrong}))
        assert refusal.message.code == "refused" and "ralmq status" in refusal.message.message
    assert broker.worker("echo-1")["state"] == "ready", "it drains when it says so"


def test_workers_that_were_lost_are_shown_until_they_are_back(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.lost("w")
    broker.wait(2.0)
    (lost,) = broker.core.status(broker.now)["lost"]
    assert lost["name"] == "w" and lost["services"] == ["echo"] and lost["age_s"] == pytest.approx(2.0)
    assert "cut off" in lost["why"]
    broker.hello("w again", "echo", nonce="nonce w")
    assert broker.core.status(broker.now)["lost"] == []
    broker.lost("client")
    for n in range(30):
        broker.hello(f"w{n}", "echo")
        broker.lost(f"w{n}")
    names = [lost["name"] for lost in broker.core.status(broker.now)["lost"]]
    assert names == [f"w{n}" for n in range(10, 30)]


def test_who_comes_late_gets_no_turns_for_the_time_before(broker: Broker) -> None:
    broker.hello("late")
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    for n in range(40):
        broker.ask("client", "echo", f"c {n}")
    last = served(broker, 20)[-1]
    for n in range(10):
        broker.ask("late", "echo", f"l {n}")
    assert Counter(name[0] for name in served_from(broker, last, 10)) == {"c": 5, "l": 5}


def test_a_turn_that_was_given_out_is_not_forgotten(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "first")
    for n in range(100):
        broker.hello(f"c{n}")
        broker.ask(f"c{n}", "echo", f"once {n}")
    for n in range(30):
        broker.ask("client", "echo", f"r {n}")
    last = served(broker, 120)[-1]
    broker.ask("client", "echo", "youngest")
    assert served_from(broker, last, 11) == [*(f"r {n}" for n in range(20, 30)), "youngest"]
