"""An input of rows, and what asks for them, within the test's process. Knows no test."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ralmq.client.journal import SUFFIX
from ralmq.client.mapping import Mapped, map_rows
from ralmq.errors import RalmqError


class Files:
    """An input of `count` rows, and how an asker was asked for them."""

    def __init__(self, folder: Path, count: int = 50) -> None:
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.journal = folder / f"out.jsonl{SUFFIX}"
        self.source.write_text("".join(f'{{"n": {n}}}\n{" " * (n % 2)}\n' for n in range(count)))
        self.asked: Counter[int] = Counter()
        self.fault: dict[int, list[RalmqError]] = {}
        self.stop = -1  # asking for this row ends as if the process did

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        n = body["n"]
        self.asked[n] += 1
        await asyncio.sleep(0.001 * (n % 7))
        if n == self.stop:
            raise KeyError("the end")
        if self.fault.get(n):
            raise self.fault[n].pop()
        return {"n": n, "square": n * n}

    async def map(self, client: Any, **options: Any) -> Mapped:
        return await map_rows(client, self.ask, self.source, self.target, **{"job": "square", **options})

    @property
    def output(self) -> list[Any]:
        return [json.loads(line) for line in self.target.read_text().splitlines()]


def wanted(count: int) -> list[dict[str, int]]:
    return [{"n": n, "square": n * n} for n in range(count)]


class There:
    """A client whose broker answers."""

    async def status(self, *, deadline: float) -> dict[str, Any]:
        return {"workers": [], "lost": []}
