"""Puts one fault at a time into a copy of schema/ and of the broker's core, and shows that the tests find each.

The faults are in mutants.txt. A copy of the two packages, importable as ralmq, gets one of them; the working tree stays
as it is. Exit 1 where a fault survives, 2 where its place in the source is not found any more.

    python tests/mutants.py                                  all of them, about two minutes on one core
    python tests/mutants.py --only fence                     those with this word in their name or file
    python tests/mutants.py --ring simulation --seeds 40     what one ring of tests finds by itself
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
ROOT = TESTS.parent
COPIED = ("__init__.py", "errors.py", "py.typed", "broker", "schema")
RINGS = {"broker": ("broker", "simulation"), "schema": ("schema", "broker")}  # what is run, by the fault's folder
PATIENCE = 30  # seconds of processor time; a fault that makes a test run for ever is found as well


class Mutant(NamedTuple):
    """One fault."""

    name: str
    file: str
    old: str
    new: str


def read(text: str) -> list[Mutant]:
    """The faults of a list: `== file`, `# name`, `-` old lines, `+` new lines."""
    found: list[Mutant] = []
    file = ""
    for line in text.splitlines():
        if line.startswith("== "):
            file = line[3:]
        elif line.startswith("# "):
            found.append(Mutant(line[2:], file, "", ""))
        elif line.startswith("-") and found:
            found[-1] = found[-1]._replace(old=_joined(found[-1].old, line))
        elif line.startswith("+") and found:
            found[-1] = found[-1]._replace(new=_joined(found[-1].new, line))
    return found


def _joined(before: str, line: str) -> str:
    return f"{before}\n{line[1:]}" if before else line[1:]


def misplaced(mutants: list[Mutant], origin: Path) -> list[str]:
    """Names of the faults whose place is not found exactly once."""
    counts = {mutant: (origin / mutant.file).read_text(encoding="utf-8").count(mutant.old) for mutant in mutants}
    return [f"{mutant.name} ({mutant.file}): found {count} times" for mutant, count in counts.items() if count != 1]


def copied(package: Path) -> None:
    """Schema and broker as they are now, whatever is edited while this runs."""
    package.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, package / name)


def found_by(mutant: Mutant | None, origin: Path, rings: tuple[str, ...], seeds: int) -> str:
    """The first test that fails with the fault in place; empty where all pass."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "ralmq"
        shutil.copytree(origin, package)
        if mutant is not None:
            target = package / mutant.file
            target.write_text(target.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        command += [f"--rootdir={TESTS}", *(str(TESTS / ring) for ring in rings)]
        environment = {**os.environ, "PYTHONPATH": folder, "RALMQ_SEEDS": str(seeds)}
        run = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, preexec_fn=_bounded
        )
        if run.returncode == 0:
            return ""
        if run.returncode < 0:
            return "a test that runs for ever"
        failures = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failures[0].split("::")[-1].split(" - ")[0] if failures else f"pytest ends with {run.returncode}"


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the name or file of a fault")
    parser.add_argument("--ring", choices=("broker", "simulation", "schema"), help="run these tests alone")
    parser.add_argument("--seeds", type=int, default=8, help="of the simulation")
    options = parser.parse_args()
    mutants = read((TESTS / "mutants.txt").read_text(encoding="utf-8"))
    mutants = [mutant for mutant in mutants if options.only in f"{mutant.file} {mutant.name}"]
    with tempfile.TemporaryDirectory() as folder:
        origin = Path(folder) / "ralmq"
        copied(origin)
        lost = misplaced(mutants, origin)
        if lost or not mutants:
            print("the source has changed, mend mutants.txt:", *lost or ["no such fault"], sep="\n  ")
            return 2
        return _all(mutants, origin, options)


def _all(mutants: list[Mutant], origin: Path, options: argparse.Namespace) -> int:
    rings = {folder: (options.ring,) if options.ring else ring for folder, ring in RINGS.items()}
    for folder in {mutant.file.split("/")[0] for mutant in mutants}:
        if failed := found_by(None, origin, rings[folder], options.seeds):
            print(f"without any fault {failed} fails: mend that first")
            return 2
    started = time.monotonic()
    survivors = 0
    for mutant in mutants:
        test = found_by(mutant, origin, rings[mutant.file.split("/")[0]], options.seeds)
        survivors += not test
        print(f"{'dead' if test else 'ALIVE':6} {mutant.file:21} {mutant.name:45} {test}", flush=True)
    print(f"{len(mutants)} faults, {survivors} survive, {time.monotonic() - started:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
