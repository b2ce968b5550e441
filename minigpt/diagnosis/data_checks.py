"""Is something wrong with the data that a run learned from? Pure functions, DataRecord -> Finding or None.

    data = read_data_record(record)
    found = [data] if isinstance(data, Finding) else [check(data) for check in DATA_CHECKS]

The files are those that run.json names, if they are still there and still what the run saw.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minigpt.data.batches import encode_conversations
from minigpt.data.conversation import Conversation
from minigpt.data.reader import ReadReport, read_conversations
from minigpt.data.split import exchange_key, normalise
from minigpt.data.token_statistics import Statistics, compute_statistics
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord
from minigpt.errors import InputError, printable
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig

__all__ = ["DATA_CHECKS", "DataRecord", "read_data_record"]

# A line in a hundred is a slip of the pen; more is a fault of whatever wrote the file.
SKIPPED_SHARE = 0.01
# An answer that one in five questions has is what a model says when it does not know.
SAME_ANSWER_SHARE, SAME_ANSWER_PAIRS = 0.2, 10
# `minigpt split` leaves no question on both sides; one in two hundred is another program's split.
LEAK_SHARE = 0.005
# One character in a hundred unknown: about one in every third sentence.
UNKNOWN_SHARE = 0.01
# Long tails are usual; one pair in twenty without its end teaches the model not to end.
CUT_SHARE = 0.05
# A pair without any answer is waste. One in a hundred is worth a word.
NO_ANSWER_SHARE = 0.01
# Padding costs as much as text; above half, most of the time is spent on it.
PADDING_SHARE = 0.5


@dataclass(frozen=True)
class DataRecord:
    """Both parts of the data as they were read."""

    config: TrainConfig
    train: list[Conversation]
    val: list[Conversation]
    reports: tuple[ReadReport, ReadReport]  # of train, of val
    statistics: Statistics  # of train


def read_data_record(record: RunRecord) -> DataRecord | Finding:
    """Read what the run read; a finding that says why, if that cannot be done."""
    config = record.config
    if getattr(config, "text", None):
        return finding("text_run")
    try:
        train, train_report = read_conversations(
            config.train_data, encoding=config.encoding, names=config.field_names
        )
        val, val_report = read_conversations(
            config.val_data, encoding=config.encoding, names=config.field_names
        )
        tokenizer = Tokenizer(config.vocab_path)
        seen = record.fingerprints
        changed = [str(config.vocab_path)] * (
            seen.get("vocabulary_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint
        )
        if not changed:  # with another vocabulary the same data has other ids
            for name, conversations, path in (
                ("train_fingerprint", train, config.train_data),
                ("val_fingerprint", val, config.val_data),
            ):
                if (
                    name in seen
                    and encode_conversations(conversations, tokenizer, config.max_length).fingerprint
                    != seen[name]
                ):
                    changed.append(str(path))
    except (InputError, OSError) as error:
        return finding("no_data", reason=printable(str(error)))
    if changed:
        return finding("data_changed", files=", ".join(changed))
    statistics = compute_statistics(train, tokenizer, config.max_length)
    return DataRecord(config, train, val, (train_report, val_report), statistics)


def lines_skipped(data: DataRecord) -> Finding | None:
    """Lines that the reader could not use, empty ones apart; the worse of both files."""
    found = []
    for report in data.reports:
        reasons = {why: len(lines) for why, lines in report.by_reason().items() if not _is_empty(why)}
        count = sum(reasons.values())
        if report.lines and count / report.lines > SKIPPED_SHARE:
            found.append((count / report.lines, count, report, max(reasons, key=lambda why: reasons[why])))
    if not found:
        return None
    share, count, report, reason = max(found, key=lambda entry: entry[0])
    return finding(
        "lines_skipped", count=count, lines=report.lines, path=str(report.path), share=share, reason=reason
    )


def empty_answers(data: DataRecord) -> Finding | None:
    """Lines whose question or answer is empty; the worse of both files."""
    shares = []
    for report in data.reports:
        count = sum(len(lines) for why, lines in report.by_reason().items() if _is_empty(why))
        shares.append((count / max(report.lines, 1), count, report))
    share, count, report = max(shares, key=lambda entry: entry[0])
    if share <= SKIPPED_SHARE:
        return None
    return finding("empty_answers", count=count, lines=report.lines, path=str(report.path), share=share)


def _is_empty(reason: str) -> bool:
    return reason.endswith("is empty")  # the reader's words: "`answer` is empty"


def same_answer(data: DataRecord) -> Finding | None:
    """One answer that very many questions have."""
    answers = [exchange.answer.strip() for each in data.train for exchange in each.exchanges]
    ((answer, count),) = Counter(answers).most_common(1)
    share = count / len(answers)
    if len(answers) < SAME_ANSWER_PAIRS or share <= SAME_ANSWER_SHARE:
        return None
    return finding("same_answer", count=count, pairs=len(answers), share=share, answer=_short(answer))


def leak(data: DataRecord) -> Finding | None:
    """Questions of the validation part that were learned from; width, case and spaces do not count."""
    # the question alone tells pairs apart; in a conversation the same question comes again and again
    several = any(len(each.exchanges) > 1 for each in (*data.train, *data.val))
    learned = {
        exchange_key(exchange) if several else normalise(exchange.question)
        for each in data.train
        for exchange in each.exchanges
    }
    asked = {
        exchange_key(exchange) if several else normalise(exchange.question): exchange.question
        for each in data.val
        for exchange in each.exchanges
    }
    both = [question for key, question in asked.items() if key in learned]
    share = len(both) / len(asked)
    if share <= LEAK_SHARE:
        return None
    return finding("leak", count=len(both), questions=len(asked), share=share, question=_short(both[0]))


def unknown_characters(data: DataRecord) -> Finding | None:
    """Characters that became <unk>."""
    unknown = data.statistics.unknown
    count = sum(character.count for character in unknown)
    share = count / int((data.statistics.questions + data.statistics.answers).sum())
    if share <= UNKNOWN_SHARE:
        return None
    examples = " ".join(printable(character.character) for character in unknown[:10])
    return finding("unknown_characters", count=count, share=share, examples=examples)


def pairs_cut(data: DataRecord) -> Finding | None:
    """Pairs that lost their end; those that lost the whole answer are counted apart."""
    cut = next(cut for cut in data.statistics.cuts if cut.max_length == data.config.max_length)
    count = cut.pairs - cut.without_answer
    share = count / len(data.train)
    if share <= CUT_SHARE:
        return None
    return finding("pairs_cut", count=count, pairs=len(data.train), share=share, max_length=cut.max_length)


def answers_cut_away(data: DataRecord) -> Finding | None:
    """Pairs with nothing left to learn."""
    cut = next(cut for cut in data.statistics.cuts if cut.max_length == data.config.max_length)
    share = cut.without_answer / len(data.train)
    if share <= NO_ANSWER_SHARE:
        return None
    return finding(
        "answers_cut_away",
        count=cut.without_answer,
        pairs=len(data.train),
        share=share,
        max_length=cut.max_length,
    )


def mostly_padding(data: DataRecord) -> Finding | None:
    """Most of what was computed was padding. (With batches by length it is little.)"""
    config = data.config
    if not config.pad_to_max_length:
        return None
    real = float(np.minimum(data.statistics.pairs, config.max_length).mean())
    share = 1 - (real - 1) / (config.max_length - 1)  # a row of n tokens has n - 1 inputs
    if share <= PADDING_SHARE:
        return None
    return finding("mostly_padding", share=share, max_length=config.max_length)


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 40 else f"{text[:39]}…"


DATA_CHECKS: tuple[Callable[[DataRecord], Finding | None], ...] = (
    lines_skipped,
    empty_answers,
    same_answer,
    leak,
    unknown_characters,
    pairs_cut,
    answers_cut_away,
    mostly_padding,
)
