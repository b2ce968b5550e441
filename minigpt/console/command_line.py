"""The frame of every door: flags from a dataclass, errors in one line, exit codes.

A door declares a frozen dataclass of options (each field with one line of help below it) and a function
`main(options) -> dict | None`, and calls `run`. Exit codes: 0 done, 2 bad input or usage, 130 interrupted by
Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1, 141 when the reader of its output went away (`| head`). With `--json`
the dictionary that main returns is printed as the last line of stdout. A bug keeps its traceback and exits
with 1. What minigpt says by Python's warnings is one line on stderr, as all of its other warnings are.

It knows nothing about models or data.
"""

import atexit
import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO, TypeVar

from minigpt.errors import InputError, printable, unknown_name

__all__ = [
    "DoorOptions",
    "lasting_imports",
    "obey_swallowed",
    "parse",
    "remembered_signals",
    "run",
    "stop_signals",
    "warn",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoorOptions:
    """What every door understands."""

    json: bool = False
    """also print the result as one JSON object on the last line, for machines"""


Options = TypeVar("Options", bound=DoorOptions)


def parse(options: type[Options], argv: list[str], default: Options | None = None) -> Options:
    """Options from the command line, the rest from `default` (or the dataclass's own defaults).

    Raises:
        InputError: for an unknown flag (naming the nearest), a missing or unreadable value.
    """
    import tyro  # here, not above: `minigpt --help` should not wait for it

    _check_flags(options, argv)

    def read() -> Options:
        if default is None:
            return tyro.cli(options, args=argv, use_underscores=True)
        return tyro.cli(options, args=argv, use_underscores=True, default=default)

    if {"-h", "--help"} & set(argv):
        return read()
    # tyro draws a coloured box, as wide as the terminal, around its messages; we want the sentence alone.
    # With stdout taken away from it too, the box is the same everywhere: ASCII, without colours.
    said = io.StringIO()
    try:
        with _columns(1_000_000), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return read()
    except _Terminated:  # a signal while the flags are read is no wrong flag
        raise
    except SystemExit:
        raise InputError(_sentence(said.getvalue())) from None


def _check_flags(options: type[DoorOptions], argv: list[str]) -> None:
    from tyro.conf import Positional

    marker = Positional[str].__metadata__[0]  # type: ignore[attr-defined]  # a value without a flag before it
    switches = {
        field.name: field.type in (bool, "bool")
        for field in dataclasses.fields(options)
        if marker not in getattr(field.type, "__metadata__", ())
    }
    opposites = {f"no_{name}" for name, is_switch in switches.items() if is_switch}
    for argument in argv:
        if argument == "--":
            break  # what follows is no flag, whatever it looks like
        if not argument.startswith("--"):
            continue
        flag, equals, _ = argument.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in {*switches, *opposites, "help"}:
            raise InputError(unknown_name("flag", flag, (f"--{known}" for known in switches)))
        if equals and (name in opposites or switches.get(name)):
            on = name.removeprefix("no_") if name in opposites else name
            raise InputError(f"{flag} takes no value: write --{on} or --no_{on}")


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


_PLAIN_WORDS = (  # tyro's and Python's, then ours; what is not listed stays as it is
    (
        r"Error parsing (--\w+): invalid literal for int\(\) with base 10: ",
        r"\1 must be a whole number: got ",
    ),
    (  # of a flag that may be left out
        r"Error parsing (--\w+): no type matching \{None\}\|INT .*invalid literal for int\(\) with base 10: ",
        r"\1 must be a whole number: got ",
    ),
    (r"Error parsing (--\w+): could not convert string to float: ", r"\1 must be a number: got "),
    (r"Error parsing (?!--)\S+: ", ""),  # the name of our class, before a sentence of our own
    (r"Missing value for argument '(--\w+)'.*", r"\1 needs a value (one that begins with '-': \1=VALUE)"),
    (r"Missing from \S+: ([A-Z_]+) .*", r"\1 is missing: see --help"),
    (
        r"Missing value for argument '(\w+)'.*",
        r"\1 is missing (one that begins with '-' is written at the end, after --)",
    ),
    (
        r"invalid choice (.*) for argument '(--\w+)'\. Expected one of \((.*?),?\)\.",
        r"\2 must be one of \3: got \1",
    ),
    (r"Unrecognized options: (.*)", r"unexpected argument: \1 (a value with spaces needs quotes around it)"),
)


def _sentence(box: str) -> str:
    """What tyro says below its title, above the help that it adds."""
    parts = re.split(r"^[ -]*---[ -]*$", box, flags=re.MULTILINE)
    sentence = " ".join(parts[min(1, len(parts) - 1)].split()) or "the flags could not be read; see --help"
    for theirs, ours in _PLAIN_WORDS:
        sentence = re.sub(f"^{theirs}", ours, sentence, flags=re.DOTALL)
    return sentence


def run(
    options: type[Options],
    main: Callable[[Options], dict[str, Any] | None],
    *,
    defaults: Callable[[list[str]], Options] | None = None,
) -> NoReturn:
    """Parse sys.argv, call main, print, exit.

    Args:
        defaults: makes the default options out of the raw arguments (a recipe's values, say).
    """
    program = sys.argv[0] if sys.argv[0].startswith("minigpt ") else Path(sys.argv[0]).name
    argv = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):  # half a character in an answer must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in stop_signals()[1:]:  # as an exception, so that temporary files are cleared away
        signal.signal(number, _terminate)
    # Torch's threads wait for each other by spinning. Where another program holds a core, 300,000 turns (the
    # OpenMP library's own number) cost up to five sixths of the speed; 10,000 cost 2 to 5 % where none does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # At its exit Python would look for garbage in all that torch made, for half a second.
    atexit.register(gc.freeze)
    code, complaint = 0, ""
    try:
        _check_flags(options, argv)  # before defaults, which may take a while or print
        default = defaults(argv) if defaults else None
        with _source_of(main):
            chosen = parse(options, argv, default)
        with _warnings_in_one_line():
            result = main(chosen)
        if chosen.json:
            print(_json_line(result or {}))
        sys.stdout.flush()
    except InputError as error:
        code, complaint = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, complaint = 130, "interrupted"
    except _Terminated as stop:
        code, complaint = stop.code, "terminated"
    except BrokenPipeError:  # nobody is left to tell
        code = 141
    except OSError as error:
        code, complaint = 2, f"error: {_os_error(error)}"
    finally:
        _empty(sys.stdout)
    if complaint:
        with contextlib.suppress(OSError):
            print(printable(f"{program}: {' '.join(complaint.split())}"), file=sys.stderr)
    _empty(sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def _source_of(main: Callable[..., Any]) -> Iterator[None]:
    """Let tyro find the help texts: it looks in __main__'s file, another one under `minigpt VERB`."""
    module = sys.modules["__main__"]
    before = getattr(module, "__file__", None)
    module.__file__ = main.__code__.co_filename
    try:
        yield
    finally:
        module.__file__ = before


class _Terminated(SystemExit):
    """SIGTERM or SIGUSR1 came; like KeyboardInterrupt, it passes through `except Exception`."""

    code: int


def _terminate(signum: int, frame: object) -> NoReturn:
    raise _Terminated(128 + signum)


def stop_signals() -> list[signal.Signals]:
    """Those that ask a program to stop: Ctrl-C's, SIGTERM, and SIGUSR1 where the system has it."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


_remembered: list[int] = []  # that came inside `remembered_signals`


@contextlib.contextmanager
def remembered_signals() -> Iterator[None]:
    """Signals raise what they raised before, and are obeyed in the end if that did not get through.

    Libraries written in C may swallow the exception, or make another one of it: importing torch loses some
    KeyboardInterrupts, and one that came while safetensors and torch read a file became "could not determine
    the shape of object type ...".
    """
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
    """For imports that make half a million objects: no search for garbage meanwhile, or among them later."""
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
    """Write out a stream's buffer; where that fails, into nothing, or Python would fail again at its exit."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _json_line(result: dict[str, Any]) -> str:
    # Chinese stays readable where stdout can hold it; stdout itself escapes a lone surrogate, as JSON would
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    line = json.dumps(_json_ready(result), ensure_ascii=ascii_only, allow_nan=False)
    # JSON may hold these, but to str.splitlines and others a line would end there
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
