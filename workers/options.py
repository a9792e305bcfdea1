"""`-o key=value` to the keyword arguments of a worker class. Knows annotations, no worker."""

import inspect
from collections.abc import Sequence
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..schema.errors import Refused
from .base import Worker


def build(kind: type[Worker], pairs: Sequence[str]) -> Worker:
    """An instance of a worker class from texts `key=value`, converted by the annotations of its `__init__`.

    Raises:
        Refused: no key=value, an unknown or missing option, or a value of another type.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    hints = get_type_hints(kind.__init__)
    given: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise Refused(f"-o {pair} is no key=value")
        if name not in parameters:
            raise Refused(f"{kind.__name__} has no option {name}: there are {', '.join(parameters) or 'none'}")
        try:
            given[name] = TypeAdapter(hints.get(name, str)).validate_python(text)
        except ValidationError as error:
            raise Refused(f"-o {pair}: {error.errors()[0]['msg']}") from None
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in given
    ]
    if missing:
        raise Refused(f"{kind.__name__} needs {', '.join(f'-o {name}=...' for name in missing)}")
    return kind(**given)
