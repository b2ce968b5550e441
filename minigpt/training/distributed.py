"""The processes that train one model: the rank of this process, and communication between all of them.

A launcher (torchrun, accelerate, a Kubernetes operator) starts the same command N times, and sets the
environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of each process. If WORLD_SIZE
is unset or 1, no process group is made, and each method here works for a single process.

Only process 0 prints and writes to the run's folder. After a signal, an error or a non-finite loss in one
process, the other processes learn of it at the next exchange of messages. These messages are tensors on the
CPU, in a process group of their own (gloo). Gradients and weights are exchanged by parallel.py, between CUDA
devices over NCCL.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minigpt.console.language import say, translated
from minigpt.devices import seed_everything
from minigpt.errors import InputError, printable

__all__ = ["SINGLE_PROCESS", "Processes", "Stopped", "is_restarted", "join_processes"]

# A long timeout: the other processes wait while one process encodes a corpus or writes to a slow disk. If a
# process dies, the others notice this without delay, because its connections close.
_TIMEOUT = timedelta(hours=12)
_LOST = ("gloo", "Gloo", "Connection", "NCCL", "socket", "recvValue", "sendBytes", "store")

Value = TypeVar("Value")


class Stopped(Exception):  # noqa: N818 -- not an error: all processes agreed to end, and the run is saved
    """Raised after a signal, when the run has been saved. `code` is the exit code of the process."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class _SharedError(InputError):
    """An error that all processes raise together. Process 0 alone prints it."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from this process: it is number `rank` of `size`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # number of this process among those on its machine; decides the CUDA device
    group: Any = None  # gloo process group for messages on the CPU

    @property
    def is_main(self) -> bool:
        """Return True in process 0, which prints and writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the device of this process for `--device NAME`. With CUDA, each process has its own GPU."""
        if self.size > 1 and torch.cuda.is_available() and name in ("auto", "cuda"):
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        # Without CUDA, several processes use the CPU, because the processes cannot exchange tensors on MPS.
        return "cpu" if self.size > 1 and name == "auto" else name

    def seed(self, seed: int, step: int = 0) -> None:
        """Give each process its own seed, so that dropout differs. Process 0 keeps its random state.

        step: number of steps that a resumed run has done; 0 for a new run. It changes the seed, so that a
            resumed run does not draw the random numbers of its first steps again.
        """
        if not self.is_main:
            seed_everything((seed + 0x9E3779B97F4A7C15 * self.rank + step) % 2**63)

    # -- messages: all processes must call these methods, in the same order ----------------------------------

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all processes, in float64. All processes get the same bits."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return [float(value) for value in tensor]

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is true in at least one process."""
        return self.all_reduce([float(flag)])[0] > 0

    def all_gather(self, content: bytes) -> list[bytes]:
        """Return the `content` of every process, ordered by rank."""
        if self.size == 1:
            return [content]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]), group=self.group)
        padded = torch.zeros(max(1, *map(int, lengths)), dtype=torch.uint8)
        padded[: len(content)] = _bytes(content)
        rows = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self.group)
        return [row[: int(length)].numpy().tobytes() for row, length in zip(rows, lengths)]

    def broadcast(self, value: Value) -> Value:
        """Return process 0's `value` in every process. JSON must be able to hold the value."""
        if self.size == 1:
            return value
        content = _bytes(json.dumps(value).encode() if self.is_main else b"")
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=self.group)
        if not self.is_main:
            content = torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self.group)
        received: Value = json.loads(content.numpy().tobytes())
        return received

    def require_same(self, fingerprint: str, what: str) -> None:
        """Check that all processes have the same fingerprint of some data.

        Args:
            fingerprint: this process's fingerprint.
            what: name of the data, for the error message.

        Raises:
            InputError: if a process has another fingerprint; the message names the first such process.
        """
        rows = self.all_gather(fingerprint.encode())
        for rank, row in enumerate(rows):
            if row != rows[0]:
                raise _SharedError(
                    f"process {rank} has another {what} than process 0: give all the same files"
                )

    # -- errors ----------------------------------------------------------------------------------------------

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Run a block in every process. If one process raises InputError or OSError, all raise an error.

        Raises:
            InputError: if the block fails in any process. The message names the rank if it is not 0.
        """
        if self.size == 1:
            yield
            return
        text = ""
        try:
            yield
        except (InputError, OSError) as error:
            text = str(error) or type(error).__name__
        self._raise_first(text)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in process 0, then in the others, which can use the files that process 0 has made.

        Raises:
            InputError: as `shared_errors`. If process 0 fails, the other processes do not run the block.
        """
        if not self.is_main:
            self._raise_first("")
        with self.shared_errors():
            yield
        if self.is_main and self.size > 1:
            self._raise_first("")

    def _raise_first(self, text: str) -> None:
        texts = [content.decode() for content in self.all_gather(text.encode())]
        for rank, found in enumerate(texts):
            if found:
                raise _SharedError(found if rank == 0 else f"process {rank}: {found}")


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0).byte()


SINGLE_PROCESS = Processes()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise InputError(f"the environment's {name} must be a whole number: got {text!r}") from None


def is_restarted() -> bool:
    """Return True if torchrun has restarted this process because a process died (--max_restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _store(rank: int, size: int) -> Any:
    """Make the key-value store in which processes exchange addresses. Each restart has its own key prefix.

    torchrun's processes share one store over all restarts, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. With
    the default prefix of torch 2.13, restarted processes would read the old addresses and wait for ever.
    """
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, is_server, wait_for_workers=False, multi_tenant=True
    )
    name = f"minigpt-{_number('TORCHELASTIC_RESTART_COUNT', 0)}"
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the other processes, and leave them at the end of the block.

    Raises:
        InputError: if an environment variable with the rank or the address is missing, or a process cannot be
            reached.

    InputError, Stopped, SystemExit and KeyboardInterrupt in the block are raised again. Any other error, for
    example because another process has died, is printed, and this process exits with code 1.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", -1)
    if size == 1:
        yield SINGLE_PROCESS
        return
    if not 0 <= rank < size:
        raise InputError(f"WORLD_SIZE={size} needs a RANK from 0 to {size - 1}: got {rank}; use a launcher")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={size} needs {' and '.join(missing)} in the environment: use a launcher"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", rank) % torch.cuda.device_count())
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store(rank, size), rank=rank, world_size=size)
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"process {rank} cannot meet the others: {str(error).splitlines()[0]}") from None
    stderr = sys.stderr
    if rank:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 -- until the process ends
    try:
        yield Processes(rank, size, _number("LOCAL_RANK", rank), group)
    except (_SharedError, Stopped, SystemExit, KeyboardInterrupt):
        dist.destroy_process_group()  # otherwise the group's threads would abort the process at exit
        raise
    except InputError:
        sys.stderr = stderr
        print(say("process {rank}:", rank=rank), end=" ", file=stderr)
        raise
    except Exception as error:
        sys.stderr = stderr
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST):
            text = f"process {rank}: another process has died or cannot be reached; stopping ({first[:200]})"
            print(printable(translated(text)), file=stderr, flush=True)
        else:
            print(say("process {rank}:", rank=rank), printable(first), file=stderr, flush=True)
            traceback.print_exc(file=stderr)
        # os._exit instead of sys.exit, because torch would wait for processes that have died
        os._exit(1)
    else:
        dist.destroy_process_group()
