"""Several processes that train one model: who they are, and how they agree.

A launcher (torchrun, accelerate, a Kubernetes operator) starts the same command N times and says to each who
it is: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Where WORLD_SIZE is unset or 1 nothing of this
module does anything, and no process group is made.

Process 0 alone talks, and alone writes the run's folder. What one process meets (a signal, an error, a step
without a finite loss), all hear of at the next point where they speak to each other anyway. These messages
are numbers and text in tensors of the CPU (gloo), in a group of their own; gradients travel as parallel.py
says, on CUDA devices over NCCL.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minigpt.devices import seed_everything
from minigpt.errors import InputError, printable

__all__ = ["ALONE", "World", "is_restarted", "joined"]

# One process may wait while another encodes a corpus or writes to a slow disk. A process that dies is noticed
# at once all the same: its connections close.
_PATIENCE = timedelta(hours=12)
_LOST = ("gloo", "Gloo", "Connection", "NCCL", "socket", "recvValue", "sendBytes", "store")

Result = TypeVar("Result")


class _KnownError(InputError):
    """An error that every process has heard of: the first one says it."""


@dataclass(frozen=True)
class World:
    """One of `size` processes. With one process every method only does what it would do anyway."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on the same machine: which CUDA device is its own
    group: Any = None  # for messages on the CPU

    @property
    def is_main(self) -> bool:
        """Whether this is the process that talks and writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """`--device` for this process: on a machine with several CUDA devices each has one of its own."""
        if self.size > 1 and torch.cuda.is_available() and name in ("auto", "cuda"):
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return "cpu" if self.size > 1 and name == "auto" else name  # no MPS: it has no collectives

    def seed(self, seed: int, step: int = 0) -> None:
        """Random numbers of its own for each process but the first, so that their dropout differs."""
        if not self.is_main:
            seed_everything((seed + 0x9E3779B97F4A7C15 * self.rank + step) % 2**63)

    # -- messages: every process must come to each of these, in the same order ------------------------------

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the processes, in double precision: the same bits everywhere."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return [float(value) for value in tensor]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Add a tensor up over the processes, in place and on its device, without waiting for the result."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere."""
        return self.sums([float(flag)])[0] > 0

    def gathered(self, content: bytes) -> list[bytes]:
        """What each process has, by rank."""
        if self.size == 1:
            return [content]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]), group=self.group)
        width = max(int(length) for length in lengths)
        padded = torch.zeros(max(1, width), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[
            : len(content)
        ]
        rows = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self.group)
        return [bytes(row[: int(n)].numpy().tobytes()) for row, n in zip(rows, lengths)]

    def told(self, text: str = "") -> str:
        """Process 0's text."""
        if self.size == 1:
            return text
        content = text.encode()
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=self.group)
        row = torch.zeros(max(1, int(length)), dtype=torch.uint8)
        if self.is_main and content:
            row = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(row, 0, group=self.group)
        return bytes(row[: int(length)].numpy().tobytes()).decode()

    # -- errors: one process's are everyone's ---------------------------------------------------------------

    def together(self, action: Callable[[], Result]) -> Result:
        """All do the same.

        Raises:
            InputError: everywhere, if it fails anywhere; the text of another process names its rank.
        """
        if self.size == 1:
            return action()
        result: list[Result] = []
        text = ""
        try:
            result.append(action())
        except (InputError, OSError) as error:
            text = str(error) or type(error).__name__
        found = [content.decode() for content in self.gathered(text.encode())]
        if found[0]:
            raise _KnownError(found[0])
        for rank, other in enumerate(found):
            if other:
                raise _KnownError(f"process {rank}: {other}")
        return result[0]

    def first(self, action: Callable[[], Result]) -> Result:
        """Process 0, then the others: they find what it has prepared in the folder that all of them share.

        Raises:
            InputError: as `together`.
        """
        if self.size == 1:
            return action()
        ready: list[Result] = []

        def ahead() -> None:
            if self.is_main:
                ready.append(action())

        self.together(ahead)
        return self.together(lambda: ready[0] if ready else action())

    def decided(self, action: Callable[[], bool], finish: Callable[[], None] | None = None) -> bool:
        """Process 0 does something (and then `finish`, whatever came of it), and all have its result.

        Raises:
            InputError: everywhere, if it fails.
        """
        if self.size == 1:
            return action()
        said = ""
        failure: Exception | None = None
        if self.is_main:
            try:
                said = "true" if action() else "false"
            except (InputError, OSError) as error:
                said, failure = f"error: {error}", error
            if finish is not None:
                finish()
        said = self.told(said)
        if said.startswith("error: "):
            raise _KnownError(said.removeprefix("error: ")) from failure
        return said == "true"

    def require_same(self, fingerprint: str, what: str) -> None:
        """See that every process has the same.

        Raises:
            InputError: naming the first process that has not.
        """
        rows = self.gathered(fingerprint.encode())
        for rank, row in enumerate(rows):
            if row != rows[0]:
                raise _KnownError(
                    f"process {rank} has another {what} than process 0: give all the same files"
                )


ALONE = World()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise InputError(f"the environment's {name} must be a whole number: got {text!r}") from None


def is_restarted() -> bool:
    """Whether torchrun has started the processes anew after one had died (--max_restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _store(rank: int, size: int) -> Any:
    """Where processes leave their addresses for each other, under a name of this start's own.

    torchrun's processes share one store over all restarts, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; in
    torch's own place for them (2.13) those started anew wait for ever for the addresses of the dead.
    """
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, is_server, wait_for_workers=False, multi_tenant=True
    )
    name = f"minigpt-{_number('TORCHELASTIC_RESTART_COUNT', 0)}"
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


@contextmanager
def joined() -> Iterator[World]:
    """Meet the other processes; leave them at the end.

    Raises:
        InputError: if the environment does not say who this is, or the others cannot be reached.
        SystemExit: 1, after a line, if another process has died.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", -1)
    if size == 1:
        yield ALONE
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
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"process {rank} cannot meet the others: {str(error).splitlines()[0]}") from None
    stderr = sys.stderr
    if rank:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 -- until it ends
    try:
        yield World(rank, size, _number("LOCAL_RANK", rank), group)
    except (_KnownError, SystemExit, KeyboardInterrupt):
        dist.destroy_process_group()  # its threads would abort the process at its end
        raise
    except InputError:
        sys.stderr = stderr
        print(f"process {rank}:", end=" ", file=stderr)
        raise
    except Exception as error:
        sys.stderr = stderr
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST):
            text = f"process {rank}: another process has died or cannot be reached; stopping ({first[:200]})"
            print(printable(text), file=stderr, flush=True)
        else:
            print(f"process {rank}: {printable(first)}", file=stderr, flush=True)
            traceback.print_exc(file=stderr)
        # not sys.exit: torch would wait for those who are gone
        os._exit(1)
    else:
        dist.destroy_process_group()
