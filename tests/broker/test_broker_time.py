"""Deadlines and waiting, in simulated time: each moment is checked to the tick."""

import pytest
from broker_driver import Broker, codes, only, shown
from ralmq.schema.message import Cancel

LATE = 0.021  # seconds that a timer may be late: its bucket and a tick


@pytest.fixture
def broker() -> Broker:
    broker = Broker()
    broker.hello("client")
    broker.wait(4.0)  # beyond the grace after the start
    return broker


def test_a_deadline_ends_a_request_that_runs(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a", deadline=0.2)
    (when, error), (_, cancel) = broker.wait(1.0)
    assert shown([error, cancel]) == [("client", "Error", "a", 0), ("w", "Cancel", "a", 0)]
    assert error.message.code == "deadline" and "w of echo did not end in time" in error.message.message
    assert 0.2 <= when <= 0.2 + LATE
    assert broker.end("w", "a") == [], "the late answer is the acknowledgement"
    assert broker.worker("w")["in_flight"] == 0


def test_a_deadline_ends_a_request_that_waits(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.ask("client", "echo", "b", deadline=0.5)
    ((when, error),) = broker.wait(2.0)
    assert shown([error]) == [("client", "Error", "b", 0)] and 0.5 <= when <= 0.5 + LATE
    assert "no worker of echo was free in time" in error.message.message


def test_a_deadline_says_what_was_waited_for() -> None:
    """A free worker, some worker at all, or the layers that nobody has."""
    broker = Broker()
    broker.hello("client")
    broker.stage("s0", 0, 2)
    broker.ask("client", "lm:m", "a", deadline=1.0)
    broker.ask("client", "echo", "b", attempt=1, deadline=1.0)
    first, second = sorted((out.message.message for _, out in broker.wait(1.1)), key=len)
    assert first == "no worker of echo was free in time: raise the deadline, or start more workers"
    assert second.startswith("no pipeline of lm:m is formed; missing layers: 2-3 of 4:"), second
    broker.stage("s1", 2, 4, capacity=1)
    for n in range(5):
        broker.ask("client", "lm:m", f"r{n}", deadline=1.0)
    texts = [out.message.message for _, out in broker.wait(1.1) if out.to == "client"]
    assert sum(text.startswith("worker s0 of lm:m did not end in time") for text in texts) == 4
    assert sum(text.startswith("no worker of lm:m was free in time") for text in texts) == 1


def test_each_deadline_has_its_own_moment(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=9)
    for n in range(5):
        broker.ask("client", "echo", f"r{n}", deadline=0.2 + n / 10)
    ends = [when for when, out in broker.wait(1.0) if out.to == "client"]
    assert len(ends) == 5
    assert all(0.2 + n / 10 - 1e-6 <= when <= 0.2 + n / 10 + LATE for n, when in enumerate(ends))


def test_an_answer_in_time_ends_the_deadline(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a", deadline=0.2)
    broker.wait(0.15)
    broker.end("w", "a")
    assert broker.wait(1.0) == []


def test_without_a_deadline_a_request_waits_for_ever(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.ask("client", "echo", "b")
    broker.now += 20.0
    assert broker.tick() == [] and broker.open() == 2


def test_deadlines_hold_after_a_long_silence(broker: Broker) -> None:
    """A process that was stopped, or a machine that slept: all that is due is found by the next tick."""
    broker.hello("w", "echo", capacity=9)
    for n, deadline in enumerate((5.0, 0.5, 60.0, 700.0)):
        broker.ask("client", "echo", f"r{n}", deadline=deadline)
    sent = broker.tick(300.0)
    assert {out.prefix.id.strip(b".") for out in sent if out.to == "client"} == {b"r1", b"r0", b"r2"}
    assert broker.open() == 1


def test_many_deadlines_in_one_moment(broker: Broker) -> None:
    broker.hello("w", "echo", capacity=50)
    for n in range(50):
        broker.ask("client", "echo", f"r{n}", deadline=0.3 + n / 10_000)
    sent = broker.wait(0.4)
    assert len([out for _, out in sent if out.to == "client"]) == 50


def test_the_worker_is_told_what_is_left_of_the_deadline(broker: Broker) -> None:
    broker.hello("w", "echo")
    assert only(broker.ask("client", "echo", "a", deadline=3.0)).prefix.deadline == 3000
    broker.ask("client", "echo", "b", deadline=2.0)
    broker.ask("client", "echo", "c")
    broker.wait(0.5)
    assert broker.end("w", "a")[1].prefix.deadline == pytest.approx(1500, abs=1)
    assert broker.end("w", "b")[1].prefix.deadline == 0, "none"
    broker.ask("client", "echo", "d", deadline=0.1)
    broker.ask("client", "echo", "e", deadline=0.3)
    broker.now += 0.2  # the tick has not come yet
    sent = broker.end("w", "c")
    assert shown(sent)[1:] == [("client", "Error", "d", 0), ("w", "Request", "e", 0)]
    assert sent[1].message.code == "deadline" and "no worker of echo was free" in sent[1].message.message
    assert sent[2].prefix.deadline == pytest.approx(100, abs=1) and broker.count("expired") == 1


def test_an_unknown_service_is_refused_at_once(broker: Broker) -> None:
    error = only(broker.ask("client", "nobody", "a", deadline=30.0))
    assert error.message.code == "no_service" and "nobody" in error.message.message
    assert broker.open() == 0 and "nobody" not in broker.core.status(broker.now)["services"]


def test_an_unknown_service_has_three_intervals_after_the_start() -> None:
    broker = Broker(beat=0.5)
    broker.hello("client")
    broker.wait(1.0)
    assert broker.ask("client", "late", "a") == []
    ((when, error),) = broker.wait(5.0)
    assert error.message.code == "no_service" and 1.5 <= when + 1.0 <= 1.5 + LATE
    assert codes(broker.ask("client", "late", "b")) == ["no_service"]
    assert "late" not in broker.core.status(broker.now)["services"]


def test_a_service_that_comes_within_the_grace_serves_who_waits() -> None:
    broker = Broker()
    broker.hello("client")
    broker.ask("client", "echo", "a")
    broker.wait(2.9)
    assert shown(broker.hello("w", "echo")) == [("w", "Welcome", "", 0), ("w", "Request", "a", 0)]
    assert broker.wait(1.0) == []


def test_resends_wait_for_their_service_until_their_deadline(broker: Broker) -> None:
    assert broker.ask("client", "nobody", "a", attempt=1, deadline=8.0) == []
    assert broker.ask("client", "nobody", "b", attempt=2) == []
    assert broker.wait(7.9) == []
    ((_, error),) = broker.wait(0.2)
    assert shown([error]) == [("client", "Error", "a", 1)] and error.message.code == "deadline"
    assert broker.wait(20.0) == [], "without a deadline it waits on"
    assert shown(broker.hello("w", "nobody"))[1:] == [("w", "Request", "b", 2)]


def test_the_asker_may_wait_for_a_service(broker: Broker) -> None:
    broker.ask("client", "nobody", "a", wait_ms=2000)
    broker.ask("client", "nobody", "b", wait_ms=4000)
    ((when, error),) = broker.wait(3.0)
    assert shown([error]) == [("client", "Error", "a", 0)] and error.message.code == "no_service"
    assert 2.0 <= when <= 2.0 + LATE
    assert shown(broker.hello("w", "nobody"))[1:] == [("w", "Request", "b", 0)]


def test_the_wait_is_for_the_service_and_not_for_its_worker(broker: Broker) -> None:
    for name in ("a", "b"):
        broker.ask("client", "nobody", name, wait_ms=1000)
    broker.hello("w", "nobody")
    assert broker.wait(2.0) == [] and broker.open() == 2
    assert shown(broker.end("w", "a"))[1:] == [("w", "Request", "b", 0)]


def test_a_service_that_left_has_ten_intervals_in_which_it_may_come_back(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "runs")
    broker.ask("client", "echo", "waits")
    broker.ask("client", "echo", "patient", wait_ms=13_000)
    broker.ask("client", "echo", "again", attempt=1)
    assert broker.lost("w") == []
    assert broker.ask("client", "echo", "new") == []
    early = broker.wait(9.9)
    assert early == []
    late = broker.wait(0.2)
    assert sorted(out.prefix.id.strip(b".") for _, out in late) == [b"new", b"runs", b"waits"]
    assert {out.message.code for _, out in late} == {"no_service"}
    ((when, error),) = broker.wait(3.5)
    assert shown([error]) == [("client", "Error", "patient", 0)] and 2.9 - LATE <= when <= 2.9 + LATE
    assert shown(broker.hello("w", "echo"))[1:] == [("w", "Request", "again", 1)]


def test_a_request_whose_worker_is_lost_waits_for_another_as_long_as_it_said(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a", wait_ms=9000)
    assert broker.lost("w") == [] and broker.wait(8.5) == []
    assert shown(broker.hello("v", "echo"))[1:] == [("v", "Request", "a", 1)]


def test_waiting_longer_than_that_is_not_cut_short(broker: Broker) -> None:
    broker.ask("client", "echo", "a", wait_ms=19_000)
    broker.hello("w", "echo")  # takes it
    broker.ask("client", "echo", "b")
    broker.ask("client", "other", "c", wait_ms=19_000)
    broker.hello("v", "other")
    broker.lost("v")
    broker.say("client", Cancel(), "c")
    broker.ask("client", "other", "d", wait_ms=19_000)
    assert broker.wait(18.5) == []
    ((when, error),) = broker.wait(1.0)
    assert shown([error]) == [("client", "Error", "d", 0)] and 0.5 <= when <= 0.5 + LATE


def test_a_wait_goes_on_through_a_service_that_comes_and_goes(broker: Broker) -> None:
    broker.ask("client", "echo", "a", wait_ms=19_000, priority=9)
    broker.ask("client", "echo", "b", wait_ms=19_000)
    broker.hello("w", "echo", idempotent=False)
    assert codes(broker.lost("w")) == ["worker_lost"]  # a, which ran
    assert broker.wait(18.9) == []
    ((_, error),) = broker.wait(0.2)
    assert shown([error]) == [("client", "Error", "b", 0)] and error.message.code == "no_service"


def test_a_name_that_nobody_offers_or_waits_for_is_forgotten(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.lost("w")
    broker.wait(9.5)
    assert "echo" in broker.core.status(broker.now)["services"]
    broker.wait(2.0)
    assert "echo" not in broker.core.status(broker.now)["services"]


def test_status_says_how_long_the_broker_runs(broker: Broker) -> None:
    assert broker.core.status(broker.now)["broker"]["uptime_s"] == pytest.approx(4.0)
