"""Addresses that a broker has bound, and those that others connect to."""

import pytest
from ralmq.cluster import addresses
from ralmq.cluster.addresses import from_elsewhere, from_here


def test_an_address_of_its_own_stays_as_it_is() -> None:
    for bound in ("tcp://127.0.0.1:5", "tcp://10.1.2.3:5", "tcp://[::1]:5", "ipc:///run/x"):
        assert from_here(bound) == from_elsewhere(bound) == bound


def test_nobody_is_sent_to_every_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://[::]:5555"):
        assert from_here(bound) == "tcp://127.0.0.1:5555"
        host, _, port = from_elsewhere(bound).removeprefix("tcp://").rpartition(":")
        assert port == "5555" and host and host not in addresses.EVERYWHERE
    monkeypatch.setattr(addresses, "PROBE", ("255.255.255.255", 9))  # no way there
    monkeypatch.setattr(addresses.socket, "gethostname", lambda: "desk")
    assert from_elsewhere("tcp://0.0.0.0:5555") == "tcp://desk:5555"
