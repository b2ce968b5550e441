"""The progress of a run, the content of training_state.json, and what has changed when a run is resumed.

A resumed run gives the same bits as an uninterrupted run, if options, data and machine have not changed. A
change that matters is either an error, or is printed: "changed on resume: seed 42 -> 7".
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
from minigpt.training.run_data import AnyData

__all__ = ["BatchSize", "Changes", "Progress", "StepMetrics", "changes", "spike_threshold", "training_state"]

# Options that do not change the training itself. A resume prints nothing if they have changed.
_WITHOUT_EFFECT = {*PER_CALL, "output", "resume", "recipe", "strict", "device", "threads", "workers"} | {
    "save_async",
    "on_save_error",
    "save_total_limit",
    "keep_every",
    "report_to",
    "eval_task",
    "gradient_checkpointing",
}
# Options that decide how the files become examples. If a resumed run gets other examples than before, and
# some of these options have changed, the error message names the changed ones.
_DECIDES_DATA = ("max_length", "block_size", "val_fraction", "encoding", "text_field", "document_separator")
# Options that must not change when a run is resumed. They decide which weights a checkpoint holds, and how
# the model uses these weights.
_FIXED = (
    *("task", "method", "train_only", "base_precision", "r", "use_dora", "bottleneck_size"),
    *("target_modules", "layers_to_transform", "modules_to_save", "problem_type"),
)
# Options that decide which loss an evaluation measures. If one has changed, losses before and after a resume
# cannot be compared.
_MEASURED = (
    *("loss_on", "loss_type", "label_smoothing", "simpo_gamma", "mlm_probability", "whole_words"),
    *("reward", "reward_weights", "reward_regex", "reward_length", "max_completion_length"),
)
_RECENT = 64  # largest number of recent losses with which a loss is compared, to find spikes
_FEWEST = 16  # with fewer recent losses than this, no loss counts as a spike
# A spike is at least this much higher than the usual losses, in standard deviations of the recent losses.
# Normal noise is that high only once in a billion losses.
_SIGMAS = 6.0
# If the standard deviation is below this share of the median loss, this share is used instead. Otherwise,
# small changes of a loss with very little noise would count as spikes.
_FLOOR = 0.02
# A spike is at least this much higher than the usual losses, in nats. Otherwise, late in training, when the
# loss has little noise, each batch of hard examples would count as a spike.
_VISIBLE = 0.1


class BatchSize(NamedTuple):
    """The size of a batch."""

    tokens: int  # number of targets that are not padding
    counted: int  # number of targets that the loss counts
    width: int  # number of tokens in a row (T), padding included


class StepMetrics(NamedTuple):
    """The numbers of one step. The step may have been skipped."""

    step: int  # step number, from 1
    learning_rate: float
    loss: float  # mean loss per counted target
    grad_norm: float  # gradient norm before clipping
    loss_scale: float | None  # float16's loss scale; None for other precisions
    is_finite: bool  # False: loss or gradient is not finite, and the step was skipped
    is_overflow: bool  # True: the gradient overflowed float16. This is normal: the loss scale is halved
    bad_steps: int  # number of bad steps in a row, this step included; overflows of float16 are not counted
    spike_threshold: float  # a loss above this is reported as a spike


@dataclass
class Progress:
    """The progress of a run: its state without weights, optimiser and random generators."""

    steps_done: int = 0  # number of steps done or skipped; the next batches depend only on this
    tokens_seen: int = 0  # number of tokens that have changed the weights; without padding and skipped steps
    best_val_loss: float = math.inf
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)  # metrics of the evaluation at best_step
    evaluated: bool = True  # False: the run has not evaluated since its latest step
    loss_sum: float = 0.0  # sum of the losses since the last line in metrics.jsonl
    loss_steps: int = 0
    # results of the objective's method `step_sums`, added up since the last line in metrics.jsonl
    sums: list[float] = field(default_factory=list)
    train_seconds: float = 0.0
    bad_steps: int = 0  # number of bad steps in a row, up to now; overflows of float16 are not counted
    rollbacks: int = 0
    # ranges of steps that had no effect on the weights, each as [first, last]
    skipped: list[list[int]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    loss_scale: list[float] = field(default_factory=list)  # LossScale.state() for float16, else empty

    def record(
        self,
        step: int,
        learning_rate: float,
        tokens: int,
        numbers: Sequence[float],
        has_scale: bool,
        sums: Sequence[float] = (),
    ) -> StepMetrics:
        """Add a step to the progress.

        Args:
            numbers: loss, gradient norm and loss scale.
            sums: result of the objective's `step_sums` for this step, added over processes.
        """
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
            self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(sums), sums)]
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
        """Record that the steps from `first` to `last` had no effect on the weights."""
        before = [window for window in self.skipped if window[1] < first - 1]
        joined = [window for window in self.skipped if window[1] >= first - 1]
        self.skipped = [*before, [min([first, *(w[0] for w in joined)]), last]]

    def as_dict(self) -> dict[str, Any]:
        """Return the progress as a dict for JSON. Infinity becomes None, because JSON has no infinity."""
        best = self.best_val_loss if math.isfinite(self.best_val_loss) else None
        return {**dataclasses.asdict(self), "best_val_loss": best}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the progress from training_state.json's content. Fields missing there keep their values."""
        for item in dataclasses.fields(self):
            if item.name in state:
                setattr(self, item.name, state[item.name])
        if self.best_val_loss is None:
            self.best_val_loss = math.inf


