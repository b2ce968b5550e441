"""Requests that join and leave one decoding loop at any time: what a server writes its answers with.

    engine = Engine(model, max_rows=8)
    handles = [engine.submit(prompt, options, eos_token_id=2) for prompt in prompts]
    for token in handles[0]:                     # as they come, while the others are written too
        ...
    handles[1].cancel()                          # its slot is free at the next token
    completions = [handle.result() for handle in handles]

Ids in, ids out. Iterating over a handle drives the engine, unless a thread does:

    with EngineThread(Engine(model)) as engine:
        handle = engine.submit(prompt, options)      # from any thread

A request's result is the one that generate_ids gives it alone, and does not depend on other requests: a
prompt is read in the same chunks in any company, and (in C, see minigpt.generation.native) a token is
computed in the same way. Only a prompt of several chunks is rounded in another order than by generate_ids,
which reads it at once; a reused prefix changes nothing, as it ends where a chunk does.

On a GPU CUDA graphs decode, some steps at a time (minigpt.generation.cuda_graph): a step of the engine then
gives a request no token or several. While there is a request that they cannot decode (penalties, constraints,
a window, guesses), all requests are decoded without them, slowly.

Memory is bounded and taken at the start: max_rows * max_length tokens of keys and values, and prefix_mib for
beginnings that prompts share. More requests than rows wait in a queue, which is bounded too.
"""

import threading
from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from types import TracebackType

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.burst_pipeline import BurstPipeline
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.cuda_graph import GraphDecoder, capacity
from minigpt.generation.loop import DecodingLoop
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion
from minigpt.generation.prefix_cache import PrefixCache
from minigpt.generation.request_handle import RequestHandle
from minigpt.generation.sequence import Sequence, TextTokenizer, base_seed, check_request, row_seed
from minigpt.generation.speculative_decoding import speculation

__all__ = ["Engine", "EngineThread", "QueueFullError", "RequestHandle", "Statistics"]


