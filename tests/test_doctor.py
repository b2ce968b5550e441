"""The doctor: each finding on a made-up run that has it and on one that narrowly misses it; real runs.

Every recommended command is run here without changes, on the data of a run that caused it.
"""

import dataclasses
import json
import math
import shlex
import string
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt.console.flags import parse
from minigpt.console.language import chosen_language
from minigpt.data.conversation import Conversation, Exchange, Turn, conversation_of_pair
from minigpt.data.reader import ReadReport
from minigpt.data.token_statistics import compute_statistics
from minigpt.diagnosis import checks, data_checks, settings_checks
from minigpt.diagnosis.advice import train_command
from minigpt.diagnosis.answers import AnswerLoss, judge
from minigpt.diagnosis.checks import CHECKS
from minigpt.diagnosis.curves import compare, compare_with_recipe, read_curve, save_curve
from minigpt.diagnosis.data_checks import DATA_CHECKS, SIZE_CHECKS, DataRecord, answers_fit
from minigpt.diagnosis.examination import examine
from minigpt.diagnosis.findings import LEVELS, WORDS, Finding, Language, without_consequences
from minigpt.diagnosis.record import Event, RunRecord, TrainPoint, ValPoint, _settings, read_record
from minigpt.diagnosis.settings_checks import SETTINGS_CHECKS
from minigpt.errors import InputError
from minigpt.generation.api import Answer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import RECIPES, TrainConfig, read_recipe
from minigpt.training.data_summary import LEARN_FROM, MEASURE_ON, DataSummary
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.resolve import resolve
from tests.commands import RunCommand
from tests.runs import write_data

ROOT = Path(__file__).parents[1]
STEPS = 300  # number of steps of a made-up run, with 30 lines of metrics and 10 evaluations
LANGUAGES: tuple[Language, ...] = ("en", "zh")
# The model is tiny, because commands with these settings are run. For 16 channels the usual rate is 3e-3.
SETTINGS: dict[str, Any] = {
    "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32, "max_length": 32, "max_steps": 20,
    "learning_rate": 3e-3, "logging_steps": 10, "threads": 1, "device": "cpu", "report_to": "none",
}  # fmt: skip
# 1,100 tokens: ln V is 7.003. The unigram loss is 5.5 on the training part and 5.6 on the validation part.
SUMMARY = DataSummary("pairs", 100, 5000, 50, 2000, 1100, 5.5, 5.6, 6.0, False)


def curve(step: float) -> float:
    """Return a healthy training loss. It falls from 7 to 1, fast at first."""
    return 1 + 6 * math.exp(-step / 60)


def run(
    loss: Callable[[int], float] = curve,
    held_out: Callable[[int], float] = lambda step: curve(step) + 0.1,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    **changes: Any,
) -> RunRecord:
    """Make a finished run of 300 steps with the given losses. Everything else is healthy."""
    points = [
        TrainPoint(step, loss(step), 1.0, 1e-3, step / 100, 1000.0, float(step))
        for step in range(10, STEPS + 1, 10)
    ]
    record = RunRecord(
        folder=Path("output"),
        config=TrainConfig(**{**SETTINGS, **(config or {})}),
        train=points,
        val=[ValPoint(step, held_out(step)) for step in range(30, STEPS + 1, 30)],
        state={
            "steps_done": STEPS,
            "total_steps": STEPS,
            "tokens_seen": 1000 * STEPS,
            "train_fingerprint": "t",
            "val_fingerprint": "v",
            "vocabulary_fingerprint": "w",
        },
        vocab_size=1100,
        summary=dataclasses.replace(SUMMARY, **(summary or {})),
    )
    return dataclasses.replace(record, **changes)


def with_points(record: RunRecord, **values: Callable[[int], float]) -> RunRecord:
    """Return the same run with other values in its lines of training, given by functions of the step."""
    points = []
    for point in record.train:
        changed: dict[str, Any] = {name: value(point.step) for name, value in values.items()}
        points.append(dataclasses.replace(point, **changed))
    return dataclasses.replace(record, train=points)


EVERY = (*SIZE_CHECKS, *CHECKS, *SETTINGS_CHECKS)


def findings_of(record: RunRecord) -> dict[str, Finding]:
    return {one.code: one for check in EVERY if (one := check(record))}


def found(record: RunRecord) -> set[str]:
    """Return the findings' codes, without those of every healthy run and the note about flat curves."""
    return set(findings_of(record)) - {"not_overfitting", "plateau"}


def straight(step: float) -> float:
    return 7 - step / 100


def poor(loss: float = 5.1, **config: Any) -> RunRecord:
    """Make a run whose losses stay near the unigram loss: the limit is 0.9 * 5.6 = 5.04."""
    return run(lambda step: loss, lambda step: loss, config=config)


def rising_to(end: float) -> Callable[[int], float]:
    """Return the curve with another loss in its last fifty steps."""
    return lambda step: curve(step) if step < 250 else end


def peaking(peak: float, **config: Any) -> RunRecord:
    """Make a good run with another loss in its first line."""
    return run(lambda step: peak if step == 10 else curve(step), config=config)


SMALL_DATA = {"train_targets": 50_000}
EIGHT = {"n_embd": 8, "n_head": 1, "block_size": 32}
CHANGED = ("the training data (a.jsonl) is another one (--allow_changed_data)",)

