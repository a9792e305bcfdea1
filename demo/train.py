"""`python -m ralmq.demo.train --out DIR --minutes N`: trains the embedded checkpoint on `corpus.py`'s texts.

A developer's tool: it needs the extra `hf`. Knows the model, the schedule and the saved state, not what a demo shows.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import corpus, tokens
from .learner import Run, Settings, TrainingError, bits_per_byte, build_model

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from tokenizers import Tokenizer

COMMAND = "python -m ralmq.demo.train"


@dataclass(frozen=True, slots=True)
class Length:
    """How long to train in all, resumed runs included: by steps, or by minutes of computing."""

    steps: int | None = None
    decay_steps: int = 0
    minutes: float | None = None
    decay_minutes: float = 0.0

    def decay(self, step: int, seconds: float) -> tuple[int, int] | None:
        """(first step, count) of the decay if it starts at `step`, after `seconds` of computing; else None."""
        if self.steps is not None:
            start = max(0, self.steps - self.decay_steps)
            return (start, self.steps - start) if step >= start else None
        left = (self.minutes or 0.0) * 60 - seconds
        if left > self.decay_minutes * 60:
            return None
        return step, math.ceil(max(0.0, left) / (seconds / step)) if step else 0


@dataclass(frozen=True, slots=True)
class Data:
    """Token ids of the documents, and what the documents were."""

    tokenizer: Tokenizer
    train: list[list[int]]
    held_out: list[list[int]]
    held_out_bytes: int
    corpus_sha256: str
    documents: int
    corpus_bytes: int

    @classmethod
    def build(cls, documents: Sequence[corpus.Document], settings: Settings) -> Data:
        """Splits the documents, trains the tokenizer on one side, encodes both."""
        kept, held_out = corpus.split(documents)
        if not kept or not held_out:
            raise TrainingError("the corpus is too small to hold documents out; give it more documents")
        tokenizer = tokens.train_tokenizer(kept, settings.vocabulary)
        return cls(
            tokenizer,
            tokens.encode(tokenizer, kept),
            tokens.encode(tokenizer, held_out),
            sum(len(document.text.encode()) for document in held_out),
            corpus.corpus_hash(documents),
            len(documents),
            sum(len(document.text.encode()) for document in documents),
        )


Report = Callable[[Run, float], None]


def train(
    run: Run, data: Data, length: Length, state: Path, report: Report, stopped: Callable[[], bool], every: int = 100
) -> bool:
    """Trains to the end of `length`; False when `stopped` said so before. Either way the state can be resumed.

    The state is saved while the rate is constant and never in the decay, so that a longer run can go on from there.
    """
    while True:
        run.decay = run.decay or length.decay(run.step, run.seconds)
        stable = run.decay is None or run.step == run.decay[0]
        done = run.decay is not None and run.step >= sum(run.decay)
        stop = stopped()
        if stable and (stop or run.decay is not None or run.step % every == 0):
            run.save(state, data.corpus_sha256)
        if done or stop:
            return done
        report(run, run.advance(data.train))


def export(run: Run, data: Data, out: Path) -> dict[str, Any]:
    """Writes the fp16 checkpoint in Hugging Face's form and its record; returns the record.

    The held-out figure is measured on the exported weights, not on the fp32 ones.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import __version__ as transformers_version
    from transformers.utils import logging

    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    fresh = build_model(run.settings)
    fresh.load_state_dict(run.model.state_dict())
    fresh.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config.get("rope_theta", 10000.0)  # readers before transformers 5 look for it here
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    data.tokenizer.save(str(out / "tokenizer.json"))
    marks: dict[str, Any] = {"bos_token": tokens.END_OF_TEXT, "eos_token": tokens.END_OF_TEXT}
    marks |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": run.settings.context}
    (out / "tokenizer_config.json").write_text(json.dumps(marks, indent=2) + "\n")
    fresh.float().load_state_dict(load_file(out / "model.safetensors"), strict=False)
    bits = bits_per_byte(fresh, data.held_out, data.held_out_bytes, run.settings.context)
    decay_steps = run.decay[1] if run.decay else 0
    options = f"--steps {run.step} --decay-steps {decay_steps} --seed {run.settings.seed}"
    record = {
        "command": f"{COMMAND} --out demo/checkpoint {options}",
        "settings": asdict(run.settings),
        "parameters": sum(weight.numel() for weight in fresh.parameters()),
        "steps": run.step,
        "decay_steps": decay_steps,
        "tokens_trained": run.tokens,
        "tokens_in_corpus": sum(map(len, data.train)),
        "compute_minutes": round(run.seconds / 60, 1),
        "held_out_bits_per_byte": round(bits, 4),
        "held_out_bytes": data.held_out_bytes,
        "corpus": "pydoc_data.topics and the docstrings of the standard library (ralmq/demo/corpus.py)",
        "corpus_sha256": data.corpus_sha256,
        "corpus_documents": data.documents,
        "corpus_bytes": data.corpus_bytes,
        "python": platform.python_version(),
        "platform": sys.platform,
        "torch": torch.__version__,
        "transformers": transformers_version,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Trains the embedded checkpoint on CPython's own texts.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported checkpoint")
    parser.add_argument("--minutes", type=float, help="computing time in all, resumed runs included")
    parser.add_argument("--decay-minutes", type=float, default=5.0, help="the last part of it, with a falling rate")
    parser.add_argument("--steps", type=int, help="instead of --minutes: optimizer steps in all")
    parser.add_argument("--decay-steps", type=int, default=0, help="the last part of --steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path(".cache/train"), help="folder of the state to resume from")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps between held-out figures")
    options = parser.parse_args(arguments)
    if (options.minutes is None) == (options.steps is None):
        parser.error("give either --minutes or --steps")
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    return options


def reporter(progress: Progress, task: TaskID, data: Data, every: int) -> Report:
    """Shows each step's loss and speed, and now and then the held-out figure."""

    def report(run: Run, loss: float) -> None:
        speed = run.tokens / run.seconds
        text = f"step {run.step}  {run.tokens / 1e6:.2f} M tokens  loss {loss:.3f}  {speed:.0f} tokens/s"
        progress.update(task, description=text)
        if run.step % every == 0:
            bits = bits_per_byte(run.model, data.held_out, data.held_out_bytes, run.settings.context)
            progress.console.print(f"{text}  {run.seconds / 60:.1f} min  held out {bits:.4f} bits/byte", soft_wrap=True)

    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and exports; SIGTERM or Ctrl-C saves the state and ends with a line that says how to go on."""
    options = parse(arguments)
    import torch
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    torch.set_num_threads(options.threads)
    settings = Settings(seed=options.seed)
    length = Length(options.steps, options.decay_steps, options.minutes, options.decay_minutes)
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stops.append(received))
    try:
        data = Data.build(corpus.stdlib_documents(), settings)
        run = Run.start(settings)
        if options.resume:
            run.load(options.state, data.corpus_sha256)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns) as progress:
            report = reporter(progress, progress.add_task("starting"), data, options.evaluate_every)
            finished = train(run, data, length, options.state, report, lambda: bool(stops))
    except (TrainingError, corpus.CorpusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not finished:
        print(f"stopped at step {run.step}; go on with the same command and --resume (state in {options.state})")
        return 0
    record = export(run, data, options.out)
    print(f"{options.out}: {record['held_out_bits_per_byte']} bits/byte held out, {record['tokens_trained']} tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
