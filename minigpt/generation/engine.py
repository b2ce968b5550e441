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
once; a prefix that is reused changes nothing, as it ends where a chunk does. A window (options.window) slides
when max_length is full. Guesses do not go with an engine: they pay where one row is written, and here the
weights are read for all rows at once.

On a GPU the tokens of running rows are written by minigpt.generation.cuda_graph, some steps at a time, and
read while the next are computed: a step of the engine then gives a row no token or several. While a request
is there whose scores depend on its text (penalties, constraints), all rows are written without it, slowly.

Memory is bounded and taken at the start: max_rows * max_length tokens of keys and values, and prefix_mib for
beginnings that prompts share (.prefixes). More requests than rows wait in a queue, which is bounded too.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.batch import NOT_FINITE
from minigpt.generation.cuda_graph import DAMAGED, StaticStep, can_choose, capacity
from minigpt.generation.decode_pipeline import Pipeline
from minigpt.generation.model_runner import Reader
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion
from minigpt.generation.prefix_cache import PrefixStore
from minigpt.generation.quantized_cache import QuantizedSlotCache
from minigpt.generation.request import TextTokenizer, base_seed, check_request, row_seed
from minigpt.generation.request_handle import Handle
from minigpt.generation.sequence import Row, check_single
from minigpt.generation.sliding_window import Window
from minigpt.generation.slot_cache import SlotCache

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


