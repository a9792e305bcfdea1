"""LoRA adapters of a model on workers, in the files and names of peft. Knows files and names, no torch module."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors.torch import load_file, save_file

from ...schema.errors import Refused

if TYPE_CHECKING:
    from .language import RemoteLanguageModel

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
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Adapter:
    """What adapters a model has; `transposed`: its layers keep their weights as [in, out]."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | str
    transposed: bool


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def matches(name: str, targets: Sequence[str] | str) -> bool:
    """Whether a layer of the whole model is meant, by peft's rule."""
    if isinstance(targets, str):
        return targets == ALL or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def add(
    model: "RemoteLanguageModel",
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
    family = str(model.config.get("model_type"))
    wanted = TARGETS.get(family, ATTENTION) if targets is None else targets
    told = [proxy.ask("linears") for proxy in model.proxies]
    found = [pending.result()[0]["linears"] for pending in told]
    chosen = [[layer for layer in layers if matches(layer[1], wanted)] for layers in found]
    if not any(chosen):
        some = sorted({layer[1].rpartition(".")[2] for layers in found for layer in layers})
        raise Refused(f"target_modules={wanted!r} names no linear layer: there are {', '.join(some)}")
    asked = []
    for proxy, layers in zip(model.proxies, chosen, strict=True):
        names = [layer[0] for layer in layers]
        proxy.peer.quiet()
        asked.append(proxy.ask("adapt", names=names, r=r, alpha=float(alpha), dropout=float(dropout), seed=seed))
    for number, pending in enumerate(asked):
        model.adapted(number, pending.result()[0])
    kept = wanted if isinstance(wanted, str) else list(wanted)
    return Adapter(r, alpha, dropout, kept, any(layer[2] for layers in chosen for layer in layers))


def save(model: "RemoteLanguageModel", folder: Path) -> None:
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


def load(model: "RemoteLanguageModel", folder: Path) -> None:
    """Adds the adapters of a folder, with their weights.

    Raises:
        Refused: no adapters, of another kind, or of other layers.
    """
    config, tensors = _read(folder)
    model.add_adapter(config["r"], config["lora_alpha"], config["target_modules"], config.get("lora_dropout") or 0.0)
    names = [model.adapter_names(number) for number in range(len(model.proxies))]
    wanted = {PREFIX + whole for known in names for whole in known.values()}
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))[0]
        raise Refused(f"{folder / WEIGHTS}: its layers are not those of this model ({odd})")
    for proxy, known in zip(model.proxies, names, strict=True):
        if known:
            proxy.load_state_dict({name: tensors[PREFIX + whole] for name, whole in known.items()}, strict=False)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise Refused(f"{folder / CONFIG}: peft_type is {config['peft_type']}; only LORA adapters are read")
        odd = next((name for name in _UNKNOWN if config.get(name)), None)
        if odd is not None or config.get("bias", "none") != "none":
            raise Refused(f"{folder / CONFIG}: {odd or 'bias'} is not read; save plain LORA adapters")
        for name in ("r", "lora_alpha", "target_modules"):
            config[name]
        return config, load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{folder}: holds no adapters as peft saves them ({error})") from None
