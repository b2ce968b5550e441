"""Reads the files of a run. Lines that cannot be read are counted and raise no error.

    record = read_record(Path("output"))
    record.train[-1].loss, record.val[-1].loss, record.total_steps

Reads run.json, metrics.jsonl and the newest checkpoint's training_state.json and config.json: some kilobytes
of JSON, no weights. A missing or invalid number becomes nan, so that checks need no special cases.
"""

import dataclasses
import itertools
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.console.command_line import warn
from minigpt.errors import InputError
from minigpt.families.checks import listed
from minigpt.storage.json_files import parse_json, read_json
from minigpt.storage.regular_files import read_bytes
from minigpt.training.config import RUN_FILE, TrainConfig
from minigpt.training.data_summary import DataSummary, read_summary
from minigpt.training.finetune_config import FinetuneConfig

__all__ = ["Event", "RunRecord", "TrainPoint", "ValPoint", "read_record"]


@dataclass(frozen=True)
class TrainPoint:
    """One line of metrics.jsonl about training."""

    step: int
    loss: float  # mean over the steps since the previous line, usually in nats per token
    grad_norm: float = math.nan  # gradient norm before clipping
    learning_rate: float = math.nan
    epoch: float = math.nan  # number of passes over the data so far
    tokens_per_second: float = math.nan  # mean since the start of the process
    seconds: float = math.nan
    # The next two fields are nan, unless the run learns from rewards.
    reward: float = math.nan
    equal_groups: float = math.nan  # share of the prompts whose answers all have the same reward


@dataclass(frozen=True)
class ValPoint:
    """One evaluation."""

    step: int
    # Usually in nats per token. As in training, it is a mean over all tokens or only over tokens of answers.
    loss: float
    # The next four fields are nan, unless the run learns from rewards.
    reward: float = math.nan  # mean over the validation prompts
    exact_match: float = math.nan  # share of the model's answers that equal the answers in the data
    completion_length: float = math.nan  # mean number of tokens of an answer
    clipped_ratio: float = math.nan  # share of the answers that reached the largest number of tokens


@dataclass(frozen=True)
class Event:
    """An event at a step; its kind is "skipped", "spike", "rollback" or "changed"."""

    step: int
    kind: str
    loss: float = math.nan
    what: tuple[str, ...] = ()  # for "changed": sentences about what was changed when the run was resumed


@dataclass(frozen=True)
class RunRecord:
    """The recorded data of a run. `train` and `val` have one point for each recorded step, in order."""

    folder: Path
    config: TrainConfig
    train: list[TrainPoint] = field(default_factory=list)
    val: list[ValPoint] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    broken_lines: int = 0  # number of lines in metrics.jsonl that are not a JSON object with a step
    non_finite: tuple[int, ...] = ()  # steps with a loss or a gradient norm that is not finite
    state: dict[str, Any] = field(default_factory=dict)  # content of training_state.json; {}: no checkpoint
    vocab_size: int = 0  # 0: unknown
    summary: DataSummary | None = None  # summary of the run's data; None: not recorded

    @property
    def lines_every(self) -> int:
        """The least number of steps between two lines with a training loss; 0 with fewer than two lines."""
        return min((b.step - a.step for a, b in itertools.pairwise(self.train)), default=0)

    @property
    def parameters(self) -> int:
        """The number of the model's parameters; 0: unknown."""
        try:
            return self.config.model_config(self.vocab_size).parameter_count() if self.vocab_size else 0
        except InputError:
            return 0

    @property
    def steps_done(self) -> int:
        """The last step that the metrics or the newest checkpoint mention."""
        seen = [*(point.step for point in self.train[-1:]), *(point.step for point in self.val[-1:])]
        return max([*seen, _whole(self.state.get("steps_done"))])

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run; 0: not recorded."""
        return _whole(self.state.get("total_steps")) or self.config.max_steps

    @property
    def is_finished(self) -> bool:
        """True if all steps were done."""
        return 0 < self.total_steps <= self.steps_done

    @property
    def fingerprints(self) -> dict[str, str]:
        """A dict: key of training_state.json ("train_fingerprint", ...) -> SHA-256 of data or vocabulary."""
        names = ("train_fingerprint", "val_fingerprint", "vocabulary_fingerprint")
        return {name: str(self.state[name]) for name in names if self.state.get(name)}


def read_record(folder: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        InputError: if the folder does not exist or holds no run, or the settings cannot be read.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            f"{folder} {what}; give the folder of a run: `minigpt train --output FOLDER` makes it"
        )
    newest = _newest_checkpoint(folder)
    state = {} if newest is None else _json_object(newest / "training_state.json")
    run = _json_object(folder / RUN_FILE)
    values, summary = _settings(folder, run, state), read_summary(run.get("data"))
    vocab_size = 0 if newest is None else _whole(_json_object(newest / "config.json").get("vocab_size"))
    train: dict[int, TrainPoint] = {}
    val: dict[int, ValPoint] = {}
    events, bad_steps, broken = [], set(), 0
    for line in _lines(folder / "metrics.jsonl"):
        step = _whole(line.get("step"))
        if not step and not (
            line.get("step") == 0 and "val_loss" in line
        ):  # step 0 is valid only for an evaluation: it measured the initial weights
            broken += 1
            continue
        if "event" in line:
            changed = line.get("what")
            sentences = tuple(map(str, changed)) if isinstance(changed, list) else ()
            events.append(Event(step, str(line["event"]), _number(line.get("loss")), sentences))
            continue
        if any(name in line and not math.isfinite(_number(line[name])) for name in _MUST_BE_FINITE):
            bad_steps.add(step)
        if "train_loss" in line:
            names = [item.name for item in dataclasses.fields(TrainPoint)][2:]
            rest = {name: _number(line.get(_WRITTEN_AS.get(name, name))) for name in names}
            train[step] = TrainPoint(step, _number(line["train_loss"]), **rest)
        if "val_loss" in line:
            names = [item.name for item in dataclasses.fields(ValPoint)][2:]
            more = {name: _number(line.get(f"val_{name}")) for name in names}
            val[step] = ValPoint(step, _number(line["val_loss"]), **more)
    return RunRecord(
        folder=folder,
        config=values,
        train=[train[step] for step in sorted(train)],
        val=[val[step] for step in sorted(val)],
        events=events,
        broken_lines=broken,
        non_finite=tuple(sorted(bad_steps)),
        state=state,
        vocab_size=vocab_size or (summary.vocab_size if summary else 0),
        summary=summary,
    )


_WRITTEN_AS = {"equal_groups": "frac_reward_zero_std"}
_MUST_BE_FINITE = ("train_loss", "val_loss", "grad_norm")


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose state can be read. (Names such as step-00000100 sort by step.)"""
    for path in sorted(folder.glob("step-????????/training_state.json"), reverse=True):
        if _json_object(path):
            return path.parent
    return None


