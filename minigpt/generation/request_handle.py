"""One request to an engine, as its owner sees it: tokens as they come, the result, the way to stop.

`minigpt.generation.engine.Engine.submit` makes it. It drives the engine itself where no thread does.
"""

import threading
from collections.abc import Iterator
from typing import Protocol

from minigpt.generation.output import Completion
from minigpt.generation.sequence import Row
from minigpt.generation.sliding_window import Window

__all__ = ["Handle"]


class Driver(Protocol):
    """What a handle asks of its engine."""

    is_driven: bool  # a thread calls step: nobody else must

    def step(self) -> bool:
        """Go on for all requests; returns whether more is left."""

    def cancel(self, handle: "Handle", /) -> None:
        """Stop a request."""


class Handle:
    """One request: its tokens as they come, its result, the way to stop it. Several threads may use it."""

    def __init__(self, engine: Driver, row: Row) -> None:
        self._engine, self._row = engine, row
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._completion: Completion | None = None
        self._error: Exception | None = None
        self._is_cancelled = False
        self._slot: int | None = None
        self._unread: list[int] = []  # what has to be read before the next token: a prompt, or a new window
        self._window: Window | None = None

    @property
    def done(self) -> bool:
        """Has it ended, in whatever way?"""
        return self._completion is not None or self._error is not None

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return list(self._tokens)

    def __iter__(self) -> Iterator[int]:
        """The new tokens from the first on, each as soon as it is there.

        Raises:
            InputError: if the request fails; and what the engine fails with.
        """
        place = 0
        while True:
            self._await(place + 1)
            if place == len(self._tokens):
                break
            yield self._tokens[place]
            place += 1
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end; of a cancelled request, what had come by then.

        Args:
            timeout: seconds; it counts where a thread drives the engine.

        Raises:
            TimeoutError: if it has not ended by then. It goes on.
            InputError: if the request failed; and what the engine failed with.
        """
        self._await(None, timeout)
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def cancel(self) -> None:
        """Nobody wants the rest: the slot is free at the next token. No effect on what has ended."""
        self._engine.cancel(self)

    def _await(self, tokens: int | None, timeout: float | None = None) -> None:
        """Until there are so many tokens, or all."""

        def is_there() -> bool:
            return self.done or (tokens is not None and len(self._tokens) >= tokens)

        while not is_there() and not self._engine.is_driven:
            self._engine.step()
        with self._changed:
            if not self._changed.wait_for(is_there, timeout):
                raise TimeoutError(f"the request has not ended after {timeout} seconds")

    def _give(self, token: int) -> None:
        with self._changed:
            self._tokens.append(token)
            self._changed.notify_all()

    def _end(self, outcome: Completion | Exception) -> None:
        with self._changed:
            if isinstance(outcome, Completion):
                self._completion = outcome
            else:
                self._error = outcome
            self._changed.notify_all()
