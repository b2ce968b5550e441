"""Prints the parts of the model before a run, and estimates memory and time of training on this machine.

To estimate the time, the loss and gradient of a part of a real batch are computed, and the measured time is
scaled by FLOPs to the whole run. The memory is computed, not measured. The model is not trained: the
gradients are thrown away, and weights and random states do not change.
"""

import copy
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.console.language import say
from minigpt.console.terminal import seconds, table
from minigpt.devices import random_state, set_random_state
from minigpt.errors import InputError, Message
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

TORCH_ITSELF = 350 * 2**20  # memory in bytes of a process after all imports, before any tensor exists
# On a CPU, a process takes 1.4 times the computed bytes, because activations, gradients and moments are
# allocated and freed in changing order, which leaves gaps in the C library's memory. The factor was measured
# on Linux with benchmarks/memory.py. GPUs have other allocators, so HELD does not apply to GPUs.
HELD = 1.4
_LONGEST = 2048  # largest number of tokens of a measured row; figures for longer rows are extrapolated


def print_parameters(trainer: Trainer) -> None:
    """Print the parameter count of each part of the model.

    Also check that the sum is `config.parameter_count()`, which is computed from the model's sizes alone.
    If training starts from existing weights, print trained and frozen counts instead, and check nothing.
    """
    model = trainer.model
    if trainer.config.starts_from is not None:
        _print_trained(model)
        return
    parts = parameter_table(model)
    total = sum(count for _, count in parts)
    rows = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in parts]
    table(
        "model", ("part", "parameters", "share"), [*rows, (Message("sum"), f"{total:,}", "")], numeric=(1, 2)
    )
    expected = model.config.parameter_count()
    if total != expected:
        raise AssertionError(f"the parts hold {total} parameters, the formula says {expected}")
    print(say("the closed formula gives {count:,}: equal", count=expected))


def _print_trained(model: LanguageModel) -> None:
    """Print for each part of a loaded model how many parameters are trained, and how many are frozen."""
    trained, total = parameter_table(model, only_trained=True), dict(parameter_table(model))
    counts = dict(trained)
    rows = [
        (part, f"{counts.get(part, 0):,}", f"{count - counts.get(part, 0):,}")
        for part, count in total.items()
    ]
    sums = (Message("sum"), f"{sum(counts.values()):,}", f"{sum(total.values()) - sum(counts.values()):,}")
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
        """Return the estimate as one line of text. A second line follows if the machine is busy."""
        sentence = say(
            "{steps:,} steps of about {tokens:,.0f} tokens; this machine does {speed:,.0f} GFLOP/s on them: "
            "about {time}, {memory:,.0f} MiB of memory",
            steps=self.steps,
            tokens=self.tokens_per_step,
            speed=self.flops_per_second / 1e9,
            time=seconds(self.seconds),
            memory=self.memory_bytes / 2**20,
        )
        return "\n".join(filter(None, (sentence, busy())))


