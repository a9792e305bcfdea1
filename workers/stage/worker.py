"""The built-in worker `stage`: the link's side of a pipeline stage. Knows messages and their order, no layer."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import msgpack
import torch

from ...schema.errors import Malformed, Refused, WorkerFailed, WorkerLost
from ...schema.frame import RETURN, Prefix
from ...schema.limits import MAX_ROWS, NO_ID
from ...schema.message import Beat, Direct, Error, Form, Gone, Return, Span, Step
from ..base import ELSEWHERE, Answer, Request, Worker
from ..direct.address import known
from ..engine.errors import RankLost
from ..hooks import check_hooks, load_hooks
from ..params import Task
from .batch import Key, Sequence
from .clock import Stopwatch
from .cross import before, remember, states_of, step_of
from .last import Outcome, Sent
from .leader import CHUNK, Leader
from .narrow import check_wire
from .placing import Offer, settled
from .prompts import Indexes, own_tokens, prompt_of
from .ring import Ring
from .runner import Runner
from .searches import Searches
from .weights import Loaded, load, place_of

log = logging.getLogger("ralmq.stage")
MOST = 64 << 10  # bytes of a request's options
PLANES = ("hub", "ring")


class Stage(Worker):
    """Some layers of a model, in a pipeline with the stages that hold the others.

    Args:
        model: a Hugging Face directory, or demo.
        stage: place and number of stages with an even split, as 0/2; or give layers; or auto: the broker decides, for
            the fastest split over all that ask (auto/3: over the three that are to come).
        layers: first and last (exclusive) layer, as 0:6.
        name: the model's name in `lm:<name>`; the directory's name where not given.
        threads: of torch.
        device: cpu, cuda, cuda:1 ...
        dtype: fp32, bf16, fp16, or int8 for the matrices alone.
        kv_mib: memory for keys and values.
        max_rows: sequences in one micro-batch.
        capacity: requests that the leader takes at a time, waiting ones included.
        chunk: tokens of prompts in one micro-batch; next tokens wait for at most about that many.
        packed: lay matrices out for this machine's processor, which is faster.
        tp: processes that compute together, this one among them, each with a part of every layer (tensor parallel);
            kv_mib is of each. On GPUs they take `device` and those behind it.
        deterministic: tokens of each call, always, so that a replay gives the same bits whatever runs beside it (0 = as
            many as there are); the same on all stages. It costs: `ralmq bench engine` prints how much.
        hooks: logits hooks that requests may name: my_pkg:Class or entry points, with commas; the same on all stages.
        memory: with stage=auto, what weights and cache may take, as 8GiB; 80 % of what is free where not given.
        speed: with stage=auto, GB/s of weights that are read for a token; measured where not given.
        kv_tokens: with stage=auto, tokens whose keys and values are kept, 4096 where not given, in place of kv_mib.
        data_plane: hub, every hop through the broker; or ring, straight to the next stage where that one has ring, too.
        address: of this machine, as the other stages of a ring see it; by default that of its way to the broker.
        wire: hidden states to the next stage as they are (raw), or smaller for a slow link: fp16, int8.
    """

    def __init__(
        self,
        *,
        model: str,
        stage: str = "",
        layers: str = "",
        name: str = "",
        threads: int = 1,
        device: str = "cpu",
        dtype: str = "fp32",
        kv_mib: int = 256,
        max_rows: int = 64,
        capacity: int = 128,
        chunk: int = CHUNK,
        packed: bool = True,
        tp: int = 1,
        deterministic: int = 0,
        hooks: str = "",
        memory: str = "",
        speed: float = 0.0,
        kv_tokens: int = 0,
        data_plane: str = "hub",
        address: str = "",
        wire: str = "raw",
    ) -> None:
        numbers = {"threads": threads, "kv_mib": kv_mib, "max_rows": max_rows, "capacity": capacity, "chunk": chunk}
        numbers["tp"] = tp
        for option, value in numbers.items():
            if value < 1:
                raise Refused(f"{option}={value} is too small: give at least 1")
        if deterministic < 0:
            raise Refused(f"deterministic={deterministic} is too small: give how many tokens a call has, or 0")
        if max_rows > MAX_ROWS:
            raise Refused(f"max_rows={max_rows} is too large: give at most {MAX_ROWS}")
        if data_plane not in PLANES:
            raise Refused(f"data_plane={data_plane} is unknown: give {' or '.join(PLANES)}")
        self._wire, self._address = check_wire(wire), known(address) if data_plane == "ring" else None
        self._ring: Ring | None = None
        self._brokered = 0  # STEPs that went through the broker
        self.capacity = capacity
        self._hooks = load_hooks(hooks)
        self._place = place_of(model, stage, layers, name)
        self._chunk = chunk
        alone = tp == 1 and not deterministic
        self._offer = Offer.read(stage, memory, speed, kv_tokens, device, dtype, alone=alone)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "kv_mib": kv_mib, "max_rows": max_rows}
        options |= {"packed": packed, "deterministic": deterministic, "tp": tp, "threads": threads}
        self._load = partial(load, **options)
        self._compute = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (threads,))
        self._waiting = 0  # calls handed to the compute thread and not back yet
        self._reset: Future[None] | None = None  # the compute thread is done with what it had in hand before
        self._pipeline = NO_ID
        self._stages = 0
        self._leader: Leader | None = None
        self._work = Stopwatch()
        self._loaded: Loaded | None = None
        self._broken = ""  # why it can compute no more
        self._searches = Searches(lambda work: self._submit(work, partial(self._publish, 0)))

    async def start(self) -> None:
        """Loads the layers; HELLO is said afterwards.

        Raises:
            Refused: the checkpoint is missing, broken or of an unknown family.
        """
        self._loop = asyncio.get_running_loop()
        async with settled(self._place, self._offer, lambda: self.host) as given:
            self._place, self.labels = given.place, given.labels
            loading = partial(self._load, given.place, **given.options)
            self._loaded = await self._loop.run_in_executor(self._compute, loading)
        self._runner = Runner(self._loaded.span, self._place.name, self._loaded.fingerprint, self._hooks, self._wire)
        self._indexes = Indexes(self._loaded)
        self._loaded.watch(lambda said: self._loop.call_soon_threadsafe(self._rank_lost, said))
        if self._address is not None:
            self._ring = Ring(
                self.host.url, self.take, lambda why: self.host.link.renew(why), self._around, self._address
            )

    async def stop(self) -> None:
        if self._ring is not None:
            self._ring.close()
        self._compute.shutdown(wait=False, cancel_futures=True)
        if self._loaded is not None:
            await asyncio.to_thread(self._loaded.close)

    @property
    def span(self) -> Span | None:
        return self._loaded.offer if self._loaded is not None else None

    @property
    def direct(self) -> Direct | None:
        return self._ring.direct if self._ring is not None else None

    # -- requests: only the leader gets them

    async def handle(self, request: Request) -> Answer:
        """One request of `lm:<model>`; the last stage answers it."""
        assert self._loaded is not None
        leader = self._leader
        task = Task.of(request.body)
        states = states_of(request, task, self._loaded)
        ids = prompt_of(request, task, self._loaded)
        if states is not None:
            task, ids = before(task, ids, states, self._loaded)
        check_hooks(task.hooks, self._hooks)
        # Packed, so that no structure within it counts against the bounds of the STEP that it shares with others.
        packed: bytes = msgpack.packb(task.model_dump(exclude_defaults=True))
        if len(packed) > MOST:
            raise Refused(f"the options have {len(packed)} bytes, at most {MOST} may travel: name less in them")
        params: dict[str, Any] = {"task": packed}
        if request.deadline:
            params["seconds"] = max(0.001, request.deadline - self._loop.time())
        need = len(ids) - 1
        if task.mode == "score":
            params["feed"] = len(ids) - 1
        else:
            params["limit"] = min(task.max_tokens, self._loaded.context - len(ids))
            need = len(ids) + params["limit"] - 1
        if task.retrieve is not None:
            params["metric"] = await self._indexes.check(self.host.client, task.retrieve, request)
        if leader is None or leader is not self._leader:  # also while an index was asked
            raise WorkerLost(f"the pipeline of {self._place.name} is over: ask again")
        ended: asyncio.Future[None] = self._loop.create_future()
        key = (request.id, request.attempt)
        until, over = (lambda: request.until), (lambda: _resolve(ended))
        sequence = Sequence(*key, ids, params, need, until, over, request.priority)
        sequence.own, sequence.size = own_tokens(task, len(ids)), len(packed)
        if states is not None:
            remember(sequence, states)
        leader.add(sequence)
        request.granted = partial(self._granted, leader, key)
        self._drive()
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            leader.cancel(key)
            self._drive()
            await ended  # the credit goes back when no stage writes to its blocks any more
            raise
        return ELSEWHERE

    def _granted(self, leader: Leader, key: Key) -> None:
        leader.granted(key)
        self._drive()

    # -- messages of the pipeline

    def take(self, prefix: Prefix, message: Any) -> None:
        if isinstance(message, Form):
            self._form(prefix.id, message)
        elif isinstance(message, Gone) and prefix.id == self._pipeline:
            self._over()
        elif isinstance(message, Step) and prefix.id == self._pipeline:
            if prefix.flags & RETURN:
                self._returned(message.batch, message.returns)
            else:
                self._run(message)

    def forgotten(self) -> None:
        self._over()

    async def ready(self) -> None:
        """Waits for the compute thread: as long as it hangs, each pipeline that this stage is part of would hang, too.

        Raises:
            WorkerFailed: no progress for another stall limit, or a rank is lost.
        """
        if self._broken and self._loaded is not None:
            raise WorkerFailed(await asyncio.to_thread(self._loaded.why, self._broken))
        while self._reset is not None and not self._reset.done():
            before = self._runner.progress
            await asyncio.wait([asyncio.wrap_future(self._reset)], timeout=self.stall_limit)
            if not self._reset.done() and self._runner.progress == before:
                raise WorkerFailed(
                    f"the computation of this stage hangs ({self.stall_limit:g} s without progress): see its device"
                )

    def beat(self, beat: Beat) -> Beat:
        """Progress is layers computed, since one STEP may hold a long prompt; work in hand is what the thread has."""
        runner = self._runner
        gauges: dict[str, Any] = {"steps": runner.steps, "compute_s": round(runner.seconds, 3)}
        if runner.last is not None:
            gauges["answering"] = len(runner.last)
        gauges["hub_steps"] = self._brokered
        if self._ring is not None:
            gauges |= {"ring_steps": self._ring.sent, "ring_bytes": self._ring.bytes}
        if self._leader is not None:
            gauges |= {"work_s": round(self._work.seconds, 3), **self._leader.gauges}
        return replace(beat, progress=runner.progress, busy=self._waiting, gauges=gauges)

    def _rank_lost(self, said: str) -> None:
        """The stage ends as if it were lost itself: the broker ends its pipeline, and `ready` this worker."""
        self._broken = said
        self.host.link.renew(said)

    def _form(self, pipeline: bytes, form: Form) -> None:
        self._over()
        self._pipeline, self._stages = pipeline, form.stages
        if form.place == 0:
            self._leader = Leader(form.stages, form.kv_blocks, form.max_rows, self._chunk)
        if self._ring is not None:
            self._ring.form(pipeline, form.onward)
        log.info("stage %d/%d of %s", form.place, form.stages, form.model)

    def _over(self) -> None:
        """The pipeline is no more: its sequences end here without a word, since the broker has answered them."""
        leader, self._leader = self._leader, None
        self._pipeline = NO_ID
        if self._ring is not None:
            self._ring.over()
        self._work.reset()
        self._searches.cancel()
        if leader is not None:
            leader.abandon()
        if self._loaded is not None:
            self._reset = self._compute.submit(self._runner.reset)

    # -- the schedule and the computation

    def _drive(self) -> None:
        """Hands micro-batches to the compute thread for as long as the leader has any to send."""
        if self._leader is None:
            return
        while (batch := self._leader.next()) is not None:
            self._run(step_of(batch))
        self._work.run(self._leader.working)

    def _run(self, step: Step) -> None:
        self._submit(partial(self._runner.run, step), partial(self._computed, step))

    def _submit(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Runs `work` in the compute thread, in order; what follows in the event loop, if the pipeline still stands."""
        pipeline = self._pipeline

        def ended(future: Future[Any]) -> None:
            self._waiting -= 1
            if pipeline != self._pipeline:
                return
            try:
                done(future.result())
            except RankLost as error:
                self._rank_lost(str(error))
            except Exception as error:  # the pipeline's rows are not what the leader takes them for: begin anew
                log.exception("a stage cannot go on")
                self.host.link.renew(f"{type(error).__name__}, see above")  # its words may be a request's

        def told(future: Future[Any]) -> None:  # in the compute thread; straight to `ended`: a hop waits for it
            with contextlib.suppress(RuntimeError):  # the loop is closed
                if not future.cancelled():
                    self._loop.call_soon_threadsafe(ended, future)

        self._waiting += 1
        self._compute.submit(work).add_done_callback(told)

    def _computed(self, step: Step, result: tuple[Step | None, Outcome]) -> None:
        onward, outcome = result
        self._publish(step.batch if onward is None else 0, outcome)
        if onward is None:
            return
        try:
            self._send(onward)
        except Malformed as error:  # more than a message holds: rows that do not fit must end, too
            self._computed(step, self._runner.failed(step, error))
        except Exception as error:  # a device that failed while the values were copied
            log.exception("a step cannot be sent")
            failure = WorkerFailed(f"a stage of {self._place.name} failed: {type(error).__name__}: {error}")
            self._computed(step, self._runner.failed(step, failure))

    def _publish(self, number: int, outcome: Outcome) -> None:
        """What follows from a computation: queries to indexes, rows to the leader, parts and ends to the askers.

        The rows early: the pipeline waits for them. Before them the ends of sequences, since a leader that has its row
        back lists the sequence no more, and the broker would miss it. A part that cannot travel ends its sequence.
        """
        for query in outcome.queries:
            assert self._runner.last is not None
            self._searches.begin(self.host.client, self._runner.last, query)
        ended = {(row.id, row.attempt) for row in outcome.returns if row.done}
        self._answer([sent for sent in outcome.sent if sent[1] in ended] if ended else [])
        if number or outcome.returns:
            self._give_back(number, tuple(outcome.returns))
        self._answer([sent for sent in outcome.sent if sent[1] not in ended] if ended else outcome.sent)

    def _answer(self, messages: list[Sent]) -> None:
        broken: set[Key] = set()
        for message, key, sequence in messages:
            try:
                if key not in broken:
                    self.host.link.send(message, id=key[0], attempt=key[1], sequence=sequence)
            except Malformed as error:
                broken.add(key)
                self._unsendable(key, WorkerFailed(f"a part of the answer cannot travel: {error.message}"))

    def _unsendable(self, key: Key, error: WorkerFailed) -> None:
        last = self._runner.last
        assert last is not None
        self.host.link.send(Error(error.code, error.message[:2000]), id=key[0], attempt=key[1])
        self._submit(partial(last.fail, [key], error), partial(self._publish, 0))

    def _give_back(self, number: int, returns: tuple[Return, ...]) -> None:
        """Where a sequence ends, by the way of its FINAL and behind it: a leader that had the row before the broker has
        the end would list the sequence no more, and the broker would take it for lost."""
        if self._leader is not None:
            self._returned(number, returns)
        elif any(row.done for row in returns):
            self._around(Step(returns=returns, batch=number), RETURN)
        else:
            self._send(Step(returns=returns, batch=number), RETURN)

    def _send(self, step: Step, flags: int = 0) -> None:
        if self._ring is None or not self._ring.send(step, self.host.link.epoch, flags):
            self._around(step, flags)

    def _around(self, step: Step, flags: int) -> None:
        """Through the broker."""
        self.host.link.send(step, id=self._pipeline, flags=flags)
        self._brokered += 1

    def _returned(self, number: int, returns: tuple[Return, ...]) -> None:
        if self._leader is not None:
            self._leader.returned(number, returns, self._loop.time())
            self._drive()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
