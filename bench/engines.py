"""What generates on one CPU thread, behind one call: our span, transformers, CTranslate2. Measures nothing."""

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from ..workers.engine.pool import BLOCK
from ..workers.engine.span import Row, Span

# GPT-2 124M (Radford et al. 2019)
LAYERS, HIDDEN, VOCAB, CONTEXT = 12, 768, 50257, 1024
MOST = 16  # sequences at a time
TABLE = 8  # KV blocks of one sequence
LONG = 900  # tokens that sequences have before a step of `Next`
LONG_TABLE = LONG // BLOCK + 1
LONG_MOST = 8

Generate = Callable[[torch.Tensor, int], list[list[int]]]
"""Prompts [batch, n] and a number of new tokens -> so many ids of each sequence, chosen greedily."""
Next = Callable[[int], torch.Tensor]
"""One step of so many long sequences, each of its own keys and values -> their logits."""


def write_model(path: Path) -> None:
    """A random model of that shape, as a Hugging Face directory."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    tensors = {"transformer.wte.weight": normal(VOCAB, HIDDEN), "transformer.wpe.weight": normal(CONTEXT, HIDDEN)}
    matrices = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    norms = ["transformer.ln_f"]
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        for name, (inputs, outputs) in matrices.items():
            tensors[f"{at}.{name}.weight"] = normal(inputs * HIDDEN, outputs * HIDDEN)
            tensors[f"{at}.{name}.bias"] = normal(outputs * HIDDEN)
        norms += [f"{at}.ln_1", f"{at}.ln_2"]
    for name in norms:
        tensors |= {f"{name}.weight": torch.ones(HIDDEN), f"{name}.bias": torch.zeros(HIDDEN)}
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    sizes = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": HIDDEN // 64, "vocab_size": VOCAB, "n_positions": CONTEXT}
    ids = {"bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes, **ids}
    (path / "config.json").write_text(json.dumps(config))


def ours(span: Span) -> Generate:
    """All layers in one span, each sequence with its own KV blocks."""

    @torch.inference_mode()
    def generate(prompts: torch.Tensor, tokens: int) -> list[list[int]]:
        batch, length = prompts.shape
        tables = [list(range(i * TABLE, i * TABLE + TABLE)) for i in range(batch)]
        rows = [Row(0, length, table) for table in tables]
        hidden = span.forward(rows, prompts.flatten())
        ids = span.head(hidden, range(length - 1, batch * length, length)).argmax(-1)
        made = [ids]
        for position in range(length, length + tokens - 1):
            rows = [Row(position, 1, table) for table in tables]
            ids = span.head(span.forward(rows, ids)).argmax(-1)
            made.append(ids)
        return torch.stack(made, 1).tolist()

    return generate


def ours_next(span: Span) -> Next:
    ids = torch.zeros(LONG_MOST, dtype=torch.int64)

    def step(batch: int) -> torch.Tensor:
        rows = [Row(LONG, 1, list(range(i * LONG_TABLE, (i + 1) * LONG_TABLE))) for i in range(batch)]
        return span.head(span.forward(rows, ids[:batch]))

    return step


def load_ours(path: Path, **options: Any) -> Span:
    return Span.load(path, 0, LAYERS, blocks=max(MOST * TABLE, LONG_MOST * LONG_TABLE), **options)


def room() -> int:
    """Tokens that one sequence of `ours` may have."""
    return TABLE * BLOCK


def transformers(path: Path) -> tuple[Generate, Next] | None:
    """None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(prompts: torch.Tensor, tokens: int) -> list[list[int]]:
        mask = torch.ones_like(prompts)
        fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        made = model.generate(prompts, attention_mask=mask, do_sample=False, **fixed)
        return cast("list[list[int]]", made[:, prompts.shape[1] :].tolist())

    caches: dict[int, Any] = {}

    @torch.inference_mode()
    def step(batch: int) -> torch.Tensor:
        if batch not in caches:
            caches[batch] = DynamicCache(config=model.config)
            for layer in range(LAYERS):
                keys = torch.zeros(batch, HIDDEN // 64, LONG, 64)
                caches[batch].update(keys, keys.clone(), layer)
        if (more := caches[batch].get_seq_length() - LONG) > 0:
            caches[batch].crop(-more)
        ids = torch.zeros(batch, 1, dtype=torch.int64)
        return cast(torch.Tensor, model(input_ids=ids, past_key_values=caches[batch], use_cache=True).logits[:, -1])

    return generate, step


def ctranslate2(path: Path, work: Path, quantization: str | None) -> Generate | str:
    """Its own conversion of the same weights; or why there is none, in words."""
    if importlib.util.find_spec("ctranslate2") is None:
        return "CTranslate2 is not installed"
    if importlib.util.find_spec("transformers") is None:
        return "CTranslate2's converter needs transformers, which is not installed"
    library: Any = importlib.import_module("ctranslate2")
    converters: Any = importlib.import_module("ctranslate2.converters")
    _write_tokenizer(path)
    folder = work / (quantization or "float32")
    try:
        converters.TransformersConverter(str(path)).convert(str(folder), quantization=quantization, force=True)
        compute = "float32" if quantization is None else "int8"
        generator = library.Generator(str(folder), compute_type=compute, inter_threads=1, intra_threads=1)
    except Exception as error:
        # It follows transformers' releases at a distance, and says so in many ways.
        return f"CTranslate2 did not take the model ({str(error).splitlines()[0][:80]})"

    def generate(prompts: torch.Tensor, tokens: int) -> list[list[int]]:
        start = [[f"t{number}" for number in row] for row in prompts.tolist()]
        length = {"max_length": tokens, "min_length": tokens}
        how = {"beam_size": 1, "sampling_topk": 1, "include_prompt_in_result": False, **length}
        return [result.sequences_ids[0] for result in generator.generate_batch(start, **how)]

    return generate


def _write_tokenizer(path: Path) -> None:
    """CTranslate2 converts no model without a vocabulary; this one calls id 7 `t7`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCAB)}, unk_token="t0"))
    end = f"t{VOCAB - 1}"
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end, unk_token="t0").save_pretrained(path)
