"""A request whose turn would come too late for its deadline is told BUSY at once: workers work for who still waits."""

from typing import Any

import pytest
from broker_driver import Broker, Out, codes, only
from ralmq.schema.message import Cancel

TOOK = 0.1  # seconds that the worker needs for one: its pace is 10 a second


class Served:
    """A broker with one worker that takes one request after the other, and what became of each request."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.ends: dict[str, str] = {}
        self.broker.hello("client")
        self.broker.hello("w", "echo")
        self._hand: tuple[str, float] | None = None

    def ask(self, name: str, peer: str = "client", **options: Any) -> list[str]:
        """The codes of what it is refused with."""
        return self._seen(self.broker.ask(peer, "echo", name, **options))

    def wait(self, seconds: float) -> None:
        """The worker goes on, 10 ms at a time."""
        for _ in range(round(seconds * 100)):
            self._seen(self.broker.tick(0.01))
            if self._hand is not None and self.broker.now >= self._hand[1] - 1e-9:
                (name, _), self._hand = self._hand, None
                self._seen(self.broker.end("w", name))

    def _seen(self, sent: list[Out]) -> list[str]:
        for out in sent:
            name = out.prefix.id.strip(b".").decode()
            kind = type(out.message).__name__
            if out.to == "w" and kind == "Request":
                self._hand = name, self.broker.now + TOOK
            elif out.to != "w":
                self.ends[name] = "answered" if kind == "Final" else out.message.code
        return codes(sent)


@pytest.fixture
def served() -> Served:
    """Its pace is known, and ten requests wait."""
    found = Served()
    for n in range(20):
        found.ask(f"first {n}")
    found.wait(1.0)
    assert found.broker.core.requests.services["echo"].waiting == 9
    return found


def test_ten_times_too_much_leaves_the_worker_busy_with_what_is_still_wanted() -> None:
    served = Served()
    for n in range(1000):
        served.ask(f"r{n}", deadline=1.0)
        served.wait(0.01)
    served.wait(1.0)
    ends = list(served.ends.values())
    assert len(ends) == 1000 and set(ends) <= {"answered", "busy", "deadline"}
    assert ends.count("answered") >= 95, "of 100 that the worker can take in that time"
    assert ends.count("deadline") <= 10, "those before its pace was known"


def test_half_of_its_time_may_pass_before_its_turn(served: Served) -> None:
    assert served.ask("late", deadline=1.5) == ["busy"]
    assert served.ask("in time", deadline=2.1) == []
    assert served.ask("whenever") == []
    refusal = only(served.broker.ask("client", "echo", "again", deadline=1.0)).message
    assert refusal.retry_after_ms > 0 and "too many for its deadline" in refusal.message


def test_what_is_sent_again_is_taken(served: Served) -> None:
    assert served.ask("late", deadline=1.0, attempt=1) == []


def test_who_asks_little_does_not_wait_for_the_turns_of_who_asks_much(served: Served) -> None:
    served.broker.hello("modest")
    assert served.ask("first of it", "modest", deadline=0.5) == []
    assert served.ask("second of it", "modest", deadline=0.5) == ["busy"]
    assert served.ask("more urgent", deadline=0.7, priority=6) == []
    assert served.ask("less urgent", "modest", deadline=1.9, priority=0) == ["busy"]


def test_before_its_pace_is_known_a_service_takes_what_comes() -> None:
    served = Served()
    assert not any(served.ask(f"r{n}", deadline=0.2) for n in range(50))


def test_requests_that_left_the_queue_are_not_waited_for(served: Served) -> None:
    for n in range(30):
        served.ask(f"given up {n}", priority=5)
    queue = served.broker.core.requests.services["echo"].queue
    assert queue.count == 39 and queue.ahead(b"client", 0) == 39
    for n in range(30):
        served.broker.say("client", Cancel(), f"given up {n}")
    assert queue.count == 9 and queue.ahead(b"client", 0) == 9
