"""`minigpt train --size 10min` chooses model, steps and evaluations for the data and the machine.

    minigpt train --size 10min
    minigpt train --size base --text book.txt --dry_run

--size is a name (small, base, large) or a budget (a time or a number of FLOPs). A name stands for one model
size. For a budget, autosize takes, from its list of model sizes, the largest that can train on enough tokens
per parameter within the budget, without repeating the data too often. If the budget is a time, autosize first
measures some training steps of one model size on this machine. The times of the other sizes are estimated
from their FLOPs.

Learning rates, schedule, optimiser and batches come from the recipe. Options that the user gives do not
change. run.json records the expected time, and after the run the real time.
"""

import contextlib
import dataclasses
import io
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

from minigpt.console.language import say
from minigpt.console.terminal import seconds, table
from minigpt.devices import pick_device
from minigpt.errors import InputError
from minigpt.families.options import RECOMMENDED
from minigpt.families.registry import family_of
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import json_text, read_json
from minigpt.storage.regular_files import read_text
from minigpt.training.config import FOREIGN_OPTIONS, RUN_FILE, TrainConfig
from minigpt.training.distributed import Processes
from minigpt.training.estimate import Estimate, estimate
from minigpt.training.loop import Trainer
from minigpt.training.run_data import AnyData, RunData, TextData, read_data
from minigpt.training.sizing import Size, parse_size

__all__ = ["RECORD", "Decision", "Shape", "TooShortError", "check_flags", "compare", "decide"]
__all__ += ["read_record", "write_record"]

RECORD = "size"  # key in run.json under which autosize stores what it chose and why, and the expected time
# If --size is a time or FLOPs: smallest number of training tokens per parameter of the transformer blocks.
_TOKENS_PER_PARAMETER = 2
# If --size is small, base or large: number of training tokens per parameter of the transformer blocks, from
# https://arxiv.org/abs/2203.15556.
_TOKENS_OF_A_NAME = 20
# largest number of passes over a text; more passes gain little (https://arxiv.org/abs/2305.16264)
_EPOCHS_OF_TEXT = 16.0
_LEAST_STEPS = 20  # smallest number of steps of a run; with fewer steps, Muon's warm-up takes most of the run
# The limit on passes over the data limits the steps of a run, but never to fewer than this number. So a run
# with very little data may exceed the limit on passes.
_STEPS_OF_LITTLE_DATA = 150
# largest number of evaluations in a run, and largest share of the budget that all evaluations may take
_EVALUATIONS, _EVALUATION_SHARE = 10, 0.1
_MEMORY = 0.8  # largest share of the free memory that a run may use
# _CUT: largest share of the training examples that may be cut because they are longer than max_length. If
# more would be cut, autosize increases max_length. _LONGEST: largest max_length that autosize chooses.
_CUT, _LONGEST = 0.01, 1024
# options for which 0 means: compute a value from n_embd and n_head
_SIZES = ("num_key_value_heads", "head_dim", "intermediate_size")
_STEPS = {"max_steps", "num_train_epochs"}

Why = list[tuple[str, object, str]]  # one entry for each chosen option: (option, value, reason)


class TooShortError(InputError):
    """Raised if the time that --size gives is too short. `seconds`: a time that would be enough."""

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds


class Shape(NamedTuple):
    """The size of a model: layers, channels and heads."""

    n_layer: int
    n_embd: int
    n_head: int

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}"


