"""`make bench-gpu`: measures the GPU of this machine and renews its part of docs/performance.md; one line without one.

`python tests/acceptance/gpu.py [SIZE ...]`: of 1b, 3b and 8b, the first by default. Knows how none of it is measured.
"""

import sys
from collections.abc import Sequence

import torch
from checks import Point
from performance import keep_bench
from ralmq.bench.gpu import NONE, SHAPES, Rate, measure, show
from rich.console import Console


def points(rates: Sequence[Rate]) -> list[Point]:
    """Tokens a second of each engine, a plot for each size."""
    plot = "Tokens per second on a GPU, Llama {}"
    return [Point(plot.format(r.model), f"{r.batch} at a time", r.engine, r.tokens_per_s) for r in rates]


def main(sizes: Sequence[str]) -> int:
    unknown = [size for size in sizes if size not in SHAPES]
    if unknown:
        print(f"unknown size {unknown[0]}: give some of {', '.join(SHAPES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(NONE)
        return 0
    rates = [rate for size in sizes or ["1b"] for rate in measure(size, SHAPES[size], "cuda:0")]
    show(rates, Console())
    keep_bench("gpu", rates, points(rates))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
