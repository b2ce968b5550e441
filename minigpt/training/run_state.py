"""The progress of a run, the part of a checkpoint that is JSON, and what has changed when a run is resumed.

A resume is exact when everything that decides the rest of the run is in the checkpoint, or the same as then.
A difference is refused, or named in one line each: "changed on resume: seed 42 -> 7".
"""

import dataclasses
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import minigpt
from minigpt.errors import InputError
from minigpt.training.config import PER_CALL, TrainConfig
from minigpt.training.run_data import RunData, TextData

__all__ = ["BatchSize", "Changes", "Progress", "StepMetrics", "changes", "spike_threshold", "training_state"]

# fields that change nothing about the training itself: not worth a line when they differ
_WITHOUT_EFFECT = {*PER_CALL, "output", "resume", "recipe", "strict", "device", "threads", "workers"} | {
    "save_async",
    "on_save_error",
    "save_total_limit",
    "report_to",
    "gradient_checkpointing",
}
# What makes other examples of the same files.
_DECIDES_DATA = ("max_length", "block_size", "val_fraction", "encoding", "text_field", "document_separator")
_RECENT = 64  # losses that the next one is compared with
_FEWEST = 16  # fewer say little about what is usual
_SIGMAS = 6.0  # of a normal distribution one value in a billion lies beyond
_FLOOR = 0.02  # of the median: once a loss hardly moves at all, its noise must not count as spikes
_VISIBLE = 0.1  # nats: when all is learned but a few hard examples, each of them would stand out


class BatchSize(NamedTuple):
    """How much a batch is."""

    tokens: int  # targets that are no padding
    counted: int  # targets that the loss counts
    width: int  # T


class StepMetrics(NamedTuple):
    """The numbers of one finished or skipped step."""

    step: int  # from 1
    learning_rate: float
    loss: float  # per target that counts
    grad_norm: float  # before clipping
    loss_scale: float | None  # of float16
    is_finite: bool  # else the step was skipped
    is_overflow: bool  # too large for float16 alone: its scale is halved, nothing is wrong
    bad_steps: int  # in a row, up to this one
    spike_threshold: float  # a higher loss stands out from those before


@dataclass
class Progress:
    """The progress of a run: all of its state besides weights, optimiser and random generators."""

    steps_done: int = 0  # skipped ones count; the batches of a step follow from its number alone
    tokens_seen: int = 0  # tokens that are no padding and whose gradient reached the weights
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
    loss_scale: list[float] = field(default_factory=list)  # of float16: LossScale.state

    def record(
        self, step: int, learning_rate: float, tokens: int, numbers: Sequence[float], has_scale: bool
    ) -> StepMetrics:
        """Count a step, whose `numbers` are loss, length of the gradient, and the loss's scale."""
        loss, norm, scale = numbers
        threshold = spike_threshold(self.recent_losses)
        is_finite = all(map(math.isfinite, numbers))
        is_overflow = not math.isfinite(norm) and math.isfinite(loss) and scale > 1
        if is_finite:
            self.tokens_seen += tokens
            self.bad_steps = 0
        else:
            self.bad_steps += not is_overflow
            self.skip(step, step)
        if is_finite or is_overflow:
            self.loss_sum += loss
            self.loss_steps += 1
            self.recent_losses = [*self.recent_losses, loss][-_RECENT:]
        return StepMetrics(
            step=step,
            learning_rate=learning_rate,
            loss=loss,
            grad_norm=norm,
            loss_scale=scale if has_scale else None,
            is_finite=is_finite,
            is_overflow=is_overflow,
            bad_steps=self.bad_steps,
            spike_threshold=threshold,
        )

    def skip(self, first: int, last: int) -> None:
        """Record that the steps from `first` to `last` left no trace in the weights."""
        before = [window for window in self.skipped if window[1] < first - 1]
        joined = [window for window in self.skipped if window[1] >= first - 1]
        self.skipped = [*before, [min([first, *(w[0] for w in joined)]), last]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        best = self.best_val_loss if math.isfinite(self.best_val_loss) else None
        return {**dataclasses.asdict(self), "best_val_loss": best}

    def load(self, state: dict[str, Any]) -> None:
        """Put back the content of a training_state.json; what an earlier version did not write stays."""
        for item in dataclasses.fields(self):
            if item.name in state:
                setattr(self, item.name, state[item.name])
        if self.best_val_loss is None:
            self.best_val_loss = math.inf


def spike_threshold(losses: Sequence[float]) -> float:
    """The loss above which a step stands out: 6 sigma above the loss that one in 16 recent ones exceeds.

    Mean and standard deviation would be pulled up by the very spikes that they are to find. That bound and
    the median distance from the median (times 1.4826: sigma, for normal noise) are not. The median itself is
    not the base, because batches are unlike: the few of long or hard answers have a higher loss each time
    that they come. A falling loss widens the bound. Less than 0.1 nats above it is no spike.

    >>> spike_threshold([2.0, 2.2] * 8)  # 2.2 + 6 * 1.4826 * 0.1
    3.08956
    >>> spike_threshold([0.01] * 16)
    0.11
    >>> spike_threshold([2.0] * 3)
    inf
    """
    if len(losses) < _FEWEST:
        return math.inf
    middle, high = statistics.median(losses), sorted(losses)[-1 - len(losses) // 16]
    sigma = 1.4826 * statistics.median(abs(loss - middle) for loss in losses)
    return round(high + max(_SIGMAS * sigma, _SIGMAS * _FLOOR * abs(middle), _VISIBLE), 9)


def training_state(
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
    """The facts that change a run's rounding, besides its configuration and its data."""
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
    """What has changed since a checkpoint was written."""

    settings: list[str]  # "seed 42 -> 7": another run from here on
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
    """Compare a checkpoint's training_state.json with the run that resumes from it.

    Raises:
        InputError: if the vocabulary has changed; or the data, without --allow_changed_data.
    """
    named = []
    changed = [(key, what) for key, value, what in _fingerprints(config, data) if state[key] != value]
    changed.sort(key=lambda one: one[0] != "vocabulary_fingerprint")  # with it the ids of all data change
    options = config.as_dict()
    cut = [
        f"--{key} {state['config'][key]}"
        for key in _DECIDES_DATA
        if key in options and state["config"].get(key, options[key]) != options[key]
    ]
    for key, what in changed:
        if key == "vocabulary_fingerprint":
            raise InputError(
                f"{folder} was made with another {what}: its weights know other ids; give that run's "
                "vocabulary, or train anew"
            )
        if not config.allow_changed_data and cut:
            raise InputError(
                f"{folder} was made with {', '.join(cut)}, which gives other examples: give that again, "
                "train anew, or continue with the new ones: --allow_changed_data"
            )
        if not config.allow_changed_data:
            raise InputError(
                f"{folder} was made with another {what}; give that run's files, train anew, or continue with "
                "the new ones: --allow_changed_data"
            )
        order = "; from here on the order is that of the new data" if key == "train_fingerprint" else ""
        named.append(f"the {what} is another one (--allow_changed_data){order}")
    was = {"processes": 1, **state}
    now = {**config.as_dict(), "total_steps": total_steps}
    before = {**state["config"], "total_steps": state["total_steps"]}
    for key in [key for key in now if key in before and key not in _WITHOUT_EFFECT]:
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
