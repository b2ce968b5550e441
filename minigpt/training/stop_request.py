"""Ctrl-C, SIGTERM and SIGUSR1: noted, and obeyed where the state is whole.

SIGUSR1 means the same as SIGTERM: batch systems send it ahead of pre-emption (Slurm: `--signal=B:USR1@60`).
The exit code says which it was: 130, 143, 138 (128 and the signal's number).
"""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from minigpt.console.command_line import stop_signals

__all__ = ["StopNow", "StopRequest", "stop_requests"]


class StopNow(BaseException):
    """A signal came inside `StopRequest.at_once`; like KeyboardInterrupt, it passes `except Exception`."""


class StopRequest:
    """The signal that asked the run to stop, if one has."""

    def __init__(self, alone: bool = True) -> None:
        self.signal: int | None = None  # that came here
        self._alone = alone
        self._agreed: int | None = None
        self._at_once = False

    @property
    def agreed(self) -> int | None:
        """The signal that is to be obeyed: of several processes, all have the same one at the same point."""
        return self.signal if self._alone else self._agreed

    def marks(self) -> list[float]:
        """What came here, as numbers that may be added up over the processes."""
        return [float(self.signal == number) for number in stop_signals()]

    def agree(self, sums: Sequence[float]) -> None:
        """Take the sums of everyone's `marks`."""
        self._agreed = next((number for number, count in zip(stop_signals(), sums) if count), None)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that may be broken off anywhere, since it leaves no trace: gradients, evaluation, compiling.

        Not where other processes do their part of it, and would wait for ever: they agree when it is done.

        Raises:
            StopNow: when a signal comes meanwhile, or has come before.
        """
        self._at_once = self._alone
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
def stop_requests(alone: bool = True) -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGUSR1 are noted, and obeyed between steps; a second one stops at once.

    Args:
        alone: False: several processes must agree on it.
    """
    asked = StopRequest(alone)
    before = {number: signal.signal(number, asked.note) for number in stop_signals()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
