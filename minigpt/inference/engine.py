"""Requests that join and leave one running batch, token by token: what a server writes its answers with.

    engine = Engine(model, max_rows=8)
    handles = [engine.submit(prompt, options, eos_token_id=2) for prompt in prompts]
    for token in handles[0]:                     # as they come, while the others are written too
        ...
    handles[1].cancel()                          # its slot is free at the next token
    completions = [handle.result() for handle in handles]

Ids in, ids out. Whoever takes tokens drives the engine, unless a thread does (.background). Each step gives
every running row one token; then at most `chunk` tokens of prompts that join are read, so that a long prompt
does not stall the others for long.

A request's result is the one that generate_ids gives it alone, and depends on nobody else: a prompt is read
in the same chunks whoever is there, and (in C, see .reading) a token is computed in the same way in any
company. Only a prompt of several chunks is rounded in another order than by generate_ids, which reads it at
once; a prefix that is reused changes nothing, as it ends where a chunk does.

Memory is bounded and taken at the start: max_rows * max_length tokens of keys and values, and prefix_mib for
beginnings that prompts share (.prefixes). More requests than rows wait in a queue, which is bounded too.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from minigpt.command_line import InputError
from minigpt.families import LanguageModel
from minigpt.inference.generation import TextTokenizer, base_seed, check_request, row_seed
from minigpt.inference.options import GenerationOptions
from minigpt.inference.output import Completion
from minigpt.inference.prefixes import PrefixStore
from minigpt.inference.reading import Reader
from minigpt.inference.row import Row, check_single
from minigpt.inference.slots import SlotCache

__all__ = ["Engine", "Handle", "QueueFullError", "Statistics"]


class QueueFullError(InputError):
    """There is no room for another waiting request: try later."""


@dataclass
class Statistics:
    """What an engine has done since it was made."""

    finished: int = 0  # requests, without those cancelled or failed
    cancelled: int = 0
    failed: int = 0
    tokens_read: int = 0  # of prompts, computed
    tokens_reused: int = 0  # of prompts, copied from an earlier one's
    tokens_written: int = 0  # given to requests
    steps: int = 0  # in which something was computed


class Handle:
    """One request: its tokens as they come, its result, the way to stop it. Several threads may use it."""

    def __init__(self, engine: "Engine", row: Row) -> None:
        self._engine, self._row = engine, row
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._completion: Completion | None = None
        self._error: Exception | None = None
        self._is_cancelled = False
        self._slot: int | None = None

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


class Engine:
    """A running batch of one model, which is put into eval mode.

    `submit` and `cancel` may be called from any thread; `step` and `run` from one.

    Args:
        max_rows: requests that are written at once.
        max_length: tokens of a request, prompt included, that there is room for; None: what the model reads.
        max_waiting: requests that may wait for a row.
        chunk: tokens of prompts that are read in one step, about.
        prefix_mib: MiB for beginnings that prompts share; 0: none are kept.
        max_cache_mib: refuse to take more for rows' keys and values; None: no limit.

    Raises:
        InputError: for sizes that make no sense, or memory beyond max_cache_mib.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_rows: int = 8,
        max_length: int | None = None,
        max_waiting: int = 64,
        chunk: int = 64,
        prefix_mib: float = 0.0,
        max_cache_mib: float | None = None,
    ) -> None:
        context = model.config.max_position_embeddings
        length = context if max_length is None else max_length
        for name, value in {"max_rows": max_rows, "max_length": length, "chunk": chunk}.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1: got {name}={value}")
        if max_waiting < 0 or prefix_mib < 0:
            raise InputError(f"must be at least 0: got max_waiting={max_waiting}, prefix_mib={prefix_mib:g}")
        if length > context:
            raise InputError(f"max_length={length} is more than the model reads: block_size={context}")
        weight = next(model.parameters())
        self.model, self.chunk, self.max_waiting = model.eval(), chunk, max_waiting
        self.max_length = length
        # the last token of a request is never read: one column less
        columns = max(1, length - 1)
        self.cache = SlotCache(model.config, max_rows, columns, weight.device, weight.dtype, max_cache_mib)
        self.prefixes = PrefixStore(self.cache, chunk, prefix_mib) if prefix_mib else None
        self.statistics = Statistics()
        self.is_driven = False  # a thread calls step: nobody else must
        self.changed = threading.Condition()  # guards what follows; notified when there is something to do
        self._waiting: deque[Handle] = deque()
        self._running: list[Handle] = []  # in the order in which they joined
        self._reader = Reader(model)
        self._failure: Exception | None = None

    @property
    def bytes(self) -> int:
        """Memory of keys and values, whether it is in use yet or not."""
        return self.cache.bytes + (self.prefixes.bytes if self.prefixes else 0)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Is there nothing to do?"""
        return not self._waiting and not self._running

    def submit(
        self,
        prompt: Sequence[int],
        options: GenerationOptions | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        tokenizer: TextTokenizer | None = None,
        copy: int = 0,
    ) -> Handle:
        """Ask for what follows a prompt. Arguments as generate_ids; it begins once there is a slot.

        Args:
            copy: draw as generate_ids does for this one of num_return_sequences.

        Raises:
            QueueFullError: if max_waiting requests wait already: try later.
            InputError: as generate_ids does; for beams and reports; for a prompt that, with max_new_tokens,
                is longer than max_length.
        """
        options = options or GenerationOptions()
        check_single(options, "an engine")
        for name, plain in {"cache_implementation": "static", "max_cache_mib": None}.items():
            if (value := getattr(options, name)) != plain:
                raise InputError(f"{name}={value} is no request's choice: all share the engine's cache")
        request = check_request(self.model, [prompt], options, eos_token_id, tokenizer)
        config = self.model.config
        # None asks for what there is room for; a number asks for what generate_ids would give.
        room = self.max_length if options.max_new_tokens is None else config.max_position_embeddings
        limit = max(1, options.limit(len(prompt), room))
        if len(prompt) + limit > self.max_length:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and up to {limit} new ones need max_length="
                f"{len(prompt) + limit}: the engine has max_length={self.max_length}; shorten the prompt or "
                "lower max_new_tokens"
            )
        seed = base_seed(options)
        row = Row(
            prompt, limit, options, request, config.vocab_size, self._reader.device,
            None if seed is None else row_seed(seed, 0, copy),
        )  # fmt: skip
        handle = Handle(self, row)
        with self.changed:
            if self._failure is not None:
                raise InputError(f"the engine takes no more requests: {self._failure}")
            # those that will get a free slot at the next step do not count
            if len(self._waiting) >= self.max_waiting + self.cache.slots - len(self._running):
                raise QueueFullError(
                    f"the queue is full: {self.max_waiting} requests wait already (max_waiting), "
                    f"{len(self._running)} are being written; try again later"
                )
            self._waiting.append(handle)
            self.changed.notify_all()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Stop a request; see Handle.cancel."""
        with self.changed:
            if handle.done or handle._is_cancelled:
                return
            handle._is_cancelled = True
            if handle in self._waiting:
                self._waiting.remove(handle)
                self._finish(handle, Completion([], "cancelled"))
            self.changed.notify_all()

    def close(self) -> None:
        """Stop all requests, at once; no others are taken. From the thread that steps."""
        with self.changed:
            self._failure = InputError("it was closed")  # first: nobody may come in between and wait for ever
            handles = [*self._waiting, *self._running]
        for handle in handles:
            self.cancel(handle)
        self._drop_cancelled()

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """One token for each running row, some of the joining prompts' tokens; returns whether more is left.

        A request that cannot go on (its options forbid every token) fails alone.
        """
        self._drop_cancelled()
        with self.changed:
            joining = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.cache.free))]
            self._running += joining
        for handle in joining:
            handle._slot = self.cache.take()
            if self.prefixes:
                self.statistics.tokens_reused += self.prefixes.restore(handle._row.prompt, handle._slot)
        if self._running:
            self.statistics.steps += 1
            self._write()
            self._read_prompts()
        return not self.is_idle

    def fail(self, error: Exception) -> None:
        """End all requests with this error; no others are taken."""
        with self.changed:
            self._failure = error
            waiting = list(self._waiting)
            self._waiting.clear()
        for handle in list(self._running):
            self._leave(handle, error)
        for handle in waiting:
            self._finish(handle, error)

    def _drop_cancelled(self) -> None:
        for handle in [handle for handle in self._running if handle._is_cancelled]:
            self._leave(handle, Completion(handle.tokens, "cancelled"))

    def _write(self) -> None:
        """One more token for each row whose prompt is read."""
        writing = [handle for handle in self._running if handle._row.ids]
        if not writing:
            return
        slots = [_slot(handle) for handle in writing]
        logits = self._reader.read_rows([handle._row.ids[-1] for handle in writing], slots, self.cache)
        for place, handle in enumerate(writing):
            self._choose(handle, logits[place : place + 1])

    def _read_prompts(self) -> None:
        """Whole chunks of joining prompts, in the order in which they came, while they are few tokens."""
        left = self.chunk
        for handle in [handle for handle in self._running if not handle._row.ids]:
            slot, prompt = _slot(handle), handle._row.prompt
            while left > 0 and (start := self.cache.length(slot)) < len(prompt):
                # A chunk is never cut to what is left: where it ends decides how it is rounded.
                piece = prompt[start : start + self.chunk]
                if len(piece) > left and left < self.chunk:
                    return
                logits = self._reader.read_slot(piece, slot, self.cache)
                left -= len(piece)
                self.statistics.tokens_read += len(piece)
                if self.prefixes:
                    self.prefixes.keep(prompt, slot)
                if start + len(piece) == len(prompt):
                    self._choose(handle, logits)
                    break

    def _choose(self, handle: Handle, logits: torch.Tensor) -> None:
        row = handle._row
        try:
            token = row.choose(logits)
            is_new = row.push(token)
        except InputError as error:
            self._leave(handle, error)
            return
        if is_new:
            self.statistics.tokens_written += 1
            handle._give(token)
        if row.stop_reason is not None:
            self._leave(handle, row.completion())

    def _leave(self, handle: Handle, outcome: Completion | Exception) -> None:
        self.cache.give_back(_slot(handle))
        with self.changed:
            self._running.remove(handle)
        self._finish(handle, outcome)

    def _finish(self, handle: Handle, outcome: Completion | Exception) -> None:
        with self.changed:
            if isinstance(outcome, Exception):
                self.statistics.failed += 1
            elif outcome.stop_reason == "cancelled":
                self.statistics.cancelled += 1
            else:
                self.statistics.finished += 1
        handle._end(outcome)


def _slot(handle: Handle) -> int:
    assert handle._slot is not None, "the request is running"
    return handle._slot
