"""Defines `Finding`: what a check found, usually a problem, with its numbers. findings.toml has the texts.

    finding("overfitting", step=400, minimum=1.52, last=1.71, gap=0.19, train=0.4).text("zh")

The text of a finding is a template in two languages, such as "rose from {minimum} to {last}". The numbers
fill the template. The checks are in other modules.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minigpt.console.language import Language
from minigpt.storage.json_files import read_toml

__all__ = ["LEVELS", "WORDS", "Finding", "Language", "Words", "finding", "without_consequences"]

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")  # the worst first


class Words(NamedTuple):
    """The texts of a finding in both languages. The advice may be empty."""

    level: Level
    en: str
    zh: str
    advice_en: str
    advice_zh: str
    explains: frozenset[str]  # codes of findings that are consequences of this finding
    rank: int  # position in findings.toml, where causes come before consequences


@dataclass(frozen=True)
class Finding:
    """What a check found, usually a problem: a code of findings.toml, and numbers for its templates.

    The advice may have commands: first the commands in `before`, then the run's own command with `flags`
    changed.
    """

    code: str
    numbers: dict[str, Any]
    flags: dict[str, Any] | None = None
    before: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()  # the commands to show to the user, made from `before` and `flags`

    @property
    def level(self) -> Level:
        """The severity: "error", "warning", "note" or "ok"."""
        return WORDS[self.code].level

    def text(self, language: Language) -> str:
        """Return the finding as a sentence."""
        words = WORDS[self.code]
        return (words.zh if language == "zh" else words.en).format(**self.numbers)

    def advice(self, language: Language) -> str:
        """Return the advice; empty if there is nothing to do."""
        words = WORDS[self.code]
        return (words.advice_zh if language == "zh" else words.advice_en).format(**self.numbers)

    def trying(self, *before: str, **flags: Any) -> "Finding":
        """Return a copy of the finding with commands to try.

        The first commands are those in `before`. If there are `flags`, the run's own command with these flags
        follows.
        """
        return dataclasses.replace(self, before=before, flags=flags or None)

    def as_dict(self) -> dict[str, Any]:
        """Return the whole finding, in both languages, for `--json`."""
        said = {
            f"{name}_{language}": getattr(self, name)(language)
            for name in ("text", "advice")
            for language in ("en", "zh")
        }
        known = {"level": self.level, "code": self.code, "numbers": self.numbers}
        return {**known, **said, "commands": list(self.commands)}


def finding(code: str, **numbers: Any) -> Finding:
    """Make a finding. The code must exist in findings.toml."""
    assert code in WORDS, code
    return Finding(code, numbers)


def without_consequences(findings: Iterable[Finding]) -> list[Finding]:
    """Remove findings that are consequences of other findings. Sort the rest: the worst first.

    Findings of the same level are in the order of findings.toml.
    """
    left: list[Finding] = []
    for one in sorted(findings, key=lambda one: WORDS[one.code].rank):
        if not any(one.code in WORDS[cause.code].explains for cause in left):
            left.append(one)
    return sorted(left, key=lambda one: LEVELS.index(one.level))


def _read() -> dict[str, Words]:
    entries = read_toml(Path(__file__).with_suffix(".toml"))
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
