"""Decodes with CUDA graphs on a GPU: each step replays one graph. On a CPU the same step runs eagerly.

    decoder = GraphDecoder(model, cache, max_length)
    decoder.start(slot, sequence)
    burst = decoder.run(rows=4, columns=256, steps=8)    # returns immediately, before the device has finished
    burst.tokens()                                       # waits for the device; 8 lists of 4 ids

At batch 1, launching hundreds of kernels for each token takes longer than running them. A graph launches all
kernels with one call. A graph cannot ask the CPU for anything. So the newest id, the present length and the
final length of each sequence are in buffers on the device. The device also chooses the tokens, and detects
the end of a sequence. Several steps are launched together, as a burst. The CPU gets the ids once per burst
(minigpt.generation.burst_pipeline).

The model is unchanged. A graph needs static shapes, so the model gets a special cache, `_Columns`. This cache
always claims to hold S - 1 tokens per row, and the attention mask hides the columns in which a row has no
token. The keys and values of a new token are written twice: into the last column, where the model expects
them in this step, and into the token's own column, for later steps. In this step, the mask hides the token's
own column, so the token is not counted twice. Each pair (rows, columns) has its own graph; `sizes` allows
only a few numbers, so there are few graphs.

Letters in shapes: B rows, S columns, V entries of the vocabulary, H heads of queries, K heads of keys, D
channels of one head, W steps of a burst.
"""

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minigpt.families.registry import LanguageModel
from minigpt.generation import sampling
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.sequence import Sequence

__all__ = [
    "DAMAGED", "MAX_EOS", "NOTHING", "DecodeBurst", "GraphDecoder", "Graphs",
    "can_choose", "capacity", "eager", "sizes",
]  # fmt: skip

