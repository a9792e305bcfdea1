"""Canaries: nothing that is sent or read makes a process run code, and no log holds what was sent or a secret key."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from commands import ralmq
from inprocess import cluster
from ralmq.client.client import connect
from ralmq.cluster.local import local_cluster
from ralmq.errors import RalmqError, WorkerFailed
from ralmq.schema.codec import decode
from ralmq.schema.errors import Malformed
from ralmq.schema.frame import LENGTHS, PREFIX, Prefix
from ralmq.schema.keys import KEYS_VARIABLE
from ralmq.schema.limits import VERSION
from ralmq.schema.message import KINDS
from ralmq.workers.echo import Echo
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.writer import write_index

MODEL = Path(__file__).parents[2] / "demo" / "checkpoint"
SECRET = "canary-3f9a1c"  # in every prompt and payload; no log may hold it


class Canary:
    """A file that is there once somebody has run what the payload asks for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pickled = f"cposix\nsystem\n(S'touch {path}'\ntR.".encode()
        self.source = f"import pathlib\npathlib.Path({str(path)!r}).touch()\n"

    @property
    def sings(self) -> bool:
        return self.path.exists()


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    found = Canary(tmp_path / "sings")
    yield found
    assert not found.sings, "a process ran what it was given"


def test_the_canary_can_sing(tmp_path: Path) -> None:
    for number, code in enumerate(("import pickle, sys; pickle.loads(sys.stdin.buffer.read())", "exec(input())")):
        found = Canary(tmp_path / f"sings-{number}")
        given = found.pickled if not number else found.source.replace("\n", ";", 1).encode()
        subprocess.run([sys.executable, "-c", code], input=given, check=True, timeout=60)
        assert found.sings


def payloads(canary: Canary) -> list[Any]:
    """What a careless reader would run, in the shapes that msgpack has."""
    text = canary.pickled.decode()
    return [
        canary.pickled,
        text,
        canary.source,
        msgpack.ExtType(1, canary.pickled),
        {"__reduce__": ["posix.system", f"touch {canary.path}"], "py/object": "posix.system", text: canary.pickled},
        [canary.pickled, {"__class__": "posix.system"}],
    ]


def frames_with(kind: int, payload: Any) -> Iterator[list[bytes]]:
    """Frames of a kind that carry the payload in each field of the routing section, the body, and the tensors."""
    places = [field.name for field in fields(KINDS[kind])]
    routings = [[payload if place == other else 0 for other in places] for place in places] or [[payload]]
    bodies = [dict.fromkeys([*places, "model", "service"], payload), payload]
    for routing in routings:
        for body in bodies:
            first, second = msgpack.packb(routing), msgpack.packb(body)
            head = PREFIX.pack(VERSION, kind, 0, 0, 0, 0, bytes(16), 0)
            yield [head + LENGTHS.pack(len(first), len(second)) + first + second]
            yield [head + LENGTHS.pack(len(first), 0) + first, second]
            raw = payload if isinstance(payload, bytes) else b""
            yield [head + LENGTHS.pack(0, 0) + raw, raw, raw]
            yield [raw, raw]


def test_no_message_of_any_kind_runs_anything(canary: Canary) -> None:
    seen = 0
    for kind in KINDS:
        for payload in payloads(canary):
            for frames in frames_with(kind, payload):
                seen += 1
                try:
                    decode(frames)
                except Malformed:
                    continue
    assert seen > 1000 and not canary.sings


async def test_no_message_makes_a_broker_or_a_worker_run_anything(canary: Canary) -> None:
    async with cluster(Echo()) as here:
        client = await here.client()
        wire = client._link._wire
        assert wire is not None
        before = here.counts["malformed"]
        for kind in KINDS:
            for payload in payloads(canary):
                for frames in frames_with(kind, payload):
                    stamped = bytearray(frames[0])
                    if len(stamped) >= PREFIX.size and stamped[0] == VERSION:
                        stamped[8:12] = client._link.epoch.to_bytes(4, "little")
                    wire.send([bytes(stamped), *frames[1:]])
        other = await here.client()
        for payload in payloads(canary):
            if not isinstance(payload, msgpack.ExtType):
                assert (await other.request("echo", {"value": payload})).body == {"value": payload}
        raw = np.frombuffer(canary.pickled, np.uint8)
        assert bytes((await other.request("echo", tensors=[raw])).tensors[0].numpy()) == canary.pickled
        assert here.counts["malformed"] > before


