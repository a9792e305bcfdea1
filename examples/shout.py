"""A worker in ten lines: `ralmq worker shout:Shout -o mark='!!!'` in this folder, then ask the service "shout"."""

import ralmq


class Shout(ralmq.Worker):
    service = "shout"
    idempotent = True  # another worker may do it over: it does, when this one dies

    def __init__(self, *, mark: str = "!") -> None:  # options of `ralmq worker`, checked and converted
        self.mark = mark

    async def handle(self, request: ralmq.Request) -> dict[str, str]:  # or an async generator: each yield is a part
        return {"text": request.body["text"].upper() + self.mark}
