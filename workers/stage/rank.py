"""A further rank of a stage as a process: `python -m ralmq.workers.stage.rank`, started by ranks.py and by nobody else.

It reads its job and what to do next from its standard input, whose end is its own end, and answers on its standard
output, a line of JSON each.
"""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

import torch

from ..engine.errors import RankLost
from ..engine.parallel import Group
from ..engine.ranked import RankSpan
from .ranks import FAILED, Job, device_of, store_at


def main() -> int:
    """Loads its part, says so, joins the others when it is told to, and computes what rank 0 says."""
    # Its stage ends it, after what is in hand: a signal that goes to both must not be faster.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # What libraries print, NCCL for one, goes where errors go: the stage reads nothing but what is said to it.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job: Job = json.loads(sys.stdin.readline())
    told = threading.Event()
    threading.Thread(target=_watch, args=(told, Path(job["store"]).parent), name="parent", daemon=True).start()
    torch.set_num_threads(job["threads"])
    device = device_of(job["device"], job["rank"])
    try:
        shard = (job["rank"], job["size"])
        span = RankSpan.load(job["path"], job["first"], job["last"], device=device, shard=shard, **job["options"])
    except Exception as error:
        _say(said, {"error": str(error).splitlines()[0] if str(error) else type(error).__name__})
        return FAILED
    _say(said, {"loaded": span.bytes})
    told.wait()
    try:
        group = Group(*shard, store_at(job["store"], job["size"]), torch.device(device))
        span.join(group)
        _say(said, {"joined": os.getpid()})
        span.serve()
    except RankLost as error:
        print(f"rank {job['rank']}: {error}", file=sys.stderr, flush=True)
        return FAILED
    return 0


def _watch(told: threading.Event, folder: Path) -> None:
    """Ends this process when its stage is gone, whatever the other thread is doing, and leaves nothing of them both."""
    for line in sys.stdin:
        if line.strip() == "join":
            told.set()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(FAILED)


def _say(said: TextIO, what: dict[str, Any]) -> None:
    try:
        print(json.dumps(what), file=said, flush=True)
    except BrokenPipeError:  # its stage has failed before, and says why itself
        os._exit(FAILED)


if __name__ == "__main__":
    sys.exit(main())
