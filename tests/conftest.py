"""Fixtures that several test files use."""

import io
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt.console.terminal import ProgressLine
from tests.doors import Result, RunDoor

ROOT = Path(__file__).resolve().parents[1]
# Files that take longest begin, so that no worker is left alone with one at the end (Makefile: one worker
# runs a file from beginning to end).
LONGEST = ("survival", "distributed", "machine", "training_benchmarks", "benchmarks")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # JAX compiles for longer than it computes here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; all else stays in order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def no_progress_because_of_a_busy_machine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress that waits for two seconds, waits for ever: what a test sees must not depend on the clock."""
    if request.path.name == "test_terminal.py":
        return
    original = ProgressLine.__init__

    def patient(
        self: ProgressLine, title: str, total: int, interval: float = 10.0, patience: float = 0.0
    ) -> None:
        original(self, title, total, interval, 1e9 if patience else 0.0)

    monkeypatch.setattr(ProgressLine, "__init__", patient)


@pytest.fixture
def run_door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[RunDoor]:
    """Run a door as a script, in this process; standard input is no terminal."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(script: str, *arguments: object, stdin: bytes = b"") -> Result:
        path = ROOT / "minigpt" / script
        path = path if path.exists() else ROOT / "minigpt" / "commands" / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
