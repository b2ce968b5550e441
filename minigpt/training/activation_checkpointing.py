"""Activation checkpointing: a block keeps its input alone, and computes the rest again for the gradient.

https://arxiv.org/abs/1604.06174. A third more arithmetic, for memory that grows with the blocks' inputs and
not with everything between them: for batches or models that would not fit. The model's definition and the
names of its weights stay as they are.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_activations"]


def checkpoint_activations(
    blocks: nn.ModuleList, has_dropout: bool, autocast: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Let each block forget its activations, in place. Without gradients it computes as before.

    Args:
        blocks: the model's blocks.
        has_dropout: the second pass must draw the same random numbers; keeping their state costs a little.
        autocast: makes the context of the forward pass, which has ended when the second pass begins.
    """
    for block in blocks:
        forward = functools.partial(_forward, block.forward, has_dropout, autocast)
        block.forward = (
            forward  # an attribute of this object: `nn.Module.__call__` finds it before the class's
        )


def _forward(
    forward: Callable[..., Any],
    has_dropout: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
    *inputs: Any,
) -> Any:
    if not torch.is_grad_enabled():  # an evaluation, an answer: there is nothing to keep
        return forward(*inputs)

    def computed(*inputs: Any) -> Any:
        with autocast():
            return forward(*inputs)

    return checkpoint(computed, *inputs, use_reentrant=False, preserve_rng_state=has_dropout)
