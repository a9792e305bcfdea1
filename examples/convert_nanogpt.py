"""Turns a nanoGPT or litGPT checkpoint into a model directory that ralmq (and transformers) reads.

    python examples/convert_nanogpt.py out/ckpt.pt --meta data/shakespeare_char/meta.pkl --out models/shakespeare
    python examples/convert_nanogpt.py checkpoints/org/name/lit_model.pth --out models/name

nanoGPT: `ckpt.pt` holds {"model": tensors, "model_args": {"n_layer", "n_head", "n_embd", "block_size", "bias",
"vocab_size"}, ...}; names may begin with `_orig_mod.` (torch.compile). Matrices are [out, in], GPT-2's are stored
[in, out]. Where the model has no biases they become zeros. A model of characters has its alphabet in `meta.pkl`
({"stoi": character -> id}), or --text names what it was trained on: then the alphabet is made as nanoGPT makes it,
the sorted set of characters. A model of GPT-2's tokens needs the tokenizer.json of openai-community/gpt2.

litGPT: `lit_model.pth` holds the tensors, alone or as {"model": tensors}, and `model_config.yaml` beside it the sizes.
Models of the Llama form are taken (RMSNorm, LLaMAMLP, rotary positions in full). `attn.qkv` holds queries, keys and
values one after the other, the older `attn.attn` those of each group of heads together.

The checkpoint is opened with torch.load(weights_only=True), which runs no code of it; meta.pkl is not unpickled: its
opcodes are read, and anything but dicts of texts and numbers is refused.
"""

import argparse
import json
import pickletools
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models

Tensors = dict[str, torch.Tensor]
COMPUTED = ("cos", "sin", "mask_cache")  # tables of older checkpoints


class Unusable(Exception):
    """One line that says what is wrong with the input, and what to do."""


