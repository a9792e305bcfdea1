"""The body of a request to `generate:<model>`, checked, and the tasks for the pipeline that follow from it."""

import hashlib
import random
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..params import MAX_TOKENS, Neighbours, Retrieval, Sampling, Task


class Options(Neighbours, Sampling):
    """What a client may ask for; see docs/sampling.md for the meaning of each.

    Attributes:
        made: ids that the asker has of each of the n texts, where an earlier generator was lost.
        ended: why each of them ended, as far as they did.
    """

    max_tokens: int = Field(default=64, ge=0, le=MAX_TOKENS)
    prompt: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    n: int = Field(default=1, ge=1, le=64)
    echo: bool = False
    made: tuple[tuple[int, ...], ...] = Field(default=(), max_length=64)
    ended: tuple[Literal["", "stop", "length"], ...] = Field(default=(), max_length=64)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)
    retrieve: str | None = None
    policy: Literal["knn"] = "knn"

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 leaves nothing to do: give at least 1, or echo")
        if self.min_tokens > max(1, self.max_tokens):
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: lower it")
        if self.n > 1 and self.temperature == 0.0:
            raise ValueError(f"n={self.n} with temperature 0 gives the same text each time: give a temperature")
        if len(self.made) not in (0, self.n) or len(self.ended) != len(self.made):
            raise ValueError(f"made, ended: give one of each for each of the n={self.n} texts, or none")
        return self

    def tasks(self) -> list[Task]:
        """The requests to the pipeline, one of each of the n texts; a seed is drawn where none was given."""
        retrieval: Retrieval | None = None
        if self.retrieve is not None:
            retrieval = Retrieval(index=self.retrieve, **self.model_dump(include=set(Neighbours.model_fields)))
        seed = random.getrandbits(63) if self.seed is None else self.seed
        sampling = self.model_dump(include=set(Sampling.model_fields) - {"max_tokens"})
        return [
            Task(seed=seed_of(seed, index), retrieve=retrieval, max_tokens=max(1, self.max_tokens), **sampling)
            for index in range(self.n)
        ]


def seed_of(seed: int, index: int) -> int:
    """The seed of one of the n texts; the first has the one that was given, so that it is the text of n = 1."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def wire(task: Task) -> dict[str, Any]:
    """A task as a message body."""
    return task.model_dump(exclude_defaults=True)
