"""A cluster file: what each machine starts of it, and each fault with its line and what to write instead."""

import inspect
from pathlib import Path

import pytest
from ralmq.cluster.file import read_file
from ralmq.cluster.options import declared
from ralmq.cluster.tasks import Layout, Task, lay_out, on_machine, task_of, this_machine
from ralmq.errors import Refused
from ralmq.workers.registry import BUILT_IN, find

TWO = """\
[cluster]
broker = "tcp://10.0.0.1:5555"
machine = "desk"

[machines.desk]
host = "desk.lan"
memory = "48MiB"
speed = 10
threads = 2

[machines.lap]
memory = "48MiB"
speed = 2
models = { demo = "/data/demo" }

[models.demo]
path = "demo"
kv_tokens = 100

[indexes.notes]
path = "indexes/notes"
machine = "lap"
options = { shard = "0/2" }

[[workers]]
worker = "my_package:Upper"
machine = "lap"
options = { loud = true, times = 2 }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def laid_out(folder: Path, text: str) -> Layout:
    return lay_out(read_file(written(folder, text)))


def fault(folder: Path, text: str) -> str:
    """What is wrong with a file, without its folder; one line."""
    with pytest.raises(Refused) as caught:
        laid_out(folder, text)
    said = caught.value.message
    assert "\n" not in said
    return said.removeprefix(f"{folder}/")


def test_the_planner_splits_a_model_over_machines(tmp_path: Path) -> None:
    """Five times the speed: more layers, though with the head. The rest goes where the file says."""
    layout = laid_out(tmp_path, TWO)
    desk = {task.name: task for task in layout.machines["desk"]}
    lap = {task.name: task for task in layout.machines["lap"]}
    assert set(desk) == {"demo-cpu", "demo-generator"}
    assert set(lap) == {"demo-cpu", "index-notes", "upper-0"}
    spans = sorted(tuple(map(int, where["demo-cpu"].options["layers"].split(":"))) for where in (desk, lap))
    assert spans[0][0] == 0 and spans[0][1] == spans[1][0] and spans[1][1] == 6
    counts = {
        name: len(range(*map(int, where["demo-cpu"].options["layers"].split(":"))))
        for name, where in (("desk", desk), ("lap", lap))
    }
    assert counts["desk"] > counts["lap"]
    assert desk["demo-cpu"].threads == 2 and desk["demo-cpu"].options["threads"] == "2"
    assert desk["demo-cpu"].options["kv_mib"] == "1"
    assert lap["index-notes"].options == {"index": f"{tmp_path}/indexes/notes", "name": "notes", "shard": "0/2"}
    assert lap["upper-0"] == Task("upper-0", "my_package:Upper", {"loud": "true", "times": "2"})
    assert lap["upper-0"].flags == ["-o", "loud=true", "-o", "times=2"]
    assert layout.plans["demo"].used


def test_who_is_left_without_layers_is_told(tmp_path: Path) -> None:
    slow = TWO.replace("speed = 2", "speed = 0.01").replace('"48MiB"\nspeed = 10', '"cpu:48MiB"\nspeed = 100')
    layout = laid_out(tmp_path, slow)
    (line,) = layout.idle
    assert line.startswith("lap gets no layers of demo: one layer would be slower")
    assert not any(task.worker == "stage" for task in layout.machines["lap"])
    assert laid_out(tmp_path, TWO).idle == []


def test_a_machine_has_models_of_its_own_folders(tmp_path: Path) -> None:
    source = read_file(written(tmp_path, TWO))
    tasks = on_machine(lay_out(source).machines["lap"], source.file.machines["lap"].models)
    assert {task.options["model"] for task in tasks if "model" in task.options} == {"/data/demo"}


def test_a_machine_is_known_by_its_name_its_host_or_what_is_said(tmp_path: Path) -> None:
    source = read_file(written(tmp_path, TWO))
    for given, host, expected in (
        ("lap", "x", "lap"),
        ("", "desk", "desk"),
        ("", "desk.lan", "desk"),
        ("", "lap.h", "lap"),
    ):
        assert this_machine(source, given, host) == expected
    with pytest.raises(Refused, match="this host is called other, and none of desk, lap is: say --machine NAME"):
        this_machine(source, "", "other")
    with pytest.raises(Refused, match="no machine is called 'lp': did you mean lap"):
        this_machine(source, "lp", "desk")


def test_without_machines_everything_is_here(tmp_path: Path) -> None:
    layout = laid_out(tmp_path, '[models.demo]\npath = "demo"\n')
    assert [(task.name, task.options.get("layers")) for task in layout.machines["local"]] == [
        ("demo-cpu", "0:6"),
        ("demo-generator", None),
    ]


def test_where_a_memory_is_not_known_the_broker_decides(tmp_path: Path) -> None:
    layout = laid_out(tmp_path, TWO.replace('memory = "48MiB"\nspeed = 2', "speed = 2"))
    (lap,) = [task for task in layout.machines["lap"] if task.worker == "stage"]
    assert lap.options["stage"] == "auto/2" and lap.options["speed"] == "2.0" and "memory" not in lap.options
    assert lap.waits and lap.options["kv_tokens"] == "100"
    (desk,) = [task for task in layout.machines["desk"] if task.worker == "stage"]
    assert desk.options["memory"] == str(48 << 20)


def test_several_devices_are_several_stages(tmp_path: Path) -> None:
    text = TWO.replace('"48MiB"\nspeed = 10', '"cuda:0:24MiB+cpu:24MiB"\nspeed = "10+10"')
    stages = [task for task in laid_out(tmp_path, text).machines["desk"] if task.worker == "stage"]
    assert {task.name: task.options.get("device") for task in stages} == {"demo-cuda-0": "cuda:0", "demo-cpu": None}


def test_layers_by_hand_with_a_spare(tmp_path: Path) -> None:
    stages = """stages = [
  { machine = "desk", layers = "0:4" },
  { machine = "lap", layers = "4:6", options = { kv_mib = 7 } },
  { machine = "desk", layers = "4:6", spare = true },
]"""
    layout = laid_out(tmp_path, TWO.replace("kv_tokens = 100", stages))
    assert [task.options["layers"] for task in layout.machines["desk"] if task.worker == "stage"] == ["0:4", "4:6"]
    (lap,) = [task for task in layout.machines["lap"] if task.worker == "stage"]
    assert lap.options["kv_mib"] == "7"


def test_an_encoder_decoder_gets_its_encoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path / "t5")
    layout = laid_out(tmp_path, '[models.t]\npath = "t5"\n')
    assert [task.worker for task in layout.machines["local"]] == ["stage", "generator", "t5-encoder"]


def test_a_ring_is_for_all_stages(tmp_path: Path) -> None:
    text = TWO.replace(
        'machine = "desk"\n\n[machines.desk]', 'machine = "desk"\ndata_plane = "ring"\n\n[machines.desk]'
    )
    text = text.replace("threads = 2", 'address = "10.0.0.1"')
    layout = laid_out(tmp_path, text)
    told = [task.options for tasks in layout.machines.values() for task in tasks if task.worker == "stage"]
    assert [options["data_plane"] for options in told] == ["ring", "ring"]
    assert [options.get("address") for options in told] == ["10.0.0.1", None]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("threads = 2", "thread = 2", "cluster.toml:9: unknown field 'thread' of machines.desk: did you mean threads?"),
        ("[indexes.notes]", "[index.notes]", "cluster.toml:20: unknown field 'index': did you mean indexes?"),
        ('path = "demo"', "", "cluster.toml:16: models.demo lacks path: write path = ..."),
        ("kv_tokens = 100", "kv_tokens = 0", "cluster.toml:18: kv_tokens should be greater than or equal to 1, not 0"),
        ("kv_tokens = 100", 'dtype = "fp31"', "cluster.toml:18: dtype should be 'fp32', 'bf16', 'fp16' or 'int8'"),
        (
            'machine = "lap"\noptions = { l',
            'machine = "lab"\noptions = { l',
            "no machine is called 'lab': did you mean lap?",
        ),
        ('machine = "desk"\n', 'machine = "desc"\n', "cluster.toml:3: no machine is called 'desc': did you mean desk?"),
        ("speed = 10", 'speed = "fast"', "cluster.toml:5: 'fast' is no speed"),
        (
            'memory = "48MiB"\nspeed = 2',
            'memory = "48Mb/s"\nspeed = 2',
            "cluster.toml:11: '48Mb/s' is no amount of memory",
        ),
        ("speed = 10", "speed = 10 20", "cluster.toml:8: no TOML: "),
        ("[machines.lap]", "[machines.desk]", "cluster.toml:11: no TOML: "),
        ('path = "demo"', 'path = "demmo"', "cluster.toml:17: "),
        ("kv_tokens = 100", "kv_tokens = 100000", "cluster.toml:16: demo does not fit: 15.3 MiB of weights"),
        ("kv_tokens = 100", 'machines = ["lap", "lap"]', "cluster.toml:18: a machine is named twice"),
        ("kv_tokens = 100", 'machines = ["lap", "desc"]', "cluster.toml:18: no machine is called 'desc'"),
        ('worker = "my_package:Upper"', 'worker = "echo"\nname = "a b"', "cluster.toml:27: 'a b' is no name"),
        ("[indexes.notes]", '[indexes."my notes"]', "cluster.toml:20: 'my notes' is no name"),
        (
            'worker = "my_package:Upper"',
            'name = "index-notes"\nworker = "my_package:Upper"',
            "cluster.toml:25: two processes of lap are called index-notes",
        ),
    ],
)
def test_each_fault_is_one_line_with_its_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in TWO
    found = fault(tmp_path, TWO.replace(old, new))
    assert said in found, found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "my_package:Upper",
            "ecko",
            "cluster.toml:26: no worker is called 'ecko' (one of your own is written module:Class): did you mean echo?",
        ),
        ("my_package:Upper", "my-package:Upper", "cluster.toml:26: 'my-package:Upper' names no class"),
        ("my_package:Upper", "echo", "cluster.toml:28: echo has no option loud: there are delay_ms, jitter_ms"),
        ("{ loud = true, times = 2 }", "{}", ""),
        ("my_package:Upper", "encoder", "cluster.toml:28: encoder has no option loud"),
        ('"my_package:Upper"\n', '"module"\n# ', "cluster.toml:28: module has no option loud"),
        ("{ shard", "{ shards", "cluster.toml:23: index has no option shards: did you mean shard?"),
        ("kv_tokens = 100", "options = { chunks = 4 }", "cluster.toml:18: stage has no option chunks: did you mean ch"),
        ("kv_tokens = 100", "options = { chunk = 'x' }", "18: chunk of stage should be a whole number, not 'x'"),
        ("kv_tokens = 100", "options = { packed = 2 }", "18: packed of stage should be true or false, not 2"),
        (
            "kv_tokens = 100",
            "stages = [\n{ layers = '0:3' },\n{ machine = 'lap', layers = '3:6', options = { dtpe = 'int8' } },\n]",
            "cluster.toml:20: stage has no option dtpe: did you mean dtype?",
        ),
    ],
)
def test_workers_and_options_of_every_machine_are_looked_at(tmp_path: Path, old: str, new: str, said: str) -> None:
    """Also of a machine that is not this one: its own start would tell it late, and elsewhere."""
    assert old in TWO
    text = TWO.replace(old, new)
    if said:
        found = fault(tmp_path, text)
        assert said in found, found
    else:
        assert laid_out(tmp_path, text).machines["lap"][-1].options == {}


def test_a_worker_that_lacks_an_option_it_needs(tmp_path: Path) -> None:
    said = fault(tmp_path, '[machines.a]\n[[workers]]\nworker = "encoder"\nmachine = "a"\n')
    assert said == "cluster.toml:2: encoder needs model: write options = { model = ... }"


@pytest.mark.parametrize("worker", BUILT_IN)
def test_what_is_read_of_a_class_is_what_it_takes(worker: str) -> None:
    parameters = inspect.signature(find(worker)).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    found = declared(worker)
    assert found is not None and list(found) == list(parameters)
    assert {name for name, (_, must) in found.items() if must} == needed
    assert declared("my_package:Upper") is None


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (("0:4", "3:6"), "cluster.toml:20: layers 3:6 overlap with 0:4 on desk: give each layer once, or write spare"),
        (("0:3", "4:6"), "cluster.toml:20: layers 3:4 of demo are on no machine"),
        (("0:4", "4:5"), "cluster.toml:16: layers 5:6 of demo are on no machine"),
        (("0:4", "4:7"), "cluster.toml:20: layers 4:7 do not exist: demo has 0:6"),
        (("0:4", "4-6"), "cluster.toml:20: '4-6' are no layers: write layers = \"0:6\""),
    ],
)
def test_layers_by_hand_are_each_held_once(tmp_path: Path, stages: tuple[str, str], said: str) -> None:
    first, second = stages
    entries = (
        f'stages = [\n  {{ machine = "desk", layers = "{first}" }},\n  {{ machine = "lap", layers = "{second}" }},\n]'
    )
    assert said in fault(tmp_path, TWO.replace("kv_tokens = 100", entries))
    tables = f'[[models.demo.stages]]\nlayers = "{first}"\n[[models.demo.stages]]\nlayers = "{second}"'
    assert said.partition(": ")[2].replace("desk", "") in fault(
        tmp_path, TWO.replace("kv_tokens = 100", tables)
    ).replace("desk", "")


def test_machines_and_stages_do_not_go_together(tmp_path: Path) -> None:
    both = 'machines = ["lap"]\nstages = [{ layers = "0:6" }]'
    assert "give either machines, or stages" in fault(tmp_path, TWO.replace("kv_tokens = 100", both))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="name a cluster file"):
        read_file(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="UTF-8"):
        read_file(tmp_path / "binary.toml")


def test_what_travels_comes_back_as_it_was(tmp_path: Path) -> None:
    layout = laid_out(tmp_path, TWO)
    for name, tasks in layout.machines.items():
        listed = layout.as_map()[name]
        assert [task_of(entry) for entry in listed if ":" not in entry["worker"]] == [
            task for task in tasks if ":" not in task.worker
        ]


GOOD = {"name": "a", "worker": "echo", "options": {"name": "e"}, "threads": 1, "waits": False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"worker": "my_package:Upper"}, "only built-in workers are started that way: copy the cluster file"),
        ({"worker": "ralm-gateway"}, "only built-in workers"),
        ({"worker": None}, "only built-in workers"),
        ({"worker": "stage", "options": {"hooks": "my_package:Hook"}}, "names code"),
        ({"name": "../../etc/passwd"}, "without a name"),
        ({"name": ""}, "without a name"),
        ({"name": "supervisor"}, "without a name"),
        ({"name": "broker"}, "without a name"),
        ({"worker": "stage", "options": {"hooks=my_package:Hook,": "x"}}, "without a name or options"),
        ({"options": {"": "x"}}, "without a name or options"),
        ({"options": {"delay_ms": 3}}, "without a name or options"),
        ({"options": None}, "without a name or options"),
        ({"threads": 0}, "no number of threads"),
        ({"threads": True}, "no number of threads"),
    ],
)
def test_nothing_but_built_in_workers_comes_over_the_wire(change: dict[str, object], said: str) -> None:
    assert task_of(GOOD) == Task("a", "echo", {"name": "e"})
    with pytest.raises(Refused, match=said):
        task_of({**GOOD, **change})
    with pytest.raises(Refused, match="no map"):
        task_of(["echo"])


HALF = '[machines.a]\nmemory = "24MiB"\n[machines.b]\nmemory = "24MiB"\n[models.one]\npath = "demo"\nkv_tokens = 16\n'


def test_what_one_model_takes_another_does_not_have(tmp_path: Path) -> None:
    """Two of 15.4 MiB in 48; a third one does not fit, whatever each of them would do alone."""
    two = HALF + '[models.two]\npath = "demo"\nkv_tokens = 16\n'
    for machine, tasks in laid_out(tmp_path, two).machines.items():
        spans = {task.options["name"]: task.options["layers"] for task in tasks if task.worker == "stage"}
        assert spans, machine
    third = two + '[models.three]\npath = "demo"\nkv_tokens = 16\n'
    assert "three does not fit: 15.3 MiB of weights and 96 KiB of cache" in fault(tmp_path, third)


def test_layers_by_hand_take_memory_first(tmp_path: Path) -> None:
    """They fit or are refused, and the planner has the rest; a stage of several processes is not weighed."""
    hand = 'path = "demo"\nkv_tokens = 16\nstages = [{ machine = "b", layers = "0:6" }]\n'
    layout = laid_out(tmp_path, f"{HALF}[models.two]\n{hand}")
    (planned,) = (task for task in layout.machines["a"] if task.worker == "stage")
    assert planned.options["layers"] == "0:5", "16.3 MiB of the 24 are taken on b"
    large = hand.replace("kv_tokens = 16", "kv_tokens = 4096")
    said = "layers 0:6 with their cache take 39.3 MiB, 24 MiB are left on b: give fewer layers, or more memory"
    assert said in fault(tmp_path, f"{HALF}[models.two]\n{large}")
    said = "take 16.3 MiB, 7.74 MiB are left on b"
    assert said in fault(tmp_path, f"{HALF}[models.two]\n{hand}[models.three]\n{hand}")
    split = large.replace('"0:6"', '"0:6", options = { tp = 2 }')
    stage = laid_out(tmp_path, f"{HALF}[models.two]\n{split}").machines["b"][0]
    assert stage.options["kv_mib"] == "12", "of each of the two"


def test_models_that_the_broker_splits_share_what_is_left(tmp_path: Path) -> None:
    text = '[machines.a]\nmemory = "48MiB"\n[machines.b]\n[models.one]\npath = "demo"\n[models.two]\npath = "demo"\n'
    tasks = [task for task in laid_out(tmp_path, text).machines["a"] if task.worker == "stage"]
    assert [task.options["memory"] for task in tasks] == [str(24 << 20)] * 2


def test_one_machine_of_which_nothing_is_known_keeps_the_tokens_that_are_asked_for(tmp_path: Path) -> None:
    (stage, _) = laid_out(tmp_path, '[models.demo]\npath = "demo"\nkv_tokens = 65536\n').machines["local"]
    assert stage.options["kv_mib"] == "384"


def test_a_machine_without_a_model_needs_none(tmp_path: Path) -> None:
    """It starts its workers from the file; who runs the broker, or a part of a model, looks into every model."""
    text = '[machines.a]\n[machines.b]\n[machines.c]\n[models.x]\npath = "nowhere"\nmachines = ["a"]\n'
    text += 'generator = "c"\n[[workers]]\nworker = "echo"\nmachine = "b"\n'
    source = read_file(written(tmp_path, text))
    assert [task.name for task in lay_out(source, "b").machines["b"]] == ["echo-0"]
    for here in ("a", "c", ""):
        with pytest.raises(Refused, match="no such model directory"):
            lay_out(source, here)
    hand = text.replace('machines = ["a"]', 'stages = [{ layers = "0:6" }]')
    assert lay_out(read_file(written(tmp_path, hand)), "b").machines["b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[machines.a]\nspeed = "900+12"\n[models.m]\npath = "demo"\n', "cluster.toml:1: 2 speeds and no memory"),
        ('[cluster]\nbroker = "10.0.0.1:5555"\n', "cluster.toml:2: '10.0.0.1:5555' is no address: write tcp://host"),
        ('[cluster]\nbroker = ""\n', "cluster.toml:2: '' is no address"),
        ('[cluster]\nbind = "tcp://0.0.0.0"\n', "cluster.toml:2: 'tcp://0.0.0.0' is no address"),
        ('[[workers]]\nworker = "echo"\nname = "broker"\n', "cluster.toml:1: broker is the name of a process of the"),
        ('[[workers]]\nworker = "echo"\nname = "supervisor"\n', "supervisor is the name of a process of the cluster"),
        ('[[workers]]\nworker = "my_package:"\n', "cluster.toml:2: 'my_package:' names no class: write module:Class"),
    ],
)
def test_more_faults_with_their_lines(tmp_path: Path, text: str, said: str) -> None:
    assert said in fault(tmp_path, text)