def poisoned_models(canary: Canary, folder: Path) -> Iterator[Path]:
    """Model directories that hold a payload wherever one was ever run from."""
    config = json.loads((MODEL / "config.json").read_text())
    for name in ("pickled", "code", "header", "tokenizer"):
        shutil.copytree(MODEL, folder / name)
        at = folder / name
        if name == "pickled":
            (at / "model.safetensors").unlink()
            for file in ("pytorch_model.bin", "model.pt", "model.pkl"):
                (at / file).write_bytes(canary.pickled)
        elif name == "code":
            for file in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "sitecustomize.py"):
                (at / file).write_text(canary.source)
            auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
            evil = {**config, "model_type": "evil", "auto_map": auto, "trust_remote_code": True}
            (at / "config.json").write_text(json.dumps(evil))
        elif name == "header":
            header = json.dumps({"__metadata__": {"format": canary.pickled.decode()}, canary.source: []}).encode()
            (at / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + canary.pickled)
        else:
            (at / "tokenizer.json").write_bytes(canary.pickled)
        yield at


def test_no_checkpoint_runs_anything(canary: Canary, tmp_path: Path) -> None:
    for at in poisoned_models(canary, tmp_path / "models"):
        kind = ["generator"] if at.name == "tokenizer" else ["stage", "-o", "stage=0/1"]
        done = ralmq("worker", *kind, "-o", f"model={at}", "--broker", f"ipc://{tmp_path}/none", home=tmp_path)
        assert done.returncode in (1, 2), (at.name, done.stderr)
        assert not canary.sings, at.name


@pytest.mark.parametrize("file", ["manifest.json", "index.faiss", "payloads.npy", "documents.json", "tokenizer.json"])
def test_no_index_runs_anything(canary: Canary, tmp_path: Path, file: str) -> None:
    """Each file of an index is replaced by a payload, with a manifest that vouches for it."""
    at = tmp_path / "index"
    vectors = np.random.default_rng(0).standard_normal((7, 4), np.float32)
    stream = TokenStream(np.arange(8, dtype=np.int32), ("a.txt",), np.array([0]))
    write_index(at, name="docs", vectors=vectors, entries=np.arange(7), stream=stream, model="m", fingerprint="f" * 64)
    content = canary.pickled
    if file.endswith(".npy"):  # what numpy itself would load with allow_pickle
        head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + canary.pickled
    (at / file).write_bytes(content)
    if file != "manifest.json":
        manifest = json.loads((at / "manifest.json").read_text())
        manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (at / "manifest.json").write_text(json.dumps(manifest))
    done = ralmq("worker", "index", "-o", f"index={at}", "--broker", f"ipc://{tmp_path}/none", home=tmp_path)
    assert done.returncode in (1, 2), done.stderr
    assert not canary.sings


SPILLER = '''
import ralmq

class Spiller(ralmq.Worker):
    """Raises what it was given."""

    service = "spill"

    async def handle(self, request):
        raise ValueError(str(request.body))
'''


async def test_no_log_holds_a_prompt_a_payload_or_a_key(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker with keys, stages, a generator and workers that fail, all with every line of log that there is."""
    (tmp_path / "spiller.py").write_text(SPILLER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KEYS_VARIABLE, str(keys))
    monkeypatch.setenv("RALMQ_DEBUG", "1")
    logs = tmp_path / "logs"
    async with (
        local_cluster(extra=[["spiller:Spiller"], ["echo"]], directory=logs) as cluster,
        connect(cluster.url) as client,
    ):
        await client.request("echo", {"text": SECRET}, tensors=[np.frombuffer(SECRET.encode(), np.uint8)])
        with pytest.raises(WorkerFailed, match=SECRET):  # who asked is told
            await client.request("spill", {"text": SECRET})
        async for _ in client.generate(SECRET, model="demo", max_tokens=2, stop=[SECRET]):
            pass
        for wrong in ({"model": SECRET}, {"model": "demo", "retrieve": SECRET}, {"model": "demo", "seed": -5}):
            with pytest.raises(RalmqError):
                async for _ in client.generate(SECRET, max_tokens=2, **wrong):
                    pass
        wire = client._link._wire
        assert wire is not None
        for kind in KINDS:
            wire.send([Prefix(1, kind, epoch=client._link.epoch).pack() + bytes(4) + SECRET.encode(), SECRET.encode()])
        with pytest.raises(RalmqError):
            await client.request(SECRET)
    found = {path.name: path.read_text() for path in logs.glob("*.log")}
    assert {"broker.log", "stage-0.log", "stage-1.log", "generator.log", "spiller.log", "echo.log"} <= set(found)
    assert "spiller.py" in found["spiller.log"] and "ValueError" in found["spiller.log"], "the place is there"
    secrets = [json.loads(path.read_text())["secret"] for path in keys.glob("*.key")]
    for name, text in found.items():
        assert text, name
        assert not [word for word in (SECRET, *secrets) if word in text], name
