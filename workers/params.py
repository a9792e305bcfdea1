"""What a generation may ask for, checked: sampling and retrieval. Knows values and ranges, not their use."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..schema.errors import Refused

MAX_TOKENS = 1 << 20


class Checked(BaseModel):
    """A body whose unknown fields and wrong values are refused in one line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, body: dict[str, Any]) -> Self:
        """The body as an object.

        Raises:
            Refused: naming the first wrong field.
        """
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "request"
            if first["type"] == "extra_forbidden":
                raise Refused(f"unknown option {place}: there are {', '.join(cls.model_fields)}") from None
            said = first["msg"].removeprefix("Value error, ")
            own = first["type"] == "value_error" and not first["loc"]  # of several fields, which it names
            raise Refused(said if own else f"{place}: {said}") from None


Policy = Literal["knn", "ngram", "knn+ngram", "context", "encdec"]
ORDER = 8  # tokens of an n-gram at most


class Neighbours(Checked):
    """How what is retrieved changes the next token's distribution, see docs/retrieval-policies.md.

    Attributes:
        interval: retrieve at new-token positions 0, interval, 2 x interval ...
        staleness: use the answer to the query of so many positions ago, so that its wait is hidden. Queries whose
            answer would come to use behind the last token are not sent: T tokens send ceil((T - staleness) / interval).
        knn_lambda: weight of the neighbours' distribution (kNN-LM: Khandelwal et al., 2020).
        knn_temperature: softmax(-distance / temperature) over the neighbours.
        ngram_lambda: weight of the n-gram counts' distribution.
        order: tokens of an n-gram, the next one counted.
        passages: send what was retrieved along with the tokens.
    """

    k: int = Field(default=8, ge=1, le=1024)
    nprobe: int | None = Field(default=None, ge=1)
    interval: int = Field(default=1, ge=1)
    staleness: int = Field(default=0, ge=0, le=7)
    knn_lambda: float = Field(default=0.25, ge=0.0, le=1.0)
    knn_temperature: float = Field(default=10.0, ge=1e-6)
    ngram_lambda: float = Field(default=0.25, ge=0.0, le=1.0)
    order: int = Field(default=3, ge=2, le=ORDER)
    passages: bool = False


class Retrieval(Neighbours):
    """Which index is asked at the last stage, and how."""

    index: str
    policy: Literal["knn", "ngram", "knn+ngram"] = "knn"

    @property
    def parts(self) -> tuple[str, ...]:
        """What the policy asks the index for."""
        return tuple(self.policy.split("+"))

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if len(self.parts) > 1 and self.knn_lambda + self.ngram_lambda > 1.0:
            both = f"knn_lambda={self.knn_lambda:g} and ngram_lambda={self.ngram_lambda:g}"
            raise ValueError(f"{both} are more than 1 together: lower one of them")
        return self


class Sampling(Checked):
    """How tokens are chosen, and when they end; docs/sampling.md says what each does, and in which order.

    Attributes:
        stop_ids: token ids that end the text, beside the checkpoint's own.
        logit_bias: pairs of id and what is added to its logit; a map is taken, too.
        hooks: parameters of each logits hook that is to be used, by its name.
    """

    max_tokens: int = Field(default=64, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.0, ge=0.0, le=1e3, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: tuple[tuple[int, Annotated[float, Field(ge=-100.0, le=100.0)]], ...] = Field(
        default=(), max_length=1024
    )
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    stop_ids: tuple[int, ...] = Field(default=(), max_length=64)
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    hooks: dict[str, dict[str, Any]] = Field(default={}, max_length=8)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return tuple(value.items()) if isinstance(value, dict) else value


class Task(Sampling):
    """The body of a request to `lm:<model>`; its one tensor holds the prompt, int32 [n].

    Attributes:
        mode: "generate", or "score": hidden states and log-probabilities of the prompt itself.
        prompt: tokens of the original prompt, where the tensor also holds tokens generated before (a replay).
        context: how many tokens of the prompt the asker does not count, as passages put before it: positions in the
            answer, and those that random numbers depend on, are less by so many.
        states: whether a score sends hidden states; without them only log-probabilities travel.
    """

    mode: Literal["generate", "score"] = "generate"
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    prompt: int | None = Field(default=None, ge=1)
    context: int = Field(default=0, ge=0)
    states: bool = True
    retrieve: Retrieval | None = None
