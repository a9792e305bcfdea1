"""LoRA adapters of a model on workers, in the files and names of peft. Knows files and names, no torch module."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...schema.errors import Refused
from ..proxy import RemoteModule

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
PREFIX: Final = "base_model.model."  # of every name in peft's files
ALL: Final = "all-linear"
# what peft adapts where nothing is said
TARGETS: Final = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}
ATTENTION: Final = ["q_proj", "v_proj"]
_UNKNOWN: Final = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
    "layer_replication", "megatron_config", "trainable_token_indices", "exclude_modules", "target_parameters",
    "use_qalora", "lora_bias", "alora_invocation_tokens", "arrow_config",
)  # fmt: skip
_CHANGING: Final = ("pissa", "olora", "corda", "loftq")  # first values of adapters that change the model, too


@dataclass(frozen=True, slots=True)
class Adapter:
    """What adapters a model has; `transposed`: its layers keep their weights as [in, out]."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | str
    transposed: bool


class Adaptable(Protocol):
    """A model on workers that takes adapters; see RemoteLanguageModel for each of these."""

    config: dict[str, Any]
    proxies: list[RemoteModule]
    adapter: Adapter | None

    def adapted(self, number: int, made: dict[str, Any]) -> None: ...

    def adapter_names(self, number: int) -> dict[str, str]: ...

    def add_adapter(
        self, r: int, lora_alpha: float, target_modules: Sequence[str] | str | None, lora_dropout: float
    ) -> Any: ...


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def matches(name: str, targets: Sequence[str] | str) -> bool:
    """Whether a layer of the whole model is meant, by peft's rule."""
    if isinstance(targets, str):
        return targets == ALL or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def add(
    model: Adaptable,
    r: int,
    alpha: float,
    targets: Sequence[str] | str | None,
    dropout: float,
    seed: int,
) -> Adapter:
    """Adapters on every layer that is meant, on all workers.

    Raises:
        Refused: none is.
    """
    if (
        type(r) is not int
        or type(seed) is not int
        or not all(isinstance(each, int | float) for each in (alpha, dropout))
    ):
        raise Refused(
            f"r={r!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r}, seed={seed!r}: give numbers, r and seed whole"
        )
    wanted = TARGETS.get(str(model.config.get("model_type")), ATTENTION) if targets is None else targets
    chosen = _chosen(model, wanted)
    asked = []
    for proxy, layers in zip(model.proxies, chosen, strict=True):
        names = [layer[0] for layer in layers]
        proxy.peer.quiet()
        asked.append(proxy.ask("adapt", names=names, r=r, alpha=float(alpha), dropout=float(dropout), seed=seed))
    for number, pending in enumerate(asked):
        model.adapted(number, pending.result()[0])
    kept = wanted if isinstance(wanted, str) else list(wanted)
    return Adapter(r, alpha, dropout, kept, any(layer[2] for layers in chosen for layer in layers))


def _chosen(model: Adaptable, wanted: Sequence[str] | str) -> list[list[Any]]:
    """Of each span the layers that are meant: name there, name in the whole model, whether transposed.

    Raises:
        Refused: none is, or one that can have no adapter.
    """
    told = [pending.result()[0] for pending in [proxy.ask("linears") for proxy in model.proxies]]
    try:
        chosen = [[layer for layer in each["linears"] if matches(layer[1], wanted)] for each in told]
        heads = [each["head"] for each in told if each["head"] and wanted != ALL and matches(each["head"], wanted)]
    except (TypeError, re.error) as error:
        raise Refused(f"target_modules={wanted!r}: give ends of names, or a regular expression ({error})") from None
    if heads:
        raise Refused(
            f"target_modules={wanted!r}: {heads[0]}, which gives the logits, can have no adapter: leave it out"
        )
    if not any(chosen):
        some = sorted({layer[1].rpartition(".")[2] for each in told for layer in each["linears"]})
        raise Refused(f"target_modules={wanted!r} names no linear layer: there are {', '.join(some)}")
    return chosen


def save(model: Adaptable, folder: Path) -> None:
    """Writes both files.

    Raises:
        Refused: the model has no adapters.
    """
    adapter = model.adapter
    if adapter is None:
        raise Refused("this model has no adapters: add_adapter first")
    tensors: dict[str, Any] = {}
    for number, proxy in enumerate(model.proxies):
        names = model.adapter_names(number)
        state = proxy.state_dict(list(names)) if names else {}
        tensors |= {PREFIX + names[name]: tensor for name, tensor in state.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.config.get("_name_or_path") or ""),
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "target_modules": adapter.target_modules,
        "bias": "none",
        "fan_in_fan_out": adapter.transposed,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(model: Adaptable, folder: Path) -> None:
    """Adds the adapters of a folder, with their weights.

    Raises:
        Refused: no adapters, of another kind, or of other layers.
    """
    config, tensors = _read(folder)
    if model.adapter is None:  # which it stays where they do not fit
        _compare(folder, config["r"], _chosen(model, config["target_modules"]), tensors)
    model.add_adapter(config["r"], config["lora_alpha"], config["target_modules"], config.get("lora_dropout") or 0.0)
    names = [model.adapter_names(number) for number in range(len(model.proxies))]
    for proxy, known in zip(model.proxies, names, strict=True):
        if known:
            proxy.load_state_dict({name: tensors[PREFIX + whole] for name, whole in known.items()}, strict=False)


def _compare(folder: Path, r: Any, chosen: list[list[Any]], tensors: dict[str, Any]) -> None:
    """Raises Refused where the tensors are not those of adapters of these layers."""
    wanted = {}
    for _, whole, _, (rows, columns) in [layer for layers in chosen for layer in layers]:
        wanted[f"{PREFIX}{whole}.lora_A.weight"] = [r, columns]
        wanted[f"{PREFIX}{whole}.lora_B.weight"] = [rows, r]
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        raise Refused(f"{folder / WEIGHTS}: its layers are not those of this model, or of another rank ({odd[0]})")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise Refused(f"{folder / CONFIG}: peft_type is {config['peft_type']}; only LORA adapters are read")
        odd = next((name for name in _UNKNOWN if config.get(name)), None)
        if odd is not None or config.get("bias", "none") != "none":
            raise Refused(f"{folder / CONFIG}: {odd or 'bias'} is not read; save plain LORA adapters")
        first = str(config.get("init_lora_weights")).lower()
        if first.startswith(_CHANGING):
            raise Refused(
                f"{folder / CONFIG}: adapters that began as {first} are of a changed model: convert them in peft"
            )
        for name in ("r", "lora_alpha", "target_modules"):
            config[name]
        return config, load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Refused(f"{folder}: holds no adapters as peft saves them ({error})") from None
