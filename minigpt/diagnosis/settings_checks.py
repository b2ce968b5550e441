"""Checks the settings of a run that learned little. A check is a pure function: RunRecord -> Finding or None.

    for check in SETTINGS_CHECKS:
        found = check(record)

An unusual setting alone is not reported. The run must also have learned little, or made its loss worse. Two
facts explain most thresholds. First, a step of AdamW changes a weight at most by about the learning rate,
whatever the gradient is. Second, initial weights have a standard deviation of 0.02 in every model family.
"""

import itertools
import math
from collections.abc import Callable
from statistics import fmean

from minigpt.diagnosis.advice import gentler, longer, rates, relative_rate, usual_rates
from minigpt.diagnosis.checks import ENOUGH_LINES, finite, late_share, untrained
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord, TrainPoint
from minigpt.training.optimizer import schedule

__all__ = ["SETTINGS_CHECKS"]

# If the loss stays above 0.9 times the unigram loss, the model has learned little. (The unigram loss is the
# loss of a model that knows how frequent each token is, and uses no context.)
LITTLE = 0.9
# If the loss stays above 0.97 times the unigram loss, the model has learned nothing but frequencies. The
# limit is not 1, because the unigram loss is not exact: smoothing of the frequencies changes it by 3 %.
NOTHING_BELOW = 0.97
# If the loss is below a quarter of the unigram loss, the model has learned most of the data, and no setting
# is reported. (On real texts, models end at a third or more.)
NOT_FAR = 0.25
# The weights have hardly changed if none of them can have moved by 0.1 in the whole run. (0.1 is five times
# the standard deviation of the initial weights.)
MOVED = 0.1
# A learning rate is low below a tenth of the usual rate, and high from ten times the usual rate on.
# (`usual_rates` returns the usual rate.) These limits are wide, because good rates differ: recipes for small
# models have rates from 3e-4 to 1e-2 for AdamW, and from 0.01 to 0.05 for Muon.
LOW, HIGH = 0.1, 10.0
# The first steps of a run change the weights too much in two cases. First: the loss rises to more than 0.15
# nats above the loss of the untrained model; between batches, it varies only by a few hundredths. Second: the
# learning rate is high, and a loss is more than half a nat above an earlier loss. Both are looked for only in
# the first tenth of the recorded losses, but at least in the first ten.
ABOVE, RISE, FIRST_LINES = 0.15, 0.5, 10
WARM = 10  # with at least this number of warm-up steps, the warm-up is not reported as missing
# In a long run, AdamW's weights stay below the limit 1 / weight_decay. A limit below 0.2 is too small. A run
# is long if weight_decay times the sum of the learning rates of all steps is at least 1.
DECAY_LIMIT, DECAY_TIME = 0.2, 1.0
# Dropout of at least this share is high: no recipe drops half of all activations.
DROPOUT = 0.5
# Report clipping if it divides all gradients by 1000 or more, and if the gradient of a single weight is then
# close to AdamW's eps, 1e-8. (AdamW's steps do not depend on the scale of gradients that are far above eps.)
# Clipping is meant for a few large gradients only.
CLIP_TIMES, CLIP_LEFT = 1000.0, 1e-7
# The loss still falls fast if it falls in the last third of the steps by at least 0.2 of its whole fall, and
# by at least 0.1 nats. Along a straight line, this share would be 1/3. If the curve is flat at the end, the
# share is below 0.1.
STEEP, STEEP_NATS = 0.2, 0.1
# Number of target tokens per step: with fewer than 32, the gradient is mostly noise; 500 are enough.
FEW_TARGETS, ENOUGH_TARGETS = 32.0, 500.0
# A model is too small if four conditions hold: the data has more bits than the parameters can store, at 2
# bits per parameter (https://arxiv.org/abs/2404.05405); less than 10 % of the whole fall of the loss is in
# the last third of the run; the validation loss is at most 20 % above the training loss; the run read the
# data at least 3 times.
BITS, STILL, GAP, EPOCHS = 2.0, 0.1, 0.2, 3.0


def best_loss(record: RunRecord) -> float:
    """Return the lowest validation loss; nan without an evaluation."""
    return min((point.loss for point in finite(record.val)), default=math.nan)


