"""Wrong, missing and revoked keys: what tests/security counts, and an open address refused."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from checks import Line, counted

SECURITY = Path(__file__).parents[1] / "security"
KEYS = "a wrong, missing or revoked key: nothing delivered, and counted; roles and owners"
TESTS = {
    KEYS: ["test_security_keys.py"],
    "start on 0.0.0.0 without keys: exit code 2": ["test_security_files.py", "-k", "others_reach_needs_keys"],
    "no message, index file or checkpoint runs code": ["test_security_canary.py"],
}


async def counts(folder: Path, arguments: list[str]) -> dict[str, int]:
    """What pytest counts: passed, failed ..."""
    line = [str(SECURITY / arguments[0]), *arguments[1:], "-q", "--basetemp", str(folder / "pytest")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pytest", *line, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    found = re.findall(r"(\d+) (passed|failed|error)", said.decode().splitlines()[-1])
    return {what: int(number) for number, what in found}


@counted
async def keys_and_canary(folder: Path) -> AsyncIterator[Line]:
    for what, arguments in TESTS.items():
        found = await counts(folder, arguments)
        shown = ", ".join(f"{number} {name}" for name, number in found.items())
        yield Line(what, "every test of it passes", shown or "none ran", set(found) == {"passed"})
