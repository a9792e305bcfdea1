"""`ralmq search` shows an index's own text, or token ids where it holds no tokenizer; no model is on the machine."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from commands import broker, eventually, ralmq, started
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.writer import write_index, write_vectors
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


def test_shards_are_searched_as_one_with_a_filter(tmp_path: Path) -> None:
    fields = [json.dumps({"lang": lang, "page": page}) for page, lang in enumerate(("de", "en", "de", "en"))]
    write_vectors(tmp_path / "docs", name="docs", vectors=KEYS, fields=fields, factory="Flat", shards=2)
    np.save(tmp_path / "query.npy", KEYS[1])
    with broker(tmp_path) as url, ExitStack() as stack:
        for shard in range(2):
            (home := tmp_path / f"worker-{shard}").mkdir()
            options = ("-o", f"index={tmp_path / 'docs'}", "-o", f"shard={shard}/2")
            stack.enter_context(started("worker", "index", "--broker", url, *options, home=home))
        ready = [text for shard in range(2) for text in ("--expect", f"search:docs/{shard}")]
        eventually(lambda: ralmq("status", *ready, "--broker", url, home=tmp_path).returncode == 0)
        asked = ("search", "docs", str(tmp_path / "query.npy"), "--k", "3", "--broker", url)
        done = ralmq(*asked, "--filter", '{"lang": "de"}', "--json", home=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert found["ids"] == [[0, 2, -1]] and found["shards"] == [2, 2]
        assert found["payloads"][0][1] == {"lang": "de", "page": 2}
        assert "lang: en, page: 1" in ralmq(*asked, home=tmp_path).stdout
        for wrong in ("{", "[1]", '{"lang": {"near": 1}}'):
            refused = ralmq(*asked, "--filter", wrong, home=tmp_path)
            assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
