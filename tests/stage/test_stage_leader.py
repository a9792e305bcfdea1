"""The leader's schedule, driven by stages that compute nothing; no torch, no socket, no clock."""

import random
import subprocess
import sys

import pytest
from ralmq.schema.errors import Refused
from ralmq.schema.message import Return
from ralmq.workers.engine.pool import BLOCK
from ralmq.workers.stage.batch import SCORED, Phase, Sequence, blocks_for
from ralmq.workers.stage.leader import PARAMETERS, Leader
from stage.schedule import Asked, Pipe

SHAPES = [(1, 40, 8, 256), (2, 24, 4, 16), (3, 60, 16, 33), (4, 100, 3, 7), (2, 12, 1, 64), (1, 7, 8, 20)]


def prompt_of(chance: random.Random) -> list[int]:
    """2 to 60 tokens that often begin as those of others do."""
    stem = [chance.randrange(3) * 100 + place for place in range(chance.choice([0, 16, 20, 40]))]
    return [*stem, *[chance.randrange(1000, 9999) for _ in range(chance.randint(2, 20))]]


def wander(seed: int, failures: float = 0.0) -> Pipe:
    """About 30 sequences that come, are read slowly, give up, at random; then everybody reads on until all is over."""
    stages, blocks, rows, chunk = SHAPES[seed % len(SHAPES)]
    pipe = Pipe(seed, stages, blocks, rows, failures, chunk)
    chance = random.Random(-seed)
    for _ in range(600):
        kind = chance.random()
        alive = [asked for asked in pipe.asked.values() if not asked.ends]
        if kind < 0.06 and len(pipe.asked) < 40:
            score = chance.random() < 0.2
            wants, takes, priority = chance.randint(1, 40), chance.choice([0, 0, 1, 3]), chance.choice([4, 4, 4, 6])
            pipe.add(prompt_of(chance), wants, takes, score, priority)
        elif kind < 0.09 and alive:
            pipe.cancel(chance.choice(alive))
        elif kind < 0.2 and alive:
            asked = chance.choice(alive)
            if asked.takes:
                pipe.grant(asked, chance.randint(1, 8))
        else:
            pipe.move()
    pipe.finish()
    return pipe


@pytest.mark.parametrize("failures", [0.0, 0.02])
def test_any_coming_and_going_keeps_the_rules(failures: float) -> None:
    """Thousands of sequences: the rules are in Pipe.check and around it; here is how each must have ended."""
    count = full = failed = preempted = reused = 0
    for seed in range(72):
        pipe = wander(seed, failures)
        assert pipe.free == pipe.blocks and len(pipe.leader) == 0 and pipe.leader.flying == 0
        assert pipe.held == 0, "the last stage keeps a sequence that is over"
        for asked in pipe.asked.values():
            assert asked.ends == 1
            assert asked.gave_up or asked.failed or asked.sequence.scored or asked.has == asked.wants
        assert all(asked.gave_up for key, asked in pipe.asked.items() if key not in set(pipe.order))
        count += len(pipe.asked)
        full += max(tokens for tokens, _ in pipe.batches) == pipe.max_rows
        preempted += pipe.leader.preempted
        reused += pipe.leader.memory.reused
        failed += any(asked.failed for asked in pipe.asked.values())
    assert count > 1800 and full > 10 and preempted > 100 and reused > 1000
    assert failed >= (50 if failures else 0)


