"""The learning rate's schedule, the optimisers AdamW and Muon, and their state as named tensors.

AdamW is torch's own. Its decoupled weight decay (https://arxiv.org/abs/1711.05101) applies only to matrices.
Vectors (biases, norms, IA3's factors) have no decay, because decay towards 0 would hurt them. Muon
(https://kellerjordan.github.io/posts/muon, https://arxiv.org/abs/2502.16982) updates the matrices inside the
transformer blocks; AdamW updates all other parameters.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.training.config import TrainConfig
from minigpt.training.parallel import is_sharded, shard_like

__all__ = [
    "Muon",
    "blank_state",
    "load_state",
    "make_optimizers",
    "orthogonalize",
    "schedule",
    "state_tensors",
]


def schedule(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step (0 to total_steps - 1), as a fraction of the peak rate.

    First, the fraction rises linearly from 1 / warmup_steps to 1. Then `lr_scheduler_type` decides:

    - constant: it stays 1.
    - cosine: it falls along a cosine, to min_lr_ratio at the last step.
    - wsd (warm-up, stable, decay; https://arxiv.org/abs/2405.18392): it stays 1, and then falls linearly to
      min_lr_ratio in the last `decay_ratio` of the steps. So only the end of a run depends on total_steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return 1.0
    if config.lr_scheduler_type == "wsd":
        falling = max(1, round(config.decay_ratio * total_steps))
        share = max(0.0, min(1.0, (total_steps - 1 - step) / falling))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * share
    span = max(1, total_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine


def make_optimizers(model: LanguageModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Make the optimisers for the parameters that require gradients.

    Each parameter group has the entry `peak_lr`: the learning rate at the peak of the schedule.
    """
    # IA3's factors are vectors with values around 1, so they get no weight decay. PEFT stores them as
    # matrices with one row or column, so they are found by their names.
    factors = {id(p) for name, p in model.named_parameters() if name.endswith(".ia3_l")}
    # Key: number of matrices in one parameter (3 in a fused projection of Q, K and V). Value: the parameters
    # with this number of matrices.
    stacked: dict[int, list[nn.Parameter]] = {}
    if config.optimizer == "muon":
        for p, parts in family_of(model.config).matrix_parameters(model):
            if p.requires_grad and id(p) not in factors:
                stacked.setdefault(parts, []).append(p)
    by_muon = [{"params": some, "parts": parts} for parts, some in sorted(stacked.items())]
    taken = {id(p) for some in stacked.values() for p in some}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    matrices = [p for p in rest if p.dim() >= 2 and id(p) not in factors]
    vectors = [p for p in rest if p.dim() < 2 or id(p) in factors]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    ]
    if by_muon:
        rate, decay = config.muon_learning_rate, config.muon_weight_decay
        # float16 is not used for Muon's products, because small values would become 0
        products = torch.bfloat16 if config.precision == "bfloat16" else None
        optimizers.append(Muon(by_muon, lr=rate, weight_decay=decay, products=products))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


# Coefficients of a quintic polynomial that moves singular values from (0, 1] towards 1. It is steep at 0, so
# a few iterations are enough. The singular values end between about 0.7 and 1.2, which is close enough to 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, products: torch.dtype | None = None, steps: int = 3) -> Tensor:
    """Orthogonalise N matrices (N, R, C) by Newton-Schulz iteration: singular values become about 1.

    A matrix U S V^T becomes about U V^T. After three steps, singular values that were above about 0.03 of the
    Frobenius norm are near 1. Smaller ones end lower. This does no harm, because in a gradient they are
    noise. With products in bfloat16, the result has an error of about one percent.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    # (N, r, c) with r <= c, so that the products below are (r, r) and small
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # after this, no singular value is above 1
    x = x.to(products or x.dtype)
    for _ in range(steps):
        gram = x @ x.mT  # (N, r, r)
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)  # _B gram + _C gram^2
        x = torch.baddbmm(x, polynomial, x, beta=_A)  # (N, r, c): _A x + polynomial x
    x = x.to(matrices.dtype)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon: SGD with momentum. Each update is orthogonalised, so that its singular values are about equal.

    A parameter may be several matrices, stacked along the rows. The entry `parts` of its group is their
    number: 3 for a fused QKV projection (3C, C). Matrices of equal shape are orthogonalised in one batch.

    Args:
        params: matrices, or groups of matrices with the entry `parts` (default 1).
        lr: spectral norm of an update. (If a matrix has more rows than columns, the norm is
            lr * sqrt(rows / columns).)
        momentum: share of the old momentum that each step keeps (Nesterov momentum).
        weight_decay: decoupled weight decay; it is multiplied by lr.
        products: dtype of the matrix products. Default: the dtype of the weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        products: torch.dtype | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(params, defaults)
        self.products = products

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient.

        The caller may set self.found_inf, as for torch's fused AdamW: a tensor, 1.0 if a gradient is not
        finite, else 0.0. If it is 1.0, nothing changes. It is read on the device, so the CPU does not wait.
        """
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        keep = 1.0 if found_inf is None else 1 - found_inf
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # shape -> [(weights, direction)]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                gradient = p.grad if found_inf is None else torch.where(found_inf > 0, 0.0, p.grad)
                buffer.lerp_(gradient, (1 - group["momentum"]) * keep)
                direction = gradient.lerp(buffer, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"] * keep)
                for w, d in zip(p.chunk(group["parts"]), direction.chunk(group["parts"])):
                    stacks.setdefault((w.shape[0], w.shape[1]), []).append((w, d))
            for (rows, columns), stack in stacks.items():
                updates = orthogonalize(torch.stack([d for _, d in stack]), self.products)
                length = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (w, _), update in zip(stack, updates):
                    w.add_(update if found_inf is None else update * keep, alpha=-length)


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the optimisers' state as a dict: a name such as `transformer.wte.weight.exp_avg` -> tensor.

    The tensors are on the CPU. Exception: for a sharded model (FSDP), they are this process's shards, on the
    process's device.
    """
    return {
        f"{name}.{key}": value.detach() if is_sharded(value) else value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def blank_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return zeros with the names and shapes of `state_tensors`, to be filled from a checkpoint."""
    return {
        name: torch.zeros(()) if key == "step" else torch.zeros_like(parameter.detach())
        for name, _, parameter, key in _entries(model, optimizers)
    }


def _entries(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor, str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        keys = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            for key in keys:
                yield f"{names[parameter]}.{key}", optimizer, parameter, key


def load_state(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Load the optimisers' state: a dict with the names that `state_tensors` gives.

    An empty dict changes nothing: the checkpoint was saved before the optimisers' first update.

    Raises:
        InputError: if the tensors belong to another model or optimiser.
    """
    if not tensors:
        return
    remaining = dict(tensors)
    for name, optimizer, parameter, key in _entries(model, optimizers):
        tensor = remaining.pop(name, None)
        if tensor is None or (key != "step" and tensor.shape != parameter.shape):
            raise InputError(f"the optimiser's state does not fit the model: {name}")
        # AdamW's "step" is one number, so it is not sharded. Fused AdamW keeps it on the parameter's device.
        like = tensor if key == "step" else parameter
        optimizer.state[parameter][key] = shard_like(like, tensor).to(parameter.device)
    if remaining:
        raise InputError(f"the optimiser's state holds unknown tensors: {', '.join(sorted(remaining)[:3])}")
