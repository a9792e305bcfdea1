"""What `ralmq search` prints of neighbours: a name for their values, whole words, a query's number where it helps."""

from typing import Any

import numpy as np
import pytest
from ralmq.cli.tables import SHOWN, WINDOW, hits_table
from rich.console import Console


def shown(found: list[list[dict[str, Any]]], metric: str = "l2", ids: Any = None, width: int = 1000) -> str:
    console = Console(width=width)
    numbers = np.arange(sum(map(len, found))).reshape(len(found), -1) if ids is None else np.array(ids)
    with console.capture() as captured:
        console.print(hits_table(found, numbers, numbers.astype(np.float32), metric))
    return captured.get()


def passage(context: str, text: str, start: int = 0, behind: int = 1) -> list[list[dict[str, Any]]]:
    tokens = list(range(3 + behind))
    return [[{"context": context, "continuation": text, "start": start, "split": 3, "tokens": tokens}]]


@pytest.mark.parametrize(("metric", "name"), [("l2", "distance"), ("ip", "score"), ("cosine", "score")])
def test_what_is_large_where_it_is_near_is_a_score(metric: str, name: str) -> None:
    head = shown([[{"text": "one"}]], metric)
    assert name in head and ({"distance", "score"} - {name}).pop() not in head


def test_a_passage_is_cut_between_words() -> None:
    inside = passage("ning of it is", " that ships hav", start=7, behind=WINDOW)
    assert "… of it is that ships …" in shown(inside)
    assert "Beginning of it is that ships …" in shown(passage("Beginning of it is", " that ships hav", behind=WINDOW))
    assert "… of it is that ships have" in shown(passage("ning of it is", " that ships have", start=7)), "its end"
    assert "aaaa" in shown(passage("aaaa", "aaaa", start=7, behind=WINDOW)), "one word is better than none"
    long = " ".join(f"word{number}" for number in range(SHOWN))
    line = next(line for line in shown([[{"text": long}]]).splitlines() if "word0" in line)
    kept = line.split("word0")[1].split("…")[0].split()
    assert kept == long.split()[1 : len(kept) + 1] and len(kept) > 20
    assert "x" * SHOWN + " …" in shown([[{"text": "x" * 999}]])


def test_the_query_s_number_is_there_where_there_are_several() -> None:
    one, other = {"text": "one [b]"}, {"text": "other"}
    assert "query" not in shown([[one]]) and "one [b]" in shown([[one]])
    several = shown([[one, other], [{}, {}]], ids=[[4, 5], [-1, -1]])
    assert "query" in several and "nothing found" in several and "-1" not in several
