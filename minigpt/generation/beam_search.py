"""Beam search: keep several sequences at once, and return those that are most likely as a whole.

The most likely token does not always begin the most likely text. So the K most likely sequences are kept;
each step tries all tokens behind all of them and keeps the K most likely that are not finished. Finished ones
are ranked by log-probability / length ** length_penalty: a plain sum would favour the short ones. Ids and
scores are those of transformers' `generate`, where a prompt is searched alone.

A search is K sequences of minigpt.generation.loop that have a `BeamSearch` in common. The prompt is read
once; then the sequence forks. The result does not depend on other searches in the loop.

Letters in shapes: K beams, S columns so far, V entries of the vocabulary, n candidates.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.generation.loop import problems_of, processed
from minigpt.generation.output import Completion, StopReason
from minigpt.generation.sequence import Request, Sequence

__all__ = ["BeamSearch", "Finished"]

# transformers' "minus infinity": the score of a beam that is none yet. The beams that start as copies of the
# first must lose against it, but not against a forbidden token, whose score is -inf.
NO_SCORE = -1e9


@dataclass(frozen=True)
class Finished:
    """A sequence that has come to its end."""

    score: float  # log-probability / length ** length_penalty
    ids: list[int]  # the new ones, with the eos that ended it
    stop_reason: StopReason

    def completion(self) -> Completion:
        """The same, as without beams."""
        return Completion(self.ids[:-1] if self.stop_reason == "eos" else self.ids, self.stop_reason)


class BeamSearch:
    """The beams of one prompt, and the finished sequences, the best first."""

    def __init__(self, request: Request) -> None:
        self.request, self.options = request, request.options
        self.finished: list[Finished] = []
        self._totals: list[float] = [0.0]  # log-probability of each beam's new tokens

    def take(self, beams: list[Sequence], logits: Tensor, loop: Any) -> list[Sequence]:
        """Continue all beams of the search; returns those that are there afterwards, none at its end."""
        K, V, options = self.options.num_beams, logits.shape[-1], self.options
        length, limit = len(beams[0].ids) + 1, beams[0].limit  # of the candidates, in new tokens
        log_p = logits.log_softmax(dim=-1)  # (K, V); at first (1, V)
        scores = processed(beams, log_p)
        if problem := next(filter(None, problems_of(log_p, scores)), None):
            return self._end(beams, problem)
        # Each beam can be ended by each eos; still K candidates that continue must be left.
        n_candidates = min(K * max(2, 1 + len(self.request.eos)), scores.numel())
        # Among all continuations of all beams, the most likely, in descending order.
        totals = torch.tensor(self._totals, dtype=scores.dtype, device=scores.device)  # (K,)
        best = torch.topk((scores + totals[:, None]).flatten(), n_candidates)  # (n,)
        candidates = [
            (total, place // V, [*beams[place // V].ids, place % V])
            for total, place in zip(best.values.tolist(), best.indices.tolist())
            if total > NO_SCORE / 2
        ]
        going_on: list[tuple[float, int, list[int]]] = []
        for rank, (total, parent, ids) in enumerate(candidates):
            reason = self._reason(ids, limit)
            if not reason:
                going_on.append((total, parent, ids))
            elif rank < K:  # those below the first K are there to continue, not to be returned
                self.finished.append(Finished(total / length**options.length_penalty, ids, reason))
        self.finished = sorted(self.finished, key=lambda one: -one.score)[:K]
        going_on = going_on[:K]
        if not going_on or self._is_over(going_on[0][0], length, limit):
            return self._end(beams)
        missing = K - len(going_on)  # where the options leave fewer: copies, without a score
        self._totals = [total for total, _, _ in going_on] + [NO_SCORE] * missing
        return self._continue(beams, going_on + going_on[-1:] * missing, loop)

    def _continue(
        self, beams: list[Sequence], chosen: list[tuple[float, int, list[int]]], loop: Any
    ) -> list[Sequence]:
        """Each of K beams becomes a copy of its parent, with one token more."""
        for _ in range(len(chosen) - len(beams)):
            new = Sequence(beams[0].prompt, self.request, beams[0].limit, embeds=beams[0].embeds)
            new.beams = new.kind = self
            loop.add(new)
            beams = [*beams, new]
        loop.cache.copy([beams[parent].slot for _, parent, _ in chosen], [beam.slot for beam in beams])
        states = [
            (list(beam.context), beam.context_embeds, list(beam.ids), beam.constraint) for beam in beams
        ]
        for beam, (_, parent, ids) in zip(beams, chosen):
            beam.context, beam.context_embeds, beam.ids, beam.constraint = states[parent]
            beam.context, beam.ids = list(beam.context), list(beam.ids)
            beam.ids.append(ids[-1])
            beam.follow(ids[-1])
        return beams

    def _end(self, beams: list[Sequence], problem: str | None = None) -> list[Sequence]:
        count, found = self.options.num_return_sequences, len(self.finished)
        if problem is None and found < count:
            problem = (
                f"beam search found {found} sequences, num_return_sequences={count}: the options forbid too "
                "many tokens"
            )
        reason = InputError(problem) if problem else None
        error = next((beam.error for beam in beams if beam.error), reason)
        for beam in beams:
            beam.stop_reason, beam.error = "length", error
        return []

    def _reason(self, ids: list[int], limit: int) -> StopReason | None:
        """Why a sequence of new ids is finished; None if it is not."""
        if ids[-1] in self.request.eos:
            return "eos"
        decode = self.request.decode
        if decode and any(stop in decode(ids) for stop in self.options.stops):
            return "stop_string"
        if len(ids) < limit:
            return None
        return "length" if len(ids) == self.options.wanted else "context"

    def _is_over(self, best_running: float, length: int, limit: int) -> bool:
        """Is the search over: are K finished, and does no beam promise to end better than the worst of them?

        What a beam can still become is a guess, as in transformers: its log-probability now, at the length
        that it has now; with early_stopping="never" at the length that favours it most, so that none is
        missed.
        """
        options = self.options
        if len(self.finished) < options.num_beams:
            return False
        if options.early_stopping is True:
            return True
        longest = options.early_stopping == "never" and options.length_penalty > 0
        promised = best_running / (limit if longest else length) ** options.length_penalty
        return bool(promised <= self.finished[-1].score)