# code -> (a run with this finding, a run that narrowly misses it)
RUNS: dict[str, tuple[RunRecord, RunRecord]] = {
    "nothing_logged": (run(train=[], val=[]), run(val=[])),
    "metrics_damaged": (run(broken_lines=2), run(broken_lines=1)),  # one: a process was killed
    "unfinished": (
        run(state={"steps_done": STEPS, "total_steps": STEPS + 1, "tokens_seen": 1}),
        run(state={"steps_done": STEPS, "total_steps": STEPS, "tokens_seen": 1}),
    ),
    "no_checkpoint": (run(state={}), run(state={"steps_done": 10})),
    "non_finite": (
        run(non_finite=(20, 300)),
        run(non_finite=(20, 299)),  # the run recovered
    ),
    "steps_skipped": (
        run(events=[Event(20, "skipped")], config={"learning_rate": 2e-2}),
        run(events=[Event(20, "something else")]),
    ),
    "rolled_back": (
        run(events=[Event(20, "rollback")], config={"learning_rate": 2e-2}),
        run(events=[Event(20, "skipped")]),
    ),
    "data_replaced": (
        run(events=[Event(20, "changed", what=CHANGED)]),
        run(events=[Event(20, "changed", what=("max_steps 20 -> 40", "seed 1 -> 2"))]),
    ),
    "first_loss_low": (run(lambda step: curve(step) / 3), run(lambda step: curve(step) / 2)),
    "nothing_to_learn": (run(lambda step: 9e-4), run(lambda step: 2e-3)),
    "not_overfitting": (
        run(held_out=lambda step: 2.0 if step < 300 else 2.03),  # 1.5 %
        run(held_out=lambda step: 2.0 if step < 300 else 2.05),
    ),
    "diverged": (run(rising_to(1.7), rising_to(1.7)), run(rising_to(1.55), rising_to(1.7))),  # from 1.095
    "loss_spikes": (
        run(lambda step: curve(step) + (5 if step >= 180 and step % 20 == 0 else 0)),  # 7 of 300 steps
        run(lambda step: curve(step) + (5 if step >= 220 and step % 20 == 0 else 0)),  # 5
    ),
    "gradient_grows": (
        with_points(run(), grad_norm=lambda step: 6 if step > 240 else 1),
        with_points(run(), grad_norm=lambda step: 4 if step > 240 else 1),
    ),
    "still_falling": (
        run(held_out=lambda step: 4 if step == 270 else 3.8 if step == 300 else 5),
        run(held_out=lambda step: 4 if step == 270 else 3.9 if step == 300 else 5),  # 2.5 %
    ),
    "overfitting": (
        run(held_out=lambda step: 2 + abs(step - 150) / 100),
        run(
            lambda step: 2.0 + step / 1e4, held_out=lambda step: 2 + abs(step - 150) / 100
        ),  # train rises, too
    ),
    "plateau": (run(held_out=lambda step: 2 - step / 1e5), run(held_out=lambda step: 2 - step / 5e3)),
    "throughput_drop": (
        with_points(run(), tokens_per_second=lambda step: 700 if step > 200 else 1000),
        with_points(run(), tokens_per_second=lambda step: 800 if step > 200 else 1000),
    ),
    "too_few_to_learn": (
        run(summary={"train_targets": LEARN_FROM - 1}),
        run(summary={"train_targets": LEARN_FROM}),
    ),
    "too_few_to_measure": (
        run(summary={"val_targets": MEASURE_ON - 1}),
        run(summary={"val_targets": MEASURE_ON}),
    ),
    "val_is_train": (run(summary={"is_same": True}), run(summary={"is_same": False})),
    "val_unlike_train": (run(summary={"val_unigram_loss": 6.51}), run(summary={"val_unigram_loss": 6.5})),
    "weight_decay_high": (poor(weight_decay=5.1), poor(weight_decay=4.9)),
    "dropout_high": (poor(dropout=0.5), poor(dropout=0.49)),
    "clip_tiny": (poor(max_grad_norm=1.4e-5), poor(max_grad_norm=1.5e-5)),  # 1e-7 times the root of 21,328
    "rate_too_low": (poor(learning_rate=2.9e-4), poor(learning_rate=3.1e-4)),  # a tenth of 3e-3
    "rate_too_high": (poor(learning_rate=3.01e-2), poor(learning_rate=2.9e-2)),  # ten times 3e-3
    "warmup_missing": (peaking(7.2), peaking(7.1)),  # above 7.003 + 0.003 + 0.15
    "too_short": (run(held_out=straight), run(held_out=curve)),
    "batch_too_small": (
        run(
            held_out=lambda step: curve(step) + 0.5, config={"batch_size": 1}, summary={"train_targets": 3199}
        ),
        run(
            held_out=lambda step: curve(step) + 0.5, config={"batch_size": 1}, summary={"train_targets": 3201}
        ),
    ),
    "model_too_small": (
        run(lambda step: 3.4, lambda step: 3.5, config=EIGHT, summary=SMALL_DATA),
        run(lambda step: 3.4, lambda step: 4.1, config=EIGHT, summary=SMALL_DATA),  # 21 % apart
    ),
    "nothing_learned": (poor(5.44), poor(5.43)),  # 0.97 * 5.6 = 5.432
}


@pytest.mark.parametrize("code", RUNS)
def test_a_run_that_has_it_and_one_that_nearly_has_it(code: str) -> None:
    has, nearly = map(findings_of, RUNS[code])
    assert code in has
    assert code not in nearly


def test_a_healthy_run_is_left_in_peace_and_does_not_overfit() -> None:
    assert set(findings_of(run())) == {"not_overfitting"}


def test_every_check_of_a_run_has_a_run_of_its_own() -> None:
    assert {code for record, _ in RUNS.values() for code in findings_of(record)} == set(RUNS)


def test_the_numbers_are_those_of_the_run() -> None:
    over = checks.overfitting(RUNS["overfitting"][0])
    assert over is not None
    assert (over.numbers["step"], over.numbers["minimum"], over.numbers["last"]) == (150, 2.0, 3.5)
    last_three = (curve(280) + curve(290) + curve(300)) / 3
    assert over.numbers["train"] == pytest.approx(last_three)
    assert over.numbers["gap"] == pytest.approx(3.5 - last_three)
    assert over.flags == {"max_steps": 180}  # the evaluation after the best one
    peak = settings_checks.warmup_missing(RUNS["warmup_missing"][0])
    assert peak is not None
    assert (peak.numbers["peak"], peak.numbers["step"]) == (7.2, 10)
    assert peak.numbers["low"] == pytest.approx(math.log(1100) + 2e-4 * 16)
    slow = checks.throughput_drop(RUNS["throughput_drop"][0])
    assert slow is not None
    assert slow.numbers == {"before": 1000.0, "after": 700.0, "share": 0.7}


def test_the_way_of_a_weight_by_hand() -> None:
    """With a constant rate every step counts 1. A warm-up of 300 steps gives half of that, plus a half."""
    constant = run(config={"lr_scheduler_type": "constant"})
    assert settings_checks.path(constant) == STEPS
    rising = run(config={"lr_scheduler_type": "constant", "warmup_steps": STEPS})
    assert settings_checks.path(rising) == pytest.approx((STEPS + 1) / 2)


def test_what_the_last_third_brought_by_hand() -> None:
    start = math.log(1100) + 2e-4 * 16
    assert checks.late_share(run(held_out=straight)) == pytest.approx(1 / (start - 4))  # 5 at 200, 4 at 300
    # evaluations at 90, 180 and 300: step 200 lies a sixth of the way from the second to the third
    some = run(val=[ValPoint(90, 6.0), ValPoint(180, 5.0), ValPoint(300, 4.4)])
    assert checks.late_share(some) == pytest.approx(0.5 / (start - 4.4))
    assert checks.late_share(run(val=[ValPoint(300, 4.4)])) == 0.0


def test_a_setting_is_not_blamed_where_the_run_went_well() -> None:
    strange = {"weight_decay": 50.0, "dropout": 0.9, "max_grad_norm": 1e-6, "learning_rate": 0.5}
    assert found(run(config={**strange, "warmup_steps": 20})) == set()


@pytest.mark.parametrize(
    ("code", "config"),
    [
        ("weight_decay_high", {"weight_decay": 50.0}),
        ("dropout_high", {"dropout": 0.9}),
        ("clip_tiny", {"max_grad_norm": 1e-6}),
        ("rate_too_high", {"learning_rate": 0.1}),
        ("batch_too_small", {"batch_size": 1}),
    ],
)
def test_where_most_is_learned_no_setting_is_to_blame(code: str, config: dict[str, Any]) -> None:
    for best, is_blamed in ((1.41, True), (1.39, False)):  # a quarter of 5.6 is 1.4
        record = run(held_out=lambda step: curve(step) - curve(STEPS) + best, config=config)  # noqa: B023
        few = dataclasses.replace(record, summary=dataclasses.replace(SUMMARY, train_targets=3000))
        assert (code in found(few)) is is_blamed


def test_a_low_training_loss_was_learned_whatever_the_validation_loss() -> None:
    """Two pairs are memorised. The validation loss never falls, so this is overfitting."""
    record = run(held_out=lambda step: 5.7 + step / 300)
    assert found(record) == {"overfitting"}


def test_a_run_of_two_lines_can_overfit() -> None:
    """With evaluations at steps 1 and 2, there is one line of training before the best one, or none."""
    for first in (1, 2):
        lines = [TrainPoint(step, 4.0 - step) for step in range(first, 4)]
        record = run(train=lines, val=[ValPoint(1, 3.36), ValPoint(3, 5.03)])
        assert "overfitting" in found(record)


def test_muon_s_rates_are_muon_s() -> None:
    muon = {"optimizer": "muon", "learning_rate": 1e-2, "muon_learning_rate": 0.02}
    assert found(poor(5.1, **muon)) == set()
    low = findings_of(poor(5.1, **{**muon, "learning_rate": 1e-4, "muon_learning_rate": 1e-4}))
    assert low["rate_too_low"].flags == {"learning_rate": 1e-2, "muon_learning_rate": 0.02}
    high = findings_of(poor(5.1, **{**muon, "muon_learning_rate": 0.21}))
    assert high["rate_too_high"].flags is not None
    assert high["rate_too_high"].flags["muon_learning_rate"] == 0.02