NOTHING = -1  # given instead of a token id, if the row has no new token
DAMAGED = -2  # given instead of a token id, if the row's scores are not finite
MAX_EOS = 8  # a graph can decode a sequence only if at most this many ids (eos ids) can end the sequence
_FEWEST_COLUMNS = 128
# Sampling options that the device applies, each with the value that switches it off. Each row of a batch may
# have its own values.
_FILTERS: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def capacity(max_length: int, context: int) -> int:
    """Return the number of columns (one for each token) that a cache needs for rows of max_length tokens.

    A row needs max_length columns. max_length - 1 columns are for tokens, because the last token of a row is
    chosen, but never given to the model. One more column is overwritten by each step (see `_Columns`). The
    number is rounded up to a multiple of 16, because attention kernels are then fast. It never exceeds
    `context`, the model's number of positions.
    """
    return min(-(-max_length // 16) * 16, context)


def sizes(largest: int, least: int) -> list[int]:
    """Return the numbers of rows (or columns) for which graphs exist: least * 1, 2, 4, 8, ... and largest.

    Other numbers are rounded up to one of these, so there are few graphs.

    >>> sizes(48, 1)
    [1, 2, 4, 8, 16, 32, 48]
    """
    found = []
    while least < largest:
        found.append(least)
        least *= 2
    return [*found, largest]


def can_choose(sequence: Sequence) -> bool:
    """Return True if a CUDA graph can decode this sequence.

    A graph cannot decode a sequence with any of these options: penalties, biases, forbidden tokens,
    constraints, typical_p, `window`, speculative decoding, use_cache=False. Nor can it decode a sequence
    whose request names adapters, or a sequence with more than MAX_EOS eos ids.
    """
    options = sequence.request.options
    is_plain = options.window is None and options.use_cache and sequence.speculation is None
    is_plain = is_plain and sequence.adapters is None
    chooses = not options.changes_scores and options.constraint is None and options.typical_p == 1
    return is_plain and chooses and len(sequence.eos) <= MAX_EOS


class _Columns:
    """Shows the first `rows` slots of the cache to the model, as if each slot held `columns` - 1 tokens.

    The shapes are then the same in each step, as a CUDA graph requires.
    """

    def __init__(self, cache: KeyValueCache, places: Tensor, rows: int, columns: int) -> None:
        self._cache, self._rows, self._columns = cache, rows, columns
        self._places = places[:, None, None, None]  # (B, 1, 1, 1)  column of each row's new token
        self.length = columns - 1

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, 1, D) of each row's new token. Return keys and values, (B, K, S, D) each.

        k and v are written twice: to the last column, where the model expects them in this step, and to the
        token's own column, for later steps. In this step, the attention mask hides the own column.
        """
        found = []
        for held, new in zip(self._cache.layer(layer), (k, v)):
            view = held[: self._rows, :, : self._columns]  # (B, K, S, D)
            view.scatter_(2, self._places.expand_as(new), new)
            view[:, :, -1:] = new
            found.append(view)
        return found[0], found[1]

    def advance(self, tokens: int) -> None:
        """Do nothing, because GraphDecoder counts the lengths on the device."""
        assert tokens == 1, "one token of each row"


class _GroupedQueries(TorchFunctionMode):
    """Makes scaled_dot_product_attention faster for grouped queries, in steps with one new token per row.

    With grouped queries, several query heads share one key head. If there is a mask, PyTorch would copy all
    keys and values for each query head. To avoid this, the query heads of one key head are passed as if they
    were several tokens of one head. They all belong to the same new token, so one mask is right for them all.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Rows[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`. If it is scaled_dot_product_attention, regroup its queries first."""
        more = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and more.pop("enable_gqa", False):
            q, k, v = args  # (B, H, 1, D); k and v are (B, K, S, D)
            grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, K, H / K, D)
            return func(grouped, k, v, **more).reshape(q.shape)  # (B, H, 1, D)
        return func(*args, **(kwargs or {}))


# backend(key, step, prepare) runs a decoding step: it calls step(), or replays the step's CUDA graph. Steps
# with equal keys can share a graph. prepare() launches the same kernels as step(), but changes no sequence.
# So a backend can run prepare() first, and then record step() as a graph.
Backend = Callable[[Hashable, Callable[[], None], Callable[[], None]], None]


def eager(key: Hashable, step: Callable[[], None], prepare: Callable[[], None]) -> None:
    """Run a step directly, without a CUDA graph: for a CPU and for tests. Only `step` is used."""
    step()


class Graphs:
    """Records a step as a CUDA graph when its key first occurs, and replays the graph from then on.

    All graphs share one memory pool. Sharing is safe, because graphs never run at the same time, and their
    results are written to buffers outside the pool.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    @property
    def count(self) -> int:
        """Number of graphs recorded so far."""
        return len(self._graphs)

    def __call__(self, key: Hashable, step: Callable[[], None], prepare: Callable[[], None]) -> None:
        """If the key is new, run prepare() and record step() as a graph. Then replay the graph."""
        if key not in self._graphs:
            # Run `prepare` first: libraries initialise themselves at their first use, and a graph must not
            # record this initialisation.
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                prepare()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may allocate memory during the recording, for example for new
            # requests
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
            self._pool = self._pool or graph.pool()
            self._graphs[key] = graph
        self._graphs[key].replay()


class DecodeBurst:
    """The tokens chosen by a burst (several decoding steps), while they are copied to the CPU."""

    def __init__(self, written: Tensor, host: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        # the copy is asynchronous only if both tensors are contiguous and the CPU memory is pinned
        self._host = host.view(-1)[: written.numel()].view(written.shape)
        self._host.copy_(written.contiguous(), non_blocking=True)
        if written.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def tokens(self) -> list[list[int]]:
        """Wait until the ids are on the CPU. Return a list for each step, with an id for each row.

        NOTHING takes the place of an id if the row has no new token, DAMAGED if the row's scores are not
        finite. Call this method before three more bursts are started: the third one reuses the memory.
        """
        if self._event is not None:
            self._event.synchronize()
        ids: list[list[int]] = self._host.tolist()
        return ids


class GraphDecoder:
    """Runs decoding steps for several rows, and holds the buffers on the device that the steps need.

    Args:
        model: a model in eval mode. The weights must not move, because a graph holds their addresses.
        cache: a cache of this model's dtype whose slots have capacity(max_length, context) columns.
        max_length: largest number of tokens of a row, prompt included.
        burst: largest number of steps that are launched together (a burst).
        backend: runs the steps; None: Graphs on CUDA, else eager.
        compiled: True: torch.compile fuses the model's small kernels before the graph is recorded. Compiling
            takes seconds to minutes for each size; the gain is not yet measured. (torch.compile's mode
            "reduce-overhead" is not used: it would make its own CUDA graphs, and copy our buffers.)
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: KeyValueCache,
        max_length: int,
        burst: int = 8,
        backend: Backend | None = None,
        compiled: bool = False,
    ) -> None:
        keys, _ = cache.layer(0)
        device, slots = keys.device, cache.slots
        self.cache, self.burst = cache, burst
        self._model = model
        self._logits: Callable[[Tensor, Tensor, Tensor, int], Tensor] = self._model_logits
        if compiled:
            # torch.compile compiles again for each pair (rows, columns), so raise its limit on recompilations
            torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
            self._logits = torch.compile(
                self._model_logits, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs"
            )
        self._backend: Backend = backend or (Graphs() if device.type == "cuda" else eager)

        def whole(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        self._ids, self._lengths, self._first, self._ends = (whole(slots) for _ in range(4))
        self._active = torch.zeros(slots, dtype=torch.bool, device=device)
        self._eos = whole(slots, MAX_EOS, fill=NOTHING)
        self._samples = torch.zeros(slots, dtype=torch.bool, device=device)
        self._tokens, self._vocab_size = whole(slots), model.config.vocab_size
        self._values = {
            name: torch.full((slots, 1), off, dtype=torch.int64 if name == "top_k" else torch.float32).to(
                device
            )
            for name, off in _FILTERS.items()
        }
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._drawn = torch.zeros(slots, max_length, dtype=dtype, device=device)
        self._written = whole(burst, slots, fill=NOTHING)  # (W, slots)  ids chosen by the steps of a burst
        self._tick = whole(1)  # (1,)  index of the row of _written that the next step fills
        # Three buffers in CPU memory, used in turn, so that a burst does not overwrite ids that the CPU has
        # not read yet.
        self._hosts = deque(
            torch.empty((burst, slots), dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(3)
        )
        # slot -> the parts of `_choose` that the slot's sequence needs, such as "sample" or "top_k"
        self._uses: dict[int, frozenset[str]] = {}

    @property
    def bytes(self) -> int:
        """Size of the buffers on the device in bytes, without the cache and the graphs' own memory."""
        own = [one for one in vars(self).values() if isinstance(one, Tensor)]
        return sum(tensor.nbytes for tensor in (*own, *self._values.values()))

    def start(self, slot: int, sequence: Sequence) -> None:
        """Copy a sequence's state to the device. From the next call of `run` on, the sequence is decoded.

        The cache's slot must hold all tokens of the sequence except the last one.
        """
        assert can_choose(sequence), "the host chooses for this sequence"
        options, held, first = sequence.request.options, len(sequence.context) - 1, sequence.n_cached_at_first
        uses: set[str] = set()
        if sequence.uniform is not None:
            uses = {"sample"} | {name for name, off in _FILTERS.items() if getattr(options, name) != off}
            self._drawn[slot, : sequence.limit].copy_(torch.from_numpy(sequence.uniform), non_blocking=True)
        tokens = sequence.request.tokens or self._vocab_size
        uses |= {"tokens"} if tokens < self._vocab_size else set()
        for name, off in _FILTERS.items():
            self._values[name][slot].fill_(off if sequence.uniform is None else getattr(options, name))
        for buffer, value in (
            (self._tokens, tokens),
            (self._samples, sequence.uniform is not None),
            (self._ids, sequence.context[-1]),
            (self._lengths, held),
            (self._first, first),
            (self._ends, first + sequence.limit),
            (self._eos, NOTHING),
            (self._active, held < first + sequence.limit),
        ):
            buffer[slot].fill_(value)
        for place, token in enumerate(sequence.eos):
            self._eos[slot, place].fill_(token)
        self._uses[slot] = frozenset(uses)

    def stop(self, slot: int) -> None:
        """Stop decoding a slot. Later calls of `run` do not change this slot."""
        self._active[slot].fill_(False)
        self._uses.pop(slot, None)

    def run(self, rows: int, columns: int, steps: int) -> DecodeBurst:
        """Start decoding steps for the first slots. Return a DecodeBurst, without waiting for the device.

        `rows` and `columns` are rounded up to the numbers that `sizes` allows.

        Args:
            rows: number of slots to compute; must be more than the index of the highest used slot.
            columns: number of columns that attention reads. Each step overwrites the last of these columns in
                all computed slots, so no slot may hold a token there. So give at least the number of tokens
                that the fullest slot holds after all steps, plus 1. Count also slots that are not decoded,
                for example because their prompts are still being read.
            steps: number of steps, at most `burst`.
        """
        assert 1 <= steps <= self.burst, "the buffer has room for so many"
        rows = next(size for size in sizes(self.cache.slots, 1) if size >= rows)
        columns = next(size for size in sizes(self.cache.max_length, _FEWEST_COLUMNS) if size >= columns)
        uses = frozenset().union(*self._uses.values())
        self._tick.zero_()
        for _ in range(steps):
            self._backend(
                (rows, columns, uses),
                lambda: self._step(rows, columns, uses),
                lambda: self._prepare(rows, columns, uses),
            )
        self._hosts.rotate()
        return DecodeBurst(self._written[:steps, :rows], self._hosts[0])

    def _prepare(self, rows: int, columns: int, uses: frozenset[str]) -> None:
        """Run a step in which no row is active, so that it changes no sequence.

        It only writes to the last of the `columns` columns and to one row of `_written`. The next step
        overwrites both.
        """
        active, tick = self._active.clone(), self._tick.clone()
        self._active.fill_(False)
        self._step(rows, columns, uses)
        self._active.copy_(active)
        self._tick.copy_(tick)

    # -- steps, which graphs record: no value may come from the CPU, no shape may depend on a value ---------

    def _step(self, rows: int, columns: int, uses: frozenset[str]) -> None:
        """Decode one token of each active row. All buffers change in place."""
        active, lengths = self._active[:rows], self._lengths[:rows]  # (B,) each
        logits = self._logits(self._ids[:rows], lengths, active, columns)  # (B, V)
        tokens = self._choose(logits, uses)  # (B,)
        # (B,)  False: the row has a NaN or +inf, which amax then returns, or all its logits are -inf
        sound = logits.amax(dim=-1).isfinite()
        # (B,)  what the CPU gets for each row: the new id, DAMAGED or NOTHING
        said = tokens.masked_fill(~sound, DAMAGED).masked_fill(~active, NOTHING)
        self._written[:, :rows].index_copy_(0, self._tick, said[None])
        self._tick += 1
        self._ids[:rows].copy_(tokens.where(active & sound, self._ids[:rows]))
        lengths += active
        ended = (tokens[:, None] == self._eos[:rows]).any(dim=-1)  # (B,)  True: the new token is an eos
        active &= sound & ~ended & (lengths < self._ends[:rows])

    def _model_logits(self, ids: Tensor, lengths: Tensor, active: Tensor, columns: int) -> Tensor:
        """Return the logits (B, V) in float32 after `ids` (B,), the newest tokens of the first B slots."""
        B = len(ids)
        # The step computes all rows, but must not change a row that is not active. So the keys and values
        # of such a row go to the last column only, which each step overwrites.
        places = lengths.masked_fill(~active, columns - 1)  # (B,)  column of each row's new token
        # (B, S)  True: the column holds an earlier token of the row
        held = torch.arange(columns, device=ids.device) < lengths[:, None]
        positions = lengths.masked_fill(~active, 0)[:, None]  # (B, 1)  position of each new token
        past = _Columns(self.cache, places, B, columns)
        with _GroupedQueries():
            # `held` is False for the last column, which holds the new token. The token is visible anyway,
            # because the model lets every token attend to itself.
            hidden = self._model.base_model(ids[:, None], held, positions, past)  # (B, 1, C)
            logits: Tensor = self._model.lm_head(hidden[:, -1]).float()  # (B, V)
        return logits

    def _choose(self, logits: Tensor, uses: frozenset[str]) -> Tensor:
        """Choose the next token of each row, (B,), as minigpt.generation.loop.choose does."""
        if "tokens" in uses:
            known = torch.arange(self._vocab_size, device=logits.device) < self._tokens[: len(logits), None]
            logits = logits.where(known, -torch.inf)  # (B, V)
        most_likely = sampling.greedy(logits)  # (B,)
        if "sample" not in uses:
            return most_likely
        B = len(logits)
        values: dict[str, Any] = {name: self._values[name][:B] for name in _FILTERS if name in uses}
        # (B,)  number of new tokens of each row so far: the index of the row's next random number
        place = (self._lengths[:B] - self._first[:B]).clamp(0, self._drawn.shape[1] - 1)
        uniform = self._drawn[:B].gather(1, place[:, None])[:, 0]  # (B,)  a random number for each row
        drawn = sampling.sample(sampling.filtered(logits, **values), uniform)  # (B,)
        # If scores are NaN, the cumulative sum may never exceed the random number. The drawn id is then
        # vocab_size, which is no id, so it is limited to the last id.
        return drawn.clamp(max=logits.shape[-1] - 1).where(self._samples[:B], most_likely)
