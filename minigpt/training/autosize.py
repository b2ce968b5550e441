"""`minigpt train --size 10min` chooses model, steps and evaluations from the data and the machine.

    minigpt train --size 10min
    minigpt train --size base --text book.txt --dry_run

The rule: of a ladder of shapes, take the largest that can read enough tokens for each of its parameters
within the budget, without repeating the data more often than helps. A time is measured on this machine: some
real steps of a shape that is then thrown away; the others' times follow from their FLOPs. Rates, schedule,
optimiser and batches are the recipe's. A flag that the user gave stays as it is. What was expected is written
into run.json, and at the end what came.
"""

import dataclasses
import json
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minigpt.console.terminal import seconds, table
from minigpt.devices import pick_device
from minigpt.errors import InputError
from minigpt.families.options import RECOMMENDED
from minigpt.families.registry import family_of
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import read_json
from minigpt.training.config import FOREIGN_OPTIONS, RUN_FILE, TrainConfig
from minigpt.training.distributed import Processes
from minigpt.training.estimate import Estimate, estimate
from minigpt.training.loop import Trainer
from minigpt.training.run_data import RunData, TextData, read_data
from minigpt.training.sizing import Size, parse_size

__all__ = ["RECORD", "Decision", "Shape", "TooShortError", "check_flags", "compare", "decide"]
__all__ += ["read_record", "write_record"]

RECORD = "size"  # the key of run.json
_TOKENS_PER_PARAMETER = 2  # of the blocks: what the tuned recipes for CPUs end at (LOG.md), with Muon
_TOKENS_OF_A_NAME = 20  # for small, base and large: https://arxiv.org/abs/2203.15556
_EPOCHS_OF_TEXT = 16.0  # more readings of a text gain little: https://arxiv.org/abs/2305.16264
_LEAST_STEPS = 20  # Muon has hardly left its warm-up by then: fewer steps are refused
_STEPS_OF_LITTLE_DATA = 150  # that no data is too small for: fifty pairs are one step an epoch
_EVALUATIONS, _EVALUATION_SHARE = 10, 0.1  # evaluations of a run; the share of the budget that they may take
_MEMORY = 0.8  # share of the free memory that a run may fill
_CUT, _LONGEST = 0.01, 1024  # where more pairs than this are cut, max_length grows, up to this many tokens
_SIZES = ("num_key_value_heads", "head_dim", "intermediate_size")  # 0: what follows from width and heads
_STEPS = {"max_steps", "num_train_epochs"}

Why = list[tuple[str, object, str]]  # option, value, reason


class TooShortError(InputError):
    """The time of --size is too short; `seconds` would do."""

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds


class Shape(NamedTuple):
    """Layers, channels and heads of a model."""

    n_layer: int
    n_embd: int
    n_head: int

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}"


