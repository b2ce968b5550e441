"""Intervals cover the true values, tests are exact, and metrics equal independent implementations."""

import importlib.util
import math
import random
import re
from collections import Counter

import numpy as np
import pytest

from minigpt.errors import InputError
from minigpt.evaluation.intervals import bootstrap, mcnemar, paired
from minigpt.evaluation.task_results import macro_f1
from minigpt.evaluation.text_metrics import TEXT_METRICS, corpus_score, number_of, rouge_l, word_f1


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed: no oracle"
    )


# -- intervals ---------------------------------------------------------------------------------------------


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    truth, inside, total = 0.62, 0, 2000
    for number in range(total):
        low, high = bootstrap(generator.random(200) < truth, samples=400, seed=number)
        inside += low <= truth <= high
    assert 0.93 <= inside / total <= 0.97


def test_intervals_of_a_ratio_contain_the_truth() -> None:
    generator = np.random.default_rng(4)
    inside, total = 0, 1000
    for number in range(total):
        tokens = generator.integers(5, 30, 150)
        nll = generator.normal(2.0, 0.5, 150) * tokens
        low, high = bootstrap(nll, tokens, samples=300, seed=number, transform=np.exp)
        inside += low <= math.exp(2.0) <= high
    assert 0.925 <= inside / total <= 0.975


def test_all_right_leaves_room_for_doubt() -> None:
    low, high = bootstrap(np.ones(30))
    assert high == 1
    assert low**30 == pytest.approx(0.025)  # 30 right in a row are as unlikely as that at this share
    assert bootstrap(np.zeros(30)) == pytest.approx((0, 1 - low))


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert bootstrap(values) == bootstrap(values)


def test_no_question_is_refused() -> None:
    with pytest.raises(InputError, match="no question"):
        bootstrap([])


@needs("scipy")
def test_mcnemar_is_the_exact_test() -> None:
    from scipy.stats import binomtest

    generator = random.Random(1)
    for _ in range(1000):
        n = generator.choice([3, 20, 200, 1500])
        a = generator.randint(0, n)
        b = n - a
        expected = binomtest(a, a + b, 0.5).pvalue if n else 1.0
        assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_equal_models_are_seldom_called_different() -> None:
    """For two samples of one model, an exact test calls fewer than 5 % of 200 pairs different."""
    generator = np.random.default_rng(5)
    share = generator.beta(2, 1.5, 300)  # how often the model gets each question right
    called = sum(
        paired(generator.random(300) < share, generator.random(300) < share).is_clear for _ in range(200)
    )
    assert called <= 12


def test_ten_points_on_five_hundred_questions_are_found() -> None:
    """The models agree on most questions, like two versions of one model: 70 % and 80 % are right."""
    generator, found = np.random.default_rng(6), 0
    for _ in range(100):
        hard = generator.random(500)
        first = hard + generator.normal(0, 0.15, 500) < 0.7
        second = hard + generator.normal(0, 0.15, 500) < 0.8
        found += paired(first, second).is_clear
    assert found >= 99


def test_scores_between_right_and_wrong_are_compared_by_signs() -> None:
    generator = np.random.default_rng(7)
    base = generator.random(80)
    same = [paired(base, base + generator.normal(0, 0.1, 80), seed=i).is_clear for i in range(60)]
    assert sum(same) <= 8  # 3 are expected; more than 8 of 60 come once in 200
    assert paired(base, base + 0.1 + generator.normal(0, 0.1, 80)).is_clear
    nothing = paired(base, base)
    assert (nothing.value, nothing.low, nothing.high, nothing.p) == (0, 0, 0, 1)


# -- metrics of texts --------------------------------------------------------------------------------------


def cases(letters: str, count: int = 1000) -> list[tuple[str, str]]:
    generator = random.Random(8)
    words = ["".join(generator.choices(letters, k=generator.randint(1, 3))) for _ in range(12)]

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(1, 14))) + generator.choice(
            ["", ".", "!"]
        )

    return [(text(), text()) for _ in range(count)]


@needs("rouge_score")
def test_rouge_l_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for given, expected in cases("abXY1"):
        assert rouge_l(given, expected) == pytest.approx(scorer.score(expected, given)["rougeL"].fmeasure)


def test_word_f1_is_that_of_squad() -> None:
    def slow(given: str, expected: str) -> float:  # written from the paper's definition, word by word
        def plain(text: str) -> list[str]:
            kept = re.sub(r"[^a-z0-9 ]", " ", text.lower()).split()
            return [word for word in kept if word not in ("a", "an", "the")]

        a, b = plain(given), plain(expected)
        if not a or not b:
            return float(a == b)
        left, shared = list(b), 0
        for word in a:
            if word in left:
                left.remove(word)
                shared += 1
        precision, recall = shared / len(a), shared / len(b)
        return 2 * precision * recall / (precision + recall) if shared else 0.0

    for given, expected in cases("athe "):
        assert word_f1(given, expected) == pytest.approx(slow(given, expected))


@needs("sklearn")
def test_character_f1_is_that_of_counted_labels() -> None:
    from sklearn.metrics import f1_score

    for given, expected in cases("abc", 1000):
        a, b = Counter("".join(given.split())), Counter("".join(expected.split()))
        truth: list[int] = []
        said: list[int] = []
        for letter in a | b:  # each character of either text is one decision: is it in the other, too?
            both = min(a[letter], b[letter])
            truth += [1] * b[letter] + [0] * (a[letter] - both)
            said += [1] * both + [0] * (b[letter] - both) + [1] * (a[letter] - both)
        assert TEXT_METRICS["character_f1"](given, [expected]) == pytest.approx(f1_score(truth, said))


@needs("sklearn")
def test_macro_f1_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    generator = np.random.default_rng(9)
    for _ in range(1000):
        truth, given = generator.integers(0, 4, (2, 12))
        assert macro_f1(truth, given) == pytest.approx(f1_score(truth, given, average="macro"))


@needs("sacrebleu")
@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_are_those_of_sacrebleu(name: str) -> None:
    import sacrebleu

    pairs = cases("abcd", 60)
    given, expected = [a for a, _ in pairs], [b for _, b in pairs]
    found = corpus_score(name, given, [[one] for one in expected])
    function = sacrebleu.corpus_bleu if name == "bleu" else sacrebleu.corpus_chrf
    assert found["value"] == pytest.approx(function(given, [expected]).score)
    assert found["low"] <= found["value"] <= found["high"]
    chinese = corpus_score(name, ["今天天气很好"], [["今天天气不好", "天气很好"]])
    assert 0 < chinese["value"] < 100


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is not None, reason="sacrebleu is installed")
def test_without_sacrebleu_it_says_what_to_install() -> None:
    with pytest.raises(InputError, match=r"pip install 'minigpt\[evaluate\]'"):
        corpus_score("bleu", ["a"], [["a"]])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,080", "1080"),
        ("so 5 - 3 = 2.", "2"),
        ("-7", "-7"),
        ("９/9", "1"),
        ("25%", "1/4"),
        ("$3.50 each", "7/2"),
        ("#### 18\nQuestion: 5", "18"),
        ("1/0", "None"),
        ("没有", "None"),
        ("", "None"),
    ],
)
def test_numbers(text: str, number: str) -> None:
    assert str(number_of(text)) == number


def test_the_best_of_several_answers_counts() -> None:
    assert TEXT_METRICS["exact_match"]("b ", ["a", "b"]) == 1
    assert TEXT_METRICS["number"]("12", ["没有", "#### 12"]) == 1
    assert TEXT_METRICS["rouge_l"]("", ["a"]) == 0
