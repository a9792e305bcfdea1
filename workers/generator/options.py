"""The body of a request to `generate:<model>`, checked, and the tasks for the pipeline that follow from it."""

import hashlib
import random
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..params import MAX_TOKENS, Neighbours, Policy, Retrieval, Sampling, Task
from .context import PASSAGES, PROMPT, TEMPLATE

MIXED = ("knn", "ngram", "knn+ngram")
NEAREST = ("knn", "knn+ngram", "context", "encdec")
OF = {  # the policies that these options belong to
    "k": NEAREST,
    "nprobe": NEAREST,
    "interval": (*MIXED, "encdec"),
    "staleness": MIXED,
    "knn_lambda": ("knn", "knn+ngram"),
    "knn_temperature": ("knn", "knn+ngram"),
    "ngram_lambda": ("ngram", "knn+ngram"),
    "order": ("ngram", "knn+ngram"),
    "stride": ("context",),
    "template": ("context",),
    "query_tokens": ("context", "encdec"),
}
OUTSIDE = ("context", "encdec")  # policies that the generator follows; those of others the stages


class Options(Neighbours, Sampling):
    """What a client may ask for; see docs/sampling.md for the meaning of each.

    Attributes:
        made: ids that the asker has of each of the n texts, where an earlier generator was lost.
        ended: why each of them ended, as far as they did.
        stride, template, query_tokens: of the policy context: new tokens after which passages are retrieved anew, the
            text that they and the prompt are put in, and how many of the last tokens are the query.
        chunks: what the encoder of an encoder-decoder is to read, texts or token ids, instead of what is retrieved.
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
    policy: Policy = "knn"
    stride: int = Field(default=16, ge=1, le=MAX_TOKENS)
    template: str = Field(default=TEMPLATE, max_length=1 << 16)
    query_tokens: int = Field(default=32, ge=1, le=1024)
    chunks: tuple[str | tuple[int, ...], ...] | None = Field(default=None, max_length=1024)

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

    @field_validator("template")
    @classmethod
    def _places(cls, value: str) -> str:
        if [value.count(place) for place in (PASSAGES, PROMPT)] != [1, 1] or value.find(PROMPT) < value.find(PASSAGES):
            raise ValueError(f"give a text with {PASSAGES} once and, behind it, {PROMPT} once")
        return value

    @model_validator(mode="after")
    def _of_the_policy(self) -> Self:
        if self.chunks is not None and (self.retrieve is not None or self.policy != "encdec"):
            raise ValueError("chunks are what policy=encdec reads without retrieve: give policy=encdec and no index")
        if self.chunks is not None and (late := self.model_fields_set & {"interval", "k", "nprobe", "query_tokens"}):
            raise ValueError(f"{min(late)} is of what is retrieved, and chunks are given: leave one of them out")
        if self.chunks is not None and not all(self.chunks or [""]):
            raise ValueError("no chunks: give at least one, each a text or a list of token ids that is not empty")
        if self.retrieve is None and self.chunks is None:
            if self.policy == "encdec":
                raise ValueError("no chunks: policy=encdec needs retrieve=INDEX to take them from, or chunks=[...]")
            if "policy" in self.model_fields_set:
                raise ValueError(f"policy={self.policy} without retrieve: name the index to retrieve from")
            return self
        for name, policies in OF.items():
            if name in self.model_fields_set and self.policy not in policies:
                which = " or ".join(policies)
                raise ValueError(f"{name} belongs to policy {which}, not to {self.policy}: leave it out")
        return self

    def tasks(self) -> list[Task]:
        """The requests to the pipeline, one of each of the n texts; a seed is drawn where none was given.

        Raises:
            Refused: shares of more than all.
        """
        retrieval: Retrieval | None = None
        if self.retrieve is not None and self.policy not in OUTSIDE:
            chosen = self.model_dump(include=set(Neighbours.model_fields))
            retrieval = Retrieval.of({"index": self.retrieve, "policy": self.policy, **chosen})
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
