"""The decoding loop: sequences join, get one token in each step, and leave.

    for ended in decode(model, sequences, batch_size=8):
        ...

    loop = DecodingLoop(model, cache, max_length)            # the same, step by step
    loop.add(sequence)
    while loop.running:
        ended = loop.step()

A step has two parts. First it decodes: each sequence whose prompt was read gets one token, or several tokens
if the guesses of speculative decoding are right. Then it prefills: it reads the prompts of new sequences. In
both parts, `choose` processes the logits after the last token that was read, chooses the next token, and adds
it to the sequence. The sequence then checks whether it has ended.

All generation uses this loop. minigpt.generation.api adds the sequences of one call, and
minigpt.generation.engine adds the requests of many users. Each sequence may have its own attention window,
guesses, beams, input vectors and outputs.

Letters in shapes: n sequences, S tokens so far, V entries of the vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.layers import active_adapters, adapters_by_row
from minigpt.generation import sampling
from minigpt.generation.burst_pipeline import BurstPipeline
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.constraints import allow_only
from minigpt.generation.cuda_graph import DAMAGED, can_choose
from minigpt.generation.logits_processors import NO_TOKEN
from minigpt.generation.native import runner_for
from minigpt.generation.options import GenerationOptions
from minigpt.generation.prefix_cache import PrefixCache
from minigpt.generation.sequence import Sequence

__all__ = ["DecodingLoop", "choose", "decode", "evaluating", "filtered", "problems_of", "processed"]

NOT_FINITE = "the model's scores are not finite numbers: its weights are damaged or diverged"
NO_TOKEN_LEFT = (
    "the options forbid every token: allow some in logit_bias, bad_words_ids, no_repeat_ngram_size or "
    "min_new_tokens; or the vocabulary lacks what a constraint needs"
)


class DecodingLoop:
    """Decodes sequences with one model, which is in eval mode. Only one thread may use the loop.

    Args:
        max_length: largest number of tokens in the context of a sequence.
        chunk: approximate number of prompt tokens that a step reads, so that a long prompt does not delay
            other sequences for long. Each prompt is then read alone, so other prompts do not change its
            rounding. None: each step reads all new prompts completely, if possible in one batch.
        prefix_cache: keeps beginnings that prompts share, so that they need not be read again.
        bursts: decodes by CUDA graphs if possible. A step may then give a sequence no token, one or several.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: KeyValueCache,
        max_length: int,
        chunk: int | None = None,
        prefix_cache: PrefixCache | None = None,
        bursts: BurstPipeline | None = None,
    ) -> None:
        self.cache, self.max_length, self.chunk = cache, max_length, chunk
        self.prefix_cache, self.bursts = prefix_cache, bursts
        self.model, self.runner = model, runner_for(model)
        self.running: list[Sequence] = []  # in the order in which the sequences joined
        # tokens_read: number of prompt tokens that the model has read; tokens_reused: number of prompt tokens
        # that were copied from the prefix cache instead
        self.tokens_read = self.tokens_reused = 0
        # number of running sequences with speculative decoding, beams, the option `window` or
        # use_cache=False; if there are none, `_choose` has less to do
        self._n_special = 0

    # The cache's tensors may have been made in inference mode. They can then be changed only in that mode.
    @torch.inference_mode()
    def add(self, sequence: Sequence) -> None:
        """Let a sequence join the loop. The cache must have a free slot."""
        sequence.slot = self.cache.allocate()
        sequence.slide(self.max_length)
        if self.prefix_cache and sequence.embeds is None:
            self.tokens_reused += self.prefix_cache.restore(
                sequence.context, sequence.slot, self._names_of(sequence)
            )
        self.running.append(sequence)
        self._n_special += not sequence.is_plain

    @torch.inference_mode()
    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence. Free its slot, and the assistant model's cache that `speculation` may hold."""
        if sequence.error is not None:
            self.cache.clear(sequence.slot)
        self.cache.free(sequence.slot)
        self.running.remove(sequence)
        self._n_special -= not sequence.is_plain
        sequence.speculation = None

    def step(self) -> list[Sequence]:
        """Decode and prefill once. Return the sequences that have ended; they are no longer in the loop."""
        ready, unread = list[Sequence](), list[Sequence]()
        for sequence in self.running:
            (ready if self._is_prefilled(sequence) else unread).append(sequence)
        with torch.inference_mode() if not torch.is_inference_mode_enabled() else nullcontext():
            if ready or self.bursts:
                self._decode(ready)
            if unread:
                self._prefill(unread)
        ended = [one for one in self.running if one.stop_reason is not None or one.error is not None]
        for sequence in ended:
            self.remove(sequence)
        return ended

    def _is_prefilled(self, sequence: Sequence) -> bool:
        """Return True if the next step must decode the sequence: only its last token is not in the cache.

        Without CUDA graphs, the prefill reads the whole prompt, and decoding begins after the first new
        token. With CUDA graphs, the prefill reads all but the last token of the prompt, and decoding begins
        with this token.
        """
        missing = len(sequence.context) - self.cache.lengths[sequence.slot]
        return missing == 1 and (bool(sequence.ids) or self.bursts is not None)

    # -- decode ---------------------------------------------------------------------------------------------

    def _decode(self, ready: list[Sequence]) -> None:
        if self.bursts:
            ready = self._decode_by_graph(self.bursts, ready)
        elif not self.runner.in_any_slot:
            self._close_gaps()
            ready.sort(key=lambda sequence: sequence.slot)
        has_own = any(one.adapters is not None for one in ready)  # True: a sequence has its own adapters
        alone = [one for one in ready if one.watcher is not None or (has_own and one.speculation is not None)]
        if alone:
            ready = [sequence for sequence in ready if sequence not in alone]
        for group in [[one] for one in alone] + ([ready] if ready else []):
            rows = [one.context[-1:] if one.speculation is None else self._guessed(one) for one in group]
            with self._adapters(group):
                logits = self.runner.decode(rows, [one.slot for one in group], self.cache, group[0].watcher)
            self._choose(group, logits, rows)

    def _names_of(self, sequence: Sequence) -> tuple[str, ...]:
        """Return the names of the sequence's own adapters, or else of the adapters active in the model."""
        return tuple(active_adapters(self.model)) if sequence.adapters is None else sequence.adapters

    @contextmanager
    def _adapters(self, group: list[Sequence]) -> Iterator[None]:
        """In a `with` block, let the model apply each sequence's own adapters to the sequence's row only."""
        if all(one.adapters is None for one in group):
            yield
            return
        active = active_adapters(self.model)
        names = [active if one.adapters is None else one.adapters for one in group]
        with adapters_by_row(self.model, names):
            yield

    def _guessed(self, sequence: Sequence) -> list[int]:
        """Return the ids that the model reads next: the sequence's last token, then guesses."""
        assert sequence.speculation is not None, "something guesses"
        # A slot of the cache has at most max_length - 1 columns, one for each token. The sequence's last
        # token needs one of the free columns; the rest is for guesses.
        room = self.max_length - 2 - self.cache.lengths[sequence.slot]
        return sequence.context[-1:] + sequence.speculation.draft(sequence, room)

    def _close_gaps(self) -> None:
        """Move sequences from high slots to lower free slots, so that the used slots are adjacent.

        The PyTorch model reads adjacent slots in place. Slots that are not adjacent would be copied in each
        step.
        """
        for sequence in sorted(self.running, key=lambda one: -one.slot):
            if sequence.slot < len(self.running):
                break
            source, sequence.slot = sequence.slot, self.cache.allocate()
            self.cache.copy([source], [sequence.slot])
            self.cache.free(source)

    def _decode_by_graph(self, bursts: BurstPipeline, ready: list[Sequence]) -> list[Sequence]:
        """Let CUDA graphs decode the sequences, and add the tokens that have arrived.

        Return the sequences that the caller must decode without a graph. If graphs can decode all of `ready`,
        the result is empty. Otherwise wait for the steps that were started earlier, and return all sequences
        of `ready` that have not ended.
        """
        if ready and all(map(can_choose, ready)):
            held = max(self.cache.length(sequence.slot) for sequence in self.running)
            self._push(bursts.write({sequence.slot: sequence for sequence in ready}, held))
            return []
        while bursts.ahead:
            self._push(bursts.drain())
        bursts.drain()
        return [sequence for sequence in ready if not sequence.has_ended]

    def _push(self, arrived: list[tuple[Sequence, list[int]]]) -> None:
        """Add to each sequence the tokens that CUDA graphs have chosen, but no tokens after its end."""
        for sequence, tokens in arrived:
            for token in tokens:
                if sequence.has_ended or sequence not in self.running:
                    break
                if token == DAMAGED:
                    sequence.error = InputError(NOT_FINITE)
                else:
                    self.cache.advance(sequence.slot, 1)
                    sequence.push(token)

    # -- prefill --------------------------------------------------------------------------------------------

    def _prefill(self, unread: list[Sequence]) -> None:
        if self.chunk is not None:
            self._prefill_in_chunks(unread, self.chunk)
            return
        # The model reads the sequences of a group in one call. A sequence with input vectors, or with a
        # watcher (which records hidden states), makes a group of its own, together with the other beams of
        # its search. All remaining sequences make one group.
        groups: dict[object, list[Sequence]] = {}
        for one in unread:
            is_alone = one.embeds is not None or one.watcher is not None
            groups.setdefault((one.beams or one) if is_alone else None, []).append(one)
        for group in groups.values():
            pieces, first = [sequence.context for sequence in group], group[0]
            slots = [sequence.slot for sequence in group]
            with self._adapters(group):
                logits = self.runner.prefill(pieces, slots, self.cache, first.context_embeds, first.watcher)
            self.tokens_read += sum(map(len, pieces))
            self._choose(group, logits)

    def _prefill_in_chunks(self, unread: list[Sequence], chunk: int) -> None:
        """Read about `chunk` tokens of prompts, beginning with the sequence that joined first."""
        left = chunk
        for sequence in unread:
            context, slot = sequence.context, sequence.slot
            end = len(context) - 1 if self.bursts else len(context)
            while left > 0 and (start := self.cache.length(slot)) < end:
                # A prompt must always be cut into the same chunks, because the cuts affect the rounding. So a
                # chunk waits for the next step if this step may no longer read so many tokens.
                piece = context[start : min(start + chunk, end)]
                if len(piece) > left and left < chunk:
                    return
                with self._adapters([sequence]):
                    logits = self.runner.prefill([piece], [slot], self.cache)
                left -= len(piece)
                self.tokens_read += len(piece)
                if self.prefix_cache:
                    self.prefix_cache.keep(context, slot, self._names_of(sequence))
                if start + len(piece) == len(context):
                    self._choose([sequence], logits)
                    break

    # -- choose ---------------------------------------------------------------------------------------------

    def _choose(self, sequences: list[Sequence], logits: Tensor, read: Rows[Rows[int]] | None = None) -> None:
        """Choose the next token of each sequence from its logits.

        Args:
            logits: a row for each token in `read`, in order. If `read` is None: a row for each sequence.
            read: for each sequence, a list of the tokens that the model has just read: the sequence's last
                token, then guesses. None in prefill.
        """
        if not self._n_special and len({_group(sequence) for sequence in sequences}) == 1:
            choose(sequences, logits, argmax=self.runner.argmax)
            return
        for sequence in self._choose_by_kind(sequences, logits, read):
            if not sequence.restarts or sequence.has_ended:
                continue
            if sequence.slide(self.max_length) or not sequence.request.options.use_cache:
                self.cache.truncate(sequence.slot, 0)

    def _choose_by_kind(
        self, sequences: list[Sequence], logits: Tensor, read: Rows[Rows[int]] | None
    ) -> list[Sequence]:
        """Choose the next tokens, in groups of sequences with the same options.

        The arguments are as in `_choose`. Return `sequences`, and the sequences that a beam search has added.
        """
        groups: dict[object, tuple[list[Sequence], list[int]]] = {}
        place, found = 0, list(sequences)
        for number, sequence in enumerate(sequences):
            count = 1 if read is None else len(read[number])
            if read is not None and sequence.speculation is not None:
                sequence.speculation.take(sequence, logits[place : place + count])
                if not sequence.has_ended:
                    # keep the keys and values of all tokens but the last; this drops the wrong guesses
                    self.cache.truncate(sequence.slot, len(sequence.context) - 1)
            else:
                members, rows = groups.setdefault(_group(sequence), ([], []))
                members.append(sequence)
                rows.append(place)
            place += count
        for members, rows in groups.values():
            chosen_from = logits if len(rows) == place else logits[rows]
            if members[0].beams is not None:
                found += members[0].beams.take(members, chosen_from, self)
            else:
                choose(members, chosen_from, argmax=self.runner.argmax)
        return found