class Given(Tensors):
    """Tensors of a checkpoint; which of them were asked for is remembered, so that none is lost without a word."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__((name.removeprefix("_orig_mod."), tensor) for name, tensor in tensors.items())
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def check(self) -> None:
        """What is left over belongs to another kind of model; masks [1, 1, n, n] and tables are computed anew."""
        over = [name for name in self if name not in self.asked and 0 < super(Given, self).__getitem__(name).dim() < 4]
        over = [name for name in over if name not in COMPUTED]
        if over:
            raise Unusable(f"the model has {min(over)}, which has no place in what is written: use another model")


# -- nanoGPT


def from_nanogpt(sizes: Mapping[str, Any], given: Given) -> tuple[dict[str, Any], Tensors]:
    """config.json and tensors as GPT-2 has them."""
    layers, width = int(sizes["n_layer"]), int(sizes["n_embd"])
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": layers,
        "n_head": int(sizes["n_head"]),
        "n_embd": width,
        "n_positions": int(sizes["block_size"]),
        "vocab_size": int(given["transformer.wte.weight"].shape[0]),
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    out: Tensors = {
        "transformer.wte.weight": given["transformer.wte.weight"],
        "transformer.wpe.weight": given["transformer.wpe.weight"],
    }

    def copy(name: str, transposed: bool) -> None:
        weight = given[f"{name}.weight"]
        out[f"{name}.weight"] = weight.t() if transposed else weight
        bias = given.get(f"{name}.bias")
        out[f"{name}.bias"] = bias if bias is not None else torch.zeros(weight.shape[0], dtype=weight.dtype)

    for layer in range(layers):
        at = f"transformer.h.{layer}."
        for name in ("ln_1", "ln_2"):
            copy(at + name, transposed=False)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            copy(at + name, transposed=True)
    copy("transformer.ln_f", transposed=False)
    head = given.get("lm_head.weight")
    if head is not None and not torch.equal(head, out["transformer.wte.weight"]):
        raise Unusable("the head is not the embedding, as it is in nanoGPT: use a checkpoint of nanoGPT itself")
    return config, out


# -- litGPT


def from_litgpt(sizes: Mapping[str, Any], given: Given) -> tuple[dict[str, Any], Tensors]:
    """config.json and tensors as Llama has them."""
    wanted = {
        "mlp_class_name": "LLaMAMLP",
        "norm_class_name": "RMSNorm",
        "parallel_residual": False,
        "bias": False,
        "rotary_percentage": 1.0,
        "rope_adjustments": None,
        "sliding_window_size": None,
        "norm_qk": False,
        "scale_embeddings": False,
        "post_attention_norm": False,
        "post_mlp_norm": False,
        "shared_attention_norm": False,
        "attention_scores_scalar": None,
        "attention_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_condense_ratio": 1,
    }
    for name, value in wanted.items():
        if name in sizes and sizes[name] != value:
            raise Unusable(
                f"model_config.yaml: {name} = {sizes[name]}, and only {value} is taken: use a Llama-like model"
            )
    heads, groups = int(sizes["n_head"]), int(sizes.get("n_query_groups") or sizes["n_head"])
    width = int(sizes["n_embd"])
    head = int(sizes.get("head_size") or width // heads)
    vocabulary = int(given["transformer.wte.weight"].shape[0])
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": int(sizes["n_layer"]),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "intermediate_size": int(sizes["intermediate_size"]),
        "vocab_size": vocabulary,
        "max_position_embeddings": int(sizes["block_size"]),
        "rms_norm_eps": float(sizes.get("norm_eps", 1e-5)),
        "rope_theta": float(sizes.get("rope_base", 10000)),
        "tie_word_embeddings": False,
    }
    out: Tensors = {
        "model.embed_tokens.weight": given["transformer.wte.weight"],
        "model.norm.weight": given["transformer.ln_f.weight"],
        "lm_head.weight": given.get("lm_head.weight", given["transformer.wte.weight"]),
    }
    names = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    for layer in range(int(sizes["n_layer"])):
        source, target = f"transformer.h.{layer}.", f"model.layers.{layer}."
        for theirs, ours in names.items():
            out[f"{target}{ours}.weight"] = given[f"{source}{theirs}.weight"]
        for part, weight in zip("qkv", queries_keys_values(given, source, heads, groups, head), strict=True):
            out[f"{target}self_attn.{part}_proj.weight"] = weight
    return config, out


def queries_keys_values(given: Given, at: str, heads: int, groups: int, head: int) -> tuple[torch.Tensor, ...]:
    """Each [heads or groups x head size, width]."""
    joined = given.get(f"{at}attn.qkv.weight")
    if joined is not None:
        return joined.split((heads * head, groups * head, groups * head))
    each = heads // groups  # query heads of a group, which are followed by its key and its value
    parts = given[f"{at}attn.attn.weight"].view(groups, each + 2, head, -1).split((each, 1, 1), dim=1)
    return tuple(part.reshape(-1, part.shape[-1]) for part in parts)


def flat_yaml(path: Path) -> dict[str, Any]:
    """The top level of litGPT's model_config.yaml: `name: number, word, true, false or null`, no deeper ones."""
    if not path.is_file():
        raise Unusable(f"{path}: no such file; litGPT keeps the sizes of a model there")
    found: dict[str, Any] = {}
    words = {"true": True, "false": False, "null": None, "~": None}
    for line in path.read_text().splitlines():
        name, colon, text = line.partition(":")
        if not colon or line[:1] in (" ", "#", "-"):
            continue
        text = text.strip().strip("'\"")
        try:
            found[name] = words[text] if text in words else float(text) if "." in text or "e" in text else int(text)
        except ValueError:
            found[name] = text
    return found


# -- characters


def alphabet_of(meta: Path) -> dict[str, int]:
    """`stoi` of nanoGPT's meta.pkl."""
    try:
        found = opcodes_of(meta)
    except (AttributeError, LookupError, TypeError, ValueError):
        raise Unusable(f"{meta}: is broken, or no meta.pkl; give --text with the training text") from None
    stoi = found.get("stoi") if isinstance(found, dict) else None
    if not isinstance(stoi, dict):
        raise Unusable(f"{meta}: has no stoi; give --text with the training text")
    return stoi


