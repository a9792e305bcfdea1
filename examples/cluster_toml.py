"""A cluster file of ralmq as text, from machines and the layers or the memory that each of them has."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


class Unusable(Exception):
    """One line that says what is wrong with the input, and what to do."""


@dataclass
class Node:
    """A stage that is to be: on which machine, with which device, tensor parallel over how many processes."""

    machine: str
    address: str
    device: str = "cpu"
    processes: int = 1
    layers: tuple[int, int] | None = None


@dataclass
class Cluster:
    """What the file says; `memory` by machine, for the planner, in place of layers."""

    nodes: list[Node]
    broker: str
    model: Path
    memory: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The file. Layers are even where neither layers nor the memory of every machine is known."""
        addresses = {node.machine: node.address for node in self.nodes}
        name = re.sub(r"[^A-Za-z0-9_.-]+|^[^A-Za-z0-9]+", "-", self.model.name).strip("-")[:64] or "model"
        lines = ["[cluster]", f"broker = {_quoted(self.broker)}", f"machine = {_quoted(self.nodes[0].machine)}"]
        if not self.broker.startswith(("tcp://127.", "tcp://localhost")):
            lines += ['keys = "keys"  # made by: ralmq keys init keys']
        for machine, address in addresses.items():
            lines += ["", f"[machines.{_quoted(machine)}]", f"host = {_quoted(address)}"]
            if machine in self.memory:
                lines += [f"memory = {_quoted(self._memory(machine))}"]
        lines += ["", f"[models.{_quoted(name)}]", f"path = {_quoted(str(self.model))}"]
        if set(addresses) <= set(self.memory):
            return "\n".join([*lines, f"machines = {json.dumps(list(addresses))}", ""])
        for node, (first, last) in zip(self.nodes, self._spans(), strict=True):
            lines += ["", f"[[models.{_quoted(name)}.stages]]", f"machine = {_quoted(node.machine)}"]
            lines += [f'layers = "{first}:{last}"']
            options = {} if node.device == "cpu" else {"device": node.device}
            options |= {"tp": node.processes} if node.processes > 1 else {}
            lines += [f"options = {{ {', '.join(f'{k} = {json.dumps(v)}' for k, v in options.items())} }}"] * bool(
                options
            )
        return "\n".join([*lines, ""])

    def _memory(self, machine: str) -> str:
        """Of the node's own device, where the user names none."""
        devices = {node.device for node in self.nodes if node.machine == machine}
        device, memory = min(devices), self.memory[machine]
        if ":" in memory or devices == {"cpu"}:
            return memory
        if len(devices) > 1:
            example = "+".join(f"{one}:8GiB" for one in sorted(devices))
            raise Unusable(f"--memory {machine}={memory}: it has several devices; give {machine}={example}")
        return f"{device}:{memory}"

    def _spans(self) -> list[tuple[int, int]]:
        """Those of the input where they hold each layer once, else even ones."""
        given = [node.layers for node in self.nodes]
        layers = self._layers()
        ends = [0, *(span[1] for span in given if span)]
        if all(given) and [span[0] for span in given if span] == ends[:-1] and ends[-1] == layers:
            return [span for span in given if span]
        count = len(self.nodes)
        if count > layers:
            raise Unusable(f"{self.model}: has {layers} layers for {count} nodes; take nodes out")
        return [(place * layers // count, (place + 1) * layers // count) for place in range(count)]

    def _layers(self) -> int:
        try:
            config = json.loads((self.model / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise Unusable(f"{self.model}/config.json: cannot be read ({error}); give a model directory") from None
        found = config.get("num_hidden_layers", config.get("n_layer", config.get("num_layers")))
        if not isinstance(found, int):
            raise Unusable(f"{self.model}/config.json: says no number of layers; give a decoder-only model")
        return found


def run(make: Callable[[], Cluster], path: Path) -> int:
    """Prints the file, or in one line what is wrong with the input; returns the exit code."""
    try:
        print(make().text(), end="")
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        print(f"{path}: has a value of another form than this script takes ({error})", file=sys.stderr)
        return 2
    return 0


def memories(pairs: list[str], machines: set[str]) -> dict[str, str]:
    """From NAME=MEMORY, such as starter=8GiB."""
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if unknown := set(found) - machines or {name for name, memory in found.items() if not memory}:
        raise Unusable(f"--memory {min(unknown)}: give NAME=MEMORY, with a name of {', '.join(sorted(machines))}")
    return found


def read(path: Path) -> object:
    """A JSON file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Unusable(f"{path}: cannot be read as JSON ({error})") from None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # TOML has no surrogates
