"""`ralmq generate --prompts`: what a file of prompts may hold, and what is said of one that is broken."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import env_of, ralmq
from ralmq.cli.main import app
from ralmq.cli.prompts import Prompt, read_prompts
from ralmq.schema.errors import Refused
from typer.testing import CliRunner


def read(tmp_path: Path, name: str, text: str, **options: Any) -> list[Prompt]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_prompts(str(tmp_path / name), options)


def test_a_paragraph_a_prompt(tmp_path: Path) -> None:
    text = "\n\nOnce upon\na time  \n \n\t\n\n  indented\r\n\r\nnaïve 🎉 end"
    found = read(tmp_path, "a.txt", text, max_tokens=5)
    assert [entry.prompt for entry in found] == ["Once upon\na time", "indented", "naïve 🎉 end"]
    assert all(entry.options == {"max_tokens": 5} for entry in found)


def test_an_object_a_line(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one"},
        {"prompt": [1, 2, 3], "max_tokens": 7, "logit_bias": {"5": 2}, "n": 2, "temperature": 1, "stop": "x"},
    ]
    found = read(tmp_path, "a.jsonl", "\n" + "\n\n".join(map(json.dumps, lines)) + "\n", max_tokens=5, seed=3)
    assert found[0] == Prompt("one", {"max_tokens": 5, "seed": 3})
    assert found[1].prompt == [1, 2, 3] and found[1].options["max_tokens"] == 7 and found[1].options["seed"] == 3


def test_stdin_is_told_by_its_first_character(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(data: bytes) -> list[Prompt]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), errors="surrogateescape"))
        return read_prompts("-", {})

    assert given(b'\n {"prompt": "a"}\n') == [Prompt("a", {})]
    assert given(b'\xef\xbb\xbf{"prompt": "a"}\r\n') == [Prompt("a", {})]
    assert [entry.prompt for entry in given(b"one\n\ntwo")] == ["one", "two"]
    with pytest.raises(Refused, match=r"-: cannot be read \(it is not UTF-8\)"):
        given(b"caf\xe9")


def test_what_other_systems_write(tmp_path: Path) -> None:
    """A byte order mark is no part of the first prompt, and any end of a line is one."""
    for data in (b"\xef\xbb\xbfone\r\na\r\n\r\ntwo\r\n", b"one\ra\r\rtwo\r", b"one\na\n\n\n\ntwo"):
        (tmp_path / "a.txt").write_bytes(data)
        assert [entry.prompt for entry in read_prompts(str(tmp_path / "a.txt"), {})] == ["one\na", "two"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two"}')
    assert [entry.prompt for entry in read_prompts(str(tmp_path / "a.jsonl"), {})] == ["one", "two"]


GOOD = '{"prompt": "a"}\n\n'


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", " \n\n", "a.txt: holds no prompt: write one a paragraph"),
        ("a.jsonl", "", "a.jsonl: holds no prompt"),
        ("a.jsonl", GOOD + "{oops", "a.jsonl: line 3: no JSON"),
        ("a.jsonl", GOOD + "[1]", 'a.jsonl: line 3: no object with a "prompt"'),
        ("a.jsonl", GOOD + '{"text": "a"}', 'line 3: no object with a "prompt"'),
        ("a.jsonl", GOOD + '{"prompt": ""}', "line 3: the prompt is neither text nor a list of token ids"),
        ("a.jsonl", GOOD + '{"prompt": [1, -1]}', "line 3: the prompt is neither"),
        ("a.jsonl", GOOD + '{"prompt": [1, 2147483648]}', "line 3: the prompt is neither"),
        ("a.jsonl", GOOD + '{"prompt": [true]}', "line 3: the prompt is neither"),
        ("a.jsonl", GOOD + '{"prompt": 5}', "line 3: the prompt is neither"),
        ("a.jsonl", GOOD + '{"prompt": "a", "colour": 1}', "line 3: generate() has no option 'colour'"),
        ("a.jsonl", GOOD + '{"prompt": "a", "max_tokens": "many"}', "line 3: max_tokens: Input should be a valid int"),
        ("a.jsonl", GOOD + '{"prompt": "a", "logit_bias": {"x": 1}}', "line 3: invalid literal for int"),
        ("a.jsonl", GOOD + '{"prompt": "a", "n": 3}', "line 3: n=3 with temperature 0"),
        ("a.jsonl", GOOD + '{"prompt": ' + "[" * 100_000, "line 3: no JSON (maximum recursion depth"),
        ("a.jsonl", GOOD + '{"prompt": "\\ud800"}', "line 3: the body cannot travel"),
        ("a.jsonl", GOOD + '{"prompt": "a", "hooks": {"h": {"x": 1' + "0" * 30 + "}}}", "line 3: a whole number in a"),
    ],
)
def test_a_broken_line_is_named_before_anything_is_sent(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    result = CliRunner(env=env_of(tmp_path)).invoke(
        app, ["generate", "--model", "m", "--prompts", str(tmp_path / name), "--broker", "tcp://127.0.0.1:1"]
    )
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, said in (("latin.txt", "it is not UTF-8"), ("none.txt", "No such file"), (".", "Is a directory")):
        with pytest.raises(Refused, match=f"cannot be read \\({said}"):
            read_prompts(str(tmp_path / name), {})


def test_options_of_the_command_line_hold_for_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\nb")
    for arguments, said in (
        (["--min-p", "2"], "line 1: min_p: "),
        (["--n", "2"], "line 1: n=2 with temperature 0"),
        (["--interval", "2"], "--interval without --retrieve"),
    ):
        done = CliRunner(env=env_of(tmp_path)).invoke(
            app, ["generate", "--model", "m", "--prompts", str(tmp_path / "a.txt"), *arguments]
        )
        assert done.exit_code == 2 and said in done.stderr


def test_without_a_broker_it_fails_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\nb")
    done = ralmq("generate", "--model", "m", "--prompts", "a.txt", "--broker", "tcp://127.0.0.1:9", home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no broker answers" in done.stderr and done.stderr.count("\n") == 1
