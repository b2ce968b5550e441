"""From scores to the next token: pure functions on logits (B, V), with Hugging Face's names and meanings.

`filtered` applies temperature, then top_k, then top_p, in that order, as transformers' `generate` does; what
is filtered out becomes -inf. Then `greedy` or `sample` chooses. Nothing here keeps a state or draws a number:
the uniform numbers that `sample` uses come from the caller, who so decides what is reproducible.

Letters in shapes: B rows, V entries of the vocabulary.
"""

import math

import torch
from torch import Tensor

__all__ = ["apply_temperature", "apply_top_k", "apply_top_p", "filtered", "greedy", "sample"]


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature: below 1 the likely tokens gain, above 1 they lose."""
    return logits / temperature


def apply_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the top_k highest scores, and those equal to the lowest of them: no tie is broken by chance."""
    kth = torch.topk(logits, min(top_k, logits.shape[-1])).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def apply_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities add up to top_p; at least one token.

    https://arxiv.org/abs/1904.09751 (nucleus sampling), section 3.1.
    """
    ascending, order = torch.sort(logits)  # (B, V) each
    # Summed from the unlikely end: what stays below 1 - top_p in sum is the tail to be dropped.
    tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p  # (B, V)
    tail[..., -1] = False
    return logits.masked_fill(tail.scatter(-1, order, tail), -math.inf)


def filtered(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Apply temperature (1: off), top_k (0: off) and top_p (1: off), in this order."""
    if temperature != 1:
        logits = apply_temperature(logits, temperature)
    if top_k:
        logits = apply_top_k(logits, top_k)
    return apply_top_p(logits, top_p) if top_p < 1 else logits


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, (B, V) -> (B,)."""
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
    return torch.searchsorted(cumulative, uniform[:, None], right=True)[:, 0]  # (B, 1) -> (B,)
