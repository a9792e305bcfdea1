"""Loading layers of GPT-2 124M: CPU time, bytes read, files opened, peak memory; each in a process of its own."""

import asyncio
import json
import os
import resource
import statistics
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from checks import Line, check
from timing import gpt2
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

ROUNDS = 5
FIRST, LAST, KV_BLOCKS = 4, 8, 64
SHARD = "60MB"  # seven files


async def loaded(how: str, path: Path) -> dict[str, Any]:
    """What load_once.py tells, and process_s: CPU seconds of the whole process, imports included."""
    arguments = (str(path), str(FIRST), str(LAST), str(KV_BLOCKS))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("load_once.py")),
        how,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    out, _ = await process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(out), "process_s": spent}


@check
async def loading(folder: Path) -> AsyncIterator[Line]:
    path = gpt2(SHARD)
    turns = [{how: await loaded(how, path) for how in ("ours", "sliced")} for _ in range(ROUNDS)]
    for name, what, bound in (
        ("cpu_s", "the call alone", 4.0),
        ("process_s", "the process, imports included", None),
    ):
        ratios = [turn["sliced"][name] / turn["ours"][name] for turn in turns]
        own, other = (statistics.median(turn[how][name] for turn in turns) for how in ("ours", "sliced"))
        shown = f"{statistics.median(ratios):.2f} ({other:.2f} s / {own:.2f} s)"
        said = f"layers {FIRST}:{LAST}: CPU time of from_pretrained and slicing, of ours, {what}"
        ok = bound is None or statistics.median(ratios) >= bound
        yield Line(said, "printed" if bound is None else f">= {bound:g}", shown, ok)
    one = turns[-1]["ours"]
    files = json.loads((path / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"]
    layers = [f".h.{layer}." for layer in range(FIRST, LAST)]
    wanted = {file for name, file in files.items() if any(layer in name for layer in layers)}
    asked, own = one["asked"], one["own"]
    yield Line(f"layers {FIRST}:{LAST}: bytes read of tensors", f"its own: {own:,}", f"{asked:,}", asked == own)
    opened = set(one["opened"])
    shown = f"{len(opened)} of {len(set(files.values()))}, {len(opened - wanted)} without its tensors"
    yield Line("weight files opened", f"{len(wanted)}, none without its tensors", shown, opened == wanted)
    share = max(turn["ours"]["peak"] / (turn["ours"]["own"] + turn["ours"]["cache"]) for turn in turns)
    yield Line("peak memory, of own tensors + KV cache, packing off", "<= 1.15", f"{share:.3f}", share <= 1.15)
