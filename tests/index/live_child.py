"""A process that adds to a live index, to be killed: `python live_child.py DIR FIRST`, one line an acknowledged id.

Each id's vector comes of the id alone. Two threads add at once, single vectors and batches of three; every 200 ids a
snapshot is written by a third one.
"""

import sys
import threading
from pathlib import Path

import numpy as np
from ralmq.workers.live import merging, segments
from ralmq.workers.live.opening import open_live

D = 16


def vector(number: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    return np.random.default_rng(number).normal(size=D).astype(np.float32)


def main() -> None:
    merging.SMALL, merging.MANY, segments.RECENT = 256, 3, 32  # type: ignore[misc]
    index = open_live(Path(sys.argv[1]))
    first, lock = int(sys.argv[2]), threading.Lock()

    def adds(odd: int) -> None:
        number = first + odd * 1_000_000
        while True:
            count = 3 if number % 2 else 1
            ids = np.arange(number, number + count)
            index.add(np.stack([vector(each) for each in ids.tolist()]), ids, [{"n": each} for each in ids.tolist()])
            with lock:
                sys.stdout.write("".join(f"{each}\n" for each in ids.tolist()))
                sys.stdout.flush()
            if not odd and number % 200 < count:
                index.snapshot()
            number += count

    threading.Thread(target=adds, args=(1,), daemon=True).start()
    adds(0)


if __name__ == "__main__":
    main()
