"""How a measurement talks with a system that runs as a process: a line of JSON each way. Knows no model.

In: {"prompts": [[ids]], "tokens": n, "together": bool}. Out: {"seconds": s, "tokens": [[ids]], "came": [[seconds]]},
the last being when each token of each sequence was there. The process ends with its stdin.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Took = Callable[[int, int], None]  # of which sequence, which token
Generate = Callable[[list[list[int]], int, bool, Took], None]


def serve(generate: Generate) -> None:
    """Answers until stdin ends; the first line out says that it is ready."""
    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens: list[list[int]] = [[] for _ in asked["prompts"]]
        came: list[list[float]] = [[] for _ in asked["prompts"]]
        begun = time.perf_counter()

        def took(
            sequence: int,
            token: int,
            tokens: list[list[int]] = tokens,
            came: list[list[float]] = came,
            begun: float = begun,
        ) -> None:
            tokens[sequence].append(token)
            came[sequence].append(time.perf_counter() - begun)

        generate(asked["prompts"], asked["tokens"], asked.get("together", True), took)
        print(json.dumps({"seconds": time.perf_counter() - begun, "tokens": tokens, "came": came}), flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def beside(*commands: Sequence[str]) -> AbstractContextManager[Any]:
    """This script's other processes; each ends with its stdin, which it holds, however this process ends."""

    @contextmanager
    def running() -> Any:
        line = [sys.executable, sys.argv[0]]
        children = [
            subprocess.Popen([*line, *command], stdin=subprocess.PIPE, stdout=sys.stderr, env=os.environ)
            for command in commands
        ]
        try:
            yield
        finally:
            for child in children:
                child.kill()
                child.wait()

    return running()


def end_with_stdin() -> None:
    """To be run in a thread of such a process."""
    sys.stdin.read()
    os._exit(0)
