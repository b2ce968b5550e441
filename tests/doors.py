"""Running a door inside the test's process: `Result`, the fixture `run_door`'s type, and lost signals."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol


class Result(NamedTuple):
    """What a door left behind."""

    code: int
    out: str
    err: str


class RunDoor(Protocol):
    """`run_door("train.py", "--dry_run")`, as `python ./minigpt/train.py --dry_run`."""

    def __call__(self, script: str, *arguments: object, stdin: bytes = b"") -> Result: ...


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
