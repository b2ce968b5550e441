"""Checks the losses of a run. Each check is a pure function: RunRecord -> Finding or None.

    for check in CHECKS:
        found = check(record)

Each threshold is a named constant with a reason. The thresholds are rules of thumb. They were chosen with the
runs of benchmarks/doctor.py, and tried on other runs. Each finding shows its numbers, so a user can judge it.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import TypeVar

from minigpt.diagnosis.advice import gentler, longer, rates, relative_rate
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord, TrainPoint, ValPoint
from minigpt.training.finetune_config import FinetuneConfig

__all__ = ["CHECKS", "COMMON_CHECKS", "finite", "late_share", "smoothed"]

Point = TypeVar("Point", TrainPoint, ValPoint)

# A new model's first loss is about ln(V), for V entries of the vocabulary. If this loss is below 0.7 ln(V),
# the model was trained before. If the first line of metrics is a mean over several steps, a new model may
# already reach the unigram loss, about half of ln(V); so the limit is then 0.3 ln(V).
FIRST_BELOW, FIRST_BELOW_MEAN = 0.7, 0.3
# A first loss below this limit means that something is wrong: no model predicts real text with certainty so
# early.
NOTHING = 1e-3
# A run has diverged if its smoothed loss ends at least 30 %, and at least half a nat, above its minimum.
# Smaller rises are noise: the loss varies by 10 or 20 %, because the rows of batches differ in length, and a
# small loss varies by more.
DIVERGED_TIMES, DIVERGED_NATS = 1.3, 0.5
# A loss is a spike if it is half a nat above the highest of the sixteen losses recorded before it (other
# spikes left out). Smaller rises are usual, because batches differ.
SPIKE_NATS, SPIKE_BEFORE = 0.5, 16
# Report spikes if there are at least three, and if at least 2 % of the steps (one in fifty) have a spike. One
# or two spikes may come from unusual batches. After a spike the loss needs about ten steps to recover, so
# with one spike in fifty steps, a fifth of the run is wasted.
SPIKES, SPIKE_SHARE = 3, 0.02
# If the learning rate is below three times the usual rate and there are fewer than three spikes, the rate is
# not the reason for NaN or infinite losses. The reason may be a line of the data, faulty memory, or 16-bit
# numbers.
CALM = 3.0
# Report a growing gradient norm if the norm in the last fifth of the run is at least five times the norm in
# the second fifth. A little growth is normal while the loss falls.
GRADIENT_TIMES = 5.0
# At the end of a cosine schedule the learning rate is small. If the loss still falls by 3 % between the last
# two evaluations, more steps would lower it much further. A fall of less than 0.02 nats never counts.
STILL_FALLING_SHARE, STILL_FALLING_NATS = 0.03, 0.02
# A rise of the validation loss counts only if it is at least 2 % and at least 0.02 nats. Smaller rises are
# noise: all evaluations use the same data, but as the weights change, the loss varies by 1 or 2 %. With few
# validation tokens, it varies more. So with n < 625 validation tokens, the check `overfitting` needs a rise
# of 0.5 / sqrt(n), which is more than 2 %. (The relative standard error of the loss is 1 / sqrt(n).)
OVERFIT_SHARE, OVERFIT_NATS = 0.02, 0.02
# Report a plateau if the validation loss fell by less than 0.5 % in the last third of the evaluations. At
# least six evaluations are needed.
PLATEAU_SHARE, PLATEAU_EVALUATIONS = 0.005, 6
# Report a slowdown if the speed falls to less than 0.75 of the speed at the start, in a run of at least 60
# seconds. Rows of different lengths and a busy machine change the speed by only 10 %.
SLOWER, SLOWER_SECONDS = 0.75, 60.0
ENOUGH_LINES = 10  # lines of metrics that are needed to judge the shape of a curve


def nothing_logged(record: RunRecord) -> Finding | None:
    """Check whether the run recorded any loss."""
    return None if record.train or record.val else finding("nothing_logged", steps=record.steps_done)


def metrics_damaged(record: RunRecord) -> Finding | None:
    """Check for damaged lines of metrics.jsonl. One is no problem: a killed process may leave one."""
    return finding("metrics_damaged", lines=record.broken_lines) if record.broken_lines > 1 else None


def unfinished(record: RunRecord) -> Finding | None:
    """Check whether the run did all its steps."""
    if record.is_finished or not record.total_steps:
        return None
    verb = "finetune" if isinstance(record.config, FinetuneConfig) else "train"
    command = shlex.join(["minigpt", verb, "--output", str(record.folder), "--resume"])
    return finding("unfinished", steps=record.steps_done, total=record.total_steps).trying(command)


def no_checkpoint(record: RunRecord) -> Finding | None:
    """Check whether the run saved a checkpoint."""
    return (
        None if record.state or not record.steps_done else finding("no_checkpoint", steps=record.steps_done)
    )


def non_finite(record: RunRecord) -> Finding | None:
    """Check whether the loss became NaN or infinite (null in JSON), and stayed so to the end of the run."""
    skipped = [event.step for event in record.events if event.kind == "skipped"]
    bad = sorted({*record.non_finite, *skipped})
    good = [*(point.step for point in finite(record.train)), *(point.step for point in finite(record.val))]
    if not bad or max(good, default=0) > bad[-1]:
        return None
    numbers = {"count": len(bad), "step": bad[0], "rate": max(rates(record.config).values())}
    return finding("non_finite", **numbers).trying(**gentler(record))


def steps_skipped(record: RunRecord) -> Finding | None:
    """Check for steps that the run skipped because loss or gradient was not finite."""
    written = record.state.get("skipped")
    windows = [w for w in written if isinstance(w, list)] if isinstance(written, list) else []
    ends = [(w[0], w[1]) for w in windows if len(w) == 2 and all(isinstance(end, int) for end in w)]
    counted = sum(last - first + 1 for first, last in ends)
    count = max(counted, sum(event.kind == "skipped" for event in record.events))
    if not count:
        return None
    found = finding("steps_skipped", count=count)
    return found if is_calm(record) else found.trying(**gentler(record))


def rolled_back(record: RunRecord) -> Finding | None:
    """Check whether training went back to an earlier checkpoint."""
    steps = [event.step for event in record.events if event.kind == "rollback"]
    written = record.state.get("rollbacks")
    count = max(written if isinstance(written, int) else 0, len(steps))
    if not count:
        return None
    rate = max(rates(record.config).values())
    found = finding("rolled_back", count=count, step=min(steps, default=0), rate=rate)
    return found if is_calm(record) else found.trying(**gentler(record))


def is_calm(record: RunRecord) -> bool:
    """Return True if the learning rate cannot cause NaN losses: the rate is not high, and spikes are few."""
    return relative_rate(record.config) < CALM and len(leaps(record)) < SPIKES


def data_replaced(record: RunRecord) -> Finding | None:
    """Check whether the run was resumed with other data."""
    for event in record.events:
        what = [sentence for sentence in event.what if "data (" in sentence and event.kind == "changed"]
        if what:
            return finding("data_replaced", step=event.step, what="; ".join(what))
    return None


def first_loss(record: RunRecord) -> Finding | None:
    """Check whether the first recorded loss is too low for an untrained model."""
    train = finite(record.train)
    if record.config.teacher is not None:  # the loss of distillation is mainly the distance to the teacher
        return None
    if not train or record.vocab_size < 2 or train[0].step > 2 * max(record.lines_every, 10):
        return None  # the first loss is unknown, because the first lines of metrics are missing
    first, expected = train[0], math.log(record.vocab_size)
    numbers = {"loss": first.loss, "step": first.step, "expected": expected, "vocab": record.vocab_size}
    if first.loss < NOTHING:
        return finding("nothing_to_learn", loss=first.loss, step=first.step)
    if first.loss < expected * (FIRST_BELOW if first.step == 1 else FIRST_BELOW_MEAN):
        return finding("first_loss_low", **numbers)
    return None


def diverged(record: RunRecord) -> Finding | None:
    """Check whether the training loss ended far above its minimum, and the validation loss rose, too."""
    train, val = finite(record.train), finite(record.val)
    if len(train) < ENOUGH_LINES or (val and not has_risen(val, OVERFIT_SHARE)):
        return None
    smooth = smoothed(train)
    minimum, last = min(smooth), smooth[-1]
    if last < minimum * DIVERGED_TIMES or last < minimum + DIVERGED_NATS:
        return None
    step, rate = train[smooth.index(minimum)].step, record.config.learning_rate
    times = last / minimum if minimum else math.inf
    numbers = {"last": last, "minimum": minimum, "times": times, "step": step, "rate": rate}
    return finding("diverged", **numbers).trying(**gentler(record))


def loss_spikes(record: RunRecord) -> Finding | None:
    """Check for spikes of the training loss, in the metrics and among the events that the run recorded."""
    found = leaps(record)
    steps = max((point.step for point in record.train), default=0)
    if len(found) < max(SPIKES, SPIKE_SHARE * steps):
        return None
    step = max(found, key=lambda step: found[step][0] - found[step][1])
    largest, usual = found[step]
    numbers = {"count": len(found), "step": step, "largest": largest, "usual": usual}
    return finding("loss_spikes", **numbers, rate=max(rates(record.config).values())).trying(
        **gentler(record)
    )


def leaps(record: RunRecord) -> dict[int, tuple[float, float]]:
    """Return a dict: step with a spike -> (loss at this step, median of the losses shortly before).

    Spikes are found in the lines of metrics and among the events that the run recorded.
    """
    noticed = {event.step: event.loss for event in record.events if event.kind == "spike"}
    points = sorted({**{point.step: point.loss for point in finite(record.train)}, **noticed}.items())
    found: dict[int, tuple[float, float]] = {}
    usual: list[float] = []
    for step, loss in points:
        before = usual[-SPIKE_BEFORE:]
        if len(before) >= SPIKE_BEFORE // 2 and loss > max(before) + SPIKE_NATS:
            found[step] = loss, median(before)
        else:
            usual.append(loss)
    return found


def gradient_grows(record: RunRecord) -> Finding | None:
    """Check whether the gradient norm is much larger at the end than after the start."""
    norms = [point.grad_norm for point in record.train if math.isfinite(point.grad_norm)]
    if len(norms) < ENOUGH_LINES:
        return None
    fifth = len(norms) // 5
    before, after = (
        median(norms[fifth : 2 * fifth]),
        median(norms[-fifth:]),
    )  # without the first fifth of the lines, because the warm-up changes the norm
    if before <= 0 or after < GRADIENT_TIMES * before:
        return None
    numbers = {"before": before, "after": after, "times": after / before, "rate": record.config.learning_rate}
    return finding("gradient_grows", **numbers).trying(**gentler(record))


def still_falling(record: RunRecord) -> Finding | None:
    """Check whether the last evaluation is still much better than the previous evaluation."""
    val = finite(record.val)
    if not record.is_finished or len(val) < 3 or val[-2].loss <= 0:
        return None
    before, last = val[-2].loss, val[-1].loss
    share = (before - last) / before
    if share < STILL_FALLING_SHARE or before - last < STILL_FALLING_NATS:
        return None
    return finding("still_falling", before=before, last=last, share=share).trying(**longer(record.config, 2))


def overfitting(record: RunRecord) -> Finding | None:
    """Check whether the validation loss rose from its minimum while the training loss kept falling."""
    val, train = finite(record.val), finite(record.train)
    if len(val) < 2 or not train:
        return None
    best, last = min(val, key=lambda point: point.loss), val[-1].loss
    before = [point.loss for point in train if point.step <= best.step][-3:] or [train[0].loss]
    after = [point.loss for point in train if point.step > best.step][-3:]
    end = fmean([point.loss for point in train][-3:])
    share = max(OVERFIT_SHARE, record.summary.val_error / 2 if record.summary else 0.0)
    if not has_risen(val, share):
        return finding("not_overfitting", last=last, minimum=best.loss, train=end)
    if not after or fmean(after) >= fmean(before):
        return None
    numbers = {"step": best.step, "minimum": best.loss, "last": last, "train": end, "gap": last - end}
    # The advice is a shorter run, which ends at the step of the first evaluation after the best one. By this
    # step, the learning rate of the shorter run has fallen to its final value.
    return finding("overfitting", **numbers).trying(max_steps=next(p.step for p in val if p.step > best.step))


def plateau(record: RunRecord) -> Finding | None:
    """Check whether the validation loss hardly fell in the last third of the evaluations."""
    val = finite(record.val)
    if len(val) < PLATEAU_EVALUATIONS or has_risen(val, OVERFIT_SHARE):
        return None
    cut = len(val) - len(val) // 3
    before, after = min(p.loss for p in val[:cut]), min(p.loss for p in val)
    share = (before - after) / before if before > 0 else 0.0
    if share >= PLATEAU_SHARE:
        return None
    return finding("plateau", step=val[cut - 1].step, before=before, after=after, share=share)


def throughput_drop(record: RunRecord) -> Finding | None:
    """Check whether training was slower at the end than at the beginning."""
    speeds = [p.tokens_per_second for p in record.train if math.isfinite(p.tokens_per_second)]
    if len(speeds) < ENOUGH_LINES or not record.train[-1].seconds >= SLOWER_SECONDS:
        return None
    fifth = len(speeds) // 5
    before, after = median(speeds[:fifth]), median(speeds[-fifth:])
    if before <= 0 or after >= SLOWER * before:
        return None
    return finding("throughput_drop", before=before, after=after, share=after / before)


# -- curves -------------------------------------------------------------------------------------------------


def finite(points: Sequence[Point]) -> list[Point]:
    """Return the points whose loss is finite."""
    return [point for point in points if math.isfinite(point.loss)]


def has_risen(val: Sequence[ValPoint], share: float) -> bool:
    """Return True if the last validation loss is clearly above the lowest.

    The difference must be at least `share` times the lowest loss, and at least 0.02 nats.
    """
    lowest = min(point.loss for point in val)
    return val[-1].loss >= max(lowest * (1 + share), lowest + OVERFIT_NATS)


def smoothed(points: Sequence[TrainPoint]) -> list[float]:
    """Return the losses, each replaced by the median of its neighbourhood.

    The neighbourhood of a point is the point itself, and the points near it: on each side 1/40 of all points,
    but at least 2.
    """
    losses, side = [point.loss for point in points], max(2, len(points) // 40)
    return [median(losses[max(0, i - side) : i + side + 1]) for i in range(len(losses))]


def late_share(record: RunRecord) -> float:
    """Return the fall of the validation loss in the last third of the steps, as a share of its whole fall.

    If the loss falls along a straight line, the result is 1/3. If the loss is nearly flat at the end, the
    result is below 0.1. If the share is unknown, the result is 0.
    """
    val, start = finite(record.val), untrained(record)
    if len(val) < 3 or not record.is_finished or not start > val[-1].loss:
        return 0.0
    where = 2 / 3 * val[-1].step
    left = max((point for point in val if point.step <= where), key=lambda point: point.step, default=None)
    right = next(point for point in val if point.step >= where)
    step, loss = (0, start) if left is None else (left.step, left.loss)
    share = 0.0 if right.step == step else (where - step) / (right.step - step)
    return (loss + (right.loss - loss) * share - val[-1].loss) / (start - val[-1].loss)


def untrained(record: RunRecord) -> float:
    """Return the loss of the model before its first step; nan: unknown.

    If this loss was not recorded, it is estimated as ln(V) + s^2 / 2, for V entries of the vocabulary, and
    logits with the variance s^2. A logit is a sum over C = n_embd normalised channels, and the initial
    weights have a standard deviation of 0.02; so s^2 is 0.0004 C.
    """
    if record.train and record.train[0].step == 1 and math.isfinite(record.train[0].loss):
        return record.train[0].loss
    return math.log(record.vocab_size) + 2e-4 * record.config.n_embd if record.vocab_size > 1 else math.nan


# COMMON_CHECKS are for every run. CHECKS are for runs that do not learn from rewards.
COMMON_CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    nothing_logged,
    metrics_damaged,
    unfinished,
    no_checkpoint,
    non_finite,
    steps_skipped,
    rolled_back,
)
CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    *COMMON_CHECKS,
    data_replaced,
    first_loss,
    diverged,
    loss_spikes,
    gradient_grows,
    still_falling,
    overfitting,
    plateau,
    throughput_drop,
)
