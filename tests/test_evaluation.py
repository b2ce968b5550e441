"""Evaluation: sums that depend only on model and data, scores that are checked by hand, and the command."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import minigpt
from minigpt.data.batches import EncodedExamples, encode_conversations
from minigpt.data.conversation import conversation_of_pair
from minigpt.errors import InputError
from minigpt.evaluation import loss as loss_module
from minigpt.evaluation.answers import (
    Asked,
    answer_rows,
    by_question,
    character_f1,
    exact_match,
    score_answers,
)
from minigpt.evaluation.loss import LossSum, evaluate_loss
from minigpt.evaluation.text import evaluate_text
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.quantized import set_precision
from tests.commands import Result, RunCommand
from tests.talking import learn_by_heart

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {"天是什么？": "天。", "地": "大地很大", "山高吗？": "高", "水": "水是水，水不是山", "月": "月月"}
PAIRS = [
    conversation_of_pair(question, answer, line, "")
    for line, (question, answer) in enumerate(TEXTS.items(), 1)
]
TOKENIZER = Tokenizer.from_word2id(build_vocabulary(p.question + p.answer for p in PAIRS))
V = TOKENIZER.get_vocab_size()


def make_model(**changes: Any) -> GPTLMHeadModel:
    config = {"n_embd": 16, "n_head": 2, "n_layer": 2, "block_size": 16, "vocab_size": V, "dropout": 0.0}
    torch.manual_seed(0)
    return GPTLMHeadModel(GPTConfig(**{**config, **changes})).double().eval()


def encoded() -> EncodedExamples:
    return encode_conversations(PAIRS, TOKENIZER, 16)


# -- loss ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def written_out(model: GPTLMHeadModel) -> tuple[list[float], list[float]]:
    """The slow twin: return -log p of all tokens except first ones, and of the answers' tokens."""
    every, answers = [], []
    for pair in PAIRS:
        text = [*TOKENIZER.encode_text(pair.question), 2, *TOKENIZER.encode_text(pair.answer), 2]
        for i in range(1, len(text)):
            nll = -float(model(torch.tensor([text[:i]]))[0, -1].log_softmax(-1)[text[i]])
            every.append(nll)
            if i > len(pair.question):
                answers.append(nll)
    return every, answers


def test_sums_are_those_written_out() -> None:
    model = make_model()
    every, answers = written_out(model)
    report = evaluate_loss(model, encoded().in_order(3))
    assert (report.all.count, report.answer.count) == (len(every), len(answers))
    # double precision throughout: sums of some dozen terms in another order
    assert report.all.nll == pytest.approx(math.fsum(every), rel=1e-13)
    assert report.answer.nll == pytest.approx(math.fsum(answers), rel=1e-13)
    assert report.answer.loss == pytest.approx(math.fsum(answers) / len(answers), rel=1e-13)


def test_a_model_that_knows_nothing_has_the_entropy_of_the_vocabulary() -> None:
    model = make_model()
    model.transformer.ln_f.weight.data[:] = 0  # all scores are 0
    report = evaluate_loss(model, encoded().in_order(2))
    for part in (report.all, report.answer):
        assert part.loss == pytest.approx(math.log(V), rel=1e-14)
        assert part.perplexity == pytest.approx(V, rel=1e-13)
        assert part.bits_per_character == pytest.approx(math.log2(V), rel=1e-14)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize("pad_to", [0, 16])
def test_neither_batch_size_nor_padding_matters(batch_size: int, pad_to: int) -> None:
    model, data = make_model(), encoded()
    rows = [np.arange(first, min(first + batch_size, 5)) for first in range(0, 5, batch_size)]
    report = evaluate_loss(model, (data.batch(some, pad_to) for some in rows))
    expected = evaluate_loss(model, data.in_order(1))
    # sums in double precision in another order
    assert report.all.nll == pytest.approx(expected.all.nll, rel=1e-14)
    assert report.answer.nll == pytest.approx(expected.answer.nll, rel=1e-14)
    assert (report.all.count, report.answer.count) == (expected.all.count, expected.answer.count)


