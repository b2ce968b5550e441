"""One dial: `minigpt train --size 10min` chooses model, steps and evaluations from the data and the machine.

    minigpt train --size 10min
    minigpt train --size base --text book.txt --dry_run

Facts come from `minigpt.training.measuring`; `minigpt.training.sizing` turns them into a plan. Rates,
schedule, optimiser and batches are the recipe's. A flag that the user gave stays as it is, and the plan is
made around it. What was expected is written into run.json, and at the end what came.
"""

import dataclasses
import json
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.console.terminal import seconds, table
from minigpt.errors import InputError
from minigpt.storage.files import atomic_write
from minigpt.training import sizing
from minigpt.training.config import FOREIGN_KNOBS, RUN_FILE, TrainConfig
from minigpt.training.distributed import Processes
from minigpt.training.measuring import Machine, estimates, facts_of, free_memory
from minigpt.training.run_data import RunData, TextData, read_data
from minigpt.training.sizing import Candidate, Facts, Plan, Shape, Size

__all__ = ["RECORD", "Decision", "check_flags", "compare", "decide", "read_record", "write_record"]

RECORD = "size"  # the key of run.json
_SHARE = 0.05  # of a budget of time that measuring may take, or
_MEASURING = 5.0  # seconds, where that is more
_FIRST = 2  # the place on the ladder of the shape that is measured first
_MEMORY = 0.8  # share of the free memory that a run may fill
_CUT = 0.01  # where more pairs than this are cut at max_length, a longer one is chosen
_LONGEST = 1024  # ... up to this many tokens
_SIZES = ("num_key_value_heads", "head_dim", "intermediate_size")  # 0: what follows from width and heads
_STEPS = {"max_steps", "num_train_epochs"}

Why = list[tuple[str, object, str]]  # knob, value, reason


@dataclass(frozen=True)
class Decision:
    """The configuration that the dial has made, its data, and what is written down about it."""

    config: TrainConfig
    data: RunData | TextData
    record: dict[str, Any]  # JSON-ready: asked, chosen, because, expected


def check_flags(config: TrainConfig, given: Collection[str]) -> None:
    """See that no flag decides what the dial is to decide.

    Raises:
        InputError: naming both.
    """
    by_name = sizing.parse_size(config.size).unit == "name"
    for name in sorted(_STEPS & set(given)):
        if not by_name:
            raise InputError(
                f"--size {config.size} decides the number of steps, --{name} too: give one of them"
            )


def decide(
    config: TrainConfig, data: RunData | TextData, given: Collection[str], processes: Processes
) -> Decision:
    """Turn the dial: choose what `given` leaves open, print it and why. Of several processes the first does.

    Args:
        config: the recipe with the user's flags.
        data: what `config` reads.
        given: names of the flags on the command line.
        processes: all of them.

    Raises:
        InputError: if the budget is too small, nothing fits into memory, or flags leave no model; for a time
            and several processes: one alone cannot measure how fast they are together.
    """
    started = time.perf_counter()
    size = sizing.parse_size(config.size)
    check_flags(config, given)
    if processes.size > 1 and size.unit == "seconds":
        raise InputError(
            f"--size {config.size} is a time, and one process cannot measure how fast {processes.size} are "
            "together: give small, base, large or an amount of arithmetic (2e6GFLOP)"
        )
    decided: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    with processes.shared_errors():
        if processes.is_main:
            decided = _Turn(config, data, given, size, started, alone=processes.size == 1).decide()
    changes, record = processes.broadcast(json.loads(json.dumps(decided)))
    chosen = dataclasses.replace(config, **changes)
    if (config.max_length, config.block_size) != (chosen.max_length, chosen.block_size):
        with processes.main_first():
            data = read_data(chosen)
    return Decision(chosen, data, record)


