"""The load of the broker bench in Python, where no compiler is found: obeys the same lines as load.c, only slower.

Knows of the protocol only where kind, attempt, epoch and id stand in frame 0.
"""

import json
import struct
import sys
import threading
import time
from typing import Any

import zmq

from ..schema.message import Kind

ID = struct.Struct("<QII")
POLL_MS, PATIENCE, BATCH = 500, 20, 64
Frames = list[Any]


class Size:
    def __init__(self, payload: str, request: str, final: str) -> None:
        self.payload = [bytes(int(payload))] if int(payload) else []
        self.request, self.final = bytes.fromhex(request), bytes.fromhex(final)

    def is_answer(self, frames: Frames) -> bool:
        return len(frames[0]) == len(self.final) and list(map(len, frames[1:])) == list(map(len, self.payload))


class Client:
    """One DEALER and the requests that it waits for: slot -> number of the request."""

    def __init__(self, place: int, socket: "zmq.Socket[bytes]", epoch: bytes) -> None:
        self.place, self.socket, self.epoch = place, socket, epoch
        self.open: dict[int, int] = {}

    def slot_of(self, head: bytes) -> int | None:
        number, slot, place = ID.unpack_from(head, 12)
        return slot if place == self.place and self.open.get(slot) == number else None


class Load:
    def __init__(self) -> None:
        self.urls: dict[str, str] = {}
        self.switches = {"greet": False, "envelope": False}
        self.hellos: list[tuple[str, bytes]] = []
        self.sizes: list[Size] = []
        self.clients: list[Client] = []
        self.current: Size | None = None
        self.served = self.counter = 0

    def obey(self, line: str) -> None:
        word, *rest = line.split()
        if word in ("front", "back"):
            self.urls[word] = rest[0]
        elif word in self.switches:
            self.switches[word] = rest[0] == "1"
        elif word in ("client", "worker"):
            self.hellos.append((word, bytes.fromhex(rest[0])))
        elif word == "size":
            self.sizes.append(Size(*rest))
        elif word == "start":
            self.start()
        elif word == "run":
            self.current = self.sizes[int(rest[0])]
            print(json.dumps(self.run(self.current, int(rest[1]), float(rest[2]), int(rest[3]))), flush=True)
        else:
            sys.exit(f"cannot read the line: {line[:60]}")

    def start(self) -> None:
        context = zmq.Context()
        workers: list[zmq.Socket[bytes]] = []
        for role, hello in self.hellos:
            url = self.urls["back" if role == "worker" else "front"]
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            socket.connect(url)
            epoch = self.introduce(socket, hello, url) if self.switches["greet"] else bytes(4)
            if role == "worker":
                workers.append(socket)
            else:
                self.clients.append(Client(len(self.clients), socket, epoch))
        threading.Thread(target=self.work, args=(workers,), daemon=True).start()
        print(json.dumps({"clients": len(self.clients), "workers": len(workers)}), flush=True)

    def introduce(self, socket: "zmq.Socket[bytes]", hello: bytes, url: str) -> bytes:
        socket.send(hello)
        while socket.poll(POLL_MS * PATIENCE):
            head = socket.recv_multipart()[0]
            if head[1] == Kind.WELCOME:
                return head[8:12]
        sys.exit(f"no WELCOME from {url}: is the broker there?")

    def work(self, sockets: "list[zmq.Socket[bytes]]") -> None:
        poller = zmq.Poller()
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                self.serve(socket)

    def serve(self, socket: Any) -> None:
        for _ in range(BATCH):
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            lead = [frames.pop(0)] if self.switches["envelope"] else []
            head = frames[0].bytes
            if head[1] == Kind.REQUEST and self.current is not None:
                final = self.current.final
                answer = final[:4] + head[4:6] + final[6:8] + head[8:28] + final[28:]
                self.served += 1
                socket.send_multipart([*lead, answer, *frames[1:]], copy=False)

    def send(self, client: Client, slot: int, size: Size) -> None:
        self.counter += 1
        client.open[slot] = self.counter
        identity = ID.pack(self.counter, slot, client.place)
        head = size.request[:8] + client.epoch + identity + size.request[28:]
        client.socket.send_multipart([head, *size.payload], copy=False)

    def take(self, client: Client, size: Size, tally: dict[str, Any]) -> int | None:
        """Takes one message. The slot that it ends, None where it ends none.

        Raises:
            zmq.Again: nothing has come.
        """
        frames = client.socket.recv_multipart(zmq.DONTWAIT, copy=False)
        head = frames[0].bytes
        kind = head[1]
        slot = client.slot_of(head) if kind in (Kind.FINAL, Kind.ERROR) else None
        if kind == Kind.FINAL and slot is not None and size.is_answer([head, *frames[1:]]):
            tally["answered"] += 1
        elif kind in (Kind.ERROR, Kind.GONE):
            tally["errors" if kind == Kind.ERROR else "gone"] += 1
            tally["note"] = tally["note"] or head[36:196].decode("ascii", "ignore")
        elif kind != Kind.BEAT:
            tally["strays"] += 1
        if slot is not None:
            del client.open[slot]
            tally["open"] -= 1
        return slot

    def run(self, size: Size, window: int, seconds: float, count: int) -> dict[str, Any]:
        names = ("sent", "answered", "errors", "gone", "strays", "open")
        tally: dict[str, Any] = dict.fromkeys(names, 0) | {"note": ""}
        poller = zmq.Poller()
        self.served, quiet = 0, 0
        start = last = time.monotonic()
        by_socket: dict[Any, Client] = {}
        for client in self.clients:
            client.open.clear()
            poller.register(client.socket, zmq.POLLIN)
            by_socket[client.socket] = client
            self.drain(client, size, tally, window=0)
        for slot in range(window):
            for client in self.clients:
                self.send_if(client, slot, size, tally, count)
        while tally["open"] and quiet < PATIENCE:
            ended = tally["sent"] - tally["open"]
            ready = poller.poll(POLL_MS)
            going = time.monotonic() - start < seconds
            for socket, _ in ready:
                self.drain(by_socket[socket], size, tally, window=window if going else 0, count=count)
            quiet = quiet + 1 if ended == tally["sent"] - tally["open"] else 0
            last = last if quiet else time.monotonic()
        return tally | {"served": self.served, "seconds": last - start}

    def send_if(self, client: Client, slot: int, size: Size, tally: dict[str, Any], count: int) -> None:
        if not count or tally["sent"] < count:
            self.send(client, slot, size)
            tally["sent"] += 1
            tally["open"] += 1

    def drain(self, client: Client, size: Size, tally: dict[str, Any], *, window: int, count: int = 0) -> None:
        """Takes up to BATCH messages, and asks again in each slot that became free where the window is not 0."""
        for _ in range(BATCH):
            try:
                slot = self.take(client, size, tally)
            except zmq.Again:
                return
            if slot is not None and window:
                self.send_if(client, slot, size, tally, count)


def main() -> None:
    load = Load()
    for line in sys.stdin:
        load.obey(line)


if __name__ == "__main__":
    main()
