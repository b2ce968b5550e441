"""Checks the data of a run. Each check is a pure function: DataRecord -> Finding or None.

    data = read_data_record(record)
    found = [data] if isinstance(data, Finding) else [check(data) for check in DATA_CHECKS]
    found += [check(record) for check in SIZE_CHECKS]      # these need no data files, only the run's summary

run.json names the data files. They are checked if they still exist and have not changed since the run.
"""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minigpt.console.terminal import shortened
from minigpt.data.batches import encode_conversations
from minigpt.data.conversation import Conversation
from minigpt.data.reader import ReadReport, read_conversations
from minigpt.data.split import exchange_key, normalise
from minigpt.data.token_statistics import Statistics, compute_statistics
from minigpt.diagnosis.advice import anew, longer, reading, split_commands
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord
from minigpt.errors import InputError, printable
from minigpt.storage.json_files import parse_json
from minigpt.tokenizer import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.data_summary import LEARN_FROM, MEASURE_ON, DataSummary, summarize
from minigpt.training.run_data import RunData

__all__ = ["DATA_CHECKS", "SIZE_CHECKS", "DataRecord", "answers_fit", "read_data_record"]

# Report a problem if more than 1 % of the lines were skipped. Up to 1 % may be bad by accident. More bad
# lines are an error of the program that wrote the file.
SKIPPED_SHARE = 0.01
# Report a problem if more than one in five questions has the same answer: a model then gives this answer
# whenever it is unsure. At least 10 questions are needed.
SAME_ANSWER_SHARE, SAME_ANSWER_PAIRS = 0.2, 10
# Report a problem if more than one in two hundred questions is in both parts, training and validation.
# `minigpt split` puts no question into both parts, so another program has split the data.
LEAK_SHARE = 0.005
# Report a problem if more than 1 % of the characters are not in the vocabulary. That is about one unknown
# character in three sentences.
UNKNOWN_SHARE = 0.01
# Report a problem if max_length cuts off the end of more than 5 % of the pairs: the model then learns not to
# end answers. A few very long pairs are usual.
CUT_SHARE = 0.05
# Report a problem if more than 1 % of the pairs lose their whole answer: such a pair teaches nothing.
NO_ANSWER_SHARE = 0.01
# Report a problem if more than half of the tokens are padding. Padding takes as much time as text.
PADDING_SHARE = 0.5
# The fields of question and answer are swapped if at least 50 % of the answers, but at most 10 % of the
# questions, end with a question mark.
ASKING, NOT_ASKING = 0.5, 0.1
# Report a problem if more than 1 % of the conversations contain UTF-8 that was read as Latin-1. A few texts
# may contain this on purpose.
MOJIBAKE_SHARE = 0.01
# The data contradicts itself if more than one in ten questions has several different answers. A few
# questions, such as greetings, usually have several.
CONTRADICTION_SHARE = 0.1
# Answers fit their questions if an answer is more similar to its own question than to a different question.
# The difference of these two similarities is averaged over at least 2000 pairs (or all pairs, if there are
# fewer). The mean must be more than 4 standard errors above 0. By chance alone, this happens in one of thirty
# thousand files.
FIT_PAIRS, FIT_ERRORS = 2000, 4.0
# If more than 10 % of the pairs are repetitions, parts of the file were copied. A few per cent of repetitions
# are usual.
DUPLICATE_SHARE = 0.1
# Report a problem if 90 % of the questions of one part (training or validation) begin, or end, with the same
# phrase of at least 3 characters, but at most 10 % of the questions of the other part do. Then only one part
# has a template.
IN_TEMPLATE, NOT_IN_TEMPLATE, TEMPLATE_LENGTH = 0.9, 0.1, 3
# If more than one pair in ten contains special tokens of other programs, a program has left them there by
# mistake. A few texts may contain them because they are about such tokens.
MARKS_SHARE = 0.1
MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>", "<|eot_id|>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "### Instruction:",
        "### Response:",
    ),
    *("<sep>", "<eos>", "<pad>", "</s>", "[SEP]", "[CLS]", "[PAD]"),
)
# Report a problem if more than 0.75 of the tokens that the loss counts belong to questions, not to answers.
QUESTIONS_SHARE = 0.75
# A unigram model of the training data is measured on the validation data, and on held-out training data.
# Report a problem if the loss on the validation data is higher by more than 0.5 nats (a factor of 1.65 in
# probability) and by more than 10 / sqrt(n) nats, for n validation tokens. Chance causes smaller differences:
# a token's loss has a standard deviation of about 1.7 nats, and tokens of a row are not independent, so four
# standard deviations of the mean loss are about 10 / sqrt(n).
UNLIKE_NATS, UNLIKE_DEVIATIONS = 0.5, 10.0