def heads(n_embd: int) -> int:
    """Return the number of heads for a width: 32 channels per head, or 64 for widths of 256 and more.

    If this number does not give each head the same even number of channels, the next smaller number that does
    is returned.

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
    """The result of autosize: the configuration, its data, and the record for run.json."""

    config: TrainConfig
    data: AnyData
    record: dict[str, Any]  # what the user asked, what was chosen and why, and the expected time


def check_flags(config: TrainConfig, given: Collection[str]) -> None:
    """Raise InputError if the user gave an option that --size decides. The message names the option."""
    if parse_size(config.size).unit != "name":
        for name in sorted(_STEPS & set(given)):
            raise InputError(
                f"--size {config.size} decides the number of steps, --{name} too: give one of them"
            )


def decide(config: TrainConfig, data: AnyData, given: Collection[str], processes: Processes) -> Decision:
    """Choose the options that the user left open, and print them with reasons.

    Process 0 chooses for all processes.

    Args:
        config: the recipe with the user's options.
        data: the data of `config`.
        given: names of the options that the user gave.
        processes: the processes that train together.

    Raises:
        InputError: if the budget is too small, if no model fits into memory, or if the given options are not
            valid; if the budget is a time and there are several processes, because one process cannot measure
            the speed of all processes.
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
            data = _read_again(chosen)
    return Decision(chosen, data, record)


def _read_again(config: TrainConfig) -> AnyData:
    """Read the data once more, because `config` has a new max_length and block_size.

    Print nothing, because the first reading has printed the messages.
    """
    unread = io.StringIO()
    with contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
        return read_data(config)


