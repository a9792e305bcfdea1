"""Processes that sum their arrays: run `python all_reduce.py 3` three times, on any machines that reach the broker."""

import sys

import numpy
import ralmq


def main(size: int) -> None:
    with ralmq.group("sums", size) as group:  # $RALMQ_BROKER, else tcp://127.0.0.1:5555; the first to come is rank 0
        mine = numpy.full((2, 3), group.rank + 1.0, numpy.float32)
        total = group.all_reduce(mine)  # the same bits at each: summed in the order of the ranks
        best = group.all_reduce(mine, "max")
        lines = group.gather(numpy.arange(group.rank))  # of other sizes at each
        print(f"rank {group.rank} of {size}: sum {total[0, 0]:g}, max {best[0, 0]:g}", flush=True)
        if lines is not None:
            print("gathered", [line.tolist() for line in lines])
        try:
            group.barrier(timeout=30)
        except (ralmq.RankMissing, ralmq.RankLost) as error:
            print("without ranks", error.ranks)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        sys.exit("usage: python all_reduce.py PROCESSES")
    main(int(sys.argv[1]))