def end_loss(record: RunRecord) -> float:
    """Return the training loss at the end; nan if no training loss was recorded.

    The result is the mean over the metrics lines of the last epoch. A whole epoch has
    batches of short rows and batches of long rows, whose losses differ. But at most a fifth of all lines is
    used, and at least three lines.
    """
    train = finite(record.train)
    last = [point.loss for point in train if point.epoch > train[-1].epoch - 1]
    count = max(3, min(len(last), len(train) // 5))
    return fmean([point.loss for point in train[-count:]]) if train else math.nan


def learned_less_than(record: RunRecord, share: float) -> bool:
    """Return True if both losses stayed high; False if a loss is low, or not known.

    The validation loss is low if it was ever below `share` times the unigram loss of the validation data. The
    training loss is low if it ended below (`share` - 0.1) times the unigram loss of the training data.
    """
    if record.summary is None or not finite(record.val):
        return False
    far = best_loss(record) < share * record.summary.val_unigram_loss
    by_heart = end_loss(record) < (share - 0.1) * record.summary.train_unigram_loss
    return not far and not by_heart


def is_far(record: RunRecord) -> bool:
    """Return True if the model has learned most of the data, or if this is not known."""
    return record.summary is None or not best_loss(record) >= NOT_FAR * record.summary.val_unigram_loss


def path(record: RunRecord) -> float:
    """Return the sum of (learning rate of a step / setting `learning_rate`) over all steps done.

    This sum times the setting is the largest distance by which AdamW can move a weight.
    """
    total = max(record.total_steps, record.steps_done, 1)
    every = max(1, total // 1000)
    return every * sum(schedule(record.config, step, total) for step in range(0, record.steps_done, every))


def weight_decay_high(record: RunRecord) -> Finding | None:
    """Check whether weight decay keeps the weights too small."""
    config = record.config
    decays = [(config.weight_decay, config.learning_rate)]
    if config.optimizer == "muon":
        decays.append((config.muon_weight_decay, config.muon_learning_rate))
    time = path(record)
    high = [d for d, rate in decays if d > 1 / DECAY_LIMIT and d * rate * time >= DECAY_TIME]
    if not high or is_far(record):
        return None
    names = {"weight_decay": 0.1, **({"muon_weight_decay": 0.1} if config.optimizer == "muon" else {})}
    found = finding("weight_decay_high", decay=max(high), limit=1 / max(high), loss=best_loss(record))
    return found.trying(**names)


def dropout_high(record: RunRecord) -> Finding | None:
    """Check whether dropout is too high."""
    if record.config.dropout < DROPOUT or is_far(record):
        return None
    found = finding("dropout_high", dropout=record.config.dropout, loss=best_loss(record))
    return found.trying(dropout=0.1)


def clip_tiny(record: RunRecord) -> Finding | None:
    """Check whether clipping makes all gradients tiny."""
    limit = record.config.max_grad_norm
    norms = sorted(point.grad_norm for point in record.train if math.isfinite(point.grad_norm))
    if not limit or not norms or not record.parameters or is_far(record):
        return None
    usual = norms[len(norms) // 2]
    if norms[0] < CLIP_TIMES * limit or limit / math.sqrt(record.parameters) > CLIP_LEFT:
        return None
    return finding("clip_tiny", limit=limit, norm=usual, times=usual / limit).trying(max_grad_norm=1.0)


def rate_too_low(record: RunRecord) -> Finding | None:
    """Check whether a low learning rate hardly moved the weights, or left the loss still falling fast."""
    config, rate = record.config, relative_rate(record.config)
    if not record.is_finished or not finite(record.val) or rate >= LOW:
        return None
    moved = config.learning_rate * path(record)
    is_stuck = learned_less_than(record, LITTLE) and (moved < MOVED or rate == 0)
    if not is_stuck and not is_steep(record):
        return None
    numbers = {"rate": max(rates(config).values()), "steps": record.steps_done, "moved": moved}
    return finding("rate_too_low", **numbers, loss=best_loss(record)).trying(**usual_rates(config))


def rate_too_high(record: RunRecord) -> Finding | None:
    """Check whether the learning rate is so high that it raised the loss, or that the run learned little."""
    is_poor, is_warm = learned_less_than(record, LITTLE), record.config.warmup_steps >= WARM
    times, has_leapt = relative_rate(record.config), leapt(record)
    worse = rose(record) and (is_poor or is_warm)
    in_vain = times >= HIGH and (is_poor or not (is_far(record) or (has_leapt and not is_warm)))
    train = finite(record.train)
    if not train or not (worse or in_vain):
        return None
    peak, step, _ = early_peak(record)
    if math.isnan(peak):  # unknown, because the first lines of metrics are missing
        peak, step = max((point.loss, point.step) for point in train)
    numbers = {"step": step, "peak": peak, "start": untrained(record), "loss": best_loss(record)}
    rate = max(rates(record.config).values())
    return finding("rate_too_high", rate=rate, times=times, **numbers).trying(**gentler(record))


def warmup_missing(record: RunRecord) -> Finding | None:
    """Check whether the run had hardly any warm-up, or none, and its first steps raised the loss."""
    if record.config.warmup_steps >= WARM or not (rose(record) or leapt(record)):
        return None
    peak, step, low = early_peak(record)
    numbers = {"step": step, "peak": peak, "low": low, "warmup": record.config.warmup_steps}
    warmup = max(WARM, min(100, record.total_steps // 10))
    rate = max(rates(record.config).values())
    return finding("warmup_missing", rate=rate, **numbers).trying(warmup_steps=warmup, max_grad_norm=1.0)


def rose(record: RunRecord) -> bool:
    """Return True if the first steps raised the loss of a new model.

    The loss must be high at two steps in a row, because a single batch with rare tokens may have a high loss,
    too. If the run recorded only means over several steps, one high mean is enough.
    """
    train = first_lines(record)
    above = [point.loss > untrained(record) + ABOVE for point in train]
    return any(above) if record.lines_every > 1 else any(a and b for a, b in itertools.pairwise(above))


def leapt(record: RunRecord) -> bool:
    """Return True if the learning rate is high and one of the first losses is far above an earlier loss."""
    peak, _, low = early_peak(record)
    return relative_rate(record.config) >= HIGH and peak > low + RISE


def first_lines(record: RunRecord) -> list[TrainPoint]:
    """Return the first tenth of the metrics lines, at least ten; [] if the run's first lines are missing."""
    train = finite(record.train)
    if not train or math.isnan(untrained(record)) or train[0].step > 2 * max(record.lines_every, 10):
        return []
    return train[: max(FIRST_LINES, len(train) // 10)]


def early_peak(record: RunRecord) -> tuple[float, int, float]:
    """Find the largest rise of the loss in the first lines of metrics.

    A rise is the difference between a loss and the lowest loss before it. The loss of the untrained model
    counts as the very first loss.

    Returns: (the loss after the rise, its step, the lowest loss before it). If the first lines are missing,
        (nan, 0, nan).
    """
    train, low = first_lines(record), untrained(record)
    if not train:
        return math.nan, 0, math.nan
    found = (train[0].loss, train[0].step, low)
    for point in train:
        is_first = point.step <= max(FIRST_LINES, record.steps_done // 50)
        if point.loss - low > found[0] - found[2] and (is_first or point.loss > untrained(record)):
            found = (point.loss, point.step, low)
        low = min(low, point.loss)
    return found


def is_steep(record: RunRecord) -> bool:
    """Return True if the validation loss still fell much in the last third of the steps."""
    fell = untrained(record) - best_loss(record)
    return late_share(record) >= STEEP and fell * late_share(record) >= STEEP_NATS


def too_short(record: RunRecord) -> Finding | None:
    """Check whether the loss is still falling fast at the end, or the weights hardly moved."""
    if not record.is_finished or not finite(record.val):
        return None
    moved = max(rate for rate in rates(record.config).values()) * path(record)
    hardly_begun = learned_less_than(record, LITTLE) and moved < MOVED
    if not hardly_begun and not is_steep(record):
        return None
    numbers = {"steps": record.steps_done, "share": late_share(record), "loss": best_loss(record)}
    return finding("too_short", **numbers).trying(**longer(record.config, 10 if hardly_begun else 3))


def batch_too_small(record: RunRecord) -> Finding | None:
    """Check whether steps have so few targets that gradients are mostly noise, and the loss stayed high."""
    summary, config = record.summary, record.config
    if summary is None or not finite(record.val):
        return None
    batch = config.batch_size * config.gradient_accumulation_steps
    targets = batch * summary.train_targets / summary.train_examples
    if targets >= FEW_TARGETS or batch >= summary.train_examples:
        return None
    if best_loss(record) < NOT_FAR * summary.val_unigram_loss:
        return None
    found = finding("batch_too_small", targets=targets, loss=best_loss(record))
    wanted = min(ENOUGH_TARGETS * summary.train_examples / summary.train_targets, summary.train_examples)
    size = 2 ** math.ceil(math.log2(wanted))
    # With the larger batch, a quarter of the steps is enough, because its gradients have less noise. But an
    # epoch then has fewer steps, by the factor size / batch. So if the run's length is set in epochs, a
    # quarter of the steps is size / batch / 4 times as many epochs as before. If this factor is below 1,
    # the number of epochs is not changed.
    times = 0.25 if config.max_steps else max(1.0, size / batch / 4)
    return found.trying(batch_size=size, **longer(config, times))


def model_too_small(record: RunRecord) -> Finding | None:
    """Check whether both losses stopped at nearly the same value, because the model cannot store more."""
    summary, train = record.summary, finite(record.train)
    if summary is None or len(train) < ENOUGH_LINES or not record.is_finished or not record.parameters:
        return None
    end, best = end_loss(record), best_loss(record)
    bits = end * summary.train_targets / math.log(2)
    is_still = len(finite(record.val)) >= 3 and late_share(record) < STILL
    if not is_still or not train[-1].epoch >= EPOCHS or bits < BITS * record.parameters:
        return None
    if best > (1 + GAP) * end or learned_less_than(record, NOTHING_BELOW):
        return None
    config = record.config
    wider: dict[str, int] = {"n_embd": 4 * config.n_embd, "n_layer": max(2, config.n_layer)}
    if config.intermediate_size:
        wider["intermediate_size"] = 4 * config.intermediate_size
    found = finding("model_too_small", parameters=record.parameters, train=end, loss=best)
    return found.trying(**wider)


def nothing_learned(record: RunRecord) -> Finding | None:
    """Check whether the model is no better than token frequencies: no loss is below the unigram loss."""
    if not learned_less_than(record, NOTHING_BELOW) or record.summary is None:
        return None
    numbers = {"unigram": record.summary.val_unigram_loss, "uniform": record.summary.uniform_loss}
    return finding("nothing_learned", loss=best_loss(record), **numbers)


SETTINGS_CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    weight_decay_high,
    dropout_high,
    clip_tiny,
    rate_too_low,
    rate_too_high,
    warmup_missing,
    too_short,
    batch_too_small,
    model_too_small,
    nothing_learned,
)
