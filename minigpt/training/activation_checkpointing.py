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
    """Let each block drop its activations and compute them again in the backward pass. Changes the blocks.

    Without gradients a block computes as before.

    Args:
        blocks: the model's blocks.
        has_dropout: keep the random state, at a small cost, so that the second pass drops the same values.
        autocast: makes the context of the forward pass again, for the second pass.
    """
    for block in blocks:
        forward = functools.partial(_forward, block.forward, has_dropout, autocast)
        block.forward = (
            forward  # set on the object: `nn.Module.__call__` finds it before the method of the class
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
