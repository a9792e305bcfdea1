"""The collectives against numpy and torch: worlds of 1 to 5, uneven sizes, dtypes, small and large arrays."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from ralmq.workers.group import collectives, mesh
from ralmq.workers.group.arrays import OPS, narrowed
from ralmq.workers.group.group import Group
from worlds import cluster, world

STEP = {"sum": np.add, "mean": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}
SIZES = [1, 2, 3, 4, 5]
SMALL = 1 << 14  # here; so that what is larger need not be large
LARGE = SMALL // 4 + 1003  # float32 elements: more than go to rank 0, and no multiple of any world
DTYPES = ["float32", "float64", "float16", "int64", "int32", "uint8"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "SMALL", SMALL)


def values(rank: int, count: int, dtype: str = "float32") -> Any:
    """Other ones for each rank; of each sign where the dtype has them."""
    drawn = np.random.default_rng(rank).normal(0, 3, count)
    return (np.abs(drawn) if dtype == "uint8" else drawn).astype(dtype)


def wanted(op: str, arrays: list[Any]) -> Any:
    """By numpy, in the order of the ranks."""
    dtype = arrays[0].dtype
    if op == "mean" and dtype.kind in "iu":
        return functools.reduce(np.add, [array.astype(np.float64) for array in arrays]) / len(arrays)
    wide = np.dtype(np.float32) if dtype == np.float16 else dtype
    made = functools.reduce(STEP[op], [array.astype(wide) for array in arrays])
    if op == "mean":
        made = made / wide.type(len(arrays))
    return np.asarray(made, dtype)


def same(found: Any, expected: Any) -> None:
    """Bit for bit."""
    assert isinstance(found, np.ndarray) and found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
    found[...] = 0  # it is the caller's own


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", SIZES)
async def test_reductions_are_those_of_numpy(size: int) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (7,), (3, 5), (LARGE,), (2, LARGE)]

    async def act(group: Group) -> None:
        for shape in shapes:
            for op in OPS:
                for dtype in DTYPES if shape in ((7,), (LARGE,)) else ["float32"]:
                    arrays = [values(rank, int(np.prod(shape)), dtype).reshape(shape) for rank in range(size)]
                    own = arrays[group.rank].copy()
                    expected = wanted(op, arrays)
                    same(await group.all_reduce(own, op), expected)
                    root = size - 1
                    found = await group.reduce(own, op, root)
                    assert (found is None) == (group.rank != root)
                    if found is not None:
                        same(found, expected)
                    assert np.array_equal(own, arrays[group.rank]), "what was given is left alone"

    async with cluster() as all_of_it:
        await world(all_of_it.url, size, act)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("unit", [1, LARGE])
async def test_what_is_only_moved_arrives_as_it_is_whatever_its_size(size: int, unit: int) -> None:
    parts = [values(rank, rank * unit).reshape(rank, unit) for rank in range(size)]  # rank 0's is empty

    async def act(group: Group) -> None:
        rank = group.rank
        for root in range(size):
            same(await group.broadcast(parts[rank] if rank == root else None, root), parts[root])
            same(await group.scatter(parts if rank == root else None, root), parts[rank])
            found = await group.gather(parts[rank], root)
            assert (found is None) == (rank != root)
            for each, part in zip(found or [], parts, strict=rank == root):
                same(each, part)
        for each, part in zip(await group.all_gather(parts[rank]), parts, strict=True):
            same(each, part)
        await group.barrier()

    async with cluster() as all_of_it:
        await world(all_of_it.url, size, act)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("unit", [1, LARGE])
async def test_reduce_scatter_takes_uneven_parts(size: int, unit: int) -> None:
    given = [[values(10 * rank + to, to * unit) for to in range(size)] for rank in range(size)]

    async def act(group: Group) -> None:
        for op in OPS:
            found = await group.reduce_scatter(given[group.rank], op)
            same(found, wanted(op, [given[rank][group.rank] for rank in range(size)]))

    async with cluster() as all_of_it:
        await world(all_of_it.url, size, act)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", SIZES)
async def test_bf16_tensors_stay_bf16_and_are_summed_in_float32(size: int) -> None:
    async def act(group: Group) -> None:
        for count in (5, LARGE):
            given = [torch.from_numpy(values(rank, count)).bfloat16() for rank in range(size)]
            own = given[group.rank]
            for op in OPS:
                wide = functools.reduce(
                    {"max": torch.maximum, "min": torch.minimum, "prod": torch.mul}.get(op, torch.add),
                    [each.float() for each in given],
                )
                expected = (wide / size if op == "mean" else wide).bfloat16()
                assert_torch(await group.all_reduce(own, op), expected)
            assert_torch((await group.all_gather(own))[-1], given[-1])
            assert_torch(await group.broadcast(own if group.rank == 0 else None), given[0])
            found = await group.gather(own[: group.rank])
            assert found is None or [len(each) for each in found] == list(range(size))
            parts = [given[group.rank][:to] for to in range(size)]
            assert_torch(await group.scatter(parts if group.rank == 0 else None), given[0][: group.rank])
            part = await group.reduce_scatter(parts, "max")
            assert_torch(part, functools.reduce(torch.maximum, [each[: group.rank] for each in given]))

    async with cluster() as all_of_it:
        await world(all_of_it.url, size, act)


def assert_torch(found: Any, expected: torch.Tensor) -> None:
    assert isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)


async def test_each_gets_what_it_gave() -> None:
    """Torch and numpy in one group; what is not contiguous; truth values."""

    async def act(group: Group) -> None:
        base = np.arange(12, dtype=np.float32).reshape(3, 4) * (group.rank + 1)
        own = torch.from_numpy(base).T if group.rank else base.T
        found = await group.all_reduce(own)
        assert isinstance(found, torch.Tensor if group.rank else np.ndarray)
        assert np.array_equal(np.asarray(found), np.arange(12, dtype=np.float32).reshape(3, 4).T * 3)
        seen = np.array([group.rank == 0, False])
        assert (await group.all_reduce(seen, "max")).tolist() == [True, False]
        assert isinstance((await group.all_gather(own))[0], type(found))

    async with cluster() as all_of_it:
        await world(all_of_it.url, 2, act)


async def test_nan_and_what_rounds_to_even_in_bf16() -> None:
    bits = np.arange(0, 1 << 32, 65521, dtype=np.uint32)  # of every exponent, ties and neighbours among them
    near = np.concatenate(
        [bits, (bits & 0xFFFF0000) | 0x8000, np.array([0x7F800001, 0xFFC00000, 0x7F7FFFFF], np.uint32)]
    )
    floats = torch.from_numpy(near.view(np.float32).copy())

    found = torch.from_numpy(narrowed(floats.numpy(), "bf16")).view(torch.bfloat16)
    expected = floats.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])


async def test_arrays_larger_than_a_message_and_than_shared_memory_is_used_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "PIECE", 1 << 19)
    count = (5 << 20) // 4 + 7

    async def act(group: Group) -> None:
        arrays = [values(rank, count) for rank in range(group.size)]
        own = arrays[group.rank]
        same(await group.all_reduce(own), wanted("sum", arrays))
        same((await group.all_gather(own[group.rank :]))[1], arrays[1][1:])
        same(await group.broadcast(own if group.rank == 2 else None, 2), arrays[2])

    async with cluster() as all_of_it:
        await world(all_of_it.url, 3, act)


async def test_a_call_may_be_followed_by_changes_of_what_was_given() -> None:
    async def act(group: Group) -> None:
        for count in (10, LARGE, 3 * LARGE):
            for turn in range(8):
                own = np.full(count, group.rank + turn, np.float32)
                if group.rank == 0:
                    await group.broadcast(own)
                    own[:] = -1
                else:
                    assert set((await group.broadcast()).tolist()) == {float(turn)}

    async with cluster() as all_of_it:
        await world(all_of_it.url, 3, act)
