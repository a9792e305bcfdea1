"""An architecture of transformers cut down to a span: which modules and tensors, and whether it can be cut at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .foreign import Probe
from .hf import load_config
from .layout import Layout
from .model import ModelConfig
from .weightless import without_weights

_UNSTEADY = ("dynamic", "longrope")  # rotary positions that depend on how long the longest sequence of a batch is


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class _Bypass(nn.Module):
    """Stands where a layer stood, and gives what it is told to give in the form in which that layer would."""

    def __init__(self, layer: nn.Module, returned: int | None) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not as a module of this one
        self._returned = returned  # how many things the layer returns; None: hidden states, not in a tuple
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.hidden if self._returned is None else (self.hidden, *[None] * (self._returned - 1))


class Skeleton:
    """The architecture's own model with this span's layers alone: `base` runs them, `head` what is behind them."""

    def __init__(
        self, path: Path, config: ModelConfig, first: int, last: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.bytes = 0
        self._path = path
        self._config = config
        self._first = first
        self._dtype = dtype
        self._device = device
        self._behind: set[nn.Module] = set()  # modules that run after the layers
        self._before: set[nn.Module] = set()
        self._passed = False  # the probe is behind the layers
        self._returned: int | None = None  # by a layer; None: no tuple
        self._shared: dict[str, Tensor] = {}
        described = load_config(path)
        self._refuse_unsteady(described)
        self._model = self._build(described)
        self._layout = Layout(Checkpoint(path), self._model)
        self.base: nn.Module = self._model.base_model
        self._holder, self._list = self._find_layers()
        self.layers = self._cut(described, last)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._inside = {module for layer in self.layers for module in layer.modules()}
        self._stand_in()

    def _fail(self, what: str) -> CheckpointError:
        model_type = self._model_type
        return CheckpointError(f"{self._path / 'config.json'}: model_type {model_type!r} {what}; use another model")

    def _refuse_unsteady(self, described: Any) -> None:
        self._model_type = described.model_type
        parameters = getattr(described, "rope_parameters", None) or {}
        for rope in (parameters, *parameters.values()):
            kind = rope.get("rope_type") if isinstance(rope, dict) else None
            if kind in _UNSTEADY:
                raise self._fail(f"has {kind} rotary positions, which change keys that are already cached")

    def _build(self, described: Any) -> Any:
        try:
            return without_weights(described, self._dtype).requires_grad_(False)
        except (ValueError, KeyError) as error:
            raise self._fail(f"is no language model to transformers ({str(error).splitlines()[0][:80]})") from None

    def _find_layers(self) -> tuple[nn.Module, str]:
        """The module that holds the list of layers, and its name there: the outermost list of so many modules."""
        lists = [
            name
            for name, module in self.base.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self._config.layers
        ]
        if not lists:
            raise self._fail(f"has no list of {self._config.layers} layers")
        holder, _, name = min(lists, key=lambda name: name.count(".")).rpartition(".")
        return self.base.get_submodule(holder), name

    def _cut(self, described: Any, last: int) -> nn.ModuleList:
        """Drops the other layers and renumbers these, so that they find their place in cache and config."""
        whole: nn.ModuleList = getattr(self._holder, self._list)
        kept = nn.ModuleList(list(whole)[self._first : last])
        for number, layer in enumerate(kept):
            for module in layer.modules():
                for name in ("layer_idx", "layer_id"):
                    if getattr(module, name, None) == self._first + number:
                        setattr(module, name, number)
        setattr(self._holder, self._list, kept)
        for name, value in list(vars(described).items()):
            if "layer" in name and isinstance(value, list) and len(value) == self._config.layers:
                # Past the checks of the class, which compare the list with a number of layers.
                vars(described)[name] = value[self._first : last]
        described.num_hidden_layers = len(kept)
        return kept

    def _stand_in(self) -> None:
        """Zeros without memory for every parameter outside the layers; they mark what is computed from them."""
        for module, name, parameter in self._parameters(self._model):
            if module not in self._inside:
                zeros = torch.zeros((), dtype=self._dtype, device=self._device).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=True)

    @staticmethod
    def _parameters(top: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        for module in top.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    yield module, name, parameter

    def probe(self) -> list[tuple[Tensor, Tensor]]:
        """Runs one token, with the layers loaded and nothing else, and returns its keys and values in each layer.

        Finds what runs before and behind the layers, and refuses architectures whose layers ask for more than hidden
        states and what is computed from positions.
        """
        cache = Probe(len(self.layers))
        hooks = [layer.register_forward_pre_hook(self._check_input, with_kwargs=True) for layer in self.layers]
        hooks.append(self.layers[-1].register_forward_hook(self._check_output))
        above = {module for module in self._model.modules() if self.layers in set(module.modules())}
        below_base = set(self.base.modules())
        self._behind = {module for module in self._model.modules() if module not in below_base} - above
        for module in below_base - above - self._inside:
            hooks.append(module.register_forward_pre_hook(self._sort))
        one = torch.ones(1, 1, dtype=torch.long, device=self._device)
        try:
            with torch.enable_grad():
                out = self.base(input_ids=one * 0, attention_mask=one, past_key_values=cache, use_cache=True)[0]
                embedding = self._model.get_input_embeddings().weight
                if out.requires_grad and torch.autograd.grad(out.sum(), embedding, allow_unused=True)[0] is not None:
                    raise self._fail("needs its embeddings again behind the layers")
        except CheckpointError:
            raise
        except Exception as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            raise self._fail(f"does not run on keys and values alone ({cause})") from None
        finally:
            for hook in hooks:
                hook.remove()
        found = [pair for pair in cache.shapes() if pair is not None]
        if len(found) < len(self.layers):
            raise self._fail("has layers that keep no keys and values of their own")
        self._bypass = _Bypass(self.layers[-1], self._returned)
        return found

    def _sort(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        (self._behind if self._passed else self._before).add(module)

    def _check_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Only hidden states may come from embeddings: a later span has no others."""
        others = [*args[1:], *(value for name, value in kwargs.items() if args or name != "hidden_states")]
        while others:
            value = others.pop()
            if isinstance(value, dict | tuple | list):
                others += value.values() if isinstance(value, dict) else value
            elif isinstance(value, Tensor) and value.requires_grad:
                raise self._fail("gives its layers more than hidden states")

    def _check_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._passed = True
        hidden = hidden_of(output)
        if hidden.shape != (1, 1, self._config.hidden):
            raise self._fail(f"has hidden states of another shape {list(hidden.shape)}")
        self._returned = len(output) if isinstance(output, tuple) else None
        return (hidden.detach(), *output[1:]) if isinstance(output, tuple) else hidden.detach()

    def head(self, hidden: Tensor) -> Tensor:
        """What the architecture does behind its layers: hidden [n, hidden] -> logits [n, vocab]."""
        self._bypass.hidden = hidden[:, None]
        setattr(self._holder, self._list, nn.ModuleList([self._bypass] * len(self.layers)))
        try:
            ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
            return logits[:, 0]
        finally:
            setattr(self._holder, self._list, self.layers)
            self._bypass.hidden = None

    def load_layer(self, number: int) -> None:
        """Reads the tensors of this span's layer `number`, counted from 0."""
        top = next(name for name, module in self._model.named_modules() if module is self.layers)
        for name, module in self.layers[number].named_modules():
            self._load(module, f"{top}.{self._first + number}.{name}".removesuffix("."))

    def load_outside(self, before: bool, behind: bool) -> None:
        """Reads what runs before the layers, what runs behind them, or both; `probe` has told which is which."""
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        names = {module: name for name, module in self._model.named_modules()}
        for module, name in names.items():
            known = module in self._before or module in self._behind
            wanted = (before and module in self._before) or (behind and module in self._behind) or not known
            if module in self._inside or not wanted:
                continue
            self._load(module, name, names[embedding] if module is head and self._config.tied else "")
        for _, _, parameter in self._parameters(self._model):
            parameter.requires_grad_(False)
        self._shared.clear()

    def _load(self, module: nn.Module, at: str, tied: str = "") -> None:
        """Its own tensors; the weight is that of the module `tied` where the checkpoint has none under its own name."""
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                stored = f"{at}.{name}"
                if tied and name == "weight" and stored not in self._layout:
                    stored = f"{tied}.weight"
                tensor = self._read(stored, tuple(parameter.shape), self._dtype)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            full = f"{at}.{name}"
            if buffer is not None and name not in module._non_persistent_buffers_set and full in self._layout:
                module._buffers[name] = self._read(full, tuple(buffer.shape), buffer.dtype)

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name not in self._shared:
            self._shared[name] = self._layout.read(name, shape).to(device=self._device, dtype=dtype)
            self.bytes += self._shared[name].nbytes
        return self._shared[name]
