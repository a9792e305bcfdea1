"""A model directory cut into directories of some layers each, for machines that hold only a part. Computes nothing."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import read_config
from .cuts import even_cuts, span_tensors
from .errors import CheckpointError
from .headers import FINGERPRINT_FILE, WEIGHTS_FILE, Headers

COPIED = (  # what is in a model directory beside weights, and small
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


def split(path: Path, stages: int, out: Path, progress: Callable[[int, int], None] | None = None) -> list[Path]:
    """Writes directories out/0 ... out/(stages - 1), each with its tensors alone, and returns them.

    Each also has config, tokenizer and the whole checkpoint's fingerprint, so that stages of them form a pipeline with
    stages of the whole. `progress` is told (bytes written, bytes in all). Where it fails no such directory is left.

    Raises:
        CheckpointError: a broken checkpoint, a number of stages that its layers do not give, or `out` is not empty.
        OSError: `out` cannot be written.
    """
    checkpoint, config = Headers(path), read_config(path)
    if not 1 <= stages <= config.layers:
        raise CheckpointError(f"{path}: {config.layers} layers split into 1 to {config.layers} stages, not {stages}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already and not an empty directory; name another one, or empty it")
    if (path / FINGERPRINT_FILE).exists():
        raise CheckpointError(f"{path}: holds only a part of the model itself (ralmq split); split the whole model")
    fingerprint = checkpoint.fingerprint()
    parts = [span_tensors(checkpoint, config, first, last) for first, last in even_cuts(config.layers, stages)]
    total = sum(checkpoint.entry(name).end - checkpoint.entry(name).begin for names in parts for name in names)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    wrote(0)
    made = [out / str(place) for place in range(stages)]
    try:
        for folder, names in zip(made, parts, strict=True):
            folder.mkdir(parents=True)
            for file in {file for pattern in COPIED for file in path.glob(pattern) if file.is_file()}:
                shutil.copyfile(file, folder / file.name)
            _write(checkpoint, names, folder / WEIGHTS_FILE, wrote)
            (folder / FINGERPRINT_FILE).write_text(fingerprint + "\n", encoding="ascii")
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return made


def _write(checkpoint: Headers, names: Sequence[str], file: Path, wrote: Callable[[int], None]) -> None:
    """One safetensors file of these tensors, the ones of wide dtypes first, so that each is aligned to its own."""
    entries = {name: checkpoint.entry(name) for name in names}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + entry.end - entry.begin
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in list(header)[1:]:
            for piece in checkpoint.raw(name):
                stream.write(piece)
                wrote(len(piece))