def test_logits_are_computed_in_pieces_and_only_where_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make_model(), encoded()
    expected = evaluate_loss(model, data.in_order(5))
    pieces: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: pieces.append(len(inputs[0])))
    monkeypatch.setattr(loss_module, "_CHUNK", 7 * V)
    report = evaluate_loss(model, data.in_order(5))
    assert report.all.nll == pytest.approx(expected.all.nll, rel=1e-14)
    assert sum(pieces) == report.all.count  # neither padding nor anything twice
    assert max(pieces) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_taken_in_double_precision_whatever_the_model_computes_in(dtype: torch.dtype) -> None:
    model, (batch,) = make_model().to(dtype), encoded().in_order(5)
    scores: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: scores.append(output))
    report = evaluate_loss(model, [batch])
    targets = batch.targets[batch.token_mask]
    terms = F.cross_entropy(
        scores[0].float(), targets, reduction="none"
    ).tolist()  # as accurate as the scores
    # adding these in single precision would be off by about 1e-7, in bfloat16 by 1e-2
    assert report.all.nll == pytest.approx(math.fsum(terms), rel=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = make_model(dropout=0.5).train(training)
    measured = evaluate_loss(model, encoded().in_order(5)).all.nll
    assert measured == evaluate_loss(make_model(), encoded().in_order(5)).all.nll  # without dropout
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_after_an_error() -> None:
    model = make_model(block_size=4).train()
    with pytest.raises(ValueError, match="block_size is 4"):
        evaluate_loss(model, encoded().in_order(5))
    assert model.training


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to measure the loss on"):
        evaluate_loss(make_model(), [])


def test_what_is_not_finite_is_no_number_in_json() -> None:
    assert LossSum().as_dict() == {"loss": None, "perplexity": None, "bits_per_character": None, "tokens": 0}
    diverged = LossSum(nll=2000.0, count=2)
    assert diverged.perplexity == math.inf
    assert diverged.as_dict()["perplexity"] is None
    assert diverged.as_dict()["loss"] == 1000


# -- texts --------------------------------------------------------------------------------------------------


BYTES = BpeTokenizer.train(["天是什么？天。大地很大"] * 3, 290)
NOVEL = "天是什么？天。地\n大地很大，水是水！" * 3


def bytes_model() -> GPTLMHeadModel:
    return make_model(vocab_size=BYTES.get_vocab_size())


@torch.inference_mode()
def written_out_text(model: GPTLMHeadModel, start: int, ids: list[int], window: int) -> float:
    """The slow twin: return the sum of -log p of each token, given the earlier tokens of its window."""
    every, total = [start, *ids], 0.0
    for place in range(1, len(every)):
        first = (place - 1) // window * window
        scores = model(torch.tensor([every[first:place]]))[0, -1]
        total -= float(scores.log_softmax(-1)[every[place]])
    return total


@pytest.mark.parametrize("window", [0, 5, 16])
@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_each_token_of_a_text_is_predicted_once(kind: str, window: int) -> None:
    model, tokenizer = (make_model(), TOKENIZER) if kind == "characters" else (bytes_model(), BYTES)
    ids = tokenizer.encode_text(NOVEL)
    assert tokenizer.eos_token_id is not None
    expected = written_out_text(model, tokenizer.eos_token_id, ids, window or 16)
    report = evaluate_text(model, tokenizer, NOVEL, window)
    assert report.loss.count == len(ids)
    assert report.loss.nll == pytest.approx(expected, rel=1e-12)  # double precision, in another order
    assert (report.characters, report.bytes) == (len(NOVEL), len(NOVEL.encode()))
    assert report.bits_per_byte == pytest.approx(expected / math.log(2) / len(NOVEL.encode()), rel=1e-12)
    assert report.bits_per_character == pytest.approx(expected / math.log(2) / len(NOVEL), rel=1e-12)
    pieces = evaluate_text(model, tokenizer, [NOVEL[:9], NOVEL[9:]], window)
    assert (pieces.characters, pieces.bytes) == (report.characters, report.bytes)


def test_bits_of_a_model_that_knows_nothing_depend_on_the_vocabulary_alone() -> None:
    for model, tokenizer in ((make_model(), TOKENIZER), (bytes_model(), BYTES)):
        model.transformer.ln_f.weight.data[:] = 0  # all scores are 0
        report = evaluate_text(model, tokenizer, NOVEL)
        bits = len(tokenizer.encode_text(NOVEL)) * math.log2(tokenizer.get_vocab_size())
        assert report.bits_per_byte == pytest.approx(bits / len(NOVEL.encode()), rel=1e-12)


@pytest.mark.parametrize(("text", "window", "message"), [("", 0, "the text is empty"), ("天", 17, "1 to 16")])
def test_texts_that_cannot_be_measured(text: str, window: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_text(make_model(), TOKENIZER, text, window)


# -- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "same", "f1"),
    [
        ("成都。", "成都。", True, 1.0),
        (" 成都。\n", "成都。", True, 1.0),
        ("成 都。", "成都。", False, 1.0),  # white space inside: no exact match, but no character is wrong
        ("成都", "成都。", False, 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("都成。", "成都。", False, 1.0),  # F1 knows no order
        ("人人人", "人", False, 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # a character counts as often as both have it
        ("人", "人人人", False, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("山", "水", False, 0.0),
        ("", "水", False, 0.0),
        ("水", "", False, 0.0),
        ("", "", True, 1.0),
        (" ", "\n", True, 1.0),
    ],
)
def test_scores_by_hand(ours: str, theirs: str, same: bool, f1: float) -> None:
    assert exact_match(ours, theirs) is same
    assert character_f1(ours, theirs) == pytest.approx(f1, rel=1e-15)


TEXT = st.text("甲乙丙 \n。", max_size=12)


@settings(deadline=None, derandomize=True)
@given(TEXT, TEXT)
def test_f1_is_a_symmetric_share_and_one_for_equal_texts(a: str, b: str) -> None:
    assert 0 <= character_f1(a, b) <= 1
    assert character_f1(a, b) == character_f1(b, a)
    assert character_f1(a, b[::-1]) == character_f1(a, b)
    if exact_match(a, b):
        assert character_f1(a, b) == 1


def test_a_question_with_several_answers_counts_once_and_the_best_of_them_counts() -> None:
    rows = [("问", "甲乙"), ("另", "丙"), ("问", "丁"), ("问", "甲乙")]
    references = by_question(conversation_of_pair(q, a, i, "") for i, (q, a) in enumerate(rows))
    assert references == {Asked((), "问"): ["甲乙", "丁"], Asked((), "另"): ["丙"]}
    right = list(references.values())
    assert score_answers(["丁", "丙"], right).as_dict() == {
        "exact_match": 1.0,
        "character_f1": 1.0,
        "count": 2,
    }
    half = score_answers(["甲丁", "无"], right)  # against 甲乙: 1/2; against 丁: 1 of 2 given, 1 of 1: 2/3
    assert half.exact_match == 0
    assert half.character_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_each_question_needs_one_answer() -> None:
    for answers, references in (([], []), (["a"], [["a"], ["b"]])):
        with pytest.raises(InputError, match=f"got {len(answers)} answers, {len(references)} questions"):
            score_answers(answers, references)


def test_rows_of_the_table() -> None:
    questions, answers = [f"问{i}" for i in range(10)], [f"答{i}" for i in range(10)]
    references = [["无", f"答{i} "] if i % 2 == 0 else [f"对{i}"] for i in range(10)]
    rows = answer_rows(questions, references, answers, 4)
    assert rows == [
        ("✓", "问0", "答0 ", "答0"),
        ("✓", "问2", "答2 ", "答2"),
        ("✗", "问5", "对5", "答5"),
        ("✗", "问7", "对7", "答7"),
    ]
    assert len(answer_rows(questions, references, answers, 99)) == 10
    assert answer_rows(questions, references, answers, 0) == []


# -- the command --------------------------------------------------------------------------------------------


Command = Callable[..., Result]


@pytest.fixture
def command(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Return a function that runs `python ./minigpt/commands/evaluate.py` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return partial(run_command, "eval")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    minigpt.save_pretrained(make_model().float(), tmp_path / "model", TOKENIZER)
    return tmp_path / "model"


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    lines = (json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_the_command_prints_what_the_modules_measure(command: Command, model_folder: Path) -> None:
    data = write(Path("val.jsonl"), [(p.question, p.answer) for p in PAIRS])
    result = command("--model", model_folder, "--data", data, "--json", "--show", 2, "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out.splitlines()[-1])
    model, tokenizer = minigpt.load_model(model_folder), minigpt.load_tokenizer(model_folder)
    expected = evaluate_loss(model, encoded().in_order(64))
    assert found["all"] == expected.all.as_dict()
    assert found["answer"] == expected.answer.as_dict()
    given_answers = [minigpt.generate(model, tokenizer, pair.question) for pair in PAIRS]
    scores = score_answers(given_answers, [[pair.answer] for pair in PAIRS])
    assert {key: found[key] for key in scores.as_dict()} == scores.as_dict()
    counts = ("pairs", "skipped", "cut", "too_long", "unknown_characters")
    assert [found[key] for key in counts] == [5, 0, 0, 0, 0]
    for text in (f"{expected.answer.loss:.4f}", f"{expected.all.bits_per_character:.3f}", "of 5 questions"):
        assert text in result.out
    assert sum("✗" in line or "✓" in line for line in result.out.splitlines()) == 2


def test_the_command_counts_what_was_cut_or_unknown(command: Command, model_folder: Path) -> None:
    pairs = [("天是什么？", "天" * 20), ("水" * 30, "水"), ("😀", "天"), ("水", "水"), ("水", "地")]
    data = write(Path("val.jsonl"), pairs)
    with data.open("a", encoding="utf-8") as file:
        file.write("nonsense\n")
    result = command("--model", model_folder, "--data", data, "--json", "--show", 0)
    assert result.code == 0
    found = json.loads(result.out.splitlines()[-1])
    counts = ("pairs", "count", "skipped", "cut", "too_long", "unknown_characters")
    assert [found[key] for key in counts] == [5, 4, 1, 2, 1, 1]
    assert "2 of 5 pairs were cut at 16 tokens" in result.out
    assert "too long for block_size=16, counted as not answered: 1 of" in result.out
    assert "with characters that are not in the vocabulary: 1 of" in result.out
    assert command("--model", model_folder, "--data", data, "--strict").code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "nowhere"],
            "nowhere does not exist: train a model first (`minigpt train`; or `make demo`",
        ),
        (["--data", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--max_length", "18"], "max_length=18 does not fit the model's block_size=16: at most 17"),
        (["--max_length", "2"], "no answer is left after cutting at max_length=2"),
        (["--batch_size", "0"], "batch_size must be from 1 to 1000000: got batch_size=0"),
        (["--show", "-1"], "show must be from 0 to 1000000: got show=-1"),
        (["--max_new_tokens", "0"], "max_new_tokens must be from 1 to 1000000000"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--precision", "float32", "float32"], "--precision names one twice"),
        (["--precision", "int3"], "--precision"),
        (["--text", "nothing.txt"], "text nothing.txt must be a file: not found"),
        (["--text", "."], "text . must be a file: it is a folder"),
        (["--modle", "x"], "unknown flag '--modle'; did you mean '--model'?"),
    ],
)
def test_the_command_refuses_in_one_line(
    command: Command, model_folder: Path, arguments: list[str], message: str
) -> None:
    data = write(Path("val.jsonl"), [(p.question, p.answer) for p in PAIRS])
    result = command("--model", model_folder, "--data", data, *arguments)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("evaluate.py: error: ")
    assert message in result.err


def test_the_command_measures_a_text(command: Command, model_folder: Path) -> None:
    Path("novel.txt").write_text(NOVEL + "😀", encoding="utf-8")
    result = command(
        "--model", model_folder, "--text", "novel.txt", "--json", "--precision", "float32", "int8"
    )
    assert (result.code, result.err) == (
        0,
        "warning: not in the vocabulary, read as <unk>: '\\n' '！' '😀'\n",
    )
    found = json.loads(result.out.splitlines()[-1])
    expected = evaluate_text(minigpt.load_model(model_folder), TOKENIZER, NOVEL + "😀")
    assert {key: found[key] for key in expected.as_dict()} == expected.as_dict()
    small = set_precision(minigpt.load_model(model_folder), "int8")
    assert found["precisions"]["int8"]["loss"] == evaluate_text(small, TOKENIZER, NOVEL + "😀").loss.loss
    for text in (f"{expected.bits_per_byte:.4f}", "what it costs", "int8"):
        assert text in result.out


def test_a_model_of_bytes_answers_no_questions(command: Command) -> None:
    minigpt.save_pretrained(bytes_model().float(), "bytes", BYTES)
    write(Path("val.jsonl"), [("天", "地")])
    Path("novel.txt").write_text(NOVEL, encoding="utf-8")
    refused = command("--model", "bytes", "--data", "val.jsonl")
    assert refused.code == 2
    assert "the model has no <sep> behind a question: measure it on a text (--text FILE)" in refused.err
    assert command("--model", "bytes", "--text", "novel.txt").code == 0


def test_rounding_costs_a_trained_model_little(command: Command, tmp_path: Path) -> None:
    """The promises of `minigpt eval --precision` hold on a part of the built-in corpus."""
    lines = (ROOT / "data" / "data.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    answers = {item["question"]: item["answer"] for item in map(json.loads, lines)}
    folder = learn_by_heart(answers, tmp_path / "learned", block_size=48)
    data = write(tmp_path / "val.jsonl", list(answers.items()))
    kinds = ("float32", "float16", "int8", "bfloat16", "int4")
    flags = ("--precision", *kinds, "--show", 0, "--max_new_tokens", 1, "--json")
    result = command("--model", folder, "--data", data, *flags)
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])["precisions"]
    assert found["float32"]["perplexity_change_percent"] == {"all": 0, "answers": 0}
    assert found["float32"]["answer"]["perplexity"] < 10  # of some 300 characters: it has learned something
    # int4's steps are 17 times those of int8, which costs a narrow model much
    for name, most in (("float16", 0.05), ("int8", 1.0), ("bfloat16", 1.0), ("int4", 30.0)):
        for part, change in found[name]["perplexity_change_percent"].items():
            assert change != 0  # it was rounded at all
            assert abs(change) < most, (name, part, change)