def decode(
    model: LanguageModel, sequences: Rows[Sequence], batch_size: int
) -> Generator[list[Sequence], None, None]:
    """Decode the sequences of one call, for example of generate_ids. Yield after each step those that ended.

    Args:
        batch_size: largest number of sequences in a batch; each beam counts as one.

    Raises:
        InputError: immediately if the cache needs more than max_cache_mib; later if a sequence fails.
    """
    if not sequences:
        return (ended for ended in list[list[Sequence]]())
    options, weight = sequences[0].request.options, next(model.parameters())
    context, beams = model.config.max_position_embeddings, options.num_beams
    at_once = min(len(sequences), max(1, batch_size // beams))
    # the model never reads the last token of a sequence, so the cache needs no column for it
    columns = max(min(context, len(one.prompt) + one.limit) for one in sequences) - 1
    cache = KeyValueCache(
        model.config, at_once * beams, columns, weight.device, weight.dtype, options.max_cache_mib,
        options.use_cache,
    )  # fmt: skip
    return _steps(model, deque(sequences), cache, at_once)


def _steps(
    model: LanguageModel, waiting: deque[Sequence], cache: KeyValueCache, at_once: int
) -> Generator[list[Sequence], None, None]:
    with evaluating(model):
        loop = DecodingLoop(model, cache, model.config.max_position_embeddings)
        while waiting or loop.running:
            if waiting:
                running = len({one.beams or one for one in loop.running})
                for _ in range(min(len(waiting), at_once - running)):
                    loop.add(waiting.popleft())
            ended = loop.step()
            for sequence in ended:
                if sequence.error is not None:
                    raise sequence.error
            yield ended


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Put the model into eval mode for a `with` block, then restore its mode (train or eval)."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _group(sequence: Sequence) -> object:
    """Return a key that is equal for sequences whose next tokens can be chosen in one call of `choose`.

    If penalties and the like change the scores, the key includes the number of new tokens, because one call
    can apply them only to sequences with equally many new tokens.
    """
    return (sequence.kind, len(sequence.ids)) if sequence.request.options.changes_scores else sequence.kind


def choose(
    group: list[Sequence],
    logits: Tensor,
    place: int | None = None,
    argmax: Callable[[Tensor], tuple[list[int], list[float]]] | None = None,
) -> None:
    """Choose the next token of each sequence, and add it to the sequence.

    If no token can be chosen for a sequence, its `error` is set instead.

    Args:
        group: sequences with the same options.
        logits: (n, V), a row for each sequence. For one sequence with k guesses: (1 + k, V), a row for the
            sequence's last token and for each guess.
        place: for one sequence with guesses: index of the row of logits to use. None: all rows.
        argmax: a faster function for argmax, such as NativeRunner.argmax. None: sampling.greedy.
    """
    first, given = group[0], logits if place is None else logits[place : place + 1]
    scores = given if first.kind is None else processed(group, given)
    if first.uniform is None:
        tokens, highest = argmax(scores) if argmax else (sampling.greedy(scores).tolist(), None)
        problems = problems_of(given, scores, highest)
    else:
        problems = problems_of(given, scores)
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
        numbers = [one.uniform[len(one.ids)] for one in group if one.uniform is not None]
        uniform = torch.tensor(numbers, dtype=dtype, device=scores.device)  # (n,)
        scores = filtered(scores, first.request.options)
        tokens = sampling.sample(scores, uniform).tolist()
    for row, (sequence, token, problem) in enumerate(zip(group, tokens, problems)):
        if problem is not None:
            sequence.fail(problem)
            continue
        if sequence.recorder is not None:
            sequence.recorder.record(given[row], scores[row], token, place)
        sequence.push(token)


def processed(group: list[Sequence], logits: Tensor) -> Tensor:
    """Apply penalties, forbidden tokens and constraint to logits (n, V) of sequences with equal options."""
    request, scores = group[0].request, logits
    if request.processors:
        ids = _padded(group if request.options.changes_scores else []).to(scores.device)
        for process in request.processors:
            scores = process(scores, ids, len(group[0].ids))
    if request.constraint is not None:
        scores = allow_only(scores, [sequence.allowed() for sequence in group])
    return scores


def _padded(group: list[Sequence]) -> Tensor:
    """Return prompt and new ids of each sequence, padded on the left with NO_TOKEN, (n, S)."""
    histories = [sequence.history() for sequence in group]
    longest = max(map(len, histories), default=0)
    ids = np.full((len(group), longest), NO_TOKEN, dtype=np.int64)
    for row, history in zip(ids, histories):
        row[longest - len(history) :] = history
    return torch.from_numpy(ids)


def problems_of(logits: Tensor, scores: Tensor, highest: Rows[float] | None = None) -> list[str | None]:
    """Return for each row the reason why no token can be chosen, or None if a token can be chosen.

    Args:
        logits: (n, V), the model's logits.
        scores: (n, V), the result of `processed` for these logits.
        highest: the highest score of each row. None: it is computed here.
    """
    # amax gives NaN if the row has a NaN, +inf if it has +inf, and -inf if all tokens are forbidden
    highest = scores.amax(dim=-1).tolist() if highest is None else highest
    loudest = highest if scores is logits else logits.amax(dim=-1).tolist()
    return [
        NOT_FINITE if not math.isfinite(loud) else None if math.isfinite(high) else NO_TOKEN_LEFT
        for loud, high in zip(loudest, highest)
    ]


def filtered(scores: Tensor, options: GenerationOptions) -> Tensor:
    """Apply temperature, top_k, top_p, min_p and typical_p to scores (n, V), before sampling."""
    o = options
    return sampling.filtered(scores, o.temperature, o.top_k, o.top_p, o.min_p, o.typical_p)
