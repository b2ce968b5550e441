"""Does training survive? Kill it, signal it, damage its files, fill its disk, feed it NaN; then count.

    python benchmarks/survival.py --toy                 # what the tests run: under a minute on one core
    python benchmarks/survival.py --full --output benchmarks/results/NAME.json
    python benchmarks/survival.py --kills 500 --only kill signal

Every run is `minigpt train` itself, through its door, on a tiny model; each runs in a fork of this process,
which has imported torch but never computed with it, so that starting one takes a tenth of a second. Runs are
killed and resumed in chains: the same run is killed again and again until the count is full, then it may
finish, and must equal, by hash, the run that nobody disturbed: weights, optimiser, random states, training
state, metrics (without the clock's fields).

Printed are one row a promise (trials, how many held) and one JSON object. Exit code 1 if one did not hold.
"""

import argparse
import contextlib
import datetime
import errno
import gc
import hashlib
import itertools
import json
import math
import mmap
import os
import platform
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the optimisers load it, the door loads tyro: every child would anew
import tyro  # noqa: F401
from safetensors.torch import load_file

from minigpt import command_line, files, train
from minigpt.data.batches import BatchPlan
from minigpt.terminal import table
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training import checkpoint, report, run_data, step
from minigpt.training.config import TrainConfig
from minigpt.training.loop import Trainer

with contextlib.suppress(ImportError):  # or every child would import it again
    import torch.utils.tensorboard

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LIMIT = 5.0  # seconds from a signal to the exit
EVERY = 2  # steps between checkpoints
PARTS = ("kill", "signal", "damage", "disk", "numbers", "order", "cost", "processes", "sharded")
COUNTS = {  # part -> how many trials: --toy, --full
    "kills": (20, 500),
    "signals": (20, 200),
    "flips": (1000, 1000),
    "bad_steps": (100, 100),
    "resumes": (1000, 1000),
    "megabytes": (16, 1024),
    "lost": (2, 20),  # processes of several that are killed
}

Prepare = Callable[[], None]


class Table:
    """What was promised, how often it was tried, how often it held."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, part: str, what: str, trials: int, held: int, **more: Any) -> None:
        """One row."""
        self.rows.append({"part": part, "what": what, "trials": trials, "held": held, **more})
        print(f"  {part}: {what}: {held} of {trials} {more or ''}", file=sys.stderr, flush=True)


# -- runs in children ---------------------------------------------------------------------------------------


class Watch:
    """Memory that parent and child share: the child's phase, its last step, when it was signalled."""

    PHASES = (
        "elsewhere",
        "reading",
        "resuming",
        "estimating",
        "training",
        "evaluating",
        "saving",
        "answering",
    )

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self.set(0, -1, 0.0)

    def set(self, phase: int, steps: int, signalled: float) -> None:
        """From both sides; nothing here needs a lock, since one side only writes at a time."""
        self._memory[:24] = struct.pack("qqd", phase, steps, signalled)

    def get(self) -> tuple[int, int, float]:
        """Phase, steps done (-1: none by this process), when a child signalled itself (0: it did not)."""
        phase, steps, signalled = struct.unpack("qqd", self._memory[:24])
        return phase, steps, signalled


WATCH = Watch()


def watched(strike: str = "") -> None:
    """In a child: note phases and steps in WATCH; on entering the phase `strike`, send SIGTERM to itself."""

    def wrap(owner: Any, name: str, phase: str) -> None:
        real = getattr(owner, name)
        number = Watch.PHASES.index(phase)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before, steps, signalled = WATCH.get()
            if phase == strike and not signalled:
                signalled = time.monotonic()
                WATCH.set(number, steps, signalled)
                os.kill(os.getpid(), signal.SIGTERM)
            WATCH.set(number, steps, signalled)
            result = real(*args, **kwargs)
            _, steps, signalled = WATCH.get()
            WATCH.set(before, steps, signalled)
            return result

        setattr(owner, name, wrapper)

    real_step = Trainer.step

    def counted(self: Trainer) -> dict[str, float]:
        numbers = real_step(self)
        WATCH.set(WATCH.get()[0], self.steps_done, WATCH.get()[2])
        return numbers

    replace("step", counted)
    wrap(run_data, "read_data", "reading")
    wrap(Trainer, "resume", "resuming")
    wrap(report, "estimate", "estimating")
    wrap(Trainer, "_gradient", "training")
    wrap(step, "evaluate_loss", "evaluating")
    wrap(checkpoint, "save", "saving")
    wrap(run_data.RunData, "sample", "answering")


