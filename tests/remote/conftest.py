"""A broker and three module workers in a thread of this process, and the caller's connection to them."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inprocess import cluster
from ralmq.remote.home import close, connect
from ralmq.remote.peer import Peer, Pending
from ralmq.remote.worker import ModuleWorker
from remote_served import NAMES, Served

torch.set_num_threads(1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs of all calls from now on, but for those that free handles, which come whenever they come."""
    verbs: list[str] = []
    ask = Peer.ask

    def counted(self: Peer, verb: str, *args: Any, **kwargs: Any) -> Pending:
        if verb != "free":
            verbs.append(verb)
        return ask(self, verb, *args, **kwargs)

    monkeypatch.setattr(Peer, "ask", counted)
    return verbs


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = tmp_path_factory.mktemp("copies")  # of the worker three alone
    ready, end = threading.Event(), asyncio.Event()
    found: list[Served] = []

    async def serve() -> None:
        allow = "remote_modules:Block,remote_modules:Odd,remote_modules:Failing"
        workers = {
            name: ModuleWorker(name=name, allow=allow, models=str(models) if name == "three" else "") for name in NAMES
        }
        async with cluster(*workers.values()) as made:
            found.append(Served(None, made, workers, models, asyncio.get_running_loop()))  # type: ignore[arg-type]
            ready.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="served", daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        found[0].home = connect(found[0].url, deadline=60)
        yield found[0]
    finally:
        close()
        found[0].loop.call_soon_threadsafe(end.set)
        thread.join(20)
