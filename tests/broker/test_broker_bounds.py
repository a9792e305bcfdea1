"""Ids that stand for other things, a greedy asker, a retry that is refused, what waited when it was sent again."""

import pytest
from broker_driver import Broker, codes
from ralmq.broker.limits import Limits
from ralmq.schema.limits import NO_ID
from ralmq.schema.message import Request


@pytest.mark.parametrize("identity", [NO_ID, b"pipeline" + bytes(8)])
def test_an_id_that_stands_for_a_peer_or_a_pipeline_is_no_request(identity: bytes) -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "echo")
    refused = broker.say("client", Request("echo"), identity)
    assert codes(refused) == ["malformed"]
    assert not broker.core.requests.open


def test_one_asker_leaves_room_in_a_queue_for_others() -> None:
    broker = Broker()
    for peer in ("greedy", "other", "third"):
        broker.hello(peer)
    broker.hello("w", "echo")
    most = Limits().queue
    taken = {
        peer: sum(not codes(broker.ask(peer, "echo", f"{peer[0]}{n}")) for n in range(2 * most))
        for peer in ("greedy", "other")
    }
    assert taken["greedy"] + taken["other"] < most
    assert taken["greedy"] > 0.9 * most and taken["other"] > 1
    assert codes(broker.ask("third", "echo", "t")) == []


def test_a_retry_that_is_refused_stays_in_quarantine() -> None:
    broker = Broker()
    broker.hello("client")
    for n in range(3):
        broker.hello(f"w{n}", "echo", idempotent=True)
    broker.ask("client", "echo", "bad")
    for _ in range(3):
        worker = next(record.worker for record in broker.core.requests.open.values())
        assert worker is not None
        broker.lost(worker.key.decode())
    quarantine = broker.core.requests.quarantine
    assert len(quarantine) == 1
    broker.tick(10.0)  # nobody offers the service any more
    identity = quarantine.listed(0.0)[0]["id"]
    assert "no_service" in codes(broker.ask("client", "ralmq.quarantine.retry", "again", body={"id": identity}))
    assert len(quarantine) == 1


def test_what_waited_and_is_sent_again_was_never_begun() -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "once", capacity=1, idempotent=False)
    broker.ask("client", "once", "a")
    broker.ask("client", "once", "b")
    assert codes(broker.ask("client", "once", "b", attempt=1)) == []
    served = broker.end("w", "a")
    assert [type(out.message).__name__ for out in served if out.to == "w"] == ["Request"]


def test_what_a_worker_may_have_begun_is_not_done_twice() -> None:
    broker = Broker()
    broker.hello("client")
    broker.hello("w", "once", idempotent=False, capacity=2)
    broker.ask("client", "once", "a")
    assert codes(broker.ask("client", "once", "a", attempt=1)) == ["worker_lost"]
