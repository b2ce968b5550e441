"""Looks for a task's questions in training data, by comparing n-grams of words.

    found = contamination(task.examples, [Path("data/train.jsonl")])
    found.exact, found.near          # questions of the task (Example)

A question is "exact" if all of its n-grams are in the training data, and "near" if at least half of them are.
A Chinese character counts as a word. More questions need more memory; more training data do not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.data.field_names import is_head
from minigpt.data.file_formats import open_data
from minigpt.evaluation.task_shapes import Example
from minigpt.evaluation.text_metrics import words_of

__all__ = ["Contamination", "contamination"]

_WORDS = 10  # number of words in an n-gram
_LEAST = 5  # shorter questions (in words) are not searched: other texts may contain them by chance
_NEAR = 0.5


@dataclass(frozen=True)
class Contamination:
    """The questions of a task that are in training data."""

    count: int  # number of questions that are long enough for the search
    exact: list[Example] = field(repr=False)
    near: list[Example] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON: the counts, and the line numbers of the first 100 questions in `exact`."""
        lines = [one.line for one in self.exact]
        return {
            "count": self.count,
            "exact": len(self.exact),
            "near": len(self.near),
            "exact_lines": lines[:100],
        }


def contamination(
    examples: Sequence[Example], training: Sequence[Path], n: int = _WORDS, encoding: str = ""
) -> Contamination:
    """Find the questions of a task in training data.

    Args:
        training: files of any format that minigpt reads. All texts of one record are searched as one text.
        encoding: encoding of these files; "": detect it.

    Raises:
        InputError: if a file cannot be read.
    """
    owners: dict[tuple[str, ...], set[int]] = {}
    counts: dict[int, int] = {}
    sizes: set[int] = set()
    for number, one in enumerate(examples):
        grams = _grams(words_of(one.question or one.references[0]), n)
        if grams:
            counts[number] = len(grams)
            for gram in grams:
                owners.setdefault(gram, set()).add(number)
                sizes.add(len(gram))
    seen: set[tuple[str, ...]] = set()
    for path in training:
        for text in _texts(path, encoding):
            words = words_of(text)
            for size in sizes:
                for i in range(len(words) - size + 1):
                    gram = tuple(words[i : i + size])
                    if gram in owners:
                        seen.add(gram)
    hits = dict.fromkeys(counts, 0)
    for gram in seen:
        for number in owners[gram]:
            hits[number] += 1
    exact = [number for number, count in counts.items() if hits[number] == count]
    near = [number for number, count in counts.items() if _NEAR * count <= hits[number] < count]
    return Contamination(len(counts), [examples[i] for i in exact], [examples[i] for i in near])


def _grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    """Return the n-grams of a text.

    If the text has fewer than n words, the whole text is the only n-gram. If it has fewer than 5 words, the
    result is empty.
    """
    if len(words) < _LEAST:
        return set()
    size = min(n, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _texts(path: Path, encoding: str) -> Iterator[str]:
    for record in open_data(path, encoding, is_head).records:
        yield "\n".join(_strings(record.value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
