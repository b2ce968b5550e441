"""Activation checkpointing: a block keeps only its input. The backward pass computes the other values again.

https://arxiv.org/abs/1604.06174. The backward pass computes each block once more, so training does a third
more arithmetic. In return, only the inputs of the blocks stay in memory. Use it for batches or models that do
not fit otherwise. The model's code and the names of its weights do not change.
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
    """Make each block recompute its activations in the backward pass. Changes the blocks in place.

    If gradients are switched off (torch.no_grad), a block computes as before.

    Args:
        blocks: the model's blocks.
        has_dropout: True: restore the random state before the second computation, so that dropout drops the
            same values. This costs a little time.
        autocast: a function that returns a new autocast context manager. It is called in both computations.
    """
    for block in blocks:
        forward = functools.partial(_forward, block.forward, has_dropout, autocast)
        # This attribute of the object replaces the method `forward` of the block's class.
        block.forward = forward


def _forward(
    forward: Callable[..., Any],
    has_dropout: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
    *inputs: Any,
) -> Any:
    if not torch.is_grad_enabled():  # evaluation and generation have no backward pass
        return forward(*inputs)

    def computed(*inputs: Any) -> Any:
        with autocast():
            return forward(*inputs)

    return checkpoint(computed, *inputs, use_reentrant=False, preserve_rng_state=has_dropout)
