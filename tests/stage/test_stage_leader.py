"""The leader's schedule, driven by stages that compute nothing; no torch, no socket, no clock."""

import random
import subprocess
import sys

import pytest
from ralmq.schema.errors import Refused
from ralmq.schema.message import Return
from ralmq.workers.stage.leader import PREFILL, Leader, Phase, Sequence, blocks_for
from stage.schedule import Asked, Pipe

SHAPES = [(1, 40, 8), (2, 24, 4), (3, 60, 16), (4, 100, 3), (2, 12, 1)]  # stages, blocks, rows of a micro-batch


def wander(seed: int, failures: float = 0.0) -> Pipe:
    """About 30 sequences that come, are read slowly, give up, at random; then everybody reads on until all is over."""
    stages, blocks, rows = SHAPES[seed % len(SHAPES)]
    pipe = Pipe(seed, stages, blocks, rows, failures)
    chance = random.Random(-seed)
    for _ in range(600):
        kind = chance.random()
        alive = [asked for asked in pipe.asked.values() if not asked.ends]
        if kind < 0.06 and len(pipe.asked) < 40:
            prompt, wants = chance.randint(2, 60), chance.randint(1, 40)
            pipe.add(prompt, wants, chance.choice([0, 0, 1, 3]), score=chance.random() < 0.2)
        elif kind < 0.09 and alive:
            pipe.cancel(chance.choice(alive))
        elif kind < 0.2 and alive:
            asked = chance.choice(alive)
            if asked.takes:
                pipe.grant(asked, chance.randint(1, 8))
        else:
            pipe.move()
    for _ in range(100_000):
        if not pipe.leader._sequences and pipe.idle:
            break
        for asked in pipe.asked.values():
            if asked.takes and asked.sequence.phase is Phase.PAUSED:
                pipe.grant(asked, 16)
        pipe.move()
    return pipe


@pytest.mark.parametrize("failures", [0.0, 0.02])
def test_any_coming_and_going_keeps_the_rules(failures: float) -> None:
    """Thousands of sequences: the rules are in Pipe.check and around it; here is how each must have ended."""
    count = full = failed = 0
    for seed in range(70):
        pipe = wander(seed, failures)
        assert pipe.leader.free_blocks == pipe.blocks and len(pipe.leader) == 0 and pipe.leader.flying == 0
        assert pipe.held == 0, "the last stage keeps a sequence that is over"
        for asked in pipe.asked.values():
            assert asked.ends == 1
            assert asked.gave_up or asked.failed or asked.has == asked.wants
        came = [key for key in pipe.asked if key in set(pipe.order)]
        assert pipe.order == came, "admitted in another order than they came in"
        assert all(asked.gave_up for key, asked in pipe.asked.items() if key not in set(pipe.order))
        count += len(pipe.asked)
        full += max(pipe.prompts + pipe.tokens) == pipe.max_rows
        if failures:
            failed += any(asked.failed for asked in pipe.asked.values())
    assert count > 1800 and full > 10 and failed >= (50 if failures else 0)


def test_each_stage_has_work_and_rows_are_shared_out() -> None:
    """With 4 stages and 16 sequences micro-batches of 4 fill the pipeline, and never more than 8 are under way."""
    pipe = Pipe(0, 4, 400, 64)
    sequences = [pipe.add(3, 50) for _ in range(16)]
    moves = filled = 0
    while not all(asked.ends for asked in sequences):
        pipe.move()
        moves += 1
        filled += pipe.leader.flying >= 4
    assert max(pipe.tokens) == 4 and sum(pipe.tokens) == 16 * 49
    assert len(pipe.tokens) < 16 * 49 / 2, "rows that wait go together"
    assert filled > 0.8 * moves, "fewer micro-batches than stages"


def test_a_sequence_that_is_ready_waits_for_those_before_it_alone() -> None:
    """Prompts that keep coming take every other micro-batch at most."""
    pipe = Pipe(1, 2, 1000, 4)
    first = pipe.add(5, 20)
    prompts = 0
    while not first.ends:
        if len(pipe.leader) < 12:
            pipe.add(30, 2)
            prompts += 1
        pipe.move()
        assert prompts < 400
    assert first.has == 20


