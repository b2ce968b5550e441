"""How several processes share the work on one model: DDP, where each has all of it, or FSDP2, a shard each.

DDP (https://arxiv.org/abs/2006.15704) adds up gradients while the backward pass is still running. FSDP2
(torch's `fully_shard`, after https://arxiv.org/abs/2304.11277) keeps 1/N of weights, gradients and optimiser
state in each process and gathers a block's weights when it computes: for models that do not fit.

With one process the model is used as it is. What is computed does not depend on the number of processes, but
for the rounding of sums, and the numbers that dropout draws. torch.distributed's larger parts are imported
where they are used: one process pays nothing.
"""

import contextlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minigpt.data.batches import Batch
from minigpt.errors import InputError
from minigpt.evaluation.loss import Report
from minigpt.families.registry import LanguageModel, family_of
from minigpt.training.config import TrainConfig
from minigpt.training.distributed import Processes
from minigpt.training.loss import Objective
from minigpt.training.model_files import ModelFiles
from minigpt.training.stop_request import StopNow, StopRequest

__all__ = [
    "Parallel",
    "ShardedSave",
    "full_tensor",
    "is_sharded",
    "local_tensors",
    "read_shards",
    "shard_batch",
    "shard_like",
]


def shard_batch(batch: Batch, processes: Processes) -> Batch:
    """This process's rows of a batch: every N-th. If there are too few, a row in which nothing counts.

    The batch's rows are sorted by length, so that every process has as much to do. All must take part: in the
    sums of gradients, and in gathering weights.
    """
    if processes.size == 1:
        return batch
    if processes.rank < len(batch.rows):
        return batch.some(slice(processes.rank, None, processes.size))
    return batch.blank()


class Parallel:
    """A model with its loss in one of N processes.

    Args:
        config: `parallel` says what N > 1 processes do. With `compile`, torch.compile writes kernels for the
            loss and its gradient. Evaluations and answers, whose shapes are all different, use the model as
            it is; so do checkpoints, with its names.
        loss: a module around the model, with the same weights in each process; FSDP shards it in place.
        device: where the model is.
        processes: all of them.

    Raises:
        InputError: for `compile` without a compiler.
    """

    def __init__(
        self, config: TrainConfig, loss: Objective, device: torch.device, processes: Processes
    ) -> None:
        self._model, self._processes, self._device = loss.model, processes, device
        self._objective = loss
        self.is_sharded = processes.size > 1 and config.parallel == "fsdp"
        self._loss: nn.Module = loss
        self._compiled: Any = None
        compiled = config.compile and not config.dry_run  # which computes a little, never compiled
        if compiled:
            with processes.shared_errors():
                _require_compiler(config, device)
        if self.is_sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (processes.size,))
            for block in self._model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self._loss, mesh=mesh)  # embeddings, the last norm, lm_head
        elif processes.size > 1:
            self._loss = DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
            self._fix_message_order(loss.example(device))
        if compiled:
            # DDP's own way of compiling cuts the graph where its messages begin, and does not support
            # activation checkpointing. Without it the messages wait for the last gradient.
            torch._dynamo.config.optimize_ddp = False
            self._compiled = torch.compile(self._loss)

    def _fix_message_order(self, example: tuple[Tensor | None, ...]) -> None:
        """A backward pass whose gradient is thrown away.

        After its first one, DDP orders its messages anew, and with them the order of sums. A resumed run has
        its first pass at another step than a run that was never stopped, so the first one must not count.
        """
        was_training = self._loss.training
        self._loss.eval()  # no dropout: no random numbers
        self._loss(*example).backward()
        self._loss.train(was_training)
        self._model.zero_grad()

    def shard_batches(self, batches: list[Batch]) -> list[Batch]:
        """This process's part of a step: whole batches where N divides their number, else rows of each."""
        rank, size = self._processes.rank, self._processes.size
        if len(batches) % size == 0:
            return batches[rank::size]
        return [shard_batch(batch, self._processes) for batch in batches]

    def loss(self, batch: tuple[Tensor | None, ...]) -> Tensor:
        """The summed loss of a batch on the model's device."""
        if self._compiled is None:
            result: Tensor = self._loss(*batch)
            return result
        if batch[-1] is not None:  # positions
            # Lengths vary from batch to batch: one graph for all of them, instead of one each. (Windows are
            # all of one length, and kernels for a known size are faster: they are not marked.)
            for tensor in batch:
                for dim in range(tensor.dim() if tensor is not None else 0):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        compiled: Tensor = self._compiled(*batch)
        return compiled

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass: only a step's last one adds up the processes' gradients."""
        if self.is_sharded:
            self._loss.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        return nullcontext()

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[Batch], stop_request: StopRequest) -> Report:
        """Measure the model on batches, of which each process computes its rows.

        Raises:
            StopNow: when a signal comes meanwhile.
        """
        with stop_request.interruptible():
            if self._processes.size == 1:
                return self._objective.evaluate(self._model, batches, self._device)
            model: Any = _Gathering(self._model, self._loss) if self.is_sharded else self._model
            try:
                mine = self._my_rows(batches, stop_request)
                return self._objective.evaluate(model, mine, self._device, self._add_reports)
            finally:
                if self.is_sharded:  # give the memory of gathered weights back
                    self._loss.reshard()  # type: ignore[operator]

    def _my_rows(self, batches: Iterable[Batch], stop_request: StopRequest) -> Iterator[Batch]:
        """This process's rows. All processes have as many batches, and stop together."""
        for number, batch in enumerate(batches):
            if number % 8 == 0:
                stop_request.agree(self._processes)
                if stop_request.agreed is not None:
                    raise StopNow
            yield shard_batch(batch, self._processes)

    def _add_reports(self, report: Report) -> None:
        """The sums of one process become those of all."""
        report.set_sums(self._processes.all_reduce(report.sums()))

    # -- weights ---------------------------------------------------------------------------------------------

    def full_model(self) -> LanguageModel:
        """The model for process 0 to save. Every process must call it; the others cannot use the result."""
        if not self.is_sharded:
            return self._model
        weights = {}
        for name, parameter in self._model.named_parameters():
            full = full_tensor(parameter.detach())
            weights[name] = full.cpu() if self._processes.is_main else torch.empty(0)
        if not self._processes.is_main:
            return self._model
        family = family_of(self._model.config)
        copy: LanguageModel = family.on_meta(self._model.config)
        family.load_state(copy, weights, assign=True)
        return copy

    def load(self, folder: Path, files: ModelFiles) -> None:
        """Load a checkpoint's weights: each process reads all of them and keeps its shard."""
        if not self.is_sharded:
            files.load(self._model, folder)
            return
        family = family_of(self._model.config)
        full: LanguageModel = family.on_meta(self._model.config)
        shapes = {name: p.shape for name, p in self._model.named_parameters()}
        family.load_state(full, {name: torch.empty(shape) for name, shape in shapes.items()}, assign=True)
        files.load(full, folder)
        weights = dict(full.named_parameters())
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(shard_like(parameter, weights[name].detach()))


