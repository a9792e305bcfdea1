"""What a plan says: who takes what, why, how fast, and what does not fit; and how users write memory and speed."""

import json
from typing import Any

import pytest
from ralmq.cli.main import app
from ralmq.errors import Refused
from ralmq.schema.plan.model import Load, Model, model_of
from ralmq.schema.plan.plan import Plan, make_plan
from ralmq.schema.plan.sizes import read_size, size_text
from ralmq.schema.plan.slots import Slot, devices_of, read_slots
from typer.testing import CliRunner

GB = 10**9
MODEL = Model("m", (GB,) * 8, (GB,) * 8, kv=1000, first=2 * GB, last=2 * GB)
GIB = 1 << 30


def split(*workers: str, **more: Any) -> Plan:
    return make_plan(MODEL, [slot for text in workers for slot in read_slots(text)], **{"kv_tokens": 16, **more})


def counts(plan: Plan) -> dict[str, int]:
    return {share.slot.name: share.last - share.first for share in plan.shares}


def why(plan: Plan, name: str) -> str:
    return next(share.why for share in plan.shares if share.slot.name == name)


def test_three_unequal_workers_get_unequal_spans() -> None:
    plan = split("fast=20GB,20", "middle=20GB,10", "slow=20GB,5")
    assert counts(plan) == {"fast": 4, "middle": 3, "slow": 1} or counts(plan) == {"fast": 5, "middle": 2, "slow": 1}
    assert plan.used[0].first == 0 and plan.used[-1].last == 8
    slowest = max(share.seconds for share in plan.used)
    assert plan.together == pytest.approx(1 / slowest)
    assert plan.alone == pytest.approx(1 / sum(share.seconds for share in plan.used))
    assert sum(share.why == "the slowest stage: it sets the pace" for share in plan.used) == 1


def test_memory_bounds_what_a_fast_worker_takes() -> None:
    plan = split("fast=4.1GB,100", "big=40GB,5")
    assert counts(plan) == {"fast": 4, "big": 4} or counts(plan) == {"fast": 2, "big": 6}
    assert why(plan, "fast") == "its memory takes no layer more"


def test_the_head_is_read_and_the_embedding_only_held() -> None:
    """Both ends have 2 GB: the first stage holds as much as the last, and reads less."""
    load = Load(MODEL, 16)
    assert load.weights(0, 1) == load.weights(7, 8) == 3 * GB
    assert (load.read(0, 1), load.read(7, 8), load.read(3, 3)) == (GB, 3 * GB, 0)
    assert load.cache(0, 8) == 8 * 16 * 1000
    assert counts(split("a=20GB,10", "b=20GB,10", ordered=True)) == {"a": 5, "b": 3}


def test_a_tied_embedding_is_held_once_by_one_and_twice_by_two() -> None:
    tied = Load(Model("t", (GB,) * 2, (GB,) * 2, 0, first=3 * GB, last=3 * GB, shared=3 * GB, each=7), 16)
    assert tied.weights(0, 2) == 5 * GB + 7
    assert tied.weights(0, 1) + tied.weights(1, 2) == 8 * GB + 14
    assert tied.weights(1, 1) == tied.cache(1, 1) == 0


def test_equal_workers_get_even_spans_in_their_order() -> None:
    plan = make_plan(
        Model("e", (GB,) * 10, (GB,) * 10, 0, 0, 0), [Slot(n, 99 * GB, 10.0) for n in "abcd"], ordered=True
    )
    assert sorted(counts(plan).values()) == [2, 2, 3, 3]
    assert [share.slot.name for share in plan.used] == list("abcd")


def test_a_worker_that_would_only_slow_the_others_down_is_left_out() -> None:
    plan = split("fast=20GB,50", "snail=20GB,0.1")
    assert counts(plan) == {"fast": 8, "snail": 0} and not plan.shares[-1].used
    assert why(plan, "snail") == "one layer would be slower than the slowest stage"
    assert why(split("fast=20GB,50", "tiny=1MB,50"), "tiny") == "no layer fits its memory"
    assert why(split("fast=20GB,50", "small=2GB,50", ordered=True), "small") == "no split with it is faster"


def test_the_rest_is_spread_evenly() -> None:
    """One layer is as heavy as eight others: who has the others could have more of them, and has half."""
    sizes = (GB, GB, GB, GB, 8 * GB)
    slots = [Slot(name, 99 * GB, 10.0) for name in "abc"]
    plan = make_plan(Model("l", sizes, sizes, 0, 0, 0), slots, ordered=True)
    assert [share.last - share.first for share in plan.used] == [2, 2, 1]
    assert [share.why for share in plan.used] == [
        *["the rest, spread evenly"] * 2,
        "the slowest stage: it sets the pace",
    ]


def test_one_layer_more_would_make_it_the_slowest() -> None:
    sizes = (GB,) * 3
    plan = make_plan(Model("l", sizes, sizes, 0, 0, 0), [Slot(name, 99 * GB, 10.0) for name in "ab"])
    assert sorted((share.last - share.first, share.why) for share in plan.used) == [
        (1, "one layer more would make it the slowest"),
        (2, "the slowest stage: it sets the pace"),
    ]


def test_without_speeds_all_are_alike_and_nothing_is_predicted() -> None:
    plan = split("a=20GB", "b=20GB", ordered=True)
    assert not plan.measured and plan.as_map()["tokens_per_s"] is None
    assert counts(plan) == {"a": 5, "b": 3}
    half = split("a=20GB,10", "b=20GB", ordered=True)
    assert [share.slot.speed for share in half.shares] == [10.0, 10.0] and not half.measured


