"""Adam, https://arxiv.org/abs/1412.6980, algorithm 1, as a function of trees, for NumPy and JAX."""

from typing import Any

from minigpt.reference.names import Tree, map_tree

__all__ = ["adam", "adam_state"]


def adam_state(params: Tree) -> dict[str, Any]:
    """Return the state before the first step: both moments are zero."""
    zeros = map_tree(lambda p: p * 0, params)
    return {"steps": 0, "first": zeros, "second": zeros}


def adam(
    params: Tree,
    gradients: Tree,
    state: dict[str, Any],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
) -> tuple[Tree, dict[str, Any]]:
    """Do one step. Returns the new params and the new state; nothing changes in place.

    A weight moves by the learning rate times the mean of its last gradients, divided by the root of the mean
    of their squares. So it moves by about the learning rate, for gradients of any size.
    """
    beta1, beta2 = betas
    steps = state["steps"] + 1
    first = map_tree(lambda m, g: beta1 * m + (1 - beta1) * g, state["first"], gradients)
    second = map_tree(lambda v, g: beta2 * v + (1 - beta2) * (g * g), state["second"], gradients)
    # Both moments started at zero, so at first they are too small. The divisions below correct this.
    lean1, lean2 = 1 - beta1**steps, 1 - beta2**steps

    def moved(p: Any, m: Any, v: Any) -> Any:
        return p - learning_rate * (m / lean1) / ((v / lean2) ** 0.5 + eps)

    return map_tree(moved, params, first, second), {"steps": steps, "first": first, "second": second}
