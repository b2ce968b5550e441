"""From scores to the next token: pure functions on logits (B, V), with Hugging Face's names and meanings.

`filtered` applies temperature, top_k, top_p, min_p, typical_p, in that order, as transformers' `generate`
does; what is filtered out becomes -inf. Then `greedy` or `sample` chooses. Nothing here keeps a state or
draws a number: the uniform numbers of `sample` come from the caller, which decides what is reproducible.
What depends on the text so far is minigpt.generation.logits_processors' work.

Numbers may be given row by row, as tensors (B, 1), where a batch holds requests of several kinds.

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
    """Divide by the temperature: below 1 the likely tokens gain, above 1 they lose."""
    return logits / temperature


def apply_top_k(logits: Tensor, top_k: int | Tensor) -> Tensor:
    """Keep the top_k highest scores, and those equal to the lowest of them: no tie is broken by chance.

    In a tensor of top_k, int64 (B, 1), 0 keeps all.
    """
    V = logits.shape[-1]
    if isinstance(top_k, Tensor):
        place = (V - top_k).clamp(min=0) % V  # (B, 1)  of the lowest that stays, from the lowest on
        kth = logits.sort(dim=-1).values.gather(-1, place)  # (B, 1)
    else:
        kth = torch.topk(logits, min(top_k, V)).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def apply_top_p(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities add up to top_p; at least one token.

    https://arxiv.org/abs/1904.09751 (nucleus sampling), section 3.1.
    """
    ascending, order = torch.sort(logits)  # (B, V) each
    # Summed from the unlikely end: what stays below 1 - top_p in sum is the tail to be dropped.
    tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p  # (B, V)
    tail[..., -1] = False
    return logits.masked_fill(tail.scatter(-1, order, tail), -math.inf)


def apply_min_p(logits: Tensor, min_p: float | Tensor) -> Tensor:
    """Keep the tokens whose probability is at least min_p times the highest one.

    https://arxiv.org/abs/2407.01082 (Min-p sampling), section 3.
    """
    probabilities = logits.softmax(dim=-1)  # (B, V)
    least = min_p * probabilities.amax(dim=-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(probabilities < least, -math.inf)


def apply_typical_p(logits: Tensor, typical_p: float) -> Tensor:
    """Keep the tokens about as surprising as expected, until their probabilities add up to typical_p.

    https://arxiv.org/abs/2202.00666 (Locally typical sampling), section 4. Surprise is -log p, and what is to
    be expected is its mean, the entropy; so the most likely token may go. Those equally far from it stay or
    go together.
    """
    log_p = logits.log_softmax(dim=-1)  # (B, V)
    entropy = -(log_p * log_p.exp()).nansum(dim=-1, keepdim=True)  # (B, 1)  0 * -inf is nothing
    distance = (-log_p - entropy).abs()  # (B, V)
    ascending, order = torch.sort(distance)  # (B, V) each
    below = logits.gather(-1, order).softmax(dim=-1).cumsum(dim=-1) < typical_p  # (B, V)
    last = below.sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)  the one that reaches it
    return logits.masked_fill(distance > ascending.gather(-1, last), -math.inf)


def filtered(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    typical_p: float = 1.0,
) -> Tensor:
    """Apply temperature (1: off), top_k (0), top_p (1), min_p (0) and typical_p (1), in this order.

    Tensors (B, 1) are applied whatever they hold: to ask them would make a GPU wait. "Off" changes nothing
    in a row, but that top_p's takes away what has probability 0 in single precision.
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
    """The most likely token of each row, the first of several; a NaN counts as such. (B, V) -> (B,)."""
    if logits.device.type == "cpu":  # NumPy's is the faster one
        return torch.from_numpy(logits.detach().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token of each row from softmax(logits), (B, V) -> (B,).

    Args:
        uniform: a number 0 <= u < 1 for each row, (B,). Row i gets the first token at which the cumulative
            distribution exceeds u[i]; so it depends on nothing but its own logits and its own number.
            Computed in the precision of `uniform`: float64 where the device has it.
    """
    cumulative = logits.softmax(dim=-1, dtype=uniform.dtype).cumsum(dim=-1)  # (B, V)
    cumulative = cumulative / cumulative[:, -1:]  # the last is 1 to the bit: above every u
    # "right": a token of probability 0 adds nothing to the sum, and is never the first to exceed u
    return torch.searchsorted(cumulative, uniform[:, None].contiguous(), right=True)[:, 0]  # (B, 1) -> (B,)
