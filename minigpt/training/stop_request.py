"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP ask a run to stop. The run stops where its state can be saved.

SIGUSR1 means the same as SIGTERM: batch systems send SIGUSR1 before they end a job (Slurm:
`--signal=B:USR1@60`). SIGHUP is sent when a terminal is closed. The exit code is 128 + the number of the
signal: 130, 143, 138, 129.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from minigpt.console.command_line import patient_signals, stop_signals
from minigpt.console.language import say
from minigpt.training.distributed import SINGLE_PROCESS, Processes, Stopped

__all__ = ["StopNow", "StopRequest", "Stopped"]


class StopNow(BaseException):
    """Raised inside `StopRequest.interruptible` when a stop signal comes.

    It is a BaseException, so that `except Exception` in a library does not catch it.
    """


class StopRequest:
    """Remembers the signal that asks the run to stop, until the training loop can stop."""

    def __init__(self, processes: Processes = SINGLE_PROCESS) -> None:
        self.signal: int | None = None  # signal that this process has received, or None
        self._alone = processes.size == 1
        self._agreed: int | None = None
        self._interruptible = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For a `with` block. The first stop signal in it is only remembered, the second ends the process."""
        # Python can set signal handlers only in the main thread
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in stop_signals()}
        try:
            with patient_signals():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def agreed(self) -> int | None:
        """Return the signal that ends the run, or None. After `agree`, it is the same in all processes."""
        return self.signal if self._alone else self._agreed

    def agree(self, processes: Processes) -> None:
        """Set `agreed`, in all processes, to a signal that one of them has received; None if there is none.

        Every process must call this method.
        """
        counts = processes.all_reduce([float(self.signal == number) for number in stop_signals()])
        self._agreed = next((number for number, count in zip(stop_signals(), counts) if count), None)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For a `with` block that a stop signal may interrupt.

        The block may change gradients, but no other state. With several processes, the block is not
        interrupted, because the other processes would wait for this one for ever.

        Raises:
            StopNow: if a stop signal comes in the block or has come before.
        """
        self._interruptible = self._alone
        try:
            if self._alone and self.signal is not None:
                raise StopNow
            yield
            if self._alone and self.signal is not None:  # if a library has caught StopNow, raise it again
                raise StopNow
        except Exception:
            # if a library has turned StopNow into another error, raise StopNow
            if self._alone and self.signal is not None:
                raise StopNow from None
            raise
        finally:
            self._interruptible = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            sys.exit(128 + signum)
        self.signal = signum
        name = signal.Signals(signum).name
        print(say("\n{name}: saving and stopping; once more stops at once", name=name), file=sys.stderr)
        if self._interruptible:
            raise StopNow
