"""Ctrl-C, SIGTERM and SIGUSR1: a request to stop, obeyed where the state of the run is complete.

SIGUSR1 means the same as SIGTERM: batch systems send it ahead of pre-emption (Slurm: `--signal=B:USR1@60`).
The exit code says which signal it was: 130, 143, 138 (128 and the signal's number).
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from minigpt.console.command_line import stop_signals
from minigpt.training.distributed import SINGLE_PROCESS, Processes, Stopped

__all__ = ["StopNow", "StopRequest", "Stopped"]


class StopNow(BaseException):
    """A signal came inside `StopRequest.interruptible`. It passes `except Exception`."""


class StopRequest:
    """The signal that asked the run to stop, if one has come."""

    def __init__(self, processes: Processes = SINGLE_PROCESS) -> None:
        self.signal: int | None = None  # that came to this process
        self._alone = processes.size == 1
        self._agreed: int | None = None
        self._interruptible = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGUSR1 are noted inside; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread has handlers
            yield
            return
        before = {number: signal.signal(number, self._note) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def agreed(self) -> int | None:
        """The signal that ends the run. All processes see the same signal at the same point of the run."""
        return self.signal if self._alone else self._agreed

    def agree(self, processes: Processes) -> None:
        """Learn which signals have come to the other processes; all must call it."""
        counts = processes.all_reduce([float(self.signal == number) for number in stop_signals()])
        self._agreed = next((number for number, count in zip(stop_signals(), counts) if count), None)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be broken off anywhere, since it leaves no trace: gradients, evaluation, compiling.

        With several processes it goes on to its end, since the others would wait for ever: then they agree.

        Raises:
            StopNow: when a signal comes meanwhile, or has come before.
        """
        self._interruptible = self._alone
        try:
            if self._alone and self.signal is not None:
                raise StopNow
            yield
            if self._alone and self.signal is not None:  # a library swallowed StopNow: what it did is unknown
                raise StopNow
        except Exception:
            if self._alone and self.signal is not None:  # or made another error of it
                raise StopNow from None
            raise
        finally:
            self._interruptible = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            sys.exit(128 + signum)
        self.signal = signum
        print(
            f"\n{signal.Signals(signum).name}: saving and stopping; once more stops at once", file=sys.stderr
        )
        if self._interruptible:
            raise StopNow
