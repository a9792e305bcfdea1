"""What a user calls a model to (name, directory). Knows where the embedded one lies; opens no weights."""

from pathlib import Path
from typing import Final

from ..schema.errors import Refused

EMBEDDED: Final = "demo"
_EMBEDDED_PATH: Final = Path(__file__).parents[1] / "demo" / "checkpoint"


def resolve(model: str) -> tuple[str, Path]:
    """The name of a model (its services are lm:<name>, generate:<name>) and the directory of its checkpoint.

    Args:
        model: "demo" for the embedded checkpoint, else a Hugging Face directory, called by its last component.

    Raises:
        Refused: no such directory, or one without config.json.
    """
    path = _EMBEDDED_PATH if model == EMBEDDED else Path(model).expanduser().resolve()
    if not path.is_dir():
        raise Refused(f"{model}: no such model directory; name one that holds config.json and *.safetensors, or demo")
    if not (path / "config.json").is_file():
        raise Refused(f"{path}: holds no config.json, so it is no model directory; name a Hugging Face checkpoint")
    return (EMBEDDED if model == EMBEDDED else path.name), path