def _settings(folder: Path, run: dict[str, Any], state: dict[str, Any]) -> TrainConfig:
    """Return the run's settings. They are read from run.json, or else from the newest checkpoint of the run.

    A setting that this version does not know is skipped. A setting with an impossible value gets its default.
    A warning names these settings. (A resume would need all of them, a diagnosis does not.)
    """
    written = run.get("config", state.get("config"))
    if not isinstance(written, dict):
        if (folder.parent / RUN_FILE).is_file():
            raise InputError(f"{folder} is a checkpoint; give its run's folder: {folder.parent}")
        what = "is damaged" if (folder / RUN_FILE).exists() else f"holds no {RUN_FILE}"
        raise InputError(f"{folder} {what}: not a run that `minigpt train` began, or not any more")
    kind = FinetuneConfig if "task" in written else TrainConfig
    usual, hints = kind(), typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        value, default = written.get(item.name), getattr(usual, item.name)
        if isinstance(value, str) and hints[item.name] in (Path, Path | None):
            value = Path(value)
        elif isinstance(value, list) and isinstance(default, tuple):
            value = tuple(value)
        elif hints[item.name] is float and type(value) is int:
            value = float(value)
        choices = _choices(hints[item.name])
        kinds = (type(default), hints[item.name], *typing.get_args(hints[item.name]))
        of_its_type = type(value) in kinds
        if isinstance(value, Path) or (of_its_type and (not choices or value in choices or value is None)):
            values[item.name] = value
    own = {"resume": False, "overwrite": False, "output": folder}
    try:
        found = kind(**{**values, **own})
    except InputError as error:
        problem = str(error)
        values = {name: value for name, value in values.items() if _is_possible(kind, {name: value, **own})}
        try:
            found = kind(**{**values, **own})
        except InputError:  # each value is valid, but their combination is not
            raise InputError(f"{folder / RUN_FILE}: {problem}") from None
    if passed_over := [name for name in written if name not in values and written[name] is not None]:
        warn(f"{folder / RUN_FILE}: passed over, because this minigpt does not know them or their values: "
             f"{listed(passed_over, 8)}")  # fmt: skip
    return found


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the values that a Literal allows; () for other types."""
    members = (hint, *typing.get_args(hint))
    return next((typing.get_args(one) for one in members if typing.get_origin(one) is typing.Literal), ())


def _is_possible(kind: type, values: dict[str, Any]) -> bool:
    try:
        kind(**values)
    except InputError:
        return False
    return True


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; {} for a damaged line. A missing file has no lines."""
    try:
        lines = read_bytes(path).splitlines()
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
    except OverflowError:  # an integer with hundreds of digits is too large for a float
        return math.nan


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
