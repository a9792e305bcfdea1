"""A live index behind a broker: changes by the client, versions put in its place under load, shards."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import cluster
from live_state import D, Truth, vectors
from ralmq.schema.errors import Refused
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.live.opening import create_live, open_live
from ralmq.workers.live.snapshot import found
from ralmq.workers.search.worker import Index

INT = np.int64


def test_add_search_delete_snapshot(tmp_path: Path) -> None:
    path, given = tmp_path / "docs", vectors(40)
    create_live(path, name="docs", dimension=D, factory="HNSW16")

    async def main() -> None:
        async with cluster(Index(index=path), inproc=True) as running:
            client = await running.client()
            ids = await client.add("docs", given, fields=[{"n": row} for row in range(40)])
            assert ids.tolist() == list(range(40))
            hits = await client.search("docs", given[:2], k=2)
            assert hits.ids[:, 0].tolist() == [0, 1] and hits.payloads[1][0] == {"n": 1}
            assert (await client.add("docs", given[0], [7], [{"n": -7}], upsert=True)).tolist() == [7]
            assert await client.delete("docs", [0, 1, 1, 999]) == 2
            hits = await client.search("docs", given[:2], k=40)
            assert hits.ids[0, 0] == 7 and hits.distances[0, 0] == 0 and hits.payloads[0][0] == {"n": -7}
            assert not {0, 1} & set(hits.ids.ravel().tolist()) and (hits.ids[:, 38:] == -1).all()
            (version,) = await client.snapshot("docs")
            assert [str(seq) for seq, _ in found(path)] == [version.rpartition("-")[2]]
            info = (await client.request("search:docs", {"info": True})).body
            assert info["live"] and info["ntotal"] == 38 and info["changes"] == 3
            reply = await client.request("search:docs", {"k": 1, "filter": {"n": -7}}, tensors=[given[:1]])
            assert reply.tensors[0].numpy().tolist() == [[7]] and reply.body["version"] == info["version"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "arrays", "said"),
    [
        ({"add": True}, [], "0 arrays came; send vectors"),
        ({"add": True}, [vectors(1)[:, :3].copy()], "takes float32"),
        ({"add": True}, [vectors(1), np.array([0], np.int32)], "ids are int32"),
        ({"add": True, "k": 3}, [vectors(1)], "unknown field k"),
        ({"add": 1}, [vectors(1)], "send true"),
        ({"add": True, "upsert": 1}, [vectors(1)], "send true or false"),
        ({"add": True, "fields": {"n": 1}}, [vectors(1)], "no list of 1 maps"),
        ({"add": True, "fields": ["n"]}, [vectors(1)], "fields of vector 0"),
        ({"delete": True}, [], "0 arrays came; send one"),
        ({"delete": True}, [np.array([-1])], "ids leave"),
        ({"delete": True}, [np.array([[1]])], r"ids are int64 \[1, 1\]"),
        ({"open": 5}, [], "directory"),
        ({"open": "/no/such/directory"}, [], "only what lies in"),
        ({"snapshot": True, "name": "x"}, [], "unknown field name"),
        ({"snapshot": True}, [], "holds nothing that could be written"),
    ],
)
def test_a_wrong_change_is_refused_and_the_server_goes_on(tmp_path: Path, body: Any, arrays: Any, said: str) -> None:
    create_live(tmp_path / "docs", name="docs", dimension=D)

    async def main() -> None:
        async with cluster(Index(index=tmp_path / "docs"), inproc=True) as running:
            client = await running.client()
            with pytest.raises(Refused, match=said):
                await client.request("search:docs", body, tensors=arrays)
            assert (await client.add("docs", vectors(1))).tolist() == [0]

    asyncio.run(main())


def test_a_built_index_takes_changes_where_it_is_told_to(tmp_path: Path) -> None:
    path, given = tmp_path / "docs", vectors(5)
    write_vectors(path, name="docs", vectors=given)

    async def main() -> None:
        async with cluster(Index(index=path), inproc=True) as running:
            client = await running.client()
            with pytest.raises(Refused, match="takes no changes; serve it with -o live=true"):
                await client.add("docs", given)
        async with cluster(Index(index=path, live=True), inproc=True) as running:
            client = await running.client()
            assert (await client.add("docs", given[:2])).tolist() == [5, 6]
        async with cluster(Index(index=path), inproc=True) as running:  # it holds changes: they are served
            client = await running.client()
            assert (await client.search("docs", given[:1], k=9)).ids.tolist() == [[0, 5, *ids_behind(given)]]

    def ids_behind(given: Any) -> list[int]:
        truth = Truth()
        truth.put(np.arange(7), np.concatenate([given, given[:2]]))
        return [*truth.nearest(given[:1], 7)[0][0].tolist()[2:], -1, -1]

    asyncio.run(main())


def test_each_answer_is_wholly_of_one_version(tmp_path: Path) -> None:
    """Versions of disjoint ids are put in place of each other while searches run."""
    given = vectors(50)
    create_live(tmp_path / "live", name="docs", dimension=D, factory="HNSW16")
    index = open_live(tmp_path / "live")
    index.add(given, np.arange(1000, 1050), [{"v": "live"}] * 50)
    index.close()
    for number in range(2):
        texts = [f'{{"v":"{number}"}}'] * 50
        write_vectors(tmp_path / str(number), name="docs", vectors=given + number, fields=texts)
    paths = [tmp_path / "0", tmp_path / "1", tmp_path / "live"]

    async def main() -> None:
        async with cluster(Index(index=paths[0], recall=1.0), inproc=True) as running:
            client, versions, ended = await running.client(), dict[str, str](), False
            versions[(await client.request("search:docs", {"info": True})).body["version"]] = "0"
            seen: list[tuple[str, set[str]]] = []

            async def search() -> None:
                while not ended:
                    reply = await client.request("search:docs", {"k": 5, "payloads": True}, tensors=[given[:3]])
                    seen.append((reply.body["version"], {hit["v"] for row in reply.body["payloads"] for hit in row}))

            searches = [asyncio.create_task(search()) for _ in range(4)]
            for turn in range(1, 13):
                (version,) = await client.use("docs", paths[turn % 3])
                versions[version] = paths[turn % 3].name
                reply = await client.request("search:docs", {"k": 1}, tensors=[given[:1]])
                assert reply.body["version"] == version
                if turn % 3 == 2:
                    assert await client.delete("docs", [1000 + turn]) == 1
            ended = True
            await asyncio.gather(*searches)
            assert all(values == {versions[version]} for version, values in seen)
            assert len(versions) == 3 and len(seen) > 12

    asyncio.run(main())


def test_shards_take_each_its_own(tmp_path: Path) -> None:
    create_live(tmp_path / "docs", name="docs", dimension=D, shards=2)
    given = vectors(30)

    async def main() -> None:
        workers = [Index(index=tmp_path / "docs", shard=f"{shard}/2") for shard in range(2)]
        async with cluster(*workers, inproc=True) as running:
            client = await running.client()
            ids = await client.add("docs", given)
            assert sorted(ids.tolist()) == list(range(30)) and (ids % 2 == np.arange(30) % 2).all()
            assert (await client.add("docs", given[:3], [101, 102, 103])).tolist() == [101, 102, 103]
            assert await client.delete("docs", [101, 102, 5, 6, 7777]) == 4
            for shard in range(2):
                reply = await client.request(f"search:docs/{shard}", {"k": 40}, tensors=[given[:1]])
                own = reply.tensors[0].numpy()
                assert (own[own >= 0] % 2 == shard).all() and np.count_nonzero(own >= 0) == (14 if shard == 0 else 15)
            assert len(await client.snapshot("docs")) == 2
            with pytest.raises(Refused, match="this index has shards"):
                await client.request("search:docs", {"delete": True}, tensors=[np.array([1])])

    asyncio.run(main())


def test_large_adds_travel_in_parts(tmp_path: Path) -> None:
    create_live(tmp_path / "docs", name="docs", dimension=D)
    fields = [{"text": "x" * 3000, "n": row} for row in range(400)]

    async def main() -> None:
        async with cluster(Index(index=tmp_path / "docs"), inproc=True) as running:
            client = await running.client()
            ids = await client.add("docs", vectors(400), fields=fields)
            assert ids.tolist() == list(range(400))
            info = (await client.request("search:docs", {"info": True})).body
            assert info["ntotal"] == 400 and 4 < info["changes"] < 10
            for wrong, said in (
                ({"vectors": vectors(2), "ids": [1]}, "ids have shape"),
                ({"vectors": vectors(2), "fields": [{}]}, "1 fields for 2 vectors"),
                ({}, "nothing to add"),
                ({"vectors": vectors(1), "fields": [{"a": object()}]}, "cannot travel"),
            ):
                with pytest.raises(Refused, match=said):
                    await client.add("docs", **wrong)

    asyncio.run(main())
