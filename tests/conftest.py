"""Fixtures that several test files use, and what keeps tests from seeing each other's traces."""

import gc
import io
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigpt.console.command_line import stop_signals
from minigpt.console.terminal import ProgressLine
from minigpt.generation.native_library import system_build
from tests.doors import Result, RunDoor

ROOT = Path(__file__).resolve().parents[1]


system_build()  # asked once a process: now, before a test changes CC, PATH or the home folder
# Processes that tests start do not know pytest's filters; this one is pyproject.toml's.
_FILTERS = [os.environ.get("PYTHONWARNINGS", ""), "ignore:no native step:RuntimeWarning"]
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, _FILTERS))


class Process:
    """The tests' process as it began, after all test files were imported."""

    def __init__(self) -> None:
        self.torch: Any = sys.modules.get("torch")
        self.handlers = {number: signal.getsignal(number) for number in stop_signals()}
        self.environment = dict(os.environ)
        self.threads = self.torch.get_num_threads() if self.torch else 0

    def put_back(self) -> None:
        """Undo what doors change on purpose: they are made for a process of their own."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        environment = {**self.environment, "PYTEST_CURRENT_TEST": os.environ["PYTEST_CURRENT_TEST"]}
        if environment != os.environ:
            os.environ.clear()
            os.environ.update(environment)
        if self.torch and self.torch.get_num_threads() != self.threads:
            self.torch.set_num_threads(self.threads)

    def traces(self) -> dict[str, Any]:
        """What nothing may change: of torch's settings, those that are there when it is loaded."""
        torch = self.torch
        settings = torch and {
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul precision": torch.get_float32_matmul_precision(),
            "gradients": torch.is_grad_enabled(),
        }
        return {
            "working folder": Path.cwd(),
            "sys.path": [*sys.path],
            "sys.argv": [*sys.argv],
            "garbage collection": gc.isenabled(),
            "warnings.showwarning": warnings.showwarning,
            "sys.excepthook": sys.excepthook,
            "torch": settings,
        }


@pytest.fixture(scope="session")
def process() -> Process:
    """Made before the first test, and before the fixtures of its module."""
    return Process()


@pytest.fixture(autouse=True)
def nothing_is_left_behind(process: Process) -> Iterator[None]:
    """Each test begins as if it were the first, in whatever order they run.

    A test that leaves behind anything but what `put_back` knows, fails: monkeypatch undoes what it does.
    """
    process.put_back()
    if process.torch:
        process.torch.manual_seed(0)
    before, modules = process.traces(), sys.modules.copy()
    yield
    process.put_back()
    assert process.traces() == before
    other = [name for name, module in modules.items() if sys.modules.get(name) is not module]
    assert [name for name in other if name.startswith("minigpt.")] == [], "their classes would be others"


@pytest.fixture(autouse=True)
def no_progress_because_of_a_busy_machine(
    request: pytest.FixtureRequest, nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch
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
def run_door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunDoor:
    """Run a door as a script, in this process; standard input is no terminal."""

    def run(script: str, *arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", [f"./minigpt/{script}", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "minigpt" / script), run_name="__main__")
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, *capsys.readouterr())

    return run
