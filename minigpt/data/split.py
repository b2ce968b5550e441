"""Splitting pairs into a side to learn from and a side to measure on, so that no question stands on both.

Questions that differ only in width, case or spaces are one question, and all its pairs go to one side. The
second and later pairs with the same question and the same answer are dropped. The rest is decided by the seed
and the questions alone: neither the order of the lines nor Python's hashes matter.
"""

import hashlib
import json
import math
import os
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from minigpt.data.reader import Pair, ReadReport
from minigpt.errors import InputError
from minigpt.storage.files import atomic_open

__all__ = ["NORMALISATION", "Split", "normalise", "split_pairs", "write_split"]

NORMALISATION = 1  # raise it with every change of `normalise`: old splits cannot be repeated then

# nothing to see: spaces of all kinds, soft hyphens, joiners, direction marks, variation selectors
_INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]+")
_WINDOW = 400  # groups around the cut among which the exact ratio is sought


def normalise(question: str) -> str:
    """What makes two questions the same one: NFKC (full and half width), case folded, without spaces.

    >>> normalise("ＧＰＴ　是什么？") == normalise("gpt是什么?")
    True
    """
    folded = unicodedata.normalize("NFKC", question).casefold()
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", folded))


@dataclass(frozen=True)
class Split:
    """The two sides, each in the order of the file, and what was found on the way."""

    train: list[Pair]
    val: list[Pair]
    questions: int  # different ones
    grouped: list[list[Pair]]  # pairs of each question that has several answers
    dropped: list[tuple[Pair, Pair]]  # a pair that repeats an earlier one, and that one

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and the manifest."""
        pairs = len(self.train) + len(self.val)
        return {
            "train": len(self.train),
            "val": len(self.val),
            "train_share": len(self.train) / pairs,
            "questions": self.questions,
            "questions_with_several_answers": len(self.grouped),
            "pairs_of_these": sum(map(len, self.grouped)),
            "dropped_duplicates": len(self.dropped),
        }


def split_pairs(pairs: Sequence[Pair], train_ratio: float, seed: int = 42) -> Split:
    """Divide pairs into train and val.

    Args:
        pairs: as read.
        train_ratio: the share of pairs (duplicates not counted) for train, met as closely as whole groups
            allow: exactly closest for up to 400 questions, and to the pair in any usual file beyond.
        seed: decides which questions go where.

    Raises:
        InputError: for a ratio that is not between 0 and 1, or that leaves a side empty.
    """
    if not 0 < train_ratio < 1:  # NaN is refused, too
        raise InputError(f"--train_ratio must lie between 0 and 1, both excluded: got {train_ratio}")
    groups: dict[str, dict[str, Pair]] = {}  # question -> answer -> pair
    dropped = []
    for pair in pairs:
        answers = groups.setdefault(normalise(pair.question), {})
        first = answers.setdefault(pair.answer, pair)
        if first is not pair:
            dropped.append((pair, first))
    order = sorted(groups, key=lambda question: _rank(question, seed))
    sides = _choose([len(groups[question]) for question in order], train_ratio)
    in_train = {question for question, chosen in zip(order, sides) if chosen}
    train: list[Pair] = []
    val: list[Pair] = []
    for question, answers in groups.items():
        (train if question in in_train else val).extend(answers.values())
    if not train or not val:
        empty = "val" if train else "train"
        raise InputError(
            f"--train_ratio {train_ratio} of {len(pairs) - len(dropped)} pairs with {len(groups)} different "
            f"questions leaves {empty}.jsonl empty; choose another ratio or add questions"
        )
    return Split(
        train=sorted(train, key=lambda pair: pair.line),
        val=sorted(val, key=lambda pair: pair.line),
        questions=len(groups),
        grouped=[list(answers.values()) for answers in groups.values() if len(answers) > 1],
        dropped=dropped,
    )


def _rank(question: str, seed: int) -> bytes:
    """A random-looking place in the order that depends on nothing else: Python's hash() changes every run."""
    return hashlib.sha256(f"{seed}\n{question}".encode("utf-8", "surrogatepass")).digest()


def _choose(sizes: Sequence[int], ratio: float) -> list[bool]:
    """Which groups, given by their sizes in random order, go to train: those before the cut, roughly.

    A group is whole, so the cut rarely falls on the target. Among the groups around it, the subset whose sum
    comes closest is found exactly: bit s of reachable[i] says that some of the groups from i on sum to s.
    """
    target = ratio * sum(sizes)
    cut = bisect_left(list(accumulate(sizes)), target)
    start = max(0, min(cut - _WINDOW // 2, len(sizes) - _WINDOW))
    window = sizes[start : start + _WINDOW]
    before = sum(sizes[:start])

    reachable = [1]
    for size in reversed(window):
        reachable.append(reachable[-1] | reachable[-1] << size)
    reachable.reverse()
    total = sum(sizes)
    left = _nearest(reachable[0], target - before, {0 - before, total - before})

    chosen = [True] * start
    for size, later in zip(window, reachable[1:]):
        takes = size <= left and bool(later >> (left - size) & 1)  # as long as the rest can still make it
        chosen.append(takes)
        left -= size * takes
    return chosen + [False] * (len(sizes) - len(chosen))


def _nearest(sums: int, target: float, empty: Iterable[int]) -> int:
    """The set bit nearest to target; in a tie, one that leaves no side empty, then the larger."""
    bits = f"{sums:b}"[::-1]
    middle = max(0, min(math.floor(target), len(bits) - 1))
    below, above = bits.rfind("1", 0, middle + 1), bits.find("1", middle + 1)
    candidates = [found for found in (below, above) if found >= 0]
    return min(candidates, key=lambda found: (abs(found - target), found in empty, -found))


def write_split(
    split: Split, report: ReadReport, directory: Path, *, train_ratio: float, seed: int
) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and split.json; all are on the disk before the first is put in place.

    Lines are the input's, byte for byte, each ended by LF.

    Returns: the content of split.json.

    Raises:
        InputError: if one of them cannot be written, or is the input itself; nothing has changed then.
    """
    paths = {name: directory / name for name in ("train.jsonl", "val.jsonl", "split.json")}
    for path in paths.values():
        if path.exists() and path.samefile(report.path):
            raise InputError(f"{path} is the input and would be overwritten; choose another --output_dir")
    contents = {
        "train.jsonl": "".join(f"{pair.raw}\n" for pair in split.train).encode(),
        "val.jsonl": "".join(f"{pair.raw}\n" for pair in split.val).encode(),
    }
    manifest = {
        "format": 1,
        "input": {"name": report.path.name, "sha256": report.sha256, **report.as_dict()},
        "seed": seed,
        "train_ratio": train_ratio,
        "normalisation": {"version": NORMALISATION, "unicode": unicodedata.unidata_version},
        "result": split.as_dict(),
        "files": {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }
    contents["split.json"] = (json.dumps(manifest, ensure_ascii=False, indent=2) + "\n").encode()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(atomic_open(paths[name]))
            for name in reversed(paths)  # left in the opposite order: split.json is put in place last
        }
        for name, file in files.items():
            file.write(contents[name])
            file.flush()
            os.fsync(file.fileno())  # the disk is full here, or not at all
    return manifest
