"""examples/data_parallel_inference.py over two generators of the embedded model, and `ralmq map` over the same."""

import asyncio
import json
import os
import sys
from pathlib import Path

import ralmq
from commands import RALMQ, env_of
from serving import broker, free_url, until, worker

EXAMPLE = Path(__file__).parents[2] / "examples" / "data_parallel_inference.py"
PROMPTS = ["def add(a, b):", "Once", "import", "class Stack:", "return", "for i in"]


async def ended(*command: str, url: str, folder: Path) -> int:
    environment = {**env_of(folder), "RALMQ_BROKER": url, "PATH": os.environ.get("PATH", "")}
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=environment)
    return await asyncio.wait_for(process.wait(), 120)


async def test_prompts_of_a_file_over_two_generators(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "max_tokens": 4 + place, "ignore_eos": True} for place, prompt in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url = free_url()
    with (
        broker(tmp_path, url),
        worker(tmp_path, url, "stage", model="demo", stage="0/1"),
        worker(tmp_path, url, "generator", model="demo"),
        worker(tmp_path, url, "generator", model="demo"),
    ):
        async with ralmq.connect(url, wait=30) as client:

            async def both() -> bool:
                services = (await client.status())["services"]
                return services.get("generate:demo", {}).get("workers") == 2 and "lm:demo" in services

            await until(both, "two generators and a stage", within=90)
            serial = [
                "".join([token.text async for token in client.generate(**row, model="demo", deadline=60)])
                for row in rows
            ]
        example = (sys.executable, str(EXAMPLE), "demo", "in.jsonl", "out.jsonl")
        assert await ended(*example, url=url, folder=tmp_path) == 0
        command = (*RALMQ, "map", "in.jsonl", "mapped.jsonl", "--service", "generate:demo")
        assert await ended(*command, url=url, folder=tmp_path) == 0
        (tmp_path / "bad.jsonl").write_text(
            '{"prompt": "a", "colour": 1}\n{"text": "a"}\n{"prompt": "a", "model": "b"}'
        )
        bad = (*RALMQ, "map", "bad.jsonl", "refused.jsonl", "--service", "generate:demo")
        assert await ended(*bad, url=url, folder=tmp_path) == 1
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in found] == serial
    assert [line["prompt"] for line in found] == PROMPTS
    mapped = [json.loads(line) for line in (tmp_path / "mapped.jsonl").read_text().splitlines()]
    assert [line["text"] for line in mapped] == serial
    assert [len(line["tokens"]) for line in mapped] == [4 + place for place in range(len(PROMPTS))]
    refused = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert [line["code"] for line in refused] == ["refused"] * 3
    assert "no option 'colour'" in refused[0]["error"] and "without a prompt" in refused[1]["error"]
    assert len(EXAMPLE.read_text().splitlines()) < 40
