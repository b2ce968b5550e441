"""Prints before a run the parts of the model, and estimates memory and time of training on this machine.

The time of a piece of a real batch is measured and scaled by FLOPs. The memory is computed, not measured.
The model is not trained: gradients are thrown away; weights and random states do not change.
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

TORCH_ITSELF = 350 * 2**20  # bytes of a process after the imports for training, before any tensor exists
# Memory of the process per computed byte, on a CPU. Activations, gradients and moments are freed and taken
# in changing order, which leaves gaps in the C library's heap. The factor was measured on Linux with
# benchmarks/memory.py. It does not apply to GPUs, which have other allocators.
HELD = 1.4


def print_parameters(trainer: Trainer) -> None:
    """Print the parameter count of each part of the model, and check the sum against the closed formula."""
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
    """Print the parts of a model from given weights: how much of each part is trained, how much is frozen."""
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
    """The expected cost of a run, or of the rest of a resumed run."""

    steps: int
    tokens_per_step: float  # number of tokens in a step, padding included
    flops_per_step: float
    flops_per_second: float  # measured speed of the model
    step_seconds: float
    evaluation_seconds: float
    seconds: float  # total time of training and evaluations, in seconds
    memory_bytes: int  # memory that the run needs; see `memory_needed`

    def sentence(self) -> str:
        """Return the estimate in one line, and a second one if the machine is busy."""
        sentence = (
            f"{self.steps:,} steps of about {self.tokens_per_step:,.0f} tokens; this machine does "
            f"{self.flops_per_second / 1e9:,.0f} GFLOP/s on them: about {seconds(self.seconds)}, "
            f"{self.memory_bytes / 2**20:,.0f} MiB of memory"
        )
        return "\n".join(filter(None, (sentence, busy())))


def estimate(trainer: Trainer) -> Estimate:
    """Estimate the cost of a run: measure a piece of the first batch (about a second), and scale it."""
    config = trainer.config
    pad_to = config.max_length if config.pad_to_max_length else 0
    shapes = _shapes(trainer, pad_to)
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
    # / 3, because an evaluation has no backward pass
    val_flops = batch_flops(trainer, val.rows, val.mean_targets, 1.0) / 3
    step_seconds = flops * per_step / speed + _optimizer_seconds(trainer) + _sampling_seconds(trainer)
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
    """Return a warning for an estimate of time if other programs keep the cores busy; "" otherwise."""
    if not hasattr(os, "getloadavg"):  # Windows has no getloadavg
        return ""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load <= cores:
        return ""
    return f"the machine is busy (load average {load:.1f}, {cores} cores): the time holds while it is"


def batch_flops(trainer: Trainer, rows: float, T: float, counted: float) -> float:
    """Return the training FLOPs of rows of T tokens. `counted`: share of the tokens that the loss counts."""
    return model_flops(trainer.model, rows * T, rows * T * counted, T)


def _shapes(trainer: Trainer, pad_to: int) -> list[tuple[int, int]]:
    """Return (rows, tokens per row) of each batch. Sampled answers are taken to be as long as the file's."""
    copies = trainer.step.loss.rows_of_one
    return [(copies * rows, width) for rows, width in trainer.data.shapes(trainer.step.plan, pad_to)]


def _sampling_seconds(trainer: Trainer) -> float:
    """Measure the time to sample the answers of a step. Training samples these answers again."""
    if not trainer.step.loss.is_sampled:
        return 0.0
    start = time.perf_counter()
    trainer.step.prepare(trainer.progress.steps_done)
    return (time.perf_counter() - start) / trainer.step.loss.num_iterations


def _measure(trainer: Trainer, answer_share: float) -> float:
    """Measure the FLOP/s of forward and backward in eager mode, on at most 100 GFLOP of the first batch."""
    config = trainer.config
    rows = trainer.step.plan.rows(0)
    pad_to = config.max_length if config.pad_to_max_length else 0
    B, T = trainer.data.train.batch(rows, pad_to).input_ids.shape
    keep = max(1, min(B, round(B * 1e11 / batch_flops(trainer, B, T, answer_share))))
    piece = trainer.data.train.batch(rows[:keep], pad_to)
    keep, T = piece.input_ids.shape
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
    """Measure the time of an update of the weights, on a copy of the model. Frozen weights are not copied."""
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    shared = {id(tensor): tensor for tensor in [*frozen, *trainer.model.buffers()]}
    model = copy.deepcopy(trainer.model, dict[int, object](shared))
    optimizers = make_optimizers(model, trainer.config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    for _ in range(2):  # twice, because the first update also allocates the optimiser's state
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        if trainer.device.type != "cpu":
            torch.accelerator.synchronize(trainer.device)
    return time.perf_counter() - start


def memory_needed(trainer: Trainer) -> int:
    """Compute the bytes that training needs: weights, gradients, moments, activations, torch itself.

    Muon counts as AdamW. It keeps one moment instead of two, but needs as much memory to orthogonalise.
    """
    pad_to = trainer.config.max_length if trainer.config.pad_to_max_length else 0
    answer_share = trainer.data.train.answer_share if trainer.config.loss_on == "answer" else 1.0
    rows, longest = max(_shapes(trainer, pad_to), key=lambda shape: shape[0] * shape[1])
    T = longest - 1
    config, width = trainer.model.config, trainer.model.config.hidden_size
    row = torch.zeros((1, T), dtype=torch.int64, device=trainer.device)
    before = random_state(trainer.device)
    # Bytes per row: the difference between three rows and two, in which weights and autocast's copies
    # cancel out. One row is not used, because torch reshapes a single row without a copy.
    per_row = _kept_bytes(trainer, row.repeat(3, 1)) - _kept_bytes(trainer, row.repeat(2, 1))
    set_random_state(trainer.device, before)
    # Per counted position: the hidden state and its gradient (width each); logits, log-softmax and its
    # gradient (vocab_size each). A float has 4 bytes.
    outputs = config.vocab_size if hasattr(trainer.model, "lm_head") else 0  # a classifier has few outputs
    head = 4 * (2 * width + 3 * outputs) * answer_share * rows * T
    # Bytes per weight: weight, gradient and two moments in float32, and autocast's copy in 16 bits.
    per_weight = 4 if trainer.config.precision == "float32" else 6
    weights = sum(
        p.numel() * (per_weight + (12 if p.requires_grad else 0)) for p in trainer.model.parameters()
    )
    weights += sum(buffer.nbytes for buffer in trainer.model.buffers())  # quantised weights are buffers
    weights += trainer.step.loss.other_bytes
    counted = weights + per_row * rows + head
    return int(counted * (HELD if trainer.device.type == "cpu" else 1.0)) + TORCH_ITSELF


def _kept_bytes(trainer: Trainer, ids: Tensor) -> int:
    """Return the bytes that autograd keeps from the blocks' forward pass. Shared memory counts once.

    With gradient_checkpointing the inputs of the blocks are added, because the hook does not see them.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = trainer.model.training
    trainer.model.train()  # training mode, so that dropout's masks are counted
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        trainer.step.precision.autocast(),
    ):
        # `hidden` stays alive until all storages are counted, so that torch reuses none of their addresses
        hidden = trainer.model.base_model(ids)
    trainer.model.train(was_training)
    inputs = trainer.model.config.num_hidden_layers * hidden.nbytes
    del hidden
    return sum(kept.values()) + (inputs if trainer.config.gradient_checkpointing else 0)
