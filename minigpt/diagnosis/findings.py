"""Finding: a code and its numbers. The texts of all codes are in findings.toml, in two languages.

    finding("overfitting", step=400, minimum=1.52, last=1.71, gap=0.19, train=0.4).text("zh")

A text is a template that the numbers fill. The checks, in other modules, decide what is found.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

__all__ = ["LEVELS", "WORDS", "Finding", "Language", "Words", "finding"]

Language = Literal["en", "zh"]
Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")  # severities, the worst first


class Words(NamedTuple):
    """The texts of a finding in both languages. The advice says what to try; "" means nothing."""

    level: Level
    en: str
    zh: str
    advice_en: str
    advice_zh: str


@dataclass(frozen=True)
class Finding:
    """A finding: a code of findings.toml, and the numbers for its templates."""

    code: str
    numbers: dict[str, Any]

    @property
    def level(self) -> Level:
        """The severity of the finding."""
        return WORDS[self.code].level

    def text(self, language: Language) -> str:
        """Return the text of the finding."""
        words = WORDS[self.code]
        return (words.zh if language == "zh" else words.en).format(**self.numbers)

    def advice(self, language: Language) -> str:
        """Return what to try; "" if there is nothing to do."""
        words = WORDS[self.code]
        return (words.advice_zh if language == "zh" else words.advice_en).format(**self.numbers)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, in both languages, for `--json`."""
        said = {
            f"{name}_{language}": getattr(self, name)(language)
            for name in ("text", "advice")
            for language in ("en", "zh")
        }
        return {"level": self.level, "code": self.code, "numbers": self.numbers, **said}


def finding(code: str, **numbers: Any) -> Finding:
    """Make a finding. The code must be in findings.toml (asserted, because all codes are minigpt's)."""
    assert code in WORDS, code
    return Finding(code, numbers)


def _read() -> dict[str, Words]:
    entries = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {
        code: Words(one["level"], one["en"], one["zh"], one.get("try_en", ""), one.get("try_zh", ""))
        for code, one in entries.items()
    }


WORDS = _read()
