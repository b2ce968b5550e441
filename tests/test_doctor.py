"""The doctor: each finding on a run made for it and on one that just misses it; rubbish; a real run."""

import dataclasses
import json
import math
import string
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt.commands.doctor import chosen_language
from minigpt.data.conversation import conversation_of_pair
from minigpt.data.reader import ReadReport
from minigpt.data.token_statistics import compute_statistics
from minigpt.diagnosis import checks, data_checks
from minigpt.diagnosis.answers import judge_answers
from minigpt.diagnosis.checks import CHECKS
from minigpt.diagnosis.curves import compare, compare_with_recipe, read_curve, save_curve
from minigpt.diagnosis.data_checks import DATA_CHECKS, DataRecord
from minigpt.diagnosis.examination import examine
from minigpt.diagnosis.findings import LEVELS, WORDS, Finding, Language
from minigpt.diagnosis.record import Event, RunRecord, TrainPoint, ValPoint, read_record
from minigpt.errors import InputError
from minigpt.generation.api import Answer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import RECIPES, TrainConfig, read_recipe
from tests.commands import RunCommand

ROOT = Path(__file__).parents[1]
STEPS = 300  # of a made-up run: 30 lines of metrics, 10 evaluations
LANGUAGES: tuple[Language, ...] = ("en", "zh")


def curve(step: float) -> float:
    """A healthy training loss: from 7 down to 1, fast at first."""
    return 1 + 6 * math.exp(-step / 60)


