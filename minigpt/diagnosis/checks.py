"""Checks of a run's numbers. Each is a function that takes a RunRecord and returns a Finding or None.

    for check in CHECKS:
        found = check(record)

Each threshold is a named constant with its reason. The thresholds are rules of thumb: a healthy run of a
recipe in minigpt gives no warning. Each finding shows its numbers, so that the reader can judge.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import TypeVar

from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord, TrainPoint, ValPoint

__all__ = ["CHECKS"]

Point = TypeVar("Point", TrainPoint, ValPoint)

# A model with random weights has a loss of ln(V). A first loss more than 0.5 nats above that means that the
# first steps made the model worse.
FIRST_ABOVE = 0.5
# Least first loss, as a share of ln(V). One step cannot teach more than that, so a lower loss was not learned
# in this run. If the first line of metrics is a mean over several steps, the limit is 0.3.
FIRST_BELOW, FIRST_BELOW_MEAN = 0.7, 0.3
# a first loss below this is suspicious: real text is never so certain
NOTHING = 1e-3
# A run has diverged if its last loss is 1.3 times its minimum and 0.2 nats above it. Noise is smaller.
DIVERGED_TIMES, DIVERGED_NATS = 1.3, 0.2
# A line of metrics is a spike if its loss is 1.3 times the median of the 8 lines before it and 0.5 nats above
# it.
SPIKE_TIMES, SPIKE_NATS, SPIKE_BEFORE = 1.3, 0.5, 8
# One or two spikes come from unusual batches. Three and more, in at least 1 % of the steps, come from the
# learning rate.
SPIKES, SPIKE_SHARE = 3, 0.01
# The gradient norm grows a little as the loss falls, but in a healthy run not to five times its value.
GRADIENT_TIMES = 5.0
# If a loss falls in a straight line, a third of the fall comes in the last third of the steps. In a run that
# is nearly done, it is less than a tenth.
STEEP_SHARE, STEEP_NATS = 0.2, 0.1
# Near the end of a cosine the learning rate is small. If the loss still falls by 3 % between two evaluations,
# more steps would help. A fall of less than 0.02 nats does not count.
STILL_FALLING_SHARE, STILL_FALLING_NATS = 0.03, 0.02
# A rise of the validation loss counts from 1 % and 0.02 nats on. Smaller ones are chance.
OVERFIT_SHARE, OVERFIT_NATS = 0.01, 0.02
# If the last third of a run lowers the loss by less than 0.5 %, it was not worth its time.
PLATEAU_SHARE, PLATEAU_EVALUATIONS = 0.005, 6
# Texts of other lengths, and other programs, change the speed by a tenth, but not by a quarter.
SLOWER = 0.75
ENOUGH_LINES = 10  # fewest lines of metrics for a check of the curve's shape


def nothing_logged(record: RunRecord) -> Finding | None:
    """Report that no loss was recorded."""
    if record.train or record.val:
        return None
    return finding("nothing_logged", steps=record.steps_done, logging_steps=record.config.logging_steps)


def metrics_damaged(record: RunRecord) -> Finding | None:
    """Report lines of metrics.jsonl that cannot be read. (One is normal: a killed process leaves it.)"""
    return finding("metrics_damaged", lines=record.broken_lines) if record.broken_lines > 1 else None


def unfinished(record: RunRecord) -> Finding | None:
    """Report that not all steps are done."""
    if record.is_finished or not record.total_steps:
        return None
    return finding("unfinished", steps=record.steps_done, total=record.total_steps, folder=str(record.folder))


def no_checkpoint(record: RunRecord) -> Finding | None:
    """Report that steps were done but no checkpoint was saved."""
    if record.state or not record.steps_done:
        return None
    return finding("no_checkpoint", steps=record.steps_done)


def non_finite(record: RunRecord) -> Finding | None:
    """Report NaN and infinity in the metrics (JSON has null for them)."""
    if not record.non_finite:
        return None
    return finding(
        "non_finite",
        lines=record.non_finite,
        step=record.first_non_finite,
        rate=record.config.learning_rate,
    )


def steps_skipped(record: RunRecord) -> Finding | None:
    """Report skipped steps: those whose loss or gradient was not finite."""
    written = record.state.get("skipped")
    windows = [w for w in written if isinstance(w, list)] if isinstance(written, list) else []
    ends = [(w[0], w[1]) for w in windows if len(w) == 2 and all(isinstance(end, int) for end in w)]
    counted = sum(last - first + 1 for first, last in ends)
    count = max(counted, sum(event.kind == "skipped" for event in record.events))
    return finding("steps_skipped", count=count) if count else None


def rolled_back(record: RunRecord) -> Finding | None:
    """Report that the run rolled back to an earlier checkpoint."""
    written = record.state.get("rollbacks")
    count = max(
        written if isinstance(written, int) else 0, sum(event.kind == "rollback" for event in record.events)
    )
    return finding("rolled_back", count=count, rate=record.config.learning_rate) if count else None


def first_loss(record: RunRecord) -> Finding | None:
    """Check the first line of metrics, a mean over the first steps, against an untrained model's loss."""
    train = _finite(record.train)
    if not train or record.vocab_size < 2 or train[0].step > 2 * record.config.logging_steps:
        return None  # no finding: the beginning of the curve is missing
    first, expected = train[0], math.log(record.vocab_size)
    numbers = {"loss": first.loss, "step": first.step, "expected": expected, "vocab": record.vocab_size}
    if first.loss < NOTHING:
        return finding("nothing_to_learn", loss=first.loss, step=first.step)
    if first.loss > expected + FIRST_ABOVE:
        return finding("first_loss_high", **numbers, rate=record.config.learning_rate)
    if first.loss < expected * (FIRST_BELOW if first.step == 1 else FIRST_BELOW_MEAN):
        return finding("first_loss_low", **numbers)
    return None


