"""One training step: batches, loss, backward, clip, update.

The result of a step depends only on (seed, data, step number) and on the state in a checkpoint: weights,
optimisers, random generators (for dropout) and `Progress`. On a GPU, two equal runs agree only up to
rounding, because the sums in attention's gradient have no fixed order. This module reads and writes no file.

The metrics of a step stay on the device in `pending_metrics` until the loop reads them. The device also
decides whether loss and gradient are finite. So on CUDA the CPU never waits, and prepares the next batches
while the GPU computes. A batch has only some 100 KB: copying it from pinned memory is fast enough, and a
second CUDA stream for copies did not help.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minigpt.data.batches import Batch
from minigpt.devices import move, random_state, set_random_state
from minigpt.errors import InputError
from minigpt.training.activation_checkpointing import checkpoint_activations
from minigpt.training.config import TrainConfig
from minigpt.training.distributed import Processes
from minigpt.training.loss import Objective
from minigpt.training.mixed_precision import MixedPrecision
from minigpt.training.optimizer import make_optimizers, schedule
from minigpt.training.parallel import Parallel, full_tensor
from minigpt.training.rewards import RewardError
from minigpt.training.run_data import AnyData
from minigpt.training.run_state import BatchSize, Progress, StepMetrics
from minigpt.training.stop_request import StopNow, StopRequest

__all__ = ["PendingMetrics", "StepBatches", "TrainStep"]


class StepBatches(NamedTuple):
    """All batches of one step."""

    step: int  # step number, from 0
    # This process's part of the batches (see Parallel.shard_batches). Each entry has the tensors of one batch
    # that the loss needs. Their copy to the device may still be running.
    mine: list[tuple[Tensor | None, ...]]
    sizes: list[BatchSize]  # size of each batch, counted over the rows of all processes


class PendingMetrics(NamedTuple):
    """The metrics of one step. The tensors are still on the device."""

    step: int  # step number, from 1
    learning_rate: float
    sizes: list[BatchSize]
    measured: Tensor  # (3,): loss, gradient norm, loss scale
    sums: list[float]  # further sums that the loss reports (`step_sums`), added over all processes
    found_inf: Tensor  # (): 1.0 if loss or gradient is not finite (the step was skipped), else 0.0


class TrainStep:
    """Does one training step per call. Holds the model with its loss, the data and the optimisers.

    Args:
        config: options of the run; `precision` must be resolved (not "auto").
        loss: the model with its loss. Parameters that require gradients are trained.
        data: training data. The batches of a step depend only on the step's number.
        device: device of the model.
        processes: the processes that train together.

    If the option logging_steps is 0, metrics are written every ten steps, and more often in a short run.
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
        steps *= loss.num_iterations
        self.total_steps = config.max_steps or max(1, steps)
        self.logging_steps = config.logging_steps or max(1, min(10, self.total_steps // 100))
        with processes.shared_errors():
            self.precision = MixedPrecision(config.precision, device)
        if config.gradient_checkpointing:
            checkpoint_activations(self.model.blocks, config.dropout > 0, self.precision.autocast)
        self.parallel = Parallel(config, loss, device, processes)
        self.optimizers = make_optimizers(self.model, config)
        self.stop_request = StopRequest(processes)
        self.progress = Progress()
        self.pending_metrics: list[PendingMetrics] = []
        self.asynchronous = device.type == "cuda"  # True: the CPU waits for the GPU only if it reads a tensor
        self._next: StepBatches | None = None

    def __call__(self) -> None:
        """Do one step. If loss or gradient is not finite, weights and optimisers do not change.

        Raises:
            StopNow: if a stop signal comes while the gradient is computed. The state is then as before the
                step.
        """
        step = self.progress.steps_done
        batches = self._next if self._next is not None and self._next.step == step else self.prepare(step)
        before = random_state(self.device)
        sums: list[float] = []
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
        if self.loss.step_sums_names:
            sums = self.processes.all_reduce(self.loss.step_sums().tolist())
        self.pending_metrics.append(PendingMetrics(step + 1, rate, batches.sizes, measured, sums, found_inf))
        is_last = step + 1 == self.total_steps
        # batches of the next step, prepared while the GPU computes the current step
        self._next = None if is_last else self.prepare(step + 1)

    def batches(self, step: int) -> list[Batch]:
        """Build the batches of a step (counted from 0) for all processes, on the CPU."""
        per_step, step = self.config.gradient_accumulation_steps, step // self.loss.num_iterations
        pad_to = self.config.max_length if self.config.pad_to_max_length else 0
        numbers = range(step * per_step, (step + 1) * per_step)
        return [self.data.train.batch(self.plan.rows(number), pad_to) for number in numbers]

    def positions(self, steps: Iterable[int]) -> list[int]:
        """Return where the rows of these steps stand in the training data.

        Questions and answers: line numbers in the file. Plain text: the index of each row's first token.
        """
        return [position for s in steps for b in self.batches(s) for position in self.data.positions(b)]

    def prepare(self, step: int) -> StepBatches:
        """Build the batches of a step (counted from 0), and start to copy this process's part to the device.

        Every process builds all batches, so the processes need not send batches to each other.
        """
        batches = self.batches(step)
        mine = self.parallel.shard_batches(batches)
        if self.loss.is_sampled:
            try:
                with self.processes.shared_errors():
                    mine = self.loss.sample(step, mine)
            # A reward function failed, here or in another process. RewardError makes the loop save the run.
            except InputError as error:
                raise RewardError(str(error)) from None
            mine = self.loss.sampled_together(self.processes.all_reduce)
            totals = [self.processes.all_reduce(self._size(batch)) for batch in mine]
            n = self.processes.size
            sizes = [BatchSize(int(tokens), int(counted), int(T) // n) for tokens, counted, T in totals]
        else:
            sizes = [self._size(batch) for batch in batches]
        return StepBatches(step, [self.to_device(batch) for batch in mine], sizes)

    def _size(self, batch: Batch) -> BatchSize:
        return BatchSize(int(batch.token_mask.sum()), self.loss.count(batch), batch.input_ids.shape[1])

    def forget_prepared(self) -> None:
        """Delete the prepared batches of the next step. To be called before other weights are loaded.

        Otherwise the next step could learn from answers that were sampled with the old weights.
        """
        self._next = None

    def to_device(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """Select the tensors of a batch that the loss needs, and start to copy them to the device."""
        return tuple(None if one is None else move(one, self.device) for one in self.loss.select(batch))

    def summed_loss(self, batch: tuple[Tensor | None, ...]) -> Tensor:
        """Compute the loss of a batch on the device, summed over the targets that count."""
        with self.precision.autocast():
            return self.parallel.loss(batch)

    def backward(self, batches: StepBatches) -> Tensor:
        """Compute the gradient of the step's mean loss, and clip it.

        Returns: (3,): a loss whose mean over all processes is the step's mean loss; the gradient norm before
        clipping; the loss scale.
        """
        self.model.train()
        counted = sum(size.counted for size in batches.sizes)
        # With mask_truncated_completions, sampled answers that were cut off do not count. If all answers were
        # cut off, `counted` is 0. The loss is divided by it below, so use 1 then.
        if self.loss.is_sampled:
            counted = max(1, counted)
        scale = None if self.precision.scale is None else self.precision.scale.value
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches.mine, 1):
            with self.parallel.accumulate(last=number == len(batches.mine)):
                # Dividing by `counted` gives the mean over all targets of the step: all have the same weight.
                # DDP and FSDP divide gradients by the number of processes, so multiply by it here.
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
        """Update the weights with `share` times the peak learning rates, unless `found_inf` is 1.0."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak_lr"]
            # On CUDA, the optimiser itself looks at found_inf on the device, so the CPU does not wait.
            optimizer.found_inf = found_inf if self.asynchronous else None  # type: ignore[attr-defined]
            if self.asynchronous or not found_inf:
                optimizer.step()
        if self.precision.scale is not None:
            self.precision.scale.update(found_inf)
        self.model.zero_grad()

    def read_metrics(self) -> list[StepMetrics]:
        """Wait for the device, record all pending steps in `progress`, and return their metrics."""
        pending, self.pending_metrics = self.pending_metrics, []
        if not pending:
            return []
        scale, record = self.precision.scale, self.progress.record
        numbers = torch.stack([each.measured for each in pending]).tolist()
        if scale is not None:
            self.progress.loss_scale = scale.state()
        return [
            record(
                *(each.step, each.learning_rate, sum(s.tokens for s in each.sizes), row, scale is not None),
                each.sums,
            )
            for each, row in zip(pending, numbers)
        ]
