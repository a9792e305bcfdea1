"""Turns the nodes configuration of MDI-LLM (JSON) into a cluster file of ralmq.

    python examples/mdi_nodes_to_cluster.py settings_distr/configuration.json --model models/shakespeare > cluster.toml

Taken is what MDI-LLM's starter reads:

    {"nodes": {"starter": {"addr": "10.0.0.1", "communication": {"port": 8088},
                           "inference": {"port_in": 5088, "port_out": 5089}, "device": "cuda:0"},
               "secondary": [{"addr": "10.0.0.2", "communication": {"starter_addr": ..., "port": 8089},
                              "inference": {...}, "device": "cuda"}, ...]}}

and its earlier form with "intermediate": [...] and "finisher": {...} in place of "secondary". Nodes of one address are
one machine. Ports fall away: everybody connects to the broker, which runs at the starter. Layers are split evenly, or,
with --memory NAME=8GiB for each machine, as the planner finds best when the cluster starts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cluster_toml import Cluster, Node, Unusable, memories, read, run


def nodes_of(document: Any) -> list[Node]:
    """The nodes in the order in which a token passes them."""
    nodes = document.get("nodes") if isinstance(document, dict) else None
    if not isinstance(nodes, dict) or "starter" not in nodes:
        raise Unusable('the file has no {"nodes": {"starter": ...}}: give the configuration of the starter')
    entries = [nodes["starter"], *nodes.get("secondary", nodes.get("intermediate", []))]
    entries += [nodes["finisher"]] if "finisher" in nodes else []
    machines: dict[str, str] = {}
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("addr"), str) or not entry["addr"]:
            raise Unusable("a node has no addr: give each the address of its machine")
        address = entry["addr"]
        name = machines.setdefault(address, f"node-{len(machines)}" if machines else "starter")
        device = str(entry.get("device", "cpu"))
        found.append(Node(name, address, "cuda:0" if device == "cuda" else device))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("nodes", type=Path, help="MDI-LLM's configuration of the nodes")
    parser.add_argument("--model", type=Path, required=True, help="a model directory; see convert_nanogpt.py")
    parser.add_argument("--port", type=int, default=5555, help="of the broker")
    parser.add_argument("--memory", action="append", default=[], metavar="NAME=8GiB", help="of a machine; repeatable")
    given = parser.parse_args()

    def make() -> Cluster:
        nodes = nodes_of(read(given.nodes))
        memory = memories(given.memory, {node.machine for node in nodes})
        broker = f"tcp://{nodes[0].address}:{given.port}"
        return Cluster(nodes, broker, given.model.expanduser().resolve(), memory)

    return run(make, given.nodes)


if __name__ == "__main__":
    sys.exit(main())
