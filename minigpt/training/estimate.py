"""Before a run: the model's parts, the memory that training will take, and how long, on this machine.

Time is measured on a piece of a real batch and scaled by arithmetic; memory is counted, not measured.
Nothing is trained: gradients are thrown away, weights and random states are as they were.
"""

import copy
import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.console.terminal import seconds, table
from minigpt.devices import random_state, set_random_state
from minigpt.families.registry import LanguageModel, parameter_table
from minigpt.training.flops import model_flops
from minigpt.training.loop import Trainer
from minigpt.training.optimizer import make_optimizers

__all__ = [
    "HELD",
    "TORCH_ITSELF",
    "Estimate",
    "batch_flops",
    "busy",
    "estimate",
    "memory_needed",
    "print_parameters",
]

TORCH_ITSELF = 350 * 2**20  # what a process holds that has imported all that training needs, bytes
# What a process holds for each byte that is counted. Activations, gradients and moments are freed and taken
# in another order each time, and the C library keeps the gaps: measured by benchmarks/memory.py on Linux, not
# derived. torch's allocators for GPUs have gaps of their own sort.
HELD = 1.4


def print_parameters(trainer: Trainer) -> None:
    """Print the model's parts with their parameter counts, and check the sum against the closed formula."""
    model = trainer.model
    if trainer.config.starts_from is not None:
        _print_trained(model)
        return
    parts = parameter_table(model)
    total = sum(count for _, count in parts)
    rows = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in parts]
    table("model", ("part", "parameters", "share"), [*rows, ("sum", f"{total:,}", "")], numeric=(1, 2))
    expected = model.config.parameter_count()
    if total != expected:
        raise AssertionError(f"the parts hold {total} parameters, the formula says {expected}")
    print(f"the closed formula gives {expected:,}: equal")


