"""Computes the losses of preference training, given a better and a worse answer to each prompt.

The inputs are log-probabilities of whole answers, (B,): sums over an answer's tokens, or means for the losses
in `PER_TOKEN`. `reference` is the model before training. Most losses use the difference

    h = (log p(chosen) - log p(rejected)) - (log ref(chosen) - log ref(rejected))

    sigmoid  -log sigmoid(beta h)                DPO, https://arxiv.org/abs/2305.18290
                                                 (label_smoothing: https://ericmitchell.ai/cdpo.pdf)
    ipo      (h - 1 / (2 beta))^2                IPO, https://arxiv.org/abs/2310.12036
    simpo    -log sigmoid(beta h - gamma)        SimPO, https://arxiv.org/abs/2405.14734
    orpo     -log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected))
                                                 ORPO, https://arxiv.org/abs/2403.07691

SimPO and ORPO need no reference model. For SimPO, the log ref terms of h are 0.
"""

from typing import Literal, TypeAlias

from torch import Tensor
from torch.nn import functional as F

__all__ = ["PER_TOKEN", "WITHOUT_REFERENCE", "LossType", "preference_loss"]

LossType: TypeAlias = Literal["sigmoid", "ipo", "simpo", "orpo"]
PER_TOKEN = ("ipo", "simpo", "orpo")
WITHOUT_REFERENCE = ("simpo", "orpo")


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    simpo_gamma: float = 0.5,
) -> Tensor:
    """Compute the loss of each pair of answers, (B,).

    Args:
        chosen: log-probabilities of the better answers, (B,).
        rejected: log-probabilities of the worse answers, (B,).
        reference_chosen: log-probabilities of the better answers under the reference model, (B,); zeros if
            the loss uses no reference model.
        reference_rejected: the same for the worse answers.
        beta: with sigmoid and ipo: how strongly the model is kept near the reference model. With simpo:
            factor of log p(chosen) - log p(rejected). With orpo: factor of the term with the odds.
        label_smoothing: assumed share of pairs whose answers are in the wrong order; for sigmoid and simpo.
        simpo_gamma: the margin of SimPO.
    """
    h = (chosen - rejected) - (reference_chosen - reference_rejected)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)).square()
    if loss_type == "orpo":
        odds = [p - (-p.exp()).log1p() for p in (chosen, rejected)]  # log odds: log(P / (1 - P)), P = exp(p)
        return -chosen - beta * F.logsigmoid(odds[0] - odds[1])
    logits = beta * h - (simpo_gamma if loss_type == "simpo" else 0.0)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
