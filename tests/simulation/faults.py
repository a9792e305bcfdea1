"""What goes wrong in a run, when, and to whom. Knows peers by their role, not what they do."""

import random
from collections.abc import Callable
from typing import Any

from ralmq.schema.message import Final, Partial
from simulation.nodes import Client, Link, Worker
from simulation.process import Process, Server
from simulation.reader import Reader
from simulation.world import World

FAULTS: tuple[str, ...] = ("kill", "death", "stop", "cut", "hold", "delay", "double", "hang", "drain", "refuse")
FAULTS += ("broker", "leave", "forge", "poison", "drop", "full", "broken")
Peer = Link | Process


class Cast:
    """Who takes part, and how each is started again.

    Attributes:
        plan: of each server that runs, what starts another like it.
        expected: servers that there are once all have been started again.
        leaving: servers that were told to drain, and are to be replaced.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.clients: list[Client | Reader] = []
        self.plan: dict[Worker | Server, tuple[str, Callable[[], None]]] = {}
        self.expected = 0
        self.leaving = 0

    def serve(self, role: str, start: Callable[[], Worker | Server]) -> None:
        """Starts a server; `role` names those that stand in for each other."""
        self.plan[start()] = (role, lambda: self.serve(role, start))

    @property
    def servers(self) -> list[Worker | Server]:
        return [server for server in self.plan if not server.left]

    def replace(self, node: Any) -> None:
        """The process ends, another is started a little later."""
        if node in self.plan:
            _, again = self.plan.pop(node)
            self._gone(node)
            self.world.after(self.rng.uniform(0.05, 2.0), again)

    def bury(self, node: Worker | Server) -> bool:
        """The process ends for good, where another is left that stands in for it."""
        role = self.plan[node][0]
        alive = [other for other, (name, _) in self.plan.items() if name == role and not other.left]
        if len(alive) < 2:
            return False
        del self.plan[node]
        self._gone(node)
        self.expected -= 1
        return True

    def _gone(self, node: Worker | Server) -> None:
        if node in self.world.ports:
            self.world.kill(node)


class Faults:
    """Faults at random times.

    Args:
        kinds: those of FAULTS that may happen.
        pause: seconds between two of them, on average.
    """

    def __init__(self, cast: Cast, kinds: list[str], pause: float) -> None:
        self.cast = cast
        self.world = cast.world
        self.rng = cast.rng
        self.kinds = kinds
        self.pause = pause
        self.happened: dict[str, int] = {}
        self._ways: dict[str, Callable[[Any], bool | None]] = {
            "kill": self._kill,
            "death": lambda node: isinstance(node, Worker | Server) and cast.bury(node),
            "stop": lambda node: self.world.stop(node, self.rng.choice([0.1, 1.0, 4.0])),
            "cut": self.world.cut,
            "hold": lambda node: self.world.hold(node, self.rng.choice([0.3, 1.0])),
            "delay": lambda node: self.world.slow(node, self.rng.choice([0.05, 0.5, 2.0])),
            "double": lambda node: self.world.double(node, 0.5),
            "hang": self._hang,
            "drain": self._drain,
            "refuse": self.world.refuse,
            "broker": self._broker,
            "leave": self._leave,
            "forge": self._forge,
            "drop": self._drop,
            "full": self._full,
            "broken": self._broken,
        }

    def begin(self) -> None:
        if self.kinds:
            self.world.after(self.rng.uniform(0.0, 2 * self.pause), self._next)

    def end(self) -> None:
        """No more of them, and those that last end."""
        self.kinds = []
        for server in self.cast.plan:
            server.hangs = False
            server.broken = ""

    def _next(self) -> None:
        if not self.kinds:
            return
        rng, world = self.rng, self.world
        world.after(rng.expovariate(1 / self.pause), self._next)
        fault = rng.choice(self.kinds)
        servers = self.cast.servers
        node = rng.choice([*servers, *servers, *self.cast.clients])
        if fault in self._ways and node in world.ports and self._ways[fault](node) is not False:
            self.happened[fault] = self.happened.get(fault, 0) + 1
            if fault not in ("delay", "full", "hang", "broken", "double"):
                world.look()

    # -- one method a kind; False: it does not suit this peer

    def _kill(self, node: Peer) -> bool | None:
        if isinstance(node, Worker | Server):
            self.cast.replace(node)
            return None
        return self._go(node, 0.0)

    def _leave(self, node: Peer) -> bool | None:
        if not isinstance(node, Client | Reader):
            return False
        return self._go(node, 0.2)

    def _go(self, node: Any, after: float) -> bool | None:
        """A client goes for good; the last one of its sort stays."""
        if sum(type(client) is type(node) for client in self.cast.clients) < 2:
            return False
        self.cast.clients.remove(node)
        if after:
            node.leave()
        else:
            node.active = False
        self.world.after(after, lambda: self.world.kill(node) if node in self.world.ports else None)
        return None

    def _hang(self, node: Peer) -> bool | None:
        if not isinstance(node, Worker | Server):
            return False
        node.hangs = True
        self.world.log(f"hang {node.name}")
        return None

    def _broken(self, node: Peer) -> bool | None:
        """It gives parts twice, not at all, or in the name of others for a while."""
        if not isinstance(node, Worker | Server):
            return False
        node.broken = self.rng.choice(["doubled", "missing", "foreign"])
        self.world.log(f"{node.name} gives {node.broken} parts")
        self.world.after(self.rng.choice([0.2, 1.0]), lambda: setattr(node, "broken", ""))
        return None

    def _drain(self, node: Peer) -> bool | None:
        if not isinstance(node, Worker | Server):
            return False
        self.world.log(f"drain {node.name}")
        node.drain()
        self.cast.leaving += 1
        self.world.after(3.0, lambda: self._drained(node))
        return None

    def _drained(self, node: Worker | Server) -> None:
        """It has gone, or its BYE was lost with a broker: another takes its place."""
        self.cast.leaving -= 1
        self.cast.replace(node)

    def _broker(self, node: Peer) -> bool | None:
        if self.rng.random() >= 0.3:
            return False
        self.world.restart_broker()
        return None

    def _drop(self, node: Peer) -> bool | None:
        if not isinstance(node, Worker):
            return False
        self.world.log(f"drop at {node.name}")
        node.drop()
        return None

    def _full(self, node: Peer) -> None:
        self.world.log("memory is full")
        self.world.core.measured(2000)
        self.world.after(self.rng.choice([0.1, 1.0]), lambda: self.world.core.measured(0))

    def _forge(self, stranger: Peer) -> bool | None:
        """An answer that must not count: from a peer that does not serve, under another leg, or of another epoch."""
        rng, oracle = self.rng, self.world.oracle
        running = [(leg, key) for leg, key in oracle.legs.items() if leg in oracle.held.get(key, {})]
        if not running:
            return False
        (identity, leg), key = rng.choice(running)
        message = rng.choice([Partial({"mark": -1, "place": 0}), Final({"mark": -1, "parts": 0})])
        way = rng.choice(["peer", "leg", "leg", "epoch"])
        node = stranger if way == "peer" else self.world.holder(key)
        if not isinstance(node, Worker | Server) or (way == "peer" and oracle.together(self.world.key(node), key)):
            return False
        self.world.log(f"forge {way} at {node.name}")
        if way == "leg":
            node.send(message, identity, leg - 1 if leg else 1000)
        elif way == "peer":
            node.send(message, identity, leg)
        else:
            node.epoch -= 1
            node.send(message, identity, leg)
            node.epoch += 1
        return None