def no_answer_tokens(record: RunRecord) -> Finding | None:
    """Report that in every evaluation no token of an answer was counted."""
    told = [point for point in record.val if point.answer_loss is not None]
    # x == x is False only for nan
    if not told or any(point.answer_loss == point.answer_loss for point in told):
        return None
    return finding("no_answer_tokens", count=len(told), max_length=record.config.max_length)


def diverged(record: RunRecord) -> Finding | None:
    """Report that the loss ended far above its minimum."""
    train = _finite(record.train)
    if len(train) < ENOUGH_LINES:
        return None
    smooth = _smoothed(train)
    minimum = min(smooth)
    last = smooth[-1]
    if last < minimum * DIVERGED_TIMES or last < minimum + DIVERGED_NATS:
        return None
    return finding(
        "diverged",
        last=last,
        minimum=minimum,
        times=last / minimum if minimum else math.inf,
        step=train[smooth.index(minimum)].step,
        rate=record.config.learning_rate,
    )


def loss_spikes(record: RunRecord) -> Finding | None:
    """Report spikes of the loss: those that the run recorded, or else those in the lines of metrics."""
    train = _finite(record.train)
    leaps: dict[int, tuple[float, float]] = {}  # step -> (loss, usual loss before it)
    for index in range(SPIKE_BEFORE, len(train)):
        point = train[index]
        usual = median(before.loss for before in train[index - SPIKE_BEFORE : index])
        if point.loss > max(usual * SPIKE_TIMES, usual + SPIKE_NATS):
            leaps[point.step] = point.loss, usual
    counted = [event for event in record.events if event.kind == "spike" and math.isfinite(event.loss)]
    for event in counted:
        earlier = [point.loss for point in train if point.step < event.step][-SPIKE_BEFORE:]
        leaps[event.step] = event.loss, median(earlier or [event.loss])
    # the run's own count is better, because the run sees the loss of each step
    count = len(counted) or len(leaps)
    steps = train[-1].step if train else 0
    if count < max(SPIKES, SPIKE_SHARE * steps) or diverged(record):
        return None  # no finding: in a diverged run, the rise at the end is not a spike
    step = max(leaps, key=lambda step: leaps[step][0] - leaps[step][1])
    largest, usual = leaps[step]
    return finding(
        "loss_spikes", count=count, step=step, largest=largest, usual=usual, rate=record.config.learning_rate
    )


