"""A whole model on one GPU: tokens a second against transformers and against the memory's bandwidth.

The model is a Llama with random weights in bf16, made on the spot. Knows what is measured; nothing here needs the GPU
to be one of CUDA, and the tests run it small on a CPU. Without a GPU the command says so and ends well.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from ..workers.engine.device import fetch
from ..workers.engine.draw import draw
from ..workers.engine.pool import BLOCK
from ..workers.engine.sample import SamplingParams
from ..workers.engine.span import Row, Span

BATCHES = (1, 8, 64)
PROMPT = 128  # tokens
READ = 4 << 30  # bytes that are read to measure the bandwidth
OURS, THEIRS = "ralmq", "transformers"
NONE = "no GPU of CUDA here: nothing is measured"

Generate = Callable[[torch.Tensor, int], Any]
"""Prompts [batch, n] and a number of new tokens -> their ids, chosen greedily."""
Taken = dict[tuple[str, int], tuple[list[float], list[float]]]
"""By engine and batch: seconds of all tokens, and of the first alone, round by round."""


@dataclass(frozen=True)
class Shape:
    """A Llama (Touvron et al. 2023)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    context: int = 4096


SHAPES = {
    "1b": Shape(16, 2048, 32, 8, 8192, 128_256),
    "3b": Shape(28, 3072, 24, 8, 8192, 128_256),
    "8b": Shape(32, 4096, 32, 8, 14_336, 128_256),
}


@dataclass
class Rate:
    """Medians of one engine and number of sequences at a time.

    Attributes:
        step_ms: of one token of each sequence, prompts left out.
        floor_ms: in which the memory gives all weights once.
        ratio: tokens/s, of transformers'.
    """

    model: str
    engine: str
    batch: int
    tokens_per_s: float
    step_ms: float
    floor_ms: float
    ratio: float
    device: str


def write_llama(path: Path, shape: Shape, seed: int = 0) -> None:
    """A Hugging Face directory of random weights in bf16, a file a layer, so that one layer at a time is in memory."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    for layer in range(shape.layers):
        tensors = _random(_matrices(shape, f"model.layers.{layer}"), generator)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        files |= _written(path, f"layer-{layer}.safetensors", tensors)
    ends = _random(dict.fromkeys(("model.embed_tokens", "lm_head"), (shape.vocab, shape.hidden)), generator)
    ends["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    files |= _written(path, "ends.safetensors", ends)
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (path / "config.json").write_text(json.dumps(config))


def _matrices(shape: Shape, at: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each matrix of a layer."""
    head_dim = shape.hidden // shape.heads
    query, key = shape.heads * head_dim, shape.kv_heads * head_dim
    return {
        f"{at}.self_attn.q_proj": (query, shape.hidden),
        f"{at}.self_attn.k_proj": (key, shape.hidden),
        f"{at}.self_attn.v_proj": (key, shape.hidden),
        f"{at}.self_attn.o_proj": (shape.hidden, query),
        f"{at}.mlp.gate_proj": (shape.intermediate, shape.hidden),
        f"{at}.mlp.up_proj": (shape.intermediate, shape.hidden),
        f"{at}.mlp.down_proj": (shape.hidden, shape.intermediate),
    }


def _random(sizes: dict[str, tuple[int, int]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": torch.randn(*size, generator=generator).mul_(0.02).bfloat16() for name, size in sizes.items()
    }


def _written(path: Path, file: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    save_file(tensors, path / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)


def ours(span: Span, table: int) -> Generate:
    """As a stage that holds all layers: ids come from the host and go back to it each step; `table` blocks a row."""

    def generate(prompts: torch.Tensor, tokens: int) -> list[list[int]]:
        batch, length = prompts.shape
        tables = [list(range(row * table, row * table + table)) for row in range(batch)]
        greedy = [SamplingParams()] * batch

        def sampled(hidden: torch.Tensor, want: Sequence[int] | None, position: int) -> torch.Tensor:
            return fetch(draw(span.head(hidden, want), greedy, [position] * batch)[:, 0]).long()

        hidden = span.forward([Row(0, length, blocks) for blocks in tables], prompts.flatten())
        made = [sampled(hidden, range(length - 1, batch * length, length), length)]
        for position in range(length, length + tokens - 1):
            hidden = span.forward([Row(position, 1, blocks) for blocks in tables], made[-1])
            made.append(sampled(hidden, None, position + 1))
        return torch.stack(made, 1).tolist()

    return generate


def theirs(path: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Generate | None:
    """transformers' generate with the same weights; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def generate(prompts: torch.Tensor, tokens: int) -> Any:
        prompts = prompts.to(device)
        fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        made = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **fixed)
        return made[:, prompts.shape[1] :].tolist()

    return generate


def bandwidth(device: str, size: int = READ) -> float:
    """Bytes a second that the device's memory gives at best: half of what a copy within it moves is read."""
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source), device) for _ in range(5))


