"""Numbers that must not reach the weights or the disk: NaN, infinities; and losses that stand out.

What happens to a bad step is the loop's affair. This module only judges.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

from minigpt.families.strict_loading import is_finite

__all__ = ["RECENT", "first_non_finite", "shown_lines", "spike_threshold"]

RECENT = 64  # losses that the next one is compared with
_LEAST = 16  # fewer say little about what is usual
_SIGMAS = 6.0  # of a normal distribution one value in a billion lies beyond
_FLOOR = 0.02  # of the median: once a loss hardly moves at all, its noise must not count as spikes
_SEEN = 0.1  # nats: when all is learned but a few hard examples, each of them would stand out


def spike_threshold(losses: Sequence[float]) -> float:
    """Above which loss a step stands out from the recent ones: 6 sigma above the loss that one in 16 exceeds.

    Mean and standard deviation would be pulled up by the very spikes that they are to find; that bound
    and the median distance from the median (times 1.4826: sigma, for normal noise) are not. It is not the
    median that is added to, because batches are unlike: the few of long or hard answers have a higher loss
    each time that they come. A falling loss widens it. Less than 0.1 nats above that bound is no spike.

    >>> spike_threshold([2.0, 2.2] * 8)  # 2.2 + 6 * 1.4826 * 0.1
    3.08956
    >>> spike_threshold([0.01] * 16)
    0.11
    >>> spike_threshold([2.0] * 3)
    inf
    """
    if len(losses) < _LEAST:
        return math.inf
    middle, high = statistics.median(losses), sorted(losses)[-1 - len(losses) // 16]
    sigma = 1.4826 * statistics.median(abs(loss - middle) for loss in losses)
    return round(high + max(_SIGMAS * sigma, _SIGMAS * _FLOOR * abs(middle), _SEEN), 9)


def first_non_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the first tensor that holds NaN or an infinity; "" if none does."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), "")


def shown_lines(lines: Sequence[int], limit: int = 8) -> str:
    """Line numbers for a message: the first ones.

    >>> shown_lines([3, 1, 4])
    'lines 3, 1, 4'
    """
    more = ", ..." if len(lines) > limit else ""
    return f"lines {', '.join(map(str, lines[:limit]))}{more}"
