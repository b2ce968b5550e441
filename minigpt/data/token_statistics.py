"""Computes statistics of conversations: lengths in tokens, and how many pairs max_length would cut.

    statistics = compute_statistics(conversations, tokenizer, max_length=128)
    print_statistics(statistics)
    plot(statistics, Path("stats.png"), title="train.jsonl")  # needs matplotlib

The number of tokens of a pair includes both <sep>: question, <sep>, answer, <sep>.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.console.fonts import picture_bytes, picture_kind
from minigpt.console.language import say, translated
from minigpt.console.terminal import ProgressLine, histogram, table
from minigpt.data.conversation import Conversation
from minigpt.data.split import normalise
from minigpt.errors import InputError, Message, printable
from minigpt.storage.files import atomic_write
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer

__all__ = [
    "Cut",
    "Statistics",
    "Unknown",
    "compute_statistics",
    "plot",
    "print_statistics",
]

_USUAL_MAX_LENGTHS = (64, 128, 256, 512)
_BLOCK = 10_000  # number of conversations that are encoded at a time
_SHOWN = 20  # number of unknown or unused characters that are listed


@dataclass(frozen=True)
class Unknown:
    """A character that is not in the vocabulary."""

    character: str
    count: int
    line: int  # line of its first occurrence


@dataclass(frozen=True)
class Cut:
    """Number of pairs that cutting at max_length would change."""

    max_length: int
    pairs: int  # number of pairs that lose their end
    without_answer: int  # number of pairs that lose their whole answer, and so cannot be used


@dataclass(frozen=True)
class Statistics:
    """All statistics. Arrays have one entry per conversation, (N,)."""

    questions: npt.NDArray[np.int64]  # number of tokens of the questions
    answers: npt.NDArray[np.int64]  # number of tokens of the answers
    exchanges: npt.NDArray[np.int64]  # number of answered questions
    max_length: int
    cuts: list[Cut]
    vocab_size: int
    unknown: list[Unknown]  # characters that the vocabulary lacks, the most frequent first
    unused: list[str]  # characters of the vocabulary that no conversation contains
    repeated_pairs: int  # number of pairs that repeat an earlier question and answer
    repeated_questions: int  # number of different questions that occur more than once

    @property
    def pairs(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each conversation, including two <sep> for each answer."""
        return self.questions + self.answers + 2 * self.exchanges

    def lengths(self) -> dict[str, dict[str, float]]:
        """Return mean, percentiles and maximum of the numbers of tokens of questions, answers and pairs."""
        result = {}
        for name in ("questions", "answers", "pairs"):
            values = getattr(self, name)
            middle, most, nearly_all = np.percentile(values, [50, 95, 99], method="inverted_cdf").tolist()
            result[name] = {
                "mean": float(values.mean()),
                "p50": middle,
                "p95": most,
                "p99": nearly_all,
                "max": int(values.max()),
            }
        return result

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics for `--json`."""
        total = len(self.questions)
        return {
            "conversations": total,
            "pairs": int(self.exchanges.sum()),
            "tokens": self.lengths(),
            "cut": [
                {"max_length": cut.max_length, "pairs": cut.pairs, "share": cut.pairs / total}
                | {"without_answer": cut.without_answer}
                for cut in self.cuts
            ],
            "vocab_size": self.vocab_size,
            "unknown_characters": [vars(unknown) for unknown in self.unknown],
            "unused_characters": len(self.unused),
            "repeated_pairs": self.repeated_pairs,
            "repeated_questions": self.repeated_questions,
        }


def compute_statistics(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, max_length: int = 128
) -> Statistics:
    """Compute all statistics in one pass over the conversations (at least one).

    Raises:
        InputError: if max_length is less than 1.
    """
    if max_length < 1:
        raise InputError(f"--max_length must be at least 1: got {max_length}")
    used = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    counts: Counter[str] = Counter()
    first_lines: dict[str, int] = {}
    questions: Counter[str] = Counter()
    distinct: set[tuple[str, str]] = set()
    with ProgressLine("counting, conversations", len(conversations), patience=2.0) as progress:
        for start in range(0, len(conversations), _BLOCK):
            block = conversations[start : start + _BLOCK]
            progress.update(start)
            ids = tokenizer.encode_array("".join(text for each in block for text in each.texts()))
            found = np.bincount(ids, minlength=len(used))
            used += found
            for each in block:
                for exchange in each.exchanges:
                    question = normalise(exchange.question)
                    questions[question] += 1
                    distinct.add((question, exchange.answer))
                if found[tokenizer.unk_token_id]:
                    _note_unknown(each, tokenizer, counts, first_lines)
    exchanges = np.array([len(each.exchanges) for each in conversations], dtype=np.int64)
    question_lengths = np.array([sum(len(one.question) for one in c.exchanges) for c in conversations])
    answer_lengths = np.array([sum(len(one.answer) for one in c.exchanges) for c in conversations])
    last_questions = np.array([len(each.question) for each in conversations])
    whole = question_lengths + answer_lengths + 2 * exchanges
    return Statistics(
        questions=question_lengths,
        answers=answer_lengths,
        exchanges=exchanges,
        max_length=max_length,
        cuts=[
            Cut(limit, int((whole > limit).sum()), int((last_questions + 1 >= limit).sum()))
            for limit in sorted({*_USUAL_MAX_LENGTHS, max_length})
        ],
        vocab_size=tokenizer.get_vocab_size(),
        unknown=[Unknown(c, count, first_lines[c]) for c, count in counts.most_common()],
        unused=[tokenizer.id2word[i] for i in np.flatnonzero(used == 0) if i >= len(SPECIAL_TOKENS)],
        repeated_pairs=int(exchanges.sum()) - len(distinct),
        repeated_questions=sum(count > 1 for count in questions.values()),
    )


def _note_unknown(
    conversation: Conversation, tokenizer: Tokenizer, counts: Counter[str], lines: dict[str, int]
) -> None:
    text = "".join(conversation.texts())
    for character in tokenizer.unknown_characters(text):
        counts[character] += text.count(character)
        lines.setdefault(character, conversation.line)


# "pairs{whole}" is printed as "pairs". It has its own translation, because the word "pairs" in "12 pairs" is
# a different word in Chinese.
_ROWS = {
    "questions": Message("questions"),
    "answers": Message("answers"),
    "pairs": Message("pairs{whole}", whole=""),
}


def print_statistics(statistics: Statistics) -> None:
    """Print tables and a histogram on stdout."""
    total = len(statistics.questions)
    lengths = statistics.lengths()
    yours = translated(" <- yours")
    table(
        "tokens (one a character)",
        ["", "mean", "50 %", "95 %", "99 %", "max"],
        [
            [_ROWS[name], f"{row['mean']:,.1f}", *(f"{row[key]:,}" for key in ("p50", "p95", "p99", "max"))]
            for name, row in lengths.items()
        ],
        numeric=range(1, 6),
    )
    table(
        "what cutting at max_length would take away",
        ["max_length", "pairs cut", "share", "whole answers lost"],
        [
            [
                f"{cut.max_length:,}{yours if cut.max_length == statistics.max_length else ''}",
                f"{cut.pairs:,}",
                f"{cut.pairs / total:.2%}",
                f"{cut.without_answer:,}",
            ]
            for cut in statistics.cuts
        ],
        numeric=(1, 2, 3),
    )
    labels, counts = _bins(statistics.pairs)
    histogram("tokens of a pair, and how many pairs have them", labels, counts)
    print()
    print(_unknown_sentence(statistics))
    characters = statistics.vocab_size - len(SPECIAL_TOKENS)
    text = "unused characters of the vocabulary: {count:,} of {all:,}{listed}"
    print(say(text, count=len(statistics.unused), all=characters, listed=_listed(statistics.unused)))
    text = (
        "repeated pairs: {pairs:,} (`minigpt split` drops them); "
        "questions that come more than once: {questions:,} (it keeps them together)"
    )
    print(say(text, pairs=statistics.repeated_pairs, questions=statistics.repeated_questions))


def print_brief(statistics: Statistics) -> None:
    """Print two lines on stdout: one on lengths and cut pairs, one on unknown characters and repetitions."""
    pairs, limit = statistics.lengths()["pairs"], statistics.max_length
    cut = next(cut for cut in statistics.cuts if cut.max_length == limit)
    text = (
        "tokens of a pair: {p50:,} in the middle, {p95:,} at 95 %, {max:,} at most; "
        "longer than {limit:,}: {cut:,} ({share:.1%})"
    )
    lengths = {name: pairs[name] for name in ("p50", "p95", "max")}
    print(say(text, **lengths, limit=limit, cut=cut.pairs, share=cut.pairs / len(statistics.questions)))
    text = "{unknown}; repeated pairs: {pairs:,}, questions that come more than once: {questions:,}"
    counts = {"pairs": statistics.repeated_pairs, "questions": statistics.repeated_questions}
    print(say(text, unknown=_unknown_sentence(statistics), **counts))


def _unknown_sentence(statistics: Statistics) -> str:
    unknown = statistics.unknown
    if not unknown:
        return translated("unknown characters: none, the vocabulary has them all")
    one = "{character} (U+{code:04X}, {count:,}x, first in line {line})"
    shown = ", ".join(
        say(one, character=printable(u.character), code=ord(u.character), count=u.count, line=u.line)
        for u in unknown[:_SHOWN]
    ) + (", ..." if len(unknown) > _SHOWN else "")
    text = "unknown characters, which the vocabulary lacks: {count:,}, in {times:,} places: {shown}"
    return say(text, count=len(unknown), times=sum(u.count for u in unknown), shown=shown)


def _listed(characters: Sequence[str]) -> str:
    if not characters:
        return ""
    dots = " ..." if len(characters) > _SHOWN else ""
    return f": {' '.join(printable(c) for c in characters[:_SHOWN])}{dots}"


def _bins(lengths: npt.NDArray[np.int64]) -> tuple[list[str], list[int]]:
    """Return labels and counts for a histogram of at most 13 bins. Their width is 1, 2 or 5 times 10^n.

    The last bin has no upper end. Otherwise a few very long pairs would make the bins so wide that nearly all
    other pairs are in the first bin.
    """
    most = int(np.percentile(lengths, 99, method="inverted_cdf"))
    widths = (step * 10**power for power in range(10) for step in (1, 2, 5))
    width = next(width for width in widths if width * 12 >= most)
    last = min(12, most // width)
    counts = np.bincount(np.minimum(lengths // width, last), minlength=last + 1).tolist()
    labels = [f"{i * width}-{(i + 1) * width - 1}" for i in range(last)] + [
        say("{count} and up", count=last * width)
    ]
    first = next(i for i, count in enumerate(counts) if count)
    return labels[first:], counts[first:]


# The functions below draw the plot. Its labels are in Chinese and English. Without a Chinese font, they are
# in English only.

_LABELS = {  # name -> Chinese, English
    "tokens": ("长度（词元，一字一个）", "length (tokens, one a character)"),
    "count": ("问答对数", "pairs"),
    "questions": ("问题", "questions"),
    "answers": ("回答", "answers"),
    "pairs": ("整对", "whole pairs"),
    "fit": ("不被截断的比例", "share that is not cut"),
    "limit": ("max_length（截断长度）", "max_length"),
    "total": ("对问答", "pairs"),
    "last": ("最后一栏", "the last bar"),
}


def plot(statistics: Statistics, path: Path, title: str) -> None:
    """Plot the lengths, and the share of pairs that each max_length leaves whole, as a PNG, PDF or SVG file.

    Raises:
        InputError: without matplotlib, for an unknown type of file, or if the file cannot be written.
    """

    def draw(figure: Any, has_chinese: bool) -> None:
        text = {
            name: english if not has_chinese or chinese == english else f"{chinese} / {english}"
            for name, (chinese, english) in _LABELS.items()
        }
        total = f"{len(statistics.questions):,} {text['total']}"
        # In matplotlib's text, a dollar sign would begin a formula.
        figure.suptitle(f"{printable(title)}: {total}".replace("$", r"\$"))
        left, right = figure.subplots(1, 2)
        _draw_lengths(left, statistics, text)
        _draw_cuts(right, statistics, text)

    lacking = "the picture's labels are English only"
    atomic_write(path, picture_bytes(draw, picture_kind(path), (13, 5.2), lacking))


def _draw_lengths(axes: Any, statistics: Statistics, text: dict[str, str]) -> None:
    most = int(np.percentile(statistics.pairs, 99, method="inverted_cdf"))
    width = most // 60 + 1  # a whole number, so that each bar counts the same number of lengths
    last = most // width * width  # start of the last bar, which includes all longer pairs
    edges = np.arange(0, last + 2 * width, width)
    for name in ("questions", "answers", "pairs"):
        values = np.minimum(getattr(statistics, name), last)
        axes.hist(values, bins=edges, histtype="stepfilled", alpha=0.45, label=text[name])
    beyond = "" if int(statistics.pairs.max()) < edges[-1] else f"\n{text['last']}: ≥ {last:,}"
    axes.set(xlabel=text["tokens"] + beyond, ylabel=text["count"], xlim=(0, edges[-1]))
    axes.legend()


def _draw_cuts(axes: Any, statistics: Statistics, text: dict[str, str]) -> None:
    lengths, counts = np.unique(statistics.pairs, return_counts=True)
    share = 100 * np.cumsum(counts) / counts.sum()
    end = max(int(lengths[-1]), statistics.max_length) * 1.05
    axes.step([0, *lengths, end], [0, *share, 100], where="post")
    below = 0.0, 0.0, 0  # the previous label: x, y, and how far it was moved, in points
    for cut in statistics.cuts:
        if cut.max_length > end:
            continue
        fits = 100 * (1 - cut.pairs / len(statistics.pairs))
        yours = cut.max_length == statistics.max_length
        axes.axvline(cut.max_length, color="tab:red" if yours else "gray", linewidth=1, linestyle="--")
        is_near = cut.max_length - below[0] < end / 5 and fits - below[1] < 5
        points = 4 if fits < 10 else (below[2] if is_near else 0) - 12
        below = cut.max_length, fits, points
        is_left = cut.max_length > 0.8 * end  # True: write the label left of the line, inside the frame
        axes.annotate(
            f"{cut.max_length}: {fits:.1f} %",
            (cut.max_length, fits),
            xytext=(-4 if is_left else 4, points),
            textcoords="offset points",
            ha="right" if is_left else "left",
            color="tab:red" if yours else "black",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set(xlabel=text["limit"], ylabel=f"{text['fit']} (%)", xlim=(0, end), ylim=(0, 105))
    axes.grid(alpha=0.3)
