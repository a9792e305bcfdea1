"""What becomes of values when those who have them drop them or die, and of callers when workers do."""

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ralmq
import torch
from ralmq.errors import Busy, ConnectionClosed, DeadlineExceeded, Refused, WorkerLost
from ralmq.remote.home import Home, connect
from ralmq.remote.tensor import launch, to_worker
from remote_served import Served
from serving import Process, broker, free_url, worker
from torch import nn

HERE = Path(__file__).parent


def until(condition: Callable[[], Any], what: str, within: float = 30.0) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


def test_what_nobody_has_is_freed(served: Served) -> None:
    gc.collect()
    until(lambda: served.held("one") == served.held("two") == 0, "the end of what other tests had")
    one = ralmq.remote_copy(nn.Linear(8, 8), "one")
    values = [one(torch.ones(2, 8)) for _ in range(100)]
    moved = [value.to_worker("two") for value in values]
    moved[-1].to_here()
    assert served.held("one") >= 101 and served.held("two") == 100
    sum(value.sum() for value in moved).backward()  # type: ignore[union-attr]
    del values, moved
    until(lambda: served.held("one") == 1 and served.held("two") == 0, "the freeing of values")
    tables = [session.table for name in ("one", "two") for session in served.workers[name]._sessions.values()]
    until(lambda: not any(table.nodes for table in tables), "the freeing of graphs")
    del one
    until(lambda: served.held("one") == 0, "the freeing of the module")


def test_a_graph_that_is_never_gone_back_through_is_freed(served: Served) -> None:
    one = ralmq.remote_copy(nn.Linear(8, 8), "one")
    out = one(torch.ones(1, 8)).exp()
    out.to_here()
    (table,) = (session.table for session in served.workers["one"]._sessions.values())
    assert table.nodes
    del out
    until(lambda: not table.nodes, "the freeing of the graph")


def test_two_workers_of_one_name_are_no_replicas(served: Served) -> None:
    import asyncio

    from ralmq.remote.worker import ModuleWorker

    future = asyncio.run_coroutine_threadsafe(served.cluster.worker(ModuleWorker(name="one")), served.loop)
    with pytest.raises(Refused, match="process"):
        future.result(30)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[tuple[str, dict[str, Process], Home]]:
    """A broker and two module workers as processes."""
    url = free_url()
    started = {"broker": broker(tmp_path, url), "a": module(tmp_path, url, "a"), "b": module(tmp_path, url, "b")}
    with started["broker"], started["a"], started["b"]:
        home = connect(url, wait=30, deadline=30, default=False)
        try:
            until(lambda: ready(url, "a") and ready(url, "b"), "the start of the workers", 60)
            yield url, started, home
        finally:
            home.close()


def module(folder: Path, url: str, name: str) -> Process:
    return worker(folder, url, "module", name=name, allow="slow_modules:Slow")


def ready(url: str, name: str) -> bool:
    try:
        ralmq.remote("nn.Identity", name, broker=url)
        return True
    except Exception:
        return False


@pytest.fixture(autouse=True)
def slow_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "import time, torch",
        "class Slow(torch.nn.Module):",
        "    def forward(self, x):",
        "        time.sleep(60)",
    ]
    (tmp_path / "slow_modules.py").write_text("\n".join(lines))


def test_a_worker_killed_amid_a_call(processes: tuple[str, dict[str, Process], Home], tmp_path: Path) -> None:
    url, started, _ = processes
    lost = ralmq.remote("slow_modules:Slow", "a", broker=url)
    kept = ralmq.remote_copy(nn.Linear(2, 2), "b", broker=url)
    x = torch.ones(1, 2)
    waiting = lost(x)
    after = kept(waiting)  # on another worker, which waits for it
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            after.to_here()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    with pytest.raises(DeadlineExceeded, match="did not answer"):
        waiting.to_here(deadline=0.3)
    started["a"].send(signal.SIGKILL)
    thread.join(20)
    assert not thread.is_alive() and isinstance(failures[0], WorkerLost)
    for use in (lambda: lost(x), waiting.to_here, lambda: waiting + 1, lambda: waiting.shape):
        with pytest.raises(WorkerLost):
            use()
    assert kept(x).to_here().shape == (1, 2)  # the other goes on
    started["a"].process.wait()  # type: ignore[union-attr]
    with module(tmp_path, url, "a"):
        until(lambda: ready(url, "a"), "the new worker", 60)
        again = nn.Linear(2, 2)
        assert torch.equal(ralmq.remote_copy(again, "a", broker=url)(x).to_here(), again(x))