class _Turn:
    """One turn of the dial."""

    def __init__(
        self,
        config: TrainConfig,
        data: RunData | TextData,
        given: Collection[str],
        size: Size,
        started: float,
        alone: bool,
    ) -> None:
        self.before, self.given, self.size, self.alone = config, set(given), size, alone
        self.started, self.spent = started, 0.0
        self.why: Why = []
        self.config = self._with_family(config)
        self.config, self.data = self._with_lengths(self.config, data)
        self.facts = facts_of(self.config, self.data)
        self.machine = Machine(self.config, self.data)
        self.steps = 0
        if self.size.unit == "name" and _STEPS & self.given:
            per_epoch = len(self.data.plan(config)) / config.gradient_accumulation_steps
            self.steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * per_epoch))

    def decide(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Changes of the configuration, and the record."""
        candidates = (
            self._measured()
            if self.size.unit == "seconds"
            else list(map(self.machine.counted, self._shapes()))
        )
        plan, memory = self._that_fits(candidates)
        duration: float | None = plan.cost
        if self.size.unit != "seconds":
            duration = self._duration(plan) if self.alone else None
        settings = self._settings(plan)
        record = _record(self.size, plan, self.facts, duration, memory)
        self._print(plan, settings, record)
        before, after = self.before.as_dict(), settings.as_dict()
        return {key: value for key, value in after.items() if value != before[key]}, record

    def _choose(self, candidates: list[Candidate]) -> Plan | None:
        budget = self.size.amount - self.spent
        return sizing.choose(self.size, budget, self.facts, candidates, self.steps)

    def _measured(self) -> list[Candidate]:
        """Shapes with what they cost here: the one that seems best is measured, until it is one that was.

        The others' costs are estimated from their FLOPs, at the speed of the nearest shape that was measured.
        """
        counted = [self.machine.counted(shape) for shape in self._shapes()]
        measured: dict[Shape, Candidate] = {}
        seems_best = counted[min(_FIRST, len(counted) - 1)].shape
        began = time.perf_counter()
        while seems_best not in measured:
            measured[seems_best] = self.machine.measured(seems_best)
            now = time.perf_counter()
            self.spent = now - self.started
            if now - began > max(_MEASURING, _SHARE * self.size.amount):
                break
            plan = self._choose(estimates(counted, measured))
            if plan is None:
                break
            seems_best = plan.shape
        return [measured[c.shape] for c in counted if c.shape in measured]

    def _that_fits(self, candidates: list[Candidate]) -> tuple[Plan, int]:
        """The best plan that the memory holds, and the bytes that it needs."""
        free = free_memory(self.config)
        while plan := self._choose(candidates):
            memory = self.machine.memory(plan.shape)
            if memory <= _MEMORY * free:
                return plan, memory
            smaller = [c for c in candidates if c.parameters < plan.parameters]
            if not smaller:
                raise InputError(
                    f"--size {self.size.text}: a model of {plan.shape} needs {memory / 2**30:.1f} GiB, and "
                    f"{free / 2**30:.1f} are free: lower --batch_size or ask for a smaller size"
                )
            candidates = smaller
        raise InputError(self._too_small(candidates))

    def _too_small(self, candidates: list[Candidate]) -> str:
        steps, size = min(sizing.LEAST_STEPS, sizing.most_steps(self.facts)), self.size
        least = min(c.step * steps + c.evaluation / sizing.EVALUATION_SHARE for c in candidates)
        if size.unit == "seconds":
            return (
                f"--size {size.text} is too short: measuring takes {self.spent:.1f} s, {steps} steps and an "
                f"evaluation {least:.1f} s more; give at least {math.ceil(1.2 * (least + self.spent))}s"
            )
        return (
            f"--size {size.text} is too little for {steps} steps of the smallest model; give at least "
            f"{math.ceil(1.1 * least / 1e9)}GFLOP"
        )

    def _duration(self, plan: Plan) -> float:
        measured = self.machine.measured(plan.shape)
        return plan.steps * measured.step + math.ceil(plan.steps / plan.eval_steps) * measured.evaluation

    # -- what the flags leave open ---------------------------------------------------------------------------

    def _with_family(self, config: TrainConfig) -> TrainConfig:
        """Qwen3, ahead of GPT at equal parameters and time (LOG.md), unless the flags want a GPT.

        Sizes that the recipe fits to its own model go: other ones are chosen here.
        """
        wanted = [name for name in FOREIGN_KNOBS["qwen3"] if name in self.given]
        own = {name: 0 for name in _SIZES if name not in self.given}
        if config.family == "qwen3" or wanted or {"family", "recipe"} & self.given:
            why = f"{', '.join(wanted)}: a knob of gpt" if wanted else self._whose("family")
            self.why.append(("family", config.family, why))
            return dataclasses.replace(config, **own)  # type: ignore[arg-type]
        self.why.append(("family", "qwen3", "lower loss than gpt after equal time"))
        values: dict[str, Any] = {**FOREIGN_KNOBS["qwen3"], "family": "qwen3"}
        return dataclasses.replace(config, **values)

    def _with_lengths(
        self, config: TrainConfig, data: RunData | TextData
    ) -> tuple[TrainConfig, RunData | TextData]:
        """A max_length that cuts one pair of a hundred at most."""
        if isinstance(data, TextData):
            self.why.append(("block_size", config.block_size, self._whose("block_size")))
            return config, data
        cut = (data.train.n_cut + data.train.n_without_answer) / len(data.train)
        given = {"max_length", "block_size"} & self.given
        if cut > _CUT and not given:
            longest = dataclasses.replace(config, max_length=_LONGEST, block_size=_LONGEST)
            all_of_it = read_data(longest)
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
        """The ladder's, or the name's, with the layers, channels and heads that were given."""
        fixed = {
            name: getattr(self.config, name) for name in ("n_layer", "n_embd", "n_head") if name in self.given
        }
        by_name = self.size.unit == "name"
        found: dict[Shape, None] = {}
        complaint: InputError | None = None
        for rung in [sizing.NAMED[self.size.text]] if by_name else sizing.LADDER:
            shape = dataclasses.replace(rung, **fixed)
            if "n_embd" in fixed and "n_head" not in fixed:
                shape = dataclasses.replace(shape, n_head=sizing.heads(shape.n_embd))
            try:
                settings = dataclasses.replace(self.config, **dataclasses.asdict(shape))
                settings.model_config(self.data.tokenizer.get_vocab_size())
                found[shape] = None
            except InputError as error:
                complaint = error
        if not found:
            assert complaint is not None
            raise complaint
        return list(found)

    def _settings(self, plan: Plan) -> TrainConfig:
        """The plan as knobs."""
        values: dict[str, Any] = dataclasses.asdict(plan.shape)
        if not _STEPS & self.given:
            values["max_steps"] = plan.steps
        if "eval_steps" not in self.given:
            values["eval_steps"] = plan.eval_steps
        if "warmup_steps" not in self.given:  # of a short run a tenth is enough
            values["warmup_steps"] = min(self.config.warmup_steps, math.ceil(plan.steps / 10))
        return dataclasses.replace(self.config, **values)

    # -- what is said ----------------------------------------------------------------------------------------

    def _print(self, plan: Plan, settings: TrainConfig, record: dict[str, Any]) -> None:
        facts, unit = self.facts, self.size.unit
        shape = f"lowest expected loss of {len(self._shapes())} shapes"
        if unit == "name":
            shape = f"what {self.size.text} means"
        steps = "what the time allows" if unit == "seconds" else "what the amount allows"
        if unit == "name":
            steps = "20 tokens a parameter"
        if plan.limited_by_data:
            steps = f"reads the data {facts.epochs:g} times; more would gain little"
        rows = list(self.why)
        for name, why in (
            *((name, shape) for name in ("n_layer", "n_embd", "n_head")),
            ("batch_size", f"the recipe's: about {facts.tokens_per_step:,.0f} tokens a step"),
            *((name, "the recipe's") for name in ("optimizer", "learning_rate", "muon_learning_rate")),
            ("max_steps", "given" if _STEPS & self.given else steps),
            ("eval_steps", "evaluations take a tenth of the budget at most"),
        ):
            if settings.optimizer == "muon" or name != "muon_learning_rate":
                rows.append((name, getattr(settings, name), "given" if name in self.given else why))
        table(f"--size {self.size.text}", ("knob", "value", "why"), rows, numeric=(1,))
        print(
            f"{facts.unique:,} tokens to learn from, read {plan.epochs:.1f} times; n-grams, which are only "
            f"counted, reach a loss of {facts.yardstick:.2f} on the validation part"
        )
        expected = record["expected"]
        print(f"expected: {_loss_sentence(expected)}; {_time_sentence(expected)}")


# -- what is written down, and compared in the end -----------------------------------------------------------


def _record(size: Size, plan: Plan, facts: Facts, duration: float | None, memory: int) -> dict[str, Any]:
    return {
        "asked": size.text,
        "chosen": {
            **dataclasses.asdict(plan.shape),
            "parameters_in_blocks": plan.parameters,
            "steps": plan.steps,
        },
        "because": {
            "tokens_to_learn_from": facts.unique,
            "epochs": round(plan.epochs, 3),
            "n_gram_loss": round(facts.yardstick, 4),
            "limited_by_data": plan.limited_by_data,
        },
        "expected": {
            "val_loss": plan.loss,
            "val_loss_low": plan.low,
            "val_loss_high": plan.high,
            "basis": plan.basis,
            "seconds": duration,
            "memory_bytes": memory,
        },
    }


def _loss_sentence(expected: dict[str, Any]) -> str:
    if expected["val_loss"] is None:
        return f"no number for the loss ({expected['basis']})"
    low, high = expected["val_loss_low"], expected["val_loss_high"]
    return f"validation loss about {expected['val_loss']:.2f}, {low:.2f} to {high:.2f} ({expected['basis']})"


def _time_sentence(expected: dict[str, Any]) -> str:
    if expected["seconds"] is None:
        return "no number for the time (several processes)"
    return f"about {seconds(expected['seconds'])} on this machine as busy as it is now"


def compare(record: dict[str, Any], result: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What came, beside what was expected: the record with `got`, and a sentence.

    Args:
        record: of `decide`, or `read_record`.
        result: of `Trainer.run`.
    """
    expected = record["expected"]
    got = {"val_loss": result["val_loss"], "seconds": result["seconds"]}
    said = []
    if expected["val_loss"] is not None:
        inside = expected["val_loss_low"] <= got["val_loss"] <= expected["val_loss_high"]
        off = got["val_loss"] / expected["val_loss"] - 1
        where = "within the range" if inside else "outside the range"
        said.append(
            f"expected a loss of {expected['val_loss']:.2f}, got {got['val_loss']:.2f} ({off:+.0%}, {where})"
        )
    if expected["seconds"]:
        off = got["seconds"] / expected["seconds"] - 1
        said.append(f"expected {seconds(expected['seconds'])}, got {seconds(got['seconds'])} ({off:+.0%})")
    return {**record, "got": got}, "; ".join(said) or "nothing was expected that could be compared"


def read_record(output: Path) -> dict[str, Any] | None:
    """What the dial wrote into a run's run.json; None if nothing that can be used."""
    try:
        written = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
        record = written[RECORD]
        usable = {"val_loss", "val_loss_low", "val_loss_high", "seconds"} <= set(record["expected"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(record) if usable else None


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Put a record into a run's run.json, in place of an older one."""
    path = output / RUN_FILE
    written = {**json.loads(path.read_text(encoding="utf-8")), RECORD: record}
    atomic_write(path, json.dumps(written, ensure_ascii=False, indent=2) + "\n")
