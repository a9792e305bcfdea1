"""A whole run from a seed: who takes part, and what must hold in the end."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

from ralmq.broker.core import Core
from simulation.faults import FAULTS, Cast, Faults
from simulation.invariants import holds, quiescent
from simulation.network import SMALL
from simulation.nodes import Ask, Client, Worker
from simulation.process import Server, installed
from simulation.reader import Reader
from simulation.serving import generator, shard
from simulation.stages import Stage, stage
from simulation.truth import SHARDS
from simulation.world import World

CHAOS = 2.0  # seconds in which requests are made and faults happen
PATIENCE = 40.0  # seconds after which what has not ended never will
LAYERS = 4
SPANS = {
    1: [[(0, 4)], [(0, 4)]],
    2: [[(0, 2), (2, 4)], [(0, 2), (2, 4)]],
    3: [[(0, 1), (1, 3), (3, 4)], [(0, 1), (1, 4)]],
}


@dataclass
class Result:
    """What a run did.

    Attributes:
        steps: see World; ticks: those of them in which nothing was due.
        ended: how requests ended, as the broker said it.
        texts: how generations ended, as their readers saw it.
        counts: the brokers' own counters, and messages that they were given, by kind.
        faults: how often each happened.
        executions: requests by how often a worker began with them.
        trace: a digest of all that the brokers were given, where that was asked for.
    """

    steps: int = 0
    ticks: int = 0
    tokens: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    executions: dict[int, int] = field(default_factory=dict)
    trace: str = ""


class Scenario:
    """Clients, workers and stages under faults; `run` raises where something does wrong."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        rng = self.rng = world.rng
        kinds = [fault for fault in FAULTS if rng.random() < 0.4] if seed % 10 else []
        if seed % 10 == 5:
            kinds = ["poison"]  # alone: nobody else may be given up
        self.poison = 0.02 if "poison" in kinds else 0.0
        self.guilty_only = kinds == ["poison"]
        self.cast = Cast(world, rng)
        self.faults = Faults(self.cast, kinds, rng.choice([0.05, 0.2, 0.6]))
        world.doom = self.cast.replace
        self.count = 0
        self.result = Result()
        self.readers: list[Reader] = []
        self._clients()
        for service, idempotent in (("echo", True), ("once", False), ("nested", rng.random() < 0.5)):
            for _ in range(rng.choice([1, 2])):
                self._worker(service, rng.choice([1, 2, 5]), idempotent)
        self._pipelines()
        self.cast.expected = len(self.cast.plan)

    def run(self) -> Result:
        """The whole run.

        Raises:
            Broken: the broker lost, doubled, crossed, delayed or kept something; or a reader got what it must not.
        """
        world = self.world
        self.faults.begin()
        world.retired = self._collect
        world.run(world.now + CHAOS)
        self.faults.end()
        for client in self.cast.clients:
            client.active = False
        end = world.now + PATIENCE
        while world.now < end and not self._idle():
            world.run(world.now + 0.5)
        self._asked()
        world.run(world.now + SMALL.absence + 2 * SMALL.beat)
        world.look()
        quiescent(world.core)
        for server in self.cast.plan:
            _empty(server)
        self._collect(world.core)
        self._sum()
        return self.result

    # -- who takes part

    def _clients(self) -> None:
        rng = self.rng
        for _ in range(rng.randint(1, 2)):
            client = Client(self.world, self._name("client"), rng.choice([0.2, 0.5]), self.poison)
            self.cast.clients.append(client)
        for _ in range(rng.randint(1, 3)):
            reader = Reader(self.world, self._name("reader"), rng.choice([0.3, 0.8]))
            self.cast.clients.append(reader)
            self.readers.append(reader)

    def _worker(self, service: str, capacity: int, idempotent: bool) -> None:
        pace = self.rng.choice([0.002, 0.02, 0.2])
        self.cast.serve(service, lambda: Worker(self.world, self._name(service), service, capacity, idempotent, pace))

    def _pipelines(self) -> None:
        rng, world, name = self.rng, self.world, self._name
        again = rng.random() < 0.25  # whether stages let the broker repeat their requests
        blocks = rng.choice([14, 40])
        for copy in SPANS[rng.choice([1, 2, 2, 3])][: rng.randint(1, 2)]:
            for span in copy:
                self.cast.serve(
                    f"stage {span}", lambda span=span: stage(world, name("stage"), span, LAYERS, again, blocks)
                )
        for number in range(SHARDS):
            for _ in range(rng.randint(1, 2)):
                self.cast.serve(f"shard {number}", lambda number=number: shard(world, name(f"shard-{number}"), number))
        for _ in range(rng.randint(1, 2)):
            capacity = rng.choice([3, 8, 16])
            self.cast.serve("generator", lambda capacity=capacity: generator(world, name("generator"), capacity))

    def _name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}-{self.count}"

    # -- what is seen

    def _idle(self) -> bool:
        """Nothing is under way, for clients and broker, and whoever was stopped or replaced is back."""
        asked = all(_done(client) for client in self.cast.clients)
        nodes = all(node.known and not node.left and not port.stopped for node, port in self.world.ports.items())
        loads = any(peer.load for peer in self.world.core.roster.peers.values())
        there = not self.cast.leaving and len(self.cast.servers) == self.cast.expected
        return asked and nodes and not loads and there

    def _asked(self) -> None:
        """Every request of a live client has ended."""
        for client in self.cast.clients:
            for ask in client.texts if isinstance(client, Reader) else client.asked.values():
                holds(bool(ask.ended), f"{client.name}: a request for {ask.service} never ended")
                if self.guilty_only and isinstance(ask, Ask):
                    right = ask.poison if ask.ended == "poisoned" else not (ask.poison and ask.ended == "final")
                    holds(right, f"{client.name}: {ask.service} {ask.id.hex()[:6]} ended {ask.ended}")

    def _collect(self, core: Core) -> None:
        for name, count in core.requests.counts.items():
            self.result.counts[name] = self.result.counts.get(name, 0) + count

    def _sum(self) -> None:
        result, world = self.result, self.world
        result.steps, result.ticks = world.steps, world.idle
        result.ended = world.oracle.tally
        result.counts |= world.counts
        result.faults = self.faults.happened
        for times in world.oracle.executions.values():
            result.executions[times] = result.executions.get(times, 0) + 1
        for reader in self.readers:
            for known in reader.texts:
                result.texts[known.ended or "reader gone"] = result.texts.get(known.ended or "reader gone", 0) + 1
                result.tokens += known.read
        if world.digest is not None:
            result.trace = world.digest.hexdigest()