def replace(name: str, method: Callable[..., Any]) -> None:
    """In a child: another method for Trainer."""
    setattr(Trainer, name, method)


def start(argv: list[str], log: Path, prepare: Prepare | None = None) -> int:
    """`minigpt train ARGV` in a child; returns its process id. `prepare` is called in the child first."""
    WATCH.set(0, -1, 0.0)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child can answer
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return child
    code = 1
    try:
        for number in SIGNALS:  # before the door has its own: nothing is lost
            signal.signal(number, lambda signum, _: os._exit(128 + signum))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["minigpt train", *argv]
        if prepare is not None:
            prepare()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command_line.run(TrainConfig, train.main, defaults=train.defaults)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def finished(child: int) -> int:
    """Wait for a child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_several(
    argv: list[str], logs: list[Path], prepare: Callable[[int], None] | None = None, restart: int = 0
) -> list[int]:
    """`minigpt train ARGV` in several children that know of each other, as torchrun starts them.

    Args:
        logs: one a process.
        prepare: called in each child first, with its rank.
        restart: how often they have been started before.
    """
    port = free_port()

    def known(rank: int) -> Prepare:
        def set_environment() -> None:
            here: dict[str, Any] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": len(logs),
                "MASTER_PORT": port,
            }
            here |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": restart}
            os.environ.update({name: str(value) for name, value in here.items()})
            os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
            if prepare is not None:
                prepare(rank)

        return set_environment

    return [start(argv, log, known(rank)) for rank, log in enumerate(logs)]


def stopped(children: list[int], patience: float = 5.0) -> list[int]:
    """Wait for processes of which one may be gone; then end them, as torchrun does. Their exit codes.

    Who had met the others notices at once; who was still waiting for the dead one waits for minutes.
    """
    codes: dict[int, int] = {}
    end = math.inf
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            if (done := os.waitpid(child, os.WNOHANG)) != (0, 0):
                codes[child] = os.waitstatus_to_exitcode(done[1])
                end = time.monotonic() + patience
        if time.monotonic() > end:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            end = math.inf
        time.sleep(0.02)
    return [codes[child] for child in children]


def at_step(number: int, act: Callable[[], None]) -> None:
    """In a child: act right before a step is computed."""
    real = Trainer._gradient

    def acting(self: Trainer, batches: list[Any]) -> tuple[float, float]:
        if self.steps_done == number:
            act()
        return real(self, batches)

    replace("_gradient", acting)


class Runs:
    """A folder with a tiny data set, and runs on it."""

    def __init__(self, folder: Path, max_steps: int, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        folder.mkdir()
        things, colours = "天地日月山水花草木石火土", ("黑", "土黄", "红", "雪白", "青", "天蓝", "淡淡的紫")
        pairs = [(f"{t}是什么颜色？", f"{t}是{colours[i % 7]}色。") for i, t in enumerate(things)]
        lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs]
        (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "val.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
        Tokenizer.from_word2id(build_vocabulary(q + a for q, a in pairs)).save(folder / "vocab.json")
        self.settings: dict[str, Any] = {
            "recipe": "qa-cpu", "train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl",
            "vocab_path": folder / "vocab.json", "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32,
            "max_length": 32, "batch_size": 5, "dropout": 0.1, "learning_rate": 1e-3, "warmup_steps": 0,
            "max_steps": max_steps, "eval_steps": EVERY, "logging_steps": 1, "threads": 1, "device": "cpu",
        }  # fmt: skip
        self.log = folder / "log"

    def argv(self, output: str, **more: Any) -> list[str]:
        """The flags of a run: all of them, or --resume where one has begun."""
        goal = self.folder / output
        if (goal / "run.json").exists():
            return ["--output", str(goal), "--resume"]
        return [
            part
            for name, value in {**self.settings, **more, "output": goal}.items()
            for part in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
        ]

    def run(self, output: str, prepare: Prepare | None = None, **more: Any) -> int:
        """Start, or resume, and wait."""
        return finished(start(self.argv(output, **more), self.log, prepare))

    def config(self, output: str, **more: Any) -> TrainConfig:
        """The same as a configuration."""
        return TrainConfig(**{**self.settings, "output": self.folder / output, **more})

    def said(self) -> str:
        """What the last child said, for a failure."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:] if self.log.exists() else ""