def _seconds(call: Callable[[], object], device: str) -> float:
    _settled(device)
    begun = time.perf_counter()
    call()
    _settled(device)
    return time.perf_counter() - begun


def _settled(device: str) -> None:
    """All that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(
    name: str, shape: Shape, device: str, *, batches: Sequence[int] = BATCHES, tokens: int = 64, rounds: int = 5
) -> list[Rate]:
    """One model of random weights, its engines in turn, round by round. Needs disk and memory for its weights."""
    read = bandwidth(device, READ if device.startswith("cuda") else 1 << 24)
    table = -(-(PROMPT + tokens) // BLOCK)
    with tempfile.TemporaryDirectory(prefix="ralmq-gpu-") as folder:
        path = Path(folder) / name
        write_llama(path, shape)
        options: dict[str, Any] = {"dtype": "bf16", "device": device, "blocks": max(batches) * table}
        span = Span.load(path, 0, shape.layers, graphs=True, **options)
        embedding = shape.vocab * shape.hidden * 2  # of which a step reads a row for each sequence
        floor = (span.bytes - embedding) / read
        engines: dict[str, Generate] = {OURS: ours(span, table)}
        reference = theirs(path, device)
        if reference is not None:
            engines[THEIRS] = reference
        prompts = torch.randint(2, shape.vocab, (max(batches), PROMPT), generator=torch.Generator().manual_seed(1))
        taken: Taken = {(engine, batch): ([], []) for batch in batches for engine in engines}
        for (engine, batch), _ in taken.items():
            engines[engine](prompts[:batch], tokens)  # records, and allocates
        for _ in range(rounds):
            for (engine, batch), (whole, first) in taken.items():
                for count, times in ((tokens, whole), (1, first)):
                    times.append(_seconds(lambda: engines[engine](prompts[:batch], count), device))  # noqa: B023
    return [_rate(name, engine, batch, taken, tokens, floor, card(device)) for engine, batch in taken]


def _rate(name: str, engine: str, batch: int, taken: Taken, tokens: int, floor: float, device: str) -> Rate:
    whole, first = taken[engine, batch]
    steps = [(a - b) / (tokens - 1) for a, b in zip(whole, first, strict=True)]
    reference = taken.get((THEIRS, batch), (whole, first))[0]
    ratio = statistics.median([b / a for a, b in zip(whole, reference, strict=True)])
    rate = batch * tokens / statistics.median(whole)
    return Rate(name, engine, batch, rate, 1e3 * statistics.median(steps), 1e3 * floor, ratio, device)


def card(device: str) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def show(rates: Sequence[Rate], console: Console) -> None:
    """Prints the table."""
    title = f"Llama, random weights, bf16, prompts of {PROMPT}, greedy; {rates[0].device}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    for heading in ("model", "engine", "sequences", "tokens/s", "step ms", "floor ms", "of transformers'"):
        table.add_column(heading, justify="right")
    for rate in rates:
        figures = f"{rate.tokens_per_s:,.0f}", f"{rate.step_ms:.2f}", f"{rate.floor_ms:.2f}", f"{rate.ratio:.2f}"
        table.add_row(rate.model, rate.engine, str(rate.batch), *figures)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ralmq.bench.gpu [--size 1b] [--json]`: exit code 0, also where there is no GPU."""
    parser = argparse.ArgumentParser(prog="ralmq bench gpu")
    parser.add_argument("--size", choices=list(SHAPES), default="1b", help="of the model, in parameters")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(json.dumps({"bench": "gpu", "rows": []}) if options.json else NONE)
        return 0
    rates = measure(options.size, SHAPES[options.size], "cuda:0")
    if options.json:
        print(json.dumps({"bench": "gpu", "rows": [asdict(rate) for rate in rates]}))
    else:
        show(rates, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
