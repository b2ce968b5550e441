"""Functions for loading weights, shared by all families: checks for NaN, models on "meta", casts."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt.errors import InputError
from minigpt.storage.large_pages import LargePages

__all__ = [
    "cast",
    "is_finite",
    "on_meta",
    "parameter_shapes",
    "require_finite",
    "tensor_kind",
    "two_at_a_time",
]

Item = TypeVar("Item")
Result = TypeVar("Result")


# -- finite numbers ----------------------------------------------------------------------------------------


def is_finite(tensor: Tensor) -> bool:
    """Return True if a tensor holds no NaN or infinity. One pass, no copy (torch.isfinite copies)."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    extremes = torch.stack(torch.aminmax(tensor.detach()))  # least and greatest value; a NaN makes both NaN
    return bool(extremes.isfinite().all())


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise an InputError if a tensor holds NaN or infinity."""
    if not is_finite(tensor):
        raise InputError(f"{name} holds NaN or infinity: these weights are unusable")


def cast(
    name: str, tensor: Tensor, dtype: torch.dtype, pages: LargePages | None = None, own: bool = False
) -> Tensor:
    """Return a contiguous copy of a tensor in another dtype.

    Args:
        name: name of the tensor, for error messages.
        tensor: the tensor.
        dtype: dtype of the copy.
        pages: allocates the copy in large pages of memory. None: ordinary memory.
        own: True: the caller does not need `tensor` any more, so its memory may be reused.

    Raises:
        InputError: if the tensor holds NaN or infinity, or a value that is too large for the dtype.
    """
    if pages is None:
        copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        copy = pages.copied(tensor, dtype, own=own)
    if not is_finite(copy):
        require_finite(name, tensor)
        kind, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise InputError(f"{name} holds values beyond {largest:,.6g}, the largest number in {kind}")
    return copy


def two_at_a_time(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Call `read` for each item, in two threads. Yield the results in the order of `items`.

    Two threads are faster than one, because torch releases the GIL while it copies a tensor.
    """
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(read, items)


# -- shapes ------------------------------------------------------------------------------------------------


class _SkipInit(TorchFunctionMode):
    """Skips the functions of torch.nn.init while a model is made on "meta".

    These functions have no effect on "meta", but their first call imports torch._dynamo, which takes almost a
    second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def on_meta(model_class: Callable[[Any], nn.Module], config: Any) -> Any:
    """Make a model on the "meta" device: its parameters have shapes, but no values and no memory.

    Raises:
        InputError: if a tensor would have more values than a 64-bit number can count.
    """
    try:
        with torch.device("meta"), _SkipInit():
            return model_class(config)
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise InputError("the configuration's sizes are too large for any machine") from None


@lru_cache(maxsize=8)
def parameter_shapes(model_class: Callable[[Any], nn.Module], config: Hashable) -> dict[str, torch.Size]:
    """Return the shape of each parameter of model_class(config). A shared tensor is listed once."""
    return {name: parameter.shape for name, parameter in on_meta(model_class, config).named_parameters()}


def tensor_kind(tensor: Tensor) -> str:
    """Return dtype and shape as text for an error message. Each floating-point dtype gives "float"."""
    return f"{'float' if tensor.is_floating_point() else tensor.dtype} {tuple(tensor.shape)}"