def digest(output: Path) -> str:
    """SHA-256 over all that a run ends with and that no clock decides."""
    last, total = output / "last", hashlib.sha256()
    files.verify_manifest(last)
    for path in sorted(last.glob("*.safetensors")):
        total.update(path.read_bytes())
    state = json.loads((last / "training_state.json").read_text(encoding="utf-8"))
    for key in ("train_seconds", "config"):
        del state[key]
    total.update(json.dumps(state, sort_keys=True).encode())
    for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")}
        total.update(json.dumps(values).encode())
    return total.hexdigest()


def at_point(point: str, act: Callable[[], None]) -> Prepare:
    """In a child: act the first time that writing passes a named point."""

    def prepare() -> None:
        def hook(name: str) -> None:
            if name == point:
                files.step_hook = lambda name: None
                act()

        files.step_hook = hook

    return prepare


def die() -> None:
    """As a power cut does, but for the disk's cache."""
    os.kill(os.getpid(), signal.SIGKILL)


def newest_step(output: Path) -> int:
    """The step of the newest checkpoint that verifies; -1: there is none."""
    for folder in checkpoint.list_checkpoints(output):
        if checkpoint.verifies(folder):
            return int(folder.name.removeprefix("step-"))
    return -1


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# -- the parts ----------------------------------------------------------------------------------------------


