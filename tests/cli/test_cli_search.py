"""`ralmq search` shows an index's own text, or token ids where it holds no tokenizer; no model is on the machine."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import broker, eventually, ralmq, started
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.writer import write_index
from tokenizers import Tokenizer, models

WORDS = ["zero", "one", "two", "[three]", "four"]
KEYS = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize("with_text", [True, False])
def test_neighbours_are_shown(tmp_path: Path, with_text: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="zero"))
    write_index(
        tmp_path / "docs",
        name="docs",
        vectors=KEYS,
        stream=TokenStream(np.arange(5, dtype=np.int32), ("a.txt",), np.array([0])),
        entries=np.arange(4),
        model="elsewhere",
        fingerprint="f",
        tokenizer=tokenizer.to_str() if with_text else None,
    )
    np.save(tmp_path / "query.npy", KEYS[1])
    (tmp_path / "worker").mkdir()
    with (
        broker(tmp_path) as url,
        started("worker", "index", "--broker", url, "-o", f"index={tmp_path / 'docs'}", home=tmp_path / "worker"),
    ):
        asked = ("search", "docs", str(tmp_path / "query.npy"), "--k", "1", "--broker", url)
        ready = ("status", "--expect", "search:docs", "--broker", url)
        eventually(lambda: ralmq(*ready, home=tmp_path).returncode == 0)
        done = ralmq(*asked, "--json", home=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        [[payload]] = json.loads(done.stdout)["payloads"]
        known = {"document": "a.txt", "start": 0, "split": 2, "tokens": [0, 1, 2, 3, 4]}
        text = {"context": "zero one", "continuation": " two [three] four"}
        assert payload == (known | text if with_text else known)
        shown = ralmq(*asked, home=tmp_path)
        assert shown.returncode == 0 and "a.txt" in shown.stdout
        assert ("zero one two [three] four" if with_text else "[0, 1, 2, 3, 4]") in shown.stdout
