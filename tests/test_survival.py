"""The survival harness at toy size: everything that is promised holds every time.

What it does is in benchmarks/survival.py. It runs as a process of its own: its children are forks, and a fork
of a process that has computed gradients with torch cannot.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LEAST = {  # part -> trials at least; each counts only if the run then ends on the same bits
    "kill": 69 + 20,  # the points' number is what the writer passes: fewer would mean that a hook was lost
    "signal": 7 + 20,
    "damage": 1000 + 50,
    "disk": 69,
    "numbers": 100,
    "order": 1000,
    "cost": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [["kill"], ["signal"], ["disk"], ["damage", "numbers", "order", "cost"]])
def test_everything_survives(parts: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.survival",
        "--toy",
        "--folder",
        str(tmp_path),
        "--only",
        *parts,
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    numbers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert numbers["failed"] == []
    for part in parts:
        rows = [row for row in numbers["rows"] if row["part"] == part]
        assert all(row["held"] == row["trials"] for row in rows)
        assert sum(row["trials"] for row in rows) >= LEAST[part]
    for row in numbers["rows"]:
        if "killed_in_time" in row:  # the others had finished before the signal came
            assert row["killed_in_time"] >= row["trials"] // 2
    assert list(tmp_path.iterdir()) == []
