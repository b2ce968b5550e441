"""Activation checkpointing: a block keeps its input alone, and computes the rest again for the gradient.

https://arxiv.org/abs/1604.06174. A third more arithmetic for memory that grows with the blocks' inputs, not
with everything between them: for batches or models that would not fit. The model's definition and the names
of its weights stay as they are.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_blocks"]


def recompute_blocks(
    blocks: nn.ModuleList, has_dropout: bool, arithmetic: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Let each block forget its activations, in place; without gradients it computes as ever.

    Args:
        has_dropout: the same random numbers must come again; to keep their state costs a little.
        arithmetic: makes the context that the model computes in, which the second time is long left.
    """
    for block in blocks:
        forward = functools.partial(_forward, block.forward, has_dropout, arithmetic)
        block.forward = forward  # of this object alone: `nn.Module.__call__` finds it before the class's


def _forward(
    forward: Callable[..., Any],
    has_dropout: bool,
    arithmetic: Callable[[], AbstractContextManager[Any]],
    *inputs: Any,
) -> Any:
    if not torch.is_grad_enabled():  # an evaluation, an answer: there is nothing to keep
        return forward(*inputs)

    def computed(*inputs: Any) -> Any:
        with arithmetic():
            return forward(*inputs)

    return checkpoint(computed, *inputs, use_reentrant=False, preserve_rng_state=has_dropout)
