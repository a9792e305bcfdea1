"""A stage whose computation hangs: no pipeline has it until it answers, and its process ends if it never does."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import ralmq
from ralmq.errors import WorkerLost
from ralmq.workers.stage.worker import Stage
from serving import broker, free_url, until, worker
from stage.pipelines import MODEL, Brake, Cluster, cluster, generated, lm, prompts, stages

FAMILY = "llama"
PROMPT = prompts(1, seed=3)[0]

MODULE = """
import threading
from ralmq.workers.stage.worker import Stage

class Hangs(Stage):
    '''Its computation never comes back.'''

    stall_limit = STALL

    async def start(self) -> None:
        await super().start()
        self._runner._span.forward = self._hang

    def _hang(self, *_, **__):
        print("hangs", flush=True)
        threading.Event().wait()
"""


async def announced(running: Cluster) -> int:
    return len((await running.client.status())["workers"])


def test_it_comes_back_when_its_computation_does(checkpoint: Callable[[str], Path]) -> None:
    """The pipeline is formed once with it, and again only after it has answered."""

    async def main() -> None:
        members = stages(checkpoint(FAMILY), 2)
        members[1].stall_limit = 0.3
        async with cluster(*members) as running:
            wanted = await generated(running.client, PROMPT, max_tokens=5)
            formed: list[bytes] = []
            form = members[1]._form
            members[1]._form = lambda pipeline, message: (formed.append(pipeline), form(pipeline, message))  # type: ignore[func-returns-value, assignment, method-assign]
            brake = Brake(members[1])
            members[1].stall_limit = 60.0  # of what follows: it is not given up
            with pytest.raises(WorkerLost, match="made no progress"):
                await anext(lm(running.client, PROMPT, max_tokens=5))
            for _ in range(20):  # many more than until it would be in a pipeline again
                await asyncio.sleep(0.05)
                assert await announced(running) == 1
            assert not formed
            brake.release()
            assert (await generated(running.client, PROMPT, max_tokens=5)).tokens == wanted.tokens
            assert len(formed) == 1
            await running.settled()

    asyncio.run(main())


def test_one_that_makes_progress_is_waited_for(checkpoint: Callable[[str], Path]) -> None:
    """A long computation over the end of a connection is no hang."""

    async def main() -> None:
        (stage,) = members = stages(checkpoint(FAMILY), 1)
        async with cluster(*members) as running:
            stage.stall_limit = 0.2
            span, brake = stage._runner._span, Brake(stage)
            stage.host.link.renew("it is another now")
            for _ in range(10):
                await asyncio.sleep(0.1)
                span.computed += 1
            assert not stage.host._closed and not stage.host.link._known
            brake.release()
            await until(lambda: stage.host.link._known)
            assert len((await generated(running.client, PROMPT, max_tokens=5)).tokens) == 5

    asyncio.run(main())


def test_one_that_never_comes_back_ends(checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        members = stages(checkpoint(FAMILY), 2)
        members[1].stall_limit = 0.3
        async with cluster(*members) as running:
            brake = Brake(members[1])
            with pytest.raises(WorkerLost, match="made no progress"):
                await anext(lm(running.client, PROMPT, max_tokens=5))
            await until(lambda: members[1].host._closed, "the end of a stage that hangs")
            brake.release()
            await running.add(Stage(model=str(checkpoint(FAMILY)), stage="1/2", name=MODEL))
            assert len((await generated(running.client, PROMPT, max_tokens=5)).tokens) == 5

    asyncio.run(main())
    assert caplog.text.count("can serve no more: the computation of this stage hangs") == 1


@pytest.mark.parametrize("asked", [False, True])
def test_its_process_ends(asked: bool, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """By itself, with one line that says why; or when it is told to."""
    path = checkpoint(FAMILY)
    (tmp_path / "mine.py").write_text(MODULE.replace("STALL", "600.0" if asked else "0.5"))

    async def main() -> None:
        url = free_url()
        async with AsyncExitStack() as stack:
            serving = stack.enter_context(broker(tmp_path, url))
            process = stack.enter_context(worker(tmp_path, url, "mine:Hangs", model=path, name=MODEL, stage="0/1"))
            client = await stack.enter_async_context(ralmq.connect(url, wait=30))
            tensors = [np.asarray(PROMPT, np.int32)]
            task = asyncio.create_task(client.request(f"lm:{MODEL}", {}, tensors=tensors, wait_service=30, deadline=60))
            await until(lambda: "hangs" in process.log)
            if asked:
                serving.send(signal.SIGKILL)  # else the drain waits for what is in hand, for half a minute
                await serving.ended()
                process.send(signal.SIGTERM)
            assert await process.ended() == 1
            assert process.log.count("the computation of this stage hangs (0.5 s without progress)") == (not asked)
            assert process.log.count("a thread of this worker hangs") == 1 and "Traceback" not in process.log
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(main())
