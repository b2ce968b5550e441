"""Converts flat names to a tree and back: {"h.0.ln_1.weight": a} <-> {"h": [{"ln_1": {"weight": a}}]}.

A Hugging Face name is a path. A part of the path that consists of digits is a list index; other parts are
dict keys.
"""

from collections.abc import Callable, Mapping
from typing import Any

from minigpt.errors import InputError

__all__ = ["Tree", "check_names", "flat", "layer_count", "map_tree", "tree"]

Tree = dict[str, Any]


def tree(tensors: Mapping[str, Any]) -> Tree:
    """Convert flat names to a tree.

    >>> tree({"h.0.w": 1, "h.1.w": 2, "ln_f.bias": 3})
    {'h': [{'w': 1}, {'w': 2}], 'ln_f': {'bias': 3}}
    """
    nested: Tree = {}
    for name, array in tensors.items():
        *path, last = name.split(".")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array
    listed: Tree = _listed(nested)
    return listed


def _listed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if all(part.isdecimal() for part in node):
        assert sorted(map(int, node)) == list(range(len(node))), "check_names finds holes first"
        return [_listed(node[str(index)]) for index in range(len(node))]
    return {part: _listed(child) for part, child in node.items()}


def flat(params: Any, prefix: str = "") -> dict[str, Any]:
    """Convert a tree to flat names.

    >>> flat({"h": [{"w": 1}, {"w": 2}], "ln_f": {"bias": 3}})
    {'h.0.w': 1, 'h.1.w': 2, 'ln_f.bias': 3}
    """
    if isinstance(params, dict | list):
        children = params.items() if isinstance(params, dict) else enumerate(params)
        return {
            name: array for key, child in children for name, array in flat(child, f"{prefix}{key}.").items()
        }
    return {prefix[:-1]: params}


def map_tree(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply a function to the leaves of trees with the same structure. Returns a tree of the results.

    The function is called with one leaf of each tree.

    >>> map_tree(lambda a, b: a + b, {"h": [1, 2]}, {"h": [10, 20]})
    {'h': [11, 22]}
    """
    if isinstance(first, dict):
        return {key: map_tree(function, first[key], *(other[key] for other in others)) for key in first}
    if isinstance(first, list):
        return [map_tree(function, *children) for children in zip(first, *others, strict=True)]
    return function(first, *others)


def layer_count(names: Mapping[str, Any], prefix: str) -> int:
    """Return 1 + the highest layer number in the names: {"h.0.w": 1, "h.5.w": 2} with prefix "h." gives 6."""
    numbers = [name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)]
    return max((int(number) + 1 for number in numbers if number.isascii() and number.isdecimal()), default=0)


def check_names(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the names and shapes of tensors with the expected names and shapes.

    Raises:
        InputError: if tensors are missing, unexpected, or of the wrong shape; the message lists them.
    """
    complaints = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [name for name in tensors if name not in shapes],
        "of the wrong shape": [
            f"{name} is {tuple(tensors[name].shape)}, not {shape}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    text = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in complaints.items() if names)
    if text:
        raise InputError(f"these are not the model's weights; {text}")


def _shortened(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