def estimate(trainer: Trainer, free: float = math.inf) -> Estimate:
    """Estimate the cost of a run: measure a part of the first batch (about a second), and scale the time.

    Args:
        trainer: the run.
        free: number of free bytes of memory.

    Raises:
        InputError: if the run needs more memory than `free`. It is raised before a whole batch is computed.
    """
    config = trainer.config
    needed = memory_needed(trainer)
    # This comparison is lenient, so that the error is raised only if the run surely does not fit. On a CPU,
    # `needed` is HELD times the computed bytes, plus TORCH_ITSELF. So the computed bytes alone are compared
    # with `free`. On other devices, the computed bytes may be up to HELD times the free bytes.
    if needed - TORCH_ITSELF > HELD * free:
        raise InputError(
            f"a step needs about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free: lower "
            "--batch_size, --max_length or --block_size, or the model's size (or --gradient_checkpointing)"
        )
    pad_to = config.max_length if config.pad_to_max_length else 0
    shapes, answer_share = _shapes(trainer, pad_to), _answer_share(trainer)
    sampling_seconds = 0.0
    # with GRPO, the loss is computed on sampled answers: sample them to get their lengths
    if trainer.step.loss.is_sampled:
        sampling_seconds, shapes, answer_share = _sampled(trainer)
    tokens = sum(rows * (width - 1) for rows, width in shapes) / len(shapes)
    flops = sum(batch_flops(trainer, r, w - 1, answer_share) for r, w in shapes) / len(shapes)
    per_step = config.gradient_accumulation_steps
    speed = _measure(trainer, _answer_share(trainer))
    steps = trainer.step.total_steps - trainer.progress.steps_done
    evaluations = (
        -(-trainer.step.total_steps // trainer.eval_steps) - trainer.progress.steps_done // trainer.eval_steps
    )
    val = trainer.data.val
    # / 3: an evaluation has no backward pass, which takes two thirds of the FLOPs
    val_flops = batch_flops(trainer, val.rows, val.mean_targets, 1.0) / 3
    step_seconds = flops * per_step / speed + _optimizer_seconds(trainer) + sampling_seconds
    evaluation_seconds = val_flops / speed
    return Estimate(
        steps=steps,
        tokens_per_step=tokens * per_step,
        flops_per_step=flops * per_step,
        flops_per_second=speed,
        step_seconds=step_seconds,
        evaluation_seconds=evaluation_seconds,
        seconds=steps * step_seconds + evaluations * evaluation_seconds,
        memory_bytes=needed,
    )


def busy() -> str:
    """Return a warning if other programs use the cores now, which makes the estimate too long; else ""."""
    if not hasattr(os, "getloadavg"):  # Windows has no getloadavg
        return ""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load <= cores:
        return ""
    text = "the machine is busy (load average {load:.1f}, {cores} cores): the time holds while it is"
    return say(text, load=load, cores=cores)


def batch_flops(trainer: Trainer, rows: float, T: float, counted: float) -> float:
    """Return the FLOPs of training on rows of T tokens. `counted`: share of tokens that the loss counts."""
    return model_flops(trainer.model, rows * T, rows * T * counted, T)


def _shapes(trainer: Trainer, pad_to: int) -> list[tuple[int, int]]:
    """Return the size of each batch: (rows, tokens per row).

    The last token of a row is only a target, so the model's input is one token shorter. If answers are
    sampled, their lengths are not known yet: then the sizes are the largest possible ones.
    """
    loss, plan = trainer.step.loss, trainer.step.plan
    if not loss.is_sampled:
        return trainer.data.shapes(plan, pad_to)
    return [loss.sampled_shape(plan.rows(number).tolist()) for number in range(len(plan))]


def _answer_share(trainer: Trainer) -> float:
    """Return the share of the data's tokens that the loss counts."""
    return trainer.data.train.answer_share if trainer.config.loss_on == "answer" else 1.0


def _sampled(trainer: Trainer) -> tuple[float, list[tuple[int, int]], float]:
    """Sample the answers of the first step. They are thrown away; training samples them again.

    Returns: seconds of sampling per step; (rows, tokens per row) of each batch, as in `_shapes`; share of
    the tokens that are in answers.
    """
    start = time.perf_counter()
    batches = trainer.step.prepare(trainer.progress.steps_done)
    seconds = (time.perf_counter() - start) / trainer.step.loss.num_iterations
    shapes, answers, every = list[tuple[int, int]](), 0, 0
    for ids, targets, *_ in batches.mine:
        assert ids is not None
        assert targets is not None
        rows, T = ids.shape
        shapes.append((rows, T + 1))
        answers, every = answers + len(targets), every + rows * T
    return seconds, shapes, answers / every


def _measure(trainer: Trainer, answer_share: float) -> float:
    """Measure the FLOP/s of forward and backward pass, with a part of the first batch (about 100 GFLOP)."""
    config = trainer.config
    rows = trainer.step.plan.rows(0)
    pad_to = config.max_length if config.pad_to_max_length else 0
    B, T = trainer.data.train.batch(rows, pad_to).input_ids.shape
    keep = max(1, min(B, round(B * 1e11 / batch_flops(trainer, B, T, answer_share))))
    piece = trainer.data.train.batch(rows[:keep], pad_to)
    keep, T = piece.input_ids.shape
    # even a single row may take too long, so shorten the rows
    while T > _LONGEST and batch_flops(trainer, keep, T, answer_share) > 1e10:
        T //= 2
    piece = _cut(piece, T)
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


def _cut(piece: Any, width: int) -> Any:
    """Return a batch with only the first `width` tokens of each row."""
    old = piece.input_ids.shape[1]
    if width == old:
        return piece
    found = {}
    for name, value in piece._asdict().items():
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == old:
            found[name] = value[:, :width]
        elif name == "last":  # index of each row's last token
            found[name] = value.clamp(max=width - 1)
    return piece._replace(**found)


def _optimizer_seconds(trainer: Trainer) -> float:
    """Measure the seconds of one update of the weights, on a copy of the weights that are trained."""
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    shared = {id(tensor): tensor for tensor in [*frozen, *trainer.model.buffers()]}
    model = copy.deepcopy(trainer.model, dict[int, object](shared))
    optimizers = make_optimizers(model, trainer.config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    for _ in range(2):  # the first update also allocates the optimiser's state, so measure the second
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        if trainer.device.type != "cpu":
            torch.accelerator.synchronize(trainer.device)
    return time.perf_counter() - start


def memory_needed(trainer: Trainer) -> int:
    """Compute the bytes that training needs: weights, gradients, moments, activations, torch itself.

    Muon is treated like AdamW. It keeps one moment instead of two, but its orthogonalisation needs as much
    memory as the other moment.
    """
    pad_to = trainer.config.max_length if trainer.config.pad_to_max_length else 0
    rows, longest = max(_shapes(trainer, pad_to), key=lambda shape: shape[0] * shape[1])
    T = longest - 1
    answer_share = min(1.0, trainer.step.loss.longest_sample / T) or _answer_share(trainer)
    config, width = trainer.model.config, trainer.model.config.hidden_size
    before = random_state(trainer.device)
    per_row = _bytes_per_row(trainer, T)
    set_random_state(trainer.device, before)
    # For each position that the loss counts, memory holds the hidden state and its gradient (`width` floats
    # each), and logits, log-softmax and its gradient (vocab_size floats each). A float has 4 bytes.
    outputs = config.vocab_size if hasattr(trainer.model, "lm_head") else 0  # a classifier has few outputs
    head = 4 * (2 * width + 3 * outputs) * answer_share * rows * T
    # Bytes per weight: 4 in float32, and with autocast 2 more for the 16-bit copy. A trained weight has 12
    # more: its gradient and AdamW's two moments.
    per_weight = 4 if trainer.config.precision == "float32" else 6
    weights = sum(
        p.numel() * (per_weight + (12 if p.requires_grad else 0)) for p in trainer.model.parameters()
    )
    weights += sum(buffer.nbytes for buffer in trainer.model.buffers())  # quantised weights are buffers
    weights += trainer.step.loss.other_bytes
    counted = weights + per_row * rows + head
    return int(counted * (HELD if trainer.device.type == "cpu" else 1.0)) + TORCH_ITSELF


def _bytes_per_row(trainer: Trainer, T: int) -> float:
    """Return the bytes that autograd keeps for a row of T tokens."""
    if T > _LONGEST:
        # The bytes are a polynomial of degree 2 in T, because attention's scores are (T, T). Measure three
        # lengths, and take the value at T of the polynomial through the three points.
        lengths = (_LONGEST // 4, _LONGEST // 2, _LONGEST)
        a, b, c = (_bytes_per_row(trainer, length) for length in lengths)
        x, y, z = lengths
        return (
            a * (T - y) * (T - z) / ((x - y) * (x - z))
            + b * (T - x) * (T - z) / ((y - x) * (y - z))
            + c * (T - x) * (T - y) / ((z - x) * (z - y))
        )
    row = torch.zeros((1, T), dtype=torch.int64, device=trainer.device)
    # Subtract the bytes of two rows from the bytes of three rows. What does not depend on rows cancels out:
    # weights, and autocast's copies of them. A single row is not measured: torch reshapes it without a copy,
    # so it takes fewer bytes than each row of a larger batch.
    return _kept_bytes(trainer, row.repeat(3, 1)) - _kept_bytes(trainer, row.repeat(2, 1))


def _kept_bytes(trainer: Trainer, ids: Tensor) -> int:
    """Return the bytes that autograd keeps from the blocks' forward pass. Shared memory counts once.

    A hook counts the tensors that autograd saves. With gradient_checkpointing, the hook does not see the
    inputs of the blocks, so the inputs are added.
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
        # Autograd keeps all saved tensors as long as `hidden` exists. So torch cannot reuse their addresses,
        # and two storages never count as one.
        hidden = trainer.model.base_model(ids)
    trainer.model.train(was_training)
    inputs = trainer.model.config.num_hidden_layers * hidden.nbytes
    del hidden
    return sum(kept.values()) + (inputs if trainer.config.gradient_checkpointing else 0)
