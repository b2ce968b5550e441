"""Chooses the next token from scores: pure functions on logits (B, V), with Hugging Face's names.

`filtered` applies temperature, top_k, top_p, min_p and typical_p in the order of transformers' `generate`.
The scores of tokens that are filtered out become -inf. Then `greedy` or `sample` chooses a token. These
functions keep no state and draw no random numbers. The caller gives `sample` its uniform numbers, so results
are reproducible. Changes that depend on earlier tokens are in minigpt.generation.logits_processors.

If the rows of a batch have different options, the value of an option can be a tensor (B, 1).

Letters in shapes: B rows, V entries of the vocabulary.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "apply_min_p",
    "apply_temperature",
    "apply_top_k",
    "apply_top_p",
    "apply_typical_p",
    "filtered",
    "greedy",
    "sample",
]


def apply_temperature(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide the logits by the temperature. Below 1, likely tokens get more probability; above 1, less."""
    return logits / temperature


def apply_top_k(logits: Tensor, top_k: int | Tensor) -> Tensor:
    """Keep the top_k highest scores. Scores equal to the lowest of these are kept, too.

    Args:
        top_k: an int above 0, or int64 (B, 1) with a number for each row, where 0 keeps all scores.
    """
    V = logits.shape[-1]
    if isinstance(top_k, Tensor):
        place = (V - top_k).clamp(min=0) % V  # (B, 1)  index of the lowest kept score in the sorted row
        kth = logits.sort(dim=-1).values.gather(-1, place)  # (B, 1)
    else:
        kth = torch.topk(logits, min(top_k, V)).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def apply_top_p(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """Keep the most likely tokens: just enough for a total probability of top_p, and at least one token.

    https://arxiv.org/abs/1904.09751 (nucleus sampling), section 3.1.
    """
    ascending, order = torch.sort(logits)  # (B, V) each
    # The sum begins with the least likely token. Tokens are dropped as long as the sum is at most 1 - top_p.
    tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p  # (B, V)
    tail[..., -1] = False
    return logits.masked_fill(tail.scatter(-1, order, tail), -math.inf)


def apply_min_p(logits: Tensor, min_p: float | Tensor) -> Tensor:
    """Keep the tokens whose probability is at least min_p times the highest probability.

    https://arxiv.org/abs/2407.01082 (Min-p sampling), section 3.
    """
    probabilities = logits.softmax(dim=-1)  # (B, V)
    least = min_p * probabilities.amax(dim=-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(probabilities < least, -math.inf)


def apply_typical_p(logits: Tensor, typical_p: float) -> Tensor:
    """Keep the tokens whose surprise, -log p, is closest to the mean surprise (the entropy).

    Just as many tokens are kept as are needed for a total probability of typical_p. Even the most likely
    token may be dropped, because its surprise may be far below the mean. Tokens with equal distance from the
    mean are kept or dropped together.

    https://arxiv.org/abs/2202.00666 (Locally typical sampling), section 4.
    """
    log_p = logits.log_softmax(dim=-1)  # (B, V)
    entropy = -(log_p * log_p.exp()).nansum(dim=-1, keepdim=True)  # (B, 1)  nansum counts 0 * -inf as 0
    distance = (-log_p - entropy).abs()  # (B, V)
    ascending, order = torch.sort(distance)  # (B, V) each
    below = logits.gather(-1, order).softmax(dim=-1).cumsum(dim=-1) < typical_p  # (B, V)
    # (B, 1)  place of the last kept token in `order`, where the distances ascend
    last = below.sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ascending.gather(-1, last), -math.inf)


def filtered(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    typical_p: float = 1.0,
) -> Tensor:
    """Apply temperature, top_k, top_p, min_p and typical_p, in this order.

    An option with its default value is off and is skipped. An option given as a tensor (B, 1) is never
    skipped, because reading its values would make the CPU wait for the GPU. In such a tensor, a default value
    leaves its row's scores unchanged. Exception: the default top_p = 1 removes tokens whose probability is 0
    in float32.
    """
    if isinstance(temperature, Tensor) or temperature != 1:
        logits = apply_temperature(logits, temperature)
    if isinstance(top_k, Tensor) or top_k:
        logits = apply_top_k(logits, top_k)
    if isinstance(top_p, Tensor) or top_p < 1:
        logits = apply_top_p(logits, top_p)
    if isinstance(min_p, Tensor) or min_p:
        logits = apply_min_p(logits, min_p)
    return apply_typical_p(logits, typical_p) if typical_p < 1 else logits


def greedy(logits: Tensor) -> Tensor:
    """Choose the most likely token of each row, (B, V) -> (B,). In a tie, the first one wins.

    NaN counts as the highest score.
    """
    if logits.device.type == "cpu":  # NumPy's argmax is faster on a CPU
        return torch.from_numpy(logits.detach().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token for each row from softmax(logits), (B, V) -> (B,).

    Args:
        uniform: (B,), a random number 0 <= u < 1 for each row. Row i gets the first token at which the
            cumulative distribution exceeds u[i]. So the token depends only on the row's own logits and
            number. The computation has the dtype of `uniform`, which should be float64 if the device supports
            it.
    """
    cumulative = logits.softmax(dim=-1, dtype=uniform.dtype).cumsum(dim=-1)  # (B, V)
    cumulative = cumulative / cumulative[:, -1:]  # now the last sum is exactly 1, so it exceeds every u < 1
    # right=True: the sum must exceed u, so a token of probability 0 is never chosen
    return torch.searchsorted(cumulative, uniform[:, None].contiguous(), right=True)[:, 0]  # (B, 1) -> (B,)
