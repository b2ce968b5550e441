"""Checks of a run's data. Each is a function that takes a DataRecord and returns a Finding or None.

    data = read_data_record(record)
    found = [data] if isinstance(data, Finding) else [check(data) for check in DATA_CHECKS]

The files are those in run.json. They are checked only if they still exist and have not changed.
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

# One bad line in a hundred is an accident; more is an error of the program that wrote the file.
SKIPPED_SHARE = 0.01
# If one in five questions has the same answer, the model will give it whenever it is unsure.
SAME_ANSWER_SHARE, SAME_ANSWER_PAIRS = 0.2, 10
# `minigpt split` never puts a question into both parts; one in 200 shows that another program split the data.
LEAK_SHARE = 0.005
# most unknown characters, as a share: one in a hundred is about one in every third sentence
UNKNOWN_SHARE = 0.01
# A few long pairs are usual. If one in twenty is cut, the model learns not to end its answers.
CUT_SHARE = 0.05
# A pair without any answer token teaches nothing. One in a hundred is worth a note.
NO_ANSWER_SHARE = 0.01
# Padding takes as much time as text. Above half, most of the time is lost.
PADDING_SHARE = 0.5


@dataclass(frozen=True)
class DataRecord:
    """The training and validation data, as read."""

    config: TrainConfig
    train: list[Conversation]
    val: list[Conversation]
    reports: tuple[ReadReport, ReadReport]  # reports on reading the training and the validation file
    statistics: Statistics  # token statistics of the training data


def read_data_record(record: RunRecord) -> DataRecord | Finding:
    """Read the data of a run. If that is not possible, return a Finding that says why."""
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
        if not changed:  # if the vocabulary has changed, data that has not changed has other ids, too
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
    """Report lines that the reader skipped, empty ones excepted, in the worse of both files."""
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
    """Report lines with an empty question or answer, in the worse of both files."""
    shares = []
    for report in data.reports:
        count = sum(len(lines) for why, lines in report.by_reason().items() if _is_empty(why))
        shares.append((count / max(report.lines, 1), count, report))
    share, count, report = max(shares, key=lambda entry: entry[0])
    if share <= SKIPPED_SHARE:
        return None
    return finding("empty_answers", count=count, lines=report.lines, path=str(report.path), share=share)


def _is_empty(reason: str) -> bool:
    return reason.endswith("is empty")  # the reader writes, for example, "`answer` is empty"


def same_answer(data: DataRecord) -> Finding | None:
    """Report an answer that very many questions share."""
    answers = [exchange.answer.strip() for each in data.train for exchange in each.exchanges]
    ((answer, count),) = Counter(answers).most_common(1)
    share = count / len(answers)
    if len(answers) < SAME_ANSWER_PAIRS or share <= SAME_ANSWER_SHARE:
        return None
    return finding("same_answer", count=count, pairs=len(answers), share=share, answer=_short(answer))


def leak(data: DataRecord) -> Finding | None:
    """Report validation questions that are also in the training data, ignoring width, case and spaces."""
    # Pairs are compared by their question. In conversations a question may repeat, so there the answer
    # counts, too.
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
    """Report characters that became <unk>."""
    unknown = data.statistics.unknown
    count = sum(character.count for character in unknown)
    share = count / int((data.statistics.questions + data.statistics.answers).sum())
    if share <= UNKNOWN_SHARE:
        return None
    examples = " ".join(printable(character.character) for character in unknown[:10])
    return finding("unknown_characters", count=count, share=share, examples=examples)


def pairs_cut(data: DataRecord) -> Finding | None:
    """Report pairs whose end was cut off. Pairs without any answer left are another check."""
    cut = next(cut for cut in data.statistics.cuts if cut.max_length == data.config.max_length)
    count = cut.pairs - cut.without_answer
    share = count / len(data.train)
    if share <= CUT_SHARE:
        return None
    return finding("pairs_cut", count=count, pairs=len(data.train), share=share, max_length=cut.max_length)


def answers_cut_away(data: DataRecord) -> Finding | None:
    """Report pairs whose whole answer was cut off."""
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
    """Report that most of the computed tokens were padding. (Batches of equal lengths have little.)"""
    config = data.config
    if not config.pad_to_max_length:
        return None
    real = float(np.minimum(data.statistics.pairs, config.max_length).mean())
    share = 1 - (real - 1) / (config.max_length - 1)  # - 1, because a row of n tokens has n - 1 inputs
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
