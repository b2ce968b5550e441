"""Where a run stands, what of it a checkpoint remembers, and what has changed when it goes on.

A resume is exact when everything that decides the rest of the run is in the checkpoint or the same as then.
What is not the same is refused, or named in one line each: "changed on resume: seed 42 -> 7".
"""

import dataclasses
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import minigpt
from minigpt.errors import InputError
from minigpt.training.config import PER_CALL, TrainConfig
from minigpt.training.non_finite import RECENT
from minigpt.training.run_data import RunData, TextData

__all__ = ["Progress", "changes", "described"]

# fields that change nothing about the training itself: not worth a line when they differ
_OF_NO_EFFECT = {*PER_CALL, "output", "resume", "recipe", "strict", "device", "threads", "workers"} | {
    "save_async",
    "on_save_error",
    "save_total_limit",
    "report_to",
    "gradient_checkpointing",
}


@dataclass
class Progress:
    """Where a run stands, besides weights, optimiser and random state."""

    steps_done: int = 0  # the cursor: batches of a step follow from its number alone
    tokens_seen: int = 0  # real tokens that went through the model
    best_val_loss: float = math.inf
    best_step: int = 0
    evaluated: bool = True  # False: an evaluation that is due at this step has not been done
    loss_sum: float = 0.0  # since the last line of metrics
    loss_steps: int = 0
    train_seconds: float = 0.0
    bad_steps: int = 0  # in a row, up to now
    rollbacks: int = 0
    skipped: list[list[int]] = field(default_factory=list)  # [first, last] steps that left no trace
    recent_losses: list[float] = field(default_factory=list)
    loss_scale: list[float] = field(default_factory=list)  # of float16: machine.LossScale.state

    def add_loss(self, loss: float) -> None:
        """Count a step's loss, for the next line of metrics and for judging the next losses."""
        self.loss_sum += loss
        self.loss_steps += 1
        self.recent_losses = [*self.recent_losses, loss][-RECENT:]

    def skip(self, first: int, last: int) -> None:
        """Write down that the steps from `first` to `last` left no trace in the weights."""
        before = [window for window in self.skipped if window[1] < first - 1]
        joined = [window for window in self.skipped if window[1] >= first - 1]
        self.skipped = [*before, [min([first, *(w[0] for w in joined)]), last]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        best = self.best_val_loss if math.isfinite(self.best_val_loss) else None
        return {**dataclasses.asdict(self), "best_val_loss": best}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Progress":
        """From a training_state.json; what an earlier version did not write yet has its default."""
        known = {item.name for item in dataclasses.fields(cls)} & state.keys()
        values = {name: state[name] for name in known}
        if values.get("best_val_loss", 0) is None:
            values["best_val_loss"] = math.inf
        return cls(**values)


def described(
    config: TrainConfig,
    data: RunData | TextData,
    device: torch.device,
    total_steps: int,
    progress: Progress,
    processes: int = 1,
) -> dict[str, Any]:
    """The contents of training_state.json."""
    return {
        "minigpt": minigpt.__version__,
        "platform": platform.platform(),
        **surroundings(device, processes),
        "total_steps": total_steps,
        **progress.as_dict(),
        **{key: fingerprint for key, fingerprint, _ in _fingerprints(config, data)},
        "config": config.as_dict(),
    }


def surroundings(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What the bits depend on besides the configuration and the data."""
    here = {"torch": str(torch.__version__), "device": device.type, "threads": torch.get_num_threads()}
    return {**here, "processes": processes}


def _fingerprints(config: TrainConfig, data: RunData | TextData) -> list[tuple[str, str, str]]:
    train, val, vocabulary = data.names(config)
    return [
        ("train_fingerprint", data.train.fingerprint, f"training data ({train})"),
        ("val_fingerprint", data.val.fingerprint, f"validation data ({val})"),
        ("vocabulary_fingerprint", data.tokenizer.fingerprint, f"vocabulary ({vocabulary})"),
    ]


@dataclass
class Changes:
    """What is not as it was when a checkpoint was written."""

    settings: list[str]  # "seed 42 -> 7": the run goes on as it would not have
    rounding: list[str]  # the same run, but sums are rounded differently
    validation_data: bool  # losses before and after cannot be compared


def changes(
    state: dict[str, Any],
    config: TrainConfig,
    data: RunData | TextData,
    device: torch.device,
    total_steps: int,
    folder: Path,
    processes: int = 1,
) -> Changes:
    """Compare a checkpoint's training_state.json with the run that is to go on from it.

    Raises:
        InputError: if the vocabulary is another one; or the data, without --allow_changed_data.
    """
    named = []
    changed = [(key, what) for key, value, what in _fingerprints(config, data) if state[key] != value]
    for key, what in changed:
        if key == "vocabulary_fingerprint":
            raise InputError(
                f"{folder} was made with another {what}: its weights know other ids; give that run's "
                "vocabulary, or train anew"
            )
        if not config.allow_changed_data:
            raise InputError(
                f"{folder} was made with another {what}; give that run's files, train anew, or go on with "
                "the new ones: --allow_changed_data"
            )
        order = "; from here on the order is that of the new data" if key == "train_fingerprint" else ""
        named.append(f"the {what} is another one (--allow_changed_data){order}")
    was = {"processes": 1, **state}
    now = {**config.as_dict(), "total_steps": total_steps}
    before = {**state["config"], "total_steps": state["total_steps"]}
    for key in [key for key in now if key in before and key not in _OF_NO_EFFECT]:
        if before[key] != now[key]:
            note = " (the learning rate's schedule is another one)" if key == "total_steps" else ""
            named.append(f"{key} {before[key]} -> {now[key]}{note}")
    return Changes(
        settings=named,
        rounding=[
            f"{key} was {was[key]} before, is {value} now: sums are rounded differently"
            + (
                ", dropout draws other numbers; the order of the data is the same"
                if key == "processes"
                else ""
            )
            for key, value in surroundings(device, processes).items()
            if was.get(key, value) != value
        ],
        validation_data=any(key == "val_fingerprint" for key, _ in changed),
    )
