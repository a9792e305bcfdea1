"""Turns the config.json of tLLM (together-LLM) into a cluster file of ralmq.

    python examples/tllm_config_to_cluster.py examples/config.json --model models/Llama-3 > cluster.toml

Taken are the forms that tLLM has had:

    [{"pp_rank": 0, "url": "localhost:25001", "tp_size": 2, "master_port": 29501, "layer_idx": [0, 11]}, ...]
    {"server": {"grpc_port": 25001, "http_port": 8022, "hostname": "mac-mini"},
     "client": [{"grpc_port": 25002, "hostname": "laptop"}, ...]}
    {"pipeline_parallel_url_list": ["localhost:50051", ...], "layer_start_end_list": [[0, 28], [28, 32]],
     "tensor_parallel": 1, "model_path": ...}

Layers [first, last) stay as they are where they hold each layer once, else they are split evenly; tp_size becomes
`tp` of the stage. With --memory NAME=8GiB for each machine the planner splits them when the cluster starts. The first
stage's machine, or the server, runs the broker, and ports fall away.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cluster_toml import Cluster, Node, Unusable, memories, read, run

LOCAL = ("localhost", "127.0.0.1", "")
FORMS = "is none of tLLM's forms: a list of stages with url, or server and client, or pipeline_parallel_url_list"


def nodes_of(document: Any) -> list[Node]:
    """The stages in the order of the pipeline."""
    if isinstance(document, list) and document and all(isinstance(entry, dict) for entry in document):
        ranked = sorted(document, key=lambda entry: int(entry.get("pp_rank", 0)))
        return [_node(str(e.get("url", "")), e.get("layer_idx"), e.get("tp_size", 1)) for e in ranked]
    if isinstance(document, dict) and isinstance(document.get("server"), dict):
        entries = [document["server"], *document.get("client", [])]
        return [_node(str(entry.get("hostname", "")), None, 1) for entry in entries]
    if isinstance(document, dict) and document.get("pipeline_parallel_url_list"):
        urls = document["pipeline_parallel_url_list"]
        spans = document.get("layer_start_end_list") or [None] * len(urls)
        if len(spans) != len(urls):
            raise Unusable(f"{len(urls)} urls and {len(spans)} layer_start_end_list: give one for each stage")
        return [_node(str(u), span, document.get("tensor_parallel", 1)) for u, span in zip(urls, spans, strict=True)]
    raise Unusable(f"the file {FORMS}")


def _node(url: str, span: Any, processes: Any) -> Node:
    host = url.removeprefix("http://").partition(":")[0]
    address = "127.0.0.1" if host in LOCAL else host
    name = "local" if host in LOCAL else host.replace("_", "-")
    layers = (int(span[0]), int(span[1])) if isinstance(span, list) and len(span) == 2 else None
    return Node(name, address, processes=int(processes), layers=layers)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="tLLM's config.json")
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument(
        "--broker", default="", metavar="URL", help="as others reach it; by default at the first machine"
    )
    parser.add_argument("--memory", action="append", default=[], metavar="NAME=8GiB", help="of a machine; repeatable")
    given = parser.parse_args()

    def make() -> Cluster:
        nodes = nodes_of(read(given.config))
        memory = memories(given.memory, {node.machine for node in nodes})
        broker = given.broker or f"tcp://{nodes[0].address}:5555"
        return Cluster(nodes, broker, given.model.expanduser().resolve(), memory)

    return run(make, given.config)


if __name__ == "__main__":
    sys.exit(main())