def test_a_rate_that_a_warm_up_did_not_save_is_too_high() -> None:
    assert "warmup_missing" in found(peaking(9.0, warmup_steps=9))
    assert "rate_too_high" in found(peaking(9.0, warmup_steps=10))
    # At a high rate, a spike in the first lines is enough, even if it stays below a new model's loss.
    leaps = {1: 7.0, 2: 5.0, 3: 5.6}
    for rate, expected in ((3.1e-2, {"warmup_missing"}), (3e-3, set())):
        points = [TrainPoint(step, leaps.get(step, curve(step))) for step in range(1, STEPS + 1)]
        assert found(run(train=points, config={"learning_rate": rate})) == expected


def test_where_nothing_speaks_against_the_rate_it_is_not_to_be_lowered() -> None:
    for code, kind in (("steps_skipped", "skipped"), ("rolled_back", "rollback")):
        events = [Event(100, kind)]
        assert findings_of(run(events=events))[code].flags is None
        spikes = [Event(step, "spike", 9.0) for step in (200, 210, 220)]
        assert findings_of(run(events=[*events, *spikes[:2]]))[code].flags is None
        assert findings_of(run(events=[*events, *spikes]))[code].flags
        assert findings_of(run(events=events, config={"learning_rate": 9.1e-3}))[code].flags


def test_one_batch_of_rare_tokens_is_no_rise() -> None:
    """One such batch has a higher loss than a new model, and is no finding. Two in a row are one."""
    for high, expected in (({7}, set()), ({7, 9}, set()), ({7, 8}, {"warmup_missing"})):
        lines = [TrainPoint(s, 7.5 if s in high else curve(s)) for s in range(1, STEPS + 1)]
        assert found(run(train=lines)) == expected


def test_a_first_step_that_was_logged_is_judged_by_itself() -> None:
    points = [TrainPoint(step, 4.0) for step in range(1, 20)]
    assert "first_loss_low" in found(run(train=points))  # 4.0 < 0.7 * 7.0
    assert "first_loss_low" not in found(run(train=points[4:]))


def test_the_distance_to_a_teacher_is_not_compared_with_that_of_a_new_model() -> None:
    for loss in (1.0, 1e-4):
        points = [TrainPoint(step, loss) for step in range(1, 20)]
        record = run(train=points)
        assert {"first_loss_low", "nothing_to_learn"} & found(record)
        taught = dataclasses.replace(record.config, teacher=Path("teacher"))
        assert not {"first_loss_low", "nothing_to_learn"} & found(dataclasses.replace(record, config=taught))


def test_where_the_beginning_is_missing_nothing_is_said_about_it() -> None:
    assert found(run(train=run().train[5:])) == set()
    late = [dataclasses.replace(point, loss=9.0) for point in run().train[5:6]]
    assert found(run(train=[*late, *run().train[6:]])) == set()


def test_events_count_steps_that_the_means_hide() -> None:
    spikes = [Event(step, "spike", 9.0) for step in range(151, 157)]
    spiked = checks.loss_spikes(run(events=spikes))
    assert spiked is not None
    assert (spiked.numbers["count"], spiked.numbers["largest"]) == (6, 9.0)
    assert checks.loss_spikes(run(events=spikes[:5])) is None
    # The same number of spikes in ten times the steps is only a hard batch from time to time.
    longer = [dataclasses.replace(point, step=10 * point.step) for point in run().train]
    assert checks.loss_spikes(run(events=spikes, train=longer)) is None
    # above 6 sigma of a calm curve, but too small to be visible
    low = [Event(step, "spike", curve(step) + 0.4) for step in range(200, 220)]
    assert checks.loss_spikes(run(events=low)) is None


def test_hard_batches_at_the_end_are_no_divergence() -> None:
    """Batches sorted by length differ. The validation loss uses the same data each time, and it fell."""
    assert "diverged" not in found(run(rising_to(2.5)))


def test_small_losses_are_not_judged_by_percentages() -> None:
    def tiny(step: int) -> float:
        return 0.03 if step < 300 else 0.02

    assert "still_falling" not in found(run(held_out=tiny))
    assert "overfitting" not in found(run(lambda step: 1 / step, held_out=lambda step: 0.01 + step / 2e4))
    low = run(lambda step: 0.01 if step < 250 else 0.1, lambda step: 0.01 if step < 250 else 0.1)
    assert "diverged" not in found(low)


def test_where_little_is_measured_on_more_is_chance() -> None:
    def rising(step: int) -> float:
        return 2 - step / 300 if step < 300 else 1.15  # 1.1 at 270: 4.5 %

    assert "overfitting" in found(run(held_out=rising))
    assert "overfitting" not in found(run(held_out=rising, summary={"val_targets": 100}))  # 10 % / 2


def test_skipped_windows_of_the_checkpoint_count() -> None:
    skipped = checks.steps_skipped(run(state={**run().state, "skipped": [[3, 5], [9, 9]], "rollbacks": 1}))
    assert skipped is not None
    assert skipped.numbers == {"count": 4}
    for rubbish in (7, [[1]], [["a", "b"]], "x", None):
        assert checks.steps_skipped(run(state={**run().state, "skipped": rubbish})) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("summary", [SUMMARY, None])
def test_no_check_falls_over_strange_values(value: float, summary: DataSummary | None) -> None:
    def strange(step: int) -> float:
        return value if step % 20 == 0 else curve(step)

    for record in (run(strange, held_out=strange), run(lambda step: value, held_out=lambda step: value)):
        odd = with_points(record, grad_norm=lambda step: value, tokens_per_second=lambda step: value)
        for one in findings_of(dataclasses.replace(odd, summary=summary)).values():
            assert one.text("en")
            json.dumps(one.as_dict())


# -- data ---------------------------------------------------------------------------------------------------


def data(
    answers: list[str] | None = None,
    questions: list[str] | None = None,
    val_questions: list[str] | None = None,
    vocabulary: str = "",
    skipped: list[tuple[int, str]] | None = None,
    lost: list[int] | None = None,
    conversations: list[Conversation] | None = None,
    **config: Any,
) -> DataRecord:
    """Make a hundred pairs of ten characters, with the given changes."""
    answers = answers or [f"答{number:03d}" for number in range(100)]
    questions = questions or [f"问{number:03d}" for number in range(100)]
    train = conversations or [
        pair(q, a, n) for n, (q, a) in enumerate(zip(questions, answers, strict=True), 1)
    ]
    val = [pair(q, "答", n) for n, q in enumerate(val_questions or [f"别{n:03d}" for n in range(100)], 1)]
    known = vocabulary or "".join(text for each in train for text in each.texts())
    report = ReadReport(Path("train.jsonl"), lines=100 + len(skipped or []), skipped=skipped or [])
    report.lost = lost or []
    record = run(config={"max_length": 20, **config})
    tokenizer = Tokenizer.from_word2id(build_vocabulary([known]))
    reports = (report, ReadReport(Path("val.jsonl"), lines=100))
    statistics = compute_statistics(train, tokenizer, record.config.max_length)
    return DataRecord(record, train, val, reports, statistics, SUMMARY)


def pair(question: str, answer: str, line: int = 1) -> Conversation:
    raw = json.dumps({"q": question, "a": answer}, ensure_ascii=False)
    return conversation_of_pair(question, answer, line, raw)


def some(count: int, text: str, usual: str = "答{:03d}") -> list[str]:
    """Return a hundred texts, of which `count` are `text`."""
    return [text if number < count else usual.format(number) for number in range(100)]


