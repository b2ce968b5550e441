"""Compares a generated text with right answers: exact match, number, F1, ROUGE-L, BLEU, chrF.

    score = TEXT_METRICS["number"]
    score("... so she has 1,080.", ["... #### 1080"])        # 1.0

Each metric gets the generated text and all right answers, and returns the best score over these answers.
Chinese has no spaces between words, so a Chinese character counts as a word. BLEU and chrF need the package
sacrebleu.
"""

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from minigpt.errors import InputError
from minigpt.evaluation.answers import character_f1, exact_match

__all__ = [
    "CORPUS_METRICS",
    "TEXT_METRICS",
    "check_metric",
    "corpus_score",
    "number_of",
    "rouge_l",
    "word_f1",
    "words_of",
]

_NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
_ARTICLES = {"a", "an", "the"}


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation. A Chinese character is a word.

    >>> words_of("The GPT-2 模型！")
    ['the', 'gpt', '2', '模', '型']
    """
    return _WORD.findall(text.lower())


def word_f1(given: str, expected: str) -> float:
    """Return SQuAD's F1 of words: in lower case, without punctuation and articles.

    >>> word_f1("the cat sat", "A cat slept.")
    0.5
    """
    ours, theirs = (Counter(w for w in words_of(text) if w not in _ARTICLES) for text in (given, expected))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def rouge_l(given: str, expected: str) -> float:
    """Return ROUGE-L's F1, computed from the longest common subsequence of words.

    https://aclanthology.org/W04-1013 (section 3, with beta = 1).

    >>> rouge_l("police killed the gunman", "police kill the gunman")
    0.75
    """
    a, b = words_of(given), words_of(expected)
    if not a or not b:
        return 0.0
    longest = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, longest[j] = longest[j], before + 1 if word == other else max(longest[j], longest[j - 1])
    return 2 * longest[-1] / (len(a) + len(b))


def number_of(text: str) -> Fraction | None:
    """Return the number after "####"; without "####", the last number in the text; None if there is none.

    >>> [str(number_of(t)) for t in ("9 * 2 = 18\\n#### 1,080", "一共是 3/4 千米", "２５%", "none")]
    ['1080', '3/4', '1/4', 'None']
    """
    plain = unicodedata.normalize("NFKC", text)
    _, mark, last = plain.rpartition("####")
    found = _NUMBER.findall(last if mark else plain)
    if not found:
        return None
    digits = found[0 if mark else -1].replace(",", "").replace("−", "-")
    try:
        return Fraction(digits.rstrip("%")) / (100 if digits.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        return None


def _same_number(given: str, expected: str) -> float:
    right = number_of(expected)
    return float(right is not None and number_of(given) == right)


def _best(score: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    return lambda given, references: max(float(score(given, one)) for one in references)


TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": _best(exact_match),
    "number": _best(_same_number),
    "character_f1": _best(character_f1),
    "word_f1": _best(word_f1),
    "rouge_l": _best(rouge_l),
}
CORPUS_METRICS = ("bleu", "chrf")  # these are computed for all texts together, not as a mean over texts


def check_metric(name: str) -> None:
    """Raise InputError for an unknown metric of texts, or a metric whose package is not installed."""
    if name in CORPUS_METRICS and importlib.util.find_spec("sacrebleu") is None:
        raise InputError(f"the metric {name} needs sacrebleu: pip install 'minigpt[evaluate]'")
    if name not in (*TEXT_METRICS, *CORPUS_METRICS):
        known = ", ".join([*TEXT_METRICS, *CORPUS_METRICS])
        raise InputError(f"no metric {name!r} for generated texts; known are {known}")


def corpus_score(name: str, given: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return BLEU or chrF of all texts together, computed by sacrebleu.

    If a right answer has Chinese characters, BLEU counts each Chinese character as a word.

    Returns: a dict with "value"; for several texts also "low" and "high", the 95 % interval.

    Raises:
        InputError: if sacrebleu is not installed.
    """
    check_metric(name)
    from sacrebleu.metrics import BLEU, CHRF

    most = max(map(len, references))
    # sacrebleu needs the same number of right answers for each text, so shorter lists are filled with None.
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    chinese = any("\u3400" <= c <= "\u9fff" for row in references for text in row for c in text)
    metric: Any = BLEU(tokenize="zh" if chinese else "13a") if name == "bleu" else CHRF()
    # sacrebleu's chrF function usually returns a NumPy number, but a Python float if nothing matches.
    # sacrebleu then fails to average the two types. So the function is wrapped to always return a float.
    if name == "chrf":
        compute = metric._compute_f_score
        metric._compute_f_score = lambda statistics: float(compute(statistics))
    score = metric.corpus_score(list(given), columns, n_bootstrap=1000 if len(given) > 1 else 1)
    found = {"value": float(score.score)}
    if len(given) > 1:
        # `_mean` is the mean over sacrebleu's bootstrap samples, `_ci` half of the interval's width.
        found |= {"low": float(score._mean - score._ci), "high": float(score._mean + score._ci)}
    return found