class Engine:
    """A running batch of one model, which is put into eval mode.

    `submit` and `cancel` may be called from any thread; `step` and `run` from one.

    Args:
        max_rows: requests that are written at once.
        max_length: tokens of a request, prompt included, that there is room for; None: what the model reads.
        max_waiting: requests that may wait for a row.
        chunk: tokens of prompts that are read in one step, about.
        prefix_mib: MiB for beginnings that prompts share; 0: none are kept.
        cache_implementation: "quantized" holds keys and values in int8, a quarter of float32's memory; of all
            requests, as they share the memory.
        max_cache_mib: refuse to take more for rows' keys and values; None: no limit.
        static: write with a StaticStep; None: on CUDA alone.
        burst: its steps between two looks at what was written.
        compiled: see StaticStep.

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
        cache_implementation: Literal["static", "quantized"] = "static",
        max_cache_mib: float | None = None,
        static: bool | None = None,
        burst: int = 8,
        compiled: bool = False,
    ) -> None:
        GenerationOptions(cache_implementation=cache_implementation)  # its complaint
        context = model.config.max_position_embeddings
        length = context if max_length is None else max_length
        for name, value in {
            "max_rows": max_rows,
            "max_length": length,
            "chunk": chunk,
            "burst": burst,
        }.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1: got {name}={value}")
        if max_waiting < 0 or prefix_mib < 0:
            raise InputError(f"must be at least 0: got max_waiting={max_waiting}, prefix_mib={prefix_mib:g}")
        if length > context:
            raise InputError(f"max_length={length} is more than the model reads: block_size={context}")
        weight = next(model.parameters())
        self.model, self.chunk, self.max_waiting = model.eval(), chunk, max_waiting
        self.max_length = length
        is_quantized = cache_implementation == "quantized"
        on_gpu = weight.device.type == "cuda" and not is_quantized
        is_static = on_gpu if static is None else static
        if is_static and is_quantized:
            raise InputError("cache_implementation=quantized does not go with static=True: leave out one")
        # the last token of a request is never read: one column less
        columns = capacity(length, context) if is_static else max(1, length - 1)
        make = QuantizedSlotCache if is_quantized else SlotCache
        self.cache = make(model.config, max_rows, columns, weight.device, weight.dtype, max_cache_mib)
        self.pipeline: Pipeline | None = None
        if is_static:
            self.pipeline = Pipeline(StaticStep(model, self.cache, length, burst, compiled=compiled))
        self.prefixes = PrefixStore(self.cache, chunk, prefix_mib) if prefix_mib else None
        self.statistics = Statistics()
        self.is_driven = False  # a thread calls step: nobody else must
        self.changed = threading.Condition()  # guards what follows; notified when there is something to do
        self._waiting: deque[Handle] = deque()
        self._running: list[Handle] = []  # in the order in which they joined
        self._reader = Reader(model, cache_implementation)
        self._failure: Exception | None = None

    @property
    def bytes(self) -> int:
        """Memory of keys, values and a StaticStep's buffers, whether it is in use yet or not."""
        buffers = self.pipeline.step.bytes if self.pipeline else 0
        return self.cache.bytes + buffers + (self.prefixes.bytes if self.prefixes else 0)

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
            InputError: as generate_ids does; for beams, reports and guesses; for a prompt that, with
                max_new_tokens, is longer than max_length, unless a window slides over it.
        """
        options = options or GenerationOptions()
        check_single(options, "an engine")
        own = "quantized" if isinstance(self.cache, QuantizedSlotCache) else "static"
        for name, plain in {"cache_implementation": own, "max_cache_mib": None}.items():
            if (value := getattr(options, name)) not in (plain, getattr(GenerationOptions, name)):
                raise InputError(f"{name}={value} is no request's choice: all share the engine's cache")
        request = check_request(self.model, [prompt], options, eos_token_id, tokenizer)
        config = self.model.config
        # None asks for what there is room for; a number asks for what generate_ids would give.
        room = self.max_length if options.max_new_tokens is None else config.max_position_embeddings
        limit = max(1, options.limit(len(prompt), room))
        window = None if options.window is None else Window(options.window, options.sinks)
        if window is not None:
            if self.pipeline:
                raise InputError(
                    f"window={window.tokens} does not go with a StaticStep: Engine(..., static=False)"
                )
            window.check(self.max_length, "max_length")
        elif len(prompt) + limit > self.max_length:
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
        handle._window = window
        handle._unread = row.prompt if len(prompt) < self.max_length or window is None else window.of(prompt)
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

        With a StaticStep: what has arrived, none or several.

        A request that cannot go on (its options forbid every token) fails alone.
        """
        self._drop_cancelled()
        with self.changed:
            joining = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.cache.free))]
            self._running += joining
        for handle in joining:
            handle._slot = self.cache.take()
            if self.prefixes:
                self.statistics.tokens_reused += self.prefixes.restore(handle._unread, handle._slot)
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
        """One more token for each row whose prompt is read; or more, or those of an earlier step."""
        writing = {_slot(handle): handle for handle in self._running if self._is_read(handle)}
        rows = {slot: handle._row for slot, handle in writing.items()}
        if self.pipeline:
            if rows and all(can_choose(row.options, row.eos) for row in rows.values()):
                held = max(self.cache.length(_slot(handle)) for handle in self._running)
                self._take(writing, self.pipeline.write(rows, held))
                return
            while self.pipeline.ahead:
                self._take(writing, self.pipeline.drain())
            self.pipeline.drain()
            rows = {slot: row for slot, row in rows.items() if row.stop_reason is None}
        if rows:
            logits = self._reader.read_rows([row.last for row in rows.values()], list(rows), self.cache)
            for place, slot in enumerate(rows):
                self._choose(writing[slot], logits[place : place + 1])

    def _take(self, writing: dict[int, Handle], come: list[tuple[int, Row, list[int]]]) -> None:
        """Give rows the tokens that a StaticStep has written; what came behind a row's end is dropped."""
        for slot, row, tokens in come:
            handle = writing.get(slot)
            for token in tokens:
                if handle is None or handle._row is not row or handle.done:
                    break
                if token == DAMAGED:
                    self._leave(handle, InputError(NOT_FINITE))
                else:
                    self.cache.advance(slot, 1)
                    self._push(handle, token)

    def _is_read(self, handle: Handle) -> bool:
        """Is there nothing left of the prompt? A StaticStep reads the last token: so it gives the first."""
        if self.pipeline:
            return bool(handle._row.ids) or self.cache.length(_slot(handle)) == handle._row.first
        return not handle._unread

    def _read_prompts(self) -> None:
        """Whole chunks of joining prompts, and new windows, in the order in which the requests came."""
        left = self.chunk
        for handle in [handle for handle in self._running if not self._is_read(handle)]:
            slot, prompt = _slot(handle), handle._unread
            end = len(prompt) - 1 if self.pipeline else len(prompt)
            while left > 0 and (start := self.cache.length(slot)) < end:
                # A chunk is never cut to what is left: where it ends decides how it is rounded.
                piece = prompt[start : min(start + self.chunk, end)]
                if len(piece) > left and left < self.chunk:
                    return
                logits = self._reader.read_slot(piece, slot, self.cache)
                left -= len(piece)
                self.statistics.tokens_read += len(piece)
                if self.prefixes:
                    self.prefixes.keep(prompt, slot)
                if start + len(piece) == len(prompt):
                    handle._unread = []
                    self._choose(handle, logits)
                    break

    def _choose(self, handle: Handle, logits: torch.Tensor) -> None:
        try:
            self._push(handle, handle._row.choose(logits))
        except InputError as error:
            self._leave(handle, error)

    def _push(self, handle: Handle, token: int) -> None:
        row = handle._row
        if row.push(token):
            self.statistics.tokens_written += 1
            handle._give(token)
        if row.stop_reason is not None:
            self._leave(handle, row.completion())
        elif handle._window and self.cache.length(_slot(handle)) + 1 == self.max_length:  # no room for more
            handle._unread = handle._window.of([*row.prompt, *row.ids])
            self.cache.empty(_slot(handle))

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
