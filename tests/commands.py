"""Running a command inside the test's process: `Result`, the type of `run_command`, and lost signals."""

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
    """What a command left behind."""

    code: int
    out: str
    err: str


class RunCommand(Protocol):
    """`run_command("train", "--dry_run")` by verb, or `run_command("train.py", "--dry_run")` by script."""

    def __call__(self, name: str, *arguments: object, stdin: bytes = b"") -> Result: ...


def path_of(name: str) -> Path:
    """The file of a command, named by its verb or script."""
    return ROOT / (f"{COMMANDS[name][0].replace('.', '/')}.py" if name in COMMANDS else f"minigpt/{name}")


def options_of(verb: str) -> type:
    """The class of a command's options."""
    found = runpy.run_path(str(path_of(verb)), run_name="options")
    options: type = found[{"train": "TrainConfig", "finetune": "FinetuneConfig"}.get(verb, "Options")]
    return options


def swallowed(work: Callable[..., Any], error: Exception | None) -> Callable[..., Any]:
    """What a library in C may make of a signal's exception: another one, or nothing."""

    def wrapper(*arguments: Any) -> Any:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # it comes at once
        if error is not None:
            raise error
        return work(*arguments)

    return wrapper
