"""One member as a process: `python members.py URL SIZE RANK DO`. Says what came of it, a line of JSON each."""

import json
import sys
import time
from typing import Any

import numpy as np
import ralmq

COUNT = 1 << 20  # float32: 4 MiB, which goes through shared memory


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def main(url: str, size: int, rank: int, do: str, backend: str = "direct") -> None:
    with ralmq.group("g", size, rank, broker=url, backend=backend, wait=60, timeout=30) as group:
        say(rank=group.rank)
        try:
            if do == "absent":
                time.sleep(3600)
            turns = 0
            while True:
                made = group.all_reduce(np.full(COUNT, turns, np.float32))
                assert set(np.unique(made).tolist()) == {float(turns * size)}
                turns += 1
                if turns == 3:
                    say(turns=turns)
                if do == "once" and turns == 3:
                    return
        except (ralmq.RankLost, ralmq.RankMissing) as error:
            say(error=type(error).__name__, ranks=error.ranks, text=str(error))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
