"""What the memory gives one thread: `python read_memory.py`, then see talk.py; a "token" is 400 MB read once."""

import torch
from talk import Took, serve

BYTES = 400 << 20  # far more than a cache holds


def main() -> None:
    torch.set_num_threads(1)
    numbers = torch.ones(BYTES // 4)

    def generate(prompts: list[list[int]], tokens: int, together: bool, took: Took) -> None:
        for number in range(tokens):
            numbers.sum()
            took(0, number)

    serve(generate)


if __name__ == "__main__":
    main()
