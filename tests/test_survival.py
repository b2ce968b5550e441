"""The survival tests at toy size: every promise holds in every trial.

tests/survival/ describes them. They run in their own process, because their children are forks, and a fork of
a process that has computed gradients with torch cannot compute any.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import prepared
from tests.survival.bench import Table

LEAST = {  # part -> smallest number of trials; a trial counts only if the run then ends on the same bits
    "kill": 60 + 10 + 10,  # the number of points is what the writer passes: fewer would mean a lost hook
    "signal": 7 + 16,
    "finetune": 12 * 2,
    "damage": 1000 + 50,
    "disk": 40,
    "numbers": 50,
    "order": 1000,
    "cost": 1,
    "processes": 2,
    "sharded": 40,
    "corpus": 1001 + 2,
}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the JSON object that the survival tests print."""
    folder = tmp_path_factory.mktemp("survival")
    command = ("-m", "tests.survival", "--toy", "--folder", str(folder))
    result = prepared.run(*command, patience=1800.0)
    assert result.returncode in (0, 1), result.stdout[-3000:] + result.stderr[-6000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == bool(found["failed"]), "1 if a single trial did not hold"
    if found["failed"]:
        print(result.stderr[-6000:])
    assert list(folder.iterdir()) == []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", LEAST)
def test_everything_survives(part: str, numbers: dict[str, Any]) -> None:
    rows = [row for row in numbers["rows"] if row["part"] == part]
    assert [row["what"] for row in rows if row["held"] != row["trials"]] == []
    assert sum(row["trials"] for row in rows) >= LEAST[part]


def test_results_are_in_the_file_after_each_row_and_parts_keep_each_other_s(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def rows() -> list[tuple[str, str, int, str]]:
        found = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [(row["part"], row["what"], row["held"], row["size"]) for row in found]

    first = Table(path, "toy", 0)
    first.add("kill", "a", 2, 2)
    assert rows() == [("kill", "a", 2, "toy")]
    first.add("kill", "b", 2, 2)
    first.add("signal", "c", 1, 1)
    second = Table(path, "full", 0)
    second.add("kill", "b", 9, 8)
    # Until the part has ended, rows that it has not reached yet stay unchanged.
    assert rows() == [("kill", "a", 2, "toy"), ("signal", "c", 1, "toy"), ("kill", "b", 8, "full")]
    second.ended("kill")
    assert rows() == [("signal", "c", 1, "toy"), ("kill", "b", 8, "full")]
    assert json.loads(path.read_text(encoding="utf-8"))["failed"] == ["b"]
    other = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**other, "machine": "another"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="another machine"):
        Table(path, "toy", 0)
