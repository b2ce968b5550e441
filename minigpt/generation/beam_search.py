"""Beam search: follow several beginnings at once, and return those that turn out likeliest as a whole.

The likeliest token is not always the beginning of the likeliest text. So the K likeliest beginnings are kept;
each step tries all tokens behind all of them and keeps the K likeliest that are not finished. Finished ones
are ranked by log-probability / length ** length_penalty: a plain sum would favour the short ones. Ids and
scores are those of transformers' `generate`, where a prompt is searched alone.

One prompt at a time: what a search returns depends on nothing else. It does not draw.

Letters in shapes: K beams, S columns so far, V entries of the vocabulary, n candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.batch import check_scores, new_cache
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion, StopReason
from minigpt.generation.request import Request

__all__ = ["Finished", "beam_search"]

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
        """The same, as the other ways to generate report it."""
        return Completion(self.ids[:-1] if self.stop_reason == "eos" else self.ids, self.stop_reason)


def beam_search(
    model: LanguageModel,
    prompt: Sequence[int],
    options: GenerationOptions,
    request: Request,
) -> list[Finished]:
    """The num_return_sequences best of num_beams finished sequences, the best first.

    Raises:
        InputError: if the model's scores are not numbers, or the options forbid every token.
    """
    K, V = options.num_beams, model.config.vocab_size
    device = next(model.parameters()).device
    limit = options.limit(len(prompt), model.config.max_position_embeddings)
    processors = request.processors(options, V, device)
    cache = new_cache(model, K, len(prompt) + limit - 1, options) if options.use_cache else None
    ids = torch.tensor(prompt, device=device).expand(K, -1)  # (K, S)
    totals = torch.full((K,), NO_SCORE, device=device)  # (K,)  log-probability of each beam's new tokens
    totals[0] = 0
    # Each beam can be ended by each eos; still K candidates that go on must be left.
    n_candidates = min(K * max(2, 1 + len(request.eos)), K * V)
    finished: list[Finished] = []
    for length in range(1, limit + 1):  # of the candidates, in new tokens
        logits = _last_logits(model, ids, cache)  # (K, V)
        scores = logits.log_softmax(dim=-1)  # (K, V)
        for process in processors:
            scores = process(scores, ids, length - 1)
        check_scores(logits, scores if processors else logits)
        # Among all continuations of all beams, the likeliest, in descending order.
        best = torch.topk((scores + totals[:, None]).flatten(), n_candidates)  # (n,)
        beams, tokens = best.indices // V, best.indices % V  # (n,) each
        candidates = torch.cat([ids[beams], tokens[:, None]], dim=1)  # (n, S + 1)
        reasons = [
            _reason(new, options, request, is_last=length == limit)
            for new in candidates[:, len(prompt) :].tolist()
        ]
        totals_of = best.values.tolist()
        possible = [rank for rank, total in enumerate(totals_of) if total > NO_SCORE / 2]
        for rank in possible:
            # Those below the first K are there to go on, not to be returned.
            if (reason := reasons[rank]) and rank < K:
                score = totals_of[rank] / length**options.length_penalty
                finished.append(Finished(score, candidates[rank, len(prompt) :].tolist(), reason))
        finished = sorted(finished, key=lambda one: -one.score)[:K]
        going_on = [rank for rank in possible if not reasons[rank]][:K]
        if not going_on or _is_over(finished, totals_of[going_on[0]], length, limit, options):
            break
        missing = K - len(going_on)  # where the options leave fewer: copies, at no score
        rows = torch.tensor(going_on + going_on[-1:] * missing, device=device)  # (K,)
        totals, ids = best.values[rows], candidates[rows]
        totals[K - missing :] = NO_SCORE
        if cache is not None:
            cache.select(beams[rows])
    if len(finished) < options.num_return_sequences:
        raise InputError(
            f"beam search found {len(finished)} sequences, num_return_sequences="
            f"{options.num_return_sequences}: the options forbid too many tokens"
        )
    return finished[: options.num_return_sequences]


def _last_logits(model: LanguageModel, ids: Tensor, cache: KeyValueCache | None) -> Tensor:
    start = 0 if cache is None else cache.length
    hidden = model.base_model(ids[:, start:], past_key_values=cache)  # (K, T, C)
    logits: Tensor = model.lm_head(hidden[:, -1])  # (K, V)
    return logits.float()


def _reason(ids: list[int], options: GenerationOptions, request: Request, is_last: bool) -> StopReason | None:
    """Why a sequence of new ids is finished; None if it is not."""
    if ids[-1] in request.eos:
        return "eos"
    if request.decode and any(stop in request.decode(ids) for stop in options.stops):
        return "stop_string"
    if not is_last:
        return None
    return "length" if len(ids) == options.wanted else "context"


def _is_over(
    finished: list[Finished], best_running: float, length: int, limit: int, options: GenerationOptions
) -> bool:
    """Whether to look no further: K are finished, and no beam promises to end better than the worst of them.

    What a beam can still become is a guess, as in transformers: its log-probability now, at the length that
    it has now; with early_stopping="never" at the length that favours it most, so that none is missed.
    """
    if len(finished) < options.num_beams:
        return False
    if options.early_stopping is True:
        return True
    longest = options.early_stopping == "never" and options.length_penalty > 0
    promised = best_running / (limit if longest else length) ** options.length_penalty
    return bool(promised <= finished[-1].score)
