"""Ctrl-C, SIGTERM and SIGUSR1: noted, and obeyed where the state is whole.

SIGUSR1 means the same as SIGTERM: batch systems send it ahead of pre-emption (Slurm: `--signal=B:USR1@60`).
The exit code says which it was: 130, 143, 138 (128 and the signal's number).
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopNow", "StopRequest", "stop_requests"]


class StopNow(BaseException):
    """A signal came inside `StopRequest.at_once`; like KeyboardInterrupt, it passes `except Exception`."""


class StopRequest:
    """The signal that asked the run to stop, if one has."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that may be broken off anywhere, since it leaves no trace: gradients, evaluation, compiling.

        Raises:
            StopNow: when a signal comes meanwhile, or has come before.
        """
        self._at_once = True
        try:
            if self.signal is not None:
                raise StopNow
            yield
        finally:
            self._at_once = False

    def note(self, signum: int, frame: FrameType | None) -> None:
        """The signals' handler; a second signal ends the process at once."""
        if self.signal is not None:
            sys.exit(128 + signum)
        self.signal = signum
        print(
            f"\n{signal.Signals(signum).name}: saving and stopping; once more stops at once", file=sys.stderr
        )
        if self._at_once:
            raise StopNow


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGUSR1 are noted, and obeyed between steps; a second one stops at once."""
    asked = StopRequest()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        numbers.append(signal.SIGUSR1)
    before = {number: signal.signal(number, asked.note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
