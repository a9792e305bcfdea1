"""What the core may not know, and the outbox of its shell."""

import ast
from pathlib import Path

import pytest
import ralmq.broker
from ralmq.broker.outbox import FRAME, Outbox

HOUSE = Path(ralmq.broker.__file__).parent
SHELL = {"server.py", "guard.py", "watch.py", "memory.py", "flights.py"}
CORE = sorted(path for path in HOUSE.glob("*.py") if path.name not in SHELL)
FORBIDDEN = {
    "asyncio",
    "os",
    "random",
    "secrets",
    "selectors",
    "socket",
    "threading",
    "time",
    "uuid",
    "zmq",
    "datetime",
}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_imports_no_socket_clock_or_chance(path: Path) -> None:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" not in SHELL, "the core knows nothing of its shell"
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"__import__", "importlib.import_module", "eval", "exec"}
    assert not names & FORBIDDEN


def test_there_is_a_core() -> None:
    assert {"core.py", "requests.py", "roster.py", "pipelines.py"} <= {path.name for path in CORE}


def test_the_outbox_keeps_the_order_of_each_peer() -> None:
    outbox = Outbox(10_000)
    assert not outbox and b"a" not in outbox
    for n in range(3):
        assert outbox.hold(b"a", [b"x", bytes([n])])
    assert outbox.hold(b"b", [b"y"])
    assert outbox and b"a" in outbox and outbox.peers() == [b"a", b"b"]
    for n in range(3):
        assert outbox.first(b"a") == [b"x", bytes([n])]
        assert outbox.sent(b"a") == (n < 2)
    assert outbox.peers() == [b"b"]
    outbox.drop(b"b")
    outbox.drop(b"b")
    assert not outbox


def test_the_outbox_is_bounded_in_bytes_for_each_peer() -> None:
    outbox = Outbox(100 + 2 * FRAME)
    assert outbox.hold(b"a", [bytes(300 + FRAME)]), "a single larger one passes"
    assert not outbox.hold(b"a", [b"x"])
    assert outbox.hold(b"b", [bytes(60)]) and outbox.hold(b"b", [bytes(40)])
    assert not outbox.hold(b"b", [b""])
    outbox.sent(b"b")
    assert outbox.hold(b"b", [bytes(60)]) and not outbox.hold(b"b", [b""])
    outbox.sent(b"a")
    assert outbox.hold(b"a", [bytes(100), b""]) and not outbox.hold(b"a", [b""])
