"""The frame of every command: options, exit codes, signals, streams.

A command is a frozen dataclass of options and a function `main(options) -> dict | None`, given to `run`. Exit
codes: 0 done, 2 bad input or usage (one line on stderr), 130 interrupted by Ctrl-C, 143 by SIGTERM, 138 by
SIGUSR1, 141 when the reader of its output went away (`| head`). A bug keeps its traceback and exits with 1.
With `--json` the dictionary that main returns is printed as the last line of stdout.
What minigpt says by Python's warnings is one line on stderr, as all of its other warnings are.

This module knows nothing about models or data.
"""

import atexit
import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal, NoReturn, TextIO, TypeVar

from minigpt.console.flags import help_text, parse
from minigpt.errors import InputError, check_ranges, printable

__all__ = [
    "CommandOptions",
    "MachineOptions",
    "ModelOptions",
    "exit_code",
    "lasting_imports",
    "obey_swallowed",
    "remembered_signals",
    "run",
    "stop_signals",
    "warn",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What every command understands. RANGES of a class says which numbers its fields may have."""

    RANGES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    # The output
    json: bool = False
    """also print the result as one JSON object on the last line, for programs"""

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineOptions(CommandOptions):
    """What every command that computes with a model understands."""

    RANGES = {"threads": (0, 1024)}

    # The machine
    device: str = "auto"
    """cpu, cuda, mps, or auto: the best that is there"""
    threads: int = 0
    """CPU threads; 0: as many as there are cores"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(MachineOptions):
    """What every command that asks a model understands."""

    # The model
    model: Path = Path("output/best")
    """checkpoint folder, as `minigpt train` or Hugging Face's libraries write it"""
    adapter: Path | None = None
    """adapter folder of PEFT's kind: merged into the weights; beside those in int8 and int4 it stays"""
    precision: Literal["float32", "float16", "bfloat16", "int8", "int4"] | None = None
    """store the weights so, which is faster on a CPU; left out: as the folder has them"""


Options = TypeVar("Options", bound=CommandOptions)
Given = TypeVar("Given")


def warn(text: str) -> None:
    """One line on stderr; results on stdout stay clean."""
    print(printable(f"warning: {' '.join(text.split())}"), file=sys.stderr)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print warnings of minigpt's own categories as `warn` does; others, and filters, are Python's matter."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.split(".")[0] == "minigpt":
            warn(str(message))
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def run(
    options: type[Options],
    main: Callable[[Given], dict[str, Any] | None],
    build: Callable[[dict[str, Any]], Given] | None = None,
    defaults: Callable[[], Options] | None = None,
) -> NoReturn:
    """Parse sys.argv, call main, print, exit.

    Args:
        main: the command.
        build: makes what main gets from the flags that were given; left out: an object of `options`.
        defaults: makes the object whose values --help shows as defaults; left out: the class's own.
    """
    program = sys.argv[0] if sys.argv[0].startswith("minigpt ") else Path(sys.argv[0]).name
    argv = sys.argv[1:]

    def work() -> None:
        before_end = argv[: argv.index("--")] if "--" in argv else argv
        if {"-h", "--help"} & set(before_end):
            print(help_text(options, program, main.__code__.co_filename, defaults() if defaults else None))
            return
        given = parse(options, argv)
        result = main(build(given) if build else options(**given))  # type: ignore[arg-type]
        if given.get("json"):
            print(_json_line(result or {}))

    for number in stop_signals()[1:]:  # as an exception, so that temporary files are cleared away
        signal.signal(number, _terminate)
    # Torch's threads wait for each other by spinning. Where another program holds a core, 300,000 turns (the
    # OpenMP library's own number) cost up to five sixths of the speed; 10,000 cost 2 to 5 % where none does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # At its exit Python would look for garbage in all that torch made, for half a second.
    atexit.register(gc.freeze)
    sys.exit(exit_code(program, work))


def exit_code(program: str, work: Callable[[], object]) -> int:
    """Do the work; returns the exit code. What ended it early is one line on stderr."""
    code, complaint = 0, ""
    is_closed = _open_closed_streams()
    try:
        if is_closed:
            raise InputError("standard output is closed: give it a file, or /dev/null")
        with _warnings_in_one_line():
            work()
        sys.stdout.flush()
    except InputError as error:
        code, complaint = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, complaint = 130, "interrupted"
    except _Terminated as stop:
        code, complaint = stop.code, "terminated"
    except BrokenPipeError:  # there is no reader any more
        code = 141
    except OSError as error:
        code, complaint = 2, f"error: {_os_error(error)}"
    finally:
        _empty(sys.stdout)
    if complaint:
        with contextlib.suppress(OSError):
            print(printable(f"{program}: {' '.join(complaint.split())}"), file=sys.stderr)
    _empty(sys.stderr)
    return code


def _open_closed_streams() -> bool:
    """Put /dev/null in place of closed standard streams; returns whether standard output is one of them.

    Otherwise the next file that is opened would take a stream's number, and Python prints to stdout what is
    meant for a stderr of None.
    """
    closed = []
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
            closed.append(name)
        if getattr(sys, name) is None:
            stream = open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):  # half a character in an answer must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    return "stdout" in closed


class _Terminated(SystemExit):
    """SIGTERM or SIGUSR1 came; like KeyboardInterrupt, it passes through `except Exception`."""

    code: int


def _terminate(signum: int, frame: object) -> NoReturn:
    raise _Terminated(128 + signum)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a program to stop: Ctrl-C's, SIGTERM, and SIGUSR1 where the system has it."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


_remembered: list[int] = []  # signals that came inside `remembered_signals`


@contextlib.contextmanager
def remembered_signals() -> Iterator[None]:
    """A context in which no signal is lost: its exception is raised at once, if need be again at the end.

    Libraries written in C may swallow the exception, or turn it into another one. Importing torch loses some
    KeyboardInterrupts; one that came while safetensors and torch read a file became "could not determine the
    shape of object type ...".
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread has handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}

    def note(signum: int, frame: FrameType | None) -> None:
        _remembered.append(signum)
        handler = before[signal.Signals(signum)]
        assert callable(handler), signum
        handler(signum, frame)

    noted = [number for number, handler in before.items() if callable(handler)]  # neither ignored nor fatal
    for number in noted:
        signal.signal(number, note)
    try:
        yield
        obey_swallowed()
    except Exception:
        obey_swallowed()
        raise
    finally:
        for number in noted:
            signal.signal(number, before[number])
        _remembered.clear()


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """A context for imports that make half a million objects: Python never looks for garbage among them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    if not gc.get_freeze_count():
        gc.freeze()


def obey_swallowed() -> None:
    """Raise again what a signal raised inside `remembered_signals`, if it did not get through."""
    if _remembered:
        signal.raise_signal(_remembered[0])


def _empty(stream: TextIO) -> None:
    """Flush a stream. Where that fails, discard its buffer, or Python would fail again at its exit."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _json_line(result: dict[str, Any]) -> str:
    # Chinese stays readable where stdout can hold it; stdout itself escapes a lone surrogate, as JSON would
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    line = json.dumps(_json_ready(result), ensure_ascii=ascii_only, allow_nan=False)
    # JSON may hold these characters, but str.splitlines and others would end a line at them
    return line.translate({0x85: r"\u0085", 0x2028: r"\u2028", 0x2029: r"\u2029"})


def _json_ready(value: object) -> object:
    """The same with text for paths, and null for NaN and infinities, for which JSON has no words."""
    match value:
        case dict():
            return {key: _json_ready(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_ready(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return str(value)
    return value


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or str(error) or type(error).__name__}"