def heads(n_embd: int) -> int:
    """Heads of 32 channels, from a width of 256 on 64, as in the recipes; else the next number that divides.

    >>> heads(128), heads(512), heads(100)
    (4, 8, 2)
    """
    wanted = max(1, n_embd // (32 if n_embd < 256 else 64))
    return next((n for n in range(wanted, 0, -1) if n_embd % (2 * n) == 0), 1)


_RUNGS = (
    *((2, 64), (2, 96), (2, 128), (2, 160), (3, 192), (4, 192), (4, 256), (6, 256), (6, 320), (6, 384)),
    *((8, 512), (12, 768)),
)
LADDER = tuple(Shape(n_layer, n_embd, heads(n_embd)) for n_layer, n_embd in _RUNGS)
NAMED = {"small": Shape(4, 128, 4), "base": Shape(6, 256, 4), "large": Shape(8, 512, 8)}


@dataclass(frozen=True)
class Decision:
    """The configuration that was chosen, its data, and what is recorded about it."""

    config: TrainConfig
    data: RunData | TextData
    record: dict[str, Any]  # JSON-ready: asked, chosen, because, expected


def check_flags(config: TrainConfig, given: Collection[str]) -> None:
    """See that no flag decides what --size is to decide. Raises InputError naming both."""
    if parse_size(config.size).unit != "name":
        for name in sorted(_STEPS & set(given)):
            raise InputError(
                f"--size {config.size} decides the number of steps, --{name} too: give one of them"
            )


def decide(
    config: TrainConfig, data: RunData | TextData, given: Collection[str], processes: Processes
) -> Decision:
    """Choose what `given` leaves open, print it and why. The first of several processes does.

    Args:
        config: the recipe with the user's flags.
        data: what `config` reads.
        given: names of the flags on the command line.

    Raises:
        InputError: if the budget is too small, nothing fits into memory, or flags leave no model; for a time
            and several processes: one process cannot measure how fast they are together.
    """
    size = parse_size(config.size)
    check_flags(config, given)
    if processes.size > 1 and size.unit == "seconds":
        raise InputError(
            f"--size {config.size} is a time, and one process cannot measure how fast {processes.size} are "
            "together: give small, base, large or an amount of arithmetic (2e6GFLOP)"
        )
    found = ""
    with processes.shared_errors():
        if processes.is_main:
            found = json.dumps(_Choice(config, data, set(given), size, processes.size == 1).decide())
    changes, record = json.loads(processes.broadcast(found))
    chosen = dataclasses.replace(config, **changes)
    if (config.max_length, config.block_size) != (chosen.max_length, chosen.block_size):
        with processes.main_first():
            data = read_data(chosen)
    return Decision(chosen, data, record)


class _Choice:
    """One choice, with its reasons."""

    def __init__(
        self, config: TrainConfig, data: RunData | TextData, given: set[str], size: Size, alone: bool
    ) -> None:
        self.before, self.given, self.size, self.alone = config, given, size, alone
        self.started = time.perf_counter()
        self.why: Why = []
        self.config = self._with_family(config)
        self.config, self.data = self._with_lengths(self.config, data)
        plan = self.data.plan(self.config)
        self.per_epoch = len(plan) / self.config.gradient_accumulation_steps
        pad_to = self.config.max_length if self.config.pad_to_max_length else 0
        self.batches = self.data.shapes(plan, pad_to)  # rows and tokens of each
        if isinstance(self.data, TextData):
            self.unique, self.epochs = len(self.data.train) - 1, _EPOCHS_OF_TEXT
        else:
            self.unique = int(self.data.train.lengths.sum()) - len(self.data.train)
            self.epochs = self.config.num_train_epochs
        by_epochs = math.floor(self.epochs * self.per_epoch)
        self.most_steps = max(_STEPS_OF_LITTLE_DATA, by_epochs)
        self.least_steps = min(_LEAST_STEPS, max(1, by_epochs))
        self.measured: dict[Shape, Estimate] = {}

    def decide(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Changes of the configuration, and the record."""
        shapes = self._shapes()
        if self.size.unit == "name":
            (shape,) = shapes
            steps, evaluations = self._steps_of_a_name(shape), _EVALUATIONS
        else:
            shape, steps, evaluations = self._within_budget(shapes)
        if self.alone and (fitting := self._that_fits(shape, shapes)) != shape:
            shape, steps, evaluations = self._within_budget(shapes[: shapes.index(fitting) + 1])
        settings = self._settings(shape, steps, evaluations)
        found = self._measure(shape) if self.alone else None
        expected = {
            "seconds": found and steps * found.step_seconds + evaluations * found.evaluation_seconds,
            "memory_bytes": found and found.memory_bytes,
        }
        chosen = {**shape._asdict(), "parameters_in_blocks": self._parameters(shape), "steps": steps}
        epochs = steps / self.per_epoch
        limited = steps == self.most_steps and self.size.unit != "name"
        because = {
            "tokens_to_learn_from": self.unique,
            "epochs": round(epochs, 3),
            "limited_by_data": limited,
        }
        record = {"asked": self.size.text, "chosen": chosen, "because": because, "expected": expected}
        self._print(settings, len(shapes), record)
        before, after = self.before.as_dict(), settings.as_dict()
        return {key: value for key, value in after.items() if value != before[key]}, record

    # -- how large, and how long -----------------------------------------------------------------------------

    def _within_budget(self, shapes: list[Shape]) -> tuple[Shape, int, int]:
        """The largest shape with enough tokens for its parameters, its steps and its evaluations."""
        shape, least = shapes[len(shapes) // 3], self.least_steps
        for _ in range(4):  # what was measured changes what seems best
            if self.size.unit == "seconds":
                self._measure(shape)
            best = shapes[0]
            for other in shapes:
                steps = min(self._affordable(other)[0], self.most_steps)
                tokens = steps * self.unique / self.per_epoch
                if steps >= least and tokens >= _TOKENS_PER_PARAMETER * self._parameters(other):
                    best = other
            if best == shape or (self.size.unit == "seconds" and best in self.measured):
                shape = best
                break
            shape = best
        steps, evaluations = self._affordable(shape)
        if steps < least:
            raise self._too_small(shapes[0], least)
        return shape, min(steps, self.most_steps), evaluations

    def _affordable(self, shape: Shape) -> tuple[int, int]:
        """Steps and evaluations that the budget pays for."""
        step, evaluation = self._costs(shape)
        budget = self.size.amount
        if self.size.unit == "seconds":
            budget -= time.perf_counter() - self.started  # measuring took its part
        evaluations = max(
            1, min(_EVALUATIONS, math.floor(_EVALUATION_SHARE * budget / max(evaluation, 1e-12)))
        )
        return max(0, math.floor((budget - evaluations * evaluation) / step)), evaluations

    def _costs(self, shape: Shape) -> tuple[float, float]:
        """A step and an evaluation, in the budget's unit; of a shape that was not measured by its FLOPs."""
        step, evaluation = self._flops(shape)
        if self.size.unit != "seconds":
            return step, evaluation
        near = min(self.measured, key=lambda m: abs(math.log(self._parameters(m) / self._parameters(shape))))
        found, (near_step, near_evaluation) = self.measured[near], self._flops(near)
        return found.step_seconds * step / near_step, found.evaluation_seconds * evaluation / near_evaluation

    def _flops(self, shape: Shape) -> tuple[float, float]:
        """FLOPs of a step and of an evaluation: blocks, attention, lm_head where the loss counts."""
        V, config = self.data.tokenizer.get_vocab_size(), self.config
        share = self.data.train.answer_share if config.loss_on == "answer" else 1.0

        made = dataclasses.replace(config, **shape._asdict()).model_config(V)
        flops = partial(family_of(made).flops, made)
        sizes = [(rows * (width - 1), width - 1) for rows, width in self.batches]  # tokens, length
        mean = sum(flops(tokens, tokens * share, T) for tokens, T in sizes) / len(sizes)
        T = self.data.val.mean_targets
        tokens = self.data.val.rows * T
        return mean * config.gradient_accumulation_steps, flops(tokens, tokens, T) / 3

    def _parameters(self, shape: Shape) -> int:
        """Of the blocks alone: what one more block adds, that many times."""
        counts = [
            dataclasses.replace(self.config, **shape._asdict()).model_config(3).parameter_count(),
            dataclasses.replace(self.config, **{**shape._asdict(), "n_layer": shape.n_layer + 1})
            .model_config(3)
            .parameter_count(),
        ]
        return (counts[1] - counts[0]) * shape.n_layer

    def _measure(self, shape: Shape) -> Estimate:
        """Real steps of a model that is thrown away: seconds, and the memory that training takes."""
        if shape not in self.measured:
            values: dict[str, Any] = {**shape._asdict(), "max_steps": 1000, "warmup_steps": 1}
            self.measured[shape] = estimate(Trainer(dataclasses.replace(self.config, **values), self.data))
        return self.measured[shape]

    def _that_fits(self, shape: Shape, shapes: list[Shape]) -> Shape:
        """The shape, or the largest below it that the memory holds."""
        free = free_memory(self.config)
        below = [other for other in shapes if self._parameters(other) <= self._parameters(shape)]
        for other in reversed(below):
            needed = self._measure(other).memory_bytes
            if needed <= _MEMORY * free:
                return other
        raise InputError(
            f"--size {self.size.text}: a model of {below[0]} needs {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} are free: lower --batch_size or ask for a smaller size"
        )

    def _too_small(self, smallest: Shape, steps: int) -> InputError:
        step, evaluation = self._costs(smallest)
        least = step * steps + evaluation / _EVALUATION_SHARE
        if self.size.unit != "seconds":
            return InputError(
                f"--size {self.size.text} is too little for {steps} steps of the smallest model; give at "
                f"least {math.ceil(1.1 * least / 1e9)}GFLOP"
            )
        spent = time.perf_counter() - self.started
        enough = math.ceil(1.2 * (least + spent))
        return TooShortError(
            f"--size {self.size.text} is too short: measuring takes {spent:.1f} s, {steps} steps and an "
            f"evaluation {least:.1f} s more; give at least {enough}s",
            enough,
        )

    def _steps_of_a_name(self, shape: Shape) -> int:
        if _STEPS & self.given:
            return self.config.max_steps or max(1, math.ceil(self.config.num_train_epochs * self.per_epoch))
        wanted = math.ceil(_TOKENS_OF_A_NAME * self._parameters(shape) * self.per_epoch / self.unique)
        return min(wanted, self.most_steps)

    # -- what the flags leave open ---------------------------------------------------------------------------

    def _with_family(self, config: TrainConfig) -> TrainConfig:
        """The recommended family, which learns more in the same time (LOG.md), unless the flags want another.

        Sizes that the recipe fits to its own model go: other ones are chosen here.
        """
        wanted = [name for name in FOREIGN_OPTIONS[RECOMMENDED] if name in self.given]
        own = {name: 0 for name in _SIZES if name not in self.given}
        if config.family == RECOMMENDED or wanted or {"family", "recipe"} & self.given:
            why = f"{', '.join(wanted)}: not an option of {RECOMMENDED}" if wanted else self._whose("family")
            self.why.append(("family", config.family, why))
            return dataclasses.replace(config, **own)  # type: ignore[arg-type]
        self.why.append(("family", RECOMMENDED, "a lower loss after equal time"))
        values: dict[str, Any] = {**FOREIGN_OPTIONS[RECOMMENDED], "family": RECOMMENDED}
        return dataclasses.replace(config, **values)

    def _with_lengths(
        self, config: TrainConfig, data: RunData | TextData
    ) -> tuple[TrainConfig, RunData | TextData]:
        """A max_length that cuts one example of a hundred at most."""
        if isinstance(data, TextData):
            self.why.append(("block_size", config.block_size, self._whose("block_size")))
            return config, data
        cut = (data.train.n_cut + data.train.n_without_answer) / len(data.train)
        given = {"max_length", "block_size"} & self.given
        if cut > _CUT and not given:
            all_of_it = read_data(dataclasses.replace(config, max_length=_LONGEST, block_size=_LONGEST))
            assert isinstance(all_of_it, RunData)
            wanted = 32 * math.ceil(float(np.quantile(all_of_it.train.lengths, 1 - _CUT)) / 32)
            wanted = max(config.max_length, min(_LONGEST, wanted))
            self.why.append(("max_length", wanted, f"{config.max_length} would cut {cut:.0%} of the pairs"))
            config = dataclasses.replace(config, max_length=wanted, block_size=max(wanted, config.block_size))
            return config, read_data(config)
        why = "given" if given else f"the recipe's: {cut:.1%} of the pairs are longer"
        self.why.append(("max_length", config.max_length, why))
        return config, data

    def _whose(self, name: str) -> str:
        return "given" if name in self.given else "the recipe's"

    def _shapes(self) -> list[Shape]:
        """The ladder, or the name's shape, with the layers, channels and heads that were given."""
        fixed = {name: getattr(self.config, name) for name in Shape._fields if name in self.given}
        found: dict[Shape, None] = {}
        complaint: InputError | None = None
        for rung in [NAMED[self.size.text]] if self.size.unit == "name" else LADDER:
            shape = rung._replace(**fixed)
            if "n_embd" in fixed and "n_head" not in fixed:
                shape = shape._replace(n_head=heads(shape.n_embd))
            try:
                dataclasses.replace(self.config, **shape._asdict()).model_config(3)
                found[shape] = None
            except InputError as error:
                complaint = error
        if complaint is not None and not found:
            raise complaint
        return list(found)

    def _settings(self, shape: Shape, steps: int, evaluations: int) -> TrainConfig:
        values: dict[str, Any] = shape._asdict()
        if not _STEPS & self.given:
            values["max_steps"] = steps
        if "eval_steps" not in self.given:
            values["eval_steps"] = math.ceil(steps / evaluations)
        if "warmup_steps" not in self.given:  # of a short run a tenth is enough
            values["warmup_steps"] = min(self.config.warmup_steps, math.ceil(steps / 10))
        return dataclasses.replace(self.config, **values)

    def _print(self, settings: TrainConfig, shapes: int, record: dict[str, Any]) -> None:
        by_name, because = self.size.unit == "name", record["because"]
        shape = (
            f"what {self.size.text} means"
            if by_name
            else f"the largest of {shapes} shapes that reads {_TOKENS_PER_PARAMETER} tokens a parameter"
        )
        steps = "what the time allows" if self.size.unit == "seconds" else "what the amount allows"
        if by_name:
            steps = f"{_TOKENS_OF_A_NAME} tokens a parameter, or what the data gives"
        if because["limited_by_data"]:
            steps = f"reads the data {because['epochs']:g} times; more would gain little"
        rows = list(self.why)
        for name, why in (
            *((name, shape) for name in Shape._fields),
            ("batch_size", f"the recipe's: about {self.unique / self.per_epoch:,.0f} tokens a step"),
            *((name, "the recipe's") for name in ("optimizer", "learning_rate", "muon_learning_rate")),
            ("max_steps", "given" if _STEPS & self.given else steps),
            ("eval_steps", "evaluations take a tenth of the budget at most"),
        ):
            if settings.optimizer == "muon" or name != "muon_learning_rate":
                rows.append((name, getattr(settings, name), "given" if name in self.given else why))
        table(f"--size {self.size.text}", ("option", "value", "why"), rows, numeric=(1,))
        print(f"{self.unique:,} tokens to learn from, read {because['epochs']:.1f} times")
        if because["epochs"] < 1 and not by_name:
            again = math.ceil(10 / max(because["epochs"], 1e-3)) / 10
            print(
                f"more data than --size {self.size.text} can read: a part is left out; {again:g} times "
                "the size reads all of it once"
            )
        if replaced := self._replaced(settings):
            print(f"--size replaces the recipe's {', '.join(replaced)}; a flag keeps its value")
        if (expected := record["expected"]["seconds"]) is not None:
            print(f"expected: about {seconds(expected)} on this machine as busy as it is now")

    def _replaced(self, settings: TrainConfig) -> list[str]:
        """Options of the recipe that were changed, with their values before; the number of epochs is one."""
        names = [*Shape._fields, "max_length", "block_size", "max_steps", "eval_steps", "warmup_steps"]
        before = [(name, getattr(self.before, name), getattr(settings, name)) for name in names]
        found = [f"{name}={old}" for name, old, new in before if old != new and name not in self.given]
        epochs = f"num_train_epochs={self.before.num_train_epochs:g}"
        return [epochs if one == "max_steps=0" else one for one in found if one != "eval_steps=0"]


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


# -- the record of a run -------------------------------------------------------------------------------------


def compare(record: dict[str, Any], result: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The record with what came, and a sentence that puts it beside what was expected.

    Args:
        record: of `decide`, or `read_record`.
        result: of `Trainer.run`.
    """
    got = {"val_loss": result["val_loss"], "seconds": result["seconds"]}
    expected = record["expected"]["seconds"]
    if not expected:
        return {**record, "got": got}, "no time was expected that could be compared"
    off = got["seconds"] / expected - 1
    said = f"expected {seconds(expected)}, got {seconds(got['seconds'])} ({off:+.0%})"
    return {**record, "got": got}, said


def read_record(output: Path) -> dict[str, Any] | None:
    """What was recorded in a run's run.json; None if there is nothing that can be used."""
    try:
        record = read_json(output / RUN_FILE)[RECORD]
        return dict(record) if "seconds" in record["expected"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Put a record into a run's run.json, in place of an older one."""
    path = output / RUN_FILE
    written = {**read_json(path), RECORD: record}
    atomic_write(path, json.dumps(written, ensure_ascii=False, indent=2) + "\n")