class Survival:
    """All parts, on one set of runs."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options, self.table = options, Table()
        self.random = random.Random(options.seed)
        self.runs = Runs(folder / "runs", options.steps, options.seed)
        self.points: list[str] = []

    def reference(self) -> tuple[str, float]:
        """The undisturbed run: its end, and its seconds. Notes the points that writing passes."""
        record = self.runs.folder / "points"

        def recording() -> None:
            descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            files.step_hook = lambda point: void(os.write(descriptor, f"{point}\n".encode()))

        began = time.monotonic()
        code = self.runs.run("reference", recording)
        assert code == 0, self.runs.said()
        seconds = time.monotonic() - began
        seen = dict.fromkeys(record.read_text(encoding="utf-8").splitlines())
        # passed only where a checkpoint of the same step is there already
        self.points = [*seen, "old one: set aside", "old one: deleted"]
        self.points.sort(key=lambda point: not point.startswith("best"))  # while the loss still falls
        return digest(self.runs.folder / "reference"), seconds

    def chain(
        self, name: str, trials: list[Any], one: Callable[[Path, Any], bool | None], **more: Any
    ) -> int:
        """Disturb runs until all trials are through; each run must end as the reference did.

        A trial that says None came too late, when the run had ended: it is tried again in half the time.

        Returns: how many trials held. Those of a run that ends otherwise did not.
        """
        held, in_this, number = 0, 0, 0
        queue = list(trials)
        while queue:
            output = self.runs.folder / f"{name}-{number}"
            number += 1
            while queue and not self.is_done(output):
                result = one(output, queue[0])
                if result is None:
                    queue[0] /= 2
                else:
                    in_this += result
                    queue.pop(0)
            code = 0 if self.is_done(output) else self.runs.run(output.name, **more)
            same = code == 0 and digest(output) == self.expected
            if not same:
                print(f"{output.name}: exit {code}, differs: {self.runs.said()}", file=sys.stderr)
            held += in_this if same else 0
            in_this = 0
            shutil.rmtree(output, ignore_errors=True)
        return held

    def is_done(self, output: Path) -> bool:
        """The run has reached its end."""
        path = output / f"step-{self.options.steps:08d}" / "training_state.json"
        return path.exists() and bool(json.loads(path.read_bytes())["evaluated"])

    def damage_newest(self, output: Path) -> None:
        """So that its step is reached, and saved, once more."""
        folders = checkpoint.list_checkpoints(output)
        if len(folders) > 1 and checkpoint.verifies(folders[1]):
            flip(folders[0] / "rng.safetensors", 4000)

    def kill(self) -> None:
        """SIGKILL at every named point, and at random instants."""

        def at(output: Path, point: str) -> bool:
            if point.startswith("old one"):
                while len(checkpoint.list_checkpoints(output)) < 2:
                    self.runs.run(output.name, at_point("folder: parent flushed", die))
                self.damage_newest(output)
            return self.runs.run(output.name, at_point(point, die)) == -signal.SIGKILL

        held = self.chain("points", self.points, at)
        self.table.add("kill", "SIGKILL at each named point of writing", len(self.points), held)
        background = self.points if self.options.full else self.points[:: max(1, len(self.points) // 10)]
        held = self.chain("async", background, lambda o, p: self.async_at(o, p), save_async=True)
        self.table.add("kill", "the same, with --save_async", len(background), held)

        def anywhere(output: Path, instant: float) -> bool | None:
            child = start(self.runs.argv(output.name), self.runs.log)
            time.sleep(instant)
            os.kill(child, signal.SIGKILL)
            code = finished(child)
            return None if code == 0 else code == -signal.SIGKILL

        # long enough that a few checkpoints are written, of which the run consists
        longest = self.seconds * min(1.0, 20 * EVERY / self.options.steps)
        instants = [self.random.uniform(0, longest) for _ in range(self.options.kills)]
        held = self.chain("random", instants, anywhere)
        self.table.add("kill", "SIGKILL at random instants", len(instants), held)

    def async_at(self, output: Path, point: str) -> bool:
        """A kill with a background save; where the point is not passed, the run just ends."""
        if point.startswith("old one"):
            self.damage_newest(output)
        return self.runs.run(output.name, at_point(point, die), save_async=True) in (-signal.SIGKILL, 0)

    def signals(self) -> None:
        """SIGTERM, SIGINT and SIGUSR1 at random instants and in every phase."""
        slowest, phases = 0.0, dict.fromkeys(Watch.PHASES, 0)

        def judged(output: Path, code: int, number: int, seconds: float, before: int) -> bool:
            nonlocal slowest
            phase, steps, _ = WATCH.get()
            slowest = max(slowest, seconds)
            phases[Watch.PHASES[phase]] += 1
            kept = newest_step(output) == max(steps, before)  # no step is lost
            held = kept and seconds <= LIMIT and code in (128 + number, 0)
            if not held:
                said = self.runs.said()[-400:]
                print(f"signal {number}: {code}, {seconds:.1f} s, {phase}, {steps}; {said}", file=sys.stderr)
            return held

        def anywhere(output: Path, trial: tuple[float, signal.Signals]) -> bool:
            instant, number = trial
            before = newest_step(output)
            child = start(self.runs.argv(output.name), self.runs.log, watched)
            time.sleep(instant)
            sent = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            code = finished(child)
            return judged(output, code, number, time.monotonic() - sent, before)

        def inside(output: Path, phase: str) -> bool:
            if phase == "resuming" and not (output / "run.json").exists():
                self.runs.run(output.name, at_point("pruning: begun", die))
            before = newest_step(output)
            code = self.runs.run(output.name, lambda: watched(phase))
            seconds = time.monotonic() - WATCH.get()[2]
            return judged(output, code, signal.SIGTERM, seconds, before) and code == 128 + signal.SIGTERM

        wanted = [phase for phase in Watch.PHASES if phase != "elsewhere"]
        held = self.chain("phases", wanted, inside)
        self.table.add("signal", "SIGTERM in each phase", len(wanted), held)
        trials = [
            (self.random.uniform(0, self.seconds), SIGNALS[n % len(SIGNALS)])
            for n in range(self.options.signals)
        ]
        held = self.chain("signals", trials, anywhere)
        what = f"signals at random instants: saved, no step lost, exit within {LIMIT:.0f} s"
        self.table.add("signal", what, len(trials), held, slowest=round(slowest, 2), phases=phases)

    def damage(self) -> None:
        """Flipped bits; files that are cut, gone, additional, renamed: noticed; the one before is used."""
        output = self.runs.folder / "damaged"
        shutil.copytree(self.runs.folder / "reference", output, symlinks=True)
        newest, older = checkpoint.list_checkpoints(output)[:2]
        whole = {path: path.read_bytes() for path in sorted(newest.iterdir())}

        def noticed() -> bool:
            snapshot, passed_over = checkpoint.read_newest(output)
            return snapshot.folder == older and passed_over[0].startswith(f"{newest.name} passed over: ")

        held, sizes = 0, [len(content) for content in whole.values()]
        for _ in range(self.options.flips):
            (path,) = self.random.choices(list(whole), weights=[math.sqrt(size) for size in sizes])
            flip(path, self.random.randrange(8 * len(whole[path])))
            held += noticed()
            path.write_bytes(whole[path])
        self.table.add("damage", "one flipped bit in any file: noticed", self.options.flips, held)

        trials = held = 0
        for path, content in whole.items():
            for wrong in (content[:-1], content[: len(content) // 2], b"", content + b"\0", None):
                path.unlink() if wrong is None else path.write_bytes(wrong)
                trials, held = trials + 1, held + noticed()
                path.write_bytes(content)
            path.rename(newest / f"{path.name}.bak")
            trials, held = trials + 1, held + noticed()
            (newest / f"{path.name}.bak").rename(path)
        (newest / "more").touch()
        trials, held = trials + 1, held + noticed()
        (newest / "more").unlink()
        self.table.add("damage", "cut, missing, additional, renamed files: noticed", trials, held)

        for stranger in ("step-100.backup", "step-00000100.backup", "step-00000100-old", ".step-1.tmp-x"):
            shutil.copytree(older, output / stranger)
        (output / "step-99999999").symlink_to(newest.name)
        (output / "step-00000001").write_text("a file", encoding="utf-8")
        before = sorted(path.name for path in output.iterdir())
        first = checkpoint.read_newest(output)[0].folder == newest
        checkpoint.clear_leftovers(output)
        checkpoint.prune(output, 2)
        after = sorted(path.name for path in output.iterdir())
        self.table.add(
            "damage", "strangers' names and links: not used, not deleted", 1, int(first and after == before)
        )

        flip(newest / "config.json", 3)
        for name in ("best", "last"):
            checkpoint.set_link(output, name, newest)
        checkpoint.prune(output, 1)
        self.table.add(
            "damage", "the last whole checkpoint is never deleted", 1, int(newest_step(output) >= 0)
        )

    def disk(self) -> None:
        """Every write of a save fails once: the checkpoint before it stays whole, and the run can go on."""
        codes = (errno.ENOSPC, errno.EIO, errno.EROFS)

        def failing(output: Path, trial: tuple[str, int]) -> bool:
            point, number = trial

            def fail() -> None:
                raise OSError(number, os.strerror(number))

            if point.startswith("old one"):
                self.damage_newest(output)
            before = newest_step(output)
            code = self.runs.run(output.name, at_point(point, fail), on_save_error="stop")
            return code in (0, 2) and newest_step(output) >= before

        after = () if self.options.full else (": renamed", ": flushed", "parent flushed", ": deleted")
        points = [point for point in self.points if not point.endswith(after)] if after else self.points
        trials = [(point, codes[n % len(codes)]) for n, point in enumerate(points)]
        held = self.chain("failing", trials, failing, on_save_error="stop")
        self.table.add(
            "disk", "a failure at each point of writing: the old checkpoint is whole", len(trials), held
        )

        def too_large(output: Path, size: int) -> bool:
            before = newest_step(output)
            code = self.runs.run(
                output.name,
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
                on_save_error="stop",
            )
            return code in (0, 2) and newest_step(output) >= before

        size = (self.runs.folder / "reference" / "last" / "optimizer.safetensors").stat().st_size
        sizes = [1000, 3000, size // 2, size - 1] if size > 4000 else [size // 2]
        held = self.chain("limited", sizes, too_large, on_save_error="stop")
        self.table.add("disk", "the kernel refuses bytes in the middle of a file", len(sizes), held)

        def once(output: Path, point: str) -> bool:
            def fail() -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return self.runs.run(output.name, at_point(point, fail)) == 0

        some = [point for point in self.points if point.startswith(("folder", "manifest", "optimizer"))]
        some = [
            point for point in some if self.options.full or point.endswith(("filled", "renamed", "begun"))
        ]
        held = self.chain("going on", some, once)
        self.table.add(
            "disk", "--on_save_error continue: the run ends as if nothing had been", len(some), held
        )

    def numbers(self) -> None:
        """NaN and infinities in loss, gradient and data: no trace in any checkpoint."""
        count = self.options.bad_steps
        length = 3 * count
        bad: dict[int, str] = {}
        for number in self.random.sample(range(length), length):  # at most two in a row
            if len(bad) < count and not ({number - 2, number - 1} <= bad.keys()):
                neighbours = [
                    all(n in bad for n in range(s, s + 3) if n != number)
                    for s in (number - 2, number - 1, number)
                ]
                if not any(neighbours):
                    bad[number] = self.random.choice(("loss", "gradient", "data"))
        output = self.runs.folder / "numbers"
        # numbers from 0 of the steps; what `skipped` holds counts from 1
        code = self.runs.run(
            "numbers", lambda: poisoned(bad), max_steps=length, save_total_limit=length, eval_steps=10
        )
        state = json.loads((output / "last" / "training_state.json").read_bytes()) if code == 0 else {}
        skipped = {n - 1 for first, last in state.get("skipped", ()) for n in range(first, last + 1)}
        self.table.add(
            "numbers",
            "steps without a finite number: skipped",
            len(bad),
            len(skipped & bad.keys()),
            more_skipped=len(skipped - bad.keys()),
        )
        folders = checkpoint.list_checkpoints(output)
        held = sum(map(is_finite, folders))
        self.table.add("numbers", "checkpoints that such runs kept: finite", len(folders), held)

        first, second = EVERY * 3, EVERY * 6
        window = dict.fromkeys(range(first, first + 3), "loss")
        straight = self.runs.run("rolled", lambda: poisoned(window), max_steps=30)
        same, kills = self.killed_while_rolling_back(window)
        rolled = self.runs.folder / "rolled"
        state = json.loads((rolled / "last" / "training_state.json").read_bytes()) if straight == 0 else {}
        went = state.get("rollbacks") == 1 and state["skipped"] == [[first + 1, first + 3]]
        self.table.add("numbers", "three in a row: back to the last checkpoint, and on", 1, int(bool(went)))
        self.table.add("numbers", "killed around that, it ends on the same bits", kills, same)
        window |= dict.fromkeys(range(second, second + 3), "gradient")
        self.runs.log.unlink(missing_ok=True)
        code = self.runs.run("twice", lambda: poisoned(window), max_steps=30)
        named = "after going back once already" in self.runs.said() and "lines " in self.runs.said()
        self.table.add("numbers", "a second time: stops, naming lines", 1, int(code == 2 and named))

    def killed_while_rolling_back(self, window: dict[int, str]) -> tuple[int, int]:
        """Kill at points of the save after a rollback: how many runs end the same, and how many ran."""
        expected = digest(self.runs.folder / "rolled")
        points = (
            self.points
            if self.options.full
            else ["folder: made", "folder: flushed", "folder: renamed", "last: made"]
        )
        held = 0
        for number, point in enumerate(points):
            name = f"rolling-{number}"

            def prepare(point: str = point) -> None:
                poisoned(window)
                real = Trainer._roll_back

                def roll_back(self: Trainer, why: str) -> None:
                    at_point(point, die)()
                    real(self, why)

                Trainer._roll_back = roll_back  # type: ignore[method-assign]

            self.runs.run(name, prepare, max_steps=30)
            code = (
                self.runs.run(name, lambda: poisoned(window))
                if not is_done(self.runs.folder / name, 30)
                else 0
            )
            held += code == 0 and digest(self.runs.folder / name) == expected
            shutil.rmtree(self.runs.folder / name)
        return held, len(points)

    def order(self) -> None:
        """Batches after a resume are those of the run that went on; each sample comes once an epoch."""
        config = self.runs.config("order")
        data = run_data.read_data(config)
        assert isinstance(data, run_data.RunData)

        def plan() -> BatchPlan:
            return BatchPlan(data.train, batch_size=5, by_length=config.by_length, seed=config.seed)

        epochs = 40
        straight = plan()
        sequence = [straight.rows(number).tolist() for number in range(epochs * len(straight))]
        held = 0
        for _ in range(self.options.resumes):
            here = self.random.randrange(len(sequence) - 3)
            resumed = plan()  # a new process knows nothing but the number
            held += all(resumed.rows(n).tolist() == sequence[n] for n in range(here, here + 3))
        self.table.add("order", "batches after a resume at a random step", self.options.resumes, held)
        per_epoch = [sequence[e * len(straight) : (e + 1) * len(straight)] for e in range(epochs)]
        each = list(range(len(data.train)))
        held = sum(sorted(itertools.chain.from_iterable(rows)) == each for rows in per_epoch)
        self.table.add("order", "epochs with each sample exactly once", epochs, held)

    def processes(self) -> None:
        """Of 2 (in full also of 4) processes one is killed, again and again; they are started anew."""
        for size in (2, 4) if self.options.full else (2,):
            more: dict[str, Any] = {"gradient_accumulation_steps": 3}  # no multiple: rows are dealt
            whole = self.runs.folder / f"{size}-whole"
            codes = self.several(whole, size, **more)
            assert codes == [0] * size, self.runs.said()
            output, kills, starts = self.runs.folder / f"{size}-killed", 0, 0
            first = self.runs.argv(output.name, **more)  # a launcher has the same flags each time
            while not self.is_done(output) and starts < 3 * self.options.lost + 3:
                victim, after = self.random.randrange(size), self.random.uniform(0.3, self.seconds)
                logs = [self.runs.log] * size
                children = start_several(first, logs, restart=starts)
                starts += 1
                if kills < self.options.lost:
                    time.sleep(after)
                    if os.waitpid(children[victim], os.WNOHANG) == (0, 0):
                        os.kill(children[victim], signal.SIGKILL)
                        kills += 1
                    else:
                        children.pop(victim)
                stopped(children)
            held = self.is_done(output) and digest(output) == digest(whole)
            what = f"{size} processes, one killed at random: complete, the same bits"
            self.table.add("processes", what, kills, kills if held else 0, starts=starts)

    def several(self, output: Path, size: int, **more: Any) -> list[int]:
        """A run of several processes; their exit codes."""
        children = start_several(self.runs.argv(output.name, **more), [self.runs.log] * size)
        return [finished(child) for child in children]

    def sharded(self) -> None:
        """FSDP2 and DDP on 2 processes, and one process, compute the same losses."""
        more: dict[str, Any] = {
            "gradient_accumulation_steps": 2,
            "dropout": 0.0,
            "max_steps": 20,
            "optimizer": "adamw",
        }
        found = []
        for name, size, kind in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
            output = self.runs.folder / f"losses-{name}"
            codes = self.several(output, size, parallel=kind, **more)
            assert codes == [0] * size, self.runs.said()
            lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            found.append([v["train_loss"] for v in map(json.loads, lines) if "train_loss" in v])
        for name, losses in zip(("DDP", "FSDP2"), found[1:]):
            worst = [abs(a - b) for a, b in zip(found[0], losses, strict=True)]
            what = f"{name} on 2 processes: losses as of one process, within 1e-5"
            held = sum(difference <= 1e-5 for difference in worst)
            self.table.add("sharded", what, len(worst), held, largest_difference=max(worst))

    def cost(self) -> None:
        """What verification takes."""
        folder = self.runs.folder / "large"
        content = np.random.default_rng(0).bytes(self.options.megabytes * 10**6)
        files.atomic_folder(folder, lambda new: void((new / "weights").write_bytes(content)))
        began = time.perf_counter()
        files.verify_manifest(folder)
        per_gb = (time.perf_counter() - began) / (self.options.megabytes / 1000)
        held = {"seconds_per_gb": round(per_gb, 2)}
        if self.options.demo:
            held |= self.demo()
        self.table.add("cost", "verifying, read from the cache", 1, 1, **held)

    def demo(self) -> dict[str, float]:
        """The share of `make demo`'s training that goes into manifests and their verification."""
        root, place = Path(__file__).parents[1], self.runs.folder / "demo"
        place.mkdir()
        from minigpt.data.reader import read_pairs
        from minigpt.data.split import split_pairs, write_split

        pairs, read = read_pairs(root / "data" / "data.jsonl")
        Tokenizer.from_word2id(build_vocabulary(p.question + p.answer for p in pairs)).save(
            place / "vocab.json"
        )
        write_split(split_pairs(pairs, 0.8, 42), read, place, train_ratio=0.8, seed=42)
        argv = [
            "--recipe",
            "qa-cpu",
            "--train_data",
            str(place / "train.jsonl"),
            "--output",
            str(place / "run"),
        ]
        argv += ["--val_data", str(place / "val.jsonl"), "--vocab_path", str(place / "vocab.json")]
        spent = place / "spent"

        def timed() -> None:
            for owner, name in ((files, "_write_manifest"), (checkpoint, "verify_manifest")):
                real = getattr(owner, name)

                def wrapper(folder: Path, real: Any = real) -> None:
                    began = time.perf_counter()
                    real(folder)
                    with spent.open("a", encoding="utf-8") as file:
                        file.write(f"{time.perf_counter() - began}\n")

                setattr(owner, name, wrapper)

        began = time.perf_counter()
        code = finished(start(argv, self.runs.log, timed))
        seconds = time.perf_counter() - began
        assert code == 0, self.runs.said()
        total = sum(map(float, spent.read_text(encoding="utf-8").split()))
        return {"demo_seconds": round(seconds, 1), "demo_share": round(total / seconds, 5)}

    def all(self) -> list[dict[str, Any]]:
        """Every part that was asked for."""
        self.expected, self.seconds = self.reference()
        print(f"  reference: {self.seconds:.1f} s, {len(self.points)} points", file=sys.stderr, flush=True)
        parts = {part: getattr(self, "signals" if part == "signal" else part) for part in PARTS}
        for part in self.options.only:
            parts[part]()
        return self.table.rows


