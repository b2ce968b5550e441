"""Fixtures that several test files use."""

import io
import runpy
import signal
import sys
from collections.abc import Iterator

import pytest

from minigpt.console.terminal import ProgressLine
from tests.commands import Result, RunCommand, path_of


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