def repeated(count: int, text: str) -> list[str]:
    """Return a hundred texts. The first `count` occur twice."""
    return [text.format(number % 50 if number % 50 < count else number) for number in range(100)]


def talk(count: int) -> list[Conversation]:
    """Return a hundred conversations of two questions, of which `count` are long."""
    turns = (Turn("user", "问"), Turn("assistant", "答"), Turn("user", "问"), Turn("assistant", "答好"))
    long = (*turns[:3], Turn("assistant", "答" * 20))
    return [Conversation(long if number < count else turns, number) for number in range(100)]


LONG = "长" * 40
ASKED = [f"谁{number:03d}？" for number in range(100)]
DATA: dict[str, tuple[DataRecord, DataRecord]] = {
    "lines_skipped": (
        data(skipped=[(101, "broken JSON"), (102, "broken JSON")]),  # 2 of 102
        data(skipped=[(101, "broken JSON")]),  # 1 of 101
    ),
    "empty_answers": (
        data(skipped=[(101, "`answer` is empty"), (102, "`answer` is empty")]),
        data(skipped=[(101, "`answer` is empty"), (102, "broken JSON")]),
    ),
    "characters_lost": (data(lost=[3, 4]), data(lost=[3])),
    "mojibake": (
        data(answers=some(2, "é中".encode().decode("latin-1"))),
        data(answers=some(99, "é")),  # alone it is no UTF-8
    ),
    "fields_swapped": (
        data(answers=ASKED[:50] + some(0, "")[50:]),
        data(answers=ASKED[:49] + some(0, "")[49:]),
    ),
    "same_answer": (data(answers=some(21, "不知道")), data(answers=some(20, "不知道"))),
    "leak": (
        data(val_questions=["问００１ ", *(f"别{n}" for n in range(99))]),  # full width and a space: the same
        data(val_questions=["问1001", *(f"别{n}" for n in range(99))]),
    ),
    "contradictions": (
        data(questions=repeated(10, "问{:03d}")),  # 10 of 90
        data(questions=repeated(9, "问{:03d}")),  # 9 of 91
    ),
    "duplicates": (
        data(questions=repeated(11, "问{:03d}"), answers=repeated(11, "答{:03d}")),
        data(questions=repeated(10, "问{:03d}"), answers=repeated(10, "答{:03d}")),
    ),
    "template_differs": (
        data(questions=some(10, "谁", "请答：{:03d}")),
        data(questions=some(11, "谁", "请答：{:03d}")),
    ),
    "markup": (data(answers=some(11, "好</s>")), data(answers=some(10, "好</s>"))),
    "unknown_characters": (
        data(answers=some(9, "鑫001"), vocabulary="问答0123456789"),  # 9 of 800 characters
        data(answers=some(8, "鑫001"), vocabulary="问答0123456789"),  # exactly 1 %
    ),
    "pairs_cut": (data(answers=some(6, LONG)), data(answers=some(5, LONG))),
    "conversations_cut": (data(conversations=talk(6)), data(conversations=talk(5))),
    "answers_cut_away": (
        data(questions=some(2, LONG, "问{:03d}")),
        data(questions=some(1, LONG, "问{:03d}")),
    ),
    "mostly_questions": (
        data(answers=some(100, "是"), questions=some(0, "", "问{:06d}"), loss_on="all"),  # 2 of 9 targets
        data(answers=some(100, "是的"), questions=some(0, "", "问{:06d}"), loss_on="all"),  # 3 of 10
    ),
    "mostly_padding": (
        data(pad_to_max_length=True, max_length=20),  # rows of 10: 9 of 19 inputs are real
        data(pad_to_max_length=True, max_length=19),  # 9 of 18
    ),
}


def found_in(record: DataRecord) -> set[str]:
    return {one.code for check in DATA_CHECKS if (one := check(record))}


@pytest.mark.parametrize("code", DATA)
def test_data_that_has_it_and_data_that_nearly_has_it(code: str) -> None:
    has, nearly = DATA[code]
    assert code in found_in(has)
    assert code not in found_in(nearly)


def test_healthy_data_is_left_in_peace() -> None:
    assert found_in(data()) == set()


def test_every_data_check_has_data_of_its_own() -> None:
    assert {one for record, _ in DATA.values() for one in found_in(record)} == set(DATA)


def test_shares_of_the_data() -> None:
    skipped = data_checks.lines_skipped(DATA["lines_skipped"][0])
    assert skipped is not None
    assert (skipped.numbers["count"], skipped.numbers["lines"], skipped.numbers["share"]) == (2, 102, 2 / 102)
    leaked = data_checks.leak(DATA["leak"][0])
    assert leaked is not None
    assert (leaked.numbers["count"], leaked.numbers["questions"]) == (1, 100)
    cut = data_checks.pairs_cut(data(answers=some(6, LONG), questions=some(50, LONG, "问{:03d}")))
    assert cut is None  # all six lost their whole answer, which is the other finding


def test_a_template_of_either_part_at_either_end() -> None:
    def phrase(record: DataRecord) -> tuple[str, str, str]:
        one = data_checks.template_differs(record)
        assert one is not None
        return one.numbers["part"], one.numbers["where"], one.numbers["affix"]

    assert phrase(data(questions=[f"{n * 7 % 100}等于多少" for n in range(100)])) == (
        "training",
        "end with",
        "等于多少",
    )
    asked = [f"请告诉我{n}" for n in range(100)]
    assert phrase(data(val_questions=asked)) == ("validation", "begin with", "请告诉我")
    assert data_checks.template_differs(data(questions=asked, val_questions=asked)) is None


def test_swapped_fields_are_named_as_the_file_has_them() -> None:
    swapped = data_checks.fields_swapped(DATA["fields_swapped"][0])
    assert swapped is not None
    assert swapped.flags == {"question_field": "a", "answer_field": "q"}


def test_what_was_said_before_tells_answers_apart() -> None:
    """In conversations, or after a system text, the same question may have different answers."""
    several = [Conversation((Turn("system", str(n)), *pair("问", f"答{n}").turns), n) for n in range(100)]
    assert "contradictions" not in found_in(data(conversations=several))
    alone = [pair(f"问{n % 50}", f"答{n}") for n in range(100)]
    assert "contradictions" in found_in(data(conversations=alone))


def test_answers_that_take_up_words_of_their_questions() -> None:
    facts = [(f"{n}号楼在哪里", f"{n}号楼在{n * 7 % 100}街") for n in range(100, 200)]
    questions, answers = (list(texts) for texts in zip(*facts, strict=True))
    assert answers_fit(data(answers, questions))
    assert not answers_fit(data([*answers[30:], *answers[:30]], questions))  # thirty lines out of step
    assert not answers_fit(data([("好", "坏")[n % 2] for n in range(100)], questions))


# -- the model's answers ------------------------------------------------------------------------------------


def answers(*texts: str, ended: int | None = None) -> list[Answer]:
    count = len(texts) if ended is None else ended
    return [Answer(text, "eos" if n < count else "length", []) for n, text in enumerate(texts)]


def costs(own: float = 1.0, other: float = 2.0, end: float = 1.0) -> AnswerLoss:
    return AnswerLoss(64, own, other, 0.005, end, 1.0, Exchange("问", "答"))


