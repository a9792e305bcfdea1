"""How the members of a group find each other: whoever comes first offers `group:NAME`, the others ask it.

All are told at once: the ranks, and where each takes messages. A member that dies before is forgotten, and the meeting
is then out of the way, so that the next group of that name can meet. Knows the client and a worker, no array.
"""

import asyncio
import os
import random
from dataclasses import dataclass
from typing import Any, Final

import zmq

from ...client.client import Client, connect
from ...schema.errors import Busy, DeadlineExceeded, NoService, Refused, RequestCancelled, WorkerFailed, WorkerLost
from ...schema.message import Direct
from ..base import Answer, Request, Worker
from ..host import Host
from .errors import RankMissing, named

PREFIX: Final = "group:"
LATE: Final = 2.0  # seconds that the answer of a meeting that nobody else comes to may take
LATER: Final = 0.5  # seconds that whoever holds the meeting, who came first, has to give it up for all
PAUSE: Final = 0.05  # seconds
REFUSALS: Final = 20  # of an offer while nobody else makes it: the reason is another one
LEAVING: Final = 5.0  # seconds that the end of a meeting may take
AGAIN: Final = (Busy, WorkerLost, RequestCancelled, WorkerFailed)


@dataclass(frozen=True, slots=True)
class Member:
    """One that has come: the rank that it wants, where it takes messages, and what must be equal for all."""

    rank: int | None
    direct: Direct
    terms: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """What a member is told.

    Attributes:
        rank: its own.
        token: 16 bytes that no other meeting has.
        members: where each takes messages, and its facts, by rank.
    """

    rank: int
    token: bytes
    members: list[tuple[Direct, dict[str, Any]]]


class Meeting(Worker):
    """The worker of whoever comes first.

    Args:
        name: of the group.
        own: the one that it belongs to.
    """

    def __init__(self, name: str, own: Member) -> None:
        self.service = PREFIX + name
        self.identity = os.urandom(8).hex()  # the broker takes no second one of this name beside it
        self.size: int = own.terms["world_size"]
        self.capacity = 2 * self.size + 16
        self._name = name
        self._own = own
        self._came: list[Member] = [own]
        self._ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._token = os.urandom(16)
        self._look()

    async def wait(self, within: float) -> Table:
        """The table, once all have come.

        Raises:
            RankMissing: not all of them in time.
        """
        try:
            await asyncio.wait_for(asyncio.shield(self._ended), within)
        except TimeoutError:
            if not self._ended.done():
                self._ended.set_result(False)
        if not self._ended.result():
            raise missing_error(self._name, self._missing(), self.size, within)
        return table_of(self._answer(self._own))

    async def handle(self, request: Request) -> Answer:
        """One who has come; answered when all have, or when its time is up."""
        member, within = _member(request.body)
        if self._ended.done():
            return {"again": True}  # of the next group of this name, perhaps
        self._check(member)
        self._came.append(member)
        try:
            self._look()
            async with asyncio.timeout(within):
                await asyncio.shield(self._ended)
        except TimeoutError:
            if not self._ended.done():
                return {"missing": self._missing()}
        finally:
            if not self._ended.done():
                self._came.remove(member)
        return self._answer(member) if self._ended.result() else {"missing": self._missing()}

    # -- inside

    def _check(self, member: Member) -> None:
        for term, value in self._own.terms.items():
            if member.terms.get(term) != value:
                raise Refused(
                    f"group {self._name}: {term} is {value!r} for those who are here, {member.terms.get(term)!r} for "
                    "this one: give all of them the same"
                )
        if member.rank is not None and not 0 <= member.rank < self.size:
            raise Refused(f"group {self._name}: there is no rank {member.rank} among {self.size}: they count from 0")
        if member.rank is not None and member.rank in [other.rank for other in self._came]:
            raise Refused(f"group {self._name}: rank {member.rank} has come already: give each its own, or none")

    def _look(self) -> None:
        if len(self._came) == self.size and not self._ended.done():
            self._ended.set_result(True)

    def _ranks(self) -> dict[int, Member]:
        """Those who want a rank have it; the others have those left, in the order in which they came."""
        ranks = {member.rank: member for member in self._came if member.rank is not None}
        free = iter([rank for rank in range(self.size) if rank not in ranks])
        return ranks | {next(free): member for member in self._came if member.rank is None}

    def _missing(self) -> list[int]:
        return sorted(set(range(self.size)) - self._ranks().keys())

    def _answer(self, member: Member) -> dict[str, Any]:
        ranks = self._ranks()
        own = next(rank for rank, other in ranks.items() if other is member)
        table = [[list(ranks[rank].direct), ranks[rank].facts] for rank in range(self.size)]
        return {"rank": own, "token": self._token, "members": table}


