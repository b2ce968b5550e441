"""Types for running a command inside the test's process, and a function that simulates lost signals."""

import contextlib
import os
import runpy
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from minigpt.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


class Result(NamedTuple):
    """The result of a command: exit code and output."""

    code: int
    out: str
    err: str


class RunCommand(Protocol):
    """Run a command: `run_command("train", "--dry_run")`, or `run_command("train.py", "--dry_run")`."""

    def __call__(self, name: str, *arguments: object, stdin: bytes = b"") -> Result: ...


def path_of(name: str) -> Path:
    """Return the file of a command, named by its verb or script."""
    return ROOT / (f"{COMMANDS[name][0].replace('.', '/')}.py" if name in COMMANDS else f"minigpt/{name}")


def options_of(verb: str) -> type:
    """Return the class of a command's options."""
    found = runpy.run_path(str(path_of(verb)), run_name="options")
    options: type = found[{"train": "TrainConfig", "finetune": "FinetuneConfig"}.get(verb, "Options")]
    return options


def swallowed(work: Callable[..., Any], error: Exception | None) -> Callable[..., Any]:
    """Wrap `work` so that a signal's exception is lost or becomes `error`, as in some C libraries."""

    def wrapper(*arguments: Any) -> Any:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # the signal interrupts this at once
        if error is not None:
            raise error
        return work(*arguments)

    return wrapper
