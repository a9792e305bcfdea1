"""`ralmq generate`: the options of a generation as a command line. Knows their names, not their use."""

import enum
import json
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from ..schema.address import DEFAULT_BROKER
from ..schema.errors import Refused
from .shared import Broker, Json, Keys, print_json, run


class Policy(enum.StrEnum):
    """How a generation uses what it retrieves."""

    knn = "knn"
    ngram = "ngram"
    both = "knn+ngram"
    context = "context"
    encdec = "encdec"


RETRIEVAL = (
    "policy",
    "interval",
    "staleness",
    "k",
    "nprobe",
    "knn_lambda",
    "knn_temperature",
    "ngram_lambda",
    "order",
    "stride",
    "template",
    "query_tokens",
)


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Name of a served model.")],
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="One a paragraph, or .jsonl; - for stdin. Prints jsonl."),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Prompts of the file at a time.")] = 8,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Tokens to generate at most.")] = None,
    min_tokens: Annotated[int | None, typer.Option("--min-tokens", help="No end before so many.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from the k likeliest alone.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from so much probability alone.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Of at least that share of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Divides logits of tokens seen; 1: none.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Off logits of tokens generated.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same for each time.")] = None,
    logit_bias: Annotated[list[str] | None, typer.Option(metavar="ID=VALUE", help="Repeatable.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same one, the same text.  [default: drawn]")] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", min=1, max=64, help="So many texts.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends it; may be repeated.")] = None,
    stop_ids: Annotated[list[int] | None, typer.Option("--stop-id", help="A token that ends it; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of text.")] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="With --json: log-probabilities.")] = False,
    top_logprobs: Annotated[int | None, typer.Option("--top-logprobs", help="And of the N likeliest tokens.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="The prompt first.")] = False,
    hooks: Annotated[
        list[str] | None, typer.Option("--hook", metavar="NAME[=JSON]", help="A logits hook of the stages; repeatable.")
    ] = None,
    retrieve: Annotated[str | None, typer.Option("--retrieve", metavar="INDEX", help="Retrieve from an index.")] = None,
    policy: Annotated[Policy | None, typer.Option("--policy", help="How what is retrieved is used.")] = None,
    interval: Annotated[int | None, typer.Option("--interval", help="Retrieve each so many tokens.")] = None,
    staleness: Annotated[int | None, typer.Option("--staleness", help="Use the answer of so many tokens ago.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours of each retrieval.")] = None,
    nprobe: Annotated[int | None, typer.Option("--nprobe", help="Lists of the index to look at.  [default: 8]")] = None,
    knn_lambda: Annotated[float | None, typer.Option("--knn-lambda", help="Share of the neighbours, 0 to 1.")] = None,
    knn_temperature: Annotated[float | None, typer.Option("--knn-temperature", help="Flattens distances.")] = None,
    ngram_lambda: Annotated[float | None, typer.Option("--ngram-lambda", help="Share of the counts, 0 to 1.")] = None,
    order: Annotated[int | None, typer.Option("--order", metavar="N", help="Tokens of an n-gram.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Passages anew each so many tokens.")] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", metavar="TEXT", help="With {passages} and {prompt}.  [default: just both]"),
    ] = None,
    query_tokens: Annotated[int | None, typer.Option("--query-tokens", help="Last ones, to retrieve for.")] = None,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds until it is given up.")] = 600.0,
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> int | None:
    """Generate text from a prompt, shown as it comes, or from each prompt of a file."""
    options = _options(context.params)
    if (prompt is None) == (prompts is None):
        raise Refused("give a prompt, or --prompts FILE" + (", not both" if prompts else ""))
    if prompts is not None:
        return _from_file(prompts, model, options, concurrency, deadline, broker)
    assert prompt is not None
    _one(prompt, model, options, deadline, broker, as_json)
    return None


class WithDefaults(TyperCommand):
    """Says in its help what an option is that is not given: the client knows, and the signature does not."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        from ..client.generation import DEFAULTS

        for option in self.params:
            value = DEFAULTS.get(option.name or "")
            if isinstance(option, TyperOption) and isinstance(value, int | float | str) and not option.is_flag:
                shown = f"[default: {value:g}]" if not isinstance(value, str) else f"[default: {value}]"
                option.help = f"{(option.help or '').removesuffix(shown).rstrip()}  {shown}"
        super().format_options(ctx, formatter)


def _options(params: dict[str, Any]) -> dict[str, Any]:
    """Those of `client.generate` that were given."""
    from ..client.generation import DEFAULTS

    found = {
        name: value for name in DEFAULTS if (value := params.get(name)) not in (None, [], ()) and value is not False
    }
    alone = [name for name in RETRIEVAL if name in found]
    if "retrieve" not in found and alone:
        raise Refused(f"--{alone[0].replace('_', '-')} without --retrieve: name the index to retrieve from")
    if "policy" in found:
        found["policy"] = found["policy"].value
    if "logit_bias" in found:
        found["logit_bias"] = dict(map(_bias, found["logit_bias"]))
    if "hooks" in found:
        found["hooks"] = dict(map(_hook, found["hooks"]))
    return found


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise Refused(f"--logit-bias {text}: give a token id and a number, as 42=-5") from None


def _hook(text: str) -> tuple[str, dict[str, Any]]:
    name, equals, given = text.partition("=")
    try:
        params = json.loads(given) if equals else {}
    except ValueError:
        params = None
    if not name or not isinstance(params, dict):
        raise Refused(f'--hook {text}: give its name, and its parameters as a JSON object, as name={{"a": 1}}')
    return name, params


def _one(prompt: str, model: str, options: dict[str, Any], deadline: float, broker: str, as_json: bool) -> None:
    if "retrieve" in options and as_json:
        options["passages"] = True

    async def asked() -> dict[str, Any]:
        from ..client.client import connect
        from .collected import collected

        async with connect(broker) as client:
            generation = client.generate(prompt, model=model, deadline=deadline, **options)
            return await collected(generation, options, show=not as_json)

    document = run(asked())
    if as_json:
        print_json(document)


def _from_file(
    name: str, model: str, options: dict[str, Any], concurrency: int, deadline: float, broker: str
) -> int | None:
    from .prompts import answer, read_prompts

    found = read_prompts(name, options)
    return 1 if run(answer(broker, model, found, concurrency, deadline)) else None