class _Choice:
    """Chooses the training options that the user left open, if --size is given, and collects the reasons."""

    def __init__(self, config: TrainConfig, data: AnyData, given: set[str], size: Size, alone: bool) -> None:
        self.before, self.given, self.size, self.alone = config, given, size, alone
        self.started = time.perf_counter()
        self.why: Why = []
        self.config = self._with_family(config)
        self.config, self.data = self._with_lengths(self.config, data)
        plan = self.data.plan(self.config)
        self.per_epoch = len(plan) / self.config.gradient_accumulation_steps
        pad_to = self.config.max_length if self.config.pad_to_max_length else 0
        self.batches = self.data.shapes(plan, pad_to)  # (rows, input tokens per row + 1) of each batch
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
        """Return the changed options, and a dict for run.json: the choice, its reasons, the expected time."""
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

    # -- model size and number of steps ----------------------------------------------------------------------

    def _within_budget(self, shapes: list[Shape]) -> tuple[Shape, int, int]:
        """Return (model size, number of steps, number of evaluations) of the largest model in the budget.

        A model is in the budget if it can train on _TOKENS_PER_PARAMETER tokens per parameter within the time
        or FLOPs of --size.
        """
        shape, least = shapes[len(shapes) // 3], self.least_steps
        # If the budget is a time, each round measures `shape`. This may change which size is the best.
        for _ in range(4):
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
        """Return how many steps and evaluations of a model of this size fit into the budget."""
        step, evaluation = self._costs(shape)
        budget = self.size.amount
        if self.size.unit == "seconds":
            budget -= time.perf_counter() - self.started  # subtract the time that measuring has taken
        evaluations = max(
            1, min(_EVALUATIONS, math.floor(_EVALUATION_SHARE * budget / max(evaluation, 1e-12)))
        )
        return max(0, math.floor((budget - evaluations * evaluation) / step)), evaluations

    def _costs(self, shape: Shape) -> tuple[float, float]:
        """Return the costs of a step and of an evaluation, in the unit of the budget: seconds or FLOPs.

        Only some sizes are measured in seconds. The seconds of another size are computed from the nearest
        measured size, in proportion to FLOPs.
        """
        step, evaluation = self._flops(shape)
        if self.size.unit != "seconds":
            return step, evaluation
        near = min(self.measured, key=lambda m: abs(math.log(self._parameters(m) / self._parameters(shape))))
        found, (near_step, near_evaluation) = self.measured[near], self._flops(near)
        return found.step_seconds * step / near_step, found.evaluation_seconds * evaluation / near_evaluation

    def _flops(self, shape: Shape) -> tuple[float, float]:
        """Return the FLOPs of a step and of an evaluation.

        A step computes lm_head only for the tokens that the loss counts.
        """
        V, config = self.data.tokenizer.get_vocab_size(), self.config
        share = self.data.train.answer_share if config.loss_on == "answer" else 1.0

        made = dataclasses.replace(config, **shape._asdict()).model_config(V)
        flops = partial(family_of(made).flops, made)
        # (input tokens, input tokens per row) of each batch
        sizes = [(rows * (width - 1), width - 1) for rows, width in self.batches]
        mean = sum(flops(tokens, tokens * share, T) for tokens, T in sizes) / len(sizes)
        T = self.data.val.mean_targets
        tokens = self.data.val.rows * T
        return mean * config.gradient_accumulation_steps, flops(tokens, tokens, T) / 3

    def _parameters(self, shape: Shape) -> int:
        """Return the number of parameters in the blocks, without embeddings and lm_head."""
        counts = [
            dataclasses.replace(self.config, **shape._asdict()).model_config(3).parameter_count(),
            dataclasses.replace(self.config, **{**shape._asdict(), "n_layer": shape.n_layer + 1})
            .model_config(3)
            .parameter_count(),
        ]
        return (counts[1] - counts[0]) * shape.n_layer

    def _measure(self, shape: Shape) -> Estimate:
        """Estimate time and memory of a step with a model of this size. The model is not kept."""
        if shape not in self.measured:
            values: dict[str, Any] = {**shape._asdict(), "max_steps": 1000, "warmup_steps": 1}
            self.measured[shape] = estimate(Trainer(dataclasses.replace(self.config, **values), self.data))
        return self.measured[shape]

    def _that_fits(self, shape: Shape, shapes: list[Shape]) -> Shape:
        """Return the largest size in `shapes` that fits into memory and is not larger than `shape`."""
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

    # -- options that the user left open ---------------------------------------------------------------------

    def _with_family(self, config: TrainConfig) -> TrainConfig:
        """Change to the recommended model family, unless the user's options require another one.

        The recommended family reaches a lower loss in the same time (LOG.md). If the family changes, options
        that only the old family has are reset. If the family stays, each option in `_SIZES` (such as
        head_dim) that the user did not give is set to 0. It is then computed later, from n_embd and n_head.
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

    def _with_lengths(self, config: TrainConfig, data: AnyData) -> tuple[TrainConfig, AnyData]:
        """Increase max_length so that at most one example in a hundred is cut, but never above 1,024 tokens.

        If the user gave max_length or block_size, nothing changes.
        """
        if isinstance(data, TextData):
            self.why.append(("block_size", config.block_size, self._whose("block_size")))
            return config, data
        cut = (data.train.n_cut + data.train.n_without_answer) / len(data.train)
        given = {"max_length", "block_size"} & self.given
        if cut > _CUT and not given:
            all_of_it = _read_again(dataclasses.replace(config, max_length=_LONGEST, block_size=_LONGEST))
            assert isinstance(all_of_it, RunData)
            wanted = 32 * math.ceil(float(np.quantile(all_of_it.train.lengths, 1 - _CUT)) / 32)
            wanted = max(config.max_length, min(_LONGEST, wanted))
            why = say("{length} would cut {cut:.0%} of the pairs", length=config.max_length, cut=cut)
            self.why.append(("max_length", wanted, why))
            config = dataclasses.replace(config, max_length=wanted, block_size=max(wanted, config.block_size))
            return config, _read_again(config)
        why = say("given") if given else say("the recipe's: {cut:.1%} of the pairs are longer", cut=cut)
        self.why.append(("max_length", config.max_length, why))
        return config, data

    def _whose(self, name: str) -> str:
        return say("given") if name in self.given else say("the recipe's")

    def _shapes(self) -> list[Shape]:
        """Return the model sizes to choose from, smallest first.

        If the user gave n_layer, n_embd or n_head, all sizes have the given value.
        """
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
        if "warmup_steps" not in self.given:
            # limit the warm-up to a tenth of the steps
            values["warmup_steps"] = min(self.config.warmup_steps, math.ceil(steps / 10))
        return dataclasses.replace(self.config, **values)

    def _print(self, settings: TrainConfig, shapes: int, record: dict[str, Any]) -> None:
        by_name, because = self.size.unit == "name", record["because"]
        shape = (
            say("what {size} means", size=self.size.text)
            if by_name
            else say(
                "the largest of {shapes} shapes that reads {tokens} tokens a parameter",
                shapes=shapes,
                tokens=_TOKENS_PER_PARAMETER,
            )
        )
        steps = say("what the time allows") if self.size.unit == "seconds" else say("what the amount allows")
        if by_name:
            steps = say("{tokens} tokens a parameter, or what the data gives", tokens=_TOKENS_OF_A_NAME)
        if because["limited_by_data"]:
            steps = say("reads the data {epochs:g} times; more would gain little", epochs=because["epochs"])
        rows = list(self.why)
        for name, why in (
            *((name, shape) for name in Shape._fields),
            (
                "batch_size",
                say("the recipe's: about {tokens:,.0f} tokens a step", tokens=self.unique / self.per_epoch),
            ),
            *((name, say("the recipe's")) for name in ("optimizer", "learning_rate", "muon_learning_rate")),
            ("max_steps", say("given") if _STEPS & self.given else steps),
            ("eval_steps", say("evaluations take a tenth of the budget at most")),
        ):
            if settings.optimizer == "muon" or name != "muon_learning_rate":
                rows.append((name, getattr(settings, name), say("given") if name in self.given else why))
        table(f"--size {self.size.text}", ("option", "value", "why"), rows, numeric=(1,))
        text = "{unique:,} tokens to learn from, read {epochs:.1f} times"
        print(say(text, unique=self.unique, epochs=because["epochs"]))
        if because["epochs"] < 1 and not by_name:
            again = math.ceil(10 / max(because["epochs"], 1e-3)) / 10
            text = (
                "more data than --size {size} can read: a part is left out; {again:g} times the size reads "
                "all of it once"
            )
            print(say(text, size=self.size.text, again=again))
        if replaced := self._replaced(settings):
            text = "--size replaces the recipe's {options}; a flag keeps its value"
            print(say(text, options=", ".join(replaced)))
        if (expected := record["expected"]["seconds"]) is not None:
            print(say("expected: about {time} on this machine as busy as it is now", time=seconds(expected)))

    def _replaced(self, settings: TrainConfig) -> list[str]:
        """Return the recipe's options that --size has changed, each as a text "name=old value"."""
        names = [*Shape._fields, "max_length", "block_size", "max_steps", "eval_steps", "warmup_steps"]
        before = [(name, getattr(self.before, name), getattr(settings, name)) for name in names]
        found = [f"{name}={old}" for name, old, new in before if old != new and name not in self.given]
        epochs = f"num_train_epochs={self.before.num_train_epochs:g}"
        return [epochs if one == "max_steps=0" else one for one in found if one != "eval_steps=0"]


def free_memory(config: TrainConfig) -> float:
    """Return the free memory of the device in bytes, or infinity if it is unknown."""
    device = pick_device(config.device)
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        found = dict(line.split(":") for line in read_text("/proc/meminfo", "ascii").splitlines())
        return float(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return math.inf


# -- the record of a run -------------------------------------------------------------------------------------


def compare(record: dict[str, Any], result: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Add the real loss and time of a finished run to the record that autosize made for it.

    Args:
        record: from `decide` or `read_record`.
        result: from `Trainer.run`.

    Returns: the record, and a sentence that compares real and expected time.
    """
    got = {"val_loss": result["val_loss"], "seconds": result["seconds"]}
    expected = record["expected"]["seconds"]
    if not expected:
        return {**record, "got": got}, "no time was expected that could be compared"
    off = got["seconds"] / expected - 1
    said = f"expected {seconds(expected)}, got {seconds(got['seconds'])} ({off:+.0%})"
    return {**record, "got": got}, said


def read_record(output: Path) -> dict[str, Any] | None:
    """Read from run.json what autosize chose, why, and the expected time. None: it is missing or invalid."""
    try:
        record = read_json(output / RUN_FILE)[RECORD]
        expected = record["expected"]["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_sound = expected is None or (type(expected) in (int, float) and 0 <= expected < math.inf)
    return dict(record) if is_sound else None


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write into run.json what autosize chose, why, and the expected time. An older record is replaced."""
    path = output / RUN_FILE
    written = {**read_json(path), RECORD: record}
    atomic_write(path, json_text(written, indent=2) + "\n")
