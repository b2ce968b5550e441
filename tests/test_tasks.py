"""Tasks: shapes of records, folders, TOML files, shots, a model's results, and bad input in one line."""

import gzip
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import minigpt
from minigpt.errors import InputError
from minigpt.evaluation.comparison import compare_results
from minigpt.evaluation.contamination import contamination
from minigpt.evaluation.model_card import update_card, updated_card
from minigpt.evaluation.model_profile import fit_temperature, profile, robustness
from minigpt.evaluation.options import TaskOptions
from minigpt.evaluation.perturbations import PERTURBATIONS, wordings
from minigpt.evaluation.prompts import Prompter, choose_shots, encode_pair
from minigpt.evaluation.report import cases, markdown_of, write_report
from minigpt.evaluation.scoring import ContinuationScorer
from minigpt.evaluation.task_command import evaluate_task, load
from minigpt.evaluation.task_results import (
    LoadedModel,
    TaskResult,
    _shots_of,
    generate_texts,
    metric_names,
    rolling_windows,
    run_task,
)
from minigpt.evaluation.task_shapes import Style
from minigpt.evaluation.tasks import Task, read_tasks, task_of_records
from minigpt.finetuning.classification import Labels, SequenceClassifier
from minigpt.generation.api import generate_ids
from minigpt.generation.options import GenerationOptions
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.weights.classifiers import save_classifier
from tests.commands import Result, RunCommand
from tests.runs import config, metrics, trainer, write_data
from tests.talking import learn_by_heart

Command = Callable[..., Result]
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TEXTS = ["the cat sat on the mat", "a dog ran up the hill", "四川的省会是成都。", "答案：A 问题：B"] * 3
TOKENIZER = BpeTokenizer.train(TEXTS, 320)
CAPITALS = {"法国": "巴黎", "德国": "柏林", "英国": "伦敦", "日本": "东京", "中国": "北京"}


def random_model(context: int = 256) -> GPTLMHeadModel:
    torch.manual_seed(4)
    config = GPTConfig(
        n_embd=32, n_head=2, n_layer=2, block_size=context, vocab_size=TOKENIZER.get_vocab_size(), dropout=0.0
    )
    model = GPTLMHeadModel(config)
    with torch.no_grad():  # initial weights give nearly equal scores
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.08)
    return model.eval()


