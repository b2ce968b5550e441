"""What the dial must know: facts about the data (counted) and about the machine (measured).

Measuring runs real steps of throw-away models; no file is written, and the run that follows begins from its
own seed.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minigpt.data.ngrams import ngram_losses
from minigpt.devices import pick_device
from minigpt.evaluation.loss import evaluate_loss
from minigpt.training.config import TrainConfig
from minigpt.training.estimate import batch_flops, memory_needed
from minigpt.training.loop import Trainer
from minigpt.training.run_data import RunData, TextData
from minigpt.training.sizing import (
    EPOCHS_OF_TEXT,
    LAW_SETTINGS,
    Candidate,
    Facts,
    Kind,
    Shape,
    flops_per_token,
)

__all__ = ["LAW_RECIPES", "Machine", "estimates", "facts_of", "free_memory", "law_settings"]

_COUNTED, _PREDICTED = 2_000_000, 50_000  # tokens that n-grams are counted in and about measured on, at most
_PIECE = 2000  # tokens in a row
_MEASURED_SECONDS = 0.4  # of steps, and three steps at least
LAW_RECIPES: dict[Kind, str] = {"text": "shakespeare-cpu", "answers": "qa-cpu"}  # what a law is measured with
# ... and which of its values must be the same for the law to hold. Not precision: with bfloat16 a loss ends
# within 0.01 of float32's, and the law is off by more.
_LEARNING = (
    *("batch_size", "tokens_per_batch", "gradient_accumulation_steps", "loss_on", "optimizer"),
    *("learning_rate", "muon_learning_rate", "lr_scheduler_type", "weight_decay", "muon_weight_decay"),
    *("max_grad_norm",),
    *("tokenizer", "block_size", "family", "zero_projections", "decay_ratio", "min_lr_ratio"),
)


def law_settings(config: TrainConfig) -> dict[str, Any]:
    """What a law of the loss depends on besides the model's size and the tokens."""
    return {name: getattr(config, name) for name in _LEARNING}