TEN = "一二三四五六七八九十"
Judged = tuple[AnswerLoss, list[Answer], bool]  # the last value: True if questions and answers fit together
ANSWERS: dict[str, tuple[Judged, Judged]] = {
    "no_end_learned": (
        (costs(end=2.01), answers(*TEN, ended=8), True),
        (costs(end=1.99), answers(*TEN, ended=8), True),  # a poor model also ends late
    ),
    "answers_end": ((costs(), answers(*TEN, ended=9), True), (costs(), answers(*TEN, ended=8), True)),
    "answers_empty": (
        (costs(), answers("", "", *TEN[2:]), True),
        (costs(), answers("", *TEN[1:]), True),
    ),
    "same_answer_given": (
        (costs(), answers(*"一一一一一一", *TEN[6:]), True),
        (costs(), answers(*"一一一一一", *TEN[5:]), True),
    ),
    "question_ignored": (
        (costs(other=1.019), answers(*TEN), True),
        (costs(other=1.021), answers(*TEN), True),
    ),
    "answers_unrelated": (
        (costs(other=1.019), answers(*TEN), False),
        (costs(other=1.021), answers(*TEN), False),
    ),
}


def judged(given: Judged) -> dict[str, Finding]:
    loss, some_answers, fit = given
    return {one.code: one for one in judge(loss, some_answers, 64, fit)}


@pytest.mark.parametrize("code", ANSWERS)
def test_answers_that_have_it_and_answers_that_nearly_have_it(code: str) -> None:
    has, nearly = map(judged, ANSWERS[code])
    assert code in has
    assert code not in nearly


# -- causes and consequences --------------------------------------------------------------------------------


def test_a_cause_stands_before_its_consequences() -> None:
    """Otherwise a consequence would be named although its cause is known."""
    for code, words in WORDS.items():
        for consequence in words.explains:
            assert WORDS[consequence].rank > words.rank, f"{code} explains {consequence}"


def test_consequences_are_left_out() -> None:
    codes = ["nothing_learned", "still_falling", "rate_too_low", "throughput_drop", "plateau"]
    left = without_consequences([Finding(code, {}) for code in codes])
    assert [one.code for one in left] == ["rate_too_low", "throughput_drop"]
    # a consequence that is left out explains nothing: loss_spikes stays
    left = without_consequences([Finding(c, {}) for c in ("loss_spikes", "steps_skipped", "rolled_back")])
    assert [one.code for one in left] == ["rolled_back"]


def test_the_worst_is_named_first_and_of_equals_the_cause() -> None:
    codes = ["healthy", "plateau", "throughput_drop", "duplicates", "nothing_learned", "leak"]
    left = without_consequences([Finding(code, {}) for code in codes])
    assert [one.code for one in left] == [
        "leak",
        "nothing_learned",
        "duplicates",
        "throughput_drop",
        "healthy",
    ]


# -- advice -------------------------------------------------------------------------------------------------


def advised() -> list[Finding]:
    """Return each finding with commands once, on the run that has it."""
    every = [one for record, _ in RUNS.values() for one in findings_of(record).values()]
    every += [one for record, _ in DATA.values() for check in DATA_CHECKS if (one := check(record))]
    return list({one.code: one for one in every if one.flags or one.before}.values())


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a run's data at the default paths of a configuration."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "data").mkdir()
    write_data(folder / "data")
    for name in ("train.jsonl", "val.jsonl"):  # the names that made-up reports have
        (folder / name).write_bytes((folder / "data" / name).read_bytes())
    return folder


def test_commands_are_advised_for_all_that_settings_can_mend() -> None:
    mended = {
        *("non_finite", "steps_skipped", "rolled_back", "diverged", "loss_spikes", "gradient_grows"),
        *("rate_too_low", "rate_too_high", "warmup_missing", "too_short", "batch_too_small", "dropout_high"),
        *("weight_decay_high", "clip_tiny", "model_too_small", "overfitting", "still_falling", "unfinished"),
        *("leak", "val_is_train", "duplicates", "unknown_characters", "fields_swapped", "mostly_padding"),
        *("pairs_cut", "conversations_cut", "answers_cut_away", "mostly_questions"),
        *("lines_skipped", "empty_answers"),
    }
    assert {one.code for one in advised()} == mended


@pytest.mark.parametrize("found", advised(), ids=lambda one: one.code)
def test_advised_commands_are_run_as_they_stand(
    desk: Path, monkeypatch: pytest.MonkeyPatch, run_command: RunCommand, found: Finding
) -> None:
    monkeypatch.chdir(desk)
    record = run()
    commands = list(found.before) + ([train_command(record, found.flags)] if found.flags else [])
    if found.code == "unfinished":  # a run that was stopped half way
        begun = shlex.split(train_command(record, {}))
        assert run_command(begun[1], *begun[2:-1], "output").code == 0
        commands[0] += " --max_steps 30"
    if found.code == "fields_swapped":  # the made-up file has other names than this one
        commands[0] = commands[0].replace("field a", "field answer").replace("field q", "field question")
    for command in commands:
        program, verb, *flags = shlex.split(command)
        result = run_command(verb, *flags)
        assert program == "minigpt"
        assert result.code == 0, result.err
    if found.flags:
        (output,) = desk.glob("output-2")
        written = json.loads((output / "run.json").read_text(encoding="utf-8"))["config"]
        wanted = {**record.config.as_dict(), **found.flags}
        if found.code != "fields_swapped":
            assert {name: written[name] for name in found.flags} == found.flags
        unchanged = set(wanted) - set(found.flags) - {"output", "recipe"}
        assert {name: written[name] for name in unchanged} == {name: wanted[name] for name in unchanged}
        output.rename(desk / f"done-{found.code}")


def kind_of(recipe: str) -> type[TrainConfig]:
    """Return the configuration of the command that a recipe is for. Recipes with a task are for finetune."""
    found = read_recipe(recipe, FinetuneConfig)
    assert isinstance(found, FinetuneConfig)
    plain = FinetuneConfig.__dataclass_fields__["task"].default
    return TrainConfig if found.task == plain else FinetuneConfig


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_a_run_s_command_gives_the_run_s_settings(recipe: str) -> None:
    """For every recipe with changed settings. If the recipe does not exist any more, all are written out."""
    kind = kind_of(recipe)
    config = dataclasses.replace(
        read_recipe(recipe, kind), train_data=Path("my data/a b.jsonl"), encoding="gb18030", by_length=False,
        learning_rate=1.5e-05, seed=7, save_async=True, precision="float32", size="",
    )  # fmt: skip
    configs = [config]
    if kind is TrainConfig:  # only a new model has a size to choose
        configs.append(dataclasses.replace(config, recipe="gone.toml", size="10min"))
    for named in configs:
        record = dataclasses.replace(run(), config=named, folder=Path("a run"))
        words = shlex.split(train_command(record, {"seed": 8}))
        assert words[1] == ("train" if kind is TrainConfig else "finetune")
        given = parse(kind, words[2:])
        assert given.pop("output") == Path("a run-2")
        left_out = {"output", "recipe", "size"}
        expected = {**named.as_dict(), "seed": 8}
        if kind is TrainConfig:
            got = resolve(given).as_dict()
        else:  # to resolve it wants a model on the disk
            got = dataclasses.replace(read_recipe(given["recipe"], kind), **given).as_dict()
        assert {k: v for k, v in got.items() if k not in left_out} == {
            k: v for k, v in expected.items() if k not in left_out
        }


@pytest.mark.parametrize("alpha", [32, 32.0])  # JSON of other programs has no .0
def test_settings_that_a_run_has_written_are_read_without_a_warning(
    alpha: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FinetuneConfig(model=Path("base"), method="lora", target_modules=("c_attn",), output=tmp_path)
    written = json.loads(json.dumps({**config.as_dict(), "lora_alpha": alpha}, default=str))
    found = _settings(tmp_path, {"config": written}, {})
    assert capsys.readouterr().err == ""
    assert found.as_dict() == {**config.as_dict(), "lora_alpha": 32.0}


def test_no_family_is_advised_what_it_lacks() -> None:
    """For a run of the other family, every recommended command is one that `minigpt train` accepts."""
    for has, _ in RUNS.values():
        config = dataclasses.replace(has.config, family="qwen3", dropout=0.0)
        for one in findings_of(dataclasses.replace(has, config=config)).values():
            if one.flags:
                record = dataclasses.replace(has, config=config)
                resolve(parse(TrainConfig, shlex.split(train_command(record, one.flags))[2:]))


def test_no_output_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "run-2").mkdir()
    record = run(folder=tmp_path / "run")
    assert shlex.split(train_command(record, {}))[-1] == str(tmp_path / "run-3")


