"""What is asked while things break, and what must come out of it. Knows the client's API, no fault."""

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field
from typing import Any

from ralmq.client.client import Client
from ralmq.errors import RalmqError

MODEL, VOCAB, TOKENS = "m", 128, 24
DEADLINE = 180.0
COUNT = 24


@dataclass(frozen=True)
class Job:
    """One generation: ids of its prompt, and options."""

    prompt: tuple[int, ...]
    options: dict[str, Any]


@dataclass
class Tally:
    """What became of all generations.

    Attributes:
        lost: ended with an error; `doubled` had a position twice or out of order; `wrong` other tokens than without
            any fault.
        came: for each one under way, when its last token came (time.monotonic()).
        pauses: of each fault, the longest time until a generation that was under way had its next token.
    """

    started: int = 0
    finished: int = 0
    given_up: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: int = 0
    wrong: int = 0
    tokens: int = 0
    came: dict[int, float] = field(default_factory=dict)
    waits: dict[int, list["Wait"]] = field(default_factory=dict)


@dataclass
class Wait:
    """The generations that were under way at a fault, until each has its next token, or its end."""

    kind: str
    at: float
    open: int = 0
    seconds: float = 0.0


def jobs(seed: int = 0) -> list[Job]:
    """Greedy and sampled ones, with and without retrieval."""
    chance = random.Random(seed)
    made: list[Job] = []
    for number in range(COUNT):
        options: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "seed": number}
        if number % 2:
            options |= {"temperature": 1.0, "top_p": 0.95}
        if number % 3 == 0:
            options |= {"retrieve": "docs", "k": 4, "interval": 1 + number % 4, "knn_temperature": 100.0}
        made.append(Job(tuple(chance.randrange(3, VOCAB) for _ in range(chance.randint(2, 60))), options))
    return made


async def answer(client: Client, job: Job) -> list[int]:
    """All tokens, with nothing going wrong."""
    return [token.id async for token in client.generate(job.prompt, model=MODEL, deadline=DEADLINE, **job.options)]


class Load:
    """Generations that follow each other, `concurrency` at a time."""

    def __init__(
        self, clients: list[Client], wanted: dict[Job, list[int]] | list[tuple[Job, list[int]]], seed: int
    ) -> None:
        self.tally = Tally()
        self._pairs = list(wanted.items()) if isinstance(wanted, dict) else wanted
        self._clients = clients
        self._chance = random.Random(seed)
        self._numbers = itertools.count()
        self.over = False

    async def run(self, place: int) -> None:
        """One generation after the other until `over`; each tenth is given up amid its tokens."""
        while not self.over:
            number = next(self._numbers)
            client = self._clients[place % len(self._clients)]
            job, wanted = self._chance.choice(self._pairs)
            leave = self._chance.randrange(TOKENS) if number % 10 == 9 else -1
            self.tally.started += 1
            self.tally.came[number] = time.monotonic()
            try:
                await self._one(client, job, wanted, number, leave)
            except RalmqError as error:
                self.tally.lost.append(f"{type(error).__name__}: {error}")
            finally:
                del self.tally.came[number]
                self._settled(number)

    def fault(self, kind: str) -> Wait:
        """A fault has just happened: those under way are watched."""
        wait = Wait(kind, time.monotonic(), len(self.tally.came))
        for number in self.tally.came:
            self.tally.waits.setdefault(number, []).append(wait)
        return wait

    async def _one(self, client: Client, job: Job, wanted: list[int], number: int, leave: int) -> None:
        tokens: list[int] = []
        generation = client.generate(job.prompt, model=MODEL, deadline=DEADLINE, **job.options)
        async for token in generation:
            self.tally.came[number] = time.monotonic()
            self._settled(number)
            self.tally.doubled += token.position != len(job.prompt) + len(tokens)
            tokens.append(token.id)
            self.tally.tokens += 1
            if len(tokens) == leave:
                await generation.aclose()
                self.tally.given_up += 1
                self.tally.wrong += tokens != wanted[:leave]
                return
            await asyncio.sleep(0.02)  # a reader
        self.tally.finished += 1
        self.tally.wrong += tokens != wanted

    def _settled(self, number: int) -> None:
        for wait in self.tally.waits.pop(number, []):
            wait.open -= 1
            wait.seconds = max(wait.seconds, time.monotonic() - wait.at)
