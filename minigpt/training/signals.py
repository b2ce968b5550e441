"""Ctrl-C and SIGTERM, obeyed between steps."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "stop_requests"]


class StopRequest:
    """The signal that asked the run to stop, if one has."""

    signal: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM are noted, and obeyed after the step; a second one stops at once."""
    asked = StopRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        if asked.signal is not None:
            sys.exit(128 + signum)
        asked.signal = signum
        print("\nstopping after this step; once more stops at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
