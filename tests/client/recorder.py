"""Workers for processes that tests kill. Each begin and end of a request is a line in a file of the worker's folder."""

import asyncio
import os
from pathlib import Path

import ralmq
from ralmq.workers.base import Answer, Request


class Recorder(ralmq.Worker):
    """Takes as many seconds as the request says; `record` holds `begin N PID` and `end N PID`."""

    idempotent = True

    def __init__(self, *, name: str = "recorder", capacity: int = 16) -> None:
        self.service = name
        self.capacity = capacity

    async def handle(self, request: Request) -> Answer:
        self._write("begin", request.body["n"])
        await asyncio.sleep(request.body["seconds"])
        self._write("end", request.body["n"])
        return {"n": request.body["n"], "pid": os.getpid()}

    def _write(self, what: str, number: int) -> None:
        with Path("record").open("a") as record:
            record.write(f"{what} {number} {os.getpid()}\n")


class Once(Recorder):
    """The same, for requests that must not be repeated."""

    idempotent = False