def run(
    loss: Callable[[int], float] = curve,
    held_out: Callable[[int], float] = lambda step: curve(step) + 0.1,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> RunRecord:
    """A finished run of 300 steps whose losses are given; the rest is as it should be."""
    settings: dict[str, Any] = {"logging_steps": 10, "learning_rate": 1e-3, **(config or {})}
    points = [
        TrainPoint(step, loss(step), 1.0, 1e-3, step / 100, 1000.0, step / 10)
        for step in range(10, STEPS + 1, 10)
    ]
    record = RunRecord(
        folder=Path("output"),
        config=TrainConfig(**settings),
        train=points,
        val=[ValPoint(step, held_out(step), held_out(step)) for step in range(30, STEPS + 1, 30)],
        state={
            "steps_done": STEPS,
            "total_steps": STEPS,
            "tokens_seen": 1000 * STEPS,
            "train_fingerprint": "t",
            "val_fingerprint": "v",
            "vocabulary_fingerprint": "w",
        },
        vocab_size=1100,  # ln: 7.003
    )
    return dataclasses.replace(record, **changes)


def with_points(record: RunRecord, **values: Callable[[int], float]) -> RunRecord:
    """The same run with other values in its lines of training, given by functions of the step."""
    points = []
    for point in record.train:
        changed: dict[str, Any] = {name: value(point.step) for name, value in values.items()}
        points.append(dataclasses.replace(point, **changed))
    return dataclasses.replace(record, train=points)


def found(record: RunRecord) -> set[str]:
    return {one.code for check in CHECKS if (one := check(record))}


def straight(step: float) -> float:
    return 7 - step / 100


CONSTANT = {"lr_scheduler_type": "constant"}
ANSWERLESS = [ValPoint(step, 1.0 + 30 / step, math.nan) for step in (30, 60, 90)]

# code -> a run that has it, and one that nearly has it
RUNS: dict[str, tuple[RunRecord, RunRecord]] = {
    "nothing_logged": (run(train=[], val=[]), run(val=[])),
    "metrics_damaged": (run(broken_lines=2), run(broken_lines=1)),  # one: a process was killed
    "unfinished": (
        run(state={"steps_done": STEPS, "total_steps": STEPS + 1, "tokens_seen": 1}),
        run(state={"steps_done": STEPS, "total_steps": STEPS, "tokens_seen": 1}),
    ),
    "no_checkpoint": (run(state={}), run(state={"steps_done": 10})),
    "non_finite": (run(non_finite=1, first_non_finite=20), run(non_finite=0)),
    "steps_skipped": (run(events=[Event(20, "skipped")]), run(events=[Event(20, "something else")])),
    "rolled_back": (run(events=[Event(20, "rollback")]), run(events=[Event(20, "skipped")])),
    "first_loss_high": (run(lambda step: curve(step) * 1.3), run(lambda step: curve(step) * 1.2)),
    "first_loss_low": (run(lambda step: curve(step) / 3), run(lambda step: curve(step) / 2)),
    "nothing_to_learn": (run(lambda step: 9e-4), run(lambda step: 2e-3)),
    "no_answer_tokens": (
        run(val=ANSWERLESS),
        run(val=[*ANSWERLESS[:2], ValPoint(90, 1.0, 1.0)]),
    ),
    "diverged": (
        run(lambda step: curve(step) if step < 250 else 1.5),
        run(lambda step: curve(step) if step < 250 else 1.3),
    ),
    "loss_spikes": (
        run(lambda step: curve(step) + (2 if step in (120, 180, 240) else 0)),
        run(lambda step: curve(step) + (2 if step in (120, 180) else 0)),  # two: a strange batch
    ),
    "gradient_grows": (
        with_points(run(), grad_norm=lambda step: 6 if step > 240 else 1),
        with_points(run(), grad_norm=lambda step: 4 if step > 240 else 1),
    ),
    "rate_too_low": (run(straight, config=CONSTANT), run(curve, config=CONSTANT)),
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
}


@pytest.mark.parametrize("code", RUNS)
def test_a_run_that_has_it_and_one_that_nearly_has_it(code: str) -> None:
    has, nearly = RUNS[code]
    assert code in found(has)
    assert code not in found(nearly)


def test_a_healthy_run_is_left_in_peace() -> None:
    assert found(run()) == set()


def test_every_number_check_has_a_run_of_its_own() -> None:
    assert {one.code for record, _ in RUNS.values() for check in CHECKS if (one := check(record))} == set(
        RUNS
    )


def test_the_numbers_are_those_of_the_run() -> None:
    over = checks.overfitting(RUNS["overfitting"][0])
    assert over is not None
    assert (over.numbers["step"], over.numbers["minimum"], over.numbers["last"]) == (150, 2.0, 3.5)
    last_three = (curve(280) + curve(290) + curve(300)) / 3
    assert over.numbers["train"] == pytest.approx(last_three)
    assert over.numbers["gap"] == pytest.approx(3.5 - last_three)
    first = checks.first_loss(RUNS["first_loss_high"][0])
    assert first is not None
    assert first.numbers["expected"] == math.log(1100)
    slow = checks.throughput_drop(RUNS["throughput_drop"][0])
    assert slow is not None
    assert slow.numbers == {"before": 1000.0, "after": 700.0, "share": 0.7}


def test_a_first_step_that_was_logged_is_judged_by_itself() -> None:
    points = [TrainPoint(step, 4.0) for step in range(1, 20)]
    settings = TrainConfig(logging_steps=1)
    assert "first_loss_low" in found(run(config={"logging_steps": 1}, train=points))  # 4.0 < 0.7 * 7.0
    assert "first_loss_low" not in found(run(train=points[4:], config={"logging_steps": 5}))
    assert settings.logging_steps == 1


def test_where_the_beginning_is_missing_nothing_is_said_about_it() -> None:
    assert found(run(train=run().train[5:])) == set()


def test_events_count_steps_that_the_means_hide() -> None:
    spikes = [Event(step, "spike", 9.0) for step in (150, 151, 152)]
    spiked = checks.loss_spikes(run(events=spikes))
    assert spiked is not None
    assert (spiked.numbers["count"], spiked.numbers["largest"]) == (3, 9.0)
    assert checks.loss_spikes(run(events=spikes[:2])) is None
    # as many in ten times the steps: a hard batch now and then
    longer = [dataclasses.replace(point, step=10 * point.step) for point in run().train]
    assert checks.loss_spikes(run(events=spikes, train=longer)) is None


def test_small_losses_are_not_judged_by_percentages() -> None:
    def tiny(step: int) -> float:
        return 0.03 if step < 300 else 0.02

    assert "still_falling" not in found(run(held_out=tiny))
    assert "overfitting" not in found(run(lambda step: 1 / step, held_out=lambda step: 0.01 + step / 2e4))
    assert "diverged" not in found(run(lambda step: 0.01 if step < 250 else 0.1))


def test_skipped_windows_of_the_checkpoint_count() -> None:
    skipped = checks.steps_skipped(run(state={**run().state, "skipped": [[3, 5], [9, 9]], "rollbacks": 1}))
    assert skipped is not None
    assert skipped.numbers == {"count": 4}
    for rubbish in (7, [[1]], [["a", "b"]], "x", None):
        assert checks.steps_skipped(run(state={**run().state, "skipped": rubbish})) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_no_check_falls_over_strange_values(value: float) -> None:
    def strange(step: int) -> float:
        return value if step % 20 == 0 else curve(step)

    for record in (run(strange, held_out=strange), run(lambda step: value, held_out=lambda step: value)):
        odd = with_points(record, grad_norm=lambda step: value, tokens_per_second=lambda step: value)
        for code in found(odd):
            assert code in WORDS


# -- data ---------------------------------------------------------------------------------------------------


def data(
    answers: list[str] | None = None,
    questions: list[str] | None = None,
    val_questions: list[str] | None = None,
    vocabulary: str = "",
    skipped: list[tuple[int, str]] | None = None,
    **config: Any,
) -> DataRecord:
    """A hundred pairs of ten characters, with what is given changed."""
    answers = answers or [f"答{number:03d}" for number in range(100)]
    questions = questions or [f"问{number:03d}" for number in range(100)]
    train = [
        conversation_of_pair(q, a, n, "") for n, (q, a) in enumerate(zip(questions, answers, strict=True), 1)
    ]
    val = [
        conversation_of_pair(q, "答", n, "")
        for n, q in enumerate(val_questions or [f"别{n:03d}" for n in range(100)], 1)
    ]
    known = vocabulary or "".join(questions + answers)
    report = ReadReport(Path("train.jsonl"), lines=100 + len(skipped or []), skipped=skipped or [])
    settings = TrainConfig(**{"max_length": 20, **config})
    tokenizer = Tokenizer.from_word2id(build_vocabulary([known]))
    reports = (report, ReadReport(Path("val.jsonl"), lines=100))
    return DataRecord(
        settings, train, val, reports, compute_statistics(train, tokenizer, settings.max_length)
    )


def some(count: int, text: str, usual: str = "答{:03d}") -> list[str]:
    """A hundred texts, `count` of them `text`."""
    return [text if number < count else usual.format(number) for number in range(100)]


LONG = "长" * 40
DATA: dict[str, tuple[DataRecord, DataRecord]] = {
    "lines_skipped": (
        data(skipped=[(101, "broken JSON"), (102, "broken JSON")]),  # 2 of 102
        data(skipped=[(101, "broken JSON")]),  # 1 of 101
    ),
    "empty_answers": (
        data(skipped=[(101, "`answer` is empty"), (102, "`answer` is empty")]),
        data(skipped=[(101, "`answer` is empty"), (102, "broken JSON")]),
    ),
    "same_answer": (data(answers=some(21, "不知道")), data(answers=some(20, "不知道"))),
    "leak": (
        data(val_questions=["问００１ ", *(f"别{n}" for n in range(99))]),  # full width and a space: the same
        data(val_questions=["问1001", *(f"别{n}" for n in range(99))]),
    ),
    "unknown_characters": (
        data(answers=some(9, "鑫001"), vocabulary="问答0123456789"),  # 9 of 800 characters
        data(answers=some(8, "鑫001"), vocabulary="问答0123456789"),  # exactly 1 %
    ),
    "pairs_cut": (data(answers=some(6, LONG)), data(answers=some(5, LONG))),
    "answers_cut_away": (
        data(questions=some(2, LONG, "问{:03d}")),
        data(questions=some(1, LONG, "问{:03d}")),
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
    assert len(DATA) == len(DATA_CHECKS)


def test_shares_of_the_data() -> None:
    skipped = data_checks.lines_skipped(DATA["lines_skipped"][0])
    assert skipped is not None
    assert (skipped.numbers["count"], skipped.numbers["lines"], skipped.numbers["share"]) == (2, 102, 2 / 102)
    leaked = data_checks.leak(DATA["leak"][0])
    assert leaked is not None
    assert (leaked.numbers["count"], leaked.numbers["questions"]) == (1, 100)
    cut = data_checks.pairs_cut(data(answers=some(6, LONG), questions=some(50, LONG, "问{:03d}")))
    assert cut is None  # all six lost their whole answer, which is the other finding


# -- the model's answers ------------------------------------------------------------------------------------


def answers(*texts: str, ended: int | None = None) -> list[Answer]:
    count = len(texts) if ended is None else ended
    return [Answer(text, "eos" if n < count else "length", []) for n, text in enumerate(texts)]


TEN = "一二三四五六七八九十"
ANSWERS: dict[str, tuple[list[Answer], list[Answer]]] = {
    "no_end_learned": (answers(*TEN, ended=8), answers(*TEN, ended=9)),
    "answers_end": (answers(*TEN, ended=9), answers(*TEN, ended=8)),
    "answers_empty": (answers("", "", *TEN[2:]), answers("", *TEN[1:])),
    "same_answer_given": (answers(*"一一一一一一", *TEN[6:]), answers(*"一一一一一", *TEN[5:])),
}


@pytest.mark.parametrize("code", ANSWERS)
def test_answers_that_have_it_and_answers_that_nearly_have_it(code: str) -> None:
    has, nearly = ({one.code for one in judge_answers(given, 64, 128)} for given in ANSWERS[code])
    assert code in has
    assert code not in nearly


# -- reference curves ---------------------------------------------------------------------------------------


def reference(tmp_path: Path, record: RunRecord | None = None) -> Path:
    path = tmp_path / "curve.jsonl"
    save_curve(record or run(), path)
    return path


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = reference(tmp_path)
    read = read_curve(written)
    assert read.fingerprints == run().fingerprints
    assert read.settings["learning_rate"] == 1e-3
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
    assert behind.numbers["differences"] == "learning_rate 1e-05 (reference 0.001)"


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
    """There may be none: they are made by hand, with `minigpt doctor RUN --save_curve`."""
    curves = RECIPES / "curves"
    for path in sorted(curves.iterdir()) if curves.is_dir() else ():
        recipe, read = read_recipe(path.stem), read_curve(path)  # its name is a recipe's, and it is a curve
        assert (path.suffix, read.recipe) == (".jsonl", path.stem)
        # of the recipe as it is now: who changes one makes its curve anew
        settings = {name: recipe.as_dict()[name] for name in read.settings}
        assert read.settings == settings, path
        assert read.val[-1][0] == pytest.approx(read.tokens, abs=1), "up to the end"
        head = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        own = {**head["fingerprints"], "total_steps": head["total_steps"], "steps_done": head["total_steps"]}
        per_step = read.tokens / head["total_steps"]
        val = [ValPoint(round(tokens / per_step), loss, loss) for tokens, loss in read.val]
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
    assert places(words.en) == places(words.zh), "the same numbers"
    assert places(words.advice_en) == places(words.advice_zh)
    assert words.en.isascii()
    assert not words.zh.isascii()


def all_findings(tmp_path: Path) -> list[Finding]:
    """One of every kind."""
    read = read_curve(reference(tmp_path))
    every = [one for record, _ in RUNS.values() for check in CHECKS if (one := check(record))]
    every += [one for record, _ in DATA.values() for check in DATA_CHECKS if (one := check(record))]
    every += [one for given, _ in ANSWERS.values() for one in judge_answers(given, 64, 128)]
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
            assert "{" not in one.advice(language)
        json.dumps(one.as_dict(), ensure_ascii=False, allow_nan=False)
        assert one.numbers or one.code == "reference_other_data", "a finding rests on a number"
    elsewhere = {"healthy", "no_data", "text_run", "data_changed", "no_reference"}
    assert {one.code for one in every} | elsewhere | {"no_questions", "deep_impossible"} == set(WORDS)


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
        '{"step": 41, "event": "skipped", "loss": null}',
        "",
    ]
    record = read_record(write_run(tmp_path / "run", lines))
    assert [point.step for point in record.train] == [10, 20, 25, 30, 40]
    assert record.train[0].loss == 4.75
    assert math.isnan(record.train[1].loss)
    assert record.broken_lines == 5
    assert (record.non_finite, record.first_non_finite) == (3, 20)
    assert record.val[0].answer_loss is not None
    assert math.isnan(record.val[0].answer_loss)
    assert [(event.step, event.kind) for event in record.events] == [(41, "skipped")]
    assert {"metrics_damaged", "non_finite", "steps_skipped", "no_answer_tokens"} <= found(record)


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
    impossible = write_run(tmp_path / "impossible", [], {"max_length": -1})
    for path, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "foreign", "holds no run.json"),
        (damaged, "is damaged"),
        (checkpoint, f"is a checkpoint; give its run's folder: {checkpoint.parent}"),
        (impossible, "max_length must be from 3 to 1000000"),
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


def test_a_run_on_plain_text_is_examined_without_its_data(tmp_path: Path) -> None:
    settings = {**TrainConfig().as_dict(), "text": str(tmp_path / "poems.txt")}
    record = read_record(write_run(tmp_path / "run", ['{"step": 3, "train_loss": 1}'], settings))
    assert record.config.text == tmp_path / "poems.txt"
    codes = {one.code for one in examine(record, deep=True)}
    assert {"text_run", "no_questions"} <= codes
    assert "no_data" not in codes


def test_settings_come_from_the_checkpoint_where_run_json_is_lost(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ['{"step": 3, "train_loss": 1}'])
    (folder / "run.json").unlink()
    for step, text in (("00000001", '{"config": {"seed": 7}, "steps_done": 1}'), ("00000002", "{")):
        (folder / f"step-{step}").mkdir()
        (folder / f"step-{step}" / "training_state.json").write_text(text)
    record = read_record(folder)
    assert (record.config.seed, record.steps_done, record.vocab_size) == (7, 3, 0)


# -- a real run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a tiny run on it, which is finished."""
    from minigpt.training.loop import Trainer
    from minigpt.training.run_data import read_data

    folder = tmp_path_factory.mktemp("real")
    colours = ["黑", "土黄", "红", "雪白", "青", "天蓝", "紫", "绿"]
    pairs = [(f"{thing}是什么颜色？", f"{thing}是{c}色。") for thing, c in zip("天地日月山水花草", colours)]
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs]
    (folder / "train.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    (folder / "val.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    Tokenizer.from_word2id(build_vocabulary(q + a for q, a in pairs)).save(folder / "vocab.json")
    settings = TrainConfig(
        train_data=folder / "train.jsonl", val_data=folder / "val.jsonl", vocab_path=folder / "vocab.json",
        output=folder / "run", n_layer=1, n_embd=16, n_head=2, block_size=32, max_length=32, max_steps=12,
        eval_steps=4, logging_steps=1, threads=1, device="cpu", report_to="none", recipe="qa-cpu",
    )  # fmt: skip
    Trainer(settings, read_data(settings)).run()
    return folder


def test_a_real_run_is_read_and_examined(real: Path) -> None:
    record = read_record(real / "run")
    assert (record.is_finished, record.steps_done, record.total_steps) == (True, 12, 12)
    assert [point.step for point in record.val] == [4, 8, 12]
    assert record.vocab_size == Tokenizer(real / "vocab.json").get_vocab_size()
    codes = {one.code for one in examine(record, deep=True)}
    assert not codes & {"unfinished", "no_checkpoint", "no_data", "data_changed", "first_loss_high", "leak"}
    assert codes & {"answers_end", "no_end_learned"}, "the model was asked"


def test_the_door(real: Path, run_command: RunCommand) -> None:
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
        assert set(one) == {
            *("level", "code", "numbers"),
            *("text_en", "text_zh", "advice_en", "advice_zh"),
        }


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
        assert "no_questions" in findings
        assert "same_answer" not in findings


def test_a_run_without_a_best_checkpoint_is_not_asked(real: Path, tmp_path: Path) -> None:
    record = dataclasses.replace(read_record(real / "run"), folder=tmp_path)
    assert "deep_impossible" in {one.code for one in examine(record, deep=True)}
    assert "deep_impossible" not in {one.code for one in examine(record)}


def test_the_doctor_changes_nothing(real: Path, run_command: RunCommand) -> None:
    before = {path: path.stat().st_mtime_ns for path in real.rglob("*")}
    assert run_command("doctor", real / "run", "--deep").code == 0
    assert {path: path.stat().st_mtime_ns for path in real.rglob("*")} == before
