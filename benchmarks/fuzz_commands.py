"""Command lines, streams and signals for fuzz.py: each in a forked process that has imported minigpt."""

import contextlib
import dataclasses
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.fuzz_mutations import NUMBERS, TEXTS
from minigpt import __main__ as command

__all__ = ["PROCESSES", "Processes", "Workplace"]

SMALL: dict[str, Any] = {
    "n_embd": 8,
    "n_head": 2,
    "n_layer": 1,
    "max_steps": 1,
    "batch_size": 2,
    "device": "cpu",
    "threads": 1,
}
PAIRS = {"train_data": "data.jsonl", "val_data": "data.jsonl"}
MODEL = {"model": "model", "device": "cpu", "threads": 1}
# verb -> flags that make it quick; positional arguments under ""
BASES: dict[str, list[dict[str, Any]]] = {
    "vocab": [{"data": "data.jsonl", "output": "new.json"}],
    "split": [{"input": "data.jsonl", "train_ratio": 0.5, "output_dir": "new"}],
    "stats": [{"train_data": "data.jsonl", "vocab_path": "vocab.json"}],
    "train": [
        {**PAIRS, "vocab_path": "vocab.json", **SMALL, "max_length": 32, "output": "new"},
        {"text": "text.txt", **SMALL, "block_size": 16, "output": "new", "family": "qwen3", "head_dim": 8},
    ],
    "finetune": [
        {
            **PAIRS,
            "model": "model",
            "max_steps": 1,
            "batch_size": 2,
            "device": "cpu",
            "threads": 1,
            "output": "new",
            "method": "lora",
        }
    ],
    "classify": [{"model": "classes", "text": "好", "device": "cpu", "threads": 1}],
    "eval": [{**MODEL, "data": "data.jsonl", "max_new_tokens": 2}],
    "look": [{**MODEL, "": ["tokens"], "text": "你好"}, {**MODEL, "": ["parameters"]}],
    "plot": [{"": ["run"]}],
    "compare": [{"": ["model", "model"], "task": "task.jsonl", "device": "cpu", "threads": 1}],
    "doctor": [{"": ["run"], "deep": False}],
    "generate": [{**MODEL, "question": "再见", "max_new_tokens": 2}],
    "fill": [{**MODEL, "text": "好"}],
    "chat": [{**MODEL, "max_new_tokens": 2}],
    "merge": [{"adapter": "adapter", "output": "new"}],
    "quantize": [{"model": "model", "output": "new"}],
    "import": [{"": ["old.pth"], "vocab": "vocab.json", "output": "new"}],
    "convert": [{"model": "model", "output": "new.gguf"}],
    "env": [{}],
    "quickstart": [{"": ["missing.jsonl"]}],
    "experiment": [{"": ["missing"]}],
}
FIXED = {
    "max_steps",
    "num_train_epochs",
    "pretraining_epochs",
    "max_new_tokens",
    "device",
    "gradient_accumulation_steps",  # a million of them take the time of a million
    "head_dim",  # likewise
    "size",
    "wait",
    "deep",
}
PATHS = (
    "data.jsonl",
    "vocab.json",
    "model",
    "run",
    "new",
    "missing",
    "old.pth",
    "text.txt",
    "task.jsonl",
    "/dev/null",
    "/proc",
    ".",
)
SECONDS = 60.0  # most on the clock
PROCESSOR = 5.0  # most seconds of processor time of a command whose flags are drawn