def _print_trained(model: LanguageModel) -> None:
    """Print the parts of a model that begins with weights: what is trained of each, and what is frozen."""
    trained, total = parameter_table(model, only_trained=True), dict(parameter_table(model))
    counts = dict(trained)
    rows = [
        (part, f"{counts.get(part, 0):,}", f"{count - counts.get(part, 0):,}")
        for part, count in total.items()
    ]
    sums = ("sum", f"{sum(counts.values()):,}", f"{sum(total.values()) - sum(counts.values()):,}")
    table("model", ("part", "trained", "frozen"), [*rows, sums], numeric=(1, 2))


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a run, or of the rest of one."""

    steps: int
    tokens_per_step: float  # padding included
    flops_per_step: float
    flops_per_second: float  # measured
    step_seconds: float
    evaluation_seconds: float
    seconds: float  # training and evaluation
    memory_bytes: int  # weights, gradients, AdamW's two moments, activations, gaps, torch itself

    def sentence(self) -> str:
        """The estimate in one line; a second one where the machine is busy."""
        sentence = (
            f"{self.steps:,} steps of about {self.tokens_per_step:,.0f} tokens; this machine does "
            f"{self.flops_per_second / 1e9:,.0f} GFLOP/s on them: about {seconds(self.seconds)}, "
            f"{self.memory_bytes / 2**20:,.0f} MiB of memory"
        )
        return "\n".join(filter(None, (sentence, busy())))


def estimate(trainer: Trainer) -> Estimate:
    """Measure a piece of the first batch (about a second) and work out the rest."""
    plan, config = trainer.step.plan, trainer.config
    pad_to = config.max_length if config.pad_to_max_length else 0
    shapes = trainer.data.shapes(plan, pad_to)
    tokens = sum(rows * (width - 1) for rows, width in shapes) / len(shapes)
    answer_share = trainer.data.train.answer_share if config.loss_on == "answer" else 1.0
    flops = sum(batch_flops(trainer, r, w - 1, answer_share) for r, w in shapes) / len(shapes)
    per_step = config.gradient_accumulation_steps
    speed = _measure(trainer, answer_share)
    steps = trainer.step.total_steps - trainer.progress.steps_done
    evaluations = (
        -(-trainer.step.total_steps // trainer.eval_steps) - trainer.progress.steps_done // trainer.eval_steps
    )
    val = trainer.data.val
    val_flops = batch_flops(trainer, val.rows, val.mean_targets, 1.0) / 3  # forward only
    step_seconds = flops * per_step / speed + _optimizer_seconds(trainer)
    evaluation_seconds = val_flops / speed
    return Estimate(
        steps=steps,
        tokens_per_step=tokens * per_step,
        flops_per_step=flops * per_step,
        flops_per_second=speed,
        step_seconds=step_seconds,
        evaluation_seconds=evaluation_seconds,
        seconds=steps * step_seconds + evaluations * evaluation_seconds,
        memory_bytes=memory_needed(trainer),
    )


def busy() -> str:
    """A sentence that belongs to an estimate of time where more programs compute than there are cores."""
    if not hasattr(os, "getloadavg"):  # Windows
        return ""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load <= cores:
        return ""
    return f"the machine is busy (load average {load:.1f}, {cores} cores): the time holds while it is"


def batch_flops(trainer: Trainer, rows: float, T: float, counted: float) -> float:
    """Forward and backward of rows of T tokens; `counted`: the share of tokens that the loss counts."""
    return model_flops(trainer.model, rows * T, rows * T * counted, T)


def _measure(trainer: Trainer, answer_share: float) -> float:
    """FLOP/s of forward and backward on at most about a hundred GFLOP of the first batch, never compiled."""
    config = trainer.config
    rows = trainer.step.plan.rows(0)
    pad_to = config.max_length if config.pad_to_max_length else 0
    B, T = trainer.data.train.batch(rows, pad_to).input_ids.shape
    keep = max(1, min(B, round(B * 1e11 / batch_flops(trainer, B, T, answer_share))))
    piece = trainer.data.train.batch(rows[:keep], pad_to)
    T = piece.input_ids.shape[1]
    before = random_state(trainer.device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):
            trainer.step.summed_loss(trainer.step.to_device(piece)).backward()  # type: ignore[no-untyped-call]
        if trainer.device.type != "cpu":
            torch.accelerator.synchronize(trainer.device)
        best = min(best, time.perf_counter() - start)
    trainer.model.zero_grad()
    set_random_state(trainer.device, before)
    return batch_flops(trainer, keep, T, answer_share) / best


def _optimizer_seconds(trainer: Trainer) -> float:
    """What updating the weights takes, measured on a copy: nothing of it depends on the batch."""
    model = copy.deepcopy(trainer.model)
    optimizers = make_optimizers(model, trainer.config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):  # the first time allocates
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        if trainer.device.type != "cpu":
            torch.accelerator.synchronize(trainer.device)
    return time.perf_counter() - start


def memory_needed(trainer: Trainer) -> int:
    """Weights, gradients and AdamW's two moments, what the backward pass keeps of a batch; torch itself.

    Muon keeps one moment instead of two, and takes as much while it orthogonalises.
    """
    pad_to = trainer.config.max_length if trainer.config.pad_to_max_length else 0
    answer_share = trainer.data.train.answer_share if trainer.config.loss_on == "answer" else 1.0
    rows, longest = max(trainer.data.shapes(trainer.step.plan, pad_to), key=lambda shape: shape[0] * shape[1])
    T = longest - 1
    config, width = trainer.model.config, trainer.model.lm_head.in_features
    row = torch.zeros((1, T), dtype=torch.int64, device=trainer.device)
    before = random_state(trainer.device)
    # a third row: what does not grow with the batch (weights, and autocast's copies of them) drops out; not a
    # second one, because of one row alone no part has to be copied to be reshaped
    per_row = _kept_bytes(trainer, row.repeat(3, 1)) - _kept_bytes(trainer, row.repeat(2, 1))
    set_random_state(trainer.device, before)
    # at each counted position: its hidden vector and that one's gradient; the logits, their log-softmax, and
    # its gradient
    head = 4 * (2 * width + 3 * config.vocab_size) * answer_share * rows * T
    # weights, gradients, moments; what autocast makes of the weights lives until the gradient is there
    per_weight = 4 if trainer.config.precision == "float32" else 6
    weights = sum(
        p.numel() * (per_weight + (12 if p.requires_grad else 0)) for p in trainer.model.parameters()
    )
    counted = weights + per_row * rows + head
    return int(counted * (HELD if trainer.device.type == "cpu" else 1.0)) + TORCH_ITSELF


def _kept_bytes(trainer: Trainer, ids: Tensor) -> int:
    """What autograd keeps of the blocks' forward pass until the backward pass, each storage once.

    With gradient_checkpointing that is the blocks' inputs, which torch keeps elsewhere.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = trainer.model.training
    trainer.model.train()  # dropout's masks are kept, too
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        trainer.step.precision.autocast(),
    ):
        hidden = trainer.model.base_model(ids)  # alive until all is counted: no address is used twice
    trainer.model.train(was_training)
    inputs = trainer.model.config.num_hidden_layers * hidden.nbytes
    del hidden
    return sum(kept.values()) + (inputs if trainer.config.gradient_checkpointing else 0)
