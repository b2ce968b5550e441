"""Serves many requests with one decoding loop. Requests join and leave the loop at any time.

    engine = Engine(model, max_rows=8)
    handles = [engine.submit(prompt, options, eos_token_id=2) for prompt in prompts]
    for token in handles[0]:                     # yields each new token; the other requests progress, too
        ...
    handles[1].cancel()                          # ends this request
    completions = [handle.result() for handle in handles]

Prompts and results are ids. Iterating over a handle runs the engine's steps, unless a thread runs them:

    with EngineThread(Engine(model)) as engine:
        handle = engine.submit(prompt, options)      # from any thread

The result of a request does not depend on other requests: a prompt is always read in the same chunks, and the
C code computes each token in the same way (minigpt.generation.native). If the beginning of a prompt is in the
prefix cache, the keys and values of whole chunks are copied, so the result is the same. generate_ids gives
the same result, except for rounding: it reads a long prompt in one call, the engine reads it in chunks.

On a GPU, CUDA graphs decode several steps at a time (minigpt.generation.cuda_graph). A step of the engine
then gives a request no token, one or several. CUDA graphs cannot decode some requests, for example those with
penalties, constraints, speculative decoding or the option `window` (see `can_choose`). While there is such a
request, all requests are decoded without graphs, which is slow.

A model may have several adapters beside its weights (load_model(..., adapter={"zh": ..., "en": ...})). A
request may name an adapter, and one batch may hold requests with different adapters:

    engine.submit(prompt, options, adapter="zh")

PyTorch runs such a model, not the C code. The product with the weights is computed once for the whole batch,
and each adapter only for its rows. CUDA graphs do not decode such requests.

Memory is bounded and allocated at the start: keys and values of max_rows * max_length tokens, and prefix_mib
MiB for beginnings that prompts share. At most max_rows requests are decoded together. At most max_waiting
more requests wait in a queue.
"""

import threading
from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from types import TracebackType

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.layers import check_adapters
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
    """The queue of waiting requests is full. The caller may try again later."""


@dataclass
class Statistics:
    """Counts the requests, tokens and steps of an engine."""

    finished: int = 0  # number of requests that ended normally: not cancelled, not failed
    cancelled: int = 0
    failed: int = 0
    tokens_read: int = 0  # number of prompt tokens that the model has read
    tokens_reused: int = 0  # number of prompt tokens that were copied from the prefix cache
    tokens_written: int = 0  # number of new tokens that requests got
    steps: int = 0  # number of steps with at least one running request


class Engine:
    """Decodes the requests to one model. Puts the model into eval mode.

    Any thread may call `submit` and `cancel`; only one thread may call `step` and `run`.

    Args:
        max_rows: largest number of requests that are decoded together.
        max_length: largest number of tokens of a request, prompt included; None: the model's context.
        max_waiting: largest number of requests that may wait, in addition to max_rows that are decoded.
        chunk: approximate number of prompt tokens that are read in one step.
        prefix_mib: MiB for keys and values of beginnings that prompts share; 0: no beginnings are kept.
        max_cache_mib: largest number of MiB for keys and values of the requests; None: no limit.
        cuda_graph: True: decode with a GraphDecoder. False: do not. None: do so only if the device is CUDA.
        burst: largest number of GraphDecoder steps that are started together.
        compiled: see GraphDecoder.

    Raises:
        InputError: if a size is out of range, or the cache needs more than max_cache_mib.
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
        # a request's last token is never passed to the model, so it needs no column of the cache
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
        self.is_driven = False  # True: an EngineThread calls `step`, so other threads must not
        self.changed = threading.Condition()  # guards the attributes below; notified when there is work
        self._waiting: deque[RequestHandle] = deque()
        self._running: dict[Sequence, RequestHandle] = {}
        self._failure: Exception | None = None

    @property
    def bytes(self) -> int:
        """Size in bytes of the memory for keys, values and the GraphDecoder's buffers."""
        buffers = self.pipeline.step.bytes if self.pipeline else 0
        return self.cache.bytes + buffers + (self.prefixes.bytes if self.prefixes else 0)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot (memory for keys and values of one sequence)."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests in the decoding loop."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """True if no request is waiting or running."""
        return not self._waiting and not self._running

    def submit(
        self,
        prompt: Ids[int],
        options: GenerationOptions | None = None,
        eos_token_id: int | Ids[int] | None = None,
        tokenizer: TextTokenizer | None = None,
        copy: int = 0,
        adapter: str | Ids[str] | None = None,
    ) -> RequestHandle:
        """Add a request and return its handle immediately.

        The request waits in the queue while max_rows other requests are being decoded.

        Arguments that are not listed here are as for generate_ids.

        Args:
            copy: selects one answer. generate_ids gives num_return_sequences answers to a prompt; this
                request gives the answer with the index `copy` (from 0), with the same random numbers.
            adapter: name of an adapter of the model. A list of names: all these adapters are applied. An
                empty list: none is applied. None: the adapters that are active in the model are applied.

        Raises:
            QueueFullError: if max_waiting requests are waiting already.
            InputError: as generate_ids; for options that an engine does not support (several sequences,
                outputs such as scores, max_cache_mib); if prompt and max_new_tokens together exceed
                max_length and the option `window` is not set; for an unknown adapter.
        """
        options = options or GenerationOptions()
        sequence = self._sequence(prompt, options, eos_token_id, tokenizer, copy)
        if adapter is not None:
            sequence.adapters = (adapter,) if isinstance(adapter, str) else tuple(adapter)
            check_adapters(self.model, sequence.adapters)
        handle = RequestHandle(self, sequence)
        with self.changed:
            if self._failure is not None:
                raise InputError(f"the engine takes no more requests: {self._failure}")
            # A request that gets a free slot at the next step does not count as waiting.
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
        # Without max_new_tokens, the engine's max_length limits the answer. With max_new_tokens, the limit is
        # the same as in generate_ids, so that the results are equal.
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
        """Stop a request. No effect on a request that has ended.

        A waiting request ends now, a running request at the beginning of the next step.
        """
        with self.changed:
            if handle.done or handle._is_cancelled:
                return
            handle._is_cancelled = True
            if handle in self._waiting:
                self._waiting.remove(handle)
                self._finish(handle, Completion([], "cancelled"))
            self.changed.notify_all()

    def close(self) -> None:
        """Cancel all requests immediately, and refuse new requests.

        Only the thread that calls `step` may call this method.
        """
        with self.changed:
            # Set the failure before cancelling. Otherwise a request that arrives now would be accepted, and
            # wait for ever.
            self._failure = InputError("it was closed")
            handles = [*self._waiting, *self._running.values()]
        for handle in handles:
            self.cancel(handle)
        self._drop_cancelled()

    def run(self) -> None:
        """Call `step` until no request is left."""
        while self.step():
            pass

    def step(self) -> bool:
        """Do one step of the decoding loop for all requests. Return True if requests are left.

        If a request cannot continue, because its options forbid every token, only this request fails.
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
        """End all requests with this error, and refuse new requests."""
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
        # No lock is needed here: only the thread that calls `step` adds tokens. Another thread calls this
        # method only to cancel a waiting request, which has no tokens.
        if new := handle._update(outcome):
            self.statistics.tokens_written += new


class EngineThread:
    """A thread that runs an engine's steps inside a `with` block, so that other threads can wait for tokens.

    The thread sleeps while the engine has no request. The end of the block cancels all requests and closes
    the engine. If a step fails, all requests end with its error, and new requests are refused.
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