class QueueFullError(InputError):
    """The queue is full: try later."""


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
    """Requests to one model, which is put into eval mode.

    `submit` and `cancel` may be called from any thread; `step` and `run` from one.

    Args:
        max_rows: requests that are written at once.
        max_length: tokens of a request, prompt included, at most; None: what the model reads.
        max_waiting: requests that may wait for a row.
        chunk: tokens of prompts that are read in one step, about.
        prefix_mib: MiB for beginnings that prompts share; 0: none are kept.
        max_cache_mib: refuse to take more for rows' keys and values; None: no limit.
        cuda_graph: decode by a GraphDecoder; None: on CUDA alone.
        burst: its steps between two looks at the new tokens.
        compiled: see GraphDecoder.

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
        cuda_graph: bool | None = None,
        burst: int = 8,
        compiled: bool = False,
    ) -> None:
        context = model.config.max_position_embeddings
        length = context if max_length is None else max_length
        sizes = {"max_rows": max_rows, "max_length": length, "chunk": chunk, "burst": burst}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1: got {name}={value}")
        if max_waiting < 0 or prefix_mib < 0:
            raise InputError(f"must be at least 0: got max_waiting={max_waiting}, prefix_mib={prefix_mib:g}")
        if length > context:
            raise InputError(f"max_length={length} is more than the model reads: block_size={context}")
        weight = next(model.parameters())
        self.model, self.max_waiting, self.max_length = model.eval(), max_waiting, length
        has_graphs = weight.device.type == "cuda" if cuda_graph is None else cuda_graph
        # the last token of a request is never read: one column less
        columns = capacity(length, context) if has_graphs else max(1, length - 1)
        self.cache = KeyValueCache(
            model.config, max_rows, columns, weight.device, weight.dtype, max_cache_mib
        )
        self.pipeline: BurstPipeline | None = None
        if has_graphs:
            self.pipeline = BurstPipeline(GraphDecoder(model, self.cache, length, burst, compiled=compiled))
        self.prefixes = PrefixCache(self.cache, chunk, prefix_mib) if prefix_mib else None
        self.loop = DecodingLoop(model, self.cache, length, chunk, self.prefixes, self.pipeline)
        self.statistics = Statistics()
        self.is_driven = False  # a thread calls step: others must not
        self.changed = threading.Condition()  # guards the following; notified when there is something to do
        self._waiting: deque[RequestHandle] = deque()
        self._running: dict[Sequence, RequestHandle] = {}
        self._failure: Exception | None = None

    @property
    def bytes(self) -> int:
        """Memory of keys, values and a GraphDecoder's buffers, in use or not."""
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
        prompt: Ids[int],
        options: GenerationOptions | None = None,
        eos_token_id: int | Ids[int] | None = None,
        tokenizer: TextTokenizer | None = None,
        copy: int = 0,
    ) -> RequestHandle:
        """Ask for what follows a prompt. Arguments as generate_ids; it begins once there is a slot.

        Args:
            copy: draw as generate_ids does for this one of num_return_sequences.

        Raises:
            QueueFullError: if max_waiting requests wait already: try later.
            InputError: as generate_ids does; for options that do not make one sequence of ids; for a prompt
                that, with max_new_tokens, is longer than max_length, unless a window slides over it.
        """
        options = options or GenerationOptions()
        sequence = self._sequence(prompt, options, eos_token_id, tokenizer, copy)
        handle = RequestHandle(self, sequence)
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

    def _sequence(
        self,
        prompt: Ids[int],
        options: GenerationOptions,
        eos_token_id: int | Ids[int] | None,
        tokenizer: TextTokenizer | None,
        copy: int,
    ) -> Sequence:
        for name in ("num_beams", "num_return_sequences"):
            if getattr(options, name) > 1:
                raise InputError(
                    f"{name}={getattr(options, name)}: an engine writes one sequence for a request; use "
                    "generate_ids"
                )
        if options.reports:
            raise InputError(f"{options.reports[0]}: an engine returns ids alone; use generate_output")
        if options.max_cache_mib is not None:
            raise InputError(
                f"max_cache_mib={options.max_cache_mib:g} is the engine's: requests share a cache"
            )
        request = check_request(self.model, [prompt], options, eos_token_id, tokenizer)
        # None asks for as many tokens as fit; a number asks for what generate_ids would give.
        longest = self.max_length
        if options.max_new_tokens is not None:
            longest = self.model.config.max_position_embeddings
        limit = max(1, options.limit(len(prompt), longest))
        if options.window is not None and options.window >= self.max_length:
            raise InputError(
                f"window must be fewer tokens than max_length={self.max_length}: got window={options.window}"
            )
        if options.window is None and len(prompt) + limit > self.max_length:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and up to {limit} new ones need max_length="
                f"{len(prompt) + limit}: the engine has max_length={self.max_length}; shorten the prompt or "
                "lower max_new_tokens"
            )
        seed = base_seed(options)
        sequence = Sequence(prompt, request, limit, None if seed is None else row_seed(seed, 0, copy))
        if options.prompt_lookup_num_tokens is not None:
            sequence.speculation = speculation(options)
        return sequence

    def cancel(self, handle: RequestHandle) -> None:
        """Stop a request; see RequestHandle.cancel."""
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
            self._failure = InputError("it was closed")  # first: a request that comes now would wait for ever
            handles = [*self._waiting, *self._running.values()]
        for handle in handles:
            self.cancel(handle)
        self._drop_cancelled()

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.step():
            pass

    def step(self) -> bool:
        """A step of the decoding loop; returns whether more is left.

        A request that cannot continue (its options forbid every token) fails alone.
        """
        self._drop_cancelled()
        with self.changed:
            joining = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.cache.n_free))]
            self._running |= {handle._sequence: handle for handle in joining}
        for handle in joining:
            self.loop.add(handle._sequence)
        if self._running:
            self.statistics.steps += 1
            ended = self.loop.step()
            self.statistics.tokens_read = self.loop.tokens_read
            self.statistics.tokens_reused = self.loop.tokens_reused
            for sequence in self.loop.running:
                self._show(self._running[sequence])
            for sequence in ended:
                self._leave(sequence, sequence.error or sequence.completion())
        return not self.is_idle

    def fail(self, error: Exception) -> None:
        """End all requests with this error; no others are taken."""
        with self.changed:
            self._failure = error
            waiting = list(self._waiting)
            self._waiting.clear()
        for sequence in list(self.loop.running):
            self.loop.remove(sequence)
        for sequence in list(self._running):
            self._leave(sequence, error)
        for handle in waiting:
            self._finish(handle, error)

    def _drop_cancelled(self) -> None:
        for sequence, handle in list(self._running.items()):
            if handle._is_cancelled:
                self.loop.remove(sequence)
                self._leave(sequence, Completion(list(sequence.ids), "cancelled"))

    def _leave(self, sequence: Sequence, outcome: Completion | Exception) -> None:
        with self.changed:
            handle = self._running.pop(sequence)
        self._finish(handle, outcome)

    def _finish(self, handle: RequestHandle, outcome: Completion | Exception) -> None:
        with self.changed:
            if isinstance(outcome, Exception):
                self.statistics.failed += 1
            elif outcome.stop_reason == "cancelled":
                self.statistics.cancelled += 1
            else:
                self.statistics.finished += 1
        self._show(handle, outcome)

    def _show(self, handle: RequestHandle, outcome: Completion | Exception | None = None) -> None:
        # One thread adds, the one that steps: what others cancel while it waits for a row has no tokens.
        if new := handle._update(outcome):
            self.statistics.tokens_written += new


class EngineThread:
    """A thread that drives an engine between `with` and its end, so that other threads can wait for tokens.

    It sleeps while there is nothing to do. The end cancels what is not finished, and closes the engine. If a
    step fails, all requests end with its error, and no more are taken.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_closing = False
        self._thread = threading.Thread(target=self._drive, name="minigpt engine", daemon=True)

    def __enter__(self) -> Engine:
        assert not self._engine.is_driven, "one thread drives an engine"
        self._engine.is_driven = True
        self._thread.start()
        return self._engine

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._engine.changed:
            self._is_closing = True
            self._engine.changed.notify_all()
        self._thread.join()
        self._engine.is_driven = False

    def _drive(self) -> None:
        engine = self._engine
        try:
            while True:
                with engine.changed:
                    engine.changed.wait_for(lambda: self._is_closing or not engine.is_idle)
                if self._is_closing:
                    engine.close()
                    return
                engine.step()
        except Exception as error:
            engine.fail(error)