def test_each_stage_has_work_and_rows_are_shared_out() -> None:
    """With 4 stages and 16 sequences micro-batches of 4 fill the pipeline, and never more than 8 are under way."""
    pipe = Pipe(0, 4, 400, 64)
    sequences = [pipe.add(3, 50) for _ in range(16)]
    moves = filled = 0
    while not all(asked.ends for asked in sequences):
        pipe.move()
        moves += 1
        filled += pipe.leader.flying >= 4
    tokens = [rows for rows, _ in pipe.batches if rows]
    assert max(tokens) == 4 and sum(tokens) == 16 * 49
    assert len(tokens) < 16 * 49 / 2, "rows that wait go together"
    assert filled > 0.8 * moves, "fewer micro-batches than stages"


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_long_prompt_delays_nobody_by_more_than_a_chunk(stages: int) -> None:
    """Between two rows of a sequence at most one micro-batch with a chunk a stage, however long the prompt is."""
    pipe = Pipe(1, stages, 1000, 64, chunk=32, parks=0.0)
    running = [pipe.add(5, 400) for _ in range(4 * stages)]
    while not all(asked.has > 10 for asked in running):
        pipe.move()
    sent, long = len(pipe.batches), pipe.add(1000, 5)
    while not long.has:
        pipe.move()
    assert [prompts for _, prompts in pipe.batches[sent:] if prompts][:30] <= [32] * 30
    for asked in running:
        chunks = 0
        for keys, (_, prompts) in zip(pipe.riders[sent:], pipe.batches[sent:], strict=True):
            chunks = 0 if asked.sequence.key in keys else chunks + bool(prompts)
            assert chunks <= stages


def test_chunks_of_one_prompt_follow_each_other_through_the_stages() -> None:
    pipe = Pipe(2, 3, 100, 8, chunk=50)
    asked = pipe.add(300, 1)
    assert pipe.leader.flying == 6, "each stage has a chunk before the first has come back"
    pipe.finish()
    assert [prompts for _, prompts in pipe.batches] == [50] * 6 and asked.has == 1


def test_prompts_share_a_chunk_and_ride_with_next_tokens() -> None:
    pipe = Pipe(5, 1, 1000, 64, chunk=30)
    first = [pipe.add(2, 50), pipe.add(2, 50)]  # they fill the pipeline
    rest = [pipe.add(length, 1) for length in (10, 10, 20)]
    while not all(asked.ends for asked in rest):
        pipe.move()
    assert (1, 29) in pipe.batches or (2, 28) in pipe.batches, "two prompts and a part of the third"
    assert not any(asked.ends for asked in first)
    assert sum(prompts for _, prompts in pipe.batches) == 2 + 2 + 40


def test_the_most_urgent_goes_first() -> None:
    """Blocks, prompts and next tokens, each in the order of priority and then of arrival."""
    pipe = Pipe(3, 1, 4, 1, chunk=64)
    low, later = pipe.add(20, 10, priority=1), pipe.add(20, 10, priority=1)
    assert pipe.free == 0
    high = pipe.add(20, 10, priority=9)
    pipe.finish()
    assert pipe.leader.preempted >= 1 and all(asked.has == 10 for asked in (low, later, high))
    pipe = Pipe(4, 1, 100, 1, parks=0.0)
    rows = [pipe.add(4, 60, priority=priority) for priority in (0, 0, 0, 0, 9, 9, 9)]
    while not any(asked.ends for asked in rows):
        pipe.move()
    assert min(asked.has for asked in rows[4:]) > 50 and max(asked.has for asked in rows[:4]) < 5


def test_equals_take_turns() -> None:
    """More sequences than a micro-batch takes: none is left behind."""
    pipe = Pipe(6, 2, 1000, 4)
    asked = [pipe.add(3, 60) for _ in range(24)]
    while max(one.has for one in asked) < 40:
        pipe.move()
    assert min(one.has for one in asked) > 25


def test_a_budget_for_four_serves_sixteen() -> None:
    """What has no room waits, or gives its blocks back and is computed anew; all have all their tokens in the end."""
    pipe = Pipe(7, 2, 4 * 5, 16)
    asked = [pipe.add(40, 40) for _ in range(16)]
    pipe.finish()
    assert all(one.has == 40 and one.ends == 1 for one in asked)
    assert pipe.free == 20 and pipe.leader.preempted > 0


def test_the_first_in_turn_is_never_preempted() -> None:
    pipe = Pipe(8, 1, 10, 8)
    first = pipe.add(17, 120)
    others = [pipe.add(17, 60) for _ in range(6)]
    while not first.ends:
        pipe.move()
        assert first.sequence.blocks or first.ends
    assert pipe.computed[first.sequence.key] == 17 + 119
    pipe.finish()
    assert all(one.has == 60 for one in others) and pipe.leader.preempted > 0


