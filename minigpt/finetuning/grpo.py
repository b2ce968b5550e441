"""GRPO (https://arxiv.org/abs/2402.03300): advantages within groups of answers, and the loss of their tokens.

The advantage A of an answer compares its reward with the mean of its group. Let r = p / p_old: the present
probability of a token, divided by its probability when it was sampled. The loss of the token is

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL

KL to the reference is estimated from each sampled token: ref / p - log(ref / p) - 1, the estimator k3 of
http://joschu.net/blog/kl-approx.html. Options have the names of TRL's GRPOConfig.

Letters in shapes: N prompts, G answers of each, P tokens of answers.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "LEAST_STD", "GrpoLossType", "GrpoOptions", "ScaleRewards", "TokenLosses",
    "group_advantages", "token_losses", "token_weights",
]  # fmt: skip

GrpoLossType: TypeAlias = Literal["dapo", "grpo", "bnpo", "dr_grpo"]
ScaleRewards: TypeAlias = Literal["group", "batch", "none"]
LEAST_STD = 1e-4  # added to a standard deviation, as in TRL


class GrpoOptions(NamedTuple):
    """Options of the loss."""

    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    loss_type: GrpoLossType = "dapo"
    scale_rewards: ScaleRewards = "group"
    use_bias_correction_kl: bool = True
    max_completion_length: int = 64  # dr_grpo divides the loss by this number


class TokenLosses(NamedTuple):
    """The loss of each token, and the values from which it is computed; all (P,)."""

    loss: Tensor
    kl: Tensor
    is_low: Tensor  # bool: r is below the clipped range, and clipping changes the loss
    is_high: Tensor  # bool: r is above the clipped range, and clipping changes the loss


def group_advantages(rewards: Tensor, scale_rewards: ScaleRewards = "group") -> Tensor:
    """Return rewards minus their group's mean, divided by its standard deviation; (N, G) -> (N, G).

    A group whose rewards are all equal teaches nothing: its advantages are zeros. "none" does not divide, and
    "batch" neither: the caller divides by the standard deviation of all rewards of the step.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards != "group":
        return centred
    return centred / (rewards.std(1, keepdim=True) + LEAST_STD)


def token_losses(
    logps: Tensor, old: Tensor | None, reference: Tensor | None, advantages: Tensor, options: GrpoOptions
) -> TokenLosses:
    """Compute the loss of each token.

    Args:
        logps: log-probabilities of the sampled tokens, (P,).
        old: their log-probabilities when they were sampled; None: equal to logps.
        reference: their log-probabilities under the reference model; None if beta is 0.
        advantages: the advantage of each token's answer, (P,).
    """
    ratio = (logps - (logps.detach() if old is None else old)).exp()
    low, high = 1 - options.epsilon, 1 + options.epsilon_high
    loss = -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
    kl = torch.zeros_like(logps)
    if reference is not None:
        gap = reference - logps
        kl = gap.exp() - gap - 1
        if options.use_bias_correction_kl:  # `ratio` corrects that old probabilities drew the tokens
            kl = kl * ratio
        loss = loss + options.beta * kl
    is_low, is_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    return TokenLosses(loss, kl, is_low, is_high)


def token_weights(lengths: Tensor, options: GrpoOptions) -> Tensor:
    """Return the factor of each answer's tokens in the summed loss, (answers,).

    dapo: the mean is over all tokens, so each counts 1. grpo: over answers, and in each over its tokens.
    bnpo: over the tokens of a batch; a step of several batches, or processes, takes the mean of their means.
    dr_grpo: over answers, whose sums are divided by the greatest length, so that long answers count more.
    """
    if options.loss_type == "dapo":
        return torch.ones(len(lengths))
    if options.loss_type == "grpo":
        return 1 / lengths.clamp(min=1)
    if options.loss_type == "bnpo":
        return torch.full((len(lengths),), 1 / max(1, int(lengths.sum())))
    return torch.full((len(lengths),), 1 / options.max_completion_length)
