"""A process that starts runs of several processes by forking. It has imported torch, so each fork is quick.

The tests' own process cannot do this: after it has computed gradients with torch, its forks cannot compute
any. This process reads a job (JSON) per line from standard input, and answers with the exit codes.
"""

import functools
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.backends.debugging  # --compile loads these: every fork would anew
import torch._functorch.aot_autograd
import torch._functorch.partitioners
import torch._inductor.compile_fx

from minigpt.errors import InputError
from minigpt.training import checkpoint
from minigpt.training.step import StepBatches, TrainStep
from tests.survival import children

for name in ("functorch.compile", "networkx", "sympy.tensor.tensor"):  # these, too; they have no types
    importlib.import_module(name)
torch._dynamo.list_backends()  # it imports them all


def prepared(job: dict[str, Any], rank: int) -> None:
    """Prepare the planned faults in a child process."""
    if job.get("asynchronous"):
        TrainStep.asynchronous = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]
    if job.get("compiled"):  # all of it but the writing of code
        os.environ["CXX"] = sys.executable  # a C++ compiler is looked for, but has nothing to do
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    if job.get("rank") != rank:
        return

    def act() -> None:
        match job["what"]:
            case "error":
                raise ZeroDivisionError("on purpose")
            case name:
                os.kill(os.getpid(), signal.Signals[name])

    if job["what"] == "nan":
        backward = TrainStep.backward

        def spoiled(self: TrainStep, batches: StepBatches) -> torch.Tensor:
            measured = backward(self, batches)
            measured[0] *= float("nan") if batches.step + 1 == job["step"] else 1.0
            return measured

        TrainStep.backward = spoiled  # type: ignore[method-assign]
    elif job["what"] == "save":

        def failing(*_: object) -> None:
            raise InputError("the disk is full")

        checkpoint.save = failing  # type: ignore[assignment]
    else:
        children.at_step(job["step"], act)


def run(job: dict[str, Any]) -> None:
    """Run a program that is to end with sys.exit(0)."""
    os.environ.update(job["environment"])
    exec(job["code"], {"__name__": "__main__"})


def main() -> None:
    """Do one job after another, until standard input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        logs = [Path(f"{job['log']}-{rank}") for rank in range(job["size"])]
        for log in logs:
            log.unlink(missing_ok=True)
        if "code" in job:
            started = [children.start(job["argv"], logs[0], functools.partial(run, job))]
        else:
            prepare = functools.partial(prepared, job)
            started = children.start_several(job["argv"], logs, prepare, job.get("restart", 0))
        print(json.dumps(children.stopped(started, 20.0)), flush=True)


if __name__ == "__main__":
    main()
