"""Checks a run that learned from rewards: did the rewards rise in an unwanted way (reward hacking)?

The losses of such a run do not show whether it went well, so the checks of losses are left out. The
thresholds are rules of thumb; each finding shows its numbers.
"""

import math
from collections.abc import Callable

from minigpt.diagnosis.checks import COMMON_CHECKS, throughput_drop
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord, ValPoint
from minigpt.training.finetune_config import FinetuneConfig

__all__ = ["REWARD_CHECKS", "learns_from_rewards"]

# With 200 prompts the standard error of a share is at most 0.035. A fall by a fifth of the first value, and
# by at least 0.05, is not noise.
FALL_SHARE, FALL = 0.2, 0.05
RISE = 0.02  # smallest rise that counts, as a share of the run's range of rewards; smaller rises are noise
# Answers with a third of the length, or three times the length, have another form.
LENGTH_TIMES = 3.0
CUT_OFF = 0.5  # share of answers without an end at which answers count as endless
EQUAL = 0.9  # share of groups with equal rewards at which little can be learned


def learns_from_rewards(record: RunRecord) -> bool:
    """Return whether the run's task is grpo."""
    return isinstance(record.config, FinetuneConfig) and record.config.task == "grpo"


def _ends(record: RunRecord) -> tuple[ValPoint, ValPoint] | None:
    """Return the first and the last evaluation, if the reward has risen between them."""
    points = [point for point in record.val if math.isfinite(point.reward)]
    if len(points) < 2:
        return None
    rewards = [point.reward for point in points]
    least = RISE * max(max(rewards) - min(rewards), abs(rewards[0]))
    return (points[0], points[-1]) if rewards[-1] - rewards[0] > least else None


def reward_hacking(record: RunRecord) -> Finding | None:
    """Check whether the reward rose while fewer answers were right."""
    if (ends := _ends(record)) is None:
        return None
    first, last = ends
    fall = first.exact_match - last.exact_match  # NaN if the file has no answers
    if not fall >= max(FALL, FALL_SHARE * first.exact_match):
        return None
    return finding("reward_hacking", **_numbers(first, last))


def answers_degenerate(record: RunRecord) -> Finding | None:
    """Check whether the reward rose while answers became much shorter, much longer, or endless."""
    if (ends := _ends(record)) is None:
        return None
    first, last = ends
    ratio = last.completion_length / max(first.completion_length, 1e-9)
    has_changed = ratio > LENGTH_TIMES or ratio < 1 / LENGTH_TIMES
    if not has_changed and not (last.clipped_ratio >= CUT_OFF > first.clipped_ratio):
        return None
    return finding("answers_degenerate", **_numbers(first, last))


def _numbers(first: ValPoint, last: ValPoint) -> dict[str, float]:
    names = ("reward", "exact_match", "completion_length", "clipped_ratio")
    found = {f"{name}_first": getattr(first, name) for name in names}
    return {"step": last.step, **found, **{f"{name}_last": getattr(last, name) for name in names}}


def rewards_equal(record: RunRecord) -> Finding | None:
    """Check whether nearly all groups had equal rewards, which teach nothing."""
    shares = [point.equal_groups for point in record.train if math.isfinite(point.equal_groups)]
    if not shares:
        return None
    share = sum(shares) / len(shares)
    rewards = [point.reward for point in record.train if math.isfinite(point.reward)]
    if share < EQUAL:
        return None
    return finding("rewards_equal", share=share, reward=sum(rewards) / max(1, len(rewards)))


REWARD_CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    *COMMON_CHECKS,
    reward_hacking,
    answers_degenerate,
    rewards_equal,
    throughput_drop,
)
