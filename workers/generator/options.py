"""The body of a request to `generate:<model>`, checked, and the task for the pipeline that follows from it."""

import random
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..params import Neighbours, Retrieval, Sampling, Task


class Options(Neighbours, Sampling):
    """What a client may ask for; see client/generation.py for the meaning of each."""

    prompt: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)
    retrieve: str | None = None
    policy: Literal["knn"] = "knn"

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def task(self) -> Task:
        """The request to the pipeline; a seed is drawn where none was given."""
        retrieval: Retrieval | None = None
        if self.retrieve is not None:
            retrieval = Retrieval(index=self.retrieve, **self.model_dump(include=set(Neighbours.model_fields)))
        seed = random.getrandbits(63) if self.seed is None else self.seed
        return Task(seed=seed, retrieve=retrieval, **self.model_dump(include=set(Sampling.model_fields)))


def wire(task: Task) -> dict[str, Any]:
    """A task as a message body."""
    return task.model_dump(exclude_defaults=True)