async def meet(
    url: str,
    name: str,
    member: Member,
    within: float,
    *,
    context: zmq.Context[Any] | None = None,
    keys: str | os.PathLike[str] | None = None,
) -> Table:
    """Where all members are, once all have come.

    Raises:
        RankMissing: not all of them within so many seconds.
        Refused: this one does not belong to those who are here, or its key may not offer `group:NAME`.
        NoBroker: nobody answers at the url.
    """
    end = asyncio.get_running_loop().time() + within
    refusals = 0
    async with connect(url, wait=within, name="member", context=context, keys=keys) as client:
        while (left := end - asyncio.get_running_loop().time()) > 0:
            try:
                if (table := await _asked(client, name, member, left, within)) is not None:
                    return table
            except NoService:
                try:
                    return await _held(url, name, member, left, within, context, keys)
                except Refused:
                    refusals += 1
                    if refusals == REFUSALS:
                        raise
            except AGAIN:
                pass
            await asyncio.sleep(PAUSE * random.uniform(0.5, 1.5))
    raise RankMissing(f"group {name}: its members did not meet within {within:g} s: see which of them run")


async def _asked(client: Client, name: str, member: Member, left: float, within: float) -> Table | None:
    """The table of the meeting that there is; None where it has just ended."""
    told = {"rank": member.rank, "direct": list(member.direct), "terms": member.terms, "facts": member.facts}
    try:
        reply = await client.request(PREFIX + name, {**told, "within": left + LATER}, deadline=left + LATE)
    except DeadlineExceeded:
        raise RankMissing(f"group {name}: its meeting did not answer within {within:g} s: see which run") from None
    if "missing" in reply.body:
        raise missing_error(name, reply.body["missing"], member.terms["world_size"], within)
    return None if "again" in reply.body else table_of(reply.body)


async def _held(
    url: str,
    name: str,
    member: Member,
    left: float,
    within: float,
    context: zmq.Context[Any] | None,
    keys: str | os.PathLike[str] | None,
) -> Table:
    """The table of an own meeting. Raises Refused where another one is held."""
    meeting = Meeting(name, member)
    host = Host(meeting, url, name="group", context=context, keys=keys)
    await host.open(left)
    try:
        return await meeting.wait(left)
    except RankMissing as error:
        raise missing_error(name, error.ranks, meeting.size, within) from None
    except BaseException:
        await host.close()  # those who have come look for another meeting
        raise
    finally:
        await host.drain(LEAVING)  # once all of them have their answers


def missing_error(name: str, ranks: Any, size: int, within: float) -> RankMissing:
    return RankMissing(
        f"group {name}: {named(ranks)} of {size} did not come within {within:g} s: "
        "start them, or give the others more time with wait=",
        ranks,
    )


def table_of(body: dict[str, Any]) -> Table:
    """Raises WorkerFailed for what is no answer of a meeting."""
    try:
        members = [(Direct(*map(str, direct)), dict(facts)) for direct, facts in body["members"]]
        return Table(int(body["rank"]), bytes(body["token"]), members)
    except (KeyError, TypeError, ValueError):
        raise WorkerFailed("what answers for the group is no meeting: give the group another name") from None


def _member(body: dict[str, Any]) -> tuple[Member, float]:
    try:
        rank = None if body["rank"] is None else int(body["rank"])
        direct = Direct(*map(str, body["direct"]))
        return Member(rank, direct, dict(body["terms"]), dict(body["facts"])), float(body["within"])
    except (KeyError, TypeError, ValueError):
        raise Refused("this is the meeting of a group: join it with ralmq.group(name, world_size)") from None
