"""A whole run from a seed: who takes part, which faults happen when, and what must hold in the end."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ralmq.broker.core import Core
from ralmq.schema.message import Final, Partial
from simulation.invariants import holds, quiescent
from simulation.nodes import Client, Link, Worker
from simulation.stages import Stage
from simulation.world import SMALL, World

FAULTS = ("kill", "stop", "cut", "delay", "hang", "drain", "refuse", "broker", "leave", "forge")
FAULTS += ("poison", "drop", "full")
CHAOS = 4.0  # seconds in which requests are made and faults happen
PATIENCE = 30.0  # seconds after which what has not ended never will
SPANS = {
    1: [[(0, 4)], [(0, 4)]],
    2: [[(0, 2), (2, 4)], [(0, 2), (2, 4)]],
    3: [[(0, 1), (1, 3), (3, 4)], [(0, 1), (1, 4)]],
}


@dataclass
class Result:
    """What a run did."""

    steps: int = 0
    ended: dict[str, int] = field(default_factory=dict)  # how requests ended, as the broker said it
    counts: dict[str, int] = field(default_factory=dict)  # the brokers' own counters, and messages by kind


class Scenario:
    """Clients, workers and stages under faults; `run` raises where the broker does wrong."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.world = World(seed, duplicate=[0.0, 0.0, 0.02, 0.2][seed % 4], trace=trace)
        rng = self.rng = self.world.rng
        self.faults = [fault for fault in FAULTS if rng.random() < 0.5] if seed % 10 else []
        if seed % 10 == 5:
            self.faults = ["poison"]  # alone: nobody else may be given up
        self.poison = 0.02 if "poison" in self.faults else 0.0
        self.guilty_only = self.faults == ["poison"]
        self.world.doom = self._replace  # type: ignore[assignment]
        self.pause = rng.choice([0.05, 0.2, 0.6])  # seconds between two faults, on average
        self.count = 0
        self.result = Result()
        self.again = rng.random() < 0.5  # whether stages let their requests be repeated
        self.clients = [self._client() for _ in range(rng.randint(1, 4))]
        self.workers: list[Worker] = []
        self.stages: list[Stage] = []
        self.plan: dict[Link, Callable[[], Link]] = {}
        for service, idempotent in (("echo", True), ("once", False), ("nested", rng.random() < 0.5)):
            for _ in range(rng.choice([1, 2, 2, 3])):
                self._worker(service, rng.choice([1, 2, 5]), idempotent)
        layout = rng.choice([1, 2, 2, 3])
        for copy in SPANS[layout][: rng.randint(1, 2)]:
            for span in copy:
                self._stage(span)
        self.servers = len(self.plan)

    def run(self) -> Result:
        """The whole run.

        Raises:
            Broken: the broker lost, doubled, crossed, delayed or kept something.
        """
        world = self.world
        if self.faults:
            world.after(self.rng.uniform(0.0, 2 * self.pause), self._fault)
        world.run(world.now + CHAOS)
        self.faults = []
        for client in self.clients:
            client.active = False
        for node in [*self.workers, *self.stages]:
            node.hangs = False
        end = world.now + PATIENCE
        while world.now < end and not self._idle():
            world.run(world.now + 0.5)
        for client in self.clients:
            for ask in client.asked.values():
                holds(bool(ask.ended), f"{client.name}: {ask.service} {ask.id.hex()[:6]} never ended")
                if self.guilty_only:
                    right = ask.poison if ask.ended == "poisoned" else not (ask.poison and ask.ended == "final")
                    holds(right, f"{client.name}: {ask.service} {ask.id.hex()[:6]} ended {ask.ended}")
        world.run(world.now + 2 * SMALL.grace)
        quiescent(world.core)
        for worker in self.workers:
            holds(not worker.jobs, f"{worker.name} still has {len(worker.jobs)} requests in hand")
        for stage in self.stages:
            left = len(stage.sequences), len(stage.rows), len(stage.parked)
            holds(left == (0, 0, 0), f"{stage.name} still has sequences, rows, parked rows: {left}")
        self._collect(world.core)
        self.result.steps = world.steps
        self.result.ended = world.oracle.tally
        for name, count in world.counts.items():
            self.result.counts[name] = count
        return self.result

    # -- who takes part

    def _client(self) -> Client:
        self.count += 1
        return Client(self.world, f"client-{self.count}", self.rng.choice([0.1, 0.2, 0.5]), self.poison)

    def _worker(self, service: str, capacity: int, idempotent: bool) -> Worker:
        self.count += 1
        name, pace = f"{service}-{self.count}", self.rng.choice([0.002, 0.02, 0.2])
        worker = Worker(self.world, name, service, capacity, idempotent, pace)
        self.workers.append(worker)
        self.plan[worker] = lambda: self._worker(service, capacity, idempotent)
        return worker

    def _stage(self, span: tuple[int, int]) -> Stage:
        self.count += 1
        stage = Stage(self.world, f"stage-{self.count}", span, 4, self.again)
        self.stages.append(stage)
        self.plan[stage] = lambda: self._stage(span)
        return stage

    # -- what happens to them

    def _fault(self) -> None:
        if not self.faults:
            return
        rng, world = self.rng, self.world
        world.after(rng.expovariate(1 / self.pause), self._fault)
        fault = rng.choice(self.faults)
        servers = [node for node in [*self.workers, *self.stages] if not node.left]
        node = rng.choice([*servers, *servers, *self.clients])
        if fault == "kill" and not isinstance(node, Client):
            self._replace(node)
        elif fault == "stop":
            world.stop(node, rng.choice([0.1, 1.0, 4.0]))
        elif fault == "cut":
            world.cut(node)
        elif fault == "delay":
            world.slow(node, rng.choice([0.05, 0.5, 2.0]))
        elif fault == "refuse":
            world.refuse(node)
        elif fault == "broker" and rng.random() < 0.2:
            self._collect(world.core)
            world.restart_broker()
        elif fault == "hang" and not isinstance(node, Client):
            node.hangs = True
            world.log(f"hang {node.name}")
        elif fault == "drain" and not isinstance(node, Client):
            world.log(f"drain {node.name}")
            node.drain()
            world.later(node, 3.0, lambda: self._replace(node))
        elif fault == "drop" and isinstance(node, Worker):
            world.log(f"drop at {node.name}")
            node.drop()
        elif fault == "full":
            world.log("memory is full")
            world.core.measured(2000)
            world.after(rng.choice([0.1, 1.0]), lambda: world.core.measured(0))
        elif fault == "forge" and servers:
            self._forge(rng.choice(servers))
        elif fault in ("leave", "kill") and isinstance(node, Client) and len(self.clients) > 1:
            self.clients.remove(node)
            if fault == "leave":
                node.leave()
            world.after(0.2, lambda: world.kill(node))

    def _forge(self, stranger: Worker | Stage) -> None:
        """An answer that must not count: from a peer that does not serve, under another leg, or of another epoch."""
        rng, oracle = self.rng, self.world.oracle
        running = [(leg, key) for leg, key in oracle.legs.items() if leg in oracle.held.get(key, {})]
        if not running:
            return
        (identity, leg), key = rng.choice(running)
        server = self.world.holder(key)
        message = rng.choice([Partial({"mark": -1, "place": 0}), Final({"mark": -1, "parts": 0})])
        way = rng.choice(["peer", "leg", "leg", "epoch"])
        node = stranger if way == "peer" else server
        if not isinstance(node, Worker | Stage) or (way == "peer" and oracle.together(self.world.key(node), key)):
            return
        self.world.log(f"forge {way} at {node.name}")
        if way == "leg":
            node.send(message, identity, leg - 1 if leg else 1000)
        elif way == "peer":
            node.send(message, identity, leg)
        else:
            node.epoch -= 1
            node.send(message, identity, leg)
            node.epoch += 1

    def _replace(self, node: Worker | Stage) -> None:
        """The process ends, another is started a little later."""
        if node not in self.world.ports:
            return
        self.world.kill(node)
        if isinstance(node, Worker):
            self.workers.remove(node)
        else:
            self.stages.remove(node)
        self.world.after(self.rng.uniform(0.05, 2.0), self.plan.pop(node))

    # -- what is seen

    def _idle(self) -> bool:
        """Nothing is under way, for clients and broker, and whoever was stopped or replaced is back."""
        asked = all(ask.ended for client in self.clients for ask in client.asked.values())
        nodes = all(node.known and not node.left and not port.stopped for node, port in self.world.ports.items())
        loads = any(peer.load for peer in self.world.core.roster.peers.values())
        return asked and nodes and not loads and len(self.plan) == self.servers

    def _collect(self, core: Core) -> None:
        for name, count in core.requests.counts.items():
            self.result.counts[name] = self.result.counts.get(name, 0) + count


def simulate(seed: int, trace: Callable[[str], None] | None = None) -> Result:
    """One run; the same seed gives the same run.

    Raises:
        Broken: what the broker did wrong, and how to run it again.
    """
    try:
        return Scenario(seed, trace).run()
    except Exception as error:
        error.add_note(f"replay: python tests/simulation/run.py --seed {seed} --trace")
        raise
