"""Runs a command: options, exit codes, signals, streams.

A command is a frozen dataclass of options and a function `main(options) -> dict | None`; `run` takes both.
Exit codes: 0 done; 2 wrong input, usage, or too little memory (one line on stderr); 130 stopped by Ctrl-C,
143 by SIGTERM, 138 by SIGUSR1, 129 by SIGHUP (a closed terminal); 141 if the program that reads stdout has
ended (`| head`). A bug prints its traceback and exits with 1.
With `--json`, the dictionary that main returns is printed as the last line of stdout. A Python warning that
minigpt raises is printed as one line on stderr.

This module does not depend on models or data.
"""

import atexit
import contextlib
import dataclasses
import gc
import importlib.util
import io
import json
import math
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, ClassVar, Literal, NoReturn, TextIO, TypeVar

from minigpt.console.flags import help_text, parse
from minigpt.console.language import language_of, say, set_language, translated
from minigpt.errors import InputError, Message, check_ranges, one_line, printable, printable_json

__all__ = [
    "CarefulImport",
    "CommandOptions",
    "MachineOptions",
    "ModelOptions",
    "exit_code",
    "lasting_imports",
    "obey_swallowed",
    "patient_signals",
    "remembered_signals",
    "run",
    "show",
    "stop_signals",
    "warn",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The options of every command. RANGES: field -> smallest and largest allowed number."""

    RANGES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    # The output
    json: bool = False
    """also print the result as one JSON object on the last line, for programs"""
    language: Literal["auto", "en", "zh"] = "auto"
    """English, Chinese, or what LC_ALL, LC_MESSAGES or LANG says"""

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineOptions(CommandOptions):
    """The options of every command that computes with a model."""

    RANGES = {"threads": (0, 1024)}

    # The machine
    device: str = "auto"
    """cpu, cuda, mps, or auto: the best that is there"""
    threads: int = 0
    """CPU threads; 0: as many as there are cores"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(MachineOptions):
    """The options of every command that loads a model."""

    # The model
    model: Path = Path("output/best")
    """checkpoint folder, as `minigpt train` or Hugging Face's libraries write it"""
    adapter: Path | None = None
    """adapter folder of PEFT's kind: merged into the weights; beside those in int8 and int4 it stays"""
    precision: Literal["float32", "float16", "bfloat16", "int8", "int4"] | None = None
    """store the weights so, which is faster on a CPU; left out: as the folder has them"""


Options = TypeVar("Options", bound=CommandOptions)
Given = TypeVar("Given")


def show(text: str) -> None:
    """Translate a line of a result into the language of the terminal, and print it on stdout.

    `text` may come from an f-string: its translation is found by the fixed words around the values.
    """
    print(printable(translated(text)), flush=True)


def warn(text: str) -> None:
    """Print a warning as one line on stderr, because stdout is for results."""
    print(one_line(say("warning: {text}", text=translated(text))), file=sys.stderr)


def _text_of(error: Warning | Exception | str) -> str:
    """Return the text of an error. A `Message`, a text that can be translated, is returned as it is."""
    first = [] if isinstance(error, str) else [*error.args][:1]
    return first[0] if first and isinstance(first[0], Message) else str(error)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Inside the context, print minigpt's own Python warnings with `warn`, and other warnings as usual."""
    before = warnings.showwarning

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.split(".")[0] == "minigpt":
            warn(_text_of(message))
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show_warning
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
    """Parse sys.argv, call main, print the result, and exit.

    Args:
        options: the dataclass of the command's options.
        main: the command's function.
        build: function that makes main's argument from the given flags. Default: make an object of `options`.
        defaults: function that makes an object, whose values --help shows as defaults. Default: the defaults
            of `options`.
    """
    program = sys.argv[0] if sys.argv[0].startswith("minigpt ") else Path(sys.argv[0]).name
    argv = sys.argv[1:]

    def work() -> None:
        before_end = argv[: argv.index("--")] if "--" in argv else argv
        set_language(language_of(before_end))
        if {"-h", "--help"} & set(before_end):
            print(help_text(options, program, main.__code__.co_filename, defaults() if defaults else None))
            return
        given = parse(options, argv)
        result = main(build(given) if build else options(**given))  # type: ignore[arg-type]
        if given.get("json"):
            print(_json_line(result or {}))

    if "torch" not in sys.modules:
        sys.meta_path.insert(0, CarefulImport("torch"))
    # By default, SIGTERM, SIGUSR1 and SIGHUP end a process immediately. `_terminate` raises an exception
    # instead, so that `finally` blocks run and temporary files are removed.
    for number in stop_signals()[1:]:
        signal.signal(number, _terminate)
    # Torch's threads wait for each other in a loop ("spinning"), by default 300,000 times, before they sleep.
    # If another program uses a core, this waiting makes torch up to six times slower. A limit of 10,000 times
    # avoids this. But on an idle machine, the limit costs 2 to 5 % of the speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # At the exit, Python's garbage collection of torch's objects would take half a second. Freezing avoids
    # it.
    atexit.register(gc.freeze)

    def watched() -> None:
        # `_watched_signals` opens a pipe. Before that, `exit_code` must replace closed standard streams, or
        # the pipe would get the number (0, 1 or 2) of a closed stream.
        with _watched_signals():
            work()

    sys.exit(exit_code(program, watched))


def exit_code(program: str, work: Callable[[], object]) -> int:
    """Call `work` and return the exit code. If `work` raises an error, print the reason on stderr."""
    code, complaint = 0, ""
    is_closed = _open_closed_streams()
    errors = sys.stderr
    sys.stderr = _NeverFails(errors)
    try:
        if is_closed:
            raise InputError("standard output is closed: give it a file, or /dev/null")
        with _warnings_in_one_line():
            work()
        sys.stdout.flush()
    except InputError as error:
        code, complaint = 2, say("error: {text}", text=translated(_text_of(error)))
    except KeyboardInterrupt:
        code, complaint = 130, translated("interrupted")
    except _Terminated as stop:
        code, complaint = stop.code, translated("terminated")
    except BrokenPipeError:  # the program that reads stdout has ended, as in `| head`
        code = 141
    except OSError as error:
        code, complaint = 2, say("error: {text}", text=_os_error(error))
    except (MemoryError, RuntimeError) as error:
        # If memory is too small, torch raises a RuntimeError with this text. Any other RuntimeError is a bug.
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        what = str(error) or translated("ask for less")
        code, complaint = 2, say("error: {text}", text=say("not enough memory: {what}", what=what))
    finally:
        _empty(sys.stdout)
        if isinstance(sys.stderr, _NeverFails):  # False if the command replaced sys.stderr
            sys.stderr = errors
    with contextlib.suppress(OSError):
        if complaint:
            print(one_line(f"{program}: {complaint}"), file=sys.stderr)
    _empty(sys.stderr)
    return code


class _NeverFails:
    """Takes the place of sys.stderr. A failed write is ignored, so that a training run continues."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text. Ignore errors."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream. Ignore errors."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def _open_closed_streams() -> bool:
    """Replace closed standard streams by /dev/null. Return True if standard output was closed.

    Without this function, the next opened file would get the number 0, 1 or 2 of a closed stream, and prints
    would go into that file. If stderr is closed, Python may set sys.stderr to None; print(file=sys.stderr)
    would then print to stdout.
    """
    closed = []
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is that of the closed stream
            closed.append(name)
        if getattr(sys, name) is None:
            stream = open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    # Print lone surrogates as escapes: otherwise printing them raises an error. If sys.stdout was replaced by
    # another object, as in some tests, it may have no method `reconfigure`.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return "stdout" in closed


class _Terminated(SystemExit):
    """Raised when SIGTERM, SIGUSR1 or SIGHUP is received. `except Exception` does not catch it."""

    code: int


def _terminate(signum: int, frame: object) -> NoReturn:
    raise _Terminated(128 + signum)


_PATIENCE = 5.0  # seconds after which a process ends if its main thread has not handled a signal
_waits = False  # True (inside `patient_signals`): wait without a limit for the main thread


@contextlib.contextmanager
def patient_signals() -> Iterator[None]:
    """Inside the context, do not end the process if a library's call delays the handling of a signal.

    Used around the training loop: when the call has returned, the loop notices the signal, saves the run, and
    stops.
    """
    global _waits
    before, _waits = _waits, True
    try:
        yield
    finally:
        _waits = before


@contextlib.contextmanager
def _watched_signals() -> Iterator[None]:
    """Inside the context, end the process if the main thread does not handle a signal for five seconds.

    Python runs the handler of a signal in the main thread, between two Python instructions. A library's call
    may take minutes, and delays the handler. So a second thread receives the signal, too, without delay. If
    the main thread stays in the same call for five seconds, the second thread ends the process.
    """
    if not hasattr(signal, "SIGUSR1") or threading.current_thread() is not threading.main_thread():
        yield  # on Windows or outside the main thread, only run the block
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading,), daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()


def _watch(reading: int) -> None:
    with open(reading, "rb", buffering=0) as pipe:
        while data := pipe.read(1):
            begin, end = _place(), time.monotonic() + _PATIENCE
            while data[0] in stop_signals() and _place() == begin:
                # A new byte (a second signal) or the end of the pipe (the command has ended) ends this wait.
                if select.select([pipe], [], [], 0.05)[0]:
                    break
                if time.monotonic() > end and not _waits:
                    with contextlib.suppress(OSError):
                        os.write(2, b"terminated within a long computation; nothing was saved\n")
                    os._exit(128 + data[0])


def _forget_pipe() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


# A forked process inherits the pipe, but not the thread that reads it. So the forked process must not write
# its signals into this pipe.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pipe)


def _place() -> tuple[int, int]:
    """Return the main thread's present frame and instruction. They change while Python code runs."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return id(frame), frame.f_lasti if frame else 0


def stop_signals() -> list[signal.Signals]:
    """Return the signals that stop a program: SIGINT (Ctrl-C), SIGTERM, and on Unix SIGUSR1 and SIGHUP.

    SIGHUP, which a closed terminal sends, is left out if it is ignored: `nohup` wants the program to go on.
    """
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    if "SIGHUP" in names and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        names.remove("SIGHUP")
    return [getattr(signal, name) for name in names]


_remembered: list[int] = []  # numbers of the signals that were received inside `remembered_signals`


@contextlib.contextmanager
def remembered_signals() -> Iterator[None]:
    """Inside the context, remember signals, so that a library cannot lose one.

    The handler of a signal raises an exception, such as KeyboardInterrupt. A library written in C may ignore
    this exception, or turn it into another one. For example, importing torch loses some KeyboardInterrupts,
    and a Ctrl-C while safetensors reads a file became the error "could not determine the shape of object type
    ...".
    If a library has done so, the signal's exception is raised again at the end of the context.
    """
    # Python handles signals only in the main thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}

    def note(signum: int, frame: FrameType | None) -> None:
        _remembered.append(signum)
        handler = before[signal.Signals(signum)]
        assert callable(handler), signum
        handler(signum, frame)

    # Only signals with a handler in Python are remembered. Others are ignored, or end the process.
    noted = [number for number, handler in before.items() if callable(handler)]
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
    """Switch garbage collection off while modules are imported inside the context, to save time.

    Afterwards, all objects are frozen: garbage collection never examines them again. If garbage
    collection was off before, as inside another such context, it stays off, and nothing is frozen.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
    if was_on and not gc.get_freeze_count():
        gc.freeze()


class CarefulImport:
    """Imports one module, such as torch, so that no signal is lost, and without garbage collection.

    An object of this class stands first in `sys.meta_path`, before the usual finders of Python. When the
    module is imported, the object removes itself from the list.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_asking = False  # True while find_spec calls importlib, which calls find_spec once more

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of the module self._name; None for any other module.

        The spec is Python's own, but the import runs inside `remembered_signals` and `lasting_imports`.
        """
        if name != self._name or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                with remembered_signals(), lasting_imports():
                    execute(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def obey_swallowed() -> None:
    """Raise the exception of a signal again, if it was swallowed inside `remembered_signals`."""
    if _remembered:
        signal.raise_signal(_remembered[0])


def _empty(stream: TextIO) -> None:
    """Flush a stream. If this fails, discard its buffer: otherwise Python would flush it again and fail."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _json_line(result: dict[str, Any]) -> str:
    # True: the encoding of stdout may have no Chinese characters, so print them as \uXXXX escapes
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    return printable_json(json.dumps(_json_ready(result), ensure_ascii=ascii_only, allow_nan=False))


def _json_ready(value: object) -> object:
    """Convert a value for JSON: a path becomes text, NaN and infinities become null."""
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
    return f"{where}{translated(error.strerror or str(error) or type(error).__name__)}"
