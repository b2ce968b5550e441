"""Splits conversations into a training part and a validation part.

All pairs (a question with an answer) that have the same question go to the same part. Questions that differ
only in case, spaces or full-width letters count as the same. If a pair is repeated (same question and same
answer), only its first occurrence is kept. The split depends on the seed, the ratio and the texts, but not on
the order of the lines.

Conversations of several questions go to the same part if they share an exchange: a question with its answer.
But a very frequent exchange, such as a greeting, would join all conversations into one group. So the rarest
exchanges join conversations first, and no group becomes larger than the smaller part. Frequent exchanges may
therefore be in both parts; `Split.on_both_sides` lists them.
"""

import hashlib
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
from minigpt.storage.json_files import json_text

__all__ = ["NORMALISATION", "Split", "normalise", "split_conversations", "write_split"]

# The version of the function `normalise`. Increase it with every change of the function, because such a
# change changes the split, too.
NORMALISATION = 1

# invisible characters: spaces of all kinds, soft hyphens, joiners, direction marks, variation selectors
_INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]+")
# Largest number of groups (conversations with a common question) among which `_choose` searches for those
# that bring train closest to its wanted size.
_WINDOW = 400


def normalise(question: str) -> str:
    """Return a question in a form for comparisons: Unicode's NFKC, lower case, no spaces.

    >>> normalise("ＧＰＴ　是什么？") == normalise("gpt是什么?")
    True
    """
    folded = unicodedata.normalize("NFKC", question).casefold()
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", folded))


@dataclass(frozen=True)
class Split:
    """The two parts, each in the order of the data file, with counts."""

    train: list[Conversation]
    val: list[Conversation]
    questions: int  # number of different questions; conversations of several questions do not count
    grouped: list[list[Conversation]]  # for each question with several answers: its pairs
    dropped: list[tuple[Conversation, Conversation]]  # (repeated conversation, its first occurrence)
    on_both_sides: list[tuple[Exchange, int]]  # (exchange, number of validation conversations with it)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts for `--json` and for the file split.json."""
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
    """Split conversations into train and val.

    Args:
        conversations: all conversations, in the order of the file.
        train_ratio: share of the conversations (without duplicates) for train. Conversations that must stay
            in one part are a group. With up to 400 groups, no other choice of groups comes closer to
            `train_ratio`. With more groups, this is usually so, but not guaranteed.
        seed: decides the random order of the groups.

    Raises:
        InputError: if the ratio is not between 0 and 1, or leaves a part empty.
    """
    if not 0 < train_ratio < 1:  # NaN is refused, too
        raise InputError(f"--train_ratio must lie between 0 and 1, both excluded: got {train_ratio}")
    kept: dict[tuple[Exchange, ...], Conversation] = {}
    dropped = []
    for conversation in conversations:
        first = kept.setdefault(_identity(conversation), conversation)
        if first is not conversation:
            dropped.append((conversation, first))
    groups: dict[str, list[Conversation]] = {}  # name of a group -> conversations that stay in one part
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
    """Return a key that is equal for equal exchanges. The question is normalised, the answer is unchanged."""
    return Exchange(normalise(exchange.question), exchange.answer)


def _identity(conversation: Conversation) -> tuple[Exchange, ...]:
    return tuple(map(exchange_key, conversation.exchanges))


def _name(conversation: Conversation) -> str:
    """Return the name of the group to which a conversation belongs.

    If the conversation has only one question, the name is this question, so that all its answers are in one
    group. Else the name is all texts of the conversation.
    """
    identity = _identity(conversation)
    if len(identity) == 1:
        return identity[0].question
    return "\n".join(part for exchange in identity for part in exchange)


