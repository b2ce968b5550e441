"""What can be found (findings.toml), and `Finding`: a code with the numbers that it rests on.

    finding("overfitting", step=400, minimum=1.52, last=1.71, gap=0.19, train=0.4).text("zh")

A text is a template in two languages; the numbers fill it. Whether something is found is decided elsewhere.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

__all__ = ["LEVELS", "WORDS", "Finding", "Language", "Words", "finding"]

Language = Literal["en", "zh"]
Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")  # the worst first


class Words(NamedTuple):
    """The texts of a finding in both languages. Each advice says what to try; an empty one means nothing."""

    level: Level
    en: str
    zh: str
    advice_en: str
    advice_zh: str


@dataclass(frozen=True)
class Finding:
    """A code of findings.toml and the numbers that fill its templates."""

    code: str
    numbers: dict[str, Any]

    @property
    def level(self) -> Level:
        """How bad it is."""
        return WORDS[self.code].level

    def text(self, language: Language) -> str:
        """What was found."""
        words = WORDS[self.code]
        return (words.zh if language == "zh" else words.en).format(**self.numbers)

    def advice(self, language: Language) -> str:
        """What to try; empty where there is nothing to do."""
        words = WORDS[self.code]
        return (words.advice_zh if language == "zh" else words.advice_en).format(**self.numbers)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: everything, in both languages."""
        said = {
            f"{name}_{language}": getattr(self, name)(language)
            for name in ("text", "advice")
            for language in ("en", "zh")
        }
        return {"level": self.level, "code": self.code, "numbers": self.numbers, **said}


def finding(code: str, **numbers: Any) -> Finding:
    """A finding whose code exists (an assertion: codes are ours)."""
    assert code in WORDS, code
    return Finding(code, numbers)


def _read() -> dict[str, Words]:
    entries = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {
        code: Words(one["level"], one["en"], one["zh"], one.get("try_en", ""), one.get("try_zh", ""))
        for code, one in entries.items()
    }


WORDS = _read()
