"""Several processes train one model: DDP (each has the whole model) or FSDP2 (each has a shard).

DDP (https://arxiv.org/abs/2006.15704) sums gradients over processes while the backward pass is running. FSDP2
(torch's `fully_shard`, after https://arxiv.org/abs/2304.11277) keeps 1/N of weights, gradients and optimiser
state in each process. It gathers the weights of a block from all processes when the block computes. FSDP2 is
for models that do not fit into one device.

A single process uses the model directly. The number of processes changes the result only by the rounding of
sums and by the random numbers of dropout. The larger parts of torch.distributed are imported where they are
used, so that a single process does not load them.
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
    """Return this process's rows of a batch: with N processes, every N-th row.

    The rows of a batch are sorted by length, so all processes have similar work. A process for which no row
    is left gets a row that adds nothing to the loss, because it must still take part in the exchange of
    gradients.
    """
    if processes.size == 1:
        return batch
    if processes.rank < len(batch.rows):
        return batch.some(slice(processes.rank, None, processes.size))
    return batch.blank()


class Parallel:
    """A model with its loss, in one of N processes.

    Args:
        config: options of the run. `parallel` chooses DDP or FSDP for N > 1. `compile` compiles the loss and
            its gradient. Evaluation, generation and checkpoints use the model that is not compiled.
        loss: a module around the model, with the same weights in each process. FSDP shards it in place.
        device: device of the model.
        processes: the processes that train together.

    Raises:
        InputError: if `compile` is on and a compiler is missing.
    """

    def __init__(
        self, config: TrainConfig, loss: Objective, device: torch.device, processes: Processes
    ) -> None:
        self._model, self._processes, self._device = loss.model, processes, device
        self._objective = loss
        self.is_sharded = processes.size > 1 and config.parallel == "fsdp"
        self._loss: nn.Module = loss
        self._compiled: Any = None
        # a dry run (--dry_run) computes so little that compiling would take longer
        compiled = config.compile and not config.dry_run
        if compiled:
            with processes.shared_errors():
                _require_compiler(config, device)
        if self.is_sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (processes.size,))
            for block in self._model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self._loss, mesh=mesh)  # shards the rest: embeddings, last norm and lm_head
        elif processes.size > 1:
            devices = [device] if device.type == "cuda" else None
            # Buffers need no broadcast, because the only buffers are quantised weights, which do not change.
            self._loss = DistributedDataParallel(loss, device_ids=devices, broadcast_buffers=False)
            self._fix_message_order(loss.example(device))
        if compiled:
            # Switch off DDP's own mode for torch.compile: it cuts the graph at each all-reduce of gradients,
            # and does not support activation checkpointing. The price: without this mode, the all-reduces
            # start only after the last gradient is computed.
            torch._dynamo.config.optimize_ddp = False
            self._compiled = torch.compile(self._loss)

    def _fix_message_order(self, example: tuple[Tensor | None, ...]) -> None:
        """Do one backward pass and throw its gradient away, so that DDP fixes its order of all-reduces now.

        After the first backward pass of a process, DDP changes the order in which it adds gradients over
        processes. This changes how sums are rounded. If the first pass were a training step, a resumed run
        would change the order at another step than an uninterrupted run, and the bits would differ.
        """
        was_training = self._loss.training
        self._loss.eval()  # eval mode switches dropout off, so no random number is drawn
        self._loss(*example).backward()
        self._loss.train(was_training)
        self._model.zero_grad()

    def shard_batches(self, batches: list[Batch]) -> list[Batch]:
        """Return this process's part of the batches of a step, for N processes.

        If the number of batches is a multiple of N, the part is every N-th batch. Otherwise it is every N-th
        row of each batch.
        """
        rank, size = self._processes.rank, self._processes.size
        if len(batches) % size == 0:
            return batches[rank::size]
        return [shard_batch(batch, self._processes) for batch in batches]

    def loss(self, batch: tuple[Tensor | None, ...]) -> Tensor:
        """Compute the summed loss of a batch that is on the model's device."""
        if self._compiled is None:
            result: Tensor = self._loss(*batch)
            return result
        # batch[-1] holds the positions that the loss counts. It is None if the loss counts all positions.
        if batch[-1] is not None:
            # Batches of conversations differ in length. Their sizes are marked as dynamic, so that one
            # compiled graph is enough. Batches of plain text (None) all have the same shape, so their sizes
            # stay static, which is faster.
            for tensor in batch:
                for dim in range(tensor.dim() if tensor is not None else 0):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        compiled: Tensor = self._compiled(*batch)
        return compiled

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context for one forward and backward pass of a step.

        last: True for the last pass of the step. Only then do the processes exchange gradients.
        """
        if self.is_sharded:
            self._loss.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        return nullcontext()

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[Batch], stop_request: StopRequest) -> Report:
        """Measure the model on batches. Each process computes its rows, and gets the sums over all processes.

        Raises:
            StopNow: if a signal comes during the evaluation.
        """
        with stop_request.interruptible():
            if self._processes.size == 1:
                return self._objective.evaluate(self._model, batches, self._device)
            model: Any = _Gathering(self._model, self._loss) if self.is_sharded else self._model
            try:
                mine = self._my_rows(batches, stop_request)
                return self._objective.evaluate(model, mine, self._device, self._add_reports)
            finally:
                if self.is_sharded:
                    # free the weights that FSDP has gathered for the evaluation
                    self._loss.reshard()  # type: ignore[operator]

    def _my_rows(self, batches: Iterable[Batch], stop_request: StopRequest) -> Iterator[Batch]:
        """Yield this process's rows of each batch. If any process gets a stop signal, all raise StopNow."""
        for number, batch in enumerate(batches):
            if number % 8 == 0:
                stop_request.agree(self._processes)
                if stop_request.agreed is not None:
                    raise StopNow
            yield shard_batch(batch, self._processes)

    def _add_reports(self, report: Report) -> None:
        """Replace the sums of this process by the sums over all processes."""
        report.set_sums(self._processes.all_reduce(report.sums()))

    # -- weights ---------------------------------------------------------------------------------------------

    def full_model(self) -> LanguageModel:
        """Return the whole model in process 0, to save it. With FSDP, every process must call this method."""
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
        """Load a checkpoint's weights. With FSDP, each process reads all weights and keeps its shard."""
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
    """Raise InputError if torch.compile cannot work here. torch's own message would have 100 lines."""
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
    """Wraps a sharded model, so that `evaluate_loss` can call it like a model.

    FSDP gathers the weights in the forward pass of the loss. `evaluate_loss` calls lm_head after this forward
    pass. That works, because lm_head belongs to FSDP's outermost part, which stays gathered until
    `reshard` is called.
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
        # Training uses the same tensors of gathered weights again, so they must not become inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            hidden: Tensor = self._loss(input_ids.clone())
            return hidden


def is_sharded(tensor: Tensor) -> bool:
    """Return True if the tensor is a DTensor of torch: this process holds only a part of it."""
    return hasattr(tensor, "to_local")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor in every process, gathered from the shards."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def shard_like(like: Tensor, full: Tensor) -> Tensor:
    """Shard a whole tensor in the same way as `like`. Every process must have the whole tensor."""
    if is_sharded(full):
        return full
    full = full.to(like.device)
    if not is_sharded(like):
        return full.clone()
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def local_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's part of each tensor."""
    return {
        name: t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]
        for name, t in tensors.items()
    }


