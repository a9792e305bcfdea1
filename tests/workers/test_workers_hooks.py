"""How logits hooks are found, refused, and kept to what a distribution is."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.schema.errors import Refused
from ralmq.workers.hooks import LogitsHook, apply, check_hooks, load_hooks

MODULE = """
from ralmq.workers.hooks import LogitsHook

class Loud(LogitsHook):
    name = "loud"
    def check(self, params):
        if "volume" not in params:
            raise ValueError("volume is missing")

class Nameless(LogitsHook):
    pass

class Other(LogitsHook):
    name = "loud"

class Costly(LogitsHook):
    def __init__(self):
        raise OSError("no table")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hooks_of_a_user.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "hooks_of_a_user", raising=False)


@pytest.mark.usefixtures("module")
def test_hooks_are_loaded_by_name() -> None:
    assert load_hooks("") == {}
    assert list(load_hooks("hooks_of_a_user:Loud, hooks_of_a_user:Nameless,")) == ["loud", "Nameless"]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("nobody", "no logits hook is called nobody: there are none installed; or give module:Class"),
        ("hooks_of_a_user:Missing", "no subclass of LogitsHook"),
        ("pathlib:Path", "no subclass of LogitsHook"),
        ("no_such_module:Hook", "cannot import no_such_module"),
        ("hooks_of_a_user:Costly", r"cannot be made \(OSError: no table\)"),
        ("hooks_of_a_user:Loud,hooks_of_a_user:Other", "two hooks are called loud"),
    ],
)
def test_what_is_no_hook(names: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        load_hooks(names)


@pytest.mark.usefixtures("module")
def test_requests_name_what_is_loaded_with_parameters_that_it_takes() -> None:
    hooks = load_hooks("hooks_of_a_user:Loud")
    check_hooks({}, {})
    check_hooks({"loud": {"volume": 3}}, hooks)
    with pytest.raises(Refused, match="hook quiet is unknown, there are loud: start the stages with -o hooks="):
        check_hooks({"quiet": {}}, hooks)
    with pytest.raises(Refused, match="hook quiet is unknown, none is loaded"):
        check_hooks({"quiet": {}}, {})
    with pytest.raises(Refused, match="hook loud refuses its parameters: volume is missing"):
        check_hooks({"loud": {}}, hooks)


class Given(LogitsHook):
    def __init__(self, on: Any, answer: Any) -> None:
        self.on = on  # type: ignore[misc]
        self._answer = answer

    def __call__(self, tokens: Any, values: Any, params: dict[str, Any]) -> Any:
        return self._answer(values)


LOGITS = np.array([1.0, 2.0, -3.0, 0.5], np.float32)
TOKENS = np.zeros(1, np.int32)


def test_probabilities_come_back_as_logits_of_the_same_size() -> None:
    same = apply(Given("probabilities", lambda p: p), TOKENS, LOGITS, {})
    assert np.allclose(same, LOGITS, atol=1e-12) and same.dtype == np.float64
    halved = apply(Given("probabilities", lambda p: p * [1, 0, 1, 1]), TOKENS, LOGITS, {})
    assert np.allclose(halved[[0, 2, 3]], LOGITS[[0, 2, 3]]) and halved[1] == -np.inf
    one = apply(Given("logits", lambda logits: np.where(logits > 1.5, logits, -np.inf)), TOKENS, LOGITS, {})
    assert one.tolist() == [-np.inf, 2.0, -np.inf, -np.inf] and LOGITS[0] == 1.0


@pytest.mark.parametrize("on", ["logits", "probabilities"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda values: values[:2], "no array of 4 values"),
        (lambda values: values.tolist(), "no array of 4 values"),
        (lambda values: None, "no array of 4 values"),
        (lambda values: values * np.nan, "left no token to draw"),
        (lambda values: np.where([1, 0, 0, 0], np.nan, values), "a value that is no number"),
        (lambda values: np.where([1, 0, 0, 0], np.inf, values), "a value that is no number"),
    ],
)
def test_what_is_no_distribution(on: str, answer: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        apply(Given(on, answer), TOKENS, LOGITS, {})
    with pytest.raises(ValueError, match="left no token"):
        apply(Given("probabilities", lambda p: p * 0.0), TOKENS, LOGITS, {})
    with pytest.raises(ValueError, match="a value that is no number"):
        apply(Given("probabilities", lambda p: p - 0.5), TOKENS, LOGITS, {})
