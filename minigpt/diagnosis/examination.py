"""Runs all checks on a run. `examine(record)` returns the findings, the worst first."""

from minigpt.diagnosis.checks import CHECKS
from minigpt.diagnosis.curves import Curve, compare, compare_with_recipe
from minigpt.diagnosis.data_checks import DATA_CHECKS, DataRecord, read_data_record
from minigpt.diagnosis.findings import LEVELS, Finding, finding
from minigpt.diagnosis.record import RunRecord
from minigpt.errors import InputError, printable

__all__ = ["examine"]


def examine(record: RunRecord, curve: Curve | None = None, deep: bool = False) -> list[Finding]:
    """Run every check.

    Args:
        record: the run.
        curve: compare with this curve instead of the recipe's.
        deep: also load the best checkpoint and let it answer validation questions.

    Raises:
        InputError: if the recipe's reference curve is damaged.
    """
    found = [check(record) for check in CHECKS]
    done = len(CHECKS) + 1
    found.append(compare(record, curve) if curve else compare_with_recipe(record))
    data = read_data_record(record)
    if isinstance(data, DataRecord):
        found += [check(data) for check in DATA_CHECKS]
        done += len(DATA_CHECKS)
    else:
        found.append(data)
    if deep:
        found += _answers(record, data)
        done += 1
    findings = [one for one in found if one is not None]
    if all(one.level in ("ok", "note") for one in findings):
        findings.append(finding("healthy", checks=done, steps=record.steps_done))
    return sorted(findings, key=lambda one: LEVELS.index(one.level))


def _answers(record: RunRecord, data: DataRecord | Finding) -> list[Finding]:
    if isinstance(data, Finding):
        return [finding("no_questions", why=data.code)]
    # not at the top of the file, because it imports torch
    from minigpt.diagnosis.answers import ask, judge_answers

    try:
        answers, limit = ask(record, data.val)
        return judge_answers(answers, limit, record.config.max_length)
    except InputError as error:
        return [finding("deep_impossible", reason=printable(str(error)))]
