"""Reads the files that a run wrote. Lines that cannot be read are counted, and do not raise an error.

    record = read_record(Path("output"))
    record.train[-1].loss, record.val[-1].loss, record.total_steps

The files are run.json, metrics.jsonl, and the newest checkpoint's training_state.json and config.json: some
kilobytes of JSON, no weights. A missing or invalid number becomes nan, so that checks need not test for it.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.errors import InputError
from minigpt.storage.json_files import parse_json, read_json
from minigpt.training.config import RUN_FILE, TrainConfig

__all__ = ["Event", "RunRecord", "TrainPoint", "ValPoint", "read_record"]


@dataclass(frozen=True)
class TrainPoint:
    """A line of metrics.jsonl about training."""

    step: int
    loss: float  # mean loss per counted token since the previous line of metrics, in nats
    grad_norm: float = math.nan  # gradient norm before clipping
    learning_rate: float = math.nan
    epoch: float = math.nan  # number of passes over the data so far
    tokens_per_second: float = math.nan  # mean speed since the process began
    seconds: float = math.nan


@dataclass(frozen=True)
class ValPoint:
    """A line of metrics.jsonl about an evaluation."""

    step: int
    loss: float  # mean loss of the tokens that the training counts
    # mean loss of answers; nan: no answer token was counted; None: not recorded
    answer_loss: float | None = None


@dataclass(frozen=True)
class Event:
    """An event at a step: "skipped", "spike" or "rollback"."""

    step: int
    kind: str
    loss: float = math.nan


@dataclass(frozen=True)
class RunRecord:
    """The record of a run. Points are ordered by step. If a step has two lines, the later one counts."""

    folder: Path
    config: TrainConfig
    train: list[TrainPoint] = field(default_factory=list)
    val: list[ValPoint] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    broken_lines: int = 0  # number of lines in metrics.jsonl that are not a JSON object with a step
    non_finite: int = 0  # number of lines whose loss or gradient norm is not finite
    first_non_finite: int = 0  # step of the first line whose loss or gradient norm is not finite
    # content of training_state.json; empty without a checkpoint
    state: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 0  # vocabulary size; 0 if unknown

    @property
    def steps_done(self) -> int:
        """The last step in the metrics or in the newest checkpoint."""
        seen = [*(point.step for point in self.train[-1:]), *(point.step for point in self.val[-1:])]
        return max([*seen, _whole(self.state.get("steps_done"))])

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run; 0 if unknown."""
        return _whole(self.state.get("total_steps")) or self.config.max_steps

    @property
    def is_finished(self) -> bool:
        """True if all steps are done."""
        return 0 < self.total_steps <= self.steps_done

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the encoded data and of the vocabulary. Keys as in training_state.json."""
        names = ("train_fingerprint", "val_fingerprint", "vocabulary_fingerprint")
        return {name: str(self.state[name]) for name in names if self.state.get(name)}


def read_record(folder: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        InputError: if the folder does not exist or holds no run; if the run's options cannot be read.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            f"{folder} {what}; give the folder of a run: `minigpt train --output FOLDER` makes it"
        )
    newest = _newest_checkpoint(folder)
    state = {} if newest is None else _json_object(newest / "training_state.json")
    values = _settings(folder, state)
    train: dict[int, TrainPoint] = {}
    val: dict[int, ValPoint] = {}
    events, bad_steps, broken = [], set(), 0
    for line in _lines(folder / "metrics.jsonl"):
        step = _whole(line.get("step"))
        if not step:
            broken += 1
            continue
        if "event" in line:
            events.append(Event(step, str(line["event"]), _number(line.get("loss"))))
            continue
        if any(name in line and not math.isfinite(_number(line[name])) for name in _MUST_BE_FINITE):
            bad_steps.add(step)
        if "train_loss" in line:
            names = [item.name for item in dataclasses.fields(TrainPoint)][2:]
            rest = {name: _number(line.get(name)) for name in names}
            train[step] = TrainPoint(step, _number(line["train_loss"]), **rest)
        if "val_loss" in line:
            answers = _number(line["val_answer_loss"]) if "val_answer_loss" in line else None
            val[step] = ValPoint(step, _number(line["val_loss"]), answers)
    return RunRecord(
        folder=folder,
        config=values,
        train=[train[step] for step in sorted(train)],
        val=[val[step] for step in sorted(val)],
        events=events,
        broken_lines=broken,
        non_finite=len(bad_steps),
        first_non_finite=min(bad_steps, default=0),
        state=state,
        vocab_size=0 if newest is None else _whole(_json_object(newest / "config.json").get("vocab_size")),
    )


_MUST_BE_FINITE = ("train_loss", "val_loss", "grad_norm")


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose state can be read. (Names of eight digits sort by step.)"""
    for path in sorted(folder.glob("step-????????/training_state.json"), reverse=True):
        if _json_object(path):
            return path.parent
    return None


def _settings(folder: Path, state: dict[str, Any]) -> TrainConfig:
    """Read the run's options from run.json, or else from its newest checkpoint.

    Unknown options are ignored, and a value of a wrong type is replaced by the default. (A resume is
    stricter, because it must be exact.)
    """
    written = _json_object(folder / RUN_FILE).get("config", state.get("config"))
    if not isinstance(written, dict):
        if (folder.parent / RUN_FILE).is_file():
            raise InputError(f"{folder} is a checkpoint; give its run's folder: {folder.parent}")
        what = "is damaged" if (folder / RUN_FILE).exists() else f"holds no {RUN_FILE}"
        raise InputError(f"{folder} {what}: not a run that `minigpt train` began, or not any more")
    usual, hints = TrainConfig(), typing.get_type_hints(TrainConfig)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(TrainConfig):
        value, default = written.get(item.name), getattr(usual, item.name)
        if isinstance(value, str) and hints[item.name] in (Path, Path | None):
            value = Path(value)
        elif type(default) is float and type(value) is int:
            value = float(value)
        of_its_type = type(value) is type(default) or type(value) in typing.get_args(hints[item.name])
        if of_its_type or isinstance(value, Path):
            values[item.name] = value
    try:
        return TrainConfig(**{**values, "resume": False, "overwrite": False, "output": folder})
    except InputError as error:
        raise InputError(f"{folder / RUN_FILE}: {error}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file. A line that is no object gives {}; a missing file gives []."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [_object(line) for line in lines if line.strip()]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError:
        return {}


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number else math.nan  # type: ignore[arg-type]
    except OverflowError:  # the integer is too large for a Python float
        return math.nan


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