@dataclass(frozen=True)
class DataRecord:
    """The training and validation data of a run. The files are read again for the checks."""

    run: RunRecord
    train: list[Conversation]
    val: list[Conversation]
    reports: tuple[ReadReport, ReadReport]  # reports about the training file and the validation file
    statistics: Statistics  # statistics of the training data
    summary: DataSummary

    @property
    def config(self) -> TrainConfig:
        """The settings of the run."""
        return self.run.config


def read_data_record(record: RunRecord) -> DataRecord | Finding:
    """Read the run's data again. If this is impossible, return a finding that says why."""
    config = record.config
    if config.text is not None:
        return finding("text_run")
    if config.starts_from is not None:
        return finding("run_from_weights")
    # The data's fingerprint depends on max_length. Read both from the checkpoint, because a later resume may
    # have changed the max_length in run.json.
    noted = record.state.get("config")
    length = noted.get("max_length") if isinstance(noted, dict) else None
    length = length if isinstance(length, int) and length > 0 else config.max_length
    try:
        tokenizer = Tokenizer(config.vocab_path)
        parts = [
            read_conversations(path, encoding=config.encoding, names=config.field_names)
            for path in (config.train_data, config.val_data)
        ]
        encoded = [encode_conversations(part, tokenizer, length) for part, _ in parts]
        seen = record.fingerprints
        changed = [str(config.vocab_path)] * (
            seen.get("vocabulary_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint
        )
        if not changed:  # the vocabulary is the same; only then can the fingerprints of the data be compared
            names = ("train_fingerprint", "val_fingerprint")
            paths = (config.train_data, config.val_data)
            for name, part, path in zip(names, encoded, paths):
                changed += [str(path)] * (seen.get(name, part.fingerprint) != part.fingerprint)
    except (InputError, OSError) as error:
        return finding("no_data", reason=printable(str(error)))
    if changed:
        return finding("data_changed", files=", ".join(changed))
    (train, train_report), (val, val_report) = parts
    statistics = compute_statistics(train, tokenizer, config.max_length)
    summary = record.summary or summarize(RunData(tokenizer, encoded[0], encoded[1], val), config)
    return DataRecord(record, train, val, (train_report, val_report), statistics, summary)


# -- sizes --------------------------------------------------------------------------------------------------


def too_few_to_learn(record: RunRecord) -> Finding | None:
    """Check whether there are so few training targets that a model memorises them."""
    summary = record.summary
    if summary is None or summary.train_targets >= LEARN_FROM:
        return None
    size = {"targets": summary.train_targets, "examples": summary.train_examples, **_unit(summary)}
    return finding("too_few_to_learn", **size, enough=LEARN_FROM)


def _unit(summary: DataSummary) -> dict[str, str]:
    chinese = {"pairs": "对", "conversations": "段对话", "windows": "个窗口"}
    return {"unit": summary.unit, "unit_zh": chinese.get(summary.unit, "条")}


def too_few_to_measure(record: RunRecord) -> Finding | None:
    """Check whether there are too few validation targets for an exact validation loss."""
    summary = record.summary
    if summary is None or summary.val_targets >= MEASURE_ON:
        return None
    size = {"targets": summary.val_targets, "examples": summary.val_examples, **_unit(summary)}
    return finding("too_few_to_measure", **size, error=summary.val_error, enough=MEASURE_ON)


def val_is_train(record: RunRecord) -> Finding | None:
    """Check whether the validation data is the training data."""
    config, summary = record.config, record.summary
    if summary is None or not summary.is_same:
        return None
    found = finding("val_is_train", path=str(config.text or config.train_data))
    if config.text is not None:
        return found
    command, parts = split_commands(record)
    return found.trying(command, **parts)


def val_unlike_train(record: RunRecord) -> Finding | None:
    """Check whether the token frequencies of validation and training data differ much."""
    summary = record.summary
    if summary is None:
        return None
    most = max(UNLIKE_NATS, UNLIKE_DEVIATIONS / math.sqrt(summary.val_targets))
    if summary.val_unigram_loss - summary.held_out_unigram_loss <= most:
        return None
    return finding("val_unlike_train", val=summary.val_unigram_loss, train=summary.held_out_unigram_loss)


SIZE_CHECKS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    too_few_to_learn,
    too_few_to_measure,
    val_is_train,
    val_unlike_train,
)


