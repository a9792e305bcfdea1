"""A file of prompts over all generators: `python data_parallel_inference.py demo prompts.jsonl texts.jsonl`.

Each line is {"prompt": ..., and any option of client.generate}. Interrupted, it goes on where it was when it is called
again. `ralmq map --service generate:demo prompts.jsonl texts.jsonl` does the same without a line of code.
"""

import asyncio
import sys
from typing import Any

import ralmq


async def main(model: str, source: str, target: str) -> None:
    async with ralmq.connect() as client:

        async def ask(row: dict[str, Any]) -> dict[str, Any]:
            generation = client.generate(**row, model=model)
            text = "".join([token.text async for token in generation])
            return {"prompt": row["prompt"], "text": text, "why": generation.finish_reason}

        found = await ralmq.map_rows(client, ask, source, target, job=f"texts of {model}", concurrency=8, told=told)
        print(f"\n{found.rows} rows, {found.failed} failed, {found.before} done before")


def told(done: int, failed: int, rows: int) -> None:
    print(f"\r{done} of {rows}, {failed} failed", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python data_parallel_inference.py MODEL PROMPTS.jsonl TEXTS.jsonl")
    try:
        asyncio.run(main(*sys.argv[1:]))
    except ralmq.errors.RalmqError as error:
        sys.exit(str(error))
