"""Settings and fixtures that several test files use, and an option for `.ci/run`."""

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
import torch

from minigpt.console.command_line import stop_signals
from minigpt.console.language import set_language
from minigpt.console.terminal import ProgressLine
from minigpt.generation.native_library import system_build
from tests.commands import Result, RunCommand, path_of

# The longest test files run first. Otherwise one worker could still be busy with a long file at the end,
# while the others have nothing to do. (In the Makefile, one worker runs a whole file.)
LONGEST = ("survival", "distributed", "machine", "training_benchmarks", "benchmarks")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # JAX compiles for longer than it computes here


# `nohup` and a shell's `&` let a program ignore these signals. The tests send them.
for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), default)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front. The order of the others does not change."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def _freeze() -> None:
    gc.collect()
    gc.freeze()  # modules and tests stay until the end: garbage need not be looked for among them


def pytest_collection_finish() -> None:
    _freeze()


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
    # torch's random numbers must not depend on earlier tests or on the seed of the order, because tolerances
    # were chosen for certain numbers. pytest-randomly seeds Python's and NumPy's generators, but not torch's.
    _seed_torch()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed_torch()  # seed again, because a shared fixture draws only in the first test that needs it


torch.manual_seed(0)  # seeds a GPU, too: as soon as a test uses one


def _seed_torch() -> None:
    # torch.manual_seed formats the stack several times as long as no GPU is used: a millisecond and more
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)


# If a shell starts the tests in the background, they and their child processes would ignore Ctrl-C.
for _number in stop_signals():
    signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

for _name in ("LC_ALL", "LC_MESSAGES", "LANG"):  # messages are compared in English
    if os.environ.get(_name, "").lower().startswith("zh"):
        os.environ[_name] = "C.UTF-8"

system_build()  # built once per process: now, before a test changes CC, PATH or the home folder
# Child processes do not have pytest's warning filters. This filter is also in pyproject.toml.
_FILTERS = [os.environ.get("PYTHONWARNINGS", ""), "ignore:no native step:RuntimeWarning"]
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, _FILTERS))


class Process:
    """The state of the tests' process after all test files were imported."""

    def __init__(self) -> None:
        self.torch: Any = sys.modules.get("torch")
        self.handlers = {number: signal.getsignal(number) for number in stop_signals()}
        self.environment = dict(os.environ)
        self.threads = self.torch.get_num_threads() if self.torch else 0
        self._loaded = len(sys.modules)
        self._names = [name for name in sys.modules if name.startswith("minigpt.")]

    def put_back(self) -> None:
        """Undo the changes that commands make on purpose, because they expect a process of their own."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        set_language("en")
        environment = {**self.environment, "PYTEST_CURRENT_TEST": os.environ["PYTEST_CURRENT_TEST"]}
        if environment != os.environ:
            os.environ.clear()
            os.environ.update(environment)
        if self.torch and self.torch.get_num_threads() != self.threads:
            self.torch.set_num_threads(self.threads)

    def modules(self) -> dict[str, Any]:
        """Return minigpt's loaded modules. They are looked for among all only if their number has changed."""
        if len(sys.modules) != self._loaded:
            if len(sys.modules) > self._loaded + 300:  # a large library
                _freeze()
            self._loaded = len(sys.modules)
            self._names = [name for name in sys.modules if name.startswith("minigpt.")]
        return {name: sys.modules.get(name) for name in self._names}

    def traces(self) -> dict[str, Any]:
        """Return the state that no test may change. torch's settings are included if torch is loaded."""
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
    """Record the state before the first test, and before the fixtures of its module."""
    return Process()


@pytest.fixture(autouse=True)
def nothing_is_left_behind(process: Process) -> Iterator[None]:
    """Check that each test leaves the process as it was, so that the order of tests does not matter.

    A test fails if it leaves a change that neither `put_back` nor monkeypatch undoes.
    """
    process.put_back()
    before, modules = process.traces(), process.modules()
    yield
    process.put_back()
    assert process.traces() == before
    other = [name for name, module in modules.items() if sys.modules.get(name) is not module]
    assert other == [], "their classes would be others"


@pytest.fixture(autouse=True)
def no_progress_because_of_a_busy_machine(
    request: pytest.FixtureRequest, nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switch off progress that appears after two seconds, because output must not depend on the clock."""
    if request.path.name == "test_terminal.py":
        return
    original = ProgressLine.__init__

    def patient(
        self: ProgressLine, title: str, total: int, interval: float = 10.0, patience: float = 0.0
    ) -> None:
        original(self, title, total, interval, 1e9 if patience else 0.0)

    monkeypatch.setattr(ProgressLine, "__init__", patient)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Return a function that runs a command in this process. Standard input is not a terminal."""

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

    return run