LOADED = LoadedModel(random_model(), TOKENIZER)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model that has memorised five capitals: question <sep> answer <sep>."""
    return learn_by_heart(CAPITALS, tmp_path_factory.mktemp("knowing") / "model")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character becomes \\ud800
    return path


def listed(count: int, seed: int = 0) -> list[dict[str, str]]:
    g = random.Random(seed)
    words = ["cat", "dog", "mat", "hill", "sat", "ran", "up", "on"]
    return [
        {
            "question": f"{' '.join(g.choices(words, k=6))} {i}?",
            **dict(zip("ABCD", g.sample(words, 4))),
            "answer": g.choice("ABCD"),
        }
        for i in range(count)
    ]


# -- shapes ------------------------------------------------------------------------------------------------

SHAPES: list[tuple[dict[str, Any], str, tuple[str, ...], str]] = [
    (
        {"Question": "谁？ ", "A": "甲", "B": "乙", "Answer": "B"},
        "谁？\nA. 甲\nB. 乙\n答案：",
        ("甲", "乙"),
        "B",
    ),
    (
        {"question": "who", "choice0": "x", "choice1": "y", "answer": "1"},
        "who\nA. x\nB. y\nAnswer:",
        ("x", "y"),
        "B",
    ),
    (
        {"question": "who", "choices": ["x", "y"], "answer": 0, "subject": "s"},
        "who\nA. x\nB. y\nAnswer:",
        ("x", "y"),
        "A",
    ),
    (
        {"question": "who", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: who\nAnswer:",
        ("x", "y"),
        "y",
    ),
    ({"query": "Question: who", "choices": ["x", "y"], "gold": 1}, "Question: who\nAnswer:", ("x", "y"), "y"),
    ({"query": "He ran, so", "choices": ["x", "y"], "gold": 0}, "He ran, so", ("x", "y"), "x"),
    (
        {"goal": "cut", "sol1": "saw", "sol2": "eat", "label": 0},
        "Question: cut\nAnswer:",
        ("saw", "eat"),
        "saw",
    ),
    (
        {
            "premise": "It fell.",
            "choice1": "It broke.",
            "choice2": "He sat.",
            "question": "effect",
            "label": 0,
        },
        "It fell therefore",
        ("it broke.", "he sat."),
        "it broke.",
    ),
    (
        {
            "activity_label": "Cats",
            "ctx_a": "A cat",
            "ctx_b": "it runs",
            "endings": ["x [sub] y", "z"],
            "label": "1",
        },
        "Cats: A cat It runs",
        ("x y", "z"),
        "z",
    ),
    (  # a table's column without a value
        {"activity_label": "Cats", "ctx_a": "A cat", "ctx_b": None, "endings": ["x", "y"], "label": 0},
        "Cats: A cat",
        ("x", "y"),
        "x",
    ),
    (  # a table whose questions have two or three choices
        {"question": "who", "A": "x", "B": "y", "C": " ", "D": None, "answer": "B"},
        "who\nA. x\nB. y\nAnswer:",
        ("x", "y"),
        "B",
    ),
    (
        {"content": "他#idiom#地走", "candidates": ["慢慢", "飞快"], "answer": 1},
        "他",
        ("慢慢地走", "飞快地走"),
        "飞快地走",
    ),
    ({"context": "the cat", "continuation": "sat"}, "the cat", (), "sat"),
    ({"question": "1+1?", "answer": "2\n#### 2"}, "1+1?", (), "2\n#### 2"),
    ({"input": "1+1?", "golden": "2", "grade": 1}, "1+1?", (), "2"),
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        "hi",
        (),
        "ho",
    ),
    ({"text": "a text"}, "", (), "a text"),
    ({"text": "a text", "dialog": 7}, "", (), "a text"),
]


@pytest.mark.parametrize(("record", "prompt", "choices", "solution"), SHAPES)
def test_the_shape_of_a_record_says_what_it_is(
    record: dict[str, Any], prompt: str, choices: tuple[str, ...], solution: str, tmp_path: Path
) -> None:
    (task,) = read_tasks([write(tmp_path / "one.jsonl", [record])])
    (one,) = task.examples
    assert (one.prompt, one.choices, one.solution) == (prompt, choices, solution)
    assert task.style.metrics == (
        ("number",)
        if "####" in solution or "golden" in record
        else ("exact_match", "character_f1")
        if task.form == "generation"
        else ()
    )


def test_several_gaps_are_several_questions() -> None:
    record = {"context": "甲[BLANK1]乙[BLANK2]丙", "choices": ["一", "二", "三"], "answers": [2, 0]}
    first, second = task_of_records([record]).examples
    assert (first.prompt, first.choices, first.solution) == ("甲", ("一乙", "二乙", "三乙"), "三乙")
    assert (second.prompt, second.solution) == ("甲三乙", "一丙")


def test_a_gap_at_the_beginning_has_no_prompt() -> None:
    record = {"context": " [BLANK1]乙", "choices": ["一", "二"], "answers": [1]}
    (one,) = task_of_records([record]).examples
    assert (one.prompt, one.choices, one.solution) == ("", ("一乙", "二乙"), "二乙")


@pytest.mark.parametrize(
    ("record", "score", "prompt", "solution"),
    [
        ({"question": "q", "A": "x", "B": "y", "answer": "B"}, "text", "Question: q\nAnswer:", "y"),
        ({"goal": "q", "sol1": "x", "sol2": "y", "label": 1}, "letter", "q\nA. x\nB. y\nAnswer:", "B"),
    ],
)
def test_letters_or_texts_are_scored_as_the_style_says(
    record: dict[str, Any], score: str, prompt: str, solution: str
) -> None:
    (one,) = task_of_records([record], Style(score=score)).examples
    assert (one.prompt, one.solution) == (prompt, solution)


def test_labels_of_all_texts_are_the_choices(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("label,review\n1,好\n0,坏\n1,很好\n", encoding="utf-8")
    (task,) = read_tasks([path])
    assert task.form == "classification"
    assert [(one.prompt, one.choices, one.solution) for one in task.examples][:2] == [
        ("好", ("0", "1"), "1"),
        ("坏", ("0", "1"), "0"),
    ]


def test_a_folder_with_dev_and_test(tmp_path: Path) -> None:
    for subject in ("art", "law"):
        for part, count in (("dev", 3), ("test", 4)):
            rows = listed(count, len(subject + part))
            lines = [",Question,A,B,C,D,Answer"]
            lines += [
                f"{i}," + ",".join([r["question"], *(r[k] for k in "ABCD"), r["answer"]])
                for i, r in enumerate(rows)
            ]
            path = tmp_path / "exam" / part / f"{subject}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (task,) = read_tasks([tmp_path / "exam"])
    assert (task.name, len(task.examples), {k: len(v) for k, v in task.dev.items()}) == (
        "exam",
        8,
        {"art": 3, "law": 3},
    )
    assert [one.subject for one in task.examples] == ["art"] * 4 + ["law"] * 4
    shots = choose_shots(task, TaskOptions(shots=2))
    assert shots["law"] == task.dev["law"][:2]
    drawn = [choose_shots(task, TaskOptions(shots=2, shots_seed=seed))["art"] for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert any(one != drawn[0] for one in drawn)
    result = run_task(LOADED, task, TaskOptions(shots=2))
    assert {k: n for k, (_, n) in result.subjects.items()} == {"art": 4, "law": 4}


def test_tables_without_a_head_are_mmlu_s_own(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('"What, now?",x,y,z,w,B\nWho?,1,2,3,4,D\nWhere?,a,b,c,d,A\n')
    (task,) = read_tasks([tmp_path / "t.csv"])
    assert [(one.question, one.choices, one.solution, one.line) for one in task.examples] == [
        ("What, now?", ("x", "y", "z", "w"), "B", 1),
        ("Who?", ("1", "2", "3", "4"), "D", 2),
        ("Where?", ("a", "b", "c", "d"), "A", 3),
    ]


def test_a_test_part_without_answers_gives_way_to_val(tmp_path: Path) -> None:
    for part, row in (("test", "0,q,x,y"), ("val", "0,q,x,y,B"), ("dev", "0,d,x,y,A")):
        head = "id,question,A,B" + (",answer" if row.count(",") == 4 else "")
        (tmp_path / "ceval" / part).mkdir(parents=True)
        (tmp_path / "ceval" / part / f"art_{part}.csv").write_text(f"{head}\n{row}\n")
    (task,) = read_tasks([tmp_path / "ceval"])
    assert (task.examples[0].solution, task.dev["art"][0].solution) == ("B", "A")


def test_a_toml_file_describes_a_task(tmp_path: Path) -> None:
    write(tmp_path / "q.jsonl", [{"stem": "cat?", "x": "sat", "y": "ran", "key": "B"}] * 2)
    (tmp_path / "task.toml").write_text(
        'form = "multiple_choice"\ntest = "q.jsonl"\ntemplate = "{stem}\\n{choices}\\n?"\n'
        'choices = ["{x}", "{y}"]\nanswer = "key"\nscore = "letter"\ndelimiter = ""\n'
    )
    (task,) = read_tasks([tmp_path / "task.toml"])
    one = task.examples[0]
    assert (one.prompt, one.solution, one.delimiter, task.name) == (
        "cat?\nA. sat\nB. ran\n?",
        "B",
        "",
        "task",
    )
    assert one.reordered([1, 0]).prompt == "cat?\nA. ran\nB. sat\n?"
    assert one.reordered([1, 0]).solution == "A"
    assert run_task(LOADED, task).metrics["acc"].value in (0, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("form = 1", "form must be a text: got 1"),
        ('form = "quiz"\ntest = "q"', "form must be one of multiple_choice"),
        ('tset = "q"', "unknown key 'tset'; did you mean 'test'"),
        ('template = "{a}"', "names no file"),
        ('test = "q"\nform = "cloze"', "needs a template"),
        ('test = "q"\nmax_new_tokens = 0', "t.toml: max_new_tokens must be at least 1: got 0"),
        ('test = "q"\nscore = "word"', "score must be letter or text"),
        ('test = "q"\nstop = ["x", ""]', "t.toml: stop holds an empty text"),
        ('test = "q"\nform = "cloze"\ntemplate = "x"\nchoices = "x"', "choices do not fit form = 'cloze'"),
        ("= 3", "is no TOML file"),
    ],
)
def test_a_wrong_toml_file_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(content)
    with pytest.raises(InputError, match=said):
        read_tasks([tmp_path / "t.toml"])


# -- bad input ---------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"question": "q", "A": "x", "B": "y", "answer": ["A", "B"]}, "several right answers"),
    ({"question": "q", "A": "x", "B": "y", "answer": "(C)"}, "none of the choices: got '(C)'; 2 choices"),
    ({"question": "q", "choices": ["x", "y"], "answer": 2.0}, "got '2.0'; 2 choices, counted from 0 to 1"),
    ({"question": "q", "option1": "x", "option2": "y", "answer": "0"}, "got '0'; labels 1, 2"),
    ({"question": "q", "answer": {"x": "a"}}, "the answer is no text"),
    ({"question": "q", "answer": [["a"]]}, "the answer is no text"),
    ({"question": "q", "answers": {"text": []}}, "a question without an answer"),
    ({"sentence": "q", "option1": "x", "option2": "y", "answer": "1"}, "no question"),
    ({"question": "q", "A": "x", "B": "y"}, "a question without an answer"),
    ({"question": "q", "A": "x", "B": "y", "answer": "E"}, "the answer is none of the choices"),
    ({"question": "q", "choices": ["x", "y"], "answer": 2}, "the answer is none of the choices"),
    ({"question": "q", "choices": ["x"], "answer": 0}, "fewer than two choices"),
    ({"question": "q", "choices": [], "answer": 0}, "fewer than two choices"),
    ({"question": "q", "choices": [*map(str, range(27))], "answer": 26}, "more than 26 choices in a list"),
    ({"question": "q", "choices": ["x", " "], "answer": 0}, "an empty choice: number 2"),
    ({"question": "q", "choices": ["x", "x", "y"], "answer": 0}, "the right choice is there twice"),
    ({"question": "q", "choices": "xy", "answer": 0}, "the choices are no list of texts"),
    (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answerKey": "A"},
        "choices and labels differ in number: 2 and 1",
    ),
    (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "A"]}, "answerKey": "A"},
        "two choices have the same label",
    ),
    ({"question": "q \ud800", "choices": ["x", "y"], "answer": 0}, "half a character (a lone surrogate)"),
    ({"question": "q", "A": "x", "B": "y \udfff", "answer": "A"}, "half a character (a lone surrogate)"),
    ({"question": "q", "A": "x", "B": "y", "answer": "9" * 5000}, "the answer is none of the choices"),
    ({"question": "q", "A": "x", "B": "y", "answer": "²"}, "the answer is none of the choices"),
    ({"ctx": "c", "endings": ["x", "y"], "label": "9" * 5000}, "the answer is none of the choices"),
    ({"question": "q", "answer": "\ud800"}, "half a character (a lone surrogate)"),
    ({"question": "q", "A": "x", "B": float("nan"), "answer": "A"}, "the choices are no list of texts"),
    ({"question": "q", "choices": ["x", float("inf")], "answer": 0}, "the choices are no list of texts"),
    ({"question": float("nan"), "A": "x", "B": "y", "answer": "A"}, "field 'question' is no text"),
    ({"question": "q"}, "a question without an answer"),
    ({"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answer": "A"}, "differ in number"),
    ({"question": "q", "choices": {"text": ["x", "y"], "label": [1, 1]}, "answer": 1}, "have the same label"),
    ({"question": "q", "choices": ["x"], "answer": 0}, "fewer than two choices"),
    ({"question": "q", "choices": ["x", " "], "answer": 0}, "an empty choice"),
    ({"question": "q", "choices": ["x", "x"], "answer": 0}, "the right choice is there twice"),
    ({"question": "q", "choices": [*map(str, range(27))], "answer": 0}, "more than 26 choices in a list"),
    ({"choices": ["x", "y"], "answer": 0}, "no question"),
    ({"question": "q", "choices": ["x", "y"]}, "a question without an answer"),
    ({"question": "q", "answer": []}, "a question without an answer"),
    ({"question": "q", "answer": " "}, "a question without an answer"),
    ({"question": "", "A": "x", "B": "y", "answer": "A"}, "field 'question' is empty"),
    ({"context": "a [BLANK1] b", "choices": ["x", "y"], "answers": []}, "not as many answers as gaps"),
    ({"content": "no gap", "candidates": ["x", "y"], "answer": 0}, "not one #idiom#"),
    ({"turns": ["a", "b"], "reference": []}, "open questions without a right answer"),
    ({"foo": 1}, "no known shape"),
    (
        {"question": "q", "choices": {"text": ["x", "y"], "label": 2}, "answerKey": "A"},
        "the labels of the choices are no list",
    ),
    ({"goal": "g", "sol1": "x", "sol2": "y"}, "a question without an answer"),
    ({"goal": "g", "sol1": "x", "sol2": "y", "label": [1, 0]}, "several right answers: 2; one is needed"),
    ({"ctx": "c", "endings": ["x"], "label": 0}, "fewer than two choices"),
    (
        {"activity_label": "Cats", "ctx_a": ["a"], "ctx_b": "b", "endings": ["x", "y"], "label": 0},
        "field 'ctx_a' is no text",
    ),
    ({"text": "a", "label": None}, "a text without a label"),
    ({"text": "a", "label": {"a": 1}}, "the label is no text"),
    (
        {"premise": "p", "choice1": "x", "choice2": "y", "question": "why", "label": 0},
        "COPA asks for a cause or an effect",
    ),
    (
        {"premise": "p", "choice1": "x", "choice2": "y", "question": ["cause"], "label": 0},
        "COPA asks for a cause or an effect",
    ),
]


@pytest.mark.parametrize(("record", "said"), BAD)
def test_a_bad_record_is_named(record: dict[str, Any], said: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(InputError) as error:
        task_of_records([record])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    path = write(tmp_path / "t.jsonl", [record])
    with pytest.raises(InputError, match="holds no example of a task"):
        read_tasks([path])
    write(path, [SHAPES[2][0], record])
    (task,) = read_tasks([path])
    assert (task.skipped, len(task.examples)) == (1, 1)
    assert said.split(":")[0] in capsys.readouterr().err
    with pytest.raises(InputError, match=r"t\.jsonl:2: "):
        read_tasks([path], strict=True)


@pytest.mark.parametrize(
    ("record", "right"),
    [
        *(({"A": "x", "B": "y", "answer": value}, "y") for value in ("(B)", "b.", "B：", ["B"], "y", 1, 1.0)),
        ({"A": "x", "B": "1.0", "answer": "1.0"}, "1.0"),  # the choice itself
        ({"A": "x", "B": "y", "answer": "0.0"}, "x"),
        ({"choices": ["(B)", "c"], "answer": "(B)"}, "(B)"),
        ({"option1": "x", "option2": "y", "answer": "1"}, "x"),  # WinoGrande counts from 1
        ({"option1": "x", "option2": "y", "answer": 2}, "y"),
        ({"option1": "x", "option2": "y", "answer": "B"}, "y"),
        ({"option1": "x", "option2": "y", "label": 1}, "y"),  # a label counts from 0
        ({"option0": "x", "option1": "y", "answer": 1}, "y"),
    ],
)
def test_the_right_answer_is_named_in_many_ways(record: dict[str, Any], right: str) -> None:
    (one,) = task_of_records([{"question": "q", **record}]).examples
    assert one.choices[one.answer] == right


def test_an_answer_with_places_is_its_text() -> None:
    record = {"context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 3]}}
    assert task_of_records([record]).examples[0].references == ("a", "b")


@pytest.mark.parametrize(
    "answers", ['choices = ["no", "yes"]', ""], ids=["the file names the labels", "the records have them"]
)
def test_a_toml_file_describes_labels(answers: str, tmp_path: Path) -> None:
    write(
        tmp_path / "q.jsonl", [{"t": "cat", "l": "yes"}, {"t": "dog", "l": "no"}, {"t": "x", "l": ["no"] * 2}]
    )
    (tmp_path / "t.toml").write_text(
        f'form = "classification"\ntest = "q.jsonl"\ntemplate = "{{t}}?"\nanswer = "l"\n{answers}'
    )
    (task,) = read_tasks([tmp_path / "t.toml"])
    assert [(one.prompt, one.choices, one.answer) for one in task.examples] == [
        ("cat?", ("no", "yes"), 1),
        ("dog?", ("no", "yes"), 0),
    ]
    assert task.skipped == 1


@pytest.mark.parametrize(
    ("content", "form", "prompt", "solution"),
    [
        ('form = "cloze"\ntemplate = "{t} is"\nanswer = "n"', "cloze", "cat is", "0"),
        ('form = "perplexity"\ntemplate = "{t}!"', "perplexity", "", "cat!"),
        ('template = "{t}?"\nanswer = "n"', "generation", "cat?", "0"),
        ('template = "{t}"\nchoices = "two"\nanswer = "n"', "multiple_choice", "cat", "x"),
        ('template = "{t}"\nchoices = ["{t}", "b"]\nanswer = "t"', "multiple_choice", "cat", "cat"),
    ],
)
def test_a_toml_file_describes_every_form(
    content: str, form: str, prompt: str, solution: str, tmp_path: Path
) -> None:
    write(tmp_path / "q.jsonl", [{"t": "cat", "n": 0, "two": ["x", "y"]}])
    (tmp_path / "t.toml").write_text(f'test = "q.jsonl"\n{content}')
    (task,) = read_tasks([tmp_path / "t.toml"])
    (one,) = task.examples
    assert (task.form, one.prompt, one.solution) == (form, prompt, solution)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('template = "{tt}"', "no field 'tt'"),
        ('form = "cloze"\ntemplate = "{t}"\nanswer = "a"', "the answer is no text"),
        ('form = "cloze"\ntemplate = "{t}"\nanswer = "empty"', "the answer is empty"),
        ('form = "cloze"\ntemplate = "{t}"\nanswer = "several"', "the answer is no text"),
        ('form = "generation"\ntemplate = "{t}"\nchoices = ["a", "b"]', "choices do not fit form"),
        ('form = "classification"', "the record is of the form perplexity, not classification"),
        ('template = "{t}"\nchoices = "many"\nanswer = "several"', "several right answers"),
        ('template = "{t}"\nscore = "letter"\nchoices = "several"\nanswer = "t"', "none of the choices"),
        ('template = "{t}"\nscore = "letter"\nchoices = "many"\nanswer = "n"', "more than 26 choices"),
        ('template = "{a}"', "field 'a' is no text"),
        ('template = "{t}"\nanswer = "right"', "no field 'right'"),
        ('template = "{t}"\nchoices = "options"', "no field 'options'"),
    ],
)
def test_a_toml_file_that_does_not_fit_its_records_is_said(content: str, said: str, tmp_path: Path) -> None:
    record = {"t": "cat", "a": {"b": 1}, "text": "a", "empty": None, "several": ["a", "b"], "n": 0}
    write(tmp_path / "q.jsonl", [{**record, "many": [*map(str, range(27))]}])
    (tmp_path / "t.toml").write_text(f'test = "q.jsonl"\n{content}')
    with pytest.raises(InputError, match=said):
        read_tasks([tmp_path / "t.toml"])


def test_the_same_wrong_choice_twice_is_said(tmp_path: Path, capsys: Any) -> None:
    read_tasks([write(tmp_path / "t.jsonl", [{"question": "q", "choices": ["x", "y", "y"], "answer": 0}])])
    assert "1 questions have the same wrong choice twice" in capsys.readouterr().err


def test_texts_and_packed_files_are_tasks(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "t.txt").write_text("one text\nof two lines\n")
    (task,) = read_tasks([tmp_path / "t.txt"])
    assert (task.form, task.examples[0].solution) == ("perplexity", "one text\nof two lines")
    (tmp_path / "t.txt").write_text("good\tyes\nbad\nbetter\tyes\n")  # rows with labels, and one without
    with pytest.raises(InputError, match=r"t\.txt is plain text without labels: give a table"):
        read_tasks([tmp_path / "t.txt"])
    content = json.dumps({"question": "q", "answer": "a"}).encode()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.jsonl.gz").write_bytes(gzip.compress(content))
    first, second = read_tasks([tmp_path / "a" / "t.jsonl.gz", tmp_path / "b" / "t.jsonl.gz"])
    assert [first.examples[0].solution, second.examples[0].solution] == ["a", "a"]
    assert [first.name, second.name] == [str(tmp_path / name / "t.jsonl.gz") for name in ("a", "b")]
    assert "gzip data" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", listed(3))
    (task,) = read_tasks([path])
    with pytest.raises(InputError, match="t has no dev part to take --shots 2 from: name one with --dev"):
        run_task(LOADED, task, TaskOptions(shots=2))
    (own,) = read_tasks([path], dev=path)
    with pytest.raises(InputError, match="--shots 3 is more than the 3 examples of the dev part"):
        run_task(LOADED, own, TaskOptions(shots=3))
    pairs = write(tmp_path / "p.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(InputError, match="dev part is of the form generation, the task of the form multiple"):
        read_tasks([path], dev=pairs)
    with pytest.raises(InputError, match="--instruction holds half a character"):
        run_task(LOADED, task, TaskOptions(instruction="\udcff"))
    answers = task_of_records([{"question": "q", "answer": "a"}], Style(metrics=("meteor",)))
    with pytest.raises(InputError, match=r"no metric 'meteor' for generated texts; known are exact_match, "):
        run_task(LOADED, answers)
    (told,) = read_tasks([path], style=Style(metrics=("number",)))
    with pytest.raises(
        InputError, match=r"metrics = number are for generated texts; .*multiple_choice gives acc"
    ):
        run_task(LOADED, told)
    with pytest.raises(InputError, match="mixes forms: generation, multiple_choice"):
        read_tasks([write(tmp_path / "m.jsonl", [listed(1)[0], {"question": "q", "answer": "a"}])])
    with pytest.raises(InputError, match="has one label, 'x'"):
        read_tasks([write(tmp_path / "l.jsonl", [{"text": "a", "label": "x"}])])
    with pytest.raises(InputError, match="--stride 257 is more than the 256 tokens"):
        run_task(LOADED, task_of_records([{"text": "a"}]), TaskOptions(stride=257))
    with pytest.raises(InputError, match="form=chat needs a model"):
        run_task(LOADED, task, TaskOptions(prompt_format="chat"))
    with pytest.raises(InputError, match="does not exist"):
        read_tasks([tmp_path / "nothing.jsonl"])
    mixed = [{"question": "q", "answer": answer} for answer in ("so #### 3", "three", "#### 4")]
    with pytest.raises(InputError, match="m mixes answers with a number behind ####"):
        read_tasks([write(tmp_path / "m.jsonl", mixed)])
    (tmp_path / "head.csv").write_text("question,A,B,answer\n")
    with pytest.raises(InputError, match=r"head\.csv has the names of columns and no row below them"):
        read_tasks([tmp_path / "head.csv"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no task"):
        read_tasks([tmp_path / "empty"])
    (tmp_path / "empty" / "test").mkdir()
    with pytest.raises(InputError, match=r"empty/test holds no file of questions"):
        read_tasks([tmp_path / "empty"])
    with pytest.raises(InputError, match=r"nothing\.toml does not exist"):
        read_tasks([tmp_path / "nothing.toml"])
    with pytest.raises(InputError, match="there is no record: a task needs at least one"):
        task_of_records([])
    labels = [{"text": "a", "label": number} for number in range(1001)]
    with pytest.raises(InputError, match="task has 1,001 labels; is the label a text"):
        task_of_records(labels)
    (tmp_path / "plain.jsonl").write_text("a text\nof two lines\n")
    with pytest.raises(InputError, match=r"plain\.jsonl holds no JSON, though its name says so"):
        read_tasks([tmp_path / "plain.jsonl"])
    odd = '{"question": "q", "question": "r", "answer": "a"}\n5\n{"question": \n[{"role": "user"}]\n'
    (tmp_path / "odd.jsonl").write_text(odd)
    with pytest.raises(InputError) as caught:
        read_tasks([tmp_path / "odd.jsonl"])
    assert "field 'question' is there twice, line 1; not an object with fields, line 2; " in str(caught.value)
    assert "broken JSON (" in str(caught.value)
    with pytest.raises(InputError, match="not about the same questions"):
        compare_results(run_task(LOADED, task), run_task(LOADED, task.limited(2)))


def test_one_choice_that_is_too_long_does_not_stop_a_task() -> None:
    rows = [
        {"query": "q", "choices": ["cat", "dog " * 200], "gold": 0},
        {"query": "q", "choices": ["a", "b"], "gold": 1},
    ]
    loaded = LoadedModel(random_model(context=24), TOKENIZER)
    result = run_task(loaded, task_of_records(rows))
    assert (result.n_in_pieces, result.n_cut, len(result.answered)) == (1, 1, 2)
    assert result.as_dict()["in_pieces"] == 1
    assert result.answered[0].n_tokens[1] == len(TOKENIZER.encode_text(" dog" * 200))
    assert "choices in pieces" in markdown_of("m", [result], {})


def test_a_prompt_that_is_too_long_is_cut_and_counted() -> None:
    task = task_of_records([{"context": "the cat sat " * 200, "continuation": "on"}, SHAPES[10][0]])
    assert run_task(LOADED, task).n_cut == 1
    asked = task_of_records(
        [{"question": "the cat sat " * 200, "answer": "on"}, {"question": "a", "answer": "b"}]
    )
    result = run_task(replace(LOADED, max_new_tokens=4), asked)
    assert (result.n_cut, len(result.answered)) == (1, 2)


# -- prompts -----------------------------------------------------------------------------------------------


def test_shots_are_the_text_that_a_person_would_write() -> None:
    rows = [{"question": f"q{i}", "A": "x", "B": "y", "answer": "AB"[i % 2]} for i in range(3)]
    examples = task_of_records(rows).examples
    prompter = Prompter(TOKENIZER, "text", 1)
    ids = prompter.prompt(examples[2], examples[:2], "Choose.")
    assert TOKENIZER.decode(ids) == (
        "Choose.\n\nq0\nA. x\nB. y\nAnswer: A\n\nq1\nA. x\nB. y\nAnswer: B\n\nq2\nA. x\nB. y\nAnswer:"
    )
    (a, b) = prompter.requests(examples[2], examples[:2], "Choose.")
    assert a[0] == b[0] == ids
    assert [TOKENIZER.decode([*one[1]]) for one in (a, b)] == [" A", " B"]


def test_a_model_of_questions_and_answers_is_asked_the_bare_question(knowing: Path) -> None:
    """As in its training. Choices that are listed belong to the question."""
    tokenizer = minigpt.load_tokenizer(knowing)
    rows = [{"question": "法国", "choices": ["巴黎", "东京"], "answer": 0}]
    prompter = Prompter(tokenizer, "question", None)
    (one,) = task_of_records(rows, Style(score="text")).examples
    question, answer = ([*tokenizer.encode_text(text), 2] for text in ("法国", "巴黎"))
    assert prompter.prompt(one, [one]) == [*question, *answer, *question]
    (listed_one,) = task_of_records(rows).examples
    assert prompter.prompt(listed_one) == [*tokenizer.encode_text("法国\nA. 巴黎\nB. 东京\n答案："), 2]


def test_a_long_context_is_encoded_as_a_whole() -> None:
    """The fast way to encode choices gives the same ids as the slow way."""
    g, prompter = random.Random(2), Prompter(TOKENIZER, "text", 1)
    for _ in range(50):
        context = "".join(g.choices("the cat\n 四川：?Answer:", k=300)).rstrip()
        choices = ["".join(g.choices(" the\n川A", k=g.randint(1, 6))) for _ in range(3)]
        slow = [encode_pair(TOKENIZER, context, one, 1) for one in choices]
        assert [(list(a), list(b)) for a, b in prompter._pairs(context, choices)] == slow


def test_blanks_at_the_end_belong_to_the_continuation() -> None:
    context, continuation = encode_pair(TOKENIZER, "the cat ", "sat", 1)
    assert (TOKENIZER.decode(context), TOKENIZER.decode(continuation)) == ("the cat", " sat")
    assert encode_pair(TOKENIZER, "", "the", 1) == ([1], TOKENIZER.encode_text("the"))
    with pytest.raises(InputError, match="an empty prompt needs a model with a BOS or EOS token"):
        encode_pair(TOKENIZER, "", "the", None)


def test_a_question_is_never_its_own_shot(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)])
    (task,) = read_tasks([path], dev=path)
    shots = choose_shots(task, TaskOptions(shots=2))
    for one in task.examples:
        used = _shots_of(one.asking(f"{one.question}!"), shots, 2, task.is_own_dev)
        assert len(used) == 2
        assert one not in used


@pytest.mark.parametrize("stride", [0, 1, 3, 5])
def test_each_token_of_a_text_is_predicted_once(stride: int) -> None:
    ids = list(range(2, 25))
    windows = rolling_windows(ids, 1, 5, stride)
    assert [one for _, continuation in windows for one in continuation] == ids
    text = [1, *ids]
    place = 1
    for context, continuation in windows:
        assert len(context) + len(continuation) <= 6
        assert text[place - len(context) : place] == list(context)
        place += len(continuation)


# -- results -----------------------------------------------------------------------------------------------


def test_a_model_that_knows_the_answers_is_right(knowing: Path, tmp_path: Path) -> None:
    model, tokenizer = minigpt.load_model(knowing), minigpt.load_tokenizer(knowing)
    rows = [{"question": q, "answer": a} for q, a in CAPITALS.items()]
    result = evaluate_task(model, tokenizer, rows)
    assert {k: m.value for k, m in result.metrics.items()} == {"exact_match": 1, "character_f1": 1}
    low, high = result.metrics["exact_match"].low, result.metrics["exact_match"].high
    assert low == pytest.approx(0.025**0.2)
    assert high == 1
    others = list(CAPITALS.values())
    choices = [{"query": q, "choices": others, "gold": others.index(a)} for q, a in CAPITALS.items()]
    asked = evaluate_task(model, tokenizer, write(tmp_path / "c.jsonl", choices))
    assert asked.metrics["acc"].value == 1
    wrong = evaluate_task(model, tokenizer, [{**row, "answer": "东"} for row in rows])
    assert wrong.metrics["exact_match"].value == 0
    assert wrong.metrics["character_f1"].value == pytest.approx(
        2 / 3 / 5
    )  # one of two characters, once in five


def test_choices_are_scored_one_by_one() -> None:
    """acc and its variants are computed here from the log-likelihoods of the slow twin."""
    g = random.Random(3)
    words = ["cat", "dog", "mat", "hill", "sat", "ran", "up", "on", "the"]
    rows: list[dict[str, Any]] = [
        {
            "query": " ".join(g.choices(words, k=4)),
            "gold": g.randint(0, 2),
            "choices": [" ".join(g.sample(words, k)) for k in (1, 3, 5)],
        }
        for _ in range(20)
    ]
    result = evaluate_task(LOADED.model, TOKENIZER, rows)
    scorer = ContinuationScorer(LOADED.model)  # type: ignore[arg-type]
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0, "acc_tokens": 0}
    for row in rows:
        pairs = [encode_pair(TOKENIZER, row["query"], f" {one}", 1) for one in row["choices"]]
        totals = [scorer.score([pair])[0].total for pair in pairs]
        sizes = {
            "acc": [1] * 3,
            "acc_norm": [len(one) for one in row["choices"]],
            "acc_bytes": [len(one.encode()) for one in row["choices"]],
            "acc_tokens": [len(continuation) for _, continuation in pairs],
        }
        for name, size in sizes.items():
            right[name] += int(np.argmax([t / n for t, n in zip(totals, size)])) == row["gold"]
    assert {k: m.value for k, m in result.metrics.items()} == {
        k: pytest.approx(n / 20) for k, n in right.items()
    }
    assert all(m.low <= m.value <= m.high for m in result.metrics.values())


def test_answers_do_not_depend_on_shared_beginnings() -> None:
    prompts = [
        TOKENIZER.encode_text("the cat sat on the mat " * 20 + end) for end in ("a", "dog", "hill", "the")
    ]
    options = GenerationOptions(max_new_tokens=6)
    together, counts = generate_texts(LOADED, prompts, options)
    alone = [generate_texts(LOADED, [prompt], options)[0][0] for prompt in prompts]
    assert together == alone
    assert counts["tokens_read"] < counts["tokens"]


def test_an_answer_ends_with_what_the_folder_names(tmp_path: Path) -> None:
    minigpt.save_pretrained(random_model(), tmp_path / "m", TOKENIZER)
    loaded = load(tmp_path / "m", "cpu")
    assert not isinstance(loaded.model, SequenceClassifier)
    prompts = [TOKENIZER.encode_text("the cat")]
    (whole,), _ = generate_texts(loaded, prompts, GenerationOptions(max_new_tokens=12))
    ids = generate_ids(loaded.model, prompts, GenerationOptions(max_new_tokens=12), [], tokenizer=TOKENIZER)
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [ids[0].ids[0], 0]}), encoding="utf-8")
    (short,), _ = generate_texts(loaded, prompts, GenerationOptions(max_new_tokens=12))
    assert whole != ""
    assert short == ""


def test_a_text_in_windows() -> None:
    texts = [{"text": "the cat sat on the mat " * 80}, {"text": "四川的省会是成都。"}]
    result = evaluate_task(LOADED.model, TOKENIZER, texts)
    n_bytes = sum(len(one["text"].encode()) for one in texts)
    total = -sum(one.logprobs[0] for one in result.answered)
    assert result.metrics["bits_per_byte"].value == pytest.approx(total / math.log(2) / n_bytes)
    sliding = evaluate_task(LOADED.model, TOKENIZER, texts, stride=64)
    assert sliding.tokens > result.tokens
    alone = [evaluate_task(LOADED.model, TOKENIZER, [one]).answered[0].logprobs[0] for one in texts]
    assert [one.logprobs[0] for one in result.answered] == pytest.approx(alone, rel=1e-5)


def test_a_classifier_labels_texts_by_its_own_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = Labels(("bad", "good", "none"))
    classifier = SequenceClassifier(LOADED.model.config, labels, 0, LOADED.model.base_model).eval()
    save_classifier(classifier, tmp_path / "c", TOKENIZER)
    g = random.Random(6)
    rows = [
        {"text": " ".join(g.choices(TEXTS[0].split(), k=5)), "label": g.choice(["bad", "good"])}
        for _ in range(30)
    ]
    (task,) = read_tasks([write(tmp_path / "t.jsonl", rows)])
    loaded = load(tmp_path / "c", "cpu")
    result = run_task(loaded, task)
    assert [one.given in labels.names for one in result.answered] == [True] * 30
    right = [one.given == row["label"] for one, row in zip(result.answered, rows)]
    assert result.metrics["acc"].value == pytest.approx(sum(right) / 30)
    f1 = result.metrics["macro_f1"]
    assert f1.low <= f1.value <= f1.high
    with pytest.raises(
        InputError, match="labels that the classifier does not know: fine; it knows bad, good, none"
    ):
        run_task(
            loaded, read_tasks([write(tmp_path / "u.jsonl", [*rows, {"text": "a", "label": "fine"}])])[0]
        )
    with pytest.raises(InputError, match="is of the form generation: a classifier labels texts only"):
        run_task(loaded, task_of_records([{"question": "q", "answer": "a"}]))


def test_two_models_are_compared_question_by_question(knowing: Path) -> None:
    model, tokenizer = minigpt.load_model(knowing), minigpt.load_tokenizer(knowing)
    rows = [{"question": q, "answer": a} for q, a in CAPITALS.items()] * 2
    task = task_of_records(rows)
    good = run_task(LoadedModel(model, tokenizer), task)
    torch.manual_seed(0)
    fresh = GPTLMHeadModel(model.config)  # type: ignore[arg-type]
    bad = run_task(LoadedModel(fresh, tokenizer), task)
    found = compare_results(bad, good)
    assert (found.first, found.second, found.winner) == (0, 1, 2)
    assert found.difference.p == pytest.approx(2 / 2**10)
    assert "B is better than A by 100.0 points in exact_match" in found.in_words("A", "B")
    same = compare_results(good, good)
    assert "give the same exact_match on each of 10 questions" in same.in_words("A", "B")
    few = compare_results(replace_answered(bad, 3), replace_answered(good, 3))
    assert (few.winner, "cannot tell A and B apart" in few.in_words("A", "B")) == (0, True)
    with pytest.raises(InputError, match="has no metric 'acc'; it has exact_match, character_f1"):
        compare_results(good, bad, "acc")


def replace_answered(result: TaskResult, count: int) -> TaskResult:
    metrics = {k: replace(m, values=m.values[:count]) for k, m in result.metrics.items()}
    return replace(result, answered=result.answered[:count], metrics=metrics)


# -- HELM's questions --------------------------------------------------------------------------------------


def test_each_change_keeps_most_of_a_question() -> None:
    text = "四川的省会在哪里？Name the city, it is big!"
    for name, change in PERTURBATIONS.items():
        changed = change(text, random.Random(1))
        assert changed != text, name
        assert changed == change(text, random.Random(1)), "the same seed, the same change"
        assert abs(len(changed) - len(text)) <= 6, name
    assert PERTURBATIONS["full width"]("a b", random.Random(0)) == "ａ\u3000ｂ"
    assert PERTURBATIONS["half width"]("ａ，ｂ？", random.Random(0)) == "a,b?"
    assert PERTURBATIONS["homophones"]("在", random.Random(0)) == "再"


def test_the_temperature_is_that_of_the_data() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (4000, 4))
    shares = np.exp(logits)
    shares /= shares.sum(1, keepdims=True)
    truth = np.array([generator.choice(4, p=row) for row in shares])
    for sharper in (1.0, 3.0):  # a model that is three times too sure needs a temperature of three
        assert fit_temperature(logits * sharper, truth) == pytest.approx(sharper, rel=0.1)


def test_questions_in_the_training_data_are_found(tmp_path: Path) -> None:
    rows = [
        {"question": "the cat sat on the mat and then it ran up the hill again", "answer": "a"},
        {"question": "how many dogs ran around the very old house on that day", "answer": "b"},
        {"question": "四川省的省会是哪一座城市，它在哪里？", "answer": "c"},
        {"question": "short", "answer": "d"},
    ]
    training = write(
        tmp_path / "train.jsonl",
        [
            {"text": "x y. The cat sat, on the mat, and then it ran up the hill again! z"},
            {
                "messages": [
                    {"role": "user", "content": "how many dogs ran around the very old house on some day"}
                ]
            },
        ],
    )
    found = contamination(task_of_records(rows).examples, [training], n=6)
    assert (found.count, [one.line for one in found.exact], [one.line for one in found.near]) == (3, [1], [2])
    training.write_bytes(training.read_text("utf-8").replace("hill", "h\xfcll").encode("cp1252"))
    rows[0]["question"] = rows[0]["question"].replace("hill", "h\xfcll")
    found = contamination(task_of_records(rows).examples, [training], n=6, encoding="cp1252")
    assert [one.line for one in found.exact] == [1]


def test_a_profile_asks_all_of_it() -> None:
    task = task_of_records(listed(12))
    result = run_task(LOADED, task)
    found = profile(LOADED, result, TaskOptions())
    assert found.calibration is not None
    assert found.positions is not None
    assert sum(found.positions.chosen.values()) == pytest.approx(1)
    assert 0 <= found.positions.consistent <= 1
    assert set(found.robustness) >= {"case", "typing errors", "dropped characters", "doubled characters"}
    assert all(d.low <= d.value <= d.high for d in found.robustness.values())
    first, *others = (
        run_task(LOADED, task, TaskOptions(instruction=text)).metrics["acc"].value
        for text in wordings("multiple_choice", ["a question"])
    )
    reworded = found.robustness["reworded instruction"]
    assert reworded.value == pytest.approx(sum(others) / 2 - first)
    assert reworded.count == 12
    own = robustness(LOADED, result, TaskOptions(instruction="Choose."))
    assert "reworded instruction" not in own, "another wording of a user's own instruction is not known"
    assert json.loads(json.dumps(found.as_dict()))["calibration"]["count"] == found.calibration.count


# -- report and card ---------------------------------------------------------------------------------------


def test_a_report_shows_texts_and_runs_none(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | \\| ![x](http://x.test/x.png) \x1b[31m "
    rows = [{**row, "question": f"{hostile}{row['question']}"} for row in listed(8)]
    result = run_task(LOADED, task_of_records(rows))
    own = profile(LOADED, result, TaskOptions())
    files = {
        path.name: path.read_text("utf-8")
        for path in write_report(tmp_path / "r", "m<b>", [result], {"task": own})
    }
    assert set(files) == {"index.html", "README.md", "results.svg", "reliability-1.svg"}
    for name in ("index.html", "README.md"):
        assert "<script" not in files[name]
        assert "m<b>" not in files[name]
        assert "&lt;script&gt;" in files[name]
        assert "Position" in files[name]
        assert "\x1b" not in files[name]
    rows_shown = [line for line in files["README.md"].splitlines() if "script" in line]
    assert all(re.sub(r"\\.", "", line).count("|") == 6 for line in rows_shown), "five columns"
    assert "![x]" not in files["README.md"]
    worst, surprising = cases(result)
    assert len(worst) + len(surprising) <= 16
    assert not any(one.right for one in worst)
    assert all(one.right for one in surprising)


def test_a_card_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    result = run_task(LOADED, task_of_records(listed(6)))
    first = updated_card("", tmp_path / "m", [result])
    assert first.startswith("---\nlanguage: [en]\n")
    assert "model-index:" in first
    again = updated_card(first, tmp_path / "m", [result])
    assert again == first
    mine = (
        first.replace("language: [en]", "language: [fr]\nlicense: mit\ntags:\n- small") + "\nMy own words.\n"
    )
    mine = mine.replace("# m\n", "# My model\n\nHow I made it.\n")
    better = replace(result, metrics={"acc": replace(result.metrics["acc"], value=0.875)})
    updated = updated_card(mine, tmp_path / "m", [better])
    for kept in (
        "language: [fr]",
        "license: mit",
        "tags:\n- small",
        "My own words.",
        "# My model\n\nHow I made it.",
    ):
        assert kept in updated
    assert updated.count("model-index:") == 1
    assert "value: 0.875" in updated
    assert updated.count("## Results") == 1
    foreign = "---\nmodel-index:\n- name: mine\n---\n\n# Mine\n"
    kept = updated_card(foreign, tmp_path / "m", [result])
    assert "- name: mine" in kept
    assert "written by minigpt" not in kept
    plain = updated_card("# Only text\n", tmp_path / "m", [result])
    assert "# Only text\n\n<!-- minigpt eval: begin -->" in plain
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n\n# Mine\n")
    update_card(tmp_path / "m", [result])
    assert (tmp_path / "m" / "README.md").read_text("utf-8").startswith("---\nlicense: mit\nlanguage: [en]\n")
    (tmp_path / "m" / "README.md").write_bytes("# 模型\n".encode("gb18030"))
    with pytest.raises(InputError, match=r"README\.md is not in UTF-8"):
        update_card(tmp_path / "m", [result])


def test_a_card_names_the_run_and_says_what_the_model_does(tmp_path: Path) -> None:
    result = run_task(LOADED, task_of_records(listed(6)))
    best = tmp_path / "[my] run" / "best"
    (tmp_path / "[my] run" / "step-00000012").mkdir(parents=True)
    best.symlink_to("step-00000012")
    odd = replace(result, task=replace(result.task, name="half \ud800"))
    card = updated_card("", best, [odd])
    assert '- name: "[my] run"\n' in card
    assert "\n# \\[my\\] run\n" in card
    assert "pipeline_tag: text-generation\n" in card
    card.encode("utf-8")
    model = random_model()
    classifier = SequenceClassifier(model.config, Labels(("no", "yes")), 0, model.base_model)
    save_classifier(classifier, tmp_path / "labels", TOKENIZER)
    assert "pipeline_tag: text-classification\n" in updated_card("", tmp_path / "labels", [result])


# -- the commands ------------------------------------------------------------------------------------------


@pytest.fixture
def command(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return partial(run_command)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    minigpt.save_pretrained(random_model(), folder / "a", TOKENIZER)
    write(folder / "exam" / "test.jsonl", listed(10, 1))
    write(folder / "exam" / "dev.jsonl", listed(4, 2))
    write(folder / "qa.jsonl", [{"question": q, "answer": a} for q, a in CAPITALS.items()])
    (folder / "words.jsonl").write_text("no JSON\n", encoding="utf-8")
    return folder


def test_the_command_measures_tasks(command: Command, folders: Path) -> None:
    result = command(
        "eval",
        "--model",
        folders / "a",
        "--task",
        folders / "exam",
        "--shots",
        2,
        "--device",
        "cpu",
        "--json",
        "--helm",
        "--report",
        "report",
        "--training_data",
        folders / "exam" / "test.jsonl",
    )
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out.splitlines()[-1])["tasks"]["exam"]
    (task,) = read_tasks([folders / "exam"])
    expected = evaluate_task(minigpt.load_model(folders / "a"), TOKENIZER, task, shots=2)
    assert found["metrics"] == expected.as_dict()["metrics"]
    assert (found["count"], found["shots"], found["contamination"]["exact"]) == (10, 2, 10)
    assert found["efficiency"]["tokens_read"] < found["efficiency"]["tokens"]
    assert Path("report/index.html").exists()
    for text in ("exam", "acc_norm", "0.250", "Robustness", "Position", "Contamination"):
        assert text in result.out


def test_the_command_writes_the_card_and_the_model_still_loads(command: Command, folders: Path) -> None:
    result = command(
        "eval", "--model", folders / "a", "--task", folders / "exam", "--card", "--device", "cpu"
    )
    assert result.code == 0
    assert "model-index:" in (folders / "a" / "README.md").read_text("utf-8")
    minigpt.load_model(folders / "a")


def test_a_checkpoint_with_a_card_is_still_a_checkpoint(command: Command, tmp_path: Path) -> None:
    write_data(tmp_path)
    trainer(config(tmp_path, max_steps=2, eval_steps=1)).run()
    task = write(tmp_path / "choices.jsonl", listed(3))
    for _ in range(2):  # the second time, README.md is there
        arguments = ["--model", tmp_path / "run" / "best", "--task", task, "--card", "--device", "cpu"]
        assert command("eval", *arguments).code == 0
    assert trainer(config(tmp_path, max_steps=3, eval_steps=1)).resume().name == "step-00000002"


def test_the_folder_of_a_run_is_its_best_checkpoint(command: Command, tmp_path: Path) -> None:
    write_data(tmp_path)
    trainer(config(tmp_path, max_steps=1, eval_steps=1, max_length=12)).run()
    found = [
        command("eval", "--data", tmp_path / "train.jsonl", "--model", tmp_path / name, "--json").out
        for name in ("run", "run/best")
    ]
    first, second = (json.loads(out.splitlines()[-1]) for out in found)
    assert first == second
    assert first["cut"] == 8, "every pair has more than 12 tokens, as in training"


def test_choices_that_the_model_cannot_tell_apart_are_said(command: Command, knowing: Path) -> None:
    questions = [{"question": "法国", "choices": ["巴黎", "东京"], "answer": 1}]
    path = write(Path("letters.jsonl"), questions)
    for verb, *models in (("eval", "--model", knowing), ("compare", knowing, knowing)):
        result = command(verb, *models, "--task", path, "--device", "cpu")
        assert result.code == 0
        assert "not in the vocabulary, read as <unk>: '\\n' 'A' '.' ' ' 'B'" in result.err
        assert "letters: in 1 questions, choices read the same" in result.err
        assert command(verb, *models, "--task", path, "--score", "text").err == "", "asked without them"


def test_compare_says_it_in_words(command: Command, knowing: Path, folders: Path) -> None:
    result = command(
        "compare", folders / "a", knowing, "--task", folders / "qa.jsonl", "--device", "cpu", "--json"
    )
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out.splitlines()[-1])["tasks"]["qa"]
    assert (found["first"], found["second"], found["only_second"], found["winner"]) == (0, 1, 5, 0)
    assert found["p"] == pytest.approx(2 / 2**5)
    assert "the data cannot tell" in result.out  # five questions are too few, whatever the difference
    assert "巴黎" in result.out
    same = command("compare", knowing, knowing, "--task", folders / "qa.jsonl", "--device", "cpu")
    assert "the first and the second give the same exact_match on each of 5 questions" in same.out


def test_in_chinese_the_tables_hold_no_english_word(command: Command, knowing: Path, folders: Path) -> None:
    """Names of metrics, tasks and files stay; --json is the same in both languages."""
    exam = ["--task", folders / "exam", "--device", "cpu", "--json"]
    helm = ["--helm", "--training_data", folders / "exam" / "test.jsonl", "--report", "page"]
    pairs = write(
        Path("pairs.jsonl"),
        [{"question": "法国的首都？", "answer": "巴黎"}, {"question": "长" * 300, "answer": "a"}],
    )
    commands = [
        ["eval", "--model", folders / "a", *exam, *helm],
        ["eval", "--model", knowing, "--data", pairs, "--precision", "float32", "int8", "--show_wrong", 1],
        ["eval", "--model", folders / "a", "--text", folders / "qa.jsonl", "--text_field", "question"],
        ["compare", folders / "a", knowing, "--task", folders / "qa.jsonl", "--show", 0],
        ["compare", knowing, knowing, "--task", folders / "qa.jsonl", "--device", "cpu"],
    ]
    names = {*metric_names(read_tasks([folders / "exam"])[0]), "exact_match", "block_size", "float", "int"}
    names |= {"exam", "nat", "dev", "page", "index", "html", "MiB"}
    for arguments in commands:
        found = command(*arguments, "--language", "zh")
        assert found.code == 0, found.err
        texts = [line for line in found.out.splitlines() if not line.startswith("{")]
        if "page" in arguments:
            texts.append(
                re.sub("<style>.*?</style>|<[^>]*>", " ", Path("page/index.html").read_text("utf-8"))
            )
            texts += [re.sub("<[^>]*>", " ", path.read_text("utf-8")) for path in Path("page").glob("*.svg")]
        said = set(re.findall("[A-Za-z_]{3,}", re.sub(r"\S*/\S*", "", "\n".join(texts))))
        asked = {word for row in listed(10, 1) for word in re.findall("[A-Za-z_]+", str(row))}
        assert not said - names - asked
    shown = command(*commands[3][:-1], 1, "--language", "zh").out
    assert "问题" in shown
    assert "正确答案" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--task", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["eval", "--task", "qa.jsonl", "--text", "x"], "give --task or --text, not both"),
        (["eval", "--task", "qa.jsonl", "--precision", "int8", "float32"], "--task takes one --precision"),
        (["eval", "--task", "qa.jsonl", "--shots", "-1"], "shots must be from 0"),
        (["eval", "--task", "qa.jsonl", "--data", "qa.jsonl"], "--data has no effect with --task"),
        (["eval", "--task", "qa.jsonl", "--show", "3"], "--show has no effect with --task"),
        (["eval", "--task", "qa.jsonl", "--training_data", "b"], "--training_data b does not exist"),
        (["eval", "--task", "qa.jsonl", "--report", "qa.jsonl"], "--report qa.jsonl: qa.jsonl is a file"),
        (["eval", "--task", "qa.jsonl", "--report", "qa.jsonl/new"], "qa.jsonl is a file; give a folder"),
        (["eval", "--task", "qa.jsonl", "--training_data", "a"], "--training_data a is a folder"),
        (["eval", "--card"], "--card needs --task FILE"),
        (["eval", "--task", "qa.jsonl", "--score", "letter"], "--score letter has no effect: no task lists"),
        (
            ["eval", "--task", "qa.jsonl", "--score", "text"],
            "--score text has no effect: no task has choices",
        ),
        (["eval", "--task", "qa.jsonl", "--stride", "9"], "--stride has no effect"),
        (["eval", "--task", "qa.jsonl", "--shots_seed", "9"], "--shots_seed has no effect"),
        (["compare", "a", "a", "--task", "qa.jsonl", "--stride", "9"], "--stride has no effect"),
        (["eval", "--data", "qa.jsonl", "--shots", "3"], "--shots needs --task FILE"),
        (["eval", "--text", "qa.jsonl", "--limit", "3"], "--limit needs --task FILE"),
        (["eval", "--task", "words.jsonl"], "words.jsonl holds no JSON, though its name says so"),
        (["compare", "a", "a"], "nothing to compare on: give --task FILE"),
        (
            ["compare", "a", "a", "--task", "qa.jsonl", "--metric", "acc"],
            "--metric acc does not fit qa: it has exact",
        ),
        (["compare", "a", "b", "--task", "qa.jsonl"], "b does not exist: give the folder of a model"),
        (["compare", "a", "--task", "qa.jsonl"], "SECOND"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], said: str, command: Command, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    more = ["--model", "a"] if arguments[0] == "eval" else []
    result = command(*arguments, *more)
    assert result.code == 2
    assert said in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "form", "count", "dev"),
    [
        ("cmmlu", "multiple_choice", 11581, 335),
        ("lambada", "cloze", 5151, 0),
        ("gsm8k", "generation", 1319, 7473),
        ("chid", "multiple_choice", 1930, 197),
        ("thucnews_titles", "classification", 9963, 9952),
        ("chnsenticorp", "classification", 804, 791),
    ],
)
def test_published_sets_are_read_whole(name: str, form: str, count: int, dev: int) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"../shared/data/{name} is not there")
    (task,) = read_tasks([SHARED / name])
    assert (task.form, len(task.examples), task.skipped) == (form, count, 0)
    assert sum(map(len, task.dev.values())) == dev


def test_a_run_measures_tasks_and_learns_the_same(tmp_path: Path) -> None:
    write_data(tmp_path)
    things = json.loads((tmp_path / "train.jsonl").read_text("utf-8").splitlines()[0])
    task = {"query": things["question"], "choices": [things["answer"], "黑"], "gold": 0}
    path = write(tmp_path / "colours.jsonl", [task])
    plain = config(tmp_path, "plain", max_steps=4, eval_steps=2)
    asked = config(
        tmp_path, "asked", max_steps=4, eval_steps=2, eval_task=(str(path), str(tmp_path / "val.jsonl"))
    )
    trainer(plain).run()
    trainer(asked).run()
    lines = [line for line in metrics(tmp_path / "asked") if "val_loss" in line]
    assert len(lines) >= 2
    name = f"{tmp_path.name}/val/exact_match"
    assert all(line["colours/acc"] in (0, 1) and 0 <= line[name] <= 1 for line in lines)
    left, right = (load_file(tmp_path / run / "last" / "model.safetensors") for run in ("plain", "asked"))
    assert all(torch.equal(left[key], right[key]) for key in left)
    with pytest.raises(InputError, match=r"nothing\.jsonl does not exist"):
        trainer(config(tmp_path, "bad", eval_task=("nothing.jsonl",)))


def test_limited_is_spread_evenly() -> None:
    task: Task = task_of_records(listed(10))
    assert [one.line for one in task.limited(5).examples] == [1, 3, 5, 7, 9]
    assert task.limited(0) is task