def _joined(groups: dict[str, list[Conversation]], most: float) -> dict[str, list[Conversation]]:
    """Join groups that share an exchange, beginning with the rarest exchanges.

    A joined group has the alphabetically first name of its groups.

    Args:
        most: largest number of conversations of a joined group.
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
    """Return a pseudo-random sort key. Python's hash() would change with every process."""
    return hashlib.sha256(f"{seed}\n{question}".encode("utf-8", "surrogatepass")).digest()


def _choose(sizes: Sequence[int], ratio: float) -> list[bool]:
    """Choose the groups for train. Return a list: True if the group is for train, False if it is for val.

    `sizes` are the sizes of the groups in random order. The sum of the chosen sizes should be as close as
    possible to the target: `ratio` times the sum of all sizes. The groups are divided into three sections:

    - The groups at the beginning are for train. Their sum is below the target.
    - From the next groups (at most `_WINDOW`), the groups for train are chosen so that the whole sum comes
      closest to the target. This is a subset-sum problem.
    - All groups after these are for val.
    """
    target = ratio * sum(sizes)
    cut = bisect_left(list(accumulate(sizes)), target)
    start = max(0, min(cut - _WINDOW // 2, len(sizes) - _WINDOW))
    window = sizes[start : start + _WINDOW]
    before = sum(sizes[:start])

    # Each number in `reachable` is a set of sums, one bit for each sum: bit s of reachable[i] is 1 if some
    # groups of window[i:] have the sum s. (Bit 0 is always 1: taking no group gives the sum 0.)
    reachable = [1]
    for size in reversed(window):
        reachable.append(reachable[-1] | reachable[-1] << size)
    reachable.reverse()
    total = sum(sizes)
    left = _nearest(reachable[0], target - before, {0 - before, total - before})

    chosen = [True] * start
    for size, later in zip(window, reachable[1:]):
        # `left` is the sum that is still missing. Take this group if the later groups can make the sum `left`
        # minus `size` exactly.
        takes = size <= left and bool(later >> (left - size) & 1)
        chosen.append(takes)
        left -= size * takes
    return chosen + [False] * (len(sizes) - len(chosen))


def _nearest(sums: int, target: float, empty: Iterable[int]) -> int:
    """Return the possible sum that is nearest to `target`. The sum s is possible if bit s of `sums` is 1.

    If two sums are equally near, a sum that is not in `empty` is preferred. The sums in `empty` would leave
    train or val without any group.
    """
    bits = f"{sums:b}"[::-1]
    middle = max(0, min(math.floor(target), len(bits) - 1))
    below, above = bits.rfind("1", 0, middle + 1), bits.find("1", middle + 1)
    candidates = [found for found in (below, above) if found >= 0]
    return min(candidates, key=lambda found: (abs(found - target), found in empty, -found))


def write_split(
    split: Split, report: ReadReport, directory: Path, *, train_ratio: float, seed: int
) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and split.json. No file is replaced before all files are on the disk.

    Lines of JSON are copied from the input unchanged. Records of other formats, or with field names given by
    the user, are written as JSON with the usual field names.

    Returns: the content of split.json.

    Raises:
        InputError: if a file cannot be written, or is the input file. In this case no file has changed.
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
    contents["split.json"] = (json_text(manifest, indent=2) + "\n").encode()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(atomic_open(paths[name]))
            for name in reversed(paths)  # ExitStack closes in reverse order, so split.json is replaced last
        }
        for name, file in files.items():
            file.write(contents[name])
            file.flush()
            os.fsync(file.fileno())  # a full disk raises here, before any file is replaced
    return manifest


def _raw(conversation: Conversation) -> str:
    if conversation.raw:
        return conversation.raw
    more: dict[str, Any] = {} if conversation.weight == 1 else {"weight": conversation.weight}
    if [turn.role for turn in conversation.turns] == ["user", "assistant"] and not conversation.tools:
        pair = {"question": conversation.question, "answer": conversation.answer}
        return json_text({**pair, **more})
    more |= {"tools": conversation.tools} if conversation.tools else {}
    return json_text({"messages": conversation.messages(), **more})
