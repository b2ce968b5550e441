"""Computes the log-likelihood of continuations. A prefix that several contexts share is computed only once.

    scorer = ContinuationScorer(model)
    found = scorer.score([(context, continuation), ...])      # ids
    found[0].total, found[0].is_greedy

A request is a context with a continuation. Requests are sorted by their ids, so that requests with the same
prefix are neighbours: questions with the same shots, choices of the same question.

1. The prefix that all requests of a batch share goes into a key-value cache. If the next batch begins with
   the same tokens, these stay in the cache.
2. After this prefix, requests that share more tokens form a tree: a shared token is in the tree once, and the
   tree forks where the requests differ. The trees are divided among rows of nearly equal length.
3. One forward pass computes all rows. A mask lets each token attend only to earlier tokens of its request.

More rows make attention faster; fewer rows mean less padding. `_in_rows_of_least_work` chooses the number of
rows. On a CPU, with weights in 16, 8 or 4 bits, minigpt's C code computes the model. The C code has no masks.
So it computes one request after another, each from the first token that differs from the request before.

Letters in shapes: R rows, L tokens of a row, W tokens of a row whose logits are needed, S tokens in the
cache, H heads, D channels of one head, C channels, V entries of the vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.loop import NOT_FINITE, evaluating
from minigpt.generation.model_runner import TorchRunner
from minigpt.generation.native import NativeRunner, runner_for
from minigpt.generation.packed_weights import PackedWeights

__all__ = ["ContinuationScorer", "Scored"]

# Largest number of tokens of a forward pass, on a CPU and on other devices. With more tokens, each layer
# would free its memory and allocate it again, which is slow.
_TOKENS = {"cpu": 1024}
_TOKENS_ON_GPU = 2048
_ROWS = 16  # largest number of rows of a forward pass
# With at least this many tokens to compute, the weights are packed first: copied into the order that matrix
# products on the CPU need. Packing takes as long as computing 100 tokens, and then saves a tenth of the time.
_TOKENS_TO_PACK = 2048
# Requests that share at most this many tokens after the batch's prefix may be put into different rows. Then
# the shared tokens are computed in each of these rows, but the rows are shorter.
_LITTLE = 8
_LOGITS = 2**24  # largest number of logits in memory at a time: 64 MiB in float32


class Scored(NamedTuple):
    """A continuation with its log-likelihood, in nats."""

    logprobs: list[float]  # log-probability of each token
    is_greedy: bool  # True if each token is the most likely one
    n_cut: int  # number of tokens left out at the beginning of the context, because it was too long
    # Number of pieces that were scored; more than 1 only if the model cannot read the continuation at once.
    pieces: int = 1

    @property
    def total(self) -> float:
        """The log-likelihood of the whole continuation."""
        return float(sum(self.logprobs))


class _Request(NamedTuple):
    read: tuple[int, ...]  # input of the model: context and continuation, without the last token
    first: int  # index in `read` of the token that predicts the first token of the continuation
    targets: tuple[int, ...]
    n_cut: int


class ContinuationScorer:
    """Scores continuations with one model. During `score`, the model is in eval mode.

    The model's weights must not change as long as the scorer lives.

    Args:
        model: the model.
        max_length: largest number of input tokens for one request; 0: as many as the model can read.

    Attributes:
        tokens_asked: number of tokens of all requests.
        tokens_read: number of tokens that the model computed; less than tokens_asked if requests share some.
    """

    def __init__(self, model: LanguageModel, max_length: int = 0) -> None:
        limit = model.config.max_position_embeddings
        self.max_length = min(max_length or limit, limit)
        self.tokens_asked = self.tokens_read = 0
        self._model = model
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._tokens = _TOKENS.get(weight.device.type, _TOKENS_ON_GPU)
        self._packed: PackedWeights | None = None
        self._cache: KeyValueCache | None = None
        self._held: tuple[int, ...] = ()  # the tokens whose keys and values are in the cache

    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[Scored]:
        """Return the score of each request, in the given order.

        If context and continuation together are too long for the model, the beginning of the context is left
        out. If the continuation alone has more than `max_length` tokens, it is scored in pieces, so that all
        of its tokens count.

        Args:
            requests: pairs (ids of the context, ids of the continuation). Neither may be empty.
            on_progress: called with the number of requests finished so far.

        Raises:
            InputError: if a context or a continuation is empty; if the model's scores are not finite.
        """
        pieces = [self._pieces(number, *request) for number, request in enumerate(requests, 1)]
        # whole[i] is the index of the request to which piece i (counted over all requests) belongs.
        whole = [i for i, some in enumerate(pieces) for _ in some]
        found = self._score(
            [piece for some in pieces for piece in some], lambda done: on_progress(whole[done - 1] + 1)
        )
        parts = iter(found)
        return [_joined([next(parts) for _ in some]) for some in pieces]

    def _score(self, prepared: list[_Request], on_progress: Callable[[int], None]) -> list[Scored]:
        order = sorted(range(len(prepared)), key=lambda i: prepared[i].read)
        found: list[Scored | None] = [None] * len(prepared)
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            stack.enter_context(torch.inference_mode())
            runner = runner_for(self._model)
            by_branch = self._reads_branches(runner)
            if self._packed is None and not by_branch and self.tokens_asked >= _TOKENS_TO_PACK:
                self._packed = PackedWeights(self._model)
            if self._packed is not None:
                stack.enter_context(self._packed.in_use())
            self._allocate(max((len(one.read) for one in prepared), default=1))
            start = 0
            while start < len(order):
                if by_branch:
                    end = start + 1
                    while end < len(order) and prepared[order[end]][:2] == prepared[order[start]][:2]:
                        end += 1
                    batch = [prepared[i] for i in order[start:end]]
                    scored = self._branch(batch, runner)
                else:
                    end, shared = self._batch(prepared, order, start)
                    batch = [prepared[i] for i in order[start:end]]
                    self._read_shared(batch[0].read[:shared])
                    scored = self._in_rows(batch, shared)
                for i, one in zip(order[start:end], scored):
                    found[i] = one
                start = end
                on_progress(end)
            self._cache, self._held = None, ()
        return [one for one in found if one is not None]

    def _pieces(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> list[_Request]:
        """Return a request in one piece, or in several if the continuation alone is too long.

        number: the request's number in an error message.
        """
        if not context or not continuation:
            empty = "context" if not context else "continuation"
            raise InputError(f"request {number} has an empty {empty}: there is nothing to score")
        found = []
        for start in range(0, len(continuation), self.max_length):
            targets = tuple(continuation[start : start + self.max_length])
            ids = (*context, *continuation[:start], *targets)
            n_cut = max(0, len(ids) - self.max_length - 1)
            read = ids[n_cut:-1]
            self.tokens_asked += len(read)
            found.append(_Request(read, len(read) - len(targets), targets, n_cut))
        return found

    def _reads_branches(self, runner: NativeRunner | TorchRunner) -> bool:
        """Return True if requests cannot be computed as trees, but only one after another.

        There are two cases. First, the C code computes the model: it has no masks. Second, the model has a
        sliding window, which is counted in columns of the input. In a tree, two neighbouring tokens of a
        request may be many columns apart.
        """
        is_sliding = getattr(self._model.config, "sliding_window", None) is not None
        return is_sliding or (isinstance(runner, NativeRunner) and runner.takes(10**9))

    def _allocate(self, longest: int) -> None:
        self._cache = KeyValueCache(self._model.config, 1, longest, self._device, self._dtype)
        self._cache.allocate()
        self._held = ()

    # -- many requests in one forward pass ------------------------------------------------------------------

    def _batch(self, requests: list[_Request], order: list[int], start: int) -> tuple[int, int]:
        """Choose the batch order[start:end]. Return (end, length of the prefix that its requests share)."""
        last = requests[order[start]]
        shared, tokens, end = last.first, len(last.read), start + 1
        while end < len(order):
            one = requests[order[end]]
            common = _common(last.read, one.read)
            new_shared = min(shared, common, one.first)
            if tokens + len(one.read) - common - new_shared > self._tokens:
                break
            shared, tokens = new_shared, tokens + len(one.read) - common
            last, end = one, end + 1
        # A batch of a single request shares its prefix with no other request of the batch. In the cache, only
        # two parts of this prefix are useful: the part that is there already, and the part that the first
        # request of the next batch also has. `shared` becomes the length of the longer part.
        if end == start + 1:
            others = [self._held, *(requests[i].read for i in order[end : end + 1])]
            shared = min(shared, max(_common(other, last.read) for other in others))
        return end, shared

    def _read_shared(self, ids: tuple[int, ...]) -> None:
        """Change the cache so that it holds exactly the keys and values of the tokens `ids`."""
        assert self._cache is not None
        kept = _common(self._held, ids)
        self._cache.truncate(0, kept)
        if kept < len(ids):
            view = self._cache.view([0], [len(ids) - kept])
            self._model.base_model(self._tensor([ids[kept:]]), None, None, view)
            self.tokens_read += len(ids) - kept
        self._held = ids

    def _in_rows(self, batch: list[_Request], shared: int) -> list[Scored]:
        assert self._cache is not None
        rows = _in_rows_of_least_work(batch, shared, self._model.config.hidden_size)
        trees = [_Tree(shared) for _ in rows]
        # For each request, the indices (in its row) of the tokens that predict its targets.
        nodes: list[list[int]] = [[] for _ in batch]
        wanted: list[list[int]] = []  # for each row, the indices of all tokens whose logits are needed
        for tree, row in zip(trees, rows):
            for i in row:
                nodes[i] = tree.add(batch[i].read)[batch[i].first - shared :]
            self.tokens_read += len(tree.tokens)
            wanted.append(sorted({node for i in row for node in nodes[i]}))
        L, W = max(len(tree.tokens) for tree in trees), max(map(len, wanted))
        for r, (row, some) in enumerate(zip(rows, wanted)):
            place = {node: r * W + w for w, node in enumerate(some)}
            for i in row:
                nodes[i] = [place[node] for node in nodes[i]]
        ids = self._tensor([[*tree.tokens, *[0] * (L - len(tree.tokens))] for tree in trees])  # (R, L)
        # If no tree forks, the usual causal mask is right, and attention is faster without an explicit mask.
        mask = positions = None
        if any(tree.forks for tree in trees):
            above = np.stack([tree.above(L) for tree in trees])  # (R, L, S + L), S shared tokens
            mask = torch.from_numpy(above).to(self._device)
            positions = self._tensor([[*tree.depths, *[0] * (L - len(tree.depths))] for tree in trees])
        columns = self._tensor([[*some, *[0] * (W - len(some))] for some in wanted])  # (R, W)
        past = _Shared(self._cache, shared)
        hidden = self._model.base_model(ids, mask, positions, past, columns=columns)  # (R, W, C)
        return self._scored(batch, nodes, hidden.flatten(0, 1), is_hidden=True)

    # -- one request after another --------------------------------------------------------------------------

    def _branch(self, batch: list[_Request], runner: NativeRunner | TorchRunner) -> list[Scored]:
        """Score requests with the same input tokens. Their last tokens, which are no inputs, may differ."""
        assert self._cache is not None
        one = batch[0]
        kept = min(_common(self._held, one.read), one.first)
        self._cache.truncate(0, kept)
        for start in range(kept, one.first, self._tokens):
            piece = one.read[start : min(start + self._tokens, one.first)]
            runner.prefill([piece], [0], self._cache)
        step = max(1, _LOGITS // self._model.config.vocab_size)
        pieces = []
        for start in range(one.first, len(one.read), step):
            row = one.read[start : start + step]
            logits: Tensor = runner.decode([row], [0], self._cache)
            pieces.append(logits.float().log_softmax(-1))  # a copy: the next `decode` overwrites `logits`
        self._held = one.read
        self.tokens_read += len(one.read) - kept
        nodes = [list(range(len(one.read) - one.first))] * len(batch)
        return self._scored(batch, nodes, torch.cat(pieces), is_hidden=False)

    # -- from the model's results to scores -----------------------------------------------------------------

    def _scored(
        self, batch: list[_Request], nodes: list[list[int]], found: Tensor, is_hidden: bool
    ) -> list[Scored]:
        """Return the scores of requests, given hidden states (T, C) or log-probabilities (T, V) of T tokens.

        Args:
            nodes: for each request, the rows of `found` that predict the tokens of its continuation.
            found: the hidden states if `is_hidden`, else the log-probabilities.
        """
        wanted = sorted({node for row in nodes for node in row})
        place = {node: i for i, node in enumerate(wanted)}
        pairs = [
            (place[node], target) for row, one in zip(nodes, batch) for node, target in zip(row, one.targets)
        ]
        by_row: dict[int, list[int]] = {}
        for number, (row, _) in enumerate(pairs):
            by_row.setdefault(row, []).append(number)
        values, best = np.empty(len(pairs)), np.empty(len(pairs), dtype=np.int64)
        step = max(1, _LOGITS // self._model.config.vocab_size)
        index = torch.tensor(wanted, device=found.device)
        for start in range(0, len(wanted), step):
            some = found[index[start : start + step]]
            logprobs = self._model.lm_head(some).float().log_softmax(-1) if is_hidden else some  # (n, V)
            numbers = [n for row in range(start, min(start + step, len(wanted))) for n in by_row[row]]
            rows = torch.tensor([pairs[n][0] - start for n in numbers], device=found.device)
            targets = torch.tensor([pairs[n][1] for n in numbers], device=found.device)
            values[numbers] = logprobs[rows, targets].cpu().numpy()
            best[numbers] = logprobs.argmax(-1)[rows].cpu().numpy()
        if np.isnan(values).any():
            raise InputError(NOT_FINITE)
        scored, start = [], 0
        for one in batch:
            end = start + len(one.targets)
            greedy = bool((best[start:end] == one.targets).all())
            scored.append(Scored(values[start:end].tolist(), greedy, one.n_cut))
            start = end
        return scored

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self._device)


class _Tree:
    """One row of a batch: several requests, in which tokens of a common beginning are stored once.

    From where requests differ, they are branches. The beginning that all rows share is left out.

    Attributes:
        tokens: the ids.
        depths: position of each token in the requests that have it.
        forks: True if requests differ somewhere in the row, so that the row is not one sequence of tokens.
    """

    def __init__(self, shared: int) -> None:
        self._shared = shared
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.forks = False
        self._parents: list[int] = []
        self._path: list[int] = []  # indices in `tokens` of the tokens of the request that was added last
        self._last: Sequence[int] | None = None

    def add(self, ids: Sequence[int]) -> list[int]:
        """Add a request. For its tokens after the shared beginning, return their indices in `tokens`."""
        common = self._shared if self._last is None else _common(self._last, ids)
        del self._path[common - self._shared :]
        for depth in range(common, len(ids)):
            parent = self._path[-1] if self._path else -1
            self.forks |= parent != len(self.tokens) - 1
            self._parents.append(parent)
            self._path.append(len(self.tokens))
            self.tokens.append(ids[depth])
            self.depths.append(depth)
        self._last = ids
        return [*self._path]

    def above(self, length: int) -> npt.NDArray[np.bool_]:
        """Return the attention mask (length, S + length), for S shared tokens and `length` tokens of the row.

        It is True at [i, j] if token i may attend to column j. A token attends to itself, and to the tokens
        before it in its request. The first S columns are the shared tokens.
        """
        found = np.zeros((length, self._shared + length), dtype=np.bool_)
        found[:, : self._shared] = True
        # Every token attends to itself. So does padding, because a softmax over no key would give NaN.
        np.fill_diagonal(found[:, self._shared :], True)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                found[node] |= found[parent]
        return found


class _Shared:
    """A key-value cache for rows with the same beginning. Keys and values of new tokens are not stored."""

    def __init__(self, cache: KeyValueCache, length: int) -> None:
        self._cache, self.length = cache, length

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the cached k and v of S shared tokens before the L new ones: result (R, H, S + L, D)."""
        if not self.length:
            return k, v
        shared = [one[:, :, : self.length].expand(len(k), -1, -1, -1) for one in self._cache.layer(layer)]
        return torch.cat([shared[0], k], 2), torch.cat([shared[1], v], 2)

    def advance(self, tokens: int) -> None:
        """Do nothing, because the new tokens are not stored. (The model calls this after each pass.)"""


