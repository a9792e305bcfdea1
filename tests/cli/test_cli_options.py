"""`-o key=value` becomes what the annotations of a worker's __init__ say."""

from pathlib import Path
from typing import Any, Literal

import pytest
from ralmq.schema.errors import Refused
from ralmq.workers.base import Worker
from ralmq.workers.options import build


class Typed(Worker):
    service = "typed"

    def __init__(
        self,
        *,
        path: Path,
        count: int = 1,
        share: float = 0.5,
        loud: bool = False,
        color: Literal["red", "blue"] = "red",
        limit: int | None = None,
        plain="text",
    ) -> None:
        self.given = {"path": path, "count": count, "share": share, "loud": loud, "color": color}
        self.given |= {"limit": limit, "plain": plain}


@pytest.mark.parametrize(
    ("pair", "name", "value"),
    [
        ("count=3", "count", 3),
        ("share=1e-3", "share", 0.001),
        ("loud=true", "loud", True),
        ("loud=0", "loud", False),
        ("color=blue", "color", "blue"),
        ("limit=7", "limit", 7),
        ("plain=a=b", "plain", "a=b"),
        ("plain=", "plain", ""),
        ("path=/tmp/x", "path", Path("/tmp/x")),
    ],
)
def test_a_text_becomes_a_value(pair: str, name: str, value: Any) -> None:
    built = build(Typed, ["path=here", pair])
    assert isinstance(built, Typed)
    assert built.given[name] == value
    assert type(built.given[name]) is type(value)


@pytest.mark.parametrize(
    ("pairs", "part"),
    [
        ([], "needs -o path=..."),
        (["path=x", "count=1.5"], "-o count=1.5"),
        (["path=x", "count=many"], "-o count=many"),
        (["path=x", "loud=perhaps"], "-o loud=perhaps"),
        (["path=x", "color=green"], "-o color=green"),
        (["path=x", "size=1"], "no option size: there are path, count"),
        (["path=x", "count"], "-o count is no key=value"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(pairs: list[str], part: str) -> None:
    with pytest.raises(Refused, match=part.replace(".", r"\.")):
        build(Typed, pairs)
