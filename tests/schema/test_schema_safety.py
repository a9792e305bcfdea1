"""Nothing that is received can run: no pickle, eval or the like in the package. And schema/ imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APART = {"tests", "build", "dist", "site-packages", "runs"}
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickletools",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "jsonpickle",
}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"recv_pyobj", "send_pyobj", "read_pickle", "to_pickle"}


CONVERTERS = {ROOT / "examples" / "convert_nanogpt.py"}  # not of the package: reads what the user has


def _plain(call: ast.Call) -> bool:
    """torch.load that runs no code of what it reads."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    only = given.get("weights_only")
    return ast.unparse(call.func) == "torch.load" and isinstance(only, ast.Constant) and only.value is True


def sources() -> list[Path]:
    return sorted(
        path
        for top in ROOT.iterdir()
        if not top.name.startswith(".") and top.name not in APART
        for path in (top.rglob("*.py") if top.is_dir() else [top])
        if path.suffix == ".py"
    )


def offences(code: str, weights: bool = False) -> list[str]:
    """What of the forbidden a source text holds; `weights` allows torch.load(weights_only=True), and opcodes."""
    tree = ast.parse(code)
    allowed = {id(node.func) for node in ast.walk(tree) if weights and isinstance(node, ast.Call) and _plain(node)}
    torch_names = {"torch"}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
            found += [name for name in names if not (weights and name == "pickletools")]
            torch_names |= {
                alias.asname for alias in node.names if alias.asname and alias.name.split(".")[0] == "torch"
            }
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            given = {alias.name for alias in node.names}
            found += [module] * (module.split(".")[0] in MODULES)
            found += sorted(given & (MODULES | CALLS)) if module in {"", "builtins", "torch", "six.moves"} else []
            found += ["torch.load"] * (module.split(".")[0] == "torch" and "load" in given)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in CALLS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            root = ast.unparse(node.value).split(".")[0]
            found += ["torch.load"] * (node.attr == "load" and root in torch_names and id(node) not in allowed)
            found += [node.attr] * (
                node.attr in ATTRIBUTES or (root in {"builtins", "__builtins__"} and node.attr in CALLS)
            )
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] * (not isinstance(node.value, ast.Constant) or node.value.value is not False)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "getattr"}:
            texts = [part.value for part in node.args if isinstance(part, ast.Constant)]
            found += [text for text in texts if isinstance(text, str) and text.split(".")[0] in MODULES | CALLS]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_received_can_run(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8"), weights=path in CONVERTERS) == []


def test_weights_alone_may_be_read_where_that_is_said() -> None:
    assert offences("import torch; torch.load(p, weights_only=True)", weights=True) == []
    assert offences("import torch; torch.load(p, weights_only=True)") == ["torch.load"]
    assert offences("import torch; torch.load(p, weights_only=x)", weights=True) == ["torch.load"]
    assert offences("import pickletools, pickle", weights=True) == ["pickle"]


def test_every_room_is_looked_at() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in sources()}
    assert {"schema", "broker", "client", "workers", "cluster", "demo", "bench", "cli", "errors.py"} <= rooms
    assert "tests" not in rooms


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, marshal",
        "import dill as d",
        "from shelve import open",
        "from cloudpickle import dumps",
        "def f():\n    import joblib",
        "import multiprocessing\nfrom torch import load",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "import torch.serialization as s\ns.load('x')",
        "from torch.serialization import load",
        "import torch\ntorch.serialization.load('x')",
        "loader = torch.load",
        "eval('1')",
        "exec('x = 1')",
        "run = compile",
        "__import__('os')",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "socket.recv_pyobj()",
        "socket.send_pyobj(1)",
        "pandas.read_pickle('x')",
        "importlib.import_module('pickle')",
        "getattr(builtins, 'eval')('1')",
    ],
)
def test_the_look_finds_what_it_looks_for(code: str) -> None:
    assert offences(code)


@pytest.mark.parametrize(
    "code",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import json\njson.load(f)",
        "np.load('x', allow_pickle=False)",
        "import torch\nmodel = torch.compile(model)",
        "from safetensors.torch import load_file",
        "importlib.import_module(name)",
        "getattr(value, 'load')",
    ],
)
def test_the_look_lets_the_rest_pass(code: str) -> None:
    assert offences(code) == []


def test_the_schema_is_light() -> None:
    modules = [f"ralmq.schema.{path.stem}" for path in (ROOT / "schema").glob("[!_]*.py")]
    assert len(modules) >= 7
    code = (
        f"import sys, {', '.join(['ralmq.schema', *modules])}\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(run.stdout.split())
    assert {"ralmq", "msgpack", "numpy"} <= loaded
    assert not loaded & {"torch", "zmq", "faiss", "typer", "rich", "pydantic", "transformers", "asyncio"}
