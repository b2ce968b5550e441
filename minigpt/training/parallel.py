"""How several processes share the work on one model: DDP, where each has all of it, or FSDP2, a piece each.

DDP (https://arxiv.org/abs/2006.15704) adds up gradients while the backward pass is still running. FSDP2
(torch's `fully_shard`, after https://arxiv.org/abs/2304.11277) keeps 1/N of weights, gradients and optimiser
state in each process and gathers a block's weights when it is their turn: for models that do not fit.

With one process the model is used as it is. What is computed does not depend on the number of processes, but
for the rounding of sums, and the numbers that dropout draws. torch.distributed's larger parts are imported
where they are used: one process pays nothing.
"""

import contextlib
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minigpt.data.batches import Batch
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.training.chunked_loss import summed_cross_entropy
from minigpt.training.distributed import World
from minigpt.training.mixed_precision import Counted, Machine
from minigpt.weights.pretrained import load_weights

__all__ = [
    "Parallel",
    "ShardedSave",
    "SummedLoss",
    "cut_like",
    "is_piece",
    "local_tensors",
    "read_shards",
    "share",
    "whole_tensor",
]


class SummedLoss(nn.Module):
    """A model with its loss on top: what is wrapped, since DDP and FSDP work in `forward`."""

    def __init__(self, model: LanguageModel, machine: Machine) -> None:
        super().__init__()
        self.model = model
        self._logits, self._multiple = machine.logits, machine.vocabulary_multiple

    def forward(self, input_ids: Tensor, goals: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Summed cross-entropy of the targets `goals` (P,); without them the hidden vectors (B, T, C).

        lm_head, the largest product of a small model, is computed at their places (P,) only: see `Counted`.
        """
        hidden: Tensor = self.model.base_model(input_ids)  # (B, T, C)
        if goals is None:
            return hidden
        hidden = hidden.flatten(0, 1)  # (B * T, C)
        if places is not None:
            hidden = hidden.index_select(0, places)  # (P, C)
        return summed_cross_entropy(self.model.lm_head, hidden, goals, self._logits, self._multiple)


def share(batch: Batch, world: World) -> Batch:
    """This process's rows of a batch: every N-th. One that gets none has a row in which nothing counts.

    The batch's rows are sorted by length, so that every process gets as much to do. All must take part: in
    the sums of gradients, and in gathering weights.
    """
    if world.size == 1:
        return batch
    if world.rank < len(batch.rows):
        mine = slice(world.rank, None, world.size)
        ids, targets, tokens, answers, rows = batch
        return Batch(ids[mine], targets[mine], tokens[mine], answers[mine], rows[mine])
    nothing = torch.zeros_like(batch.token_mask[:1])
    return Batch(batch.input_ids[:1], batch.targets[:1], nothing, nothing, batch.rows[:0])


class Parallel:
    """A model in one of N processes.

    Args:
        model: with the same weights in each process; FSDP cuts it up in place.
        kind: what N > 1 processes do; not looked at otherwise.
        compiled: let torch.compile write kernels for the loss and its gradient. Evaluations and answers,
            whose shapes are all different, use the model as it is; so do checkpoints, with its names.
    """

    def __init__(
        self,
        model: LanguageModel,
        world: World,
        kind: Literal["ddp", "fsdp"],
        machine: Machine,
        compiled: bool = False,
    ) -> None:
        self._model, self._world, device = model, world, machine.device
        self.is_sharded = world.size > 1 and kind == "fsdp"
        self._loss: nn.Module = SummedLoss(model, machine)
        self._compiled: Any = None
        if self.is_sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (world.size,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self._loss, mesh=mesh)  # embeddings, the last norm, lm_head
        elif world.size > 1:
            self._loss = DistributedDataParallel(
                self._loss,
                device_ids=[device] if device.type == "cuda" else None,
            )
            self._settle_messages(device)
        if compiled:
            # DDP's own way of compiling cuts the graph where its messages begin, and takes no parts that are
            # computed twice. Without it the messages wait for the last gradient.
            torch._dynamo.config.optimize_ddp = False
            self._compiled = torch.compile(self._loss)

    def _settle_messages(self, device: torch.device) -> None:
        """A backward pass for nothing.

        After the first one DDP orders its messages anew, and with them the order of sums. A run that was
        resumed has its first one elsewhere than a run that was not; so the first one never counts.
        """
        nothing = torch.zeros((1, 1), dtype=torch.int64, device=device)
        was_training = self._loss.training
        self._loss.eval()  # no dropout: no random numbers
        self._loss(nothing, nothing[0]).backward()
        self._loss.train(was_training)
        self._model.zero_grad()

    def share(self, batches: list[Batch]) -> list[Batch]:
        """This process's part of a step: whole batches where N divides their number, else rows of each."""
        rank, size = self._world.rank, self._world.size
        if len(batches) % size == 0:
            return batches[rank::size]
        return [share(batch, self._world) for batch in batches]

    def loss(self, batch: Counted) -> Tensor:
        """`SummedLoss` of a batch on the model's device."""
        if self._compiled is None:
            result: Tensor = self._loss(*batch)
            return result
        if batch.places is not None:
            # Lengths vary from batch to batch: one graph for all of them, instead of one each. (Windows are
            # all alike, and kernels for a known size are faster: nothing is said about them.)
            for tensor in batch:
                for dim in range(tensor.dim() if tensor is not None else 0):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        compiled: Tensor = self._compiled(*batch)
        return compiled

    def synchronizing(self, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass: only the last one of a step adds up what all have."""
        if self.is_sharded:
            self._loss.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        return nullcontext()

    @property
    def measured(self) -> Any:
        """What `evaluate_loss` is to measure."""
        return _Gathering(self._model, self._loss) if self.is_sharded else self._model

    def rest(self) -> None:
        """After an evaluation: give the memory of gathered weights back."""
        if self.is_sharded:
            self._loss.reshard()  # type: ignore[operator]

    def whole(self) -> LanguageModel:
        """The model for process 0 to save. Every process must ask for it; the others get nothing of use."""
        if not self.is_sharded:
            return self._model
        weights = {}
        for name, parameter in self._model.named_parameters():
            full = whole_tensor(parameter.detach())
            weights[name] = full.cpu() if self._world.is_main else torch.empty(0)
        if not self._world.is_main:
            return self._model
        family = family_of(self._model.config)
        copy: LanguageModel = family.on_meta(self._model.config)
        family.load_state(copy, weights, assign=True)
        return copy

    def load(self, folder: Path) -> None:
        """A checkpoint's weights; each process reads all of them and keeps its part."""
        if not self.is_sharded:
            load_weights(self._model, folder)
            return
        family = family_of(self._model.config)
        whole: LanguageModel = family.on_meta(self._model.config)
        shapes = {name: p.shape for name, p in self._model.named_parameters()}
        family.load_state(whole, {name: torch.empty(shape) for name, shape in shapes.items()}, assign=True)
        load_weights(whole, folder)
        weights = dict(whole.named_parameters())
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(cut_like(parameter, weights[name].detach()))


class _Gathering:
    """A model in pieces, for `evaluate_loss`: hidden vectors through FSDP, which gathers weights on the way.

    lm_head is used outside; the outermost piece, which holds it, stays gathered until `Parallel.rest`.
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


def is_piece(tensor: Tensor) -> bool:
    """Whether the rest of it lies in other processes: torch's DTensor."""
    return hasattr(tensor, "to_local")


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of it, put together in every process."""
    if not is_piece(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def cut_like(like: Tensor, full: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut and placed as another one is."""
    if is_piece(full):
        return full
    full = full.to(like.device)
    if not is_piece(like):
        return full.clone()
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def local_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of them lies in this process."""
    return {
        name: t.to_local() if is_piece(t) else t  # type: ignore[attr-defined]
        for name, t in tensors.items()
    }


# -- the optimiser's state in pieces ------------------------------------------------------------------------


class ShardedSave:
    """Each process writes its pieces into the folder that process 0 is filling.

    torch.distributed.checkpoint does it, in safetensors files: its own format would need pickle. It replaces
    files in place and knows no hashes; here the folder is new, and process 0 lists all files in its manifest.

    Process 0 calls it with the folder, or `end` if it has not come to that; the others `follow`.
    """

    def __init__(self, world: World, tensors: dict[str, Tensor]) -> None:
        self._world, self._tensors, self._told = world, tensors, False

    def __call__(self, folder: Path) -> None:
        """In process 0: write this process's pieces while the others write theirs."""
        self._told = True
        self._write(self._world.told(str(folder)))

    def end(self) -> None:
        """The save has failed before the pieces' turn: let the others go."""
        if not self._told:
            self._world.told("")

    def follow(self) -> None:
        """Wait for the folder and write this process's pieces; a failure is process 0's to tell."""
        if folder := self._world.told():
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
    """Fill tensors, whole ones or pieces, from a folder that was verified; other numbers of pieces are fine.

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
