"""A model's tokenizer.json, read. Knows the file, nothing of what it is for."""

from pathlib import Path

from tokenizers import Tokenizer

from ..schema.errors import Refused


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, which pads nothing.

    Raises:
        Refused: it is broken.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise Refused(f"{path} cannot be read ({error}): copy it anew from the model") from None
    tokenizer.no_padding()
    return tokenizer