def void(_: object) -> None:
    """Nothing: for functions that must return nothing."""


def is_done(output: Path, steps: int) -> bool:
    """A run of `steps` steps has reached its end."""
    return (output / f"step-{steps:08d}").exists() and newest_step(output) == steps


def is_finite(folder: Path) -> bool:
    """No NaN and no infinity in a checkpoint's weights and optimiser state."""
    return all(
        bool(torch.isfinite(tensor).all())
        for name in ("model", "optimizer")
        for tensor in load_file(folder / f"{name}.safetensors").values()
    )


def poisoned(bad: dict[int, str]) -> None:
    """In a child: steps (from 0) whose loss, gradient or data makes NaN."""
    real_step, real_loss, real_batches = Trainer.step, Trainer.loss, Trainer.batches

    def one_step(self: Trainer) -> dict[str, float]:
        hook = None
        if bad.get(self.steps_done) == "gradient":
            parameter = next(self.model.parameters())
            hook = parameter.register_hook(lambda g: g * math.inf)  # type: ignore[no-untyped-call]
        numbers = real_step(self)
        if hook is not None:
            hook.remove()
        return numbers

    def loss(self: Trainer, batch: Any) -> torch.Tensor:
        return real_loss(self, batch) * (math.nan if bad.get(self.steps_done) == "loss" else 1.0)

    def batches(self: Trainer, number: int) -> list[Any]:
        found = real_batches(self, number)
        if bad.get(number) == "data":  # nothing of it counts: 0 / 0
            empty = torch.zeros_like(found[0].token_mask)
            found = [b._replace(token_mask=empty, answer_mask=empty) for b in found[:1]]
        return found

    replace("step", one_step)
    replace("loss", loss)
    replace("batches", batches)