def test_what_cannot_be_pinned_down_begins_with_the_recipe(tmp_path: Path) -> None:
    lines = ['{"step": 1, "train_loss": 5.4}', '{"step": 1, "val_loss": 5.44}']
    folder = write_run(tmp_path / "run", lines, {**run().config.as_dict(), "train_data": "t.jsonl"})
    record = dataclasses.replace(read_record(folder), summary=SUMMARY, vocab_size=1100)
    (one,) = [one for one in examine(record) if one.code == "nothing_learned"]
    words = shlex.split(one.commands[0])
    assert words == [
        *("minigpt", "train", "--recipe", "qa-cpu", "--train_data", "t.jsonl"),
        *("--output", str(tmp_path / "run-2")),
    ]


# -- reference curves ---------------------------------------------------------------------------------------


def reference(tmp_path: Path, record: RunRecord | None = None) -> Path:
    path = tmp_path / "curve.jsonl"
    save_curve(record or run(), path)
    return path


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = reference(tmp_path)
    read = read_curve(written)
    assert read.fingerprints == run().fingerprints
    assert read.settings["learning_rate"] == 3e-3
    assert read.tokens == 1000 * STEPS
    assert read.val == [(1000.0 * point.step, point.loss) for point in run().val]
    points = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()[1:]]
    assert sum("train_loss" in point for point in points) == 30
    assert points[-1] == {"step": 300, "val_loss": curve(300) + 0.1, "share": 1.0, "tokens": 300_000}


def test_between_two_evaluations_a_curve_is_straight(tmp_path: Path) -> None:
    read = read_curve(reference(tmp_path))
    middle = (read.val[3][1] + read.val[4][1]) / 2
    assert read.loss_at(135_000) == pytest.approx(middle)  # between steps 120 and 150
    assert math.isnan(read.loss_at(29_999))
    assert read.loss_at(30_000) == read.val[0][1]
    assert read.loss_at(1e9) == read.val[-1][1]


def test_near_and_behind_the_curve(tmp_path: Path) -> None:
    read = read_curve(reference(tmp_path))
    end = curve(300) + 0.1
    near = compare(run(held_out=lambda step: (curve(step) + 0.1) * 1.14), read)
    assert (near.code, near.numbers["tokens"], near.numbers["reference"]) == ("near_reference", 300_000, end)
    behind = compare(
        run(held_out=lambda step: (curve(step) + 0.1) * 1.16, config={"learning_rate": 1e-5}), read
    )
    assert behind.code == "behind_reference"
    assert behind.numbers["times"] == pytest.approx(1.16)
    assert behind.numbers["differences"] == "learning_rate 1e-05 (reference 0.003)"


def test_near_zero_a_hundredth_is_near(tmp_path: Path) -> None:
    read = read_curve(reference(tmp_path, run(held_out=lambda step: 0.01 + 1 / step)))
    assert compare(run(held_out=lambda step: 0.02 + 1 / step), read).code == "near_reference"
    assert compare(run(held_out=lambda step: 0.04 + 1 / step), read).code == "behind_reference"


def state(**changes: Any) -> dict[str, Any]:
    return {**run().state, **changes}


def test_where_no_curve_fits_it_says_so(tmp_path: Path) -> None:
    read = read_curve(reference(tmp_path))
    codes = {
        compare(run(state=state(train_fingerprint="another")), read).code: "other data",
        compare(run(state={}), read).code: "no checkpoint",
        compare_with_recipe(run(), tmp_path).code: "no curve of that name",
    }
    assert set(codes) == {"reference_other_data", "reference_too_early", "no_reference"}
    assert compare(run(val=[]), read).code == "reference_too_early"
    half = dataclasses.replace(run(), state=state(total_steps=500))  # under way, and of another length
    assert compare(half, read).code == "reference_too_early"
    like = dataclasses.replace(run(), state=state(total_steps=310))
    assert compare(like, read).code == "near_reference"


def test_the_recipe_s_curve_is_found_by_its_name(tmp_path: Path) -> None:
    reference(tmp_path).rename(tmp_path / "qa-cpu.jsonl")
    assert compare_with_recipe(run(config={"recipe": "qa-cpu"}), tmp_path).code == "near_reference"
    assert compare_with_recipe(run(config={"recipe": "x/qa-cpu.toml"}), tmp_path).code == "no_reference"


def test_curves_that_come_with_minigpt_are_those_of_its_recipes() -> None:
    """There may be no curves: they are made by hand, with `minigpt doctor RUN --save_curve`."""
    curves = RECIPES / "curves"
    for path in sorted(curves.iterdir()) if curves.is_dir() else ():
        recipe, read = read_recipe(path.stem), read_curve(path)  # its name is a recipe's, and it is a curve
        assert (path.suffix, read.recipe) == (".jsonl", path.stem)
        # The settings must be those of the recipe now: after a change of a recipe, make its curve again.
        settings = {name: recipe.as_dict()[name] for name in read.settings}
        assert read.settings == settings, path
        assert read.val[-1][0] == pytest.approx(read.tokens, abs=1), "up to the end"
        head = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        own = {**head["fingerprints"], "total_steps": head["total_steps"], "steps_done": head["total_steps"]}
        per_step = read.tokens / head["total_steps"]
        val = [ValPoint(round(tokens / per_step), loss) for tokens, loss in read.val]
        record = run(config=dataclasses.asdict(recipe), val=val, state=state(**own, tokens_seen=read.tokens))
        assert compare_with_recipe(record).code == "near_reference"  # found by the recipe's name
        assert compare_with_recipe(run(config=dataclasses.asdict(recipe))).code == "reference_other_data"


def test_recipes_and_their_curves_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["minigpt"]
    package = RECIPES.parents[1]
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in RECIPES.rglob("*") if path.is_file()} <= installed
    assert "training/recipes/curves/*.jsonl" in patterns


