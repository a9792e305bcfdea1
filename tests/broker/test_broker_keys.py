"""What a peer's key allows, in the core: services, the broker's own answers, ids and nonces that belong to a key."""

import pytest
from broker_driver import Broker, codes, shown
from ralmq.schema.keys import ADMIN, CLIENT, WORKER, Entry
from ralmq.schema.message import Gone

ENTRIES = {
    "client": Entry("c", CLIENT, "public c"),
    "other": Entry("o", CLIENT, "public o"),
    "admin": Entry("a", ADMIN, "public a"),
    "w": Entry("w", WORKER, "public w", ("echo", "lm:*")),
}


@pytest.fixture
def broker() -> Broker:
    broker = Broker()
    for peer, entry in ENTRIES.items():
        assert broker.core.introduce(broker.now, peer.encode(), entry) == []
    for peer in ("client", "other", "admin"):
        broker.hello(peer)
    return broker


def test_a_key_offers_what_its_role_and_its_patterns_allow(broker: Broker) -> None:
    assert shown(broker.hello("w", "echo"))[0][1] == "Welcome"
    broker.core.introduce(broker.now, b"v", ENTRIES["w"])
    (refused,) = broker.hello("v", "echo", "search:docs")
    assert refused.message.code == "refused" and "may not offer search:docs" in refused.message.message
    assert "ralmq keys add NAME --role worker" in refused.message.message
    assert codes(broker.hello("other", "echo", nonce="another")) == ["refused"]
    assert broker.count("forbidden") == 2
    broker.core.introduce(broker.now, b"s", ENTRIES["w"])
    broker.stage("s", 0, 4)
    assert broker.worker("s")["layers"] == [0, 4, 4]


def test_the_broker_s_own_answers_are_for_admins_but_for_its_status(broker: Broker) -> None:
    assert codes(broker.ask("client", "ralmq.quarantine.list", "a")) == ["refused"]
    assert [out.message.body["quarantine"] for out in broker.ask("admin", "ralmq.quarantine.list", "b")] == [[]]
    assert "workers" in broker.ask("client", "ralmq.status", "c")[0].message.body


def test_an_id_belongs_to_the_key_that_used_it_first(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    broker.end("w", "a")
    (taken,) = broker.ask("other", "echo", "a", attempt=1)
    assert taken.to == "other" and taken.message.code == "malformed"
    assert shown(broker.ask("client", "echo", "a", attempt=1)) == [("w", "Request", "a", 1)]


def test_a_nonce_belongs_to_a_key_too(broker: Broker) -> None:
    broker.core.introduce(broker.now, b"thief", ENTRIES["other"])
    (refused,) = broker.hello("thief", nonce="nonce client")
    assert refused.message.code == "malformed" and "another key" in refused.message.message
    assert shown(broker.ask("client", "nobody", "a", wait_ms=1000)) == [], "the owner is still known"


def test_a_connection_whose_key_changes_begins_anew(broker: Broker) -> None:
    broker.hello("w", "echo")
    broker.ask("client", "echo", "a")
    assert broker.core.introduce(broker.now, b"client", ENTRIES["client"]) == []
    sent = broker._seen(broker.core.introduce(broker.now, b"client", ENTRIES["other"]))
    assert [type(out.message) for out in sent if out.to == "client"] == [Gone]
    assert broker.open() == 0
    broker.core.count("unknown_key")
    assert broker.count("unknown_key") == 1
