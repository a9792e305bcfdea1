"""Some layers of a language model as one trainable module: transformers' own, cut out of the whole. Knows no caller.

Masks, positions and all else that a layer asks for are the architecture's own: its forward runs over the layers that
are here, and what enters the first of them is put in its place.
"""

from collections.abc import Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...schema.errors import Refused
from ...workers.engine.weightless import without_weights

FAMILIES: Final = frozenset(
    ["opt", "gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "stablelm", "olmo2"]
)
_LOCAL: Final = ("attn_implementation", "auto_map", "dtype", "torch_dtype", "quantization_config")  # of no sender
_BEFORE: Final = ("project_in",)  # modules before the layers that are no embedding


class Source(Protocol):
    """Tensors by name, as a checkpoint has them."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str) -> Tensor: ...


class Span(nn.Module):
    """Layers `first` to `last` - 1; embedding, norm and head where it has the ends.

    Args:
        config: of config.json.

    Raises:
        Refused: a family that is not on the list, transformers is missing, or a config that it does not read.
    """

    def __init__(self, config: Mapping[str, Any], first: int, last: int, dtype: torch.dtype) -> None:
        super().__init__()
        described = _described(config)
        count = int(described.num_hidden_layers)
        if not 0 <= first < last <= count:
            raise Refused(f"layers {first}:{last} of a model of {count} layers: give some that it has")
        self.first, self.last, self.count = first, last, count
        self._dtype = dtype
        self.model = without_weights(described, dtype)
        self._attention = str(described._attn_implementation)
        self.tied = bool(described.tie_word_embeddings)
        self._embedding = _name_of(self.model, self.model.get_input_embeddings()) + ".weight"
        self._head = _name_of(self.model, self.model.get_output_embeddings()) + ".weight"
        self._list = self._cut(described)
        self._drop_ends(int(described.hidden_size))
        self._entering: Tensor | None = None
        self._seen: list[Tensor] | None = None
        for number, layer in enumerate(self._layers()):
            layer.register_forward_pre_hook(self._enter if first and not number else self._note, with_kwargs=True)
        self.model.get_submodule(self._list.rpartition(".")[0]).register_forward_hook(self._left)

    def load(self, source: Source) -> None:
        """Takes its parameters from a checkpoint, tied ones once.

        Raises:
            Refused: one is missing, or has another shape.
        """
        found: dict[str, nn.Parameter] = {}
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            stored = self._stored(name, source)
            if stored not in found:
                tensor = source.get(stored)
                if tensor.shape != parameter.shape:
                    raise Refused(f"{stored} has shape {list(tensor.shape)}, not {list(parameter.shape)}: other files?")
                found[stored] = nn.Parameter(tensor.to(self._dtype), requires_grad=True)
            path, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, found[stored])

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: tuple[Tensor, ...] = (),
        head: tuple[Tensor, ...] = (),
        **wanted: Any,
    ) -> Any:
        """Ids [b, n] or hidden states [b, n, d] to hidden states, or logits [b, n, vocab] at the end.

        Args:
            attention_mask: [b, past + n]: 1 for tokens, 0 for what pads.
            past: keys and values of the tokens before, of one layer after the other.
            head: rows of the head's weight, where that is another span's embedding and trains.
            wanted: `use_cache`, `output_hidden_states`, `output_attentions` (each makes the result a map with `x`,
                `past`, `hidden`, `attentions`), `keep`: logits of so many last tokens only.
        """
        attentions, cached = bool(wanted.get("output_attentions")), bool(wanted.get("use_cache"))
        told: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": cached}
        told["past_key_values"] = cache = self._cache(past) if cached else None
        if position_ids is not None:
            told["position_ids"] = position_ids
        if attentions:
            told["output_attentions"] = True
        ends = self.last == self.count
        if ends and wanted.get("keep"):
            told["logits_to_keep"] = int(wanted["keep"])
        self.model.config._attn_implementation = "eager" if attentions else self._attention
        self._seen = [] if wanted.get("output_hidden_states") else None
        self._entering = x if self.first else None
        told["input_ids"] = x.new_zeros(x.shape[:2], dtype=torch.long) if self.first else x
        try:
            if ends and head:
                out = functional_call(self.model, {self._head: torch.cat(head)}, (), told)
            else:
                out = (self.model if ends else self.model.base_model)(**told)
            found = {"x": out.logits if ends else out[0]}
            if self._seen is not None:
                found["hidden"] = tuple(self._seen if ends else self._seen[:-1])
        finally:
            self._entering, self._seen = None, None
        if attentions:
            found["attentions"] = tuple(out.attentions)
        if cache is not None:
            found["past"] = tuple(part for layer in cache.layers[self.first :] for part in (layer.keys, layer.values))
        return found if len(found) > 1 else found["x"]

    @property
    def embedding(self) -> str:
        """The name of the embedding's weight, where it is here."""
        return "model." + self._embedding

    @property
    def head_name(self) -> str:
        """The name here of the layer that gives logits."""
        return "model." + self._head.rpartition(".")[0]

    def whole_name(self, name: str) -> str:
        """What a parameter of `model` here is called in the whole model, as in a checkpoint of it."""
        if not name.startswith(self._list + "."):
            return name
        number, dot, rest = name[len(self._list) + 1 :].partition(".")
        return f"{self._list}.{int(number) + self.first}{dot}{rest}"

    # -- inside

    def _layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self._list).children())

    def _stored(self, name: str, source: Source) -> str:
        whole = self.whole_name(self._embedding if self.tied and name == self._head else name)
        short = whole.removeprefix(f"{self.model.base_model_prefix}.")
        found = next((known for known in (whole, short) if known in source), None)
        if found is None:
            raise Refused(f"the model's files have no {whole}: they are incomplete, or of another config.json")
        return found

    def _cut(self, described: Any) -> str:
        """Leaves its layers alone, and their entries in the config's lists; says what the list of them is called."""
        lists = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.count
        ]
        path = min(lists, key=lambda name: name.count("."))
        holder, _, name = path.rpartition(".")
        whole: Any = self.model.get_submodule(path)
        setattr(self.model.get_submodule(holder), name, nn.ModuleList(list(whole)[self.first : self.last]))
        for key, value in list(vars(described).items()):
            if "layer" in key and isinstance(value, list) and len(value) == self.count:
                vars(described)[key] = value[self.first : self.last]  # past the class's own checks of its length
        vars(described)["num_hidden_layers"] = self.last - self.first
        return str(path)

    def _drop_ends(self, width: int) -> None:
        """Puts modules without weights in the place of those that other spans have."""
        inside = {part for layer in self._layers() for part in layer.modules()}
        taken = self.model.get_input_embeddings()
        for path, module in list(self.model.named_modules()):
            if module in inside or not list(module.parameters(recurse=False)):
                continue
            holder, _, name = path.rpartition(".")
            before = isinstance(module, nn.Embedding) or name in _BEFORE
            if before and self.first:
                blank = _Blank(width if module is taken else 0, self._dtype)
                setattr(self.model.get_submodule(holder), name, blank if isinstance(module, nn.Embedding) else _Same())
            elif not before and self.last < self.count:
                setattr(self.model.get_submodule(holder), name, _Same())

    def _cache(self, past: tuple[Tensor, ...]) -> Any:
        """Full keys and values for every layer here; layers before them, which nobody asks, stand for the first."""
        from transformers.cache_utils import Cache, DynamicLayer

        layers = [DynamicLayer() for _ in range(self.first, self.last)]
        for layer, keys, values in zip(layers, past[::2], past[1::2], strict=False):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return Cache(layers=[layers[0]] * self.first + layers)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._entering is not None
        if self._seen is not None:
            self._seen.append(self._entering)
        if args:
            return (self._entering, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._entering}

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._seen is not None:
            self._seen.append(args[0] if args else kwargs["hidden_states"])

    def _left(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._seen is not None:
            self._seen.append(output[0])


class _Blank(nn.Module):
    """An embedding of nothing: [b, n, width] zeros that take no memory, or one zero that is added to them."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width = width
        self.register_buffer("zero", torch.zeros((), dtype=dtype), persistent=False)

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        zero = self.get_buffer("zero")
        return zero.expand(*ids.shape[:2], self._width) if self._width else zero


class _Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _described(config: Mapping[str, Any]) -> Any:
    """transformers' config of a family on the list; nothing in it names code or where to get some."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise Refused(f"model_type {str(family)[:80]!r} is not trained over workers: use {', '.join(sorted(FAMILIES))}")
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise Refused("this worker has no transformers: run pip install 'ralmq[hf]' there") from None
    clean = {name: value for name, value in config.items() if not name.startswith("_") and name not in _LOCAL}
    try:
        return CONFIG_MAPPING[family].from_dict(clean)
    except Exception as error:  # whatever its validators raise
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise Refused(f"transformers does not read this config of {family}: {cause}") from None


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return str(next(name for name, found in model.named_modules() if found is module))


def build(config: Mapping[str, Any], first: int, last: int, dtype: torch.dtype, source: Source) -> Span:
    """A span with its weights, in eval mode. Raises Refused as `Span` and `Span.load`."""
    span = Span(config, first, last, dtype)
    span.load(source)
    return span.eval()