def opcodes_of(meta: Path) -> Any:
    """What a pickle of dicts, texts and numbers holds, from its opcodes: nothing of the file is executed."""
    stack: list[Any] = []
    memory: dict[int, Any] = {}
    mark = object()

    def popped() -> list[Any]:
        at = len(stack) - 1 - stack[::-1].index(mark)
        values = stack[at + 1 :]
        del stack[at:]
        return values

    def fill(pairs: list[Any]) -> None:
        stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    simple: dict[str, Callable[[Any], object]] = {
        "MARK": lambda _: stack.append(mark),
        "EMPTY_DICT": lambda _: stack.append({}),
        "MEMOIZE": lambda _: memory.__setitem__(len(memory), stack[-1]),
        "SETITEMS": lambda _: fill(popped()),
        "SETITEM": lambda _: fill([stack.pop(-2), stack.pop()]),
    }
    for opcode, argument, _ in pickletools.genops(meta.read_bytes()):
        if opcode.name in simple:
            simple[opcode.name](argument)
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memory[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memory[argument])
        elif opcode.name in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2"):
            stack.append(argument)
        elif opcode.name not in ("PROTO", "FRAME", "STOP"):
            raise Unusable(
                f"{meta}: holds {opcode.name}, more than texts and numbers; give --text with the training text"
            )
    return stack[-1]


def character_tokenizer(alphabet: Mapping[str, int]) -> Tokenizer:
    """A token for each character; what is in no alphabet is passed over."""
    if any(len(character) != 1 for character in alphabet) or sorted(alphabet.values()) != list(range(len(alphabet))):
        raise Unusable("the alphabet does not number single characters from 0 on; give --text with the training text")
    tokenizer = Tokenizer(models.BPE(vocab=dict(alphabet), merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


# -- files


def convert(source: Path, out: Path, alphabet: Mapping[str, int] | None, tokenizer: Path | None) -> dict[str, Any]:
    """Writes the directory; returns its config."""
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Unusable(f"{source}: no such file; give nanoGPT's ckpt.pt or litGPT's lit_model.pth") from None
    except Exception as error:
        raise Unusable(f"{source}: holds more than tensors, or is broken ({str(error).splitlines()[0]})") from None
    if isinstance(checkpoint, dict) and "model_args" in checkpoint:
        given = Given(checkpoint["model"])
        config, tensors = from_nanogpt(checkpoint["model_args"], given)
    else:
        given = Given(checkpoint.get("model", checkpoint))
        config, tensors = from_litgpt(flat_yaml(source.parent / "model_config.yaml"), given)
    given.check()
    if alphabet is not None and len(alphabet) > config["vocab_size"]:
        raise Unusable(f"the alphabet has {len(alphabet)} characters, the model {config['vocab_size']} tokens")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # Tensors that share memory are not saved, and transposed ones would be saved as they lie.
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors"
    )
    beside = source.parent / "tokenizer.json"
    if alphabet is not None:
        character_tokenizer(alphabet).save(str(out / "tokenizer.json"))
    elif tokenizer is not None or beside.is_file():
        shutil.copyfile(tokenizer or beside, out / "tokenizer.json")
    return config


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="nanoGPT's ckpt.pt, or litGPT's lit_model.pth")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--meta", type=Path, help="nanoGPT's meta.pkl of a model of characters")
    parser.add_argument("--text", type=Path, help="the text that a model of characters was trained on")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to copy, as that of openai-community/gpt2")
    given = parser.parse_args()
    try:
        alphabet = None
        if given.meta is not None:
            alphabet = alphabet_of(given.meta)
        elif given.text is not None:
            alphabet = {character: n for n, character in enumerate(sorted(set(given.text.read_text())))}
        config = convert(given.checkpoint, given.out, alphabet, given.tokenizer)
    except (Unusable, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        print(f"{given.checkpoint}: is no checkpoint of nanoGPT or litGPT ({error!r})", file=sys.stderr)
        return 2
    layers = config.get("n_layer", config.get("num_hidden_layers"))
    words = "with a tokenizer" if (given.out / "tokenizer.json").is_file() else "without a tokenizer: give token ids"
    print(f"{given.out}: {layers} layers, {config['vocab_size']} tokens, {words}")
    print(f"serve it with: ralmq up --model {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
