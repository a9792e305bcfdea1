"""nanoGPT and litGPT checkpoints become directories in which our engine and transformers see the same model."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ralmq.workers.engine.span import Row, Span
from ralmq.workers.vocabulary import read_tokenizer
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "hello world,\nhow are you?"
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
LAYERS, HEADS, WIDTH, CONTEXT, VOCAB = 2, 4, 32, 16, 17


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


class Block(nn.Module):
    """A layer as nanoGPT's train.py saves it: matrices [out, in], one for queries, keys and values."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=bias), nn.LayerNorm(WIDTH, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(WIDTH, 3 * WIDTH, bias=bias), "c_proj": nn.Linear(WIDTH, WIDTH, bias=bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 4 * WIDTH, bias=bias), "c_proj": nn.Linear(4 * WIDTH, WIDTH, bias=bias)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.view(len(x), HEADS, -1).transpose(0, 1) for part in self.attn["c_attn"](self.ln_1(x)).split(WIDTH, 1)
        )
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](seen.transpose(0, 1).reshape(len(x), WIDTH))
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def nanogpt(path: Path, *, bias: bool, compiled: bool = False) -> torch.Tensor:
    """Writes ckpt.pt of a random model; returns its logits [n, VOCAB] for IDS."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {
        "wte": nn.Embedding(VOCAB, WIDTH),
        "wpe": nn.Embedding(CONTEXT, WIDTH),
        "h": nn.ModuleList(Block(bias) for _ in range(LAYERS)),
        "ln_f": nn.LayerNorm(WIDTH, bias=bias),
    }
    model = nn.Module()
    model.transformer = nn.ModuleDict(parts)
    model.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
    model.lm_head.weight = parts["wte"].weight  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        x = parts["wte"](torch.tensor(IDS)) + parts["wpe"](torch.arange(len(IDS)))
        for block in model.transformer["h"]:  # type: ignore[union-attr,operator]
            x = block(x)
        logits: torch.Tensor = model.lm_head(parts["ln_f"](x))
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": CONTEXT, "bias": bias}
    prefix = "_orig_mod." if compiled else ""
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": tensors, "model_args": {**sizes, "vocab_size": VOCAB, "dropout": 0.0}, "iter_num": 5}, path)
    return logits


def ours(path: Path) -> torch.Tensor:
    """Logits of our engine."""
    config = json.loads((path / "config.json").read_text())
    layers = config.get("n_layer", config.get("num_hidden_layers"))
    span = Span.load(path, 0, layers, blocks=4)
    return span.head(span.forward([Row(0, len(IDS), [0])], torch.tensor(IDS)))


def theirs(path: Path) -> torch.Tensor:
    """Logits of transformers."""
    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.parametrize(("bias", "compiled"), [(True, False), (False, True)])
def test_a_nanogpt_checkpoint_keeps_its_logits(tmp_path: Path, bias: bool, compiled: bool) -> None:
    logits = nanogpt(tmp_path / "ckpt.pt", bias=bias, compiled=compiled)
    done = run("convert_nanogpt.py", tmp_path / "ckpt.pt", "--out", tmp_path / "out")
    assert done.returncode == 0 and "2 layers, 17 tokens, without a tokenizer" in done.stdout, done.stderr
    assert torch.allclose(ours(tmp_path / "out"), logits, atol=1e-5)
    assert torch.allclose(theirs(tmp_path / "out"), logits, atol=1e-5)


def check_characters(path: Path, alphabet: dict[str, int]) -> None:
    tokenizer = read_tokenizer(path / "tokenizer.json")
    ids = tokenizer.encode("hello you", add_special_tokens=False).ids
    assert ids == [alphabet[character] for character in "hello you"]
    assert tokenizer.decode(ids) == "hello you"
    assert tokenizer.encode("héllo").ids == [alphabet[character] for character in "hllo"]


def test_a_vocabulary_of_characters_becomes_a_tokenizer(tmp_path: Path) -> None:
    nanogpt(tmp_path / "ckpt.pt", bias=True)
    alphabet = {character: n for n, character in enumerate(sorted(set(TEXT)))}
    assert len(alphabet) <= VOCAB
    for protocol in (2, 4):
        meta = {"vocab_size": len(alphabet), "itos": {n: c for c, n in alphabet.items()}, "stoi": alphabet}
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        done = run("convert_nanogpt.py", tmp_path / "ckpt.pt", "--meta", tmp_path / "meta.pkl", "--out", tmp_path / "a")
        assert done.returncode == 0, done.stderr
        check_characters(tmp_path / "a", alphabet)
    (tmp_path / "input.txt").write_text(TEXT)
    done = run("convert_nanogpt.py", tmp_path / "ckpt.pt", "--text", tmp_path / "input.txt", "--out", tmp_path / "b")
    assert done.returncode == 0 and "with a tokenizer" in done.stdout, done.stderr
    check_characters(tmp_path / "b", alphabet)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    nanogpt(tmp_path / "ckpt.pt", bias=True)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Hostile()}))
    done = run("convert_nanogpt.py", tmp_path / "ckpt.pt", "--meta", tmp_path / "meta.pkl", "--out", tmp_path / "out")
    assert done.returncode == 2 and "more than texts and numbers" in done.stderr and done.stdout == ""
    torch.save({"model": Hostile(), "model_args": {}}, tmp_path / "bad.pt")
    done = run("convert_nanogpt.py", tmp_path / "bad.pt", "--out", tmp_path / "out")
    assert done.returncode == 2 and "holds more than tensors" in done.stderr and done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_litgpt_checkpoint_keeps_its_logits(tmp_path: Path, interleaved: bool) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    folder = tmp_path / "lit"
    folder.mkdir()
    torch.save(as_litgpt(model.state_dict(), interleaved), folder / "lit_model.pth")
    sizes = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 32, "head_size": 8, "intermediate_size": 48}
    more = {"block_size": CONTEXT, "norm_eps": 1e-6, "rope_base": 10000, "rotary_percentage": 1.0, "bias": "false"}
    kinds = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": "false", "name": "tiny"}
    lines = [f"{name}: {value}" for name, value in {**sizes, **more, **kinds}.items()]
    (folder / "model_config.yaml").write_text(
        "\n".join([*lines, "hf_config:", "  name: tiny", "rope_adjustments: null"])
    )
    done = run("convert_nanogpt.py", folder / "lit_model.pth", "--out", tmp_path / "out")
    assert done.returncode == 0 and "2 layers, 17 tokens" in done.stdout, done.stderr
    assert torch.allclose(ours(tmp_path / "out"), logits, atol=1e-5)
    tensors = as_litgpt(model.state_dict(), interleaved)
    for part in ("attn", "qkv"):  # as Qwen2 has them
        torch.save({**tensors, f"transformer.h.0.attn.{part}.bias": torch.ones(64)}, folder / "lit_model.pth")
        done = run("convert_nanogpt.py", folder / "lit_model.pth", "--out", tmp_path / "wrong")
        assert done.returncode == 2 and f"attn.{part}.bias, which has no place" in done.stderr
    assert not (tmp_path / "wrong").exists()
    (folder / "model_config.yaml").write_text("\n".join(lines).replace("LLaMAMLP", "GptNeoxMLP"))
    done = run("convert_nanogpt.py", folder / "lit_model.pth", "--out", tmp_path / "out")
    assert done.returncode == 2 and "mlp_class_name = GptNeoxMLP" in done.stderr


def as_litgpt(given: dict[str, torch.Tensor], interleaved: bool) -> dict[str, torch.Tensor]:
    """transformers' tensors under litGPT's names; older ones hold each group's heads together."""
    names = {
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "self_attn.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2",
        "mlp.down_proj": "mlp.proj",
    }
    out = {"transformer.wte.weight": given["model.embed_tokens.weight"], "lm_head.weight": given["lm_head.weight"]}
    out["transformer.ln_f.weight"] = given["model.norm.weight"]
    for layer in range(2):
        for name, theirs_ in names.items():
            out[f"transformer.h.{layer}.{theirs_}.weight"] = given[f"model.layers.{layer}.{name}.weight"]
        q, k, v = (given[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        if interleaved:
            groups = zip(q.split(16), k.split(8), v.split(8), strict=True)
            out[f"transformer.h.{layer}.attn.attn.weight"] = torch.cat([part for group in groups for part in group])
        else:
            out[f"transformer.h.{layer}.attn.qkv.weight"] = torch.cat((q, k, v))
    return out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.pt",), "no such file; give nanoGPT's ckpt.pt"),
        (("text.pt",), "holds more than tensors, or is broken"),
        (("sizes.pt",), "is no checkpoint of nanoGPT or litGPT"),
        (("ckpt.pt", "--text", "long.txt"), "has 26 characters, the model 17 tokens"),
        (("lit.pth",), "litGPT keeps the sizes of a model there"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    nanogpt(tmp_path / "ckpt.pt", bias=True)
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"model": {}, "model_args": {"n_layer": 1, "n_embd": 1}}, tmp_path / "sizes.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "lit.pth")
    (tmp_path / "long.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    first, *rest = (str(tmp_path / a) if not a.startswith("-") else a for a in arguments)
    done = run("convert_nanogpt.py", first, *rest, "--out", tmp_path / "out")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_an_older_nanogpt_keeps_beside_its_weights_is_no_fault(tmp_path: Path) -> None:
    """The mask; but a head of its own is another model."""
    logits = nanogpt(tmp_path / "ckpt.pt", bias=True)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    checkpoint["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    done = run("convert_nanogpt.py", tmp_path / "ckpt.pt", "--out", tmp_path / "out")
    assert done.returncode == 0 and torch.allclose(ours(tmp_path / "out"), logits, atol=1e-5)
    checkpoint["model"]["lm_head.weight"] = torch.ones(VOCAB, WIDTH)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    done = run("convert_nanogpt.py", tmp_path / "ckpt.pt", "--out", tmp_path / "out")
    assert done.returncode == 2 and "the head is not the embedding" in done.stderr


@pytest.mark.parametrize("broken", [b"", b"\x80\x02.", b"\x80\x02}u.", b"no pickle", b"\x80\x02]."])
def test_a_broken_alphabet_is_told_in_one_line(tmp_path: Path, broken: bytes) -> None:
    nanogpt(tmp_path / "ckpt.pt", bias=True)
    (tmp_path / "meta.pkl").write_bytes(broken)
    done = run("convert_nanogpt.py", tmp_path / "ckpt.pt", "--out", tmp_path / "out", "--meta", tmp_path / "meta.pkl")
    assert done.returncode == 2 and "--text with the training text" in done.stderr and done.stderr.count("\n") == 1
