"""The body of a request to `generate:<model>`, checked, and the task for the pipeline that follows from it."""

import random
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..params import MAX_TOKENS, Checked, Retrieval, Task


class Options(Checked):
    """What a client may ask for; see client/generation.py for the meaning of each."""

    prompt: str | None = None
    max_tokens: int = Field(default=64, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.0, ge=0.0, le=1e3, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)
    ignore_eos: bool = False
    logprobs: bool = False
    retrieve: str | None = None
    policy: Literal["knn"] = "knn"
    interval: int = Field(default=1, ge=1)
    staleness: int = Field(default=0, ge=0, le=7)
    k: int = Field(default=8, ge=1, le=1024)
    nprobe: int | None = Field(default=None, ge=1)
    knn_lambda: float = Field(default=0.25, ge=0.0, le=1.0)
    knn_temperature: float = Field(default=10.0, ge=1e-6)
    passages: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def task(self) -> Task:
        """The request to the pipeline; a seed is drawn where none was given."""
        retrieval: Retrieval | None = None
        if self.retrieve is not None:
            retrieval = Retrieval(
                index=self.retrieve,
                k=self.k,
                nprobe=self.nprobe,
                interval=self.interval,
                staleness=self.staleness,
                knn_lambda=self.knn_lambda,
                knn_temperature=self.knn_temperature,
                passages=self.passages,
            )
        return Task(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=random.getrandbits(63) if self.seed is None else self.seed,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            retrieve=retrieval,
        )


def wire(task: Task) -> dict[str, Any]:
    """A task as a message body."""
    return task.model_dump(exclude_defaults=True)
