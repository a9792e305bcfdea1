"""A broker without rules, for one peer: a test sees each message that arrives and chooses each that is sent."""

import time
from collections import deque
from typing import Any, Self

import zmq
from ralmq.schema.codec import decode, encode
from ralmq.schema.frame import Prefix
from ralmq.schema.message import Beat, Hello, Welcome
from serving import until


class FakeBroker:
    """Bound to `url`; `peer` is whoever spoke last."""

    def __init__(self, epoch: int = 5, url: str = "tcp://127.0.0.1:*") -> None:
        self.epoch = epoch
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.bind(url)
        self.url = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.peer = b""
        self._inbox: deque[tuple[Prefix, Any]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()

    def send(self, message: Any, **prefix: Any) -> None:
        """Under this broker's epoch, unless another is given."""
        self.send_frames(encode(message, **{"epoch": self.epoch, **prefix}))

    def send_frames(self, frames: list[Any]) -> None:
        self._socket.send_multipart([self.peer, *frames])

    def arrived(self) -> list[tuple[Prefix, Any]]:
        """What has come and was not received yet, BEATs aside."""
        try:
            while True:
                self.peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
                self._inbox.append(decode(frames))
        except zmq.Again:
            return [entry for entry in self._inbox if not isinstance(entry[1], Beat)]

    def taken(self) -> list[tuple[Prefix, Any]]:
        """The same, taken out."""
        found = self.arrived()
        self._inbox.clear()
        return found

    async def receive(self, kind: type[Any]) -> tuple[Prefix, Any]:
        """The next message of a kind; BEATs and HELLOs that come before it are passed over, others must not."""

        def come() -> bool:
            self.arrived()
            while self._inbox and isinstance(self._inbox[0][1], Beat | Hello) and type(self._inbox[0][1]) is not kind:
                self._inbox.popleft()
            return bool(self._inbox)

        await until(come, f"a {kind.__name__}")
        assert type(self._inbox[0][1]) is kind, self._inbox
        return self._inbox.popleft()

    async def welcome(self, **fields: Any) -> Hello:
        """Waits for HELLO and answers it."""
        _, hello = await self.receive(Hello)
        self.send(Welcome(**fields))
        assert isinstance(hello, Hello)
        return hello

    def hold_up(self) -> None:
        """Lets what was sent arrive while the event loop stands still, so that it is taken in one pass."""
        time.sleep(0.1)
