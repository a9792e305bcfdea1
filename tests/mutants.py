"""Puts one fault at a time into a copy of schema/ and of broker/, and shows that the tests find each.

The faults are in mutants.txt. A copy of the package, importable as ralmq, gets one of them; the working tree stays as
it is. The test that found a fault last time is asked first. Exit 1 where a fault survives that is not listed as one
that changes nothing, 2 where its place in the source is not found any more.

    python tests/mutants.py --jobs 2                         all of them, a few minutes
    python tests/mutants.py --only fence                     those with this word in their name or file
    python tests/mutants.py --ring simulation --seeds 40     what one ring of tests finds by itself
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FOUND = ROOT / ".cache" / "mutants.json"  # the test that found each fault last time, by file and name
FOLDERS = ("broker", "fuzz", "schema", "security", "simulation")  # of tests
SOURCES = "test_schema_safety.py"  # reads the working tree
CHANGED = ("broker", "schema")
SIMULATION = "simulation/test_simulation.py::test_no_request_is_lost_doubled_crossed_or_endless"
RINGS = {"broker": ("broker", SIMULATION), "schema": ("schema", "broker")}  # what is run, by the fault's folder
ALONE = {
    "broker": ("broker",),
    "schema": ("schema",),
    "simulation": (SIMULATION,),
    "fuzz": ("fuzz/test_core_machine.py", "fuzz/test_decode.py"),
}
SHELL = {  # what has sockets, or what nothing else depends on, is seen by tests of its own
    "broker/place.py": ("broker/test_broker_place.py",),
    "broker/sharing.py": ("broker/test_broker_place.py",),
    "broker/flights.py": ("broker/test_broker_flights.py",),
    "broker/server.py": ("broker/test_broker_backlog.py",),
    "broker/guard.py": ("security/test_security_keys.py",),
    "broker/watch.py": (
        "broker/test_broker_backlog.py::test_who_is_ahead_is_known_by_what_was_taken",
        "broker/test_broker_backlog.py::test_what_travelled_is_counted_to_the_byte",
        "security/test_security_endless.py::test_a_suspect_has_as_much_as_a_message_may_have",
        "security/test_security_endless.py::test_what_is_no_tcp_connection_has_received_nothing",
        "security/test_security_endless.py::test_without_keys_it_is_cut_after_the_first_bytes",
    ),
}
PATIENCE = 40  # seconds of processor time; a fault that makes a test run for ever is found as well


class Mutant(NamedTuple):
    """One fault; `same` says why it changes nothing that could be seen, where that is so."""

    name: str
    file: str
    old: str
    new: str
    same: str = ""

    @property
    def title(self) -> str:
        return f"{self.file}: {self.name}"


def read(text: str) -> list[Mutant]:
    """The faults of a list: `== file`, `# name`, `-` old lines, `+` new lines, `= why` for one that changes nothing."""
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
        elif line.startswith("= ") and found:
            found[-1] = found[-1]._replace(same=line[2:])
    return found


def _joined(before: str, line: str) -> str:
    return f"{before}\n{line[1:]}" if before else line[1:]


def misplaced(mutants: list[Mutant], origin: Path) -> list[str]:
    """Names of the faults whose place is not found exactly once."""
    counts = {mutant: (origin / mutant.file).read_text(encoding="utf-8").count(mutant.old) for mutant in mutants}
    return [f"{mutant.name} ({mutant.file}): found {count} times" for mutant, count in counts.items() if count != 1]


def copied(package: Path, tests: Path) -> None:
    """The package and its tests as they are now, whatever is edited while this runs."""
    tests.mkdir()
    for path in TESTS.iterdir():
        if path.name in FOLDERS:
            shutil.copytree(path, tests / path.name, ignore=shutil.ignore_patterns("__pycache__", SOURCES))
        elif path.suffix == ".py":
            shutil.copy(path, tests / path.name)
    package.mkdir()
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name == "py.typed":
            shutil.copy(path, package / path.name)
        elif (path / "__init__.py").is_file():
            shutil.copytree(path, package / path.name, ignore=shutil.ignore_patterns("__pycache__"))


def with_fault(mutant: Mutant | None, origin: Path, package: Path) -> None:
    """The package with one fault in it; what has none is shared with the others."""
    package.mkdir()
    for path in origin.iterdir():
        if path.name in CHANGED:
            shutil.copytree(path, package / path.name)
        else:
            (package / path.name).symlink_to(path)
    if mutant is not None:
        target = package / mutant.file
        target.write_text(target.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")


def found_by(mutant: Mutant | None, origin: Path, rings: Iterable[str], seeds: int, first: str = "") -> str:
    """The first test that fails with the fault in place; empty where all pass. `first` is tried before all others."""
    with tempfile.TemporaryDirectory() as folder:
        with_fault(mutant, origin, Path(folder) / "ralmq")
        tests = origin.parent / "tests"
        for asked in ([first] if first else [], list(rings)):
            if asked and (found := _failing(asked, tests, folder, seeds)):
                return found
    return ""


def _failing(asked: list[str], tests: Path, folder: str, seeds: int) -> str:
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += [f"--rootdir={tests}", f"--basetemp={folder}/temp", *(str(tests / name) for name in asked)]
    environment = {**os.environ, "PYTHONPATH": folder, "RALMQ_SEEDS": str(seeds), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, preexec_fn=_bounded
    )
    if run.returncode == 0 or (run.returncode == 4 and "not found" in run.stderr):  # a test that is no more
        return ""
    if run.returncode < 0:
        return "a test that runs for ever"
    failures = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not failures:
        return f"pytest ends with {run.returncode}"
    file, *names = failures[0].split(" ", 1)[1].split(" - ")[0].split("::")
    return "::".join([os.path.relpath(os.path.join(folder, file), tests), *names])


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the name or file of a fault")
    parser.add_argument("--ring", choices=ALONE, help="run these tests alone")
    parser.add_argument("--seeds", type=int, default=8, help="of the simulation")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at a time")
    options = parser.parse_args()
    mutants = read((TESTS / "mutants.txt").read_text(encoding="utf-8"))
    mutants = [mutant for mutant in mutants if options.only in mutant.title]
    with tempfile.TemporaryDirectory() as folder:
        origin = Path(folder) / "ralmq"
        copied(origin, origin.parent / "tests")
        lost = misplaced(mutants, origin)
        if lost or not mutants:
            print("the source has changed, mend mutants.txt:", *lost or ["no such fault"], sep="\n  ")
            return 2
        return _all(mutants, origin, options)


def _all(mutants: list[Mutant], origin: Path, options: argparse.Namespace) -> int:
    def rings(mutant: Mutant) -> tuple[str, ...]:
        if options.ring:
            return ALONE[options.ring]
        return SHELL.get(mutant.file, RINGS[mutant.file.split("/")[0]])

    for ring in sorted({rings(mutant) for mutant in mutants}):
        failed = found_by(None, origin, ring, options.seeds)
        if failed and found_by(None, origin, ring, options.seeds, failed):  # not by chance
            print(f"without any fault {failed} fails: mend that first")
            return 2
    known: dict[str, str] = json.loads(FOUND.read_text()) if FOUND.is_file() and not options.ring else {}

    def tried(mutant: Mutant) -> str:
        return found_by(mutant, origin, rings(mutant), options.seeds, known.get(mutant.title, ""))

    started = time.monotonic()
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, test in zip(mutants, pool.map(tried, mutants), strict=True):
            known.update({mutant.title: test} if "::" in test else {})
            survivors += bool(mutant.same) == bool(test)
            what = ("dead" if test else "ALIVE") if not mutant.same else ("DEAD" if test else "same")
            print(f"{what:6} {mutant.file:21} {mutant.name:45} {test.split('::')[-1] or mutant.same}", flush=True)
            if not options.ring:
                FOUND.parent.mkdir(exist_ok=True)
                FOUND.write_text(json.dumps(known, indent=1))
    same = sum(bool(mutant.same) for mutant in mutants)
    seconds = time.monotonic() - started
    print(
        f"{len(mutants)} faults, {same} of them listed as changing nothing; {survivors} not as listed, {seconds:.0f} s"
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
