"""The worker `encoder` behind the real broker, in one process."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder.encoders import CONTEXT, WORDS, oracle, write
from inprocess import Cluster, cluster
from ralmq.errors import Refused
from ralmq.workers.base import Answer, Request, Worker
from ralmq.workers.encoder.worker import Encoder
from ralmq.workers.options import build
from ralmq.workers.registry import find
from tokenizers import Tokenizer, models

LONG = " ".join(f"w{number % 60}" for number in range(3 * CONTEXT))
TEXTS = ["w1", "w7 w9 w3", "nothing known w5", LONG]


def ids_of(text: str) -> list[int]:
    """By hand: words, between [CLS] and [SEP], cut to the context."""
    known = [WORDS.index(word) if word in WORDS else 1 for word in text.split()]
    return [2, *known[: CONTEXT - 2], 3]


def served(encoder: Encoder, body: Callable[[Cluster], Any], *others: Worker) -> None:
    async def main() -> None:
        async with cluster(encoder, *others, inproc=True) as running:
            await body(running)

    asyncio.run(main())


@pytest.mark.parametrize("pairs", [[], ["pooling=cls"], ["normalize=false", "batch=1", "name=mine"]])
def test_vectors_of_texts(tmp_path: Path, pairs: list[str]) -> None:
    path = write(tmp_path / "mini")
    encoder = build(find("encoder"), [f"model={path}", *pairs])
    assert isinstance(encoder, Encoder)
    name = "mine" if "name=mine" in pairs else "mini"
    wanted = oracle(path, list(map(ids_of, TEXTS)), "cls" if "pooling=cls" in pairs else "mean", len(pairs) < 2).numpy()

    async def body(running: Cluster) -> None:
        client = await running.client()
        reply = await client.request(f"embed:{name}", {"texts": TEXTS})
        assert reply.body == {"model": name} and len(reply.tensors) == 1
        found = reply.tensors[0].numpy()
        assert found.dtype == np.float32 and np.abs(found - wanted).max() < 1e-5

    served(encoder, body)


def test_requests_are_computed_together_and_one_refused_harms_no_other(tmp_path: Path) -> None:
    path = write(tmp_path / "mini")
    encoder = Encoder(model=str(path), batch=8)
    calls: list[int] = []
    inner = encoder.handle_batch

    async def counted(requests: list[Request]) -> list[Answer]:
        calls.append(len(requests))
        return await inner(requests)

    encoder.handle_batch = counted  # type: ignore[method-assign]
    wanted = oracle(path, [ids_of(f"w{number} w3") for number in range(40)], "mean", True).numpy()
    bad: list[Any] = [None, [], "text", ["w1", ""], ["w1", "  "], ["w1", 3], ["w1"] * 4097]

    async def ask(running: Cluster, number: int) -> Any:
        client = running_client[0]
        if number % 5 == 4:
            with pytest.raises(Refused, match="texts: "):
                await client.request("embed:mini", {"texts": bad[number // 5 % len(bad)]})
            return wanted[number]
        return (await client.request("embed:mini", {"texts": [f"w{number} w3"]})).tensors[0].numpy()[0]

    running_client: list[Any] = []

    async def body(running: Cluster) -> None:
        running_client.append(await running.client())
        found = await asyncio.gather(*[ask(running, number) for number in range(40)])
        assert np.abs(np.stack(found) - wanted).max() < 1e-5
        assert sum(calls) == 40 and max(calls) == 8 and len(calls) < 20

    served(encoder, body)


def test_a_text_without_a_token_is_refused_alone(tmp_path: Path) -> None:
    """A tokenizer without special tokens, which knows nothing of a text."""
    path = write(tmp_path / "mini")
    Tokenizer(models.BPE(vocab={"a": 5, "b": 6}, merges=[])).save(str(path / "tokenizer.json"))

    async def body(running: Cluster) -> None:
        client = await running.client()
        good, bad = await asyncio.gather(
            client.request("embed:mini", {"texts": ["ab"]}),
            client.request("embed:mini", {"texts": ["ab", "..."]}),
            return_exceptions=True,
        )
        assert isinstance(bad, Refused) and "none of its tokens" in bad.message
        assert not isinstance(good, BaseException)
        found = good.tensors[0].numpy()
        assert np.abs(found - oracle(path, [[5, 6]], "mean", True).numpy()).max() < 1e-5

    served(Encoder(model=str(path)), body)


class Named(Worker):
    """An index that names its encoder and answers with the query's first number as the distance."""

    service = "search:notes"

    async def handle(self, request: Request) -> Answer:
        if request.body.get("info"):
            return {"kind": "vectors", "encoder": "mini", "model": "another"}
        queries = request.tensors[0].numpy()
        return {"payloads": [[{}] for _ in queries]}, [np.zeros((len(queries), 1), np.int64), queries[:, :1].copy()]


