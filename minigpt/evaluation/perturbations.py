"""Changes questions a little without changing their meaning, to see how robust a model's answers are.

    PERTURBATIONS["doubled characters"]("四川的省会是哪里？", random.Random(0))

PERTURBATIONS is a dict of functions. Each takes a text and a generator of random numbers, and returns the
changed text.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Sequence

__all__ = ["PERTURBATIONS", "wordings"]

_SHARE = 0.06  # share of the characters that are changed; at least one is changed
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}
_NARROW = dict(zip(map(ord, "，。？！：；（）、"), ",.?!:;(),"))
# Groups of Chinese characters that sound alike. They are often confused in typing.
_HOMOPHONES = [
    *("的地得", "在再", "做作", "他她它", "以已", "是事世市", "又有右", "像象", "座坐", "到道", "时实食"),
    *("心新", "知之只", "和合河", "中种", "人任", "工公功", "书树", "明名", "生升声", "长常"),
    *("里理力", "手首", "气器", "成城程", "花话", "行形", "员原园", "语雨与"),
]  # fmt: skip
_SOUND = {c: [o for o in group if o != c] for group in _HOMOPHONES for c in group}


def _places(text: str, wanted: Callable[[str], bool], generator: random.Random) -> set[int]:
    places = [i for i, character in enumerate(text) if wanted(character)]
    return set(generator.sample(places, min(len(places), max(1, round(_SHARE * len(text))))))


def _full_width(text: str, generator: random.Random) -> str:
    return text.translate(_WIDE)


def _half_width(text: str, generator: random.Random) -> str:
    return unicodedata.normalize("NFKC", text).translate(_NARROW)


def _no_punctuation(text: str, generator: random.Random) -> str:
    return re.sub(
        r"\s{2,}", " ", "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    ).strip()


def _case(text: str, generator: random.Random) -> str:
    return text.lower() if text.lower() != text else text.upper()


def _dropped(text: str, generator: random.Random) -> str:
    gone = _places(text, str.isalnum, generator)
    return "".join(c for i, c in enumerate(text) if i not in gone)


def _doubled(text: str, generator: random.Random) -> str:
    twice = _places(text, str.isalnum, generator)
    return "".join(c * 2 if i in twice else c for i, c in enumerate(text))


def _typing(text: str, generator: random.Random) -> str:
    """Make typing errors: replace a letter by a neighbour on the keyboard; swap two Chinese characters."""
    letters = [*text]
    for i in sorted(_places(text, str.isalpha, generator)):
        row = next((row for row in _KEYS if letters[i].lower() in row), "")
        if row:
            place = row.index(letters[i].lower())
            near = row[place - 1 : place] + row[place + 1 : place + 2]
            letter = generator.choice(near)
            letters[i] = letter.upper() if letters[i].isupper() else letter
        elif i + 1 < len(letters) and letters[i + 1].isalpha():
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def _homophones(text: str, generator: random.Random) -> str:
    places = _places(text, _SOUND.__contains__, generator)
    return "".join(generator.choice(_SOUND[c]) if i in places else c for i, c in enumerate(text))


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "full width": _full_width,
    "half width": _half_width,
    "no punctuation": _no_punctuation,
    "case": _case,
    "typing errors": _typing,
    "dropped characters": _dropped,
    "doubled characters": _doubled,
    "homophones": _homophones,
}

# Form of a task -> (three wordings of the same instruction in English, three in Chinese).
_WORDINGS = {
    "multiple_choice": (
        (
            "Choose the correct answer to each question.",
            "Below are questions with several choices. Pick the right one.",
            "For every question, one of the choices is correct: say which.",
        ),
        (
            "请为每道题选出正确的答案。",
            "下面是几道选择题，请挑出对的那一项。",
            "每道题的选项里只有一个是对的，请指出是哪一个。",
        ),
    ),
    "generation": (
        (
            "Answer each question.",
            "Below are questions. Give the answer to each of them.",
            "Please reply to the questions that follow.",
        ),
        ("请回答每个问题。", "下面有一些问题，请给出答案。", "请看问题，然后作答。"),
    ),
}


def wordings(form: str, questions: Sequence[str]) -> tuple[str, ...]:
    """Return one instruction in several wordings, in the language of most questions.

    If `form` has no instruction in this module, return ().

    >>> wordings("generation", ["四川的省会是哪里？"])[0]
    '请回答每个问题。'
    """
    chinese = sum(any("\u3400" <= character <= "\u9fff" for character in text) for text in questions)
    return _WORDINGS[form][2 * chinese > len(questions)] if form in _WORDINGS else ()
