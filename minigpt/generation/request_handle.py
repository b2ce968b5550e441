"""The handle of one request to an engine: gives its tokens and its result, and can cancel it.

`minigpt.generation.engine.Engine.submit` returns a handle. If no EngineThread runs the engine's steps, the
handle runs them while it waits.
"""

import threading
from collections.abc import Iterator
from typing import Protocol

from minigpt.generation.output import Completion
from minigpt.generation.sequence import Sequence

__all__ = ["RequestHandle"]


class Driver(Protocol):
    """The methods of an engine that a handle uses."""

    is_driven: bool  # True: an EngineThread calls `step`, so other threads must not

    def step(self) -> bool:
        """Do one step for all requests. Return True if requests are left."""

    def cancel(self, handle: "RequestHandle", /) -> None:
        """Cancel a request."""


class RequestHandle:
    """One request to an engine: its tokens, its result, and `cancel`. Several threads may use the handle."""

    def __init__(self, engine: Driver, sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence
        self._changed = threading.Condition()
        self._given = 0  # number of new tokens that `tokens` and the iterator may return so far
        self._completion: Completion | None = None
        self._error: Exception | None = None
        self._is_cancelled = False

    @property
    def done(self) -> bool:
        """True if the request has ended, was cancelled, or failed."""
        return self._completion is not None or self._error is not None

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return self._sequence.ids[: self._given]

    def __iter__(self) -> Iterator[int]:
        """Yield all new tokens from the first on, each as soon as it is generated.

        Raises:
            InputError: if the request fails. If the engine fails, its error is raised.
        """
        place = 0
        while True:
            self._await(place + 1)
            if place == self._given:
                break
            yield self._sequence.ids[place]
            place += 1
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end of the request. Return the tokens and the stop reason.

        Args:
            timeout: seconds to wait. It has an effect only if an EngineThread runs the engine.

        Raises:
            TimeoutError: if the request has not ended in time. The request continues.
            InputError: if the request fails. If the engine fails, its error is raised.
        """
        self._await(None, timeout)
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def cancel(self) -> None:
        """Cancel the request, see Engine.cancel. No effect on a request that has ended."""
        self._engine.cancel(self)

    def _await(self, tokens: int | None, timeout: float | None = None) -> None:
        """Wait until the request has `tokens` new tokens or has ended. tokens=None: wait for the end."""

        def is_there() -> bool:
            return self.done or (tokens is not None and self._given >= tokens)

        while not is_there() and not self._engine.is_driven:
            self._engine.step()
        with self._changed:
            if not self._changed.wait_for(is_there, timeout):
                raise TimeoutError(f"the request has not ended after {timeout} seconds")

    def _update(self, outcome: Completion | Exception | None = None) -> int:
        """Let waiting threads see new tokens, and the outcome if given. Return the number of new tokens."""
        with self._changed:
            new, self._given = len(self._sequence.ids) - self._given, len(self._sequence.ids)
            if isinstance(outcome, Completion):
                self._completion = outcome
            else:
                self._error = outcome
            if new or outcome is not None:
                self._changed.notify_all()
        return new