class Workplace:
    """A folder with a model, a run and data, made new for each command."""

    def __init__(self, seeds: Path, scratch: Path) -> None:
        self.seeds, self.folder = seeds / "_work", scratch / "place"

    def make(self) -> None:
        """Make the folder. Files that no command changes are links."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name in ("data.jsonl", "vocab.json", "text.txt"):
            shutil.copyfile(self.seeds / name, self.folder / name)
        shutil.copyfile(self.seeds / "document.pth", self.folder / "old.pth")
        (self.folder / "task.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 1}\n' * 2)
        for name, source in (
            ("model", "run/best"),
            ("adapter", "lora/best"),
            ("run", "run"),
            ("classes", "classes/best"),
        ):
            (self.folder / name).symlink_to(self.seeds / source)


def hints_of(verb: str) -> dict[str, Any]:
    """The flags of a verb, with their types."""
    module = command.COMMANDS[verb][0]
    path = Path(command.__file__).parent.parent / f"{module.replace('.', '/')}.py"
    found = runpy.run_path(str(path), run_name="options")
    options: type = found[{"train": "TrainConfig", "finetune": "FinetuneConfig"}.get(verb, "Options")]
    hints = typing.get_type_hints(options)
    return {one.name: hints[one.name] for one in dataclasses.fields(options)}


def value_for(rng: random.Random, hint: Any) -> list[str]:
    """A value for a flag, mostly of its type, as words."""
    if rng.random() < 0.12:
        return [clean(rng.choice((*TEXTS, *map(str, NUMBERS[:30]), "-x", "--", "@file", "[]", "{}")))]
    if isinstance(hint, types.UnionType):
        hint = rng.choice([one for one in typing.get_args(hint) if one is not types.NoneType])
    if typing.get_origin(hint) is tuple:
        return [
            word for _ in range(rng.choice((1, 2, 3))) for word in value_for(rng, typing.get_args(hint)[0])
        ]
    if typing.get_origin(hint) is Literal:
        return [str(rng.choice(typing.get_args(hint)))]
    if hint is bool:
        return []
    if hint is int:
        return [
            str(
                rng.choice(
                    (
                        *(0, 1, 2, 3, 5, 16, 1000),
                        *(one for one in NUMBERS if isinstance(one, int) and one < 10**300),
                    )
                )
            )
        ]
    if hint is float:
        return [
            str(
                rng.choice(
                    (0, 0.5, 1, 1e-3, *(one for one in NUMBERS if not isinstance(one, int) or one < 10**300))
                )
            )
        ]
    if hint is Path:
        return [rng.choice(PATHS)]
    return [clean(rng.choice((*TEXTS, *PATHS)))]


def clean(text: str) -> str:
    """A text that may stand in a command line: without NUL; a surrogate there is a byte that is no UTF-8."""
    return text.replace("\0", "0").replace("\ud800", "\udcff")


def words_of(verb: str, flags: dict[str, Any]) -> list[str]:
    """A command line."""
    found = [verb, *map(str, flags.get("", []))]
    for name, value in flags.items():
        if name == "" or value is False:
            found += [f"--no-{name}"] if value is False and name else []
            continue
        found.append(f"--{name}")
        found += value if isinstance(value, list) else [] if value is True else [str(value)]
    return found


def stream(number: int, mode: str) -> typing.TextIO:
    """A stream as Python opens it at its start."""
    errors = "surrogateescape" if mode == "r" else "backslashreplace" if number == 2 else "strict"
    found: Any = open(number, mode, 1 if number == 2 else -1, "utf-8", errors, closefd=False)  # noqa: SIM115
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class End:
    """How a command ended."""

    status: int  # of waitpid
    out: bytes
    err: bytes
    seconds: float  # of processor time
    hung: bool


def start(
    arguments: list[str], place: Path, before: Callable[[], None], during: Callable[[int], None]
) -> End:
    """Run a command in a forked process, in the folder `place`.

    Args:
        before: is called in it, to change its streams.
        during: is called with its number, in this process.
    """
    out, err = place.parent / "out", place.parent / "err"
    for path in (out, err):  # a process that a signal ends at once must not seem to have said these words
        path.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            os.chdir(place)
            sys.stdin = stream(os.open(os.devnull, os.O_RDONLY), "r")
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            sys.stdout = stream(1, "w")
            sys.stderr = stream(2, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup
            # a forked process cannot make torch's threads anew; its own has one thread
            torch.set_num_threads = lambda nthreads: None
            before()
            code = command.main(arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 71
        except BaseException:
            code = 1
            with contextlib.suppress(BaseException):
                traceback.print_exc()
        finally:
            for one in (sys.stdout, sys.stderr):
                with contextlib.suppress(BaseException):
                    one.flush()
            os._exit(code)
    begin, hung = time.monotonic(), False
    during(process)
    pause = 0.002
    while True:
        ended, status, used = os.wait4(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - begin > SECONDS:
            hung = True
            os.kill(process, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 1.3, 0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    return End(status, out.read_bytes() if out.exists() else b"", err.read_bytes() if err.exists() else b"",
               used.ru_utime + used.ru_stime, hung)  # fmt: skip


class Inputs:
    """Makes command lines, runs them, and judges how they end."""

    watched = False  # the clock and each command's own processor time are looked at here

    def __init__(self, place: Workplace, seed: int) -> None:
        self.place, self.seed = place, seed
        # torch.compile takes a minute, and says so
        self.hints = {
            verb: {name: hint for name, hint in hints_of(verb).items() if name != "compile"} for verb in BASES
        }

    def run(self, number: int) -> Any:
        from benchmarks.fuzz import Outcome

        rng = random.Random(f"{type(self).__name__}:{self.seed}:{number}")
        self.place.make()
        kind, detail, trace = self.judge(rng)
        return Outcome(kind, detail, trace)

    def judge(self, rng: random.Random) -> tuple[str, str, str]:
        """Make an input from the generator. Returns the kind of its outcome, details, what was printed."""
        raise NotImplementedError

    def keep(self, number: int, goal: Path) -> None:
        """Nothing is kept: the command line is in the details."""


class Flags(Inputs):
    """Random flags and values of every verb."""

    def judge(self, rng: random.Random) -> tuple[str, str, str]:
        verb = rng.choice(list(BASES))
        flags = dict(rng.choice(BASES[verb]))
        hints = self.hints[verb]
        for name in rng.sample(sorted(hints), min(len(hints), rng.choice((1, 1, 2, 3)))):
            if name not in FIXED or (rng.random() < 0.1 and name != "max_steps"):
                flags[name] = True if hints[name] is bool else value_for(rng, hints[name])
        if flags and rng.random() < 0.1:
            del flags[rng.choice([name for name in flags if name not in FIXED] or list(flags))]
        words = words_of(verb, flags)
        if rng.random() < 0.1:
            words.insert(
                rng.randrange(len(words) + 1),
                clean(rng.choice((*TEXTS, "--", "-h", "--lr", "---", "-", "--json=1"))),
            )
        if rng.random() < 0.3:
            words.append("--json")
        end = start(words, self.place.folder, lambda: None, lambda process: None)
        return judged(end, words, (0, 2))


def judged(end: End, words: list[str], codes: tuple[int, ...]) -> tuple[str, str, str]:
    """The outcome of a command that may end with one of some exit codes."""
    shown = " ".join(map(repr, words))
    text = end.err.decode("utf-8", "replace")
    if end.hung or end.seconds > PROCESSOR + 1:
        return "hang", f"{end.seconds:.1f} s: {shown}", text
    if os.WIFSIGNALED(end.status):
        return "crash", f"signal {os.WTERMSIG(end.status)}: {shown}", text
    code = os.WEXITSTATUS(end.status)
    last = text.strip().splitlines()[-1:] or [""]
    if code not in codes:
        return "exception", f"exit code {code}: {last[0][:200]}: {shown}", text
    wrong = [
        line
        for line in text.splitlines()
        if not re.match(r"(minigpt( \w+)?: (error: |错误：)|warning: |note: |.*\.\.\.|\S)", line)
    ]
    errors = [line for line in text.splitlines() if re.match(r"minigpt( \w+)?: (error: |错误：)", line)]
    if "Traceback" in text or (code == 2 and len(errors) != 1 and "usage" not in text) or wrong:
        return "exception", f"exit code {code}, {len(errors)} lines of errors: {last[0][:200]}: {shown}", text
    if b"\x1b" in end.err or "\u202e" in text + end.out.decode("utf-8", "replace"):
        return "exception", f"a terminal code was printed: {shown}", text
    if (
        code == 0
        and "--json" in words
        and words.index("--json")
        and "-h" not in words
        and not ends_in_json(end.out)
    ):
        return "exception", f"the last line is no JSON: {shown}", text
    return "same" if code == 0 else "refused", last[0], text


def ends_in_json(out: bytes) -> bool:
    try:
        return isinstance(
            json.loads(out.decode("utf-8", "surrogateescape").rstrip("\n").rpartition("\n")[2]), dict
        )
    except ValueError:
        return False


class Streams(Inputs):
    """Standard streams that are closed, full, broken, or bytes without meaning."""

    def judge(self, rng: random.Random) -> tuple[str, str, str]:
        verb = rng.choice([verb for verb in BASES if verb not in ("quickstart", "experiment")])
        words = words_of(verb, rng.choice(BASES[verb]))
        if rng.random() < 0.5:
            words.append("--json")
        if rng.random() < 0.2:
            words = [verb, "--help"]
        states = {
            number: rng.choice(("as it is", "as it is", "closed", "full", "broken", "bytes"))
            for number in (0, 1, 2)
        }
        noise = self.place.folder.parent / "noise"
        noise.write_bytes(rng.randbytes(200) + b"\n/temperature x\n" + rng.randbytes(20))

        def before() -> None:
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                match states[number]:
                    case "closed":
                        os.close(number)
                        setattr(sys, name, None)
                    case "full" if number:
                        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
                    case "broken" if number:
                        reading, writing = os.pipe()
                        os.dup2(writing, number)
                        os.close(writing)
                        os.close(reading)
                    case "bytes" if not number:
                        os.dup2(os.open(noise, os.O_RDONLY), 0)
                        sys.stdin = stream(0, "r")
                if number and states[number] != "closed":  # the object knows what kind of file it has
                    setattr(sys, name, stream(number, "w"))

        end = start(words, self.place.folder, before, lambda process: None)
        silent = words[0] == "chat" and states[0] != "bytes"  # it has nothing to print
        codes = {"as it is": (0, 2), "bytes": (0, 2), "closed": (2,), "full": (2,), "broken": (141, 2, 0)}[
            states[1]
        ]
        if states[1] in ("closed", "full"):
            codes = (0, 2) if silent else (2,)
        text = end.err.decode("utf-8", "replace")
        shown = f"{states} {' '.join(words)}"
        if end.hung or end.seconds > PROCESSOR + 1:
            return "hang", shown, text
        if os.WIFSIGNALED(end.status):
            return "crash", f"signal {os.WTERMSIG(end.status)}: {shown}", text
        code = os.WEXITSTATUS(end.status)
        if code not in codes or "Traceback" in text:
            return "exception", f"exit code {code}: {text[-200:]!r}: {shown}", text
        return "same" if code in (0, 141) else "refused", shown, text


class Signals(Inputs):
    """SIGINT, SIGTERM, SIGUSR1 and SIGHUP at random moments of commands that take time."""

    def judge(self, rng: random.Random) -> tuple[str, str, str]:
        verb = rng.choice(
            (
                "train",
                "train",
                "train",
                "finetune",
                "eval",
                "vocab",
                "generate",
                "stats",
                "quantize",
                "compare",
            )
        )
        flags = dict(rng.choice(BASES[verb]))
        if verb in ("train", "finetune"):
            flags |= {"max_steps": 10_000, "eval_steps": 50}
        if verb in ("vocab", "stats"):
            self.place.folder.joinpath("data.jsonl").write_bytes(
                (self.place.seeds / "data.jsonl").read_bytes() * 2000
            )
        words = words_of(verb, flags)
        number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
        wait = per_octave(rng, 0.02, 1.5)

        def during(process: int) -> None:
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

        # before `run` sets its handlers, a signal's default action ends the process
        end = start(words, self.place.folder, lambda: None, during)
        text = end.err.decode("utf-8", "replace")
        shown = f"{number.name} after {wait:.3f} s: {' '.join(words)}"
        if end.hung:
            return "hang", shown, text
        if os.WIFSIGNALED(end.status):
            early = os.WTERMSIG(end.status) == number and not end.err and not end.out
            return ("refused" if early else "crash"), shown, text
        code = os.WEXITSTATUS(end.status)
        if code not in (0, 128 + number) or "Traceback" in text:
            return "exception", f"exit code {code}: {text[-200:]!r}: {shown}", text
        return ("same" if code == 0 else "refused"), shown, text


def per_octave(rng: random.Random, low: float, high: float) -> float:
    """A number between two, as likely per octave."""
    return float(low * (high / low) ** rng.random())


@dataclass(frozen=True)
class Processes:
    """A kind of inputs that run commands."""

    name: str
    words: str
    make: Callable[[Workplace, int], Inputs]
    share: float
    most: int  # how many at most: they are slow


PROCESSES = [
    Processes("flags", "command lines with flags drawn at random", Flags, 0.5, 10_000),
    Processes("streams", "streams that are closed, full or broken", Streams, 0.2, 1500),
    Processes("signals", "signals at random moments", Signals, 0.1, 500),
]
