"""Is something wrong with the numbers of a run? One pure function a question: RunRecord -> Finding or None.

    for check in CHECKS:
        found = check(record)

Each threshold is a named constant with the reason for it. They are rules of thumb: a healthy run of a recipe
that we ship is left in peace, and each finding shows its number, so that the reader can judge.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import TypeVar

from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord, TrainPoint, ValPoint

__all__ = ["CHECKS"]

Point = TypeVar("Point", TrainPoint, ValPoint)

# Fresh weights guess almost evenly: ln(V) nats. Half a nat more means that steps went in a bad direction.
FIRST_ABOVE = 0.5
# One step cannot teach much: the first one's loss below 0.7 ln(V) was not learned in this run. A first line
# that is a mean over several steps may lie as low as the loss of single characters, about half of ln(V).
FIRST_BELOW, FIRST_BELOW_MEAN = 0.7, 0.3
# Real text is never predicted with certainty from the first line of metrics on.
NOTHING = 1e-3
# The minimum of a noisy curve lies a little below its end; a third and 0.2 nats more is no noise.
DIVERGED_TIMES, DIVERGED_NATS = 1.3, 0.2
# A line is a mean over logging_steps steps, so half a nat and 30 % above the lines before it is a rare event.
SPIKE_TIMES, SPIKE_NATS, SPIKE_BEFORE = 1.3, 0.5, 8
# One or two leaps are what a strange batch does; three and more are the learning rate's.
SPIKES, SPIKE_SHARE = 3, 0.01  # fewer, or fewer of all steps: a hard batch now and then
# Gradients get a little longer as the loss gets small. Five times is more than that.
GRADIENT_TIMES = 5.0
# Falling in a straight line, a third of the steps brings a third of the fall; a curve that is nearly done
# brings under a tenth.
STEEP_SHARE, STEEP_NATS = 0.2, 0.1
# At the end of a cosine the rate is small: 3 % between two evaluations says that much was still to come. But
# 0.02 nats are nothing, whatever their percentage: nearly every token is certain already.
STILL_FALLING_SHARE, STILL_FALLING_NATS = 0.03, 0.02
# Evaluations on a thousand pairs differ by chance by less than 1 %; below 0.02 nats nobody sees a difference.
OVERFIT_SHARE, OVERFIT_NATS = 0.01, 0.02
# The last third of a run is not worth its time if it lowers the loss by less than half a per cent.
PLATEAU_SHARE, PLATEAU_EVALUATIONS = 0.005, 6
# Mixed lengths and a busy machine make speeds differ by a tenth; a quarter is something else.
SLOWER = 0.75
ENOUGH_LINES = 10  # for words about a curve's shape


def nothing_logged(record: RunRecord) -> Finding | None:
    """No loss was recorded."""
    if record.train or record.val:
        return None
    return finding("nothing_logged", steps=record.steps_done, logging_steps=record.config.logging_steps)


def metrics_damaged(record: RunRecord) -> Finding | None:
    """Lines that cannot be read; a single one is the end of a killed process."""
    return finding("metrics_damaged", lines=record.broken_lines) if record.broken_lines > 1 else None


def unfinished(record: RunRecord) -> Finding | None:
    """Steps are left to do."""
    if record.is_finished or not record.total_steps:
        return None
    return finding("unfinished", steps=record.steps_done, total=record.total_steps, folder=str(record.folder))


def no_checkpoint(record: RunRecord) -> Finding | None:
    """Steps were done, and nothing was saved."""
    if record.state or not record.steps_done:
        return None
    return finding("no_checkpoint", steps=record.steps_done)


def non_finite(record: RunRecord) -> Finding | None:
    """NaN or infinity, or null in its place."""
    if not record.non_finite:
        return None
    return finding(
        "non_finite",
        lines=record.non_finite,
        step=record.first_non_finite,
        rate=record.config.learning_rate,
    )


def steps_skipped(record: RunRecord) -> Finding | None:
    """Steps without a finite loss or gradient, as the run counted them."""
    written = record.state.get("skipped")
    windows = [w for w in written if isinstance(w, list)] if isinstance(written, list) else []
    ends = [(w[0], w[1]) for w in windows if len(w) == 2 and all(isinstance(end, int) for end in w)]
    counted = sum(last - first + 1 for first, last in ends)
    count = max(counted, sum(event.kind == "skipped" for event in record.events))
    return finding("steps_skipped", count=count) if count else None


def rolled_back(record: RunRecord) -> Finding | None:
    """Training had to go back."""
    written = record.state.get("rollbacks")
    count = max(
        written if isinstance(written, int) else 0, sum(event.kind == "rollback" for event in record.events)
    )
    return finding("rolled_back", count=count, rate=record.config.learning_rate) if count else None


def first_loss(record: RunRecord) -> Finding | None:
    """Does the first line fit a model that knows nothing? Step 0 itself is not logged: this is a mean."""
    train = _finite(record.train)
    if not train or record.vocab_size < 2 or train[0].step > 2 * record.config.logging_steps:
        return None  # an earlier part of the curve is missing
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
    """Every evaluation says that no token of an answer counted."""
    told = [point for point in record.val if point.answer_loss is not None]
    if not told or any(point.answer_loss == point.answer_loss for point in told):  # nan is not itself
        return None
    return finding("no_answer_tokens", count=len(told), max_length=record.config.max_length)


def diverged(record: RunRecord) -> Finding | None:
    """The loss ended far above its own minimum."""
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
    """The loss leapt and came back; the run's own count where it kept one, else the lines that stand out."""
    train = _finite(record.train)
    leaps: dict[int, tuple[float, float]] = {}  # step -> loss, what was usual before
    for index in range(SPIKE_BEFORE, len(train)):
        point = train[index]
        usual = median(before.loss for before in train[index - SPIKE_BEFORE : index])
        if point.loss > max(usual * SPIKE_TIMES, usual + SPIKE_NATS):
            leaps[point.step] = point.loss, usual
    counted = [event for event in record.events if event.kind == "spike" and math.isfinite(event.loss)]
    for event in counted:
        earlier = [point.loss for point in train if point.step < event.step][-SPIKE_BEFORE:]
        leaps[event.step] = event.loss, median(earlier or [event.loss])
    count = len(counted) or len(leaps)  # the run sees each step, we see means over some
    steps = train[-1].step if train else 0
    if count < max(SPIKES, SPIKE_SHARE * steps) or diverged(record):
        return None  # a diverged run is one long leap
    step = max(leaps, key=lambda step: leaps[step][0] - leaps[step][1])
    largest, usual = leaps[step]
    return finding(
        "loss_spikes", count=count, step=step, largest=largest, usual=usual, rate=record.config.learning_rate
    )


def gradient_grows(record: RunRecord) -> Finding | None:
    """The gradient is much longer at the end than after the start."""
    norms = [point.grad_norm for point in record.train if math.isfinite(point.grad_norm)]
    if len(norms) < ENOUGH_LINES:
        return None
    fifth = len(norms) // 5
    before, after = median(norms[fifth : 2 * fifth]), median(norms[-fifth:])  # the first fifth warms up
    if before <= 0 or after < GRADIENT_TIMES * before:
        return None
    return finding(
        "gradient_grows", before=before, after=after, times=after / before, rate=record.config.learning_rate
    )


def rate_too_low(record: RunRecord) -> Finding | None:
    """A constant rate, and the curve is still steep at the end."""
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
    """The last evaluation is still much better than the one before it."""
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
    """The validation loss has risen from its minimum while the training loss went on falling."""
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
    """The last third of the evaluations brought next to nothing."""
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
    """The end was slower than the beginning."""
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
    """The median of each line and its two neighbours on either side: one strange line changes nothing."""
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
