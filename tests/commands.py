"""Running a command inside the test's process: `Result`, the type of `run_command`, and lost signals."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


class RunCommand(Protocol):
    """`run_command("train", "--dry_run")` by verb, or `run_command("train.py", "--dry_run")` by script."""

    def __call__(self, name: str, *arguments: object, stdin: bytes = b"") -> Result: ...


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
