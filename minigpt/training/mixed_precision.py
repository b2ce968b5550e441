"""The machine that a run trains on: its arithmetic, and how batches and numbers get there and back.

A model knows nothing of it, and the loop asks one object. What it decides, by device and `--precision`:

- `float32` is IEEE single precision everywhere, so that a GPU computes what a CPU does, to rounding. Who
  wants speed asks for 16 bits; then, on CUDA, what stays in float32 (an evaluation's products, Muon's with
  float16) may use TF32, whose 10 bits are still more than bfloat16's 7.
- `float16` needs its loss scaled, since small gradients would become 0: see `LossScale`.
- `auto` is what the device has fast products for: bfloat16 on a CPU with AVX-512 BF16 or AMX; on CUDA
  bfloat16, or float16 on cards from before 2020; else float32.
- Attention needs no mask in training (padding stands on the right, windows have none), so that SDPA's causal
  path is open: FlashAttention or cuDNN's with 16 bits on CUDA, the memory-efficient kernel in float32.
- On CUDA nothing waits for a step: its loss is read some steps later (`reads_late`), and the next batch is
  on its way meanwhile. Pinned memory suffices: a batch is some 100 KB, no second stream would gain anything.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minigpt.data.batches import Batch
from minigpt.errors import InputError
from minigpt.training.config import Precision, TrainConfig

__all__ = ["Counted", "LossScale", "Machine", "pick_precision"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Counted(NamedTuple):
    """A batch on the device, and where its loss counts."""

    input_ids: Tensor  # (B, T) int64
    goals: Tensor  # (P,) int64: the targets that count
    places: Tensor | None  # (P,) int64: where they stand among the B * T; None: all count


class LossScale:
    """Factor of a float16 loss, so that gradients below 6e-8, which float16 takes for 0, survive.

    https://arxiv.org/abs/1710.03740, section 3.2. It doubles after 2,000 steps without overflow, and is
    halved at each overflow, whose step is not done: torch.amp.GradScaler's rule. Here it is one decision for
    all optimisers, processes and pieces, together with the guard's, and the device takes it without being
    looked at. Powers of 2: scaling rounds nothing.
    """

    interval = 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), 2.0**16, device=device)
        self._good = torch.zeros((), device=device)  # steps without overflow since it changed

    def after(self, found_inf: Tensor) -> None:
        """After a step: 1.0 says that its gradient was not finite."""
        is_bad = found_inf > 0
        due = self._good + 1 >= self.interval
        grown = torch.where(due, self.value * 2, self.value)
        self.value = torch.where(is_bad, (self.value / 2).clamp(min=1.0), grown)
        self._good = torch.where(is_bad | due, torch.zeros_like(self._good), self._good + 1)

    def state(self) -> list[float]:
        """For a checkpoint: the factor, and good steps since it changed."""
        return [float(self.value), float(self._good)]

    def load(self, state: list[float]) -> None:
        """Put `state` back; an empty one, of a run without a scale, changes nothing."""
        if state:
            self.value = torch.full_like(self.value, state[0])
            self._good = torch.full_like(self._good, state[1])


def pick_precision(wanted: Precision, device: torch.device) -> Precision:
    """The arithmetic that `auto` means on this device; any other name is itself."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    # not in all versions of torch that will do
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


class _OnACPU(TorchFunctionMode):
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


@contextmanager
def _autocast_on_a_cpu(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype), _OnACPU(dtype):
        yield


class Machine:
    """A device and what a run's configuration, whose precision is no longer `auto`, asks of it.

    Raises:
        InputError: for an arithmetic that the device does not have; for `compile` without a compiler.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.device, self._dtype = device, _DTYPES.get(config.precision)
        on_cuda = device.type == "cuda"
        if config.threads:
            torch.set_num_threads(config.threads)
        if on_cuda and self._dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
            raise InputError(
                f"{torch.cuda.get_device_name(device)} has no bfloat16: give --precision float16 (or float32)"
            )
        if on_cuda and self._dtype is not None:
            torch.set_float32_matmul_precision("high")  # TF32
        if config.compile and not config.dry_run:
            _require_compiler(device)
            if device.type == "cpu" and self._dtype is not None and config.gradient_checkpointing:
                raise InputError(
                    "--compile and --gradient_checkpointing on a CPU go together in float32 only: give "
                    "--precision float32, or leave one of them out"
                )
        self.scale = LossScale(device) if self._dtype == torch.float16 else None
        self.reads_late = on_cuda

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the configuration's arithmetic."""
        if self._dtype is None:
            return nullcontext()
        if self.device.type == "cpu":
            return _autocast_on_a_cpu(self._dtype)
        return torch.autocast(self.device.type, dtype=self._dtype)

    @property
    def logits(self) -> int:
        """How many logits the loss may hold at a time; 14 bytes each, with what their gradient needs.

        256 MiB in float32 on a CPU; of a GPU's memory a quarter in all. (More pieces cost time: each is
        computed twice.)
        """
        if self.device.type != "cuda":
            return 2**26
        return max(2**26, int(torch.cuda.get_device_properties(self.device).total_memory) // (4 * 14))

    @property
    def vocabulary_multiple(self) -> int:
        """lm_head's rows are padded to a multiple of it, in training only; see chunked_loss.py."""
        return 64 if self.device.type == "cuda" else 1

    def counted(self, batch: Batch, mask: Tensor) -> Counted:
        """A batch on its way to the device; `mask` (B, T): the targets that count.

        Their places are found here, on the CPU: a mask on the device would make the CPU wait there until
        their number is known.
        """
        ids, targets = batch.input_ids, batch.targets.flatten()  # (B, T), (B * T,)
        places = None if bool(mask.all()) else mask.flatten().nonzero().flatten()  # (P,)
        goals = targets if places is None else targets[places]
        return Counted(self._moved(ids), self._moved(goals), None if places is None else self._moved(places))

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)  # without pinned memory the source might be gone before it is read


def _require_compiler(device: torch.device) -> None:
    """torch.compile writes C++ for a CPU and Triton for CUDA; what it says where they lack is 100 lines."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError(
            "--compile needs Triton, which is not installed: pip install triton, or --no_compile"
        )
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl"))):
        raise InputError(
            "--compile on a CPU needs a C++ compiler (g++, clang++): install one, or --no_compile"
        )
