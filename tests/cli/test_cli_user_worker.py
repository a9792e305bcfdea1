"""A user's own package: installed, and served by module:Class and by entry point, a streaming worker included."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import ralmq
from commands import broker, started

SOURCE = Path(__file__).parents[1] / "data" / "userpkg"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path with the package installed in it, its dist-info included."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(SOURCE, folder / "source")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(folder / "source")], check=True)
    assert list((folder / "site").glob("shouting-*.dist-info"))
    return folder / "site"


def test_the_package_is_as_short_as_promised() -> None:
    lines = [line for line in (SOURCE / "shouting.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 20


@pytest.mark.parametrize(
    ("name", "options", "end"),
    [("shouting:Shout", (), "!"), ("shout", (), "!"), ("shout", ("-o", "marks=3"), "!!!")],
)
def test_one_answer(name: str, options: Sequence[str], end: str, site: Path, tmp_path: Path) -> None:
    async def ask(url: str) -> str:
        async with ralmq.connect(url) as client:
            reply = await client.request("shout", {"text": "hi"}, wait_service=20.0)
            return str(reply.body["text"])

    with broker(tmp_path) as url, started(*worker(name, url), *options, home=home(tmp_path), environment=path(site)):
        assert asyncio.run(ask(url)) == f"HI{end}"


@pytest.mark.parametrize("name", ["shouting:Spell", "spell"])
def test_a_stream(name: str, site: Path, tmp_path: Path) -> None:
    async def ask(url: str) -> list[str]:
        async with ralmq.connect(url) as client:
            stream = client.stream("spell", {"text": "word"}, wait_service=20.0)
            return [part.body["letter"] async for part in stream]

    with broker(tmp_path) as url, started(*worker(name, url), home=home(tmp_path), environment=path(site)):
        assert asyncio.run(ask(url)) == list("word")


def worker(name: str, url: str) -> list[str]:
    return ["worker", name, "--broker", url]


def home(folder: Path) -> Path:
    (folder / "worker").mkdir()
    return folder / "worker"


def path(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
