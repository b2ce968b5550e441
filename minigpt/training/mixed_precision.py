"""Matrix products in 16 bits: which precision `auto` means, autocast, and float16's loss scale.

- `float32` is IEEE single precision everywhere, so that a GPU computes what a CPU does, to rounding. With 16
  bits on CUDA, what stays in float32 (an evaluation's products, Muon's with float16) may use TF32: its 10
  bits are still more than bfloat16's 7.
- `float16` needs its loss scaled, since small gradients would become 0: see `LossScale`.
- `auto` is what the device has fast products for: bfloat16 on a CPU with AVX-512 BF16 or AMX; on CUDA
  bfloat16, or float16 on cards from before 2020; else float32.
- Attention needs no mask in training (padding stands on the right, windows have none). So SDPA can take its
  causal path: FlashAttention or cuDNN's with 16 bits on CUDA, the memory-efficient kernel in float32.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minigpt.errors import InputError
from minigpt.training.config import Precision

__all__ = ["LossScale", "MixedPrecision", "pick_precision"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_precision(wanted: Precision, device: torch.device) -> Precision:
    """The precision that `auto` means on this device; any other name is itself."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    # not in all versions of torch that will do
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


class MixedPrecision:
    """The arithmetic of a run: weights in float32, matrix products in `precision`.

    Attributes:
        autocast: makes the context for a forward pass.
        scale: float16's loss scale; None for the other precisions.

    Args:
        precision: no longer "auto".
        device: where the model is.

    Raises:
        InputError: for a precision that the device does not have.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        dtype = _DTYPES.get(precision)
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.scale = LossScale(device) if dtype == torch.float16 else None
        if dtype is None:
            return
        if device.type == "cpu":
            self.autocast = functools.partial(_cpu_autocast, dtype)
            return
        self.autocast = functools.partial(torch.autocast, device.type, dtype=dtype)
        if device.type == "cuda":
            if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
                raise InputError(
                    f"{torch.cuda.get_device_name(device)} has no bfloat16: "
                    "give --precision float16 (or float32)"
                )
            torch.set_float32_matmul_precision("high")  # TF32


class LossScale:
    """Factor of a float16 loss. It saves gradients below 6e-8, which float16 takes for 0.

    https://arxiv.org/abs/1710.03740, section 3.2. The factor doubles after 2,000 steps without overflow; an
    overflow halves it, and the step is skipped: torch.amp.GradScaler's rule. Here one decision holds for all
    optimisers, processes and shards, together with the check for numbers that are not finite; it is taken
    on the device, and the CPU does not wait for it. The factors are powers of 2: scaling rounds nothing.
    """

    interval = 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), 2.0**16, device=device)
        self._good = torch.zeros((), device=device)  # steps without overflow since it changed

    def update(self, found_inf: Tensor) -> None:
        """After a step: `found_inf` is 1.0 if its gradient was not finite."""
        is_bad = found_inf > 0
        due = self._good + 1 >= self.interval
        grown = torch.where(due, self.value * 2, self.value)
        self.value = torch.where(is_bad, (self.value / 2).clamp(min=1.0), grown)
        self._good = torch.where(is_bad | due, torch.zeros_like(self._good), self._good + 1)

    def state(self) -> list[float]:
        """For a checkpoint: the factor, and good steps since it changed."""
        return [float(self.value), float(self._good)]

    def load(self, state: list[float]) -> None:
        """Put `state` back. An empty one, from a run without a scale, changes nothing."""
        if state:
            self.value = torch.full_like(self.value, state[0])
            self._good = torch.full_like(self._good, state[1])


@contextmanager
def _cpu_autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype), _CPUAutocast(dtype):
        yield


class _CPUAutocast(TorchFunctionMode):
    """What torch.autocast leaves undone on a CPU (LOG.md has the times).

    - Attention stays in float32: the gradient of its kernel for 16 bits takes several times as long on short
      rows, and gains a fifth on long ones.
    - An input of several linear layers (queries, keys, values; gate and up) is rounded once, not by each.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._last: tuple[Tensor, Tensor] | None = None  # a linear layer's input: as it is, and rounded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            with torch.autocast("cpu", enabled=False):
                return func(*(tensor.float() for tensor in args), **kwargs)
        if func is F.linear and args[0].dtype == torch.float32:
            x, *rest = args
            if self._last is None or self._last[0] is not x:
                self._last = x, x.to(self._dtype)
            return func(self._last[1], *rest, **kwargs)
        return func(*args, **kwargs)
