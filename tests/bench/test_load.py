"""The load of the broker bench counts exactly, in C and in Python, and sees what a broker does wrong."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from ralmq.bench.load import SERVICE, Load, LoadFailed, NoCompiler, Tally, load_command
from ralmq.bench.systems import ASYNCIO, POLLED, PROXY, RALMQ, System, commands, free_url
from ralmq.schema.codec import decode, encode
from ralmq.schema.frame import read_prefix
from ralmq.schema.message import Error, Final, Hello, Kind, Request, Welcome

SIZES = (0, 100, 4 << 10, 64 << 10, 1 << 20)
COUNTS = (3000, 1000, 2000, 300, 40)


@pytest.fixture(params=["c", "python"])
def load(request: pytest.FixtureRequest) -> list[str]:
    try:
        return load_command(python=request.param == "python")
    except NoCompiler as error:
        pytest.skip(str(error))


def clean(count: int) -> dict[str, object]:
    return {
        "sent": count,
        "answered": count,
        "served": count,
        "errors": 0,
        "gone": 0,
        "strays": 0,
        "open": 0,
        "note": "",
    }


def counted(tally: Tally) -> dict[str, object]:
    return {name: value for name, value in tally._asdict().items() if name != "seconds"}


@pytest.mark.parametrize("name", [RALMQ, PROXY, ASYNCIO, POLLED])
def test_as_many_answers_as_requests(name: str, load: list[str]) -> None:
    with System(name, commands()[name], load, SIZES) as system:
        for place, count in enumerate(COUNTS):
            tally = system.load.run(place, window=7, count=count)
            assert counted(tally) == clean(count)
            assert tally.faults == 0


def test_a_run_by_time_ends_with_all_answered(load: list[str]) -> None:
    with System(RALMQ, commands()[RALMQ], load, SIZES) as system:
        tally = system.load.run(0, window=4, seconds=0.05)
        assert tally.sent >= 16
        assert counted(tally) == clean(tally.sent)


Answers = Callable[[bytes, list[bytes]], list[list[bytes]]]


@contextmanager
def router(answers: Answers) -> Iterator[str]:
    """A ROUTER that greets, and answers each other message as told: [peer, *frames] to send."""
    context = zmq.Context()
    socket, stop = context.socket(zmq.ROUTER), threading.Event()
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    def serve() -> None:
        while not stop.is_set():
            if socket.poll(50):
                peer, *frames = socket.recv_multipart()
                greets = frames[0][1] == Kind.HELLO
                welcome = [[peer, *encode(Welcome(), epoch=7)]]
                for sent in welcome if greets else answers(peer, frames):
                    socket.send_multipart(sent)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        stop.set()
        thread.join()
        context.destroy(linger=0)


def test_a_doubled_answer_is_a_stray(load: list[str]) -> None:
    def twice(peer: bytes, frames: list[bytes]) -> list[list[bytes]]:
        prefix = read_prefix(frames[0])
        assert (prefix.kind, prefix.epoch) == (Kind.REQUEST, 7)
        return [[peer, *encode(Final(), id=prefix.id, epoch=7)]] * 2

    with router(twice) as url, Load(load, url, url, [0]) as running:
        first = running.run(0, window=1, count=20)
        assert (first.sent, first.answered) == (20, 20)
        second = running.run(0, window=1, count=20)
        assert first.strays + second.strays >= 36  # the last ones may still be under way
        assert second.answered == 20
        assert second.faults == second.strays > 0


def test_an_answer_to_another_client_is_no_answer(load: list[str]) -> None:
    waiting: list[tuple[bytes, bytes]] = []

    def crossed(peer: bytes, frames: list[bytes]) -> list[list[bytes]]:
        """Two clients get each other's answer first, and then their own, so that the run ends."""
        waiting.append((peer, read_prefix(frames[0]).id))
        if len(waiting) < 2:
            return []
        (one, its), (other, others) = waiting
        waiting.clear()
        pairs = ((one, others), (other, its), (one, its), (other, others))
        return [[peer, *encode(Final(), id=identity, epoch=7)] for peer, identity in pairs]

    with router(crossed) as url, Load(load, url, url, [0], clients=2) as running:
        tally = running.run(0, window=1, count=20)
        assert (tally.sent, tally.answered, tally.strays) == (20, 20, 20)


def test_errors_are_counted_and_quoted(load: list[str]) -> None:
    def refuse(peer: bytes, frames: list[bytes]) -> list[list[bytes]]:
        return [[peer, *encode(Error("busy", "come back later"), id=read_prefix(frames[0]).id, epoch=7)]]

    with router(refuse) as url, Load(load, url, url, [0]) as running:
        tally = running.run(0, window=3, count=30)
        assert (tally.sent, tally.answered, tally.errors, tally.open) == (30, 0, 30, 0)
        assert tally.faults == 30
        assert "come back later" in tally.note


def test_the_load_sends_messages_of_the_protocol(load: list[str]) -> None:
    seen: list[bytes] = []

    def answer(peer: bytes, frames: list[bytes]) -> list[list[bytes]]:
        prefix, message = decode(frames)
        assert isinstance(message, Request)
        assert message.service == SERVICE
        seen.append(prefix.id)
        size = sum(tensor.nbytes for tensor in message.tensors)
        assert size == 64 << 10
        return [[peer, *encode(Final(tensors=message.tensors), id=prefix.id, epoch=7)]]

    with router(answer) as url, Load(load, url, url, [64 << 10]) as running:
        assert running.run(0, window=2, count=50).answered == 50
    assert len(set(seen)) == 50


def test_peers_announce_themselves_once_each(load: list[str]) -> None:
    url, hellos = free_url(), []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(url)
        socket.linger = 0

        def greet() -> None:
            for _ in range(8):
                peer, *frames = socket.recv_multipart()
                hellos.append(decode(frames)[1])
                socket.send_multipart([peer, *encode(Welcome(), epoch=7)])

        thread = threading.Thread(target=greet)
        thread.start()
        with Load(load, url, url, [0]):
            thread.join()
    assert all(isinstance(hello, Hello) for hello in hellos)
    assert len({hello.nonce for hello in hellos}) == 8
    assert sum(hello.services == (SERVICE,) for hello in hellos) == 4


def test_a_load_that_cannot_go_on_says_why(load: list[str]) -> None:
    with (
        router(lambda peer, frames: []) as url,
        Load(load, url, url, [0]) as running,
        pytest.raises(LoadFailed, match="cannot read the line"),
    ):
        running._ask("nonsense")


def test_a_broker_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    said = tmp_path / "said"
    speaks = (
        f"import sys; sys.stderr.write('no such option'); sys.stderr.flush(); open({str(said)!r}, 'w'); sys.exit(2)"
    )
    awaits = f"import os, sys, time\nwhile not os.path.exists({str(said)!r}): time.sleep(0.01)\nsys.exit('no WELCOME')"
    with pytest.raises(LoadFailed, match=r"no WELCOME.*no such option"):
        System(RALMQ, [sys.executable, "-c", speaks], [sys.executable, "-c", awaits], [0])
