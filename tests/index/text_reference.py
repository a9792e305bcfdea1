"""BM25 as its papers give it, in plain Python; the reference of the text index. Knows no database."""

import math
import re
from collections.abc import Mapping

import numpy as np

K1, B, FLOOR = 1.2, 0.75, 1e-6


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def bm25(query: str, texts: Mapping[int, str], k: int) -> list[tuple[int, float]]:
    """The k best (id, score) of those texts that hold any word of the query; each word of it counts once.

    Robertson and Zaragoza 2009, with the idf of a word in over half of the texts raised to a small positive number.
    """
    held = {number: words(text) for number, text in texts.items()}
    average = sum(map(len, held.values())) / len(held)
    found: dict[int, float] = {}
    for word in dict.fromkeys(words(query)):
        having = [number for number, line in held.items() if word in line]
        idf = math.log((len(held) - len(having) + 0.5) / (len(having) + 0.5))
        for number in having:
            count = held[number].count(word)
            share = count * (K1 + 1) / (count + K1 * (1 - B + B * len(held[number]) / average))
            found[number] = found.get(number, 0.0) + max(idf, FLOOR) * share
    best = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
    return sorted(best, key=lambda pair: (-float(np.float32(pair[1])), pair[0]))  # scores travel as float32
