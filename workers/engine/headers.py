"""What lies where in a directory of safetensors files, by tensor name; reads their headers. Knows no torch, no model.

The format: u64 little-endian header length, JSON header (name -> dtype, shape, data_offsets), raw data
(https://github.com/huggingface/safetensors#format). It is read here directly, because a fingerprint needs byte samples.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import read_config, read_json
from .errors import CheckpointError

FINGERPRINT_FILE = "ralmq_fingerprint"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER = 100 << 20  # bytes; the bound that the safetensors library sets
SLAB = 4 << 20  # bytes read at a time where a tensor is read in pieces
SAMPLE = 64  # bytes hashed at each end of a tensor
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `begin` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for an unknown dtype."""
        return SIZES.get(self.dtype, 0)


class Headers:
    """Where the tensors of a model directory lie: one *.safetensors file, or several with model.safetensors.index.json.

    As for transformers a file called model.safetensors is the whole model, whatever lies beside it.
    Opening a sharded checkpoint reads the index alone; a shard that is not there is an error only when it is needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._headers: dict[Path, dict[str, Entry]] = {}
        self._files = self._locate()

    def _locate(self) -> dict[str, Path]:
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path}: no such directory; give a Hugging Face model directory (config.json, *.safetensors)"
            )
        whole, index = self.path / WEIGHTS_FILE, self.path / INDEX_FILE
        if whole.exists():
            return dict.fromkeys(self._header(whole), whole)
        if index.exists():
            weights = read_json(index).get("weight_map")
            if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
                raise CheckpointError(f"{index}: has no weight_map of names to files; download the file again")
            strays = [file for file in weights.values() if Path(file).name != file]
            if strays:
                raise CheckpointError(f"{index}: names a file outside its directory ({strays[0]}); download it again")
            return {name: self.path / file for name, file in weights.items()}
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self.path}: holds no *.safetensors file; save the model with safetensors "
                "(pytorch_model.bin is not read)"
            )
        return {name: file for file in files for name in self._header(file)}

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor; reads at most its file's header."""
        if name not in self._files and (self.path / FINGERPRINT_FILE).exists():
            raise CheckpointError(
                f"{self.path}: has no tensor {name}: the directory holds only a part of the model (ralmq split); "
                "start the stage that it was written for"
            )
        if name not in self._files:
            raise CheckpointError(
                f"{self.path}: has no tensor {name}; the files do not belong to this config.json or are incomplete"
            )
        file = self._files[name]
        header = self._header(file)
        if name not in header:
            raise CheckpointError(f"{file}: has no tensor {name} although the index names it; download the file again")
        return header[name]

    def raw(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor as they are stored, of whatever dtype, a few MiB at a time."""
        entry = self.entry(name)
        with self._files[name].open("rb") as stream:
            stream.seek(entry.begin)
            for left in range(entry.end - entry.begin, 0, -SLAB):
                yield stream.read(min(SLAB, left))

    def fingerprint(self) -> str:
        """16 hex digits that are equal for equal models however their tensors are spread over files.

        Hashes the model's shape (not its special tokens, which change no hidden state), and of every tensor the name,
        dtype, shape and the first and last 64 bytes. A file `ralmq_fingerprint` wins: part of a checkpoint carries the
        whole one's there.
        """
        stored = self.path / FINGERPRINT_FILE
        if stored.exists():
            text = stored.read_text(encoding="ascii", errors="replace").strip()
            if len(text) != 16 or set(text) - set("0123456789abcdef"):
                raise CheckpointError(f"{stored}: is not 16 hex digits; delete it or copy it from the whole checkpoint")
            return text
        shape = {k: v for k, v in asdict(read_config(self.path)).items() if k not in ("eos_ids", "bos_id")}
        digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
        for name in self.names():
            entry = self.entry(name)
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            with self._files[name].open("rb") as stream:
                stream.seek(entry.begin)
                digest.update(stream.read(min(SAMPLE, entry.end - entry.begin)))
                stream.seek(max(entry.begin, entry.end - SAMPLE))
                digest.update(stream.read(min(SAMPLE, entry.end - entry.begin)))
        return digest.hexdigest()[:16]

    def _header(self, file: Path) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = _read_header(file)
        return self._headers[file]


def _read_header(file: Path) -> dict[str, Entry]:
    """The table of contents of one safetensors file, every offset checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError("the header is longer than the file")
            header: Any = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        start = 8 + length
        return {name: _entry(member, start, size) for name, member in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no such file; download this shard too, or give a directory that holds it"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error}); download or save it again") from None


def _entry(member: Any, start: int, size: int) -> Entry:
    begin, end = (start + int(offset) for offset in member["data_offsets"])
    shape = tuple(int(n) for n in member["shape"])
    if not start <= begin <= end <= size or any(n < 0 for n in shape):
        raise ValueError("a tensor lies outside the file: it is cut off or damaged")
    return Entry(str(member["dtype"]), shape, begin, end)