def facts_of(config: TrainConfig, data: RunData | TextData) -> Facts:
    """Count what the plan needs to know about the data (seconds, for a million tokens)."""
    per_epoch = len(data.plan(config)) / config.gradient_accumulation_steps
    val: npt.NDArray[np.integer]
    train: npt.NDArray[np.integer]
    if isinstance(data, TextData):
        train = data.train.tokens.read(data.train.first, min(len(data.train), _COUNTED))
        every = max(_PIECE, len(data.val) * _PIECE // _PREDICTED)  # pieces from all over it
        starts = range(0, max(1, len(data.val) - _PIECE), every)
        pieces = [data.val.tokens.read(data.val.first + s, min(_PIECE, len(data.val) - s)) for s in starts]
        val = np.concatenate(pieces)
        counted, unique, epochs = None, len(data.train) - 1, EPOCHS_OF_TEXT
    else:
        train = data.train.ids[:_COUNTED]
        # rows from all over it: a file's beginning may be of one kind
        rows = range(0, len(data.val), max(1, round(int(data.val.lengths.sum()) / _PREDICTED)))
        bounds = [(int(data.val.starts[row]), int(data.val.starts[row + 1])) for row in rows]
        val = np.concatenate([data.val.ids[first:last] for first, last in bounds])
        begins = 1 if config.loss_on == "all" else None
        counted = np.concatenate(
            [
                data.val.is_answer[first:last] if not begins else np.arange(last - first) >= begins
                for row, (first, last) in zip(rows, bounds)
            ]
        )
        unique = int(data.train.lengths.sum()) - len(data.train)
        epochs = config.num_train_epochs
    vocab_size = data.tokenizer.get_vocab_size()
    kind: Kind = "text" if isinstance(data, TextData) else "answers"
    losses = ngram_losses(train, val, vocab_size, counted)
    return Facts(
        kind=kind,
        unique=unique,
        steps_per_epoch=per_epoch,
        tokens_per_step=unique / per_epoch,
        vocab_size=vocab_size,
        yardstick=min(losses),
        unigram=losses[0],
        epochs=epochs,
        no_law=_no_law(config, kind),
    )


def _no_law(config: TrainConfig, kind: Kind) -> str:
    measured, here = LAW_SETTINGS[kind], law_settings(config)
    if kind == "answers":  # windows of text are as long as block_size, questions and answers are not
        here["block_size"] = measured["block_size"]
    other = [
        f"{name}={measured[name]}, here {value}" for name, value in here.items() if value != measured[name]
    ]
    return f"measured with {'; '.join(other[:2])}" if other else ""


# -- facts about the machine ---------------------------------------------------------------------------------


class Machine:
    """What shapes cost here: counted in FLOPs, or measured in seconds on models that are thrown away."""

    def __init__(self, config: TrainConfig, data: RunData | TextData) -> None:
        self._config, self._data = config, data
        self._trainer: tuple[Shape, Trainer] | None = None

    def _of(self, shape: Shape) -> Trainer:
        if self._trainer is None or self._trainer[0] != shape:
            self._trainer = None  # one at a time in memory
            values: dict[str, Any] = {**dataclasses.asdict(shape), "max_steps": 10**6, "warmup_steps": 1}
            self._trainer = shape, Trainer(dataclasses.replace(self._config, **values), self._data)
        return self._trainer[1]

    def memory(self, shape: Shape) -> int:
        """Bytes that training takes."""
        return memory_needed(self._of(shape))

    def counted(self, shape: Shape) -> Candidate:
        """The cost in FLOPs, by formula: no model is made."""
        config, data = self._config, self._data
        vocab_size = data.tokenizer.get_vocab_size()
        settings = dataclasses.replace(config, **dataclasses.asdict(shape))
        total = settings.model_config(vocab_size).parameter_count()
        embeddings = 1 if settings.tie_word_embeddings else 2
        N = total - embeddings * vocab_size * shape.n_embd
        if settings.family == "gpt":
            N -= settings.block_size * shape.n_embd  # positions
        share = data.train.answer_share if config.loss_on == "answer" else 1.0

        def flops(rows: float, T: float, counted: float) -> float:
            return rows * T * flops_per_token(N, shape, T, counted, vocab_size)

        batches = data.shapes(data.plan(config), config.max_length if config.pad_to_max_length else 0)
        step = sum(flops(rows, width - 1, share) for rows, width in batches) / len(batches)
        evaluation = flops(data.val.rows, data.val.mean_targets, 1.0) / 3  # forward only
        return Candidate(shape, N, step * config.gradient_accumulation_steps, evaluation)

    def measured(self, shape: Shape) -> Candidate:
        """The cost in seconds: some steps, as training does them, and a batch of an evaluation."""
        trainer = self._of(shape)
        trainer.step()  # the first one allocates
        done, began = 0.0, time.perf_counter()
        expected = self.counted(shape)
        steps = 0
        while steps < 3 or time.perf_counter() - began < 0.4:
            done += sum(
                _batch_flops(trainer, *batch.input_ids.shape)
                for batch in trainer.step.batches(trainer.progress.steps_done)
            )
            trainer.step()
            steps += 1
        _wait(trainer.device)
        step = (time.perf_counter() - began) * expected.step / done
        began = time.perf_counter()
        batch = next(iter(trainer.data.val.in_order(128)))
        evaluate_loss(trainer.model, [batch], trainer.device)
        B, T = batch.input_ids.shape
        share = expected.evaluation / (_batch_flops(trainer, B, T, counted=1.0) / 3)
        evaluation = (time.perf_counter() - began) * max(1.0, share)
        began = time.perf_counter()
        trainer.data.sample(trainer.model, 0)
        evaluation += time.perf_counter() - began
        return Candidate(shape, self.counted(shape).parameters, step, evaluation)


def estimates(counted: Sequence[Candidate], measured: Mapping[Shape, Candidate]) -> list[Candidate]:
    """Costs in seconds: measured, or from FLOPs at the speed of the nearest measured shape by parameters."""
    flops = {c.shape: c for c in counted}
    found = []
    for c in counted:
        near = min(measured.values(), key=lambda m: abs(math.log(m.parameters / c.parameters)))
        seconds_per_flop = near.step / flops[near.shape].step
        step, evaluation = c.step * seconds_per_flop, c.evaluation * seconds_per_flop
        found.append(measured.get(c.shape) or dataclasses.replace(c, step=step, evaluation=evaluation))
    return found


def _batch_flops(trainer: Trainer, rows: float, T: float, counted: float | None = None) -> float:
    share = trainer.data.train.answer_share if trainer.config.loss_on == "answer" else 1.0
    return batch_flops(trainer, rows, T, share if counted is None else counted)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_memory(config: TrainConfig) -> float:
    """Bytes that are free where training runs; infinity where the system does not say."""
    device = pick_device(config.device)
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123 -- a file of the kernel
            found = dict(line.split(":") for line in lines)
        return float(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return math.inf
