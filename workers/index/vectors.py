"""Files of vectors and of payload fields, as `index build` takes them. Knows no faiss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .directory import OutputError
from .fields import BadFields, dump_fields


def read_vectors(path: Path) -> NDArray[np.float32]:
    """The vectors of a .npy file, float32 [n, d]; other floats are converted. Raises OutputError."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise OutputError(f"{path}: is no .npy file that can be read; save the vectors with numpy.save") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
        raise OutputError(f"{path}: holds no vectors; save floats [n, d] with numpy.save")
    return found if found.dtype == np.float32 else found.astype(np.float32)


def read_fields(path: Path) -> list[str]:
    """The JSON of each line of a .jsonl file: the payload fields of one entry. Raises OutputError."""
    texts = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    texts.append(dump_fields(json.loads(line)))
                except BadFields as fault:
                    raise OutputError(f"{path}:{number}: {fault}; mend the line") from None
                except (ValueError, RecursionError):
                    raise OutputError(f"{path}:{number}: is no JSON; give one map a line") from None
    except (OSError, UnicodeDecodeError):
        raise OutputError(f"{path}: cannot be read as UTF-8 text; name a .jsonl file") from None
    return texts
