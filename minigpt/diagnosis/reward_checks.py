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

# The share of right answers counts as fallen only if the fall is at least a fifth of the share at the first
# evaluation, and at least 0.05. A smaller fall may be noise: with 200 prompts, the standard error of a share
# is up to 0.035.
FALL_SHARE, FALL = 0.2, 0.05
# The reward counts as risen only if the rise is more than 2 % of the reward at the first evaluation, and more
# than 2 % of the difference between the largest and the smallest reward of the run. A smaller rise is noise.
RISE = 0.02
# Report a problem if the answers at the end are more than three times as long as at the first evaluation, or
# less than a third as long.
LENGTH_TIMES = 3.0
CUT_OFF = 0.5  # answers are endless if at least this share of them reaches the largest number of tokens
EQUAL = 0.9  # little is learned if, for at least this share of the prompts, all answers have the same reward


def learns_from_rewards(record: RunRecord) -> bool:
    """Return True if the run learns from rewards (task grpo)."""
    return isinstance(record.config, FinetuneConfig) and record.config.task == "grpo"


def _ends(record: RunRecord) -> tuple[ValPoint, ValPoint] | None:
    """Return the first and the last evaluation if the reward has risen between them, else None."""
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
    fall = first.exact_match - last.exact_match  # NaN if the data has no answers: then no finding
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
    """Check whether, for nearly all prompts, all answers had the same reward. Such prompts teach nothing."""
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
