"""Coverage-guided fuzzing of `decode` and of the broker's core, with atheris: longer runs than tests can afford.

    python tests/fuzz/run.py --seconds 60                 both targets, half of the time each
    python tests/fuzz/run.py --seconds 600 core           one of them
    python tests/fuzz/run.py --replay FILE...             cases that failed, once more

What was found to reach new code is kept in .cache/fuzz and taken up by the next run. A case that fails is written to
tests/fuzz/regressions, where a test replays it from then on. Exit 1 where a case fails, 2 where atheris is missing.
"""

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
CORPUS = ROOT / ".cache" / "fuzz"
NAMES = ("decode", "core")
LONGEST = {"decode": 20_000, "core": 2_000}  # bytes of a case
MEMORY_MB = 1024
sys.path[:0] = [str(TESTS), str(TESTS / "schema")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=[], help=f"of {', '.join(NAMES)}; all where none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="run these cases, no others")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process that fuzzes one target
    options = parser.parse_args()
    if unknown := set(options.targets) - set(NAMES):
        print(f"no such target: {', '.join(sorted(unknown))}; use {' or '.join(NAMES)}", file=sys.stderr)
        return 2
    if options.replay:
        return replay(options.replay)
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed: pip install -e '.[fuzz]' (CPython 3.11 to 3.13 on Linux)", file=sys.stderr)
        return 2
    targets = options.targets or list(NAMES)
    if options.inside:
        fuzz(targets[0], options.seconds)
    return max(apart(target, options.seconds // len(targets)) for target in targets)


def apart(target: str, seconds: int) -> int:
    """One target in a process of its own: libFuzzer ends the one that it runs in."""
    print(f"== {target}, {seconds} s", flush=True)
    command = [sys.executable, str(Path(__file__)), target, "--inside", "--seconds", str(seconds)]
    failed = subprocess.run(command, cwd=ROOT, check=False).returncode
    if failed:
        print(f"{target} failed: the case is in {REGRESSIONS}; run it again with --replay FILE", file=sys.stderr)
    return 1 if failed else 0


def fuzz(target: str, seconds: int) -> None:
    """Does not return."""
    import atheris

    with atheris.instrument_imports(include=["ralmq.schema", "ralmq.broker"]):
        from fuzz import targets
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    known = [path.read_bytes() for path in REGRESSIONS.glob(f"{target}-*")]
    for case in targets.seeds(target) + known:
        (folder / hashlib.sha1(case).hexdigest()).write_bytes(case)
    run = targets.TARGETS[target]
    flags = [f"-max_total_time={seconds}", f"-max_len={LONGEST[target]}", f"-rss_limit_mb={MEMORY_MB}", "-timeout=20"]
    flags += [f"-artifact_prefix={REGRESSIONS}/{target}-", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *flags, str(folder)], run)
    atheris.Fuzz()


def replay(files: Sequence[Path]) -> int:
    """Runs cases; the beginning of a file's name says for which target it is."""
    from fuzz import targets

    for path in files:
        target = path.name.split("-")[0]
        if target not in NAMES:
            print(f"{path}: the name must begin with {' or '.join(NAMES)} and -", file=sys.stderr)
            return 2
        targets.TARGETS[target](path.read_bytes())
        print(f"{path.name}: passes")
    return 0


REGRESSIONS = TESTS / "fuzz" / "regressions"

if __name__ == "__main__":
    sys.exit(main())
