"""Beam search: extends several sequences in parallel, and returns the most likely whole sequences.

The most likely token does not always begin the most likely text. So beam search keeps the K most likely
sequences. Each step tries all tokens after each of these sequences, and keeps the K most likely unfinished
sequences. Finished sequences are ranked by log-probability / (number of new tokens) ** length_penalty,
because the log-probability alone would favour short sequences. Ids and scores are the same as in
transformers' `generate` for a single prompt.

In the decoding loop (minigpt.generation.loop), a search is K sequences that share one `BeamSearch`. The model
reads the prompt once, for one sequence. Then K - 1 copies of this sequence join the loop. The result does not
depend on other searches in the loop.

Letters in shapes: K beams, V entries of the vocabulary, n candidates.
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

# If fewer than K beams are left, copies of a beam make the number K again. NO_SCORE takes the place of the
# log-probability of a copy, as in transformers. A copy must lose against each real beam, but win against a
# beam with a forbidden token, whose log-probability is -inf.
NO_SCORE = -1e9


@dataclass(frozen=True)
class Finished:
    """A finished sequence of a beam search."""

    score: float  # log-probability / (number of new tokens) ** length_penalty
    ids: list[int]  # new ids, including the eos that ended the sequence
    stop_reason: StopReason

    def completion(self) -> Completion:
        """Return the sequence as a Completion, in which the ids have no eos at the end."""
        return Completion(self.ids[:-1] if self.stop_reason == "eos" else self.ids, self.stop_reason)


class BeamSearch:
    """A search for one prompt: its beams (unfinished sequences), and its finished sequences, best first."""

    def __init__(self, request: Request) -> None:
        self.request, self.options = request, request.options
        self.finished: list[Finished] = []
        # Beam -> log-probability of its new tokens. It is a dict, because `take` may get the beams in any
        # order.
        self._totals: dict[Sequence, float] = {}

    def take(self, beams: list[Sequence], logits: Tensor, loop: Any) -> list[Sequence]:
        """Do one step of the search. Return the K beams of the next step, or [] if the search has ended.

        The first call gets one beam, and adds K - 1 copies of this beam to `loop`.

        Args:
            logits: (K, V), a row for each beam; in the first call (1, V).
        """
        K, V, options = self.options.num_beams, logits.shape[-1], self.options
        # length: number of new tokens after this step; limit: the largest number of new tokens allowed
        length, limit = len(beams[0].ids) + 1, beams[0].limit
        log_p = logits.log_softmax(dim=-1)  # (K, V); in the first step (1, V)
        scores = processed(beams, log_p)
        if problem := next(filter(None, problems_of(log_p, scores)), None):
            return self._end(beams, problem)
        # A candidate is a beam and one next token. At most K * len(eos) candidates end with an eos. So among
        # the best K * (1 + len(eos)) candidates, at least K do not end with an eos.
        n_candidates = min(K * max(2, 1 + len(self.request.eos)), scores.numel())
        # A candidate's total is the log-probability of the beam so far plus the next token's.
        so_far = [self._totals.get(beam, 0.0) for beam in beams]
        totals = torch.tensor(so_far, dtype=scores.dtype, device=scores.device)  # (K,)
        best = torch.topk((scores + totals[:, None]).flatten(), n_candidates)  # values and indices, (n,) each
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
            elif rank < K:  # only the K best candidates may finish, as in transformers
                self.finished.append(Finished(total / length**options.length_penalty, ids, reason))
        self.finished = sorted(self.finished, key=lambda one: -one.score)[:K]
        going_on = going_on[:K]
        if not going_on or self._is_over(going_on[0][0], length, limit):
            return self._end(beams)
        missing = K - len(going_on)  # number of copies of the worst candidate, to have K beams again
        beams = self._continue(beams, going_on + going_on[-1:] * missing, loop)
        self._totals = dict(zip(beams, [total for total, _, _ in going_on] + [NO_SCORE] * missing))
        return beams

    def _continue(
        self, beams: list[Sequence], chosen: list[tuple[float, int, list[int]]], loop: Any
    ) -> list[Sequence]:
        """Return the beams of the next step, one for each entry of `chosen`.

        A beam becomes a copy of its parent beam, including keys and values. Then its newest id is added.

        Args:
            chosen: (log-probability, index of the parent beam, new ids of the beam).
        """
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
        """Return the stop reason of a sequence of new ids, or None if the sequence is not finished."""
        if ids[-1] in self.request.eos:
            return "eos"
        decode = self.request.decode
        if decode and any(stop in decode(ids) for stop in self.options.stops):
            return "stop_string"
        if len(ids) < limit:
            return None
        return "length" if len(ids) == self.options.wanted else "context"

    def _is_over(self, best_running: float, length: int, limit: int) -> bool:
        """Return True if the search can end: K sequences are finished, and probably no beam will beat them.

        With early_stopping=True, K finished sequences are enough. Otherwise, the best beam's estimated score
        must also be at most the worst finished score. The estimate is the beam's present log-probability /
        length ** length_penalty. With early_stopping=False, `length` is the present length. With "never", it
        is the length that gives the highest score, so that no better sequence is missed. All this is as in
        transformers.
        """
        options = self.options
        if len(self.finished) < options.num_beams:
            return False
        if options.early_stopping is True:
            return True
        longest = options.early_stopping == "never" and options.length_penalty > 0
        promised = best_running / (limit if longest else length) ** options.length_penalty
        return bool(promised <= self.finished[-1].score)
