"""The members of a JSON object, each asked for with its type; knows no model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .model import ACTIVATIONS


class Fields:
    """One JSON object of a file; a fault names file and member. A member that is null counts as absent."""

    def __init__(self, path: Path, members: Mapping[str, Any]) -> None:
        self.path = path
        self.members = members

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.members.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(f"{name} is {value!r} where a positive integer is needed; mend it in this file")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self.members.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(f"{name} is {value!r} where a positive number is needed; mend it in this file")
        return float(value)

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A positive number, or None where there is none; an absent member has the default, a null one is None."""
        if name not in self.members:
            return default
        return None if self.members[name] is None else self.real(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.members.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(f"{name} is {value!r} where true or false is needed; mend it in this file")
        return value

    def activation(self, name: str, default: str) -> str:
        value = self.members.get(name) or default
        if value not in ACTIVATIONS:
            raise self.fail(f"{name} {value!r} is unknown; use a model with one of {', '.join(ACTIVATIONS)}")
        return str(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.members.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            raise self.fail(f"{name} is {value!r} where a token id or a list of them is needed; mend it in this file")
        return tuple(values)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Exactly `count` positive numbers."""
        value = self.members.get(name)
        fits = isinstance(value, list) and len(value) == count
        if not fits or not all(isinstance(item, int | float) and item > 0 for item in value or ()):
            raise self.fail(f"{name} is {value!r} where {count} positive numbers are needed; mend it in this file")
        return tuple(float(item) for item in value or ())

    def within(self, name: str) -> "Fields":
        """The object that is a member; an absent one is empty."""
        value = self.members.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.fail(f"{name} is {value!r} where an object is needed; mend it in this file")
        return Fields(self.path, value or {})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory; CheckpointError if it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; give a Hugging Face model directory (config.json, *.safetensors)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download or write the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download or write the file again")
    return value
