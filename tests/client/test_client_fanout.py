"""One index in shards: who is asked, the exact merge, what is done without, another version."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ralmq.client.fanout import Fanout
from ralmq.client.results import Reply
from ralmq.schema.errors import DeadlineExceeded, NoService, Refused, WorkerFailed
from ralmq.schema.tensor import tensor_of

Array = np.ndarray[Any, Any]
D, LISTS = 8, 6


class Shards:
    """Searches that stand for index servers: small whole numbers as vectors, so that many distances are equal."""

    def __init__(self, shards: int, by: str = "rows", metric: str = "l2", version: str = "v1") -> None:
        self.info = {"shards": shards, "by": by, "metric": metric, "version": version}
        chance = np.random.default_rng(3)
        self.vectors = chance.integers(0, 3, (200, D)).astype(np.float32)
        self.centroids = chance.integers(0, 3, (LISTS, D)).astype(np.float32)
        self.list = self._nearest(self.vectors, self.centroids, 1)[0][:, 0]
        self.owners = (np.arange(LISTS) % shards).astype(np.int32)
        self.of = self.owners[self.list] if by == "list" else np.arange(200) % shards
        self.asked: list[tuple[str, dict[str, Any], int]] = []
        self.broken: dict[str, Exception] = {}
        self.late: set[str] = set()

    def _distances(self, a: Array, b: Array) -> Array:
        if self.info["metric"] == "l2":
            return ((a[:, None] - b[None]) ** 2).sum(-1)
        return -(a @ b.T)

    def _nearest(self, a: Array, b: Array, k: int) -> tuple[Array, Array]:
        distances = self._distances(a, b)
        ids = np.broadcast_to(np.arange(len(b)), distances.shape)
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return order, np.take_along_axis(distances, order, 1)

    def whole(self, queries: Array, k: int, lists: Array | None = None) -> tuple[Array, Array]:
        """What the index would find were it not in shards."""
        return self._among(queries, k, lists, np.ones(200, bool))

    def _among(self, queries: Array, k: int, lists: Array | None, mine: Array) -> tuple[Array, Array]:
        ids, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)
        for row, query in enumerate(queries):
            seen = mine & (np.isin(self.list, lists[row]) if lists is not None else True)
            known = np.flatnonzero(seen)
            order, near = self._nearest(query[None], self.vectors[known], k)
            ids[row, : order.shape[1]], distances[row, : order.shape[1]] = known[order[0]], near[0]
        return ids, distances if self.info["metric"] == "l2" else -distances

    async def ask(self, service: str, body: dict[str, Any], tensors: Sequence[Any], end: float) -> Reply:
        arrays = [np.asarray(tensor) for tensor in tensors]
        self.asked.append((service, body, len(arrays[0]) if arrays else 0))
        if service in self.broken:
            raise self.broken[service]
        if service in self.late:
            await asyncio.sleep(max(0.0, end - asyncio.get_running_loop().time()))
            raise DeadlineExceeded("late")
        if body.get("info"):
            return Reply(dict(self.info))
        if body.get("owners"):
            return Reply({}, (tensor_of(self.owners),))
        if body.get("version", self.info["version"]) != self.info["version"]:
            raise Refused("no such version")
        if body.get("assign"):
            lists, coarse = self._nearest(arrays[0], self.centroids, body.get("nprobe", 2))
            return Reply({}, (tensor_of(lists), tensor_of(coarse.astype(np.float32))))
        if "/" not in service and self.info["shards"] > 1:
            raise Refused("ask its shards")
        shard = int(service.rpartition("/")[2]) if "/" in service else 0
        mine = self.of == shard if self.info["shards"] > 1 else np.ones(200, bool)
        lists = arrays[1] if body.get("lists") else None
        ids, distances = self._among(arrays[0], body["k"], lists, mine)
        found = [ids.astype(np.int64), distances.astype(np.float32)]
        if body.get("following"):
            found.append((found[0][..., None] * 10 + np.arange(8)).astype(np.int32))
        answer = {"payloads": [[{"of": int(i)} if i >= 0 else {} for i in row] for row in ids]}
        return Reply(answer if body.get("payloads") else {}, tuple(map(tensor_of, found)))


def queries(count: int = 7) -> Array:
    return np.random.default_rng(5).integers(0, 3, (count, D)).astype(np.float32)


def search(shards: Shards, body: dict[str, Any], tensors: Sequence[Any], *, seconds: float = 5.0, **how: Any) -> Reply:
    async def run() -> Reply:
        end = asyncio.get_running_loop().time() + seconds
        return await Fanout(shards.ask).search("docs", body, tensors, end, **how)

    return asyncio.run(run())


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("k", [1, 10, 300])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_give_what_the_whole_index_gives(shards: int, k: int, metric: str) -> None:
    made = Shards(shards, metric=metric)
    reply = search(made, {"k": k, "following": True, "payloads": True}, [queries()])
    ids, distances, following = (tensor.numpy() for tensor in reply.tensors)
    wanted = made.whole(queries(), k)
    assert np.array_equal(ids, wanted[0])
    assert np.array_equal(distances, wanted[1])
    assert np.array_equal(following[..., 3], ids * 10 + 3)
    assert reply.body["payloads"] == [[{"of": i} if i >= 0 else {} for i in row] for row in ids.tolist()]
    assert reply.body["shards"] == [shards, shards]


@pytest.mark.parametrize("nprobe", [1, 3])
def test_shards_by_list_are_asked_for_the_lists_they_own_alone(nprobe: int) -> None:
    made = Shards(3, by="list")
    lists, coarse = made._nearest(queries(), made.centroids, nprobe)
    reply = search(made, {"k": 5, "nprobe": nprobe}, [queries()])
    given = search(made, {"k": 5, "lists": True}, [queries(), lists, coarse.astype(np.float32)])
    wanted = made.whole(queries(), 5, lists)
    for found in (reply, given):
        assert np.array_equal(found.tensors[0].numpy(), wanted[0])
        assert np.array_equal(found.tensors[1].numpy(), wanted[1])
    rows = {service: count for service, body, count in made.asked if "/" in service}
    for shard in range(3):
        assert rows.get(f"search:docs/{shard}", 0) == (made.owners[lists] == shard).any(1).sum()
    assert sum(bool(body.get("assign")) for _, body, _ in made.asked) == 1


def test_a_filter_widens_the_search_of_every_shard() -> None:
    made = Shards(3, by="list")
    search(made, {"k": 5, "filter": {"a": 1}}, [queries()])
    assert not any("assign" in body for _, body, _ in made.asked)
    assert sorted(service for service, _, _ in made.asked if "/" in service) == [f"search:docs/{n}" for n in range(3)]


def test_a_shard_that_owns_no_probed_list_is_not_asked() -> None:
    made = Shards(3, by="list")
    one = queries(1)
    lists, coarse = made._nearest(one, made.centroids, 1)
    search(made, {"k": 5, "lists": True}, [one, lists, coarse.astype(np.float32)])
    assert [service for service, _, _ in made.asked if "/" in service] == [f"search:docs/{made.owners[lists[0, 0]]}"]


@pytest.mark.parametrize("by", ["rows", "list"])
@pytest.mark.parametrize("how", ["late", "broken"])
def test_a_partial_answer_says_what_it_covers(how: str, by: str) -> None:
    made = Shards(4, by=by)
    if how == "late":
        made.late.add("search:docs/2")
    else:
        made.broken["search:docs/2"] = NoService("gone")
    body = {"k": 10, "nprobe": LISTS}
    reply = search(made, body, [queries()], seconds=0.3, partial=True)
    others = made._among(queries(), 10, None, made.of != 2)
    assert np.array_equal(reply.tensors[0].numpy(), others[0])
    assert reply.body["shards"] == [3, 4]
    with pytest.raises((DeadlineExceeded, NoService)):
        search(made, body, [queries()], seconds=0.3)


def test_with_no_shard_at_all_a_partial_answer_is_an_error() -> None:
    made = Shards(2)
    made.late |= {"search:docs/0", "search:docs/1"}
    with pytest.raises(DeadlineExceeded):
        search(made, {"k": 1}, [queries()], seconds=0.2, partial=True)


def test_what_the_index_refuses_is_refused_though_it_be_partial() -> None:
    made = Shards(2)
    made.broken["search:docs/1"] = Refused("k is -1")
    with pytest.raises(Refused, match="k is -1"):
        search(made, {"k": 1}, [queries()], partial=True)


@pytest.mark.parametrize(("before", "after"), [((4, "v1"), (4, "v2")), ((4, "v1"), (1, "v2")), ((1, "v1"), (2, "v2"))])
def test_another_version_is_found_without_an_error(before: tuple[int, str], after: tuple[int, str]) -> None:
    first, second = Shards(before[0], version=before[1]), Shards(after[0], version=after[1])
    second.vectors = second.vectors[::-1].copy()

    async def run() -> list[Reply]:
        serving = [first]
        end = asyncio.get_running_loop().time() + 5.0

        async def ask(service: str, body: dict[str, Any], tensors: Sequence[Any], until: float) -> Reply:
            if "/" in service and serving[0].info["shards"] == 1:
                raise NoService("nobody offers it")
            return await serving[0].ask(service, body, tensors, until)

        fanout = Fanout(ask)
        found = [await fanout.search("docs", {"k": 10}, [queries()], end)]
        serving[0] = second
        return [*found, await fanout.search("docs", {"k": 10}, [queries()], end)]

    for reply, made in zip(asyncio.run(run()), (first, second), strict=True):
        assert np.array_equal(reply.tensors[0].numpy(), made.whole(queries(), 10)[0])


@pytest.mark.parametrize("by", ["rows", "list"])
def test_a_search_waits_while_shards_have_different_versions(by: str) -> None:
    """Shard 0 comes first, the others one look later each; `search:docs` is answered by shard 0, or by the last one."""
    first, second = Shards(4, by=by), Shards(4, by=by, version="v2")
    second.vectors = second.vectors[::-1].copy()
    second.list = second._nearest(second.vectors, second.centroids, 1)[0][:, 0]
    second.of = second.owners[second.list] if by == "list" else second.of

    async def run(whole: int) -> list[Reply]:
        end, done, looks = asyncio.get_running_loop().time() + 5.0, 0, 0

        async def ask(service: str, body: dict[str, Any], tensors: Sequence[Any], until: float) -> Reply:
            nonlocal done, looks
            shard = int(service.rpartition("/")[2]) if "/" in service else whole
            looks += "/" in service and bool(body.get("info"))
            if done:
                done = max(done, min(4, looks // 4))
            return await (second if shard < done else first).ask(service, body, tensors, until)

        fanout = Fanout(ask)
        found = [await fanout.search("docs", {"k": 10, "nprobe": 2}, [queries()], end)]
        done = 1
        found.append(await fanout.search("docs", {"k": 10, "nprobe": 2}, [queries()], end))
        assert done == 4 and looks >= 16
        return found

    for whole in (0, 3):
        for reply, made in zip(asyncio.run(run(whole)), (first, second), strict=True):
            lists = made._nearest(queries(), made.centroids, 2)[0] if by == "list" else None
            assert np.array_equal(reply.tensors[0].numpy(), made.whole(queries(), 10, lists)[0])


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        (np.full((7, 2), LISTS), f"leave the index; send -1 .none. to {LISTS - 1}"),
        (np.full((7, 2), -2), "leave the index"),
        (np.zeros((6, 2), np.int64), r"send int64 and float32 \[7, nprobe\]"),
        (np.zeros((7, 2)), "list ids are float64"),
        (np.zeros(7, np.int64), r"list ids are int64 \[7\]"),
    ],
)
def test_lists_that_the_index_has_not_are_refused(lists: Array, said: str) -> None:
    given = [queries(), lists, np.zeros(lists.shape, np.float32)]
    with pytest.raises(Refused, match=said):
        search(Shards(2, by="list"), {"k": 5, "lists": True}, given)


def test_shards_that_stay_of_different_versions_are_an_error_that_says_so() -> None:
    first, second = Shards(2), Shards(2, version="v2")

    async def run() -> Reply:
        async def ask(service: str, body: dict[str, Any], tensors: Sequence[Any], until: float) -> Reply:
            return await (second if service.endswith("/1") else first).ask(service, body, tensors, until)

        return await Fanout(ask).search("docs", {"k": 5}, [queries()], asyncio.get_running_loop().time() + 0.3)

    with pytest.raises(DeadlineExceeded, match="different versions: put one in the place of all"):
        asyncio.run(run())


@pytest.mark.parametrize("by", ["rows", "list"])
def test_a_late_server_is_no_error_to_a_first_partial_search(by: str) -> None:
    """The very first question, how the index is spread, may come to the shard that stands still."""
    made, asked = Shards(4, by=by), 0
    made.late.add("search:docs/2")

    async def run() -> Reply:
        async def ask(service: str, body: dict[str, Any], tensors: Sequence[Any], until: float) -> Reply:
            nonlocal asked
            asked += service == "search:docs"
            first = service == "search:docs" and asked == 1
            return await made.ask("search:docs/2" if first else service, body, tensors, until)

        end = asyncio.get_running_loop().time() + 0.6
        return await Fanout(ask).search("docs", {"k": 10, "nprobe": LISTS}, [queries()], end, partial=True)

    reply = asyncio.run(run())
    assert reply.body["shards"] == [3, 4]
    assert np.array_equal(reply.tensors[0].numpy(), made._among(queries(), 10, None, made.of != 2)[0])


def test_shards_that_answer_in_another_shape_are_found_out() -> None:
    made = Shards(2)

    async def run() -> Reply:
        async def ask(service: str, body: dict[str, Any], tensors: Sequence[Any], end: float) -> Reply:
            more = {**body, "k": 3} if service.endswith("/1") else body
            return await made.ask(service, more, tensors, end)

        return await Fanout(ask).search("docs", {"k": 5}, [queries()], asyncio.get_running_loop().time() + 5.0)

    with pytest.raises(WorkerFailed, match="another shape"):
        asyncio.run(run())
