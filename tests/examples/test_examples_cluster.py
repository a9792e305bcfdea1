"""Configurations of MDI-LLM and tLLM become cluster files that `ralmq up` takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny
from ralmq.cluster.file import read_file
from ralmq.cluster.tasks import lay_out, this_machine

EXAMPLES = Path(__file__).parents[2] / "examples"
PORTS = {"port_in": 5088, "port_out": 5089}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("gpt2", tmp_path_factory.mktemp("model") / "tiny", layers=6)


def made(folder: Path, script: str, document: Any, *arguments: object) -> subprocess.CompletedProcess[str]:
    (folder / "given.json").write_text(json.dumps(document))
    line = [sys.executable, str(EXAMPLES / script), str(folder / "given.json"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def stages(folder: Path, text: str) -> list[tuple[str, str, dict[str, str]]]:
    """(machine, layers, further options) of each stage of a file, in the order of the layers."""
    path = folder / "cluster.toml"
    path.write_text(text)
    layout = lay_out(read_file(path))
    found = []
    for machine, tasks in layout.machines.items():
        for task in tasks:
            if task.worker == "stage":
                options = {key: value for key, value in task.options.items() if key in ("device", "tp")}
                found.append((machine, task.options["layers"], options))
    return sorted(found, key=lambda entry: int(entry[1].partition(":")[0]))


def node(address: str, **more: Any) -> dict[str, Any]:
    return {"addr": address, "communication": {"port": 8088}, "inference": PORTS, **more}


def test_mdi_nodes(tmp_path: Path, model: Path) -> None:
    secondary = [node("10.0.0.2", device="cuda"), node("10.0.0.2", device="cuda:1")]
    document = {"nodes": {"starter": node("10.0.0.1"), "secondary": secondary}}
    done = made(tmp_path, "mdi_nodes_to_cluster.py", document, "--model", model)
    assert done.returncode == 0, done.stderr
    assert stages(tmp_path, done.stdout) == [
        ("starter", "0:2", {}),
        ("node-1", "2:4", {"device": "cuda:0"}),
        ("node-1", "4:6", {"device": "cuda:1"}),
    ]
    source = read_file(tmp_path / "cluster.toml")
    assert (source.center, source.file.cluster.broker) == ("starter", "tcp://10.0.0.1:5555")
    assert source.file.cluster.keys == "keys"


def test_mdi_nodes_of_before(tmp_path: Path, model: Path) -> None:
    """All on one machine, as in its examples; it is known by its address."""
    nodes = {"starter": node("127.0.0.1"), "intermediate": [node("127.0.0.1")], "finisher": node("127.0.0.1")}
    done = made(tmp_path, "mdi_nodes_to_cluster.py", {"nodes": nodes}, "--model", model, "--port", 7777)
    assert [layers for _, layers, _ in stages(tmp_path, done.stdout)] == ["0:2", "2:4", "4:6"]
    source = read_file(tmp_path / "cluster.toml")
    assert this_machine(source, "", "whatever") == "starter"
    assert source.file.cluster.broker == "tcp://127.0.0.1:7777" and not source.file.cluster.keys


def test_mdi_nodes_with_their_memory_are_planned(tmp_path: Path, model: Path) -> None:
    document = {"nodes": {"starter": node("10.0.0.1"), "secondary": [node("10.0.0.2")]}}
    memory = ("--memory", "starter=1GiB", "--memory", "node-1=1GiB")
    done = made(tmp_path, "mdi_nodes_to_cluster.py", document, "--model", model, *memory)
    assert 'machines = ["starter", "node-1"]' in done.stdout and "stages" not in done.stdout
    assert stages(tmp_path, done.stdout)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            [
                {"pp_rank": 1, "url": "lap.local:25002", "tp_size": 1, "master_port": 29502, "layer_idx": [4, 6]},
                {"pp_rank": 0, "url": "localhost:25001", "tp_size": 2, "master_port": 29501, "layer_idx": [0, 4]},
            ],
            [("local", "0:4", {"tp": "2"}), ("lap.local", "4:6", {})],
        ),
        (
            [{"url": "localhost:1", "layer_idx": [0, 1]}, {"url": "other:2", "layer_idx": [0, 1]}],
            [("local", "0:3", {}), ("other", "3:6", {})],
        ),
        (
            {"server": {"grpc_port": 1, "hostname": "mac-mini"}, "client": [{"grpc_port": 2, "hostname": "lap"}]},
            [("mac-mini", "0:3", {}), ("lap", "3:6", {})],
        ),
        (
            {
                "pipeline_parallel_url_list": ["localhost:50051", "192.168.18.166:50054"],
                "layer_start_end_list": [[0, 5], [5, 6]],
                "tensor_parallel": 1,
            },
            [("local", "0:5", {}), ("192.168.18.166", "5:6", {})],
        ),
    ],
)
def test_tllm_configs(tmp_path: Path, model: Path, document: Any, expected: list[Any]) -> None:
    done = made(tmp_path, "tllm_config_to_cluster.py", document, "--model", model)
    assert done.returncode == 0, done.stderr
    assert stages(tmp_path, done.stdout) == expected


@pytest.mark.parametrize(
    ("script", "document", "arguments", "said"),
    [
        ("mdi_nodes_to_cluster.py", {"addr": "x"}, (), "give the configuration of the starter"),
        ("mdi_nodes_to_cluster.py", {"nodes": {"starter": {}}}, (), "a node has no addr"),
        ("mdi_nodes_to_cluster.py", {"nodes": {"starter": node("x")}}, ("--memory", "y=1GiB"), "--memory y"),
        (
            "mdi_nodes_to_cluster.py",
            {"nodes": {"starter": node("x"), "secondary": [node("x")] * 9}},
            (),
            "6 layers for 10",
        ),
        ("tllm_config_to_cluster.py", {"url": 1}, (), "none of tLLM's forms"),
        ("tllm_config_to_cluster.py", [], (), "none of tLLM's forms"),
        (
            "tllm_config_to_cluster.py",
            {"pipeline_parallel_url_list": ["a"], "layer_start_end_list": [[0, 1], [1, 2]]},
            (),
            "1 urls and 2",
        ),
    ],
)
def test_what_is_no_such_file_is_told_in_one_line(
    tmp_path: Path, model: Path, script: str, document: Any, arguments: tuple[str, ...], said: str
) -> None:
    done = made(tmp_path, script, document, "--model", model, *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_folder_may_be_called_anything(tmp_path: Path) -> None:
    odd = tiny("gpt2", tmp_path / "-my modèl 😀", layers=6)
    done = made(tmp_path, "mdi_nodes_to_cluster.py", {"nodes": {"starter": node("10.0.0.1")}}, "--model", odd)
    assert stages(tmp_path, done.stdout) == [("starter", "0:6", {})]
    assert list(read_file(tmp_path / "cluster.toml").file.models) == ["my-mod-l"]


def test_memory_is_that_of_the_node_s_own_device(tmp_path: Path, model: Path) -> None:
    document = {"nodes": {"starter": node("10.0.0.1", device="cuda"), "secondary": [node("10.0.0.2")]}}
    memory = ("--memory", "starter=1GiB", "--memory", "node-1=1GiB")
    done = made(tmp_path, "mdi_nodes_to_cluster.py", document, "--model", model, *memory)
    assert 'memory = "cuda:0:1GiB"' in done.stdout and 'memory = "1GiB"' in done.stdout
    document["nodes"]["secondary"] = [node("10.0.0.1")]
    done = made(tmp_path, "mdi_nodes_to_cluster.py", document, "--model", model, "--memory", "starter=1GiB")
    assert done.returncode == 2 and "give starter=cpu:8GiB+cuda:0:8GiB" in done.stderr


@pytest.mark.parametrize(
    ("script", "document"),
    [
        ("mdi_nodes_to_cluster.py", {"nodes": {"starter": {"addr": "a"}, "secondary": None}}),
        ("mdi_nodes_to_cluster.py", {"nodes": {"starter": {"addr": ""}}}),
        ("tllm_config_to_cluster.py", [{"pp_rank": "x", "url": "a:1"}]),
        ("tllm_config_to_cluster.py", [{"url": "a:1", "layer_idx": ["a", "b"]}]),
        ("tllm_config_to_cluster.py", {"server": {"hostname": "a"}, "client": [1]}),
        ("tllm_config_to_cluster.py", {"pipeline_parallel_url_list": []}),
        ("tllm_config_to_cluster.py", {"pipeline_parallel_url_list": ["a:1"], "layer_start_end_list": 5}),
    ],
)
def test_a_value_of_another_form_is_told_in_one_line(tmp_path: Path, model: Path, script: str, document: Any) -> None:
    done = made(tmp_path, script, document, "--model", model)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