def _require_compiler(config: TrainConfig, device: torch.device) -> None:
    """torch.compile writes C++ for a CPU and Triton for CUDA; its own complaint is 100 lines."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError(
            "--compile needs Triton, which is not installed: pip install triton, or --no_compile"
        )
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl"))):
        raise InputError(
            "--compile on a CPU needs a C++ compiler (g++, clang++): install one, or --no_compile"
        )
    if device.type == "cpu" and config.precision != "float32" and config.gradient_checkpointing:
        raise InputError(
            "--compile and --gradient_checkpointing on a CPU go together in float32 only: give "
            "--precision float32, or leave one of them out"
        )


class _Gathering:
    """A sharded model for `evaluate_loss`: hidden vectors through FSDP, which gathers weights on the way.

    lm_head is used outside. The outermost part, which holds it, stays gathered until `reshard`.
    """

    def __init__(self, model: LanguageModel, loss: nn.Module) -> None:
        self.config, self.lm_head = model.config, model.lm_head
        self._loss = loss

    training = property(lambda self: self._loss.training)

    def train(self, mode: bool = True) -> None:
        self._loss.train(mode)

    def eval(self) -> None:
        self._loss.eval()

    def base_model(self, input_ids: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # FSDP keeps the memory, for training too
            hidden: Tensor = self._loss(input_ids.clone())
            return hidden


def is_sharded(tensor: Tensor) -> bool:
    """Is the tensor a DTensor of torch, a part of which lies in other processes?"""
    return hasattr(tensor, "to_local")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of it, put together in every process."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def shard_like(like: Tensor, full: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut and placed as another one is."""
    if is_sharded(full):
        return full
    full = full.to(like.device)
    if not is_sharded(like):
        return full.clone()
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def local_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of the tensors that lie in this process."""
    return {
        name: t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]
        for name, t in tensors.items()
    }


# -- the optimiser's state in shards ------------------------------------------------------------------------


class ShardedSave:
    """Each process writes its shards into the folder that process 0 is filling.

    torch.distributed.checkpoint does it, in safetensors files: its own format would need pickle. It replaces
    files in place and knows no hashes; here the folder is new, and process 0 lists all files in its manifest.

    Process 0 calls it with the folder, or `end` if it has not come to that; the others `follow`.
    """

    def __init__(self, processes: Processes, tensors: dict[str, Tensor]) -> None:
        self._processes, self._tensors, self._begun = processes, tensors, False

    def __call__(self, folder: Path) -> None:
        """In process 0: write this process's shards while the others write theirs."""
        self._begun = True
        self._write(self._processes.broadcast(str(folder)))

    def end(self) -> None:
        """The save has failed before the shards' turn: let the others go."""
        if not self._begun:
            self._processes.broadcast("")

    def follow(self) -> None:
        """Wait for the folder and write this process's shards; a failure is process 0's to tell."""
        if folder := self._processes.broadcast(""):
            with contextlib.suppress(InputError):
                self._write(folder)

    def _write(self, folder: str) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            save(dict(self._tensors), storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
        except CheckpointException as error:  # the same one in every process
            reasons = [f"process {rank}: {failure[0]}" for rank, failure in error.failures.items()]
            raise InputError(f"cannot write {folder}: {'; '.join(reasons)}") from None


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole ones or shards, from a folder that was verified; other numbers of shards are fine.

    Raises:
        InputError: if one of them is missing or has another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads alone
        try:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
        except (CheckpointException, RuntimeError, ValueError) as error:
            text = str(error).strip().splitlines()[-1]
            raise InputError(f"{folder}: the optimiser's state does not fit the model: {text}") from None
