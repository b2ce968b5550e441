"""Changes logits by penalties and forbidden tokens: pure functions on logits (B, V), as in Hugging Face.

Functions that look at earlier tokens take `ids` (B, S): prompt and new ids, padded on the left with NO_TOKEN.
The padding does not change the results. A forbidden token gets the score -inf.

`make_processors` returns the functions that the options need, in the order of transformers' `generate`.
presence_penalty and frequency_penalty, which transformers lacks, come after repetition_penalty, as in vLLM.

Letters in shapes: B rows, S tokens so far, V entries of the vocabulary, N tokens of an n-gram.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minigpt.generation.options import GenerationOptions

__all__ = [
    "NO_TOKEN",
    "Processor",
    "add_bias",
    "apply_frequency_penalty",
    "apply_presence_penalty",
    "apply_repetition_penalty",
    "forbid",
    "forbid_from",
    "forbid_repeated_ngrams",
    "forbid_words",
    "make_processors",
]

NO_TOKEN = -1  # padding of shorter rows of ids
# A function that changes logits: (logits (B, V), ids (B, S), number of new ids at the end of `ids`) -> new
# logits (B, V).
Processor = Callable[[Tensor, Tensor, int], Tensor]


def counts(ids: Tensor, vocab_size: int) -> Tensor:
    """Count how often each token occurs in each row, (B, S) -> (B, V). NO_TOKEN is not counted."""
    table = torch.zeros(len(ids), vocab_size + 1, dtype=torch.int64, device=ids.device)  # (B, V + 1)
    column = ids.where(ids != NO_TOKEN, vocab_size)  # NO_TOKEN is counted in the last column, dropped below
    return table.scatter_add(1, column, torch.ones_like(ids))[:, :vocab_size]  # (B, V)


def add_bias(logits: Tensor, bias: Tensor) -> Tensor:
    """Add bias (V,) to the logits."""
    return logits + bias


def apply_repetition_penalty(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Make each token that occurs in `ids` less likely (if penalty > 1), no matter how often it occurs.

    https://arxiv.org/abs/1909.05858 (CTRL), section 4.1: a positive score is divided by the penalty. A
    negative score is multiplied by the penalty, because dividing would raise the score.
    """
    seen = counts(ids, logits.shape[-1]) > 0  # (B, V)  True: the token occurs in the row
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_presence_penalty(logits: Tensor, new_ids: Tensor, penalty: float) -> Tensor:
    """Subtract the penalty from the score of each token that occurs in the answer: in new_ids (B, S).

    https://platform.openai.com/docs/api-reference/chat/create (presence_penalty).
    """
    return logits - penalty * (counts(new_ids, logits.shape[-1]) > 0)


def apply_frequency_penalty(logits: Tensor, new_ids: Tensor, penalty: float) -> Tensor:
    """Subtract from each token's score the penalty times the token's number of occurrences in new_ids (B, S).

    https://platform.openai.com/docs/api-reference/chat/create (frequency_penalty).
    """
    return logits - penalty * counts(new_ids, logits.shape[-1])


def forbid(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Set the scores of some tokens to -inf."""
    return logits.index_fill(-1, torch.tensor(tokens, dtype=torch.int64, device=logits.device), -math.inf)


def forbid_from(logits: Tensor, first: int) -> Tensor:
    """Forbid all ids from `first` on. The model has logits for them, the tokenizer has no tokens."""
    scores = logits.clone()
    scores[..., first:] = -math.inf
    return scores


def forbid_repeated_ngrams(logits: Tensor, ids: Tensor, size: int) -> Tensor:
    """Forbid each token that would complete an n-gram of `size` tokens that the row already contains.

    https://arxiv.org/abs/1705.04304 (A Deep Reinforced Model for Abstractive Summarization), section 2.5.
    """
    if ids.shape[1] < size:
        return logits
    ngrams = ids.unfold(1, size, 1)  # (B, S - N + 1, N)  N = size
    beginning = ids[:, ids.shape[1] - size + 1 :]  # (B, N - 1)  the last N - 1 tokens
    # (B, S - N + 1)  True: the n-gram begins with the last N - 1 tokens of the row
    same = (ngrams[..., :-1] == beginning[:, None]).all(dim=-1)
    last = ngrams[..., -1].where(same, NO_TOKEN)  # (B, S - N + 1)  last token if `same`, else NO_TOKEN
    return logits.masked_fill(counts(last, logits.shape[-1]) > 0, -math.inf)


def forbid_words(logits: Tensor, ids: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Forbid some sequences of ids (`words`).

    If a row ends with all ids of a word but the last one, the word's last id is forbidden.
    """
    forbidden = torch.zeros_like(logits, dtype=torch.bool)  # (B, V)
    for *beginning, last in words:
        length = len(beginning)
        if length > ids.shape[1]:
            continue
        end = ids[:, ids.shape[1] - length :]  # (B, length)
        forbidden[:, last] |= (end == torch.tensor(beginning, device=ids.device)).all(dim=-1)
    return logits.masked_fill(forbidden, -math.inf)


def make_processors(
    options: GenerationOptions,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    device: torch.device,
    tokens: int | None = None,
) -> list[Processor]:
    """Return the functions that the options need to change logits, in the order in which they are applied.

    Args:
        tokens: number of tokens of the tokenizer. Ids from this number on are forbidden. None: no such ids.
    """
    found: list[Processor] = []
    if tokens is not None and tokens < vocab_size:
        found.append(lambda logits, *_: forbid_from(logits, tokens))
    if options.logit_bias:
        bias = torch.zeros(vocab_size, device=device)  # (V,)
        bias[list(options.logit_bias)] = torch.tensor(
            list(options.logit_bias.values()), device=device
        ).float()
        found.append(lambda logits, *_: add_bias(logits, bias))
    if options.repetition_penalty != 1:
        found.append(lambda logits, ids, _: apply_repetition_penalty(logits, ids, options.repetition_penalty))
    if options.frequency_penalty:
        found.append(
            lambda logits, ids, new: (
                apply_frequency_penalty(logits, ids[:, -new:], options.frequency_penalty) if new else logits
            )
        )
    if options.presence_penalty:
        found.append(
            lambda logits, ids, new: (
                apply_presence_penalty(logits, ids[:, -new:], options.presence_penalty) if new else logits
            )
        )
    if options.no_repeat_ngram_size:
        found.append(lambda logits, ids, _: forbid_repeated_ngrams(logits, ids, options.no_repeat_ngram_size))
    # ignore an entry of bad_words_ids that is just an eos: if the eos were forbidden, no answer could end
    words = [word for word in options.bad_words_ids if len(word) > 1 or word[0] not in eos_token_ids]
    if words:
        found.append(lambda logits, ids, _: forbid_words(logits, ids, words))
    if options.min_new_tokens and eos_token_ids:
        found.append(
            lambda logits, _, new: forbid(logits, eos_token_ids) if new < options.min_new_tokens else logits
        )
    return found
