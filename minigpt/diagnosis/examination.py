"""Runs all checks on one run: `examine(record)` returns the findings, the worst first."""

import dataclasses
from collections.abc import Sequence

from minigpt.diagnosis.advice import longer, recipe_command, train_command
from minigpt.diagnosis.checks import CHECKS
from minigpt.diagnosis.curves import Curve, compare, compare_with_recipe
from minigpt.diagnosis.data_checks import (
    DATA_CHECKS,
    SIZE_CHECKS,
    DataRecord,
    answers_fit,
    read_data_record,
)
from minigpt.diagnosis.findings import Finding, finding, without_consequences
from minigpt.diagnosis.record import RunRecord
from minigpt.diagnosis.reward_checks import REWARD_CHECKS, learns_from_rewards
from minigpt.diagnosis.settings_checks import SETTINGS_CHECKS
from minigpt.errors import InputError, printable

__all__ = ["examine"]


def examine(record: RunRecord, curve: Curve | None = None, deep: bool = False) -> list[Finding]:
    """Run every check. Return the findings, the worst first, with commands to try.

    Args:
        curve: a reference curve to compare with. Default: the curve of the recipe.
        deep: True also loads the best checkpoint, and checks its loss and answers on held-out pairs.

    Raises:
        InputError: if the recipe's reference curve is damaged.
    """
    if learns_from_rewards(record):
        found = [check(record) for check in REWARD_CHECKS]
        return _findings(record, found, len(found))
    data = read_data_record(record)
    if isinstance(data, DataRecord):
        record = dataclasses.replace(record, summary=data.summary)
    found = [check(record) for check in (*SIZE_CHECKS, *CHECKS, *SETTINGS_CHECKS)]
    found.append(compare(record, curve) if curve else compare_with_recipe(record))
    found += [check(data) for check in DATA_CHECKS] if isinstance(data, DataRecord) else [data]
    done = len(found)
    if deep and isinstance(data, DataRecord):
        found += _answers(record, data)
        done += 1
    return _findings(record, found, done)


def _findings(record: RunRecord, found: Sequence[Finding | None], done: int) -> list[Finding]:
    """Return the findings, each with its commands. If none is a problem, add a finding that says so.

    `done` is the number of checks that were run.
    """
    findings = without_consequences(one for one in found if one is not None)
    if all(one.level in ("ok", "note") for one in findings):
        healthy = finding("healthy", checks=done, steps=record.steps_done)
        findings = without_consequences([*findings, healthy])  # also sorts the findings: the worst first
    return [_with_commands(record, one) for one in findings]


def _with_commands(record: RunRecord, found: Finding) -> Finding:
    commands = list(found.before)
    if found.flags is not None:
        commands.append(train_command(record, found.flags))
    if found.code == "nothing_learned":
        commands.append(recipe_command(record, "shakespeare-cpu" if record.config.text else "qa-cpu"))
    return dataclasses.replace(found, commands=tuple(commands))


def _answers(record: RunRecord, data: DataRecord) -> list[Finding]:
    from minigpt.diagnosis.answers import ask, judge, load_best, measure  # importing this takes time

    try:
        model, tokenizer = load_best(record)
        answers, limit = ask(model, tokenizer, data.val)
        found = judge(measure(model, tokenizer, data.val), answers, limit, answers_fit(data))
    except InputError as error:
        return [finding("deep_impossible", reason=printable(str(error)))]
    more = longer(record.config, 3)
    return [one.trying(**more) if one.code == "question_ignored" else one for one in found]
