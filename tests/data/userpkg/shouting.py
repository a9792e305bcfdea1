"""Two workers as a user writes them, in a package of their own."""

import ralmq


class Shout(ralmq.Worker):
    service = "shout"

    def __init__(self, *, marks: int = 1) -> None:
        self.end = "!" * marks

    async def handle(self, request):
        return {"text": request.body["text"].upper() + self.end}


class Spell(ralmq.Worker):
    service = "spell"

    async def handle(self, request):
        for letter in request.body["text"]:
            yield {"letter": letter}