def test_a_search_with_text_asks_the_encoder_that_the_index_names(tmp_path: Path) -> None:
    path = write(tmp_path / "mini")
    wanted = oracle(path, list(map(ids_of, TEXTS)), "mean", True).numpy()[:, :1]

    async def body(running: Cluster) -> None:
        client = await running.client()
        assert np.abs((await client.search("notes", TEXTS, k=1)).distances - wanted).max() < 1e-5
        assert np.abs((await client.search("notes", TEXTS[1], k=1)).distances - wanted[1:2]).max() < 1e-5

    served(Encoder(model=str(path)), body, Named())


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "needs -o model="),
        (["model=/nowhere"], "no such model directory"),
        (["pooling=max"], "pooling=max"),
        (["threads=0"], "threads=0"),
        (["batch=0"], "batch=0"),
        (["name=" + "n" * 200], "too long"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, pairs: list[str], said: str) -> None:
    given = pairs if not pairs or pairs[0].startswith("model") else [f"model={write(tmp_path / 'mini')}", *pairs]
    with pytest.raises(Refused, match=said):
        build(Encoder, given)


def test_directories_that_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mini")
    (path / "tokenizer.json").unlink()
    for content, said in (
        (None, "tokenizer.json: no such file"),
        ("{}", "cannot be read"),
        (Tokenizer(models.WordLevel({"a": 64}, unk_token="a")).to_str(), "knows token 64, the model 64 of them"),
    ):
        if content is not None:
            (path / "tokenizer.json").write_text(content)
        with pytest.raises(Refused, match=said):
            asyncio.run(Encoder(model=str(path)).start())
    (path / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"holds no \*.safetensors file"):
        asyncio.run(Encoder(model=str(path)).start())


def test_copies_are_replicas_and_other_models_are_not(tmp_path: Path) -> None:
    """What an encoder says of itself beside others of its name: weights, tokenizer, and how it pools."""
    path = write(tmp_path / "mini")
    copy = shutil.copytree(path, tmp_path / "copy")
    tuned = shutil.copytree(path, tmp_path / "tuned")
    weights = bytearray((tuned / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tuned / "model.safetensors").write_bytes(weights)
    spoken = shutil.copytree(path, tmp_path / "spoken")
    (spoken / "tokenizer.json").write_text((spoken / "tokenizer.json").read_text() + "\n")

    async def identity(place: Path, **options: Any) -> str:
        encoder = Encoder(model=str(place), name="mini", **options)
        await encoder.start()
        await encoder.stop()
        return encoder.identity

    async def main() -> None:
        own = await identity(path)
        assert own == await identity(copy, batch=4) and own.startswith("encoder ") and own.endswith(", mean")
        others = [await identity(tuned), await identity(spoken), await identity(path, pooling="cls")]
        assert len({own, *others, await identity(path, normalize=False)}) == 5
        async with cluster(Encoder(model=str(path)), inproc=True) as running:
            with pytest.raises(Refused, match=r"embed:mini is served by encoder-.*give this one a name"):
                await running.worker(Encoder(model=str(tuned), name="mini"))
            await running.worker(Encoder(model=str(copy), name="mini"))

    asyncio.run(main())
