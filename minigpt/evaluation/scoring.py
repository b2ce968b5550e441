"""The log-likelihood of continuations. The model reads the common beginning of several prompts once.

    scorer = ContinuationScorer(model)
    found = scorer.score([(context, continuation), ...])      # ids
    found[0].total, found[0].is_greedy

Requests are sorted by their ids, so requests with a common beginning follow each other: questions with the
same shots, and choices of the same question. The common beginning of a batch is read into a KV cache. The
next batch reuses the part that it shares. The rest of a batch is a tree: equal beginnings are one
branch. The model reads a tree in one pass without padding, with a mask in which a token attends to the tokens
above it. The C code for weights in 16, 8 and 4 bits has no such mask: it reads each branch separately, from
the fork on.

Letters in shapes: T tokens, S columns, C channels, V entries of the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.loop import NOT_FINITE, evaluating
from minigpt.generation.model_runner import TorchRunner
from minigpt.generation.native import NativeRunner, runner_for

__all__ = ["ContinuationScorer", "Scored"]

_TREE = {"cpu": 512}  # largest number of tokens of a tree: attention then costs a tenth of GPT-2's time
_TREE_ON_GPU = 2048
_LOGITS = 2**24  # largest number of logits in memory at a time: 64 MiB in float32


class Scored(NamedTuple):
    """A continuation with its log-likelihood, in nats."""

    logprobs: list[float]  # log-probability of each token
    is_greedy: bool  # True if each token is the most likely one
    n_cut: int  # number of tokens that were cut from the beginning of the context, because it is too long

    @property
    def total(self) -> float:
        """The log-likelihood of the whole continuation."""
        return float(sum(self.logprobs))


class _Request(NamedTuple):
    read: tuple[int, ...]  # tokens that the model reads: all except the last
    first: int  # position whose logits predict the first token of the continuation
    targets: tuple[int, ...]
    n_cut: int


class ContinuationScorer:
    """Scores continuations with one model. Puts the model into eval mode while it works.

    Args:
        model: the model.
        max_length: largest number of tokens that the model reads at once; 0: its context.

    Attributes:
        tokens_asked: number of tokens of all requests.
        tokens_read: number of tokens that the model has read for these requests.
    """

    def __init__(self, model: LanguageModel, max_length: int = 0) -> None:
        limit = model.config.max_position_embeddings
        self.max_length = min(max_length or limit, limit)
        self.tokens_asked = self.tokens_read = 0
        self._model = model
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._tree = _TREE.get(weight.device.type, _TREE_ON_GPU)
        self._cache: KeyValueCache | None = None
        self._held: tuple[int, ...] = ()  # the tokens in the cache

    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[Scored]:
        """Score each (context, continuation), in order. A context that is too long loses its beginning.

        Args:
            requests: ids. A context has at least one token.
            on_progress: called with the number of finished requests.

        Raises:
            InputError: if a context or a continuation is empty, or a continuation alone is too long; if the
                model's scores are not finite.
        """
        prepared = [self._prepared(number, *request) for number, request in enumerate(requests, 1)]
        order = sorted(range(len(prepared)), key=lambda i: prepared[i].read)
        found: list[Scored | None] = [None] * len(prepared)
        with evaluating(self._model), torch.inference_mode():
            runner = runner_for(self._model)
            by_branch = self._reads_branches(runner)
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
                    scored = self._in_tree(batch, shared)
                for i, one in zip(order[start:end], scored):
                    found[i] = one
                start = end
                on_progress(end)
            self._cache, self._held = None, ()
        return [one for one in found if one is not None]

    def _prepared(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> _Request:
        if not context or not continuation:
            empty = "context" if not context else "continuation"
            raise InputError(f"request {number} has an empty {empty}: there is nothing to score")
        if len(continuation) > self.max_length:
            raise InputError(
                f"request {number}: a continuation of {len(continuation):,} tokens is longer than the "
                f"{self.max_length:,} tokens that the model reads"
            )
        ids = (*context, *continuation)
        n_cut = max(0, len(ids) - self.max_length - 1)
        read = ids[n_cut:-1]
        self.tokens_asked += len(read)
        return _Request(read, len(read) - len(continuation), tuple(continuation), n_cut)

    def _reads_branches(self, runner: NativeRunner | TorchRunner) -> bool:
        """Return True if each branch must be read separately.

        The C code has no masks. A sliding layer measures distances in columns, not in positions.
        """
        is_sliding = getattr(self._model.config, "sliding_window", None) is not None
        return is_sliding or (isinstance(runner, NativeRunner) and runner.takes(10**9))

    def _allocate(self, longest: int) -> None:
        columns = longest + max(self._tree, longest)  # common beginning, then a tree or one long request
        self._cache = KeyValueCache(self._model.config, 1, columns, self._device, self._dtype)
        self._cache.allocate()
        self._held = ()

    # -- trees ----------------------------------------------------------------------------------------------

    def _batch(self, requests: list[_Request], order: list[int], start: int) -> tuple[int, int]:
        """Return the end of the batch that begins at `start`, and the length of its common beginning."""
        last = requests[order[start]]
        shared, tokens, end = last.first, len(last.read), start + 1
        while end < len(order):
            one = requests[order[end]]
            common = _common(last.read, one.read)
            new_shared = min(shared, common, one.first)
            if tokens + len(one.read) - common - new_shared > self._tree:
                break
            shared, tokens = new_shared, tokens + len(one.read) - common
            last, end = one, end + 1
        return end, shared

    def _read_shared(self, ids: tuple[int, ...]) -> None:
        """Make the cache hold exactly these tokens."""
        assert self._cache is not None
        kept = _common(self._held, ids)
        self._cache.truncate(0, kept)
        if kept < len(ids):
            view = self._cache.view([0], [len(ids) - kept])
            self._model.base_model(self._tensor([ids[kept:]]), None, None, view)
            self.tokens_read += len(ids) - kept
        self._held = ids

    def _in_tree(self, batch: list[_Request], shared: int) -> list[Scored]:
        assert self._cache is not None
        tokens: list[int] = []
        depths: list[int] = []
        parents: list[int] = []
        path: list[int] = []  # nodes of the last request, from `shared` on
        nodes: list[list[int]] = []  # for each request, the nodes that predict its targets
        before: tuple[int, ...] = batch[0].read[:shared]
        for one in batch:
            common = _common(before, one.read)
            del path[common - shared :]
            for depth in range(common, len(one.read)):
                parents.append(path[-1] if path else -1)
                path.append(len(tokens))
                tokens.append(one.read[depth])
                depths.append(depth)
            nodes.append(path[one.first - shared :])
            before = one.read
        T = len(tokens)
        above = np.zeros((T, shared + T), dtype=np.bool_)  # (T, S): True: above in the tree
        above[:, :shared] = True
        for node, parent in enumerate(parents):
            if parent >= 0:
                above[node] = above[parent]
            above[node, shared + node] = True
        # Without a fork the mask is causal. Then attention is faster without an explicit mask.
        forks = any(parent != node - 1 for node, parent in enumerate(parents))
        mask = torch.from_numpy(above)[None].to(self._device) if forks else None
        positions = self._tensor([depths]) if forks else None
        view = self._cache.view([0], [T])
        hidden = self._model.base_model(self._tensor([tokens]), mask, positions, view)[0]  # (T, C)
        self._cache.truncate(0, shared)
        self.tokens_read += T
        return self._scored(batch, nodes, hidden, is_hidden=True)

    # -- branches -------------------------------------------------------------------------------------------

    def _branch(self, batch: list[_Request], runner: NativeRunner | TorchRunner) -> list[Scored]:
        """Score requests that read the same tokens."""
        assert self._cache is not None
        one = batch[0]
        kept = min(_common(self._held, one.read), one.first)
        self._cache.truncate(0, kept)
        for start in range(kept, one.first, self._tree):
            piece = one.read[start : min(start + self._tree, one.first)]
            runner.prefill([piece], [0], self._cache)
        step = max(1, _LOGITS // self._model.config.vocab_size)
        pieces = []
        for start in range(one.first, len(one.read), step):
            row = one.read[start : start + step]
            logits: Tensor = runner.decode([row], [0], self._cache)
            pieces.append(logits.float().log_softmax(-1))  # a copy: the next call overwrites the logits
        self._held = one.read
        self.tokens_read += len(one.read) - kept
        nodes = [list(range(len(one.read) - one.first))] * len(batch)
        return self._scored(batch, nodes, torch.cat(pieces), is_hidden=False)

    # -- both -----------------------------------------------------------------------------------------------

    def _scored(
        self, batch: list[_Request], nodes: list[list[int]], found: Tensor, is_hidden: bool
    ) -> list[Scored]:
        """Read the targets' log-probabilities from hidden states (T, C), or log-probabilities (T, V)."""
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
            logprobs = self._model.lm_head(some).float().log_softmax(-1) if is_hidden else some  # (rows, V)
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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common beginning. Comparing slices is faster than a loop."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
