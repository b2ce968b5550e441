"""What do the losses of a run say? One pure function a question: RunRecord -> Finding or None.

    for check in CHECKS:
        found = check(record)

Each threshold is a named constant with the reason for it. They are rules of thumb, set on the runs of
benchmarks/doctor.py and tried on others; each finding shows its numbers, so that the reader can judge.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import TypeVar

from minigpt.diagnosis.advice import gentler, longer, rates, relative_rate
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord, TrainPoint, ValPoint

__all__ = ["CHECKS", "finite", "late_share", "smoothed"]

Point = TypeVar("Point", TrainPoint, ValPoint)

# One step cannot teach much: the first one's loss below 0.7 ln(V) was not learned in this run. A first line
# that is a mean over several steps may lie as low as the loss of single characters, about half of ln(V).
FIRST_BELOW, FIRST_BELOW_MEAN = 0.7, 0.3
# Real text is never predicted with certainty from the first line of metrics on.
NOTHING = 1e-3
# The smoothed curve still moves by a tenth or two with the lengths of the batches, and when the loss is small
# by much more. A third and half a nat is no noise.
DIVERGED_TIMES, DIVERGED_NATS = 1.3, 0.5
# Batches are unlike: one of long rows may cost half a nat more. A line that is as much above the highest of
# the sixteen before it is a leap.
SPIKE_NATS, SPIKE_BEFORE = 0.5, 16
# One or two leaps are what a strange batch does. A leap takes some ten steps to get over: with one in fifty
# steps a fifth of the run is lost.
SPIKES, SPIKE_SHARE = 3, 0.02
# Where numbers overflow at a rate under three usual ones, and the loss did not leap, the reason is another: a
# line of the data, the machine's memory, 16 bits.
CALM = 3.0
# Gradients get a little longer as the loss gets small. Five times is more than that.
GRADIENT_TIMES = 5.0
# At the end of a cosine the rate is small: 3 % between two evaluations says that much was still to come. But
# 0.02 nats are nothing, whatever their percentage: nearly every token is certain already.
STILL_FALLING_SHARE, STILL_FALLING_NATS = 0.03, 0.02
# Evaluations are on the same data, so their noise is that of the weights: a per cent or two. Where few tokens
# are measured on, half of the mean's error is more; below 0.02 nats nobody sees a difference.
OVERFIT_SHARE, OVERFIT_NATS = 0.02, 0.02
# The last third of a run is not worth its time if it lowers the loss by less than half a per cent.
PLATEAU_SHARE, PLATEAU_EVALUATIONS = 0.005, 6
# Mixed lengths and a busy machine make speeds differ by a tenth; a quarter is something else. Within a minute
# another program's start is.
SLOWER, SLOWER_SECONDS = 0.75, 60.0
ENOUGH_LINES = 10  # for words about a curve's shape


def nothing_logged(record: RunRecord) -> Finding | None:
    """No loss was recorded."""
    return None if record.train or record.val else finding("nothing_logged", steps=record.steps_done)


def metrics_damaged(record: RunRecord) -> Finding | None:
    """Lines that cannot be read; a single one is the end of a killed process."""
    return finding("metrics_damaged", lines=record.broken_lines) if record.broken_lines > 1 else None


def unfinished(record: RunRecord) -> Finding | None:
    """Steps are left to do."""
    if record.is_finished or not record.total_steps:
        return None
    command = shlex.join(["minigpt", "train", "--output", str(record.folder), "--resume"])
    return finding("unfinished", steps=record.steps_done, total=record.total_steps).trying(command)


def no_checkpoint(record: RunRecord) -> Finding | None:
    """Steps were done, and nothing was saved."""
    return (
        None if record.state or not record.steps_done else finding("no_checkpoint", steps=record.steps_done)
    )


def non_finite(record: RunRecord) -> Finding | None:
    """NaN or infinity, or null in its place, that the run did not get over."""
    skipped = [event.step for event in record.events if event.kind == "skipped"]
    bad = sorted({*record.non_finite, *skipped})
    good = [*(point.step for point in finite(record.train)), *(point.step for point in finite(record.val))]
    if not bad or max(good, default=0) > bad[-1]:
        return None
    numbers = {"count": len(bad), "step": bad[0], "rate": max(rates(record.config).values())}
    return finding("non_finite", **numbers).trying(**gentler(record))


def steps_skipped(record: RunRecord) -> Finding | None:
    """Steps without a finite loss or gradient, as the run counted them."""
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
    """Training had to go back."""
    steps = [event.step for event in record.events if event.kind == "rollback"]
    written = record.state.get("rollbacks")
    count = max(written if isinstance(written, int) else 0, len(steps))
    if not count:
        return None
    rate = max(rates(record.config).values())
    found = finding("rolled_back", count=count, step=min(steps, default=0), rate=rate)
    return found if is_calm(record) else found.trying(**gentler(record))


def is_calm(record: RunRecord) -> bool:
    """Whether nothing speaks against the learning rate: then it is not the reason why numbers overflow."""
    return relative_rate(record.config) < CALM and len(leaps(record)) < SPIKES


def data_replaced(record: RunRecord) -> Finding | None:
    """A resume with other data."""
    for event in record.events:
        what = [sentence for sentence in event.what if "data (" in sentence and event.kind == "changed"]
        if what:
            return finding("data_replaced", step=event.step, what="; ".join(what))
    return None


def first_loss(record: RunRecord) -> Finding | None:
    """Does the first line fit a model that knows nothing? It may be a mean over several steps."""
    train = finite(record.train)
    if not train or record.vocab_size < 2 or train[0].step > 2 * max(record.lines_every, 10):
        return None  # an earlier part of the curve is missing
    first, expected = train[0], math.log(record.vocab_size)
    numbers = {"loss": first.loss, "step": first.step, "expected": expected, "vocab": record.vocab_size}
    if first.loss < NOTHING:
        return finding("nothing_to_learn", loss=first.loss, step=first.step)
    if first.loss < expected * (FIRST_BELOW if first.step == 1 else FIRST_BELOW_MEAN):
        return finding("first_loss_low", **numbers)
    return None


def diverged(record: RunRecord) -> Finding | None:
    """The loss ended far above its own minimum; the validation loss, which has no hard batches, rose, too."""
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
    """The loss leapt and came back."""
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
    """Steps whose loss stands out, in lines or as the run noticed them -> that loss, and what was usual."""
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
    """The gradient is much longer at the end than after the start."""
    norms = [point.grad_norm for point in record.train if math.isfinite(point.grad_norm)]
    if len(norms) < ENOUGH_LINES:
        return None
    fifth = len(norms) // 5
    before, after = median(norms[fifth : 2 * fifth]), median(norms[-fifth:])  # the first fifth warms up
    if before <= 0 or after < GRADIENT_TIMES * before:
        return None
    numbers = {"before": before, "after": after, "times": after / before, "rate": record.config.learning_rate}
    return finding("gradient_grows", **numbers).trying(**gentler(record))


def still_falling(record: RunRecord) -> Finding | None:
    """The last evaluation is still much better than the one before it."""
    val = finite(record.val)
    if not record.is_finished or len(val) < 3 or val[-2].loss <= 0:
        return None
    before, last = val[-2].loss, val[-1].loss
    share = (before - last) / before
    if share < STILL_FALLING_SHARE or before - last < STILL_FALLING_NATS:
        return None
    return finding("still_falling", before=before, last=last, share=share).trying(**longer(record.config, 2))


def overfitting(record: RunRecord) -> Finding | None:
    """The validation loss rose from its minimum while the training loss went on falling; or it did not."""
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
    # the lowest lies somewhere before the evaluation after the best; a rate that falls until there finds it
    return finding("overfitting", **numbers).trying(max_steps=next(p.step for p in val if p.step > best.step))


def plateau(record: RunRecord) -> Finding | None:
    """The last third of the evaluations brought next to nothing."""
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
    """The end was slower than the beginning."""
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
    """The points whose loss is a number."""
    return [point for point in points if math.isfinite(point.loss)]


def has_risen(val: Sequence[ValPoint], share: float) -> bool:
    """Whether the last validation loss is above the lowest by more than noise."""
    lowest = min(point.loss for point in val)
    return val[-1].loss >= max(lowest * (1 + share), lowest + OVERFIT_NATS)


def smoothed(points: Sequence[TrainPoint]) -> list[float]:
    """The median of each line and its neighbours: two on either side, in a long curve a fortieth of it."""
    losses, side = [point.loss for point in points], max(2, len(points) // 40)
    return [median(losses[max(0, i - side) : i + side + 1]) for i in range(len(losses))]


def late_share(record: RunRecord) -> float:
    """The share of the last third of the steps in all that the validation loss fell; 0: it is not known.

    Falling in a straight line, a third of the steps brings a third of the fall; a curve that is nearly done
    brings under a tenth.
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
    """The loss of the model before its first step; nan: not known.

    That of guessing evenly, and a little more: logits of variance s^2 cost s^2 / 2, and initial weights of
    deviation 0.02 on C normalised channels give s^2 = 0.0004 C.
    """
    if record.train and record.train[0].step == 1 and math.isfinite(record.train[0].loss):
        return record.train[0].loss
    return math.log(record.vocab_size) + 2e-4 * record.config.n_embd if record.vocab_size > 1 else math.nan


CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    nothing_logged,
    metrics_damaged,
    unfinished,
    no_checkpoint,
    non_finite,
    steps_skipped,
    rolled_back,
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
