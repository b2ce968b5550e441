"""One training step: batches, loss, backward, clip, update.

What a step does is a function of (seed, data, step) and of the state in a checkpoint: weights, optimisers,
random generators (dropout) and `Progress`. On a GPU, where sums in attention's gradient have no fixed order,
two runs agree to rounding, not to the bit. Nothing here touches a disk.

The metrics of a step stay on the device, as `pending_metrics`, until the loop reads them. Whether loss and
gradient are finite is decided on the device, too, so that on CUDA the CPU never waits: it prepares the next
batches meanwhile. Pinned memory suffices for that: a batch has some 100 KB, a second stream gains nothing.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minigpt.data.batches import Batch
from minigpt.devices import move, random_state, set_random_state
from minigpt.training.activation_checkpointing import checkpoint_activations
from minigpt.training.config import TrainConfig
from minigpt.training.distributed import Processes
from minigpt.training.loss import Objective
from minigpt.training.mixed_precision import MixedPrecision
from minigpt.training.optimizer import make_optimizers, schedule
from minigpt.training.parallel import Parallel, full_tensor
from minigpt.training.run_data import AnyData
from minigpt.training.run_state import BatchSize, Progress, StepMetrics
from minigpt.training.stop_request import StopNow, StopRequest

__all__ = ["PendingMetrics", "StepBatches", "TrainStep"]


class StepBatches(NamedTuple):
    """The batches of a step."""

    step: int  # from 0
    mine: list[tuple[Tensor | None, ...]]  # of this process, on their way to the device
    sizes: list[BatchSize]  # of all processes


class PendingMetrics(NamedTuple):
    """The metrics of a step, some of them still on the device."""

    step: int  # from 1
    learning_rate: float
    sizes: list[BatchSize]
    measured: Tensor  # (3,): loss, length of the gradient, the loss's scale
    found_inf: Tensor  # (): 1.0 if one of them is not finite, and the step was skipped; else 0.0


class TrainStep:
    """A model with its loss, data and optimisers; a call does one step.

    Args:
        config: of the run; `precision` is no longer "auto".
        loss: the model with its loss; the parameters that require gradients are trained.
        data: what to learn from. The batches of a step are a pure function of its number.
        device: where the model is.
        processes: all of them.
    """

    def __init__(
        self,
        config: TrainConfig,
        loss: Objective,
        data: AnyData,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config, self.loss, self.model, self.data = config, loss, loss.model, data
        self.device, self.processes = device, processes
        self.plan = data.plan(config)
        steps = math.ceil(config.num_train_epochs * len(self.plan) / config.gradient_accumulation_steps)
        self.total_steps = config.max_steps or max(1, steps)
        with processes.shared_errors():
            self.precision = MixedPrecision(config.precision, device)
        if config.gradient_checkpointing:
            checkpoint_activations(self.model.blocks, config.dropout > 0, self.precision.autocast)
        self.parallel = Parallel(config, loss, device, processes)
        self.optimizers = make_optimizers(self.model, config)
        self.stop_request = StopRequest(processes)
        self.progress = Progress()
        self.pending_metrics: list[PendingMetrics] = []
        self.asynchronous = device.type == "cuda"  # reading a tensor makes the CPU wait
        self._next: StepBatches | None = None

    def __call__(self) -> None:
        """One step. If loss or gradient is not finite, weights and optimisers stay as they are.

        Raises:
            StopNow: when a signal comes while the gradient is computed; all is then as before the step.
        """
        step = self.progress.steps_done
        batches = self._next if self._next is not None and self._next.step == step else self.prepare(step)
        before = random_state(self.device)
        try:
            with self.stop_request.interruptible():
                measured = self.backward(batches)
        except StopNow:
            self.model.zero_grad()
            set_random_state(self.device, before)
            raise
        if self.processes.size > 1:
            measured = measured.double()
            dist.all_reduce(measured[:1])
            measured[:1] /= self.processes.size
            self.stop_request.agree(self.processes)
        found_inf = 1 - torch.isfinite(measured[:2]).all().float()
        share = schedule(self.config, step, self.total_steps)
        self.update(share, found_inf)
        self.progress.steps_done += 1
        self.progress.evaluated = False
        rate = share * self.config.learning_rate
        self.pending_metrics.append(PendingMetrics(step + 1, rate, batches.sizes, measured, found_inf))
        is_last = step + 1 == self.total_steps
        self._next = None if is_last else self.prepare(step + 1)  # a GPU computes meanwhile

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step (from 0), on the CPU: those of all processes."""
        per_step = self.config.gradient_accumulation_steps
        pad_to = self.config.max_length if self.config.pad_to_max_length else 0
        numbers = range(step * per_step, (step + 1) * per_step)
        return [self.data.train.batch(self.plan.rows(number), pad_to) for number in numbers]

    def positions(self, steps: Iterable[int]) -> list[int]:
        """The positions of some steps' batches in the training data; `data.unit` says what they are."""
        return [position for s in steps for b in self.batches(s) for position in self.data.positions(b)]

    def prepare(self, step: int) -> StepBatches:
        """The batches of a step, counted from 0. Every process makes all of them, so no message is needed."""
        batches = self.batches(step)
        mine = [self.to_device(batch) for batch in self.parallel.shard_batches(batches)]
        sizes = [
            BatchSize(int(batch.token_mask.sum()), self.loss.count(batch), batch.input_ids.shape[1])
            for batch in batches
        ]
        return StepBatches(step, mine, sizes)

    def to_device(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """The tensors of a batch that the loss needs, on their way to the device."""
        return tuple(None if one is None else move(one, self.device) for one in self.loss.select(batch))

    def summed_loss(self, batch: tuple[Tensor | None, ...]) -> Tensor:
        """The loss of a batch on the device, summed over the targets that count."""
        with self.precision.autocast():
            return self.parallel.loss(batch)

    def backward(self, batches: StepBatches) -> Tensor:
        """The gradient of the mean loss, clipped.

        Returns: (3,): this process's part of the loss, length of the gradient before clipping, loss scale.
        """
        self.model.train()
        counted = sum(size.counted for size in batches.sizes)
        scale = None if self.precision.scale is None else self.precision.scale.value
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches.mine, 1):
            with self.parallel.accumulate(last=number == len(batches.mine)):
                # the mean over the whole step, not of means; DDP and FSDP divide the processes' sum by `size`
                loss = self.summed_loss(batch) * self.processes.size / counted
                (loss if scale is None else loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if scale is not None:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / scale)
        limit = self.config.max_grad_norm or math.inf
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        return torch.stack([total, norm, torch.ones_like(total) if scale is None else scale])

    def update(self, share: float, found_inf: Tensor) -> None:
        """Update the weights at a share of the highest learning rates, unless `found_inf` is 1.0."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak_lr"]
            # with it, an optimiser looks at it on the device
            optimizer.found_inf = found_inf if self.asynchronous else None  # type: ignore[attr-defined]
            if self.asynchronous or not found_inf:
                optimizer.step()
        if self.precision.scale is not None:
            self.precision.scale.update(found_inf)
        self.model.zero_grad()

    def read_metrics(self) -> list[StepMetrics]:
        """Wait for the device, and record in `progress` what became of the steps since the last reading."""
        pending, self.pending_metrics = self.pending_metrics, []
        if not pending:
            return []
        scale, record = self.precision.scale, self.progress.record
        numbers = torch.stack([each.measured for each in pending]).tolist()
        if scale is not None:
            self.progress.loss_scale = scale.state()
        return [
            record(each.step, each.learning_rate, sum(s.tokens for s in each.sizes), row, scale is not None)
            for each, row in zip(pending, numbers)
        ]
