"""The cluster that one model needs: stages, a generator, index servers. Knows worker options; not what they mean."""

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from ..schema.plan.model import LARGEST
from ..schema.plan.plan import make_plan
from ..schema.plan.slots import Slot
from ..workers.generator.encdec import start_of
from ..workers.models import resolve
from ..workers.weigh import weigh
from .cluster import LOOPBACK, READY_WITHIN, Cluster


@asynccontextmanager
async def local_cluster(
    *,
    model: str = "demo",
    stages: int = 2,
    indexes: Sequence[Path] = (),
    generator: bool = True,
    extra: Sequence[Sequence[str]] = (),
    bind: str = LOOPBACK,
    insecure: bool = False,
    directory: Path | None = None,
    threads: int = 1,
    within: float = READY_WITHIN,
) -> AsyncIterator[Cluster]:
    """A cluster that is ready: `async with local_cluster() as cluster: ... cluster.url`.

    Args:
        model: a model directory, or "demo".
        stages: the model's layers are split over so many processes, so that none has much longer than the others; 0 for
            none.
        indexes: index directories, a server each.
        extra: further workers, such as ["echo", "-o", "name=e"].
        directory: for the logs; without one they are gone at the end.
        threads: of each stage.
        within: seconds until it must be ready.

    Raises:
        Refused, WorkerFailed, DeadlineExceeded: see Cluster.ready.
    """
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ralmq-")))
        async with Cluster(directory, bind=bind, insecure=insecure) as cluster:
            for place, part in enumerate(parts(model, stages)):
                options = (f"model={model}", part, f"threads={threads}")
                await cluster.spawn("stage", *flags(*options), name=f"stage-{place}", threads=threads)
            if generator:
                await cluster.spawn("generator", *flags(f"model={model}"))
                if start_of(resolve(model)[1]) is not None:  # an encoder-decoder
                    await cluster.spawn("t5-encoder", *flags(f"model={model}", f"threads={threads}"), threads=threads)
            for path in indexes:
                await cluster.spawn("index", *flags(f"index={path}"))
            for worker, *arguments in extra:
                await cluster.spawn(worker, *arguments)
            await cluster.ready(within)
            yield cluster


def parts(model: str, stages: int) -> list[str]:
    """The option of each stage that says which layers it has, for processes that are as fast as each other.

    The head counts as what it is: of a small model with many tokens it takes as long as several layers.
    """
    if stages > 1:
        alike = [Slot("stage", LARGEST)] * stages
        used = make_plan(weigh(model), alike, ordered=True).used
        if len(used) == stages:
            return [f"layers={share.first}:{share.last}" for share in used]
    return [f"stage={place}/{stages}" for place in range(stages)]


def flags(*pairs: str) -> list[str]:
    """Options `-o key=value` of a worker's command line."""
    return [flag for pair in pairs for flag in ("-o", pair)]