def test_a_common_prefix_is_computed_once() -> None:
    """The second prompt computes what differs; so does a third that comes while the first is being computed."""
    stem = list(range(512))
    pipe = Pipe(9, 2, 200, 8, chunk=64)
    first = pipe.add([*stem, 7000], 20)
    third = pipe.add([*stem, 9000, 9001], 20)
    assert third.sequence.phase is Phase.WAITING, "it pays to wait for what is being computed"
    pipe.finish()
    second = pipe.add([*stem, 8000], 20)
    pipe.finish()
    assert pipe.computed[first.sequence.key] == 513 + 19
    assert pipe.computed[second.sequence.key] == 1 + 19 and pipe.computed[third.sequence.key] == 2 + 19
    assert pipe.leader.memory.reused == 1024 and [asked.has for asked in (first, second, third)] == [20, 20, 20]


def test_the_same_prompt_again_computes_its_last_block() -> None:
    """At least one token is computed, or there would be nothing to sample from; its block is not shared."""
    pipe = Pipe(10, 1, 60, 8)
    for _ in range(3):
        asked = pipe.add(list(range(64)), 3)
        pipe.finish()
    assert pipe.computed[asked.sequence.key] == BLOCK + 2


def test_what_a_sequence_made_is_found_again_too() -> None:
    """A chat's next turn repeats the last one's prompt and answer."""
    pipe = Pipe(11, 1, 60, 8)
    first = pipe.add(list(range(40)), 41)
    pipe.finish()
    again = pipe.add([*first.sequence.tokens, 5, 6, 7], 2)
    pipe.finish()
    assert pipe.computed[again.sequence.key] == len(first.sequence.tokens) + 3 - 5 * BLOCK + 1


def test_a_score_computes_all_of_its_prompt_in_parts_that_its_reader_takes() -> None:
    pipe = Pipe(12, 1, 100, 8, chunk=1000)
    pipe.add(list(range(600)), 1)
    pipe.finish()
    asked = pipe.add(list(range(600)), 1, takes=1, score=True)
    while not pipe.idle:
        pipe.move()
    assert asked.has == 1 and asked.sequence.phase is Phase.PAUSED and asked.sequence.computed == SCORED
    pipe.finish()
    assert asked.has == 3 and pipe.computed[asked.sequence.key] == 599


def test_a_failed_prefix_is_not_found() -> None:
    """Blocks are named once all stages have computed them, not before."""
    pipe = Pipe(13, 2, 60, 8, failures=1.0)
    first = pipe.add(list(range(100)), 5)
    pipe.finish()
    assert first.failed and pipe.leader.memory.cached == 0
    pipe.failures = 0.0
    second = pipe.add(list(range(100)), 5)
    pipe.finish()
    assert second.has == 5 and pipe.computed[second.sequence.key] == 104


def held(phase: Phase, pipe: Pipe) -> Asked:
    """A sequence that has come to a phase and stays there while nothing moves."""
    if phase is Phase.WAITING:
        pipe.add(100, 28)
        return pipe.add(100, 28)
    if phase is Phase.PREFILL:
        return [pipe.add(3, 4) for _ in range(3)][-1]  # a chunk a stage is under way beside next tokens
    if phase is Phase.READY:
        asked = pipe.add(3, 20, takes=1)
        while asked.sequence.phase is not Phase.PAUSED:
            pipe.move()
        for _ in range(2):
            pipe.add(3, 4)
        pipe.grant(asked, 20)  # it waits for more of its like, since each stage has work
        return asked
    asked = pipe.add(3, 20, takes=1 if phase is Phase.PAUSED else 0)
    while asked.sequence.phase is not phase:
        pipe.move()
    return asked


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.PREFILL, Phase.READY, Phase.PAUSED, Phase.AWAITED])
def test_cancel_gives_back_what_it_had(phase: Phase) -> None:
    pipe = Pipe(3, 2, 8, 8)
    asked = held(phase, pipe)
    assert asked.sequence.phase is phase
    free, others, flying = pipe.free, len(pipe.leader) - 1, asked.sequence.flying
    had = len(asked.sequence.blocks)
    pipe.cancel(asked)
    if flying:
        assert asked.ends == 0 and pipe.free == free, "a stage may still write to its blocks"
    else:
        assert asked.ends == 1 and len(pipe.leader) == others
        assert phase is Phase.WAITING or pipe.free >= free + had - 1  # a next one may be admitted
    pipe.cancel(asked)  # again: nothing
    while not pipe.idle:
        pipe.move()
    assert asked.ends == 1 and len(pipe.leader) == pipe.held == 0 and pipe.free == 8


