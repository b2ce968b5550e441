"""Commands that run inside the test's process, their types, and a function that simulates lost signals."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
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


START = subprocess.run


def run_here(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Do for a command of this Python what `subprocess.run` does, but in this process.

    A new process would import torch first, which takes two seconds. Tests put this function in the place of
    `subprocess.run` where they test what a command does, not that it is a process.

    Args:
        command: [sys.executable, "-c", CODE, ...], [sys.executable, "-m", MODULE, ...] or [sys.executable,
            SCRIPT, ...]; a script's path is relative to the repository. Another program is started as usual.
        options: those of `subprocess.run`, which only another program gets.

    Returns: the exit code, and the output as text.
    """
    words = [str(word) for word in command]
    if words[0] != sys.executable:
        return START(words, **options)
    way, rest = words[1], words[2:]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code, argv, path = 0, sys.argv, sys.path
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only the tests' own process makes errors of them
        try:
            sys.path = [str(ROOT), *path]
            if way == "-c":
                sys.argv = ["-c", *rest[1:]]
                exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
            elif way == "-m":
                sys.argv = rest
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = str((ROOT / way).parent)
                sys.argv = [way, *rest]
                runpy.run_path(str(ROOT / way), run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if not isinstance(stop.code, int | None):
                print(stop.code, file=sys.stderr)
        except Exception:
            code = 1
            traceback.print_exc()
        finally:
            sys.argv, sys.path = argv, path
    done = subprocess.CompletedProcess(
        words, code, *(stream.buffer.getvalue().decode() for stream in (out, err))
    )
    if options.get("check"):
        done.check_returncode()
    return done


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
