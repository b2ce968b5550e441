"""Reading weights and settings that others wrote, strictly: what every family's `weight_names` does alike.

Nothing is guessed and nothing is skipped: each function returns what fits, or raises an InputError that names
the key or the tensor. It knows no family and opens no file.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt.errors import InputError

__all__ = [
    "MOST_LAYERS",
    "completed_names",
    "is_finite",
    "parameter_shapes",
    "require_finite",
    "require_fit",
    "require_fixed",
    "require_keys",
    "require_layers",
    "two_at_a_time",
    "unfilled",
]

MOST_LAYERS = 1000  # of any model
Model = TypeVar("Model", bound=nn.Module)
Item = TypeVar("Item")
Result = TypeVar("Result")


# -- config.json -------------------------------------------------------------------------------------------


def require_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """What a family may vary elsewhere and not here; an absent key means the same value.

    Raises:
        InputError: naming the first key with another value.
    """
    for key, value in fixed.items():
        if values.get(key, value) != value:
            raise InputError(f"{key}={values[key]!r} is not supported, only {value!r}")


def require_keys(values: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raise an InputError that names the keys that are not there, if there are any."""
    missing = [key for key in keys if key not in values]
    if missing:
        raise InputError(f"missing keys: {', '.join(missing)}")


# -- tensors -----------------------------------------------------------------------------------------------


def completed_names(names: Iterable[str], prefix: str, head: str) -> tuple[dict[str, str], list[str]]:
    """Names with the first part that a file of the model without its head leaves out: wte is transformer.wte.

    Returns: full name -> name in the file, and complaints about those that were there under both.
    """
    found: dict[str, str] = {}
    twice = []
    for name in names:
        full_name = name if name.startswith((prefix, head)) else f"{prefix}{name}"
        if full_name in found:
            twice.append(f"{name} twice, with and without its prefix")
        else:
            found[full_name] = name
    return found, twice


def require_fit(
    found: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    unexpected: Collection[str] = (),
    optional: Collection[str] = (),
) -> None:
    """Compare names, shapes and kinds.

    Args:
        expected: name -> shape of all that may be there.
        unexpected: complaints that the caller has already.
        optional: those of the expected that may be absent.

    Raises:
        InputError: in one line, all that is missing, unexpected, or of the wrong shape or type.
    """
    complaints = {
        "missing": [name for name in expected if name not in found and name not in optional],
        "unexpected": [*unexpected, *sorted(found.keys() - expected.keys())],
        "unfit": [
            f"{name} is {found[name].dtype} {tuple(found[name].shape)}, not float {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and (found[name].shape != shape or not found[name].is_floating_point())
        ],
    }
    if any(complaints.values()):
        text = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in complaints.items() if names)
        raise InputError(f"the weights do not fit the configuration; {text}")


def require_layers(names: Iterable[str], prefix: str, count: int, key: str) -> None:
    """A configuration may ask for a billion layers: better said before they are listed one by one.

    Args:
        names: the tensors'; those of layer i begin with prefix, i and a dot.
        count: layers that the configuration has, under `key`.

    Raises:
        InputError: if these are more than the weights have, and more than any model has.
    """
    numbers = (name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix))
    there = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    if count > max(there, MOST_LAYERS):
        raise InputError(f"{key}={count}, but the highest layer in the weights is number {there}")


def is_finite(tensor: Tensor) -> bool:
    """Has it neither NaN nor infinity? Once over it, without a copy; torch.isfinite makes several."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    ends = torch.stack(torch.aminmax(tensor.detach()))  # NaN is both ends of what holds one
    return bool(ends.isfinite().all())


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise an InputError if a tensor holds NaN or infinity."""
    if not is_finite(tensor):
        raise InputError(f"{name} holds NaN or infinity: these weights are unusable")


def two_at_a_time(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `read` returns for each item, in their order: torch lets two copies be made at the same time."""
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(read, items)


def _shortened(names: list[str], limit: int = 8) -> str:
    """The names, or the first of very many: it shall stay one line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# -- shapes ------------------------------------------------------------------------------------------------


class _NothingDrawn(TorchFunctionMode):
    """Skips torch.nn.init."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def unfilled(make: Callable[[], Model]) -> Model:
    """What `make` makes, on "meta": shapes, but neither memory nor time for weights.

    Drawing random numbers on "meta" would draw nothing, but load torch._dynamo, which takes most of a second.

    Raises:
        InputError: if a tensor would have more values than can be counted.
    """
    try:
        with torch.device("meta"), _NothingDrawn():
            return make()
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise InputError("the configuration's sizes are too large for any machine") from None


@lru_cache(maxsize=4)
def parameter_shapes(make: Callable[[Any], nn.Module], config: Hashable) -> dict[str, torch.Size]:
    """Each parameter's shape in make(config), under its first name where one tensor has two; kept."""
    return {name: parameter.shape for name, parameter in make(config).named_parameters()}