def spike_threshold(losses: Sequence[float]) -> float:
    """Return the loss above which a step counts as a spike.

    Let q be the loss that only one in 16 recent losses exceeds. The threshold is q plus the largest of these
    numbers: 6 sigma, 0.1 nats, and 12 % of the median loss. sigma is 1.4826 times the median distance of the
    losses from their median. For normal noise, sigma is the standard deviation, but single spikes do not
    change it. The threshold starts at q, not at the median, because a few batches with hard answers always
    have a higher loss.

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
    data: AnyData,
    device: torch.device,
    total_steps: int,
    progress: Progress,
    processes: int = 1,
) -> dict[str, Any]:
    """Return the content of training_state.json."""
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
    """Return facts about the machine that change how sums are rounded: torch, device, threads, processes."""
    here = {"torch": str(torch.__version__), "device": device.type, "threads": torch.get_num_threads()}
    return {**here, "processes": processes}


def _fingerprints(config: TrainConfig, data: AnyData) -> list[tuple[str, str, str]]:
    train, val, vocabulary = data.names(config)
    return [
        ("train_fingerprint", data.train.fingerprint, f"training data ({train})"),
        ("val_fingerprint", data.val.fingerprint, f"validation data ({val})"),
        ("vocabulary_fingerprint", data.tokenizer.fingerprint, f"vocabulary ({vocabulary})"),
    ]


@dataclass
class Changes:
    """What has changed since a checkpoint was written."""

    settings: list[str]  # changed options that affect training, such as "seed 42 -> 7"
    rounding: list[str]  # changes of machine or torch, which only change how sums are rounded
    measure: bool  # True: new validation losses cannot be compared with old ones; data or loss has changed


def changes(
    state: dict[str, Any],
    config: TrainConfig,
    data: AnyData,
    device: torch.device,
    total_steps: int,
    folder: Path,
    processes: int = 1,
) -> Changes:
    """Return what differs between a checkpoint's training_state.json and the run that resumes from it.

    Raises:
        InputError: if the vocabulary has changed; if an option in `_FIXED` has changed; or if the data has
            changed and --allow_changed_data is not given.
    """
    named = []
    _require_same_weights(state["config"], config, folder)
    changed = [(key, what) for key, value, what in _fingerprints(config, data) if state[key] != value]
    # Another vocabulary changes the ids of all data. So if it has changed, report it first: it is the cause.
    changed.sort(key=lambda one: one[0] != "vocabulary_fingerprint")
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
            changed_value = f"{key} {before[key]} -> {now[key]}"
            if key == "total_steps":
                changed_value += " (the learning rate's schedule is another one)"
            named.append(changed_value)
    measured = (*_MEASURED, "beta") if now.get("task") == "dpo" else _MEASURED
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
        measure=any(key == "val_fingerprint" for key, _ in changed)
        or any(before.get(key, now.get(key)) != now.get(key) for key in measured),
    )


def _require_same_weights(before: dict[str, Any], config: TrainConfig, folder: Path) -> None:
    """Raise InputError if an option in `_FIXED` has changed: the weights of the checkpoint would not fit."""
    for key, value in config.as_dict().items():
        if key in _FIXED and key in before and before[key] != value:
            raise InputError(
                f"{folder} was made with {_flag(key, before[key])}, got {_flag(key, value)}: --resume keeps "
                "what is trained; leave the flag out, or begin another run with --output"
            )


def _flag(key: str, value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if value in ("", False):
        return f"no --{key}"
    return f"--{key}" if value is True else f"--{key} {value}"
