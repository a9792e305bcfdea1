"""What `ralmq demo` does: a cluster, a datastore, a generation without and with it, and the numbers, each on screen.

Knows the order of things; what is read, measured and drawn is in texts.py, measure.py and show.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from tokenizers import Tokenizer

from ..client.client import Client, connect
from ..client.results import Token
from ..cluster.child import last_line
from ..cluster.cluster import Cluster
from ..schema.errors import DeadlineExceeded, Refused, WorkerFailed
from ..workers.datastore.build import build_datastore
from ..workers.datastore.evaluate import HeldOut, Neighbours, retrieve, score_held_out
from ..workers.datastore.ngram import Trigram
from ..workers.datastore.sources import Document
from ..workers.datastore.tokenized import tokenize
from ..workers.index.stream import TokenStream
from ..workers.models import resolve
from . import measure, show
from .texts import Shares, Texts, folder_texts, numpy_texts

T = TypeVar("T")
Many = Sequence[Document]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How large everything is. Tokens, unless said otherwise.

    Attributes:
        store: indexed at most.
        control: of another topic, indexed at most.
        seconds: that scoring all of it may take; where the machine is slower, less is indexed.
        least: indexed in any case.
    """

    model: str = "demo"
    stages: int = 2
    store: int = 250_000
    control: int = 80_000
    development: int = 4_000
    held_out: int = 8_000
    seconds: float = 50.0
    least: int = 20_000
    generated: int = 72
    k: int = 32
    nprobe: int = 16


# The weight that predicts best leaves much to the model; to see what retrieval knows, a text leans on it.
LEANING = {"knn_lambda": 0.9, "knn_temperature": 3.0}
SHOWN = 4  # documents


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured: the table's rows, and the seconds of each part."""

    rows: Sequence[measure.Row]
    seconds: dict[str, float]


