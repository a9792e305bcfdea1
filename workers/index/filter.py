"""A filter over payload fields: the map that travels, checked and compiled to one SQL condition. Knows no database."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ...schema.errors import Refused

MAX_DEPTH: Final = 8  # of and / or / not
MAX_TERMS: Final = 256  # comparisons in one filter
MAX_VALUES: Final = 65_536  # of one "in"
_INTEGERS: Final = 1 << 63  # SQLite's are below
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}(\.[A-Za-z_][A-Za-z0-9_-]{0,63}){0,7}")
_COMPARED = {"gte": ">=", "lte": "<=", "gt": ">", "lt": "<"}
_HOW = 'send {"field": value}, {"field": {"in": [...], "gte": 1, "lt": 2}}, or these within "and", "or", "not"'

Value = str | int | float | None


class BadFilter(Refused, ValueError):
    """A filter that is refused before anything is searched; one line that says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition over a column `fields` that holds an entry's fields as JSON.

    `sql` holds nothing of the asker's, only placeholders for `values`. Equal filters are equal objects, so it is a key.

    Attributes:
        names: JSON paths of the fields that are compared.
    """

    sql: str
    values: tuple[Value, ...]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return 1024 + len(self.sql) + sum(len(value) for value in self.values if isinstance(value, str))


def parse(given: Any) -> Filter:
    """The condition of a filter map.

    `{"field": value}` is equality (None: the field is missing or null); of `{"field": {"in": [...], "gte": 1}}` all are
    to hold, as of several fields in one map; a dot leads into nested maps; `{"and": [...]}`, `{"or": [...]}`,
    `{"not": filter}` combine. A comparison with a number is false for text and the other way round; whatever compares
    a missing field is false, so `not` of it is true. Raises BadFilter.
    """
    terms = _Terms()
    sql = terms.condition(given, 1)
    return Filter(sql, tuple(terms.values), tuple(dict.fromkeys(terms.names)))


class _Terms:
    """Collects the bound values of one filter, in the order of its placeholders."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.names: list[str] = []
        self._count = 0

    def condition(self, given: Any, depth: int) -> str:
        if not isinstance(given, Mapping) or not given:
            raise BadFilter(f"a filter is a map with at least one field, not {_shown(given)}; {_HOW}")
        if depth > MAX_DEPTH:
            raise BadFilter(f"a filter is nested deeper than {MAX_DEPTH}; write it flatter")
        return " AND ".join([self._entry(key, value, depth) for key, value in given.items()])

    def _entry(self, key: Any, value: Any, depth: int) -> str:
        if key in ("and", "or"):
            if not isinstance(value, list | tuple) or not value:
                raise BadFilter(f"{key} of a filter is {_shown(value)}; send a list of filters")
            return "(" + f" {key.upper()} ".join([f"({self.condition(part, depth + 1)})" for part in value]) + ")"
        if key == "not":
            return f"NOT coalesce(({self.condition(value, depth + 1)}), 0)"
        if not isinstance(key, str) or _NAME.fullmatch(key) is None:
            raise BadFilter(f"{_shown(key)} is no field of a filter; {_HOW}")
        path = "$" + "".join(f'."{part}"' for part in key.split("."))
        if not isinstance(value, Mapping):
            return self._equal(path, key, value)
        if not value:
            raise BadFilter(f"{key} of a filter is an empty map; {_HOW}")
        return " AND ".join([self._compared(path, key, operator, operand) for operator, operand in value.items()])

    def _compared(self, path: str, key: str, operator: Any, operand: Any) -> str:
        if operator == "in":
            if not isinstance(operand, list | tuple) or len(operand) > MAX_VALUES:
                raise BadFilter(f"in of {key} is {_shown(operand)}; send a list of at most {MAX_VALUES} values")
            chosen = json.dumps([_scalar(key, value) for value in operand])
            return f"{self._column(path)} IN (SELECT value FROM json_each({self._bound(chosen)}))"
        if operator not in _COMPARED:
            raise BadFilter(f"{_shown(operator)} is no operator of a filter: there are in, {', '.join(_COMPARED)}")
        value = _scalar(key, operand)
        if value is None:
            raise BadFilter(f"{operator} of {key} is None; send a number or a text")
        kinds = "('text')" if isinstance(value, str) else "('integer', 'real')"
        typed = f"typeof({self._column(path)}) IN {kinds}"
        return f"({typed} AND {self._column(path)} {_COMPARED[operator]} {self._bound(value)})"

    def _equal(self, path: str, key: str, value: Any) -> str:
        return f"{self._column(path)} IS {self._bound(_scalar(key, value))}"

    def _column(self, path: str) -> str:
        self._count += 1
        if self._count > 2 * MAX_TERMS:
            raise BadFilter(f"a filter has over {MAX_TERMS} comparisons; use in for many values")
        self.names.append(path)
        return f"json_extract(fields, {self._bound(path)})"

    def _bound(self, value: Value) -> str:
        self.values.append(value)
        return "?"


def _scalar(key: str, value: Any) -> Value:
    """A value that SQLite compares as JSON's: true and false are 1 and 0 there."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int) and -_INTEGERS <= value < _INTEGERS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise BadFilter(f"{key} of a filter is compared with {_shown(value)}; send a text, a finite number or true / false")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