# -- the optimiser's state in shards ------------------------------------------------------------------------


class ShardedSave:
    """Writes the optimiser's state as shards: each process writes its own shard into process 0's folder.

    torch.distributed.checkpoint writes the shards as safetensors files, because its own format needs pickle.
    That package overwrites files in place and stores no hashes. Here this does no harm: the folder is new,
    and process 0 writes the files' hashes into the folder's manifest.

    Process 0 calls this object with the folder, and then `end`. The other processes call `follow`. If the
    save fails before this object is called, process 0 calls only `end`, so that the others do not wait.
    """

    def __init__(self, processes: Processes, tensors: dict[str, Tensor]) -> None:
        self._processes, self._tensors, self._begun = processes, tensors, False

    def __call__(self, folder: Path) -> None:
        """In process 0: send the folder to the other processes, and write this process's shards."""
        self._begun = True
        self._write(self._processes.broadcast(str(folder)))

    def end(self) -> None:
        """In process 0: if the save failed before this object was called, tell the waiting processes."""
        if not self._begun:
            self._processes.broadcast("")

    def follow(self) -> None:
        """In the other processes: wait for process 0. If it sends a folder, write this process's shards.

        An error is not raised here, because process 0 raises it.
        """
        if folder := self._processes.broadcast(""):
            with contextlib.suppress(InputError):
                self._write(folder)

    def _write(self, folder: str) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            save(dict(self._tensors), storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
        except CheckpointException as error:  # every process raises the same error
            reasons = [f"process {rank}: {failure[0]}" for rank, failure in error.failures.items()]
            raise InputError(f"cannot write {folder}: {'; '.join(reasons)}") from None


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors (whole or sharded) from the shards in a folder.

    The number of processes may have changed since the save. The caller must have checked the manifest.

    Raises:
        InputError: if a tensor is missing or has another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        # torch prints this warning if a single process reads shards, which is allowed
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
        except (CheckpointException, RuntimeError, ValueError) as error:
            text = str(error).strip().splitlines()[-1]
            raise InputError(f"{folder}: the optimiser's state does not fit the model: {text}") from None
