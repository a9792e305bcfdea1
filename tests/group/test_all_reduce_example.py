"""examples/all_reduce.py, as its first line says."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from serving import broker, free_url

EXAMPLE = Path(__file__).parents[2] / "examples" / "all_reduce.py"


async def test_three_processes_sum_their_arrays(tmp_path: Path) -> None:
    url = free_url()
    with broker(tmp_path, url):
        started = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, str(EXAMPLE), "3"), env={**os.environ, "RALMQ_BROKER": url}, stdout=subprocess.PIPE
            )
            for _ in range(3)
        ]
        said = [(await asyncio.wait_for(process.communicate(), 60))[0].decode() for process in started]
    lines = sorted(line for text in said for line in text.splitlines())
    assert lines == ["gathered [[], [0], [0, 1]]", *[f"rank {rank} of 3: sum 6, max 3" for rank in range(3)]]
    assert len(EXAMPLE.read_text().splitlines()) < 40