def _done(client: Client | Reader) -> bool:
    asks = client.texts if isinstance(client, Reader) else client.asked.values()
    return all(ask.ended for ask in asks)


def _empty(server: Worker | Server) -> None:
    """Nothing is left in the hands of a server."""
    if isinstance(server, Worker):
        holds(not server.jobs, f"{server.name} still has {len(server.jobs)} requests in hand")
        return
    holds(server.in_hand == (0, 0), f"{server.name} still has requests in hand, or asked: {server.in_hand}")
    if isinstance(server.worker, Stage):
        left = server.worker.left
        holds(left == (0, 0, 0), f"{server.name} still has sequences, KV blocks, rows: {left}")


def simulate(
    seed: int, trace: Callable[[str], None] | None = None, *, strict: bool = False, digest: bool = False
) -> Result:
    """One run; the same seed gives the same run, strict or not.

    Where a run that is not strict fails, it is repeated as a strict one, which names the first step that went wrong.

    Raises:
        Broken: what was wrong, and how to run it again.
    """
    enabled = gc.isenabled()
    gc.disable()  # when objects of a run are given up must follow from its seed
    try:
        world = World(seed, duplicate=[0.0, 0.0, 0.02, 0.2][seed % 4], trace=trace, strict=strict, digest=digest)
        with installed(world, seed):
            return Scenario(world, seed).run()
    except Exception as error:
        if not strict:
            simulate(seed, trace, strict=True)
        error.add_note(f"replay: python tests/simulation/run.py --seed {seed} --strict --trace")
        raise
    finally:
        if enabled:
            gc.enable()