def gradient_grows(record: RunRecord) -> Finding | None:
    """Report that gradients are much longer at the end than near the start."""
    norms = [point.grad_norm for point in record.train if math.isfinite(point.grad_norm)]
    if len(norms) < ENOUGH_LINES:
        return None
    fifth = len(norms) // 5
    # skip the warm-up: the first fifth
    before, after = median(norms[fifth : 2 * fifth]), median(norms[-fifth:])
    if before <= 0 or after < GRADIENT_TIMES * before:
        return None
    return finding(
        "gradient_grows", before=before, after=after, times=after / before, rate=record.config.learning_rate
    )


def rate_too_low(record: RunRecord) -> Finding | None:
    """Report a loss that still falls fast at the end, at a learning rate that does not decay."""
    config, train = record.config, _finite(record.train)
    falls = config.lr_scheduler_type != "constant" and config.min_lr_ratio < 0.5
    if not record.is_finished or falls or len(train) < ENOUGH_LINES:
        return None
    smooth = _smoothed(train)
    whole, late = smooth[0] - smooth[-1], smooth[-1 - len(smooth) // 3] - smooth[-1]
    if whole < STEEP_NATS or late < STEEP_SHARE * whole:
        return None
    return finding("rate_too_low", share=late / whole, rate=config.learning_rate)


def still_falling(record: RunRecord) -> Finding | None:
    """Report that the last evaluation is still much better than the one before."""
    val = _finite(record.val)
    if not record.is_finished or len(val) < 3 or val[-2].loss <= 0:
        return None
    before, last = val[-2].loss, val[-1].loss
    share = (before - last) / before
    if share < STILL_FALLING_SHARE or before - last < STILL_FALLING_NATS:
        return None
    return finding(
        "still_falling", before=before, last=last, share=share, epochs=record.config.num_train_epochs
    )


def overfitting(record: RunRecord) -> Finding | None:
    """Report that the validation loss rises while the training loss falls."""
    val, train = _finite(record.val), _finite(record.train)
    if len(val) < 3 or not train:
        return None
    best = min(val, key=lambda point: point.loss)
    last = val[-1].loss
    if last < best.loss * (1 + OVERFIT_SHARE) or last < best.loss + OVERFIT_NATS:
        return None
    before = [point.loss for point in train if point.step <= best.step][-3:]
    after = [point.loss for point in train if point.step > best.step][-3:]
    if not before or not after or fmean(after) >= fmean(before):
        return None
    end = fmean(after)
    return finding("overfitting", step=best.step, minimum=best.loss, last=last, train=end, gap=last - end)


def plateau(record: RunRecord) -> Finding | None:
    """Report that the last third of the evaluations hardly improved the loss."""
    val = _finite(record.val)
    if len(val) < PLATEAU_EVALUATIONS or overfitting(record):
        return None
    cut = len(val) - len(val) // 3
    before, after = min(p.loss for p in val[:cut]), min(p.loss for p in val)
    share = (before - after) / before if before > 0 else 0.0
    if share >= PLATEAU_SHARE:
        return None
    return finding("plateau", step=val[cut - 1].step, before=before, after=after, share=share)


def throughput_drop(record: RunRecord) -> Finding | None:
    """Report that the run was much slower at the end than at the beginning."""
    speeds = [p.tokens_per_second for p in record.train if math.isfinite(p.tokens_per_second)]
    if len(speeds) < ENOUGH_LINES:
        return None
    fifth = len(speeds) // 5
    before, after = median(speeds[:fifth]), median(speeds[-fifth:])
    if before <= 0 or after >= SLOWER * before:
        return None
    return finding("throughput_drop", before=before, after=after, share=after / before)


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.loss)]


def _smoothed(points: Sequence[TrainPoint]) -> list[float]:
    """Return for each line the median of it and two neighbours on each side, which removes single spikes."""
    losses = [point.loss for point in points]
    return [median(losses[max(0, i - 2) : i + 3]) for i in range(len(losses))]


CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    nothing_logged,
    metrics_damaged,
    unfinished,
    no_checkpoint,
    non_finite,
    steps_skipped,
    rolled_back,
    first_loss,
    no_answer_tokens,
    diverged,
    loss_spikes,
    gradient_grows,
    rate_too_low,
    still_falling,
    overfitting,
    plateau,
    throughput_drop,
)
