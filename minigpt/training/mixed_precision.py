"""Computes in 16 or 32 bits: autocast for each value of `--precision`, and float16's loss scale.

- `float32`: IEEE single precision on every device, so a GPU gives the CPU's results up to rounding.
- `bfloat16` and `float16`: matrix products in 16 bits. There are two exceptions, with products in float32:
  evaluation, and the optimiser Muon if the precision is float16. On CUDA, these float32 products may use
  TF32, which is more precise than bfloat16 (mantissa: 10 bits, not 7).
- `float16` needs a scaled loss, because small gradients would become 0: see `LossScale`.
- `auto`: the precision in which the device computes products fastest. CPU: bfloat16 with AVX-512 BF16 or AMX,
  else float32. CUDA: bfloat16, but float16 on GPUs older than 2020. Other devices: float32.

Training passes no attention mask: padding is always on the right, where causal attention does not look. So
SDPA can use its causal kernels: FlashAttention or cuDNN with 16 bits on CUDA, the memory-efficient kernel in
float32.
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
    """Resolve `auto` for this device. Any other precision is returned as it is."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    # older versions of torch do not have torch.cpu.get_capabilities
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


class MixedPrecision:
    """The arithmetic of a run: weights in float32, matrix products in `precision`.

    Attributes:
        autocast: returns the context manager for a forward pass.
        scale: float16's loss scale; None for the other precisions.

    Args:
        precision: the resolved precision, not "auto".
        device: device of the model.

    Raises:
        InputError: if the device does not support the precision.
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
            torch.set_float32_matmul_precision("high")  # "high" allows TF32 in float32 products


class LossScale:
    """float16's loss scale: the loss is multiplied by it. Without it, gradients below 6e-8 would become 0.

    https://arxiv.org/abs/1710.03740, section 3.2. As in torch.amp.GradScaler, the factor doubles after 2,000
    steps without overflow. After an overflow, the factor is halved and the step is skipped. The factors are
    powers of 2, so scaling does not round.

    Two things differ from torch. A single check of loss and gradients, which also finds NaN, is made for all
    optimisers, processes and shards. And the check runs on the device, so the CPU does not wait.
    """

    interval = 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), 2.0**16, device=device)
        # number of steps without overflow since the factor last changed
        self._good = torch.zeros((), device=device)

    def update(self, found_inf: Tensor) -> None:
        """Double or halve the factor if needed. `found_inf`: 1.0 if loss or gradient was not finite."""
        is_bad = found_inf > 0
        due = self._good + 1 >= self.interval
        grown = torch.where(due, self.value * 2, self.value)
        self.value = torch.where(is_bad, (self.value / 2).clamp(min=1.0), grown)
        self._good = torch.where(is_bad | due, torch.zeros_like(self._good), self._good + 1)

    def state(self) -> list[float]:
        """Return the loss scale, and the number of steps without overflow since the scale last changed."""
        return [float(self.value), float(self._good)]

    def load(self, state: list[float]) -> None:
        """Restore the result of `state`. An empty list (from a run without float16) changes nothing."""
        if state:
            self.value = torch.full_like(self.value, state[0])
            self._good = torch.full_like(self._good, state[1])


@contextmanager
def _cpu_autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype), _CPUAutocast(dtype):
        yield


class _CPUAutocast(TorchFunctionMode):
    """Makes torch.autocast faster on a CPU, in two ways (times in LOG.md).

    - Attention stays in float32. The 16-bit kernel's backward pass is several times slower on short rows, and
      only a fifth faster on long rows.
    - Several linear layers may have the same input (queries, keys, values; gate and up). This input is
      rounded to 16 bits once, not once for each layer.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        # the last input of a linear layer, and the same input rounded to 16 bits
        self._last: tuple[Tensor, Tensor] | None = None

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
