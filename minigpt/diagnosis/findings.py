"""What can be found (findings.toml), and `Finding`: a code with the numbers that it rests on.

    finding("overfitting", step=400, minimum=1.52, last=1.71, gap=0.19, train=0.4).text("zh")

A text is a template in two languages; the numbers fill it. Whether something is found is decided elsewhere.
"""

import dataclasses
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

__all__ = ["LEVELS", "WORDS", "Finding", "Language", "Words", "finding", "without_consequences"]

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
    explains: frozenset[str]  # codes of its consequences
    rank: int  # in the order of causes


@dataclass(frozen=True)
class Finding:
    """A code of findings.toml and the numbers that fill its templates.

    The advice may hold commands: `before` as they stand, then the run's own `minigpt train` with `flags`.
    """

    code: str
    numbers: dict[str, Any]
    flags: dict[str, Any] | None = None
    before: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()  # all of them, made of the two above

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

    def trying(self, *before: str, **flags: Any) -> "Finding":
        """The same with commands to try; without flags there is no `minigpt train` behind them."""
        return dataclasses.replace(self, before=before, flags=flags or None)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: everything, in both languages."""
        said = {
            f"{name}_{language}": getattr(self, name)(language)
            for name in ("text", "advice")
            for language in ("en", "zh")
        }
        known = {"level": self.level, "code": self.code, "numbers": self.numbers}
        return {**known, **said, "commands": list(self.commands)}


def finding(code: str, **numbers: Any) -> Finding:
    """A finding whose code exists (an assertion: codes are ours)."""
    assert code in WORDS, code
    return Finding(code, numbers)


def without_consequences(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that no other one explains, the worst first, of equally bad ones the cause first."""
    left: list[Finding] = []
    for one in sorted(findings, key=lambda one: WORDS[one.code].rank):
        if not any(one.code in WORDS[cause.code].explains for cause in left):
            left.append(one)
    return sorted(left, key=lambda one: LEVELS.index(one.level))


def _read() -> dict[str, Words]:
    entries = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    groups = entries.pop("groups")
    return {
        code: Words(
            one["level"],
            one["en"],
            one["zh"],
            one.get("try_en", ""),
            one.get("try_zh", ""),
            frozenset(each for name in one.get("explains", ()) for each in groups.get(name, (name,)))
            - {code},
            rank,
        )
        for rank, (code, one) in enumerate(entries.items())
    }


WORDS = _read()
