"""Simulates many seeds, or one with a trace of every message: python tests/simulation/run.py --seeds 5000."""

import argparse
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from simulation.scenario import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="print every message")
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first failure")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds) if options.seed is None else [options.seed]
    started = time.monotonic()
    total: Counter[str] = Counter()
    failed: list[int] = []
    for seed in seeds:
        try:
            result = simulate(seed, print if options.trace else None)
        except Exception:
            traceback.print_exc()
            failed.append(seed)
            if not options.keep_going:
                break
            continue
        total.update({"steps": result.steps, **{f"ended {how}": n for how, n in result.ended.items()}, **result.counts})
    for name, count in sorted(total.items()):
        print(f"{count:10} {name}")
    print(f"{len(seeds)} seeds, {len(failed)} failed {failed[:20]}, {time.monotonic() - started:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
