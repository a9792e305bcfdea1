"""Starts processes of a cluster again when they end by themselves. Knows exit codes and pauses; not what they serve."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from .child import BAD_INPUT, Child
from .cluster import Cluster

FIRST: Final = 0.2  # seconds before a process is started again; twice as long each time that follows soon
LONGEST: Final = 30.0
SOON: Final = 60.0  # seconds; what ran longer begins anew with the first pause


async def supervise(
    cluster: Cluster,
    told: Callable[[str], None] = lambda line: None,
    changed: Callable[[], None] = lambda: None,
    first: float = FIRST,
) -> None:
    """Until it is cancelled. A process whose input is to be mended is not started again.

    Args:
        told: gets a line for each process that ended, for each that was started again, and for what hinders that.
        changed: called when a process has been started, and has another pid.
        first: the shortest pause.

    Raises:
        Refused: the broker's input is to be mended.
    """
    loop = asyncio.get_running_loop()
    pauses: dict[str, tuple[float, float]] = {}  # the last pause of each, and when it was started after it
    starts: set[asyncio.Task[None]] = set()

    def tell(line: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more, or the disk is full
            told(line)

    async def again(child: Child, pause: float) -> None:
        runs = False
        while True:
            await asyncio.sleep(pause)
            try:
                if not runs:
                    await cluster.restart(child.name)
                    runs, pauses[child.name] = True, (pause, loop.time())
                changed()
                break
            except Exception as error:  # no memory to fork, a full disk
                pause = min(LONGEST, 2 * pause)
                what = "could not be recorded" if runs else "could not be started again"
                tell(f"{child.name} {what}, next try in {pause:g} s: {error}")
        tell(f"{child.name} was started again")

    try:
        while True:
            child = await cluster.ended()
            failure = child.failure()
            tell(str(failure))
            if child.code == BAD_INPUT:
                if child.name == "broker":
                    raise failure
                continue
            pause, at = pauses.get(child.name, (0.0, 0.0))
            pause = min(LONGEST, 2 * pause) if pause and loop.time() - at < SOON else first
            starts.add(task := loop.create_task(again(child, pause)))
            task.add_done_callback(starts.discard)
    finally:
        for task in starts:
            task.cancel()
