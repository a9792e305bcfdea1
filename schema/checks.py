"""Checks for single fields of a message: each takes a value from the wire and returns it, or raises Malformed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .errors import Malformed

Check = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Field:
    """Where a field of a message travels, and what it must be."""

    section: Literal["routing", "body"]
    check: Check


def routing(check: Check) -> Field:
    """A field in the routing section, which the broker may read."""
    return Field("routing", check)


def in_body(check: Check) -> Field:
    """A field in the body section, which only peers read."""
    return Field("body", check)


def text(most: int, least: int = 0) -> Check:
    """A string of `least` to `most` characters."""

    def check(value: Any) -> str:
        if type(value) is not str or not least <= len(value) <= most:
            raise Malformed(f"expected text of {least} to {most} characters, got {_shown(value)}")
        return value

    return check


def note(most: int) -> Check:
    """Text for people, cut to `most` bytes of UTF-8: what went wrong must travel however long it is."""

    def check(value: Any) -> str:
        if type(value) is not str:
            raise Malformed(f"expected text, got {_shown(value)}")
        return value.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")

    return check


def integer(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Malformed(f"expected a whole number from {low} to {high}, got {_shown(value)}")
        return value

    return check


def integers(low: int, high: int, most: int) -> Check:
    """A list of at most `most` whole numbers from `low` to `high`; becomes a tuple."""

    def check(value: Any) -> tuple[int, ...]:
        if type(value) not in (list, tuple) or len(value) > most:
            raise Malformed(f"expected a list of at most {most} entries, got {_shown(value)}")
        for number in value:  # one loop, no call an entry: a STEP holds hundreds
            if type(number) is not int or not low <= number <= high:
                raise Malformed(f"expected whole numbers from {low} to {high}, got {_shown(number)}")
        return tuple(value)

    return check


def flag(value: Any) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise Malformed(f"expected true or false, got {_shown(value)}")
    return value


def identifier(value: Any) -> bytes:
    """16 bytes: the id of a request or a pipeline, or a peer's nonce."""
    if type(value) is not bytes or len(value) != 16:
        raise Malformed(f"expected an id of 16 bytes, got {_shown(value)}")
    return value


def maybe(check: Check) -> Check:
    """None, or what `check` accepts."""

    def inner(value: Any) -> Any:
        return None if value is None else check(value)

    return inner


def list_of(check: Check, most: int) -> Check:
    """A list of at most `most` values, each accepted by `check`; becomes a tuple."""

    def inner(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) > most:
            raise Malformed(f"expected a list of at most {most} entries, got {_shown(value)}")
        return tuple([check(entry) for entry in value])

    return inner


def mapping(value: Any) -> dict[str, Any]:
    """A map from text to anything msgpack holds."""
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise Malformed(f"expected a map with text keys, got {_shown(value)}")
    return value


def facts(value: Any) -> dict[str, Any]:
    """A map from text to text, numbers, true, false or None: what all are shown of a peer holds no depth of its own."""
    for entry in mapping(value).values():
        if isinstance(entry, bytes | bytearray | list | tuple | dict):
            raise Malformed(f"expected text, numbers, true or false as values, got {_shown(entry)}")
    return value  # type: ignore[no-any-return]


def _shown(value: Any) -> str:
    """A value as an error message shows it; short, since it may come from an attacker."""
    if isinstance(value, str | bytes | list | tuple | dict):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{value!r:.40}"