class Speed:
    """Passes progress on, and knows how many tokens a second were scored."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._begun = time.perf_counter()
        self.rate = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "score":
            self.rate = done / (time.perf_counter() - self._begun)
        self._report(stage, done, total)


@dataclass(slots=True)
class Demo:
    """One run under way."""

    plan: Plan
    model: str
    texts: Texts
    tokenizer: Tokenizer
    cluster: Cluster
    client: Client
    console: Console
    directory: Path
    rate: float = 0.0  # tokens scored in a second
    times: dict[str, float] = field(default_factory=dict)


async def main(folder: Path | None = None, plan: Plan | None = None, console: Console | None = None) -> int:
    """Runs the demo and ends; returns 0. Nothing of it stays, however it ends.

    Args:
        folder: retrieve from its texts instead of numpy's docstrings.

    Raises:
        RalmqError, OSError: what went wrong, in one line.
    """
    plan, console = plan or Plan(), console or show.screen()
    begun = time.perf_counter()
    try:
        outcome = await perform(plan, folder, console)
    except asyncio.CancelledError:
        show.stopped()
        raise
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items())
    console.print(f"\nDone in {time.perf_counter() - begun:.0f} s ({spent}).")
    console.print("Every process of the demo has ended, and no file of it is left.")
    return 0


async def perform(plan: Plan, folder: Path | None, console: Console) -> Outcome:
    """The demo itself; whatever it started and wrote is gone when this returns or raises."""
    model, path = resolve(plan.model)
    if not (path / "tokenizer.json").is_file():
        raise Refused(f"{path}: holds no tokenizer.json; the demo needs the model's own")
    begun = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    texts = await asyncio.to_thread(_read, plan, folder, tokenizer)
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ralmq-demo-")))
        cluster = await stack.enter_async_context(Cluster(directory / "logs"))
        client = await stack.enter_async_context(connect(cluster.url, name="demo"))
        demo = Demo(plan, model, texts, tokenizer, cluster, client, console, directory)
        await _come_up(demo)
        demo.times["start"] = time.perf_counter() - begun
        rows = await _watched(cluster, _shown(demo))
    return Outcome(rows, demo.times)


def _read(plan: Plan, folder: Path | None, tokenizer: Tokenizer) -> Texts:
    shares = Shares(plan.store, plan.development, plan.held_out)
    return numpy_texts(tokenizer, shares) if folder is None else folder_texts(folder, tokenizer, shares)


async def _watched(cluster: Cluster, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; WorkerFailed as soon as a process ends under it, instead of a deadline later."""
    working, ended = asyncio.create_task(work), asyncio.create_task(cluster.ended())
    try:
        await asyncio.wait((working, ended), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            child = ended.result()
            code = child.code or 0
            how = f"was killed by signal {-code}" if code < 0 else f"ended ({code}): {last_line(child.log)}"
            raise WorkerFailed(f"{child.name} {how}; run the demo again")
        return working.result()
    finally:
        working.cancel()
        ended.cancel()
        await asyncio.wait((working, ended))
        if not working.cancelled():
            working.exception()  # seen, so that asyncio does not report it


async def _shown(demo: Demo) -> Sequence[measure.Row]:
    scored, stored = await _timed(demo, "datastore", _datastore(demo))
    await _timed(demo, "generation", _generations(demo))
    return await _timed(demo, "numbers", _numbers(demo, scored, stored))


async def _timed(demo: Demo, name: str, work: Coroutine[Any, Any, T]) -> T:
    begun = time.perf_counter()
    result = await work
    demo.times[name] = time.perf_counter() - begun
    return result


# -- 1. the cluster


async def _come_up(demo: Demo) -> None:
    """Starts stages and generator, and shows them until all serve."""
    cluster, plan = demo.cluster, demo.plan
    show.heading(demo.console, "1. A cluster on this machine, each row a process")
    for place in range(plan.stages):
        options = (f"model={plan.model}", f"stage={place}/{plan.stages}")
        await cluster.spawn("stage", *(part for option in options for part in ("-o", option)), name=f"stage-{place}")
    await cluster.spawn("generator", "-o", f"model={plan.model}")
    with Live(console=demo.console, auto_refresh=False) as live:
        ready = asyncio.create_task(cluster.ready())
        try:
            while not ready.done():
                with contextlib.suppress(DeadlineExceeded):
                    live.update(_processes(demo, await demo.client.status(deadline=2.0)), refresh=True)
                await asyncio.wait((ready,), timeout=0.2)
            live.update(_processes(demo, await ready), refresh=True)
        finally:
            ready.cancel()


def _processes(demo: Demo, status: dict[str, Any]) -> Any:
    children = [(child.name, child.pid) for child in demo.cluster.children.values()]
    return show.processes(children, demo.cluster.url, status)


# -- 2. the datastore


async def _datastore(demo: Demo) -> tuple[HeldOut, int]:
    """Scores what is held out, then indexes the documents, as many as there is time for, and serves them."""
    texts, plan = demo.texts, demo.plan
    show.heading(demo.console, f"2. A datastore of {texts.title}, made by the cluster")
    with show.Bars(demo.console) as bars:
        speed = Speed(bars.part(score="held-out text"))
        held_out = await _held_out(demo, plan.development + plan.held_out, speed)
        demo.rate = speed.rate
        labels = {"score": "documents", "train": "train the index", "fill": "fill the index", "serve": "serve it"}
        speed = Speed(bars.part(**labels))
        stored = await _index(demo, texts.index, texts.store, _affordable(demo, plan.store), speed)
    demo.console.print(
        f"{stored:,} tokens indexed, {speed.rate:,.0f} a second; the key of each is the hidden state in front of it. "
        f"Served as search:{texts.index} by process {demo.cluster.children[texts.index].pid}."
    )
    return held_out, stored


async def _held_out(demo: Demo, most: int, report: Report) -> HeldOut:
    return await score_held_out(
        demo.client,
        model=demo.model,
        documents=(*demo.texts.development, *demo.texts.held_out),
        tokenizer=demo.tokenizer,
        max_tokens=most,
        progress=report,
    )


def _affordable(demo: Demo, most: int) -> int:
    """Tokens to score: all of `most`, or its share of what this machine does in the seconds of the plan."""
    share = most / (demo.plan.store + demo.plan.control)
    return min(most, max(demo.plan.least, int(demo.rate * demo.plan.seconds * share)))


async def _index(demo: Demo, name: str, documents: Many, most: int, report: Report) -> int:
    """Indexes the first `most` tokens and starts a process that serves them; returns how many there were."""
    found = await asyncio.to_thread(tokenize, documents, demo.tokenizer, most)
    count = len(found.stream.tokens)
    await build_datastore(
        demo.client,
        model=demo.model,
        name=name,
        documents=documents,
        tokenizer=demo.tokenizer,
        out=demo.directory / name,
        max_tokens=most,
        progress=report,
    )
    report("serve", 0, 1)
    await demo.cluster.spawn("index", "-o", f"index={demo.directory / name}", name=name)
    await demo.cluster.ready()
    report("serve", 1, 1)
    return count


# -- 3. the same prompt without and with retrieval


async def _generations(demo: Demo) -> None:
    texts, console = demo.texts, demo.console
    show.heading(console, "3. The same prompt without and with retrieval, greedy")
    await _generate(demo, {"max_tokens": 2})  # the first call of a process is slower than the others
    for title, options in (
        ("without retrieval", {}),
        (f"with retrieval from {texts.index}", {"retrieve": texts.index, "passages": True, **LEANING}),
    ):
        tokens, rate = await _generate(demo, {"k": demo.plan.k, "nprobe": demo.plan.nprobe, **options})
        text = "".join(token.text for token in tokens)
        console.print(show.generation(f"{title}: {len(tokens)} tokens, {rate:.0f} a second", texts.prompt, text))
    console.print(
        f"The prompt is the beginning of {texts.asked}. It is in the index. These documents held tokens of "
        f"the text above (k = {demo.plan.k}, lambda {LEANING['knn_lambda']:g}, temperature "
        f"{LEANING['knn_temperature']:g}):"
    )
    console.print(show.passages(measure.used(tokens)[:SHOWN]))


async def _generate(demo: Demo, options: dict[str, Any]) -> tuple[list[Token], float]:
    """The tokens, and how many came in a second from the first to the last."""
    tokens: list[Token] = []
    times: list[float] = []
    settings = {"max_tokens": demo.plan.generated, "ignore_eos": True, **options}
    async for token in demo.client.generate(demo.texts.prompt, model=demo.model, **settings):
        tokens.append(token)
        times.append(time.perf_counter())
    return tokens, (len(times) - 1) / max(times[-1] - times[0], 1e-9)


# -- 4. the numbers


async def _numbers(demo: Demo, held: HeldOut, stored: int) -> Sequence[measure.Row]:
    """Held-out bits per byte with and without retrieval, and of the controls."""
    texts, console, plan = demo.texts, demo.console, demo.plan
    show.heading(console, "4. What retrieval is worth, on text that is held out")
    with show.Bars(console) as bars:
        near = await _neighbours(demo, texts.index, held, bars.part(search=f"search:{texts.index}"))
        labels = {"score": "other documents", "serve": "serve them"}
        control = await _index(demo, "control", texts.other, _affordable(demo, plan.control), bars.part(**labels))
        far = await _neighbours(demo, "control", held, bars.part(search="search:control"))
    stream = (await asyncio.to_thread(tokenize, texts.store, demo.tokenizer, stored)).stream
    rows = await asyncio.to_thread(_rows, held, near, far, stream, stored, control)
    console.print(show.numbers(rows))
    console.print(
        f"{len(held.scored.stream.tokens):,} held-out tokens ({held.n_bytes:,} bytes); k = {plan.k}. Weights and "
        f"temperature of each row are chosen on a third of the documents and measured on the others, over "
        f"{len(measure.SEEDS)} draws; ± is half of what lies between them. The wrong documents are Python's language "
        "reference."
    )
    console.print(measure.meaning(rows))
    return rows


def _rows(
    held: HeldOut, near: Neighbours, far: Neighbours, stream: TokenStream, stored: int, control: int
) -> list[measure.Row]:
    text, table = measure.Text(held), Trigram.fit(stream.tokens, held.scored.info.vocab, stream.starts)
    return [
        text.alone("model alone"),
        text.mixed("+ kNN", stored, lambda _: near),
        text.mixed("+ kNN, values shuffled (control)", stored, near.shuffled),
        text.mixed("+ kNN, wrong documents (control)", control, lambda _: far),
        text.mixed("+ n-gram counts", stored, table=table),
        text.mixed("+ kNN and n-gram counts", stored, lambda _: near, table),
    ]


async def _neighbours(demo: Demo, index: str, held: HeldOut, report: Report) -> Neighbours:
    return await retrieve(demo.client, index, held, k=demo.plan.k, nprobe=demo.plan.nprobe, progress=report)
