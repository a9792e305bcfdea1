"""Spans of language models on a worker: from its own files, or from tensors that the caller sends. Knows no message."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from ...schema.errors import Malformed, Refused
from ...workers.engine.checkpoint import Checkpoint
from ...workers.engine.errors import CheckpointError
from ...workers.engine.fields import read_json
from ...workers.models import EMBEDDED, resolve
from ...workers.weigh import weighed
from .adapters import adapt, linears, shape_of, transposed
from .call import Call
from .compute import Answer
from .models import kept, module_of, staging_of
from .spans import Source, Span, build

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Pretrained:
    """The verbs that are about them.

    Args:
        folder: where this worker's model directories are; "" where it has none. Callers name one of them, never a path.
    """

    def __init__(self, folder: str = "") -> None:
        self._folder = Path(folder).expanduser() if folder else None
        if self._folder is not None and not self._folder.is_dir():
            raise Refused(f"models={folder}: no such directory; give the one that holds the model directories")
        self.verbs: dict[str, Callable[[Call], Answer]] = {
            "own": self._own,
            "span": self._span,
            "linears": _linears,
            "adapt": _adapt,
        }

    def _own(self, call: Call) -> Answer:
        """What it has of that name: the fingerprint of the files and the sizes of its layers; nothing where none."""
        path = self._path(call.text("name"))
        if path is None:
            return {"fingerprint": ""}, []
        try:
            sizes = weighed(path, call.text("name"), call.text("dtype"))
            found = {"sizes": sizes.as_map(), "config": read_json(path / "config.json")}
            return {**found, "fingerprint": Checkpoint(path).fingerprint()}, []
        except CheckpointError as error:
            raise Refused(str(error)) from None

    def _span(self, call: Call) -> Answer:
        first, last, dtype = call.number("first"), call.number("last"), DTYPES.get(call.text("dtype"))
        if dtype is None:
            raise Refused(f"dtype {call.text('dtype')[:20]} is unknown: give one of {', '.join(DTYPES)}")
        source: Source
        try:
            if "staging" in call.body:
                config, source = call.body.get("config"), _sent(call)
                call.table.drop([call.number("staging")], [])
            else:
                path = self._path(call.text("name"))
                if path is None:
                    raise Refused(f"this worker has no model {call.text('name')[:80]}: start it with -o models=FOLDER")
                config, source = read_json(path / "config.json"), Checkpoint(path)
            if not isinstance(config, dict):
                raise Malformed("a model without its config")
            span = build(config, first, last, dtype, source)
        except CheckpointError as error:
            raise Refused(str(error)) from None
        told, tensors = kept(call, span)
        return {**told, **_known(span)}, tensors

    def _path(self, name: str) -> Path | None:
        if name == EMBEDDED:
            return resolve(name)[1]
        if self._folder is None or not name or name.startswith(".") or Path(name).name != name:
            return None
        path = self._folder / name
        return path if (path / "config.json").is_file() else None


class _Sent:
    """Tensors that came from the caller, by name."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _sent(call: Call) -> _Sent:
    names, tensors = call.body.get("names"), staging_of(call).complete()
    if not isinstance(names, list) or len(names) != len(tensors):
        raise Malformed("a span's tensors without their names")
    return _Sent(dict(zip(map(str, names), tensors, strict=True)))


def _known(span: Span) -> dict[str, Any]:
    """What the caller needs to know: names in the whole model, and the embedding's where it is the head, too."""
    whole = {name: span.whole_name(name.removeprefix("model.")) for name, _ in span.named_parameters()}
    return {"whole": whole, "tied": span.embedding if span.tied else ""}


def _spanned(call: Call) -> Span:
    found = module_of(call)
    if not isinstance(found, Span):
        raise Malformed("what is asked about is no part of a pretrained model")
    return found


def _linears(call: Call) -> Answer:
    """The layers that can have an adapter: names here and in the whole model, whether transposed, shape; the head."""
    span = _spanned(call)
    found = [
        [name, span.whole_name(name.removeprefix("model.")), transposed(part), list(shape_of(part))]
        for name, part in linears(span).items()
    ]
    head = next((whole for name, whole, *_ in found if name == span.head_name), "")
    return {"linears": [layer for layer in found if layer[0] != span.head_name], "head": head}, []


def _adapt(call: Call) -> Answer:
    span = _spanned(call)
    names, numbers = call.body.get("names"), [call.body.get(name) for name in ("alpha", "dropout")]
    if not isinstance(names, list) or not all(type(name) is str for name in names):
        raise Malformed("an adapter without the names of its layers")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise Malformed("an adapter's numbers are none")
    adapt(
        span,
        names,
        r=call.number("r"),
        alpha=float(call.body["alpha"]),
        dropout=float(call.body["dropout"]),
        seed=call.number("seed"),
        whole=lambda name: span.whole_name(name.removeprefix("model.")),
    )
    parameters: list[Any] = [[name, found.requires_grad] for name, found in span.named_parameters()]
    return {"parameters": parameters, **_known(span)}, []
