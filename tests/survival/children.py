"""Runs `minigpt train` in one fork of this process or in several, and disturbs it there."""

import contextlib
import gc
import importlib
import math
import mmap
import os
import runpy
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimisers need it; otherwise every child would import it again

from minigpt.storage import files
from minigpt.training import checkpoint, loss, run_data
from minigpt.training import estimate as report
from minigpt.training import run as _run  # noqa: F401 -- or every child would import it again
from minigpt.training.loop import Trainer
from minigpt.training.step import StepBatches, TrainStep

LATER = (  # imported here, because otherwise every child would import them again
    "minigpt.commands",
    "minigpt.training.command",
    "numpy.ctypeslib",
    "torch.profiler._cupti_monitor",
    "torch.utils.tensorboard",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)
for name in LATER:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

Prepare = Callable[[], None]


class Watch:
    """Memory that parent and child share: the child's phase, its last step, the time of its signal."""

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
        """Write all values. No lock is needed, because only one side writes at a time."""
        self._memory[:24] = struct.pack("qqd", phase, steps, signalled)

    def get(self) -> tuple[int, int, float]:
        """Return phase, steps done (-1: none in this process), and the time of a child's signal (0: none)."""
        phase, steps, signalled = struct.unpack("qqd", self._memory[:24])
        return phase, steps, signalled


WATCH = Watch()


def watched(strike: str = "") -> None:
    """In a child: write phases and steps to WATCH. When the phase `strike` begins, send itself SIGTERM."""

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

    real_step = TrainStep.__call__

    def counted(self: TrainStep) -> None:
        real_step(self)
        WATCH.set(WATCH.get()[0], self.progress.steps_done, WATCH.get()[2])

    replace("__call__", counted)
    wrap(run_data, "read_data", "reading")
    wrap(Trainer, "resume", "resuming")
    wrap(report, "estimate", "estimating")
    wrap(TrainStep, "backward", "training")
    wrap(loss, "evaluate_loss", "evaluating")
    wrap(checkpoint, "save", "saving")
    wrap(run_data.RunData, "sample", "answering")


def replace(name: str, method: Callable[..., Any]) -> None:
    """In a child: replace a method of TrainStep."""
    setattr(TrainStep, name, method)


def start(argv: list[str], log: Path, prepare: Prepare | None = None) -> int:
    """Start `minigpt train ARGV` in a child. Returns its process id. The child first calls `prepare`.

    If the first word is "finetune", the command is `minigpt finetune`.
    """
    WATCH.set(0, -1, 0.0)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child can handle signals
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return child
    code = 1
    gc.disable()  # it takes a tenth of a short run
    try:
        for number in SIGNALS:  # handlers until the command sets its own, so that no signal is lost
            signal.signal(number, lambda signum, _: os._exit(128 + signum))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        verb, module = ("finetune", "commands.finetune") if argv[0] == "finetune" else ("train", "train")
        sys.argv = [f"minigpt {verb}", *(argv[1:] if verb == "finetune" else argv)]
        if prepare is not None:
            prepare()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        runpy.run_module(f"minigpt.{module}", run_name="__main__")
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
    """Wait for a child. Return its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_several(
    argv: list[str], logs: list[Path], prepare: Callable[[int], None] | None = None, restart: int = 0
) -> list[int]:
    """Start `minigpt train ARGV` in several children of one group, like torchrun.

    Args:
        logs: one log file per process.
        prepare: each child first calls it with its rank.
        restart: number of earlier starts.
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
    """Wait for processes of which one may have died, then end them, like torchrun. Return their exit codes.

    A process that was connected to the dead one notices at once. A process that still waits for the dead one
    would wait for minutes.
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
    """In a child: call `act` right before a step is computed."""
    real = TrainStep.backward

    def acting(self: TrainStep, batches: StepBatches) -> torch.Tensor:
        if batches.step == number:
            act()
        return real(self, batches)

    replace("backward", acting)


def unmeasured(trainer: Trainer, free: float = math.inf) -> report.Estimate:
    """Return an empty estimate. A real one takes a third of a start, and it writes nothing."""
    return report.Estimate(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


def at_point(point: str, act: Callable[[], None]) -> Prepare:
    """In a child: call `act` when writing first passes a named point."""

    def prepare() -> None:
        def hook(name: str) -> None:
            if name == point:
                files.step_hook = lambda name: None
                act()

        files.step_hook = hook
        report.estimate = unmeasured

    return prepare


def die() -> None:
    """Kill this process like a power cut would (except that the disk's cache is kept)."""
    os.kill(os.getpid(), signal.SIGKILL)


def poisoned(bad: dict[int, str]) -> None:
    """In a child: make the loss, the gradient or the data of some steps (from 0) NaN."""
    real_step, real_loss, real_batches = TrainStep.__call__, TrainStep.summed_loss, TrainStep.batches

    def one_step(self: TrainStep) -> None:
        hook = None
        if bad.get(self.progress.steps_done) == "gradient":
            parameter = next(self.model.parameters())
            hook = parameter.register_hook(lambda g: g * math.inf)  # type: ignore[no-untyped-call]
        real_step(self)
        if hook is not None:
            hook.remove()

    def spoiled_loss(self: TrainStep, batch: Any) -> torch.Tensor:
        return real_loss(self, batch) * (math.nan if bad.get(self.progress.steps_done) == "loss" else 1.0)

    def batches(self: TrainStep, number: int) -> list[Any]:
        found = real_batches(self, number)
        if bad.get(number) == "data":  # no target counts, which gives 0 / 0
            empty = torch.zeros_like(found[0].token_mask)
            found = [b._replace(token_mask=empty, answer_mask=empty) for b in found[:1]]
        return found

    replace("__call__", one_step)
    replace("summed_loss", spoiled_loss)
    replace("batches", batches)