@contextlib.contextmanager
def scratch(where: Path | None) -> Iterator[Path]:
    """A temporary folder, on the disk that is to be examined."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def main() -> None:
    """Run the parts, print the table, the machine, and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--toy", action="store_true", help="small counts (the default)")
    size.add_argument("--full", action="store_true", help="large counts, and every point everywhere")
    for name, (toy, full) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{toy} with --toy, {full} with --full")
    parser.add_argument("--steps", type=int, default=60, help="of the run that is disturbed")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--demo", action="store_true", help="also train the demo, for the share of its time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work: on the disk that is to be examined")
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    for name, (toy, full) in COUNTS.items():
        if getattr(options, name) is None:
            setattr(options, name, full if options.full else toy)
    gc.freeze()  # children share these objects' memory as long as nobody counts them
    began = time.monotonic()
    with scratch(options.folder) as folder:
        rows = Survival(folder, options).all()
    shown = [[row["part"], row["what"], row["trials"], row["held"]] for row in rows]
    table("what was promised, and what held", ("part", "promise", "trials", "held"), shown, numeric=(2, 3))
    failed = [row["what"] for row in rows if row["held"] != row["trials"]]
    numbers = {
        "benchmark": "survival",
        "size": "full" if options.full else "toy",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.monotonic() - began, 1),
        "failed": failed,
        "rows": rows,
    }
    print(json.dumps(numbers, ensure_ascii=False), flush=True)  # first: the file may be refused
    if options.output:
        options.output.write_text(json.dumps(numbers, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
