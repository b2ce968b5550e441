"""Computes the loss of GRPO (https://arxiv.org/abs/2402.03300), which trains a model with rewards.

The model writes a group of answers to each prompt, and a reward is given to each answer. The advantage A of
an answer is its reward minus the mean reward of its group. The ratio r = p / p_old is the present probability
of a token, divided by its probability when it was sampled. The loss of a token is

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL

KL is estimated for each sampled token as ref / p - log(ref / p) - 1, where ref is the token's probability
under the reference model (estimator k3 of http://joschu.net/blog/kl-approx.html). Options have the names of
TRL's GRPOConfig.

Letters in shapes: N prompts, G answers to each prompt, P tokens of all answers together.
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
LEAST_STD = 1e-4  # added to a standard deviation before dividing by it, as in TRL


class GrpoOptions(NamedTuple):
    """Options of GRPO's loss."""

    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    loss_type: GrpoLossType = "dapo"
    scale_rewards: ScaleRewards = "group"
    use_bias_correction_kl: bool = True
    max_completion_length: int = 64  # only for loss_type "dr_grpo", which divides the loss by this number


class TokenLosses(NamedTuple):
    """The loss of each of P tokens, and values for metrics, (P,) each.

    r is a token's present probability, divided by its probability when it was sampled.
    """

    loss: Tensor
    kl: Tensor
    is_low: Tensor  # bool: r < 1 - epsilon and the advantage is negative, so clipping changes the loss
    is_high: Tensor  # bool: r > 1 + epsilon_high and the advantage is positive, so clipping changes the loss


def group_advantages(rewards: Tensor, scale_rewards: ScaleRewards = "group") -> Tensor:
    """Return the advantages of G answers to each of N prompts from their rewards; (N, G) -> (N, G).

    An advantage is the reward minus the mean reward of its group (the answers to one prompt). What then
    happens to this difference depends on scale_rewards:

    group  it is divided by the group's standard deviation
    batch  it is not divided here: the caller divides it by the standard deviation of all rewards of the step
    none   it is not divided
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
        old: log-probabilities of the same tokens when they were sampled, (P,); None: equal to logps.
        reference: log-probabilities of the same tokens under the reference model, (P,); None if beta is 0.
        advantages: the advantage of each token's answer, (P,).
    """
    ratio = (logps - (logps.detach() if old is None else old)).exp()
    low, high = 1 - options.epsilon, 1 + options.epsilon_high
    loss = -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
    kl = torch.zeros_like(logps)
    if reference is not None:
        gap = reference - logps
        kl = gap.exp() - gap - 1
        # The tokens were sampled with older weights. With the factor p / p_old (importance sampling), the
        # mean of `kl` estimates the KL divergence for tokens sampled with the present weights.
        if options.use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + options.beta * kl
    is_low, is_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    return TokenLosses(loss, kl, is_low, is_high)


def token_weights(lengths: Tensor, options: GrpoOptions) -> Tensor:
    """Return a factor for each answer, (answers,). The losses of the answer's tokens are multiplied by it.

    `lengths` (answers,): number of tokens of each answer in a batch. The caller sums the products and divides
    the sum: for dapo by the number of tokens, for bnpo by the number of batches, for grpo and dr_grpo by the
    number of answers. So the loss is, for each loss_type:

    dapo     the mean over all tokens
    grpo     the mean over each answer's tokens, then the mean over answers
    bnpo     the mean over the tokens of a batch, then the mean over the batches of a step
    dr_grpo  the sum over each answer's tokens, divided by max_completion_length, then the mean over answers
    """
    if options.loss_type == "dapo":
        return torch.ones(len(lengths))
    if options.loss_type == "grpo":
        return 1 / lengths.clamp(min=1)
    if options.loss_type == "bnpo":
        return torch.full((len(lengths),), 1 / max(1, int(lengths.sum())))
    return torch.full((len(lengths),), 1 / options.max_completion_length)