# -- content of the files -----------------------------------------------------------------------------------


def lines_skipped(data: DataRecord) -> Finding | None:
    """Check for skipped lines. Lines with an empty field are not counted here, but in `empty_answers`.

    The finding is about the file, training or validation, with the larger share of skipped lines.
    """
    found = []
    for report in data.reports:
        reasons = {why: len(lines) for why, lines in report.by_reason().items() if not _is_empty(why)}
        count = sum(reasons.values())
        if report.lines and count / report.lines > SKIPPED_SHARE:
            found.append((count / report.lines, count, report, max(reasons, key=lambda why: reasons[why])))
    if not found:
        return None
    share, count, report, reason = max(found, key=lambda entry: entry[0])
    numbers = {"count": count, "lines": report.lines, "path": str(report.path), "share": share}
    return finding("lines_skipped", **numbers, reason=reason).trying(_stats(data.config, report))


def empty_answers(data: DataRecord) -> Finding | None:
    """Check for lines whose question or answer is empty. Report the file with the larger share."""
    shares = []
    for report in data.reports:
        count = sum(len(lines) for why, lines in report.by_reason().items() if _is_empty(why))
        shares.append((count / max(report.lines, 1), count, report))
    share, count, report = max(shares, key=lambda entry: entry[0])
    if share <= SKIPPED_SHARE:
        return None
    numbers = {"count": count, "lines": report.lines, "path": str(report.path), "share": share}
    return finding("empty_answers", **numbers).trying(_stats(data.config, report))


def _is_empty(reason: str) -> bool:
    return reason.endswith("is empty")  # the data reader's message is, for example, "`answer` is empty"


def _stats(config: TrainConfig, report: ReadReport) -> str:
    words = ["minigpt", "stats", "--train_data", str(report.path), "--vocab_path", str(config.vocab_path)]
    return shlex.join([*words, *reading(config)])


def characters_lost(data: DataRecord) -> Finding | None:
    """Check the training and the validation file for records with U+FFFD, which replaces a lost character.

    The finding is about the file with the larger share of such records.
    """
    report = max(data.reports, key=lambda report: len(report.lost) / max(report.lines, 1))
    share = len(report.lost) / max(report.lines, 1)
    if share <= SKIPPED_SHARE:
        return None
    numbers = {"count": len(report.lost), "lines": report.lines, "path": str(report.path), "share": share}
    return finding("characters_lost", **numbers)


def mojibake(data: DataRecord) -> Finding | None:
    """Check for UTF-8 text that another program read as Latin-1 or Windows-1252."""
    texts = [(text, _repaired(text)) for each in data.train for text in each.texts()]
    found = [(text, meant) for text, meant in texts if meant]
    count = sum(any(_repaired(text) for text in each.texts()) for each in data.train) if found else 0
    share = count / len(data.train)
    if share <= MOJIBAKE_SHARE:
        return None
    text, meant = found[0]
    numbers = {"count": count, "pairs": len(data.train), "share": share}
    return finding("mojibake", **numbers, text=shortened(text), meant=shortened(meant))


