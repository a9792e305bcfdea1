"""A client that reads generated texts, each token of which it knows in advance. Knows no fault."""

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from ralmq.client.link import Link
from ralmq.schema.errors import RalmqError
from ralmq.schema.message import Hello
from simulation.invariants import holds
from simulation.process import Asker, Process
from simulation.truth import K, text
from simulation.world import World

ALLOWED = ("busy", "deadline", "no_service", "poisoned", "cancelled", "closed")


@dataclass(slots=True, eq=False)
class Text:
    """A generation, from its reader's side."""

    service: str
    name: str
    ended: str = ""
    read: int = 0


class Reader(Process):
    """Asks for texts at random, reads some of them slowly, gives some of them up."""

    def __init__(self, world: World, name: str, pace: float) -> None:
        super().__init__(world, name)
        self.pace = pace
        self.active = True
        self.texts: list[Text] = []
        self.waiting = 0
        self.link = None
        self.start(self._open())

    async def _open(self) -> None:
        link = Link("sim://", Hello(bytes(16), self.name))
        self.link = link
        await link.open(float("inf"))
        self.client = Asker(link, float("inf"))
        rng = self.world.rng
        await asyncio.sleep(rng.uniform(0, self.pace))
        while self.active:
            for _ in range(rng.choice([1, 1, 1, 4])):
                task = asyncio.get_running_loop().create_task(self._read(rng))
                task.add_done_callback(self._ended)
            await asyncio.sleep(self.pace * rng.uniform(0.2, 2.0))

    async def _read(self, rng: random.Random) -> None:
        """One text: each position once, in order, computed from the right prefix; or a typed error."""
        prompt = _prompt(rng)
        most = rng.choice([1, 8, 20, 40, 64])
        seed = rng.randrange(1 << 40)
        interval = rng.choice([0, 0, 0, 0, 4, 9])
        stops = tuple(rng.randrange(997) for _ in range(rng.choice([0, 0, 40])))
        warm = rng.random() < 0.5
        options: dict[str, Any] = {"max_tokens": most, "seed": seed, "temperature": 1.0 if warm else 0.0}
        options |= {"stop_ids": stops} if stops else {}
        options |= {"retrieve": "docs", "interval": interval, "k": K} if interval else {}
        tokens, hashes, reason = text(prompt, most, seed if warm else -1, interval, stops)
        slow, leaves = rng.random() < 0.15, rng.choice([-1] * 9 + [rng.randrange(most)])
        known = Text("generate:m", f"{self.name}, text {len(self.texts)}")
        self.texts.append(known)
        generation = self.client.generate(
            prompt,
            model="m",
            deadline=rng.choice([0.5, 2.0, 6.0, 6.0]),
            retries=rng.choice([0, 4]),
            wait_service=rng.choice([0.0, 2.0]),
            priority=rng.randrange(10),
            **options,
        )
        try:
            async for token in generation:
                place = known.read
                if token.id < 0:
                    continue
                wanted = (
                    (len(prompt) + place, tokens[place], float(hashes[place] % (1 << 52)))
                    if place < len(tokens)
                    else None
                )
                if (token.position, token.id, token.logprob) != wanted:
                    holds(False, f"{known.name}: token {place} is {token}, expected {wanted}")
                known.read += 1
                if place == leaves:
                    await generation.aclose()
                    known.ended = "gave up"
                    return
                if slow:
                    await asyncio.sleep(rng.choice([0.05, 0.3]))
            right = known.read == len(tokens) and generation.finish_reason == reason
            if not right:
                holds(False, f"{known.name}: {known.read} of {len(tokens)} tokens, {generation.finish_reason}")
            known.ended = "final"
        except RalmqError as error:
            known.ended = error.code
            holds(error.code in ALLOWED, f"{known.name} ended with {error.code}: {error.message}")

    def leave(self) -> None:
        """Closes its connection and ends."""
        self.active = False
        if self.link is not None:
            self.loop.call(self.link.close)


def _prompt(rng: random.Random) -> list[int]:
    """Some begin alike, so that their blocks are shared."""
    begin = rng.choice([[], [], list(range(7, 7 + 16 * rng.choice([1, 2])))])
    return [*begin, *[rng.randrange(997) for _ in range(rng.choice([1, 3, 20]))]]
