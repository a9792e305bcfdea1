"""The same engine without a pipeline: `python one_process.py MODEL THREADS [DTYPE]`, then see talk.py.

All layers in one span, all sequences in each step: what one process reaches, with nothing between it and its caller.
"""

import sys

import torch
from ralmq.workers.engine.pool import BLOCK
from ralmq.workers.engine.span import Row, Span
from talk import Took, serve

MOST, LONGEST = 16, 256  # sequences, and tokens of each


def main() -> None:
    path, threads, *dtype = sys.argv[1:]
    torch.set_num_threads(int(threads))
    blocks = LONGEST // BLOCK
    kind = dtype[0] if dtype else "fp32"
    span = Span.load(path, 0, 12, dtype=kind, blocks=MOST * blocks, packed=True)
    tables = [list(range(n * blocks, n * blocks + blocks)) for n in range(MOST)]

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int, together: bool, took: Took) -> None:
        assert len(prompts) <= MOST
        fed = [0] * len(prompts)
        new = [torch.tensor(prompt) for prompt in prompts]
        for _ in range(tokens):
            rows = [Row(begin, len(ids), table) for begin, ids, table in zip(fed, new, tables, strict=False)]
            ends = torch.tensor([len(ids) for ids in new]).cumsum(0) - 1
            best = span.head(span.forward(rows, torch.cat(new)), ends).argmax(-1)
            fed = [begin + len(ids) for begin, ids in zip(fed, new, strict=True)]
            new = list(best.split(1))
            for number, token in enumerate(best.tolist()):
                took(number, token)

    serve(generate)


if __name__ == "__main__":
    main()