def _repaired(text: str) -> str:
    """Return the original text if it was UTF-8 that was read as Latin-1 or Windows-1252; else ""."""
    if text.isascii():
        return ""
    for encoding in ("latin-1", "cp1252"):
        try:
            return text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
    return ""


def fields_swapped(data: DataRecord) -> Finding | None:
    """Check whether the answers end with question marks and the questions do not."""
    exchanges = [exchange for each in data.train for exchange in each.exchanges]
    asking = [sum(_asks(text) for text in texts) / len(exchanges) for texts in zip(*exchanges, strict=True)]
    questions, answers = asking
    if answers < ASKING or questions > NOT_ASKING:
        return None
    first = next(exchange for exchange in exchanges if _asks(exchange.answer))
    shown = {"question": shortened(first.question), "answer": shortened(first.answer)}
    found = finding("fields_swapped", questions=questions, answers=answers, **shown)
    names = _names_of(data.train[0])
    return found.trying(question_field=names[1], answer_field=names[0]) if names else found


def _asks(text: str) -> bool:
    return text.rstrip().endswith(("?", "\uff1f"))  # U+FF1F is the full-width question mark of Chinese


def _names_of(conversation: Conversation) -> tuple[str, str] | None:
    """Return the names of the fields with question and answer; None if the names are not found."""
    try:
        row = parse_json(conversation.raw)
    except ValueError:
        return None
    if not isinstance(row, dict) or len(conversation.turns) != 2:
        return None
    by_text = {value: name for name, value in row.items() if isinstance(value, str)}
    question, answer = (by_text.get(turn.content) for turn in conversation.turns)
    return (question, answer) if question and answer else None


