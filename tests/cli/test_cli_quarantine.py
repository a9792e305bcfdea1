"""`ralmq quarantine` and `ralmq drain` against a running broker, as a user calls them."""

import asyncio
import json
from pathlib import Path

import pytest
from commands import ralmq
from ralmq import connect, errors
from serving import PATIENCE, Process, broker, free_url, until

WORKER = """
import os
import ralmq


class Fragile(ralmq.Worker):
    service = "fragile"
    idempotent = True

    async def handle(self, request):
        if not os.path.exists("mended"):
            os._exit(1)
        return {"got": request.body["text"]}
"""


def test_a_request_that_kills_its_workers_is_listed_and_served_when_they_are_mended(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(WORKER)
    url = free_url()
    with broker(tmp_path, url):
        asyncio.run(_poison(tmp_path, url))
        (entry,) = json.loads(ralmq("quarantine", "list", "--json", "--broker", url, home=tmp_path).stdout)
        assert entry["service"] == "fragile" and entry["kept"] is True and "SECRET" not in json.dumps(entry)
        table = ralmq("quarantine", "list", "--broker", url, home=tmp_path, environment={"COLUMNS": "200"})
        assert entry["id"][:8] in table.stdout and "SECRET" not in table.stdout
        (tmp_path / "mended").touch()
        with Process(tmp_path, "worker", "fragile:Fragile", "--broker", url) as worker:
            asyncio.run(_served(url))
            reply = ralmq("quarantine", "retry", entry["id"][:8], "--broker", url, home=tmp_path)
            assert json.loads(reply.stdout) == {"got": "SECRET"}, reply.stderr
            again = ralmq("quarantine", "retry", entry["id"], "--broker", url, home=tmp_path)
            assert again.returncode == 2 and "quarantine list" in again.stderr
            told = ralmq("drain", "fragile", "--broker", url, home=tmp_path)
            assert told.returncode == 0 and "fragile-" in told.stdout
            assert asyncio.run(worker.ended()) == 0
        nobody = ralmq("drain", "fragile", "--broker", url, home=tmp_path)
        assert nobody.returncode == 2 and "ralmq status" in nobody.stderr


async def _poison(folder: Path, url: str) -> None:
    """Three workers, one after the other, meet the request and die."""
    async with connect(url, wait=PATIENCE) as client:
        task = asyncio.create_task(client.request("fragile", {"text": "SECRET"}, wait_service=PATIENCE))
        for _ in range(3):
            with Process(folder, "worker", "fragile:Fragile", "--broker", url) as worker:
                assert await worker.ended() == 1
        with pytest.raises(errors.Poisoned, match="3 workers of fragile"):
            await task


async def _served(url: str) -> None:
    async def there() -> bool:
        return bool((await client.status())["workers"])

    async with connect(url, wait=PATIENCE) as client:
        await until(there)
