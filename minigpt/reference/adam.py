"""Adam for NumPy and JAX, as a function of trees of arrays. https://arxiv.org/abs/1412.6980, algorithm 1."""

from typing import Any

from minigpt.reference.names import Tree, map_tree

__all__ = ["adam", "adam_state"]


def adam_state(params: Tree) -> dict[str, Any]:
    """Return Adam's state before the first step. Both running means (`first`, `second`) are zero."""
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
    """Do one step of Adam. Returns the new params and the new state; the arguments do not change.

    Adam keeps two running means for each weight: of the gradients, and of their squares. The weight moves by
    learning_rate * mean / sqrt(mean of squares). So the size of a move is about the learning rate, whether
    the gradients are large or small.
    """
    beta1, beta2 = betas
    steps = state["steps"] + 1
    first = map_tree(lambda m, g: beta1 * m + (1 - beta1) * g, state["first"], gradients)
    second = map_tree(lambda v, g: beta2 * v + (1 - beta2) * (g * g), state["second"], gradients)
    # Both running means start at zero, so they are too small in the first steps. The divisions in `moved` by
    # lean1 and lean2 correct this.
    lean1, lean2 = 1 - beta1**steps, 1 - beta2**steps

    def moved(p: Any, m: Any, v: Any) -> Any:
        return p - learning_rate * (m / lean1) / ((v / lean2) ** 0.5 + eps)

    return map_tree(moved, params, first, second), {"steps": steps, "first": first, "second": second}
