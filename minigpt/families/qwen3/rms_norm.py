"""RMSNorm, and its gradient by hand: LayerNorm without its mean and bias, https://arxiv.org/abs/1910.07467.

torch has no kernel for it on a CPU: its gradient, put together from those of a square, a mean, a root and two
products, passes over the activations a dozen times. Written out it is half of that (LOG.md has the times).
With r = 1 / sqrt(mean(x^2) + eps), n = r x, y = w n, and g the gradient of the loss at y:

    dw = sum over all vectors of g n        dx = r (g w - n mean(g w n))

That gradient has none of its own, and torch.func does not see through it: nothing here asks for either.

Letters in shapes: C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), along the last dimension."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same, same dtype."""
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return out
        # Squares of a bfloat16 have 8 bits: their sum is made in float32 at least. Rounding before the
        # weight, not after it, is how the published weights were trained.
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.rms_norm(exact, self.weight.shape, eps=self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same numbers, and the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        root = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        normed = exact * root  # (..., C)
        ctx.save_for_backward(normed, root, weight)
        ctx.dtype = x.dtype
        return normed.to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, root, given = ctx.saved_tensors
        gradient, weight = gradient.to(normed.dtype), given.to(normed.dtype)
        product = gradient * normed  # (..., C)
        of_weight = product.reshape(-1, product.shape[-1]).sum(0)  # (C,)
        mean = (product @ weight).div_(normed.shape[-1]).unsqueeze(-1)  # (..., 1)
        of_x = (gradient * weight).addcmul_(normed, mean, value=-1).mul_(root)
        return of_x.to(ctx.dtype), of_weight.to(given.dtype), None
