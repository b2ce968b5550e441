"""Splitting conversations into a side to learn from and a side to measure on, so that nothing stands on both.

Questions that differ only in width, case or spaces are one question, and all its pairs go to one side. The
second and later pairs with the same question and the same answer are dropped. The seed, the ratio and what
was said decide the rest: neither the order of the lines nor Python's hashes matter.

Conversations of several questions go together where they share a question and its answer. An exchange that
very many share, a greeting say, would join them all: the rarest exchanges join first, and none joins more
than the smaller side can hold. What then still stands on both sides is counted (`Split.on_both_sides`).
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

from minigpt.data.conversation import Conversation, Exchange
from minigpt.data.reader import ReadReport
from minigpt.errors import InputError
from minigpt.storage.files import atomic_open

__all__ = ["NORMALISATION", "Split", "normalise", "split_conversations", "write_split"]

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

    train: list[Conversation]
    val: list[Conversation]
    questions: int  # different ones, of conversations of one question
    grouped: list[list[Conversation]]  # those of each question that has several answers
    dropped: list[tuple[Conversation, Conversation]]  # one that repeats an earlier one, and that one
    on_both_sides: list[tuple[Exchange, int]]  # exchanges, and in how many conversations of val they stand

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and the manifest."""
        total = len(self.train) + len(self.val)
        answers = [sum(len(each.exchanges) for each in side) for side in (self.train, self.val)]
        return {
            "train": len(self.train),
            "val": len(self.val),
            "train_share": len(self.train) / total,
            "train_answers": answers[0],
            "val_answers": answers[1],
            "questions": self.questions,
            "questions_with_several_answers": len(self.grouped),
            "pairs_of_these": sum(map(len, self.grouped)),
            "dropped_duplicates": len(self.dropped),
            "exchanges_on_both_sides": len(self.on_both_sides),
        }


def split_conversations(conversations: Sequence[Conversation], train_ratio: float, seed: int = 42) -> Split:
    """Divide conversations into train and val.

    Args:
        conversations: as read.
        train_ratio: the share of conversations (duplicates not counted) for train, met as closely as whole
            groups allow: exactly closest for up to 400 groups, beyond that to the conversation in any usual
            file.
        seed: decides which groups go where.

    Raises:
        InputError: for a ratio that is not between 0 and 1, or that leaves a side empty.
    """
    if not 0 < train_ratio < 1:  # NaN is refused, too
        raise InputError(f"--train_ratio must lie between 0 and 1, both excluded: got {train_ratio}")
    kept: dict[tuple[Exchange, ...], Conversation] = {}
    dropped = []
    for conversation in conversations:
        first = kept.setdefault(_identity(conversation), conversation)
        if first is not conversation:
            dropped.append((conversation, first))
    groups: dict[str, list[Conversation]] = {}  # `_name` -> one conversation, or all pairs of a question
    for conversation in kept.values():
        groups.setdefault(_name(conversation), []).append(conversation)
    joined = _joined(groups, min(train_ratio, 1 - train_ratio) * len(kept))
    order = sorted(joined, key=lambda name: _rank(name, seed))
    sides = _choose([len(joined[name]) for name in order], train_ratio)
    learned = {name for name, is_train in zip(order, sides) if is_train}
    in_train = {id(each) for name in learned for each in joined[name]}
    train = [each for each in kept.values() if id(each) in in_train]
    val = [each for each in kept.values() if id(each) not in in_train]
    questions = [name for name, group in groups.items() if len(group[0].exchanges) == 1]
    if not train or not val:
        empty = "val" if train else "train"
        raise InputError(
            f"--train_ratio {train_ratio} of {len(kept)} pairs with {len(joined)} different "
            f"questions leaves {empty}.jsonl empty; choose another ratio or add questions"
        )
    return Split(
        train=train,
        val=val,
        questions=len(questions),
        grouped=[groups[name] for name in questions if len(groups[name]) > 1],
        dropped=dropped,
        on_both_sides=_on_both_sides(train, val),
    )


def exchange_key(exchange: Exchange) -> Exchange:
    """A key that is equal for equal exchanges: the question is normalised, the answer stays as it is."""
    return Exchange(normalise(exchange.question), exchange.answer)


def _identity(conversation: Conversation) -> tuple[Exchange, ...]:
    return tuple(map(exchange_key, conversation.exchanges))


def _name(conversation: Conversation) -> str:
    """A name for what stays together: the question of a pair; of several questions the whole text."""
    identity = _identity(conversation)
    if len(identity) == 1:
        return identity[0].question
    return "\n".join(part for exchange in identity for part in exchange)


def _joined(groups: dict[str, list[Conversation]], most: float) -> dict[str, list[Conversation]]:
    """Groups that share an exchange become one, named by its first; the rarest exchanges join first.

    Args:
        most: conversations of a group that was joined, at most.
    """
    holders: dict[Exchange, set[str]] = {}
    for name, group in groups.items():
        for conversation in group:
            for exchange in _identity(conversation):
                holders.setdefault(exchange, set()).add(name)
    leader = {name: name for name in groups}
    size = {name: len(group) for name, group in groups.items()}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    shared = [(len(names), exchange) for exchange, names in holders.items() if len(names) > 1]
    for _, exchange in sorted(shared):
        tops = sorted({find(name) for name in holders[exchange]})
        if sum(size[top] for top in tops) <= most:
            for top in tops[1:]:
                leader[top] = tops[0]
                size[tops[0]] += size[top]
    result: dict[str, list[Conversation]] = {}
    for name, group in groups.items():
        result.setdefault(find(name), []).extend(group)
    return result


def _on_both_sides(train: list[Conversation], val: list[Conversation]) -> list[tuple[Exchange, int]]:
    learned = {exchange_key(exchange) for each in train for exchange in each.exchanges}
    found: dict[Exchange, int] = {}
    for each in val:
        for exchange in set(map(exchange_key, each.exchanges)) & learned:
            found[exchange] = found.get(exchange, 0) + 1
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))


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

    Lines of JSON are the input's, character for character. Records of other formats, and those whose fields a
    user named, become lines of JSON with the usual names.

    Returns: the content of split.json.

    Raises:
        InputError: if one of them cannot be written, or is the input itself; nothing has changed then.
    """
    paths = {name: directory / name for name in ("train.jsonl", "val.jsonl", "split.json")}
    for path in paths.values():
        if path.exists() and path.samefile(report.path):
            raise InputError(f"{path} is the input and would be overwritten; choose another --output_dir")
    contents = {
        "train.jsonl": "".join(f"{_raw(each)}\n" for each in split.train).encode(),
        "val.jsonl": "".join(f"{_raw(each)}\n" for each in split.val).encode(),
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


def _raw(conversation: Conversation) -> str:
    if conversation.raw:
        return conversation.raw
    if [turn.role for turn in conversation.turns] == ["user", "assistant"] and not conversation.tools:
        return json.dumps(
            {"question": conversation.question, "answer": conversation.answer}, ensure_ascii=False
        )
    more = {"tools": conversation.tools} if conversation.tools else {}
    return json.dumps({"messages": conversation.messages(), **more}, ensure_ascii=False)