def _in_rows_of_least_work(batch: Sequence[_Request], shared: int, channels: int) -> list[list[int]]:
    """Divide requests among rows, so that the estimated time of the forward pass is the least.

    With more rows, each row is shorter, so each token attends to fewer columns. But there is more padding,
    and a token that requests in two rows share is computed twice. The estimated time of a row is its number
    of tokens times (4 C + its number of columns), with C = `channels`. The reason: per token, a block has
    12 C^2 multiplications in matrix products, and 2 C in attention for each column. A multiplication in
    attention takes 1.5 times as long as one in a matrix product.

    Returns: for each row, the indices in `batch` of its requests.
    """
    best: tuple[float, list[list[int]]] = (math.inf, [])
    for little in (0, _LITTLE):
        trees = _trees(batch, shared, little)
        trees.sort(key=lambda tree: -tree[1])
        for n_rows in range(1, min(len(trees), _ROWS) + 1):
            rows: list[list[int]] = [[] for _ in range(n_rows)]
            lengths = [0] * n_rows
            for members, size in trees:  # the largest tree first, always into the shortest row
                r = lengths.index(min(lengths))
                rows[r] += members
                lengths[r] += size
            L = max(lengths)
            best = min(best, (n_rows * L * (4 * channels + shared + L), rows), key=lambda one: one[0])
    return best[1]


def _trees(batch: Sequence[_Request], shared: int, little: int) -> list[tuple[list[int], int]]:
    """Group requests that begin with the same tokens into trees.

    All requests begin with the same `shared` tokens, which are not counted. A request joins the tree of the
    request before it if the two share more than `little` further tokens.

    Returns: for each tree (indices in `batch` of its requests, number of its tokens).
    """
    trees: list[tuple[list[int], int]] = []
    for i, one in enumerate(batch):
        common = _common(batch[i - 1].read, one.read) if i else 0
        if i and common > shared + little:
            members, size = trees[-1]
            trees[-1] = ([*members, i], size + len(one.read) - common)
        else:
            trees.append(([i], len(one.read) - shared))
    return trees


def _joined(pieces: Sequence[Scored]) -> Scored:
    """Join the scores of a continuation's pieces into the score of the whole continuation."""
    if len(pieces) == 1:
        return pieces[0]
    logprobs = [value for one in pieces for value in one.logprobs]
    return Scored(logprobs, all(one.is_greedy for one in pieces), pieces[-1].n_cut, len(pieces))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of a and b, by a binary search."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
