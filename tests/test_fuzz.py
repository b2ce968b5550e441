"""A small form of benchmarks/fuzz.py: damaged and forged files to most readers, some hundred inputs."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fuzz_mutations import changed_file

ROOT = Path(__file__).resolve().parents[1]
READERS = (
    "data",
    "texts",
    "tasks",
    "tokenizer",
    "config",
    "weights",
    "sealed",
    "manifest",
    "pth",
    "forged-pth",
)
MORE = ("bundle", "template", "recipe", "run", "shards", "forged-shards", "doctor", "checkpoint", "state")


@pytest.mark.skipif(sys.platform != "linux", reason="its processes are forked and look at /proc")
def test_no_reader_is_at_fault() -> None:
    only = [word for name in READERS + MORE for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, "benchmarks/fuzz.py", "--inputs", "80", "--seed", "7", *only],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    counts = {reader["name"]: reader["counts"] for reader in result["readers"]}
    assert counts.keys() == {*READERS, *MORE}
    assert all(one.keys() <= {"refused", "same", "other"} for one in counts.values())
    assert sum(one.get("refused", 0) for one in counts.values()) > 50, "the changes must change something"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.toml", "a.bin"])
def test_a_number_gives_an_input_again(name: str) -> None:
    content = {"a.toml": b"a = 1\n", "a.bin": bytes(range(256))}.get(name, b'{"a": [1, "b", null]}\n')
    made = [
        [changed_file(random.Random(f"x:1:{number}"), name, content, b"other") for number in range(200)]
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert len(set(made[0])) > 100
