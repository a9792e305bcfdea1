"""`ralmq index build`: texts or vectors in, an index directory out. Knows what goes together, and no index."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..schema.errors import Refused
from . import index_build as made_of
from .index_add import add
from .index_live import register
from .shared import Keys, check_broker, run, show_help

index = typer.Typer(help="Indexes of your own texts and vectors.", invoke_without_command=True, rich_markup_mode=None)
register(index)
index.command()(add)


@index.callback()
def _group(context: typer.Context) -> None:
    """Indexes of your own texts and vectors."""
    show_help(context)


Sources = Annotated[
    list[Path],
    typer.Argument(metavar="SOURCE", help=".txt .md .rst .py files or folders; or one .npy file of vectors."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Index a model's hidden states over the texts, for kNN-LM: a directory, or demo."),
]
Encoder = Annotated[
    str,
    typer.Option(
        "--encoder",
        metavar="NAME|DIR",
        help="Index vectors of the texts' passages: the directory of an encoder, or the name of one that is served as "
        "embed:NAME. With vectors: what made them.",
        show_default=False,
    ),
]
Tokens = Annotated[
    int | None, typer.Option("--max-tokens", min=2, help="With --model: index so many tokens.  [default: all]")
]
Factory = Annotated[
    str | None,
    typer.Option(
        help="faiss's index string: Flat, IVF1024,Flat, IVF1024,PQ32, HNSW32 ...  [default: by the number of vectors]"
    ),
]
Metric = Annotated[
    Literal["l2", "ip", "cosine"] | None,
    typer.Option(help="How vectors are compared.  [default: cosine for an encoder's texts, else l2]"),
]
By = Annotated[Literal["rows", "list"], typer.Option(help="Spread entries in turn, or whole lists of an IVF index.")]
Fields = Annotated[
    Path | None, typer.Option("--fields", metavar="JSONL", help="With vectors: their payload fields, a line each.")
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--broker",
        metavar="URL",
        callback=check_broker,
        help="A cluster that serves the model or the encoder.  [default: of a directory one is started; a name is "
        "asked at $RALMQ_BROKER, else tcp://127.0.0.1:5555]",
    ),
]


@index.command()
def build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the index is called when it is served.")],
    source: Sources,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the index is written.")],
    model: Model = None,
    text: Annotated[bool, typer.Option("--text", help="Index the words of the texts (BM25); no model.")] = False,
    encoder: Encoder = "",
    max_tokens: Tokens = None,
    factory: Factory = None,
    metric: Metric = None,
    shards: Annotated[int, typer.Option("--shards", min=1, help="Spread it over so many servers.")] = 1,
    by: By = "rows",
    fields: Fields = None,
    replace: Annotated[bool, typer.Option("--replace", help="Build over the index that --out holds.")] = False,
    broker: Cluster = None,
    keys: Keys = None,
) -> None:
    """Build an index of a model's hidden states over texts, of their passages, of their words, or of vectors."""
    sources, out = [path.expanduser() for path in source], out.expanduser()
    vectors = [path for path in sources if path.suffix == ".npy"]
    _check_goal(sources, vectors, model, text, encoder)
    _check_extras({"--fields": fields}, bool(vectors), "a .npy file of vectors")
    _check_extras({"--max-tokens": max_tokens}, model is not None, "--model")
    of_vectors = {"--factory": factory, "--metric": metric, "--shards": shards > 1, "--by": by != "rows"}
    _check_extras(of_vectors, not text, "an index of vectors")
    if not replace:
        made_of.check_free(out)
    metric = metric or ("cosine" if encoder and not vectors else "l2")
    how = {"factory": factory, "metric": metric, "shards": shards, "by": by, "threads": made_of.threads()}
    if text:
        made_of.words(name, sources, out)
    else:
        made_of.check(name, out, how)
        if vectors:
            made = made_of.vectors(name, vectors[0], out, fields, encoder, how)
        elif model is not None:
            made = run(made_of.datastore(name, sources, model, out, max_tokens, broker, how))
        else:
            made = run(made_of.encoded(name, sources, encoder, out, broker, how))
        typer.echo(f"{out}: {made.total} entries of {made.dimension} dimensions ({made.factory}, {made.metric})")
    _say_how(out, shards, encoder)


def _check_goal(sources: list[Path], vectors: list[Path], model: str | None, text: bool, encoder: str) -> None:
    """Refuses what names no index, or two."""
    goals = bool(vectors) + text + (model is not None) + bool(encoder and not vectors)
    if goals != 1 or (vectors and len(sources) > 1):
        raise Refused(
            "give texts with one of --model, --encoder and --text, or one .npy file of vectors with neither --model "
            "nor --text"
        )


def _check_extras(options: dict[str, Any], right: bool, whose: str) -> None:
    """Refuses options that the index to be built has no use for."""
    given = [name for name, value in options.items() if value]
    if given and not right:
        raise Refused(f"{' and '.join(given)}: of {whose} alone; leave out here")


def _say_how(out: Path, shards: int, encoder: str) -> None:
    if shards > 1:
        each = f"`ralmq worker index -o index={out} -o shard=i/{shards}`"
        typer.echo(f"serve it with `ralmq up --index {out}`, or each shard i with {each}")
    else:
        typer.echo(f"serve it with `ralmq up --index {out}` or `ralmq worker index -o index={out}`")
    if encoder and (directory := made_of.named(encoder)[1]) is not None:
        typer.echo(f"and what makes vectors of questions with `ralmq worker encoder -o model={directory}`")
