"""Loads some layers once and tells what that took: `python load_once.py ours|sliced MODEL FIRST LAST KV_BLOCKS`.

Prints JSON: cpu_s (process time, imports left out), peak (bytes of memory above those before), own (bytes of the
weights), cache (of the KV cache), asked (bytes of tensors read), opened (weight files).
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ralmq.workers.engine.checkpoint import Checkpoint
from ralmq.workers.engine.span import Span


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def ours(path: str, first: int, last: int, blocks: int) -> dict[str, int]:
    asked = [0]
    read = Checkpoint._read

    def counted(self: Checkpoint, stream: Any, into: torch.Tensor, name: str) -> None:
        asked[0] += into.nbytes
        read(self, stream, into, name)

    Checkpoint._read = counted  # type: ignore[method-assign]
    span = Span.load(path, first, last, blocks=blocks, packed=False)
    return {"own": span.bytes, "cache": blocks * span.kv_bytes_per_block, "asked": asked[0]}


def sliced(path: str, first: int, last: int) -> dict[str, int]:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32)
    model.transformer.h = model.transformer.h[first:last]
    return {"own": sum(parameter.nbytes for parameter in model.transformer.h.parameters())}


def main() -> None:
    how, path, *numbers = sys.argv[1:]
    first, last, blocks = map(int, numbers)
    torch.set_num_threads(1)
    if how == "sliced":
        importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    opened: set[str] = set()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".safetensors"):
            opened.add(Path(arguments[0]).name)

    sys.addaudithook(watch)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, begun = memory("VmRSS"), time.process_time()
    found = ours(path, first, last, blocks) if how == "ours" else sliced(path, first, last)
    cpu = time.process_time() - begun
    print(json.dumps({**found, "cpu_s": cpu, "peak": memory("VmHWM") - before, "opened": sorted(opened)}))


if __name__ == "__main__":
    main()