def test_who_needs_more_blocks_than_are_free_waits_in_order() -> None:
    pipe = Pipe(2, 1, 8, 8)
    large = [pipe.add(33, 32) for _ in range(2)]  # 4 blocks each
    waiting, small = pipe.add(33, 32), pipe.add(2, 2)
    assert [asked.sequence.phase for asked in large] == [Phase.FLYING] * 2
    assert pipe.leader.free_blocks == 0
    while not any(asked.ends for asked in large):
        assert waiting.sequence.phase is small.sequence.phase is Phase.WAITING
        pipe.move()
    while not (waiting.ends and small.ends):
        pipe.move()
    assert pipe.order == [asked.sequence.key for asked in (*large, waiting, small)]


def held(phase: Phase, pipe: Pipe) -> Asked:
    """A sequence that has come to a phase and stays there while nothing moves."""
    if phase is Phase.WAITING:
        pipe.add(100, 28)
        return pipe.add(100, 28)
    if phase is Phase.FRESH:
        while pipe.leader.flying < 2 * pipe.stages:
            pipe.add(3, 4)
        asked = pipe.add(3, 4)
        pipe.leader._admit()
        return asked
    if phase is Phase.READY:
        asked = pipe.add(3, 20, takes=1)
        while asked.sequence.phase is not Phase.PAUSED:
            pipe.move()
        while pipe.leader.flying < 2 * pipe.stages:
            pipe.add(3, 4)
        pipe.grant(asked, 20)
        return asked
    asked = pipe.add(3, 20, takes=1 if phase is Phase.PAUSED else 0)
    while asked.sequence.phase is not phase:
        pipe.move()
    return asked


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.FRESH, Phase.READY, Phase.PAUSED, Phase.FLYING])
def test_cancel_gives_back_what_it_had(phase: Phase) -> None:
    pipe = Pipe(3, 2, 8, 1)
    asked = held(phase, pipe)
    assert asked.sequence.phase is phase
    free, others = pipe.leader.free_blocks, len(pipe.leader) - 1
    had = len(asked.sequence.blocks)
    pipe.cancel(asked)
    if phase is Phase.FLYING:
        assert asked.ends == 0 and pipe.leader.free_blocks == free, "a stage may still write to its blocks"
    else:
        assert asked.ends == 1 and len(pipe.leader) == others
        assert phase is Phase.WAITING or pipe.leader.free_blocks >= free + had - 1  # a next one may be admitted
    pipe.cancel(asked)  # again: nothing
    while not pipe.idle:
        pipe.move()
    assert asked.ends == 1 and len(pipe.leader) == pipe.held == 0 and pipe.leader.free_blocks == 8


def test_a_pipeline_that_is_over_ends_everything_at_once() -> None:
    pipe = Pipe(4, 2, 20, 4)
    asked = [pipe.add(20, 20, takes) for takes in (0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)]
    for _ in range(40):
        pipe.move()
    pipe.leader.abandon()
    assert all(one.ends == 1 for one in asked) and pipe.leader.free_blocks == 20 and not len(pipe.leader)


def test_what_can_never_fit_is_refused() -> None:
    leader = Leader(1, 4, 8)
    sequence = Sequence(bytes(16), 0, [1] * 40, {}, 65, lambda: 0, lambda: None)
    with pytest.raises(Refused, match=r"need 5 KV blocks of 16 tokens, the pipeline has 4: ask for fewer"):
        leader.add(sequence)
    assert len(leader) == 0 and leader.next() is None
    assert [blocks_for(n) for n in (1, 16, 17, 64)] == [1, 1, 2, 4]


def test_prompts_share_a_micro_batch_up_to_a_bound() -> None:
    pipe = Pipe(5, 1, 1000, 64)
    for length in (2, 2, PREFILL - 10, 5, 5, 1, PREFILL + 100, 3):  # the first two fill the pipeline
        pipe.add(length, 1)
    while len(pipe.leader):
        pipe.move()
    assert pipe.prompts == [1, 1, 3, 1, 1, 1]


def test_rows_that_it_does_not_know_are_passed_over() -> None:
    pipe = Pipe(6, 1, 8, 4)
    asked = pipe.add(3, 5, takes=1)
    while asked.sequence.phase is not Phase.PAUSED:
        pipe.move()
    pipe.leader.returned(0, (Return(*asked.sequence.key, -1, True), Return(bytes(16), 9, 1, True)))
    assert asked.sequence.phase is Phase.PAUSED and asked.ends == 0


def test_the_schedule_needs_no_torch() -> None:
    code = "import sys, ralmq.workers.stage.leader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
