"""One request to an engine, as its owner sees it: tokens as they come, the result, the way to stop it.

`minigpt.generation.engine.Engine.submit` makes it. It drives the engine itself where no thread does.
"""

import threading
from collections.abc import Iterator
from typing import Protocol

from minigpt.generation.output import Completion
from minigpt.generation.sequence import Sequence

__all__ = ["RequestHandle"]


class Driver(Protocol):
    """What a handle needs of its engine."""

    is_driven: bool  # a thread calls step: others must not

    def step(self) -> bool:
        """A token for all requests; returns whether more is left."""

    def cancel(self, handle: "RequestHandle", /) -> None:
        """Stop a request."""


class RequestHandle:
    """One request: its tokens as they come, its result, the way to stop it. Several threads may use it."""

    def __init__(self, engine: Driver, sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence
        self._changed = threading.Condition()
        self._given = 0  # tokens that a waiting thread may take
        self._completion: Completion | None = None
        self._error: Exception | None = None
        self._is_cancelled = False

    @property
    def done(self) -> bool:
        """Has it ended, in whatever way?"""
        return self._completion is not None or self._error is not None

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return self._sequence.ids[: self._given]

    def __iter__(self) -> Iterator[int]:
        """The new tokens from the first on, each as soon as it is there.

        Raises:
            InputError: if the request fails; and what the engine fails with.
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
        """Wait for the end; of a cancelled request, what had come by then.

        Args:
            timeout: seconds; it counts where a thread drives the engine.

        Raises:
            TimeoutError: if it has not ended by then. It continues.
            InputError: if the request failed; and what the engine failed with.
        """
        self._await(None, timeout)
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def cancel(self) -> None:
        """Stop it: the slot is free at the next token. No effect on a request that has ended."""
        self._engine.cancel(self)

    def _await(self, tokens: int | None, timeout: float | None = None) -> None:
        """Until there are so many tokens, or all."""

        def is_there() -> bool:
            return self.done or (tokens is not None and self._given >= tokens)

        while not is_there() and not self._engine.is_driven:
            self._engine.step()
        with self._changed:
            if not self._changed.wait_for(is_there, timeout):
                raise TimeoutError(f"the request has not ended after {timeout} seconds")

    def _update(self, outcome: Completion | Exception | None = None) -> int:
        """Show the sequence's new tokens, and its end; returns how many were new."""
        with self._changed:
            new, self._given = len(self._sequence.ids) - self._given, len(self._sequence.ids)
            if isinstance(outcome, Completion):
                self._completion = outcome
            else:
                self._error = outcome
            if new or outcome is not None:
                self._changed.notify_all()
        return new
