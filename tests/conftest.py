"""What every test begins with, fixtures that several test files use, and an option for `.ci/run`."""

import io
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minigpt.console.terminal import ProgressLine
from tests.commands import Result, RunCommand, path_of

# Files that take longest begin, so that no worker is left alone with one at the end (Makefile: one worker
# runs a file from beginning to end).
LONGEST = ("survival", "distributed", "machine", "training_benchmarks", "benchmarks")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # JAX compiles for longer than it computes here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; all else stays in order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--skipped-to", type=Path, metavar="FILE", help="write the ids of the skipped tests there, one a line"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    # pytest takes such a file back as the argument @FILE
    path = config.getoption("skipped_to")
    if path is not None:
        skipped = {report.nodeid for report in terminalreporter.stats.get("skipped", [])}
        path.write_text("".join(f"{name}\n" for name in sorted(skipped)), encoding="utf-8")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # What torch draws must depend neither on the tests before nor on the order's seed: tolerances were chosen
    # for given numbers. pytest-randomly seeds Python's and NumPy's generators, not torch's.
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    torch.manual_seed(0)  # a shared fixture draws only in the first test that needs it


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
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[RunCommand]:
    """Run a command, named by its verb or script, in this process; standard input is no terminal."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(name: str, *arguments: object, stdin: bytes = b"") -> Result:
        path = path_of(name)
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