def test_only_a_finished_run_gives_a_curve(tmp_path: Path) -> None:
    for record in (run(state=state(total_steps=301)), run(state={}), run(val=[])):
        with pytest.raises(InputError, match=r"finished|no evaluation"):
            save_curve(record, tmp_path / "curve.jsonl")
    assert not (tmp_path / "curve.jsonl").exists()


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "no JSON", '{"format": 2}', '{"format": 1, "recipe": "x"}', "null"]
)
def test_a_file_that_is_no_curve(tmp_path: Path, text: str) -> None:
    (tmp_path / "curve.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"curve\.jsonl"):
        read_curve(tmp_path / "curve.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        read_curve(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("line", "change"),
    [
        (0, {"tokens": math.inf}),
        (0, {"tokens": math.nan}),
        (0, {"tokens": None}),
        (0, {"tokens": [1]}),
        (0, {"fingerprints": []}),
        (0, {"settings": 7}),
        (-1, {"val_loss": math.inf}),
        (-1, {"val_loss": math.nan}),
        (-1, {"val_loss": -1.0}),
        (-1, {"val_loss": None}),
        (-1, {"tokens": 0}),
        (-1, {"tokens": "x"}),
    ],
)
def test_a_curve_with_a_value_that_is_none(tmp_path: Path, line: int, change: dict[str, Any]) -> None:
    path = reference(tmp_path)
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    lines[line] = {"val_loss": 1.0, **lines[line], **change}
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    with pytest.raises(InputError, match=r"curve\.jsonl is not a reference curve of `minigpt doctor"):
        read_curve(path)


# -- words --------------------------------------------------------------------------------------------------


def places(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("code", WORDS)
def test_both_languages_say_the_same(code: str) -> None:
    words = WORDS[code]
    assert words.level in LEVELS
    assert words.en
    assert words.zh
    assert bool(words.advice_en) == bool(words.advice_zh)
    assert words.level in ("ok", "note") or words.advice_en, "a warning says what to try"
    texts = ((words.en, words.zh), (words.advice_en, words.advice_zh))
    for ours, chinese in texts:  # a word has two forms, the same numbers fill both
        named = {name.removesuffix("_zh") for name in places(chinese)}
        assert named | {"unit"} == places(ours) | {"unit"}
    assert words.en.isascii()
    assert not words.zh.isascii()


def all_findings(tmp_path: Path) -> list[Finding]:
    """Return one finding of every kind."""
    read = read_curve(reference(tmp_path))
    every = [one for record, _ in RUNS.values() for one in findings_of(record).values()]
    every += [one for record, _ in DATA.values() for check in DATA_CHECKS if (one := check(record))]
    every += [one for given, _ in ANSWERS.values() for one in judged(given).values()]
    every += [
        compare(run(), read),
        compare(run(held_out=lambda step: 5.0), read),
        compare(run(state={}), read),
        compare(run(state=state(train_fingerprint="x")), read),
    ]
    return every


def test_every_finding_fills_its_words(tmp_path: Path) -> None:
    every = all_findings(tmp_path)
    for one in every:
        for language in LANGUAGES:
            assert "{" not in one.text(language)
            assert "{" not in one.advice(language).replace('{"', "")  # a record of JSON
        json.dumps(one.as_dict(), ensure_ascii=False, allow_nan=False)
        assert one.numbers or one.code == "reference_other_data", "a finding rests on a number"
    elsewhere = {
        "healthy",
        "no_data",
        "text_run",
        "run_from_weights",
        "data_changed",
        "no_reference",
        "deep_impossible",
        *("reward_hacking", "answers_degenerate", "rewards_equal"),  # tests/test_reward_checks.py
    }
    assert {one.code for one in every} | elsewhere == set(WORDS)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "C", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": ""}, "zh"),
        ({}, "en"),
    ],
)
def test_the_language_is_the_terminal_s(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert chosen_language("auto") == expected
    assert (chosen_language("en"), chosen_language("zh")) == ("en", "zh")


# -- reading a folder ---------------------------------------------------------------------------------------


def write_run(folder: Path, lines: list[str], settings: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    config = TrainConfig(train_data=folder / "no.jsonl").as_dict() if settings is None else settings
    (folder / "run.json").write_text(json.dumps({"config": config}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def test_lines_that_cannot_be_read_are_counted_and_the_rest_is_used(tmp_path: Path) -> None:
    lines = [
        '{"step": 10, "train_loss": 5.0, "grad_norm": 1}',
        "{",
        "[]",
        '{"step": "ten", "train_loss": 1}',
        '{"step": true}',
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
        '{"step": 20, "train_loss": NaN}',
        '{"step": 30, "train_loss": null, "grad_norm": 1}',
        '{"step": 30, "val_loss": 4.0, "val_answer_loss": null}',
        '{"step": 40, "train_loss": "five", "grad_norm": Infinity}',
        '{"step": 25, "train_loss": 4.5}',
        '{"step": 10, "train_loss": 4.75}',  # written again after a resume
        '{"step": 41, "event": "skipped", "loss": null, "what": "x"}',
        '{"step": 42, "event": "changed", "what": ["a", 2]}',
        "",
    ]
    record = read_record(write_run(tmp_path / "run", lines))
    assert [point.step for point in record.train] == [10, 20, 25, 30, 40]
    assert record.train[0].loss == 4.75
    assert math.isnan(record.train[1].loss)
    assert record.broken_lines == 5
    assert record.non_finite == (20, 30, 40)
    assert [(event.step, event.kind, event.what) for event in record.events] == [
        (41, "skipped", ()),
        (42, "changed", ("a", "2")),
    ]
    assert {"metrics_damaged", "non_finite", "steps_skipped"} <= found(record)


@pytest.mark.parametrize("content", [None, "", "\n\n", "{\n"])
def test_without_metrics_there_is_a_note(tmp_path: Path, content: str | None) -> None:
    folder = write_run(tmp_path / "run", [])
    if content is None:
        (folder / "metrics.jsonl").unlink()
    else:
        (folder / "metrics.jsonl").write_text(content, encoding="utf-8")
    assert found(read_record(folder)) == {"nothing_logged"}


def test_folders_that_hold_no_run(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    damaged = write_run(tmp_path / "damaged", [])
    (damaged / "run.json").write_text("{")
    checkpoint = write_run(tmp_path / "whole", []) / "step-00000001"
    checkpoint.mkdir()
    for path, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "foreign", "holds no run.json"),
        (damaged, "is damaged"),
        (checkpoint, f"is a checkpoint; give its run's folder: {checkpoint.parent}"),
    ):
        result = run_command("doctor", path)
        assert (result.code, result.out) == (2, "")
        assert result.err.count("\n") == 1
        assert said in result.err


@pytest.mark.parametrize(
    "settings", [{}, {"learning_rate": "high", "n_layer": None, "later_version": [1], "recipe": 3}]
)
def test_settings_of_another_version_are_no_obstacle(tmp_path: Path, settings: dict[str, Any]) -> None:
    record = read_record(write_run(tmp_path / "run", [], settings))
    assert record.config.learning_rate == TrainConfig().learning_rate


@pytest.mark.parametrize(
    "settings",
    [
        {"family": "later"}, {"optimizer": "later"}, {"n_layer": 10**6}, {"max_length": -1},
        {"size": "gigantic"}, {"keyword_weight": "x:y:z"}, {"adam_beta1": 7}, {"later_version": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_later_version_wrote_is_passed_over_and_named(
    tmp_path: Path, settings: dict[str, Any], run_command: RunCommand
) -> None:
    known = {"seed": 7, "n_layer": 3}
    folder = write_run(tmp_path / "run", ['{"step": 3, "train_loss": 1}'], {**known, **settings})
    result = run_command("doctor", folder)
    assert result.code == 0, result.err
    (name,) = settings
    assert result.err.splitlines()[0].endswith(f"does not know them or their values: {name}")
    config = read_record(folder).config
    assert config.seed == 7
    assert config.n_layer == (TrainConfig().n_layer if name == "n_layer" else 3)


def test_a_run_on_plain_text_is_examined_without_its_data(tmp_path: Path) -> None:
    settings = {**TrainConfig().as_dict(), "text": str(tmp_path / "poems.txt")}
    record = read_record(write_run(tmp_path / "run", ['{"step": 3, "train_loss": 1}'], settings))
    assert record.config.text == tmp_path / "poems.txt"
    codes = {one.code for one in examine(record, deep=True)}
    assert "text_run" in codes
    assert not codes & {"no_data", "deep_impossible"}


def test_settings_come_from_the_checkpoint_where_run_json_is_lost(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ['{"step": 3, "train_loss": 1}'])
    (folder / "run.json").unlink()
    for step, text in (("00000001", '{"config": {"seed": 7}, "steps_done": 1}'), ("00000002", "{")):
        (folder / f"step-{step}").mkdir()
        (folder / f"step-{step}" / "training_state.json").write_text(text)
    record = read_record(folder)
    assert (record.config.seed, record.steps_done, record.vocab_size) == (7, 3, 0)


# -- real runs ----------------------------------------------------------------------------------------------


def train(folder: Path, output: str, **values: Any) -> Path:
    """Do a run on the data in `folder`, without warnings about its size. Return its folder."""
    from minigpt.training.loop import Trainer
    from minigpt.training.run_data import read_data

    paths: dict[str, Any] = {"train_data": folder / "train.jsonl", "val_data": folder / "val.jsonl"}
    paths |= {"vocab_path": folder / "vocab.json", "output": folder / output}
    settings = TrainConfig(**{**SETTINGS, "eval_steps": 4, "logging_steps": 1, **paths, **values})
    Trainer(settings, read_data(settings)).run()
    return folder / output


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with data and a finished tiny run."""
    folder = tmp_path_factory.mktemp("real")
    colours = ["黑", "土黄", "红", "雪白", "青", "天蓝", "紫", "绿"]
    pairs = [(f"{thing}是什么颜色？", f"{thing}是{c}色。") for thing, c in zip("天地日月山水花草", colours)]
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs]
    (folder / "train.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    (folder / "val.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    Tokenizer.from_word2id(build_vocabulary(q + a for q, a in pairs)).save(folder / "vocab.json")
    train(folder, "run", max_steps=12, recipe="qa-cpu")
    return folder


def test_a_real_run_is_read_and_examined(real: Path) -> None:
    record = read_record(real / "run")
    assert (record.is_finished, record.steps_done, record.total_steps) == (True, 12, 12)
    assert [point.step for point in record.val] == [4, 8, 12]
    assert record.vocab_size == Tokenizer(real / "vocab.json").get_vocab_size()
    codes = {one.code for one in examine(record, deep=True)}
    assert not codes & {"unfinished", "no_checkpoint", "no_data", "data_changed", "warmup_missing", "leak"}
    assert not codes & {"deep_impossible"}, "the model was asked"
    assert {"too_few_to_learn", "too_few_to_measure"} <= codes, "six pairs and two"


def test_the_command(real: Path, run_command: RunCommand) -> None:
    result = run_command("doctor", real / "run", "--json", "--language", "zh")
    assert (result.code, result.err) == (0, "")
    printed = json.loads(result.out.splitlines()[-1])
    assert (printed["steps"], printed["total_steps"]) == (12, 12)
    assert printed["worst"] == printed["findings"][0]["level"]
    assert "第 12 步，共 12 步" in result.out
    order = [LEVELS.index(one["level"]) for one in printed["findings"]]
    assert order == sorted(order)
    for one in printed["findings"]:
        assert one["text_zh"] in result.out
        assert all(f"\n    {command}\n" in result.out for command in one["commands"])
        assert set(one) == {
            *("level", "code", "numbers", "commands"),
            *("text_en", "text_zh", "advice_en", "advice_zh"),
        }


@pytest.mark.parametrize("rate", [0.0, 1e-6])
def test_a_model_that_has_learned_nothing_is_not_healthy_and_the_advice_mends_it(
    real: Path, run_command: RunCommand, rate: float
) -> None:
    folder = train(real, f"still-{rate}", max_steps=60, learning_rate=rate)
    record = read_record(folder)
    first, *others = examine(record)
    assert first.code == "rate_too_low"
    assert "healthy" not in {one.code for one in others}
    (command,) = first.commands
    assert run_command(*shlex.split(command)[1:]).code == 0
    again = read_record(real / f"still-{rate}-2")
    assert not {one.code for one in examine(again)} & {"rate_too_low", "too_short", "nothing_learned"}
    assert again.train[-1].loss < 0.8 * record.train[-1].loss


def test_two_pairs_overfit_and_it_is_said(tmp_path: Path) -> None:
    write_data(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    (tmp_path / "val.jsonl").write_text("".join(lines[2:]), encoding="utf-8")
    record = read_record(train(tmp_path, "run", max_steps=80, eval_steps=8, logging_steps=0))
    codes = [one.code for one in examine(record)]
    assert codes.index("too_few_to_learn") < codes.index("overfitting")
    assert not set(codes) & {"healthy", "not_overfitting"}


def test_numbers_that_are_not_finite_are_no_lack_of_tokens(real: Path) -> None:
    settings = {"learning_rate": 1e30, "max_steps": 12, "max_grad_norm": 0.0, "optimizer": "adamw"}
    with pytest.raises(InputError, match="lower --learning_rate"):
        train(real, "infinite", **settings)
    findings = examine(read_record(real / "infinite"))
    assert findings[0].code == "non_finite"
    assert {one.code for one in findings if one.level in ("error", "warning")} == {
        *("non_finite", "too_few_to_learn", "too_few_to_measure")
    }


def test_conversations_that_are_unchanged_are_not_changed_data(tmp_path: Path) -> None:
    """This also holds after a resume with another max_length that stopped before it saved anything."""
    talks = [
        [("user", f"{n}号？"), ("assistant", f"{n}。"), ("user", "再说"), ("assistant", f"{n * 7}号。")]
        for n in range(12)
    ]
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in one]}, ensure_ascii=False) + "\n"
        for one in talks
    ]
    (tmp_path / "train.jsonl").write_text("".join(lines[:9]), encoding="utf-8")
    (tmp_path / "val.jsonl").write_text("".join(lines[9:]), encoding="utf-8")
    known = (text for one in talks for _, text in one)
    Tokenizer.from_word2id(build_vocabulary(known)).save(tmp_path / "vocab.json")
    folder = train(tmp_path, "run", max_length=14)
    for length in (14, 20):
        written = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        written["config"]["max_length"] = length
        (folder / "run.json").write_text(json.dumps(written), encoding="utf-8")
        codes = {one.code for one in examine(read_record(folder), deep=True)}
        assert "data_changed" not in codes
    assert ("conversations_cut" in codes) is False
    assert "pairs_cut" not in codes


def test_a_curve_of_the_run_itself_is_near_the_run(
    real: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    path = tmp_path / "curve.jsonl"
    saved = run_command("doctor", real / "run", "--save_curve", path, "--language", "en")
    assert (saved.code, saved.err) == (0, "")
    assert f"{path}: 15 points of a reference curve" in saved.out.replace("\n", "")  # 12 lines, 3 evaluations
    again = run_command("doctor", real / "run", "--curve", path, "--json")
    near = [
        one for one in json.loads(again.out.splitlines()[-1])["findings"] if one["code"] == "near_reference"
    ]
    assert near[0]["numbers"]["loss"] <= near[0]["numbers"]["reference"]  # the best against the last


def test_data_that_changed_or_went_is_not_judged(real: Path, tmp_path: Path) -> None:
    record = read_record(real / "run")
    other = tmp_path / "other.jsonl"
    other.write_text((real / "train.jsonl").read_text("utf-8") * 2, encoding="utf-8")
    for path, code in ((other, "data_changed"), (tmp_path / "none.jsonl", "no_data")):
        config = dataclasses.replace(record.config, train_data=path)
        findings = {one.code: one for one in examine(dataclasses.replace(record, config=config), deep=True)}
        assert str(path.name) in findings[code].text("en")
        assert not findings.keys() & {"duplicates", "answers_end", "no_end_learned", "too_few_to_learn"}


def test_a_run_without_a_best_checkpoint_is_not_asked(real: Path, tmp_path: Path) -> None:
    record = dataclasses.replace(read_record(real / "run"), folder=tmp_path)
    assert "deep_impossible" in {one.code for one in examine(record, deep=True)}
    assert "deep_impossible" not in {one.code for one in examine(record)}


def test_the_doctor_changes_nothing(real: Path, run_command: RunCommand) -> None:
    before = {path: path.stat().st_mtime_ns for path in real.rglob("*")}
    assert run_command("doctor", real / "run").code == 0
    assert run_command("doctor", real / "run", "--no_deep").code == 0
    assert {path: path.stat().st_mtime_ns for path in real.rglob("*")} == before