def test_kv_tokens_are_whole_blocks() -> None:
    assert split("a=20GB,1", kv_tokens=17).load.kv_tokens == 32


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        (
            ("a=4GB", "b=4GB"),
            "11.2 GiB of weights and 125 KiB of cache for 16 tokens in 7.45 GiB of memory, 3.73 GiB too",
        ),
        (
            ("a=2.5GB", "b=2.5GB", "c=2.5GB", "d=2.5GB", "e=2.5GB"),
            "layer 0 and the embedding take 2.79 GiB, the largest",
        ),
        (
            ("a=3.1GB", "b=1.9GB", "c=1.9GB", "d=1.9GB", "e=1.9GB", "f=1.9GB", "g=1.9GB"),
            "find a place, the rest with the head",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_how_much(workers: tuple[str, ...], said: str) -> None:
    with pytest.raises(Refused, match=r"^m does not fit: ") as caught:
        split(*workers)
    assert said in caught.value.message and "add a worker, give more memory, or fewer KV tokens" in caught.value.message


def test_a_plan_needs_somebody() -> None:
    with pytest.raises(Refused, match="a plan needs a worker"):
        make_plan(MODEL, [])


def test_the_cache_of_a_stage_in_mib() -> None:
    load = Load(Model("m", (1, 1), (1, 1), kv=1 << 16, first=0, last=0), 17)
    assert (load.kv_mib(0, 1), load.kv_mib(0, 2), load.kv_mib(0, 2, 3)) == (2, 4, 2)
    assert Load(load.model, 1).kv_mib(0, 1) == 1


def test_sizes_as_people_write_them() -> None:
    for text, size in (
        ("8GiB", 8 * GIB),
        ("1.5 MiB", 3 << 19),
        ("20GB", 20 * GB),
        ("9000000", 9_000_000),
        ("512kib", 512 << 10),
    ):
        assert read_size(text) == size
    for wrong in ("", "GiB", "-1GiB", "8 gigs", "0", "1e9", "9" * 400, "2000000TiB", "0.5", "0.0001KiB", "8"):
        with pytest.raises(Refused, match="no amount of memory"):
            read_size(wrong)
    shown = [size_text(size) for size in (0, 1023, 1024, 5 * GIB, -(3 << 19), 1005 << 20, 5000 << 40)]
    assert shown == ["0 B", "1023 B", "1 KiB", "5 GiB", "-1.5 MiB", "1005 MiB", "5000 TiB"]


def test_devices_as_people_write_them() -> None:
    assert read_slots("w=8GiB") == [Slot("w", 8 * GIB)]
    assert read_slots("w=cuda:0:20GiB+cpu:8GiB,900+12.5") == [
        Slot("w", 20 * GIB, 900.0, "cuda:0"),
        Slot("w", 8 * GIB, 12.5, "cpu"),
    ]
    assert [slot.speed for slot in devices_of("w", "cuda:0:1GiB+cuda:1:1GiB", (5.0,))] == [5.0, 5.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w", "give NAME=MEMORY"),
        ("=8GiB", "give NAME=MEMORY"),
        ("a b=8GiB", "give NAME=MEMORY"),
        ("w=", "no memory of a device"),
        ("w=gpu:8GiB", "no memory of a device"),
        ("w=cuda:0", "no amount of memory"),
        ("w=8GiB+9GiB", "device cpu is named twice"),
        ("w=8GiB,", "no speed"),
        ("w=8GiB,fast", "no speed"),
        ("w=8GiB,-1", "no speed"),
        ("w=8GiB,inf", "no speed"),
        ("w=8GiB,1e-320", "no speed"),
        ("w=8GiB,1e7", "no speed"),
        ("w=8GiB,1+2", "2 speeds for 1 devices"),
    ],
)
def test_what_is_no_worker_is_refused(text: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        read_slots(text)


def test_a_model_travels_as_it_is() -> None:
    assert model_of(json.loads(json.dumps(MODEL.as_map()))) == MODEL
    for wrong in ({}, {**MODEL.as_map(), "layers": []}, {**MODEL.as_map(), "kv": 1.5}, {**MODEL.as_map(), "name": 7}):
        with pytest.raises(Refused):
            model_of(wrong)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", "--model", "demo", *arguments], prog_name="ralmq")


def test_the_command_shows_the_split() -> None:
    done = command("--worker", "a=24MiB,10", "--worker", "b=cuda:0:24MiB,5", "--kv-tokens", "256")
    assert done.exit_code == 0, done.output
    assert "demo: 6 layers, 15.3 MiB of weights, cache of 256 tokens" in done.output
    assert "b cuda:0: " in done.output and "predicted tokens/s: " in done.output and "assumed" not in done.output


def test_the_command_prints_one_document() -> None:
    found = json.loads(command("--worker", "a=1GiB", "--json").stdout)
    assert found["assumed_speed"] == ["a"] and found["stages"][0]["speed"] > 0
    assert found["stages"][0] | {"worker": "a", "first": 0, "last": 6, "device": "cpu"} == found["stages"][0]
    assert found["tokens_per_s"]["one"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --worker NAME=MEMORY[,SPEED] at least once"),
        (("--worker", "a=1GiB", "--worker", "a=2GiB"), "--worker a is given twice"),
        (("--worker", "a=1MiB"), "demo does not fit"),
        (("--worker", "a=1GiB", "--dtype", "fp31"), "dtype fp31 is unknown"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1