def test_a_pipeline_that_is_over_ends_everything_at_once() -> None:
    pipe = Pipe(4, 2, 20, 4)
    asked = [pipe.add(20, 20, takes) for takes in (0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)]
    for _ in range(40):
        pipe.move()
    pipe.leader.abandon()
    assert all(one.ends == 1 for one in asked) and pipe.free == 20 and not len(pipe.leader)


def test_what_can_never_fit_is_refused() -> None:
    leader = Leader(1, 4, 8)
    sequence = Sequence(bytes(16), 0, [1] * 40, {}, 65, lambda: 0, lambda: None)
    with pytest.raises(Refused, match=r"need 5 KV blocks of 16 tokens, the pipeline has 4: ask for fewer"):
        leader.add(sequence)
    assert len(leader) == 0 and leader.next() is None
    assert [blocks_for(n) for n in (1, 16, 17, 64)] == [1, 1, 2, 4]


def test_rows_that_it_does_not_know_are_passed_over() -> None:
    pipe = Pipe(6, 1, 8, 4)
    asked = pipe.add(3, 5, takes=1)
    while asked.sequence.phase is not Phase.PAUSED:
        pipe.move()
    pipe.leader.returned(0, (Return(bytes(16), 9, 1, True), Return(bytes(16), 9, -1, True)))
    assert asked.sequence.phase is Phase.PAUSED and asked.ends == 0


def test_the_schedule_needs_no_torch() -> None:
    code = "import sys, ralmq.workers.stage.leader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_preempted_score_sends_each_part_once_and_ends() -> None:
    """What is computed again was sent before: it uses up none of what its reader takes."""
    pipe = Pipe(14, 1, 100, 8, chunk=16, parks=0.0)
    asked = pipe.add(list(range(800)), 1, takes=8, score=True)
    taken = 0
    while not asked.ends:
        while not pipe.idle:
            pipe.move()
        if asked.sequence.phase is Phase.PAUSED and asked.has in (16, 32):
            pipe.leader._preempt(asked.sequence)
        assert asked.ends or asked.has > taken, "it stands still, and its reader has taken all that came"
        pipe.grant(asked, asked.has - taken)
        taken = asked.has
    assert pipe.leader.preempted == 2 and asked.has == 50 and not asked.failed


def test_nobody_waits_for_the_prefix_of_a_reader_that_is_slow() -> None:
    pipe = Pipe(15, 1, 400, 8, chunk=64)
    stem = list(range(2000))
    slow = pipe.add(stem, 1, takes=1, score=True)
    while slow.sequence.phase is not Phase.PAUSED:
        pipe.move()
    other = pipe.add([*stem[:400], 9999], 3)
    while not pipe.idle:
        pipe.move()
    assert other.has == 3


def test_slow_readers_of_more_urgent_requests_give_way_last() -> None:
    pipe = Pipe(16, 1, 12, 8, parks=0.0)
    urgent, low = pipe.add(60, 30, takes=1, priority=9), pipe.add(60, 30, takes=0, priority=1)
    while urgent.sequence.phase is not Phase.PAUSED:
        pipe.move()
    pipe.add(60, 5, priority=5)
    while not pipe.leader.preempted:
        pipe.move()
        assert not low.ends
    assert low.sequence.phase is Phase.WAITING
    assert urgent.sequence.blocks, "the one behind gives way first"
    pipe.finish()
    assert low.has == 30 and urgent.has == 30


def test_parameters_of_many_newcomers_do_not_burst_a_micro_batch() -> None:
    pipe = Pipe(17, 1, 400, 64, parks=0.0)
    for _ in range(3):  # they fill the pipeline
        pipe.add(2, 60)
    asked = [pipe.add(2, 3) for _ in range(20)]
    for one in asked:
        one.sequence.size = PARAMETERS // 4
    pipe.finish()
    assert all(one.has == 3 for one in asked) and max(pipe.starts[2:]) == 4