CALLER = """
import sys, time, torch, ralmq
from torch import nn
ralmq.remote.connect(sys.argv[1])
one, two = ralmq.remote_copy(nn.Linear(4, 4), "one"), ralmq.remote_copy(nn.Linear(4, 4), "two")
first = [one(torch.ones(3, 4)) for _ in range(20)]
held = [two(given) for given in first]
held[-1].to_here()
print("holds", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_what_a_dead_caller_had_is_freed_on_every_worker(served: Served, end: signal.Signals) -> None:
    gc.collect()
    until(lambda: served.held("one") == served.held("two") == 0, "the end of what other tests had")
    before = {name: len(found._sessions) for name, found in served.workers.items()}
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, served.url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert caller.stdout is not None and caller.stdout.readline() == b"holds\n"
        assert served.held("one") > 20 and served.held("two") > 20
        caller.send_signal(end)
        until(lambda: served.held("one") == served.held("two") == 0, "the freeing of a dead caller's values")
        until(lambda: {n: len(w._sessions) for n, w in served.workers.items()} == before, "the end of its sessions")
    finally:
        caller.kill()
        caller.wait()
        assert caller.stdout is not None
        caller.stdout.close()


def test_the_broker_restarted(processes: tuple[str, dict[str, Process], Home], tmp_path: Path) -> None:
    """Callers and workers that find it again go on with what they had."""
    url, started, home = processes
    linear = nn.Linear(2, 2)
    one = ralmq.remote_copy(linear, "a", broker=url)
    before = one(torch.ones(1, 2))
    before.to_here()
    started["broker"].send(signal.SIGKILL)
    started["broker"].process.wait()  # type: ignore[union-attr]
    assert torch.equal((before * 2).to_here(), linear(torch.ones(1, 2)) * 2)  # straight
    with broker(tmp_path, url):
        until(lambda: home.client._link._known and ready(url, "b"), "the return of all")
        peer = home.peer("a")
        for _ in range(20):
            assert torch.equal(one(before).to_here(), linear(linear(torch.ones(1, 2))))
            time.sleep(0.1)
        assert peer is one.peer and peer.error is None


def through_the_broker(url: str) -> Home:
    """A connection whose workers all seem to be on other hosts."""
    home = Home(url, wait=10, deadline=60)
    home.straight.host = "another"
    return home


def test_all_of_it_through_the_broker(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    home = through_the_broker(served.url)
    try:
        monkeypatch.setattr("ralmq.remote.proxy.home", lambda url: home)
        for name in ("one", "two"):
            peer = home.peer(name)
            peer.near = ""
            assert not peer._direct
        first, second = nn.Linear(64, 64), nn.Linear(64, 64)
        one, two = ralmq.remote_copy(first, "one"), ralmq.remote_copy(second, "two")
        x = torch.randn(300, 64)
        loss, own = two(one(x).relu()).pow(2).sum(), second(first(x).relu()).pow(2).sum()
        loss.backward()
        own.backward()
        assert float(loss) == float(own)
        for module, proxy in ((first, one), (second, two)):
            for mine, found in zip(module.parameters(), proxy.parameters(), strict=True):
                torch.testing.assert_close(found.grad.to_here(), mine.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    finally:
        home.close()


@pytest.mark.parametrize("brokered", [False, True])
@pytest.mark.parametrize("size", [16, 1 << 20])
def test_a_tensor_may_change_once_its_call_has_returned(
    served: Served, monkeypatch: pytest.MonkeyPatch, size: int, brokered: bool
) -> None:
    home = through_the_broker(served.url) if brokered else served.home
    try:
        if brokered:
            monkeypatch.setattr("ralmq.remote.proxy.home", lambda url: home)
        echo = ralmq.remote("nn.Identity", "one")
        found, x = [], torch.empty(size)
        for number in range(12):
            x.fill_(number)
            found.append(echo(x))
            x.fill_(-1)
        assert [bool((y.to_here() == number).all()) for number, y in enumerate(found)] == [True] * 12
    finally:
        if brokered:
            home.close()


def test_a_call_that_nothing_follows_leaves_all_the_same(served: Served) -> None:
    """It waits for a moment for the next one, and for no longer."""
    echo = ralmq.remote("nn.Identity", "one")
    until(lambda: not served.home.peer("one")._pending, "calls before it end")
    y = echo(torch.ones(3))
    until(y.made.future.done, "it ends")


def test_more_than_a_message_is_an_error_and_no_hang(served: Served) -> None:
    x = to_worker(torch.zeros(1), "one")
    large = x.expand(80_000_000).clone()
    with pytest.raises(Exception, match=r"in parts|cannot travel|256|268435456"):
        large.to_here()
    with pytest.raises(Exception, match=r"in parts|cannot travel|256|268435456"):
        large.to_worker("two").to_here()
    assert x.to_here().tolist() == [0]


def test_closing_ends_what_waits(served: Served) -> None:
    home = Home(served.url, wait=10, deadline=60)
    peer = home.peer("three")
    with pytest.raises(KeyError, match="no value"):
        peer.ask("fetch", {"of": 1 << 40}).result()
    never = ["h", 1 << 40, peer.service, peer.session, ""]  # a value that is never made
    waiting = peer.ask("op", {"op": "value", "a": ["l", ["t", never], ["m"]], "out": peer.number()})
    time.sleep(0.2)
    assert not waiting.future.done()
    home.close()
    with pytest.raises(ConnectionClosed, match="closed"):
        waiting.result(5)
    with pytest.raises(Exception, match=r"closed|connect"):
        home.peer("three")


def test_more_handles_than_a_message_holds_are_freed(served: Served) -> None:
    x = to_worker(torch.zeros(1), "one")
    x.to_here()
    peer = x.handle.peer
    peer.freed.extend(range(1 << 40, (1 << 40) + 200_000))
    assert (x + 1).to_here(deadline=20).tolist() == [1]
    until(lambda: not peer.freed, "the freeing of many values")
    assert (x + 1).to_here(deadline=20).tolist() == [1]


def test_a_call_that_the_broker_does_not_take_holds_up_none_behind_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = through_the_broker(served.url)
    try:
        peer, asked = home.peer("three"), home.client.request
        x = launch(peer, "op", {"op": "value"}, [(torch.ones(2),), {}])
        x.to_here()

        async def refused(*given: Any, **named: Any) -> Any:
            monkeypatch.setattr(home.client, "request", asked)
            raise Busy("all places are taken")

        monkeypatch.setattr(home.client, "request", refused)
        lost, behind = x + 1, x + 2
        with pytest.raises(Busy):
            lost.to_here(deadline=20)
        assert behind.to_here(deadline=20).tolist() == [3, 3]
        with pytest.raises(Busy):
            (lost + 1).to_here(deadline=20)
    finally:
        home.close()


def test_errors_keep_nothing_alive(served: Served) -> None:
    """No collection is needed to free what a failed call had."""
    x = to_worker(torch.ones(2, 3), "three")
    x.to_here()
    gc.collect()
    gc.disable()
    try:
        before = served.held("three")

        def fail() -> None:
            with pytest.raises(RuntimeError):
                (x @ x).to_here()

        for _ in range(20):
            fail()
        until(lambda: served.held("three") <= before, "the freeing of what failed")
    finally:
        gc.enable()


def test_large_calls_do_not_hold_up_the_event_loop(served: Served) -> None:
    """Calls that took no time run there; others of the same operator or way back, with more to do, do not."""
    layer = ralmq.remote("nn.Linear", "two", in_features=700, out_features=700)
    small, large = to_worker(torch.ones(2, 2), "two"), to_worker(torch.ones(700, 700), "two")
    (session,) = (found for found in served.workers["two"]._sessions.values() if len(found.table))
    seen: list[tuple[str, str]] = []
    run = session._run

    def noted(call: Any) -> Any:
        seen.append((str(call.body.get("op") or call.body["v"]), threading.current_thread().name))
        return run(call)

    session._run = noted  # type: ignore[method-assign]
    for _ in range(40):
        (small @ small).to_here()
        small.new_zeros(1).to_here()
    assert any(name == "served" for _, name in seen)  # some did run in the loop
    seen.clear()
    (large @ large).shape, small.new_zeros((3000, 1000)).shape
    assert [name for what, name in seen if what in ("operator.matmul", "Tensor.new_zeros")] == ["compute_0"] * 2
    for _ in range(3):
        seen.clear()
        layer(large).mul(2).sum().backward()
        backs = [name for what, name in seen if what == "back"]
        assert len(backs) == 3 and backs[-1] == "compute_0"
