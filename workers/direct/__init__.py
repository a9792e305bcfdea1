"""Messages from peer to peer, without the broker: a door that takes them, a lane to another peer's door."""