def answers_fit(data: DataRecord) -> bool:
    """Return True if answers are more similar to their own questions than to other questions.

    Two texts are similar if many pairs of neighbouring characters occur in both texts. An answer often
    repeats words of its question. But labels and translations do not, so False alone does not prove that the
    file is mixed up.
    """
    exchanges = list({each.exchanges[0].question: each.exchanges[0] for each in data.train}.values())
    chosen = exchanges[:: max(1, len(exchanges) // FIT_PAIRS)]
    if len(chosen) < 2:
        return False
    questions, answers = ([_bigrams(text) for text in texts] for texts in zip(*chosen, strict=True))
    half = len(chosen) // 2
    differences = [
        (len(answer & questions[i]) - len(answer & questions[(i + half) % len(chosen)])) / max(1, len(answer))
        for i, answer in enumerate(answers)
    ]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean > FIT_ERRORS * math.sqrt(variance / len(differences)) and mean > 0


def _bigrams(text: str) -> set[str]:
    folded = normalise(text)
    return {folded[i : i + 2] for i in range(len(folded) - 1)}


def same_answer(data: DataRecord) -> Finding | None:
    """Check whether very many questions have the same answer."""
    answers = [exchange.answer.strip() for each in data.train for exchange in each.exchanges]
    ((answer, count),) = Counter(answers).most_common(1)
    share = count / len(answers)
    if len(answers) < SAME_ANSWER_PAIRS or share <= SAME_ANSWER_SHARE:
        return None
    return finding("same_answer", count=count, pairs=len(answers), share=share, answer=shortened(answer))


def leak(data: DataRecord) -> Finding | None:
    """Check for validation questions that are also training questions. Case and spaces do not matter."""
    # In files of pairs, a question that is in both files is a leak. In conversations, questions such as
    # "why?" occur often. So if the files have conversations, it is a leak only if the answer is equal, too.
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
    found = finding("leak", count=len(both), questions=len(asked), share=share, question=shortened(both[0]))
    command, parts = split_commands(data.run)
    return found.trying(command, **parts)


def contradictions(data: DataRecord) -> Finding | None:
    """Check for questions with different answers. Only conversations of one question and answer count."""
    alone = [each for each in data.train if len(each.turns) == 2 and not each.tools]
    answers: dict[str, dict[str, Conversation]] = {}
    for each in alone:
        answers.setdefault(normalise(each.question), {}).setdefault(normalise(each.answer), each)
    several = [list(found.values()) for found in answers.values() if len(found) > 1]
    # If most conversations have several questions, only few are checked here. A few contradictions would then
    # be a large share of the checked questions. So the limit is a share of this number: the number of checked
    # questions, or half the number of all conversations, whichever is larger.
    questions = max(len(answers), len(data.train) // 2)
    if len(several) <= CONTRADICTION_SHARE * questions:
        return None
    one, other = several[0][:2]
    numbers = {"count": len(several), "questions": len(answers), "share": len(several) / len(answers)}
    shown = {
        "question": shortened(one.question),
        "one": shortened(one.answer),
        "other": shortened(other.answer),
    }
    return finding("contradictions", **numbers, **shown)


def duplicates(data: DataRecord) -> Finding | None:
    """Check for repeated pairs, equal word for word."""
    count, pairs = data.statistics.repeated_pairs, int(data.statistics.exchanges.sum())
    # In conversations, exchanges such as greetings often repeat, which is no mistake. So this check is for
    # files of pairs only.
    several = any(len(each.exchanges) > 1 for each in data.train)
    if several or count / pairs <= DUPLICATE_SHARE:
        return None
    command, parts = split_commands(data.run)
    found = finding("duplicates", count=count, pairs=pairs, share=count / pairs)
    # The advice is to train without the repetitions. The number of epochs grows so that the number of steps
    # stays the same.
    again = {} if data.config.max_steps else longer(data.config, pairs / (pairs - count))
    return found.trying(command, train_data=parts["train_data"], **again)


def template_differs(data: DataRecord) -> Finding | None:
    """Check whether a phrase begins or ends nearly all questions of train but few of val, or vice versa."""
    parts = [[each.exchanges[0].question for each in part] for part in (data.train, data.val)]
    for has, lacks, names in ((0, 1, ("training", "validation")), (1, 0, ("validation", "training"))):
        for turned in (False, True):
            mine, theirs = ([q[::-1] if turned else q for q in parts[number]] for number in (has, lacks))
            affix = _common_beginning(mine)
            other = sum(question.startswith(affix) for question in theirs) / len(theirs)
            if len(affix) < TEMPLATE_LENGTH or other > NOT_IN_TEMPLATE:
                continue
            share = sum(question.startswith(affix) for question in mine) / len(mine)
            chinese = {"training": "训练集", "validation": "验证集"}
            return finding(
                "template_differs",
                share=share,
                other=other,
                affix=shortened(affix[::-1] if turned else affix),
                where="end with" if turned else "begin with",
                where_zh="结尾都有" if turned else "开头都有",
                part=names[0],
                rest=names[1],
                part_zh=chinese[names[0]],
                rest_zh=chinese[names[1]],
            )
    return None


def _common_beginning(texts: Sequence[str]) -> str:
    """Return the longest beginning that nine in ten of the texts have."""
    enough, found = IN_TEMPLATE * len(texts), ""
    while True:
        counts = Counter(text[: len(found) + 1] for text in texts if text.startswith(found) and text != found)
        longer, count = counts.most_common(1)[0] if counts else ("", 0)
        if count < enough:
            return found
        found = longer


def markup(data: DataRecord) -> Finding | None:
    """Check for special tokens of other programs in the texts, such as "<|im_end|>"."""
    counts = Counter(
        mark for each in data.train for mark in MARKS if any(mark in text for text in each.texts())
    )
    if not counts:
        return None
    mark, count = counts.most_common(1)[0]
    share = count / len(data.train)
    return finding("markup", share=share, mark=mark, count=len(mark)) if share > MARKS_SHARE else None


def unknown_characters(data: DataRecord) -> Finding | None:
    """Check for characters that become <unk>."""
    unknown = data.statistics.unknown
    count = sum(character.count for character in unknown)
    share = count / int((data.statistics.questions + data.statistics.answers).sum())
    if share <= UNKNOWN_SHARE:
        return None
    examples = " ".join(printable(character.character) for character in unknown[:10])
    config, path = data.config, data.config.vocab_path
    new = str(anew(path.with_suffix("")).with_suffix(path.suffix or ".json"))
    words = ["minigpt", "vocab", "--data", str(config.train_data), "--output", new, *reading(config)]
    found = finding("unknown_characters", count=count, share=share, examples=examples)
    return found.trying(shlex.join(words), vocab_path=new)


def pairs_cut(data: DataRecord) -> Finding | None:
    """Check for pairs that lose their end at max_length, or conversations that lose their beginning.

    Pairs that lose the whole answer are not counted here, but in `answers_cut_away`.
    """
    cut = next(cut for cut in data.statistics.cuts if cut.max_length == data.config.max_length)
    count = cut.pairs - cut.without_answer
    share = count / len(data.train)
    if share <= CUT_SHARE:
        return None
    lengths = data.statistics.pairs
    several = (data.statistics.exchanges[lengths > cut.max_length] > 1).mean() > 0.5
    numbers = {"count": count, "pairs": len(data.train), "share": share, "max_length": cut.max_length}
    return finding("conversations_cut" if several else "pairs_cut", **numbers).trying(**_room(data))


def _room(data: DataRecord) -> dict[str, int]:
    """Return settings that cut at most 1 % of the pairs: max_length, and block_size >= max_length."""
    length = int(np.percentile(data.statistics.pairs, 99, method="inverted_cdf"))
    return {"max_length": length, "block_size": max(data.config.block_size, length)}


def answers_cut_away(data: DataRecord) -> Finding | None:
    """Check for pairs that lose their whole answer at max_length."""
    cut = next(cut for cut in data.statistics.cuts if cut.max_length == data.config.max_length)
    share = cut.without_answer / len(data.train)
    if share <= NO_ANSWER_SHARE:
        return None
    numbers = {"count": cut.without_answer, "pairs": len(data.train), "share": share}
    return finding("answers_cut_away", **numbers, max_length=cut.max_length).trying(**_room(data))


def mostly_questions(data: DataRecord) -> Finding | None:
    """Check whether the loss counts all tokens, but few of these tokens belong to answers."""
    if data.config.loss_on != "all":
        return None
    statistics = data.statistics
    # This is the number of tokens of all answers together. The <sep> after each answer counts, too.
    answers = float((statistics.answers + statistics.exchanges).sum())
    share = 1 - answers / float((statistics.pairs - 1).sum())
    if share <= QUESTIONS_SHARE:
        return None
    return finding("mostly_questions", share=share).trying(loss_on="answer")


def mostly_padding(data: DataRecord) -> Finding | None:
    """Check whether most of the computed tokens are padding, because all rows are padded to max_length."""
    config = data.config
    if not config.pad_to_max_length:
        return None
    real = float(np.minimum(data.statistics.pairs, config.max_length).mean())
    share = 1 - (real - 1) / (config.max_length - 1)  # the model reads n - 1 tokens of a row of n tokens
    if share <= PADDING_SHARE:
        return None
    found = finding("mostly_padding", share=share, max_length=config.max_length)
    return found.trying(pad_to_max_length=False, by_length=True)


DATA_CHECKS: tuple[Callable[[DataRecord], Finding | None], ...] = (
    lines_skipped,
    empty_answers,
    characters_lost,
    mojibake,
    fields_swapped,
    same_answer,
    leak,
    contradictions,
    duplicates,
    template_differs,
    markup,
    unknown_characters,
    pairs_cut,
    answers_cut_away,
    mostly_questions,
    mostly_padding,
)
