"""Reads chat logs that messengers have exported, and makes conversations of them.

Examples of four formats, one in each column:

    2024-01-02 10:00:00 小明      小明(10001) 2024-01-02 10:00      [10:00] 小明: 你好      小明：你好
    你好                          你好                              [10:01] 小红: 你好！    小红：你好！

A table or JSON Lines with a message in each row is a log, too. It has columns for the speaker and the text,
and perhaps for the time and the conversation's id.

A text is a chat log if most lines at its beginning have one of these forms, and only a few speakers write.
A line without time and name continues the message above it. Consecutive messages of one speaker become one
turn. One speaker gives the answers; all other speakers ask.

A log is cut into conversations: at a long pause, at a blank line, or after a fixed number of answers. Which
of these rules holds depends on the form of the messages. A note tells the user the rule.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.data.conversation import ROLES, Role
from minigpt.data.dialogue_files import dialogues_in
from minigpt.data.field_names import FIELDS, MESSAGE_COLUMNS, FieldNames, is_head
from minigpt.data.file_formats import advised
from minigpt.data.json_values import BadLine, Record
from minigpt.data.records import lower_keys, text_of, words_of
from minigpt.errors import InputError

__all__ = ["ChatLog", "holds_chat", "message_columns", "read_chat", "read_messages"]

_SAMPLE, _LINES = 16_000, 200  # number of characters, and of lines, that are examined to recognise a log
_FEWEST = 4  # a text with fewer messages is not taken for a chat log
_PAUSE = 30  # minutes of silence that end a conversation
_ANSWERS = 8  # a conversation without a pause is cut after this number of answers
_MINOR = 0.05  # a speaker with a smaller share of the messages is not chosen as the one who answers
_SHOWN = 6  # number of speakers that an error message lists

_DATE = (
    r"(?:\d{4}\s?[-/.年]\s?\d{1,2}\s?[-/.月]\s?\d{1,2}日?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}"
    r"|\d{1,2}月\d{1,2}日|\d{1,2}[-/]\d{1,2}(?=\s))"
)
_CLOCK = (
    r"(?:凌晨|早上|上午|中午|下午|晚上)?\s?\d{1,2}[:：]\d{2}(?:[:：]\d{2})?(?:[.,]\d{1,3})?"
    r"(?:[\s\u202f][AaPp]\.?[Mm]\.?)?"
)
_DAY = rf"{_DATE}[,，T]?\s*(?:(?:星期|周)[一二三四五六日天]\s*)?"
_OPEN, _CLOSE = r"[\[(（【]?", r"[\])）】]?"
_NAME = r"(?P<name>[^:：<>\[\]]{1,30}?)"
# Regular expressions for the forms of a message. `_INLINE`: time, name and text on one line. `_TIME_FIRST`,
# `_NAME_FIRST`: time and name on one line, the text below it. Three forms have no time. `_PLAIN`: "name:
# text". `_NICK`: "<name> text". `_ABOVE`: "name:", with the text below it. `*+` and `++` are possessive: with
# `*` and `+`, the search in a line of thousands of spaces or stars would take millions of steps.
_INLINE = re.compile(
    rf"\u200e?{_OPEN}(?P<day>{_DAY})?(?P<clock>{_CLOCK}){_CLOSE}\s*+(?:[-–—|]\s*+)?(?:<(?P<nick>[^<>]{{1,30}})>|{_NAME}\s*+[:：])"
    r"\s*(?P<text>.*)"
)
_TIME_FIRST = re.compile(
    rf"{_OPEN}(?P<day>{_DAY})(?P<clock>{_CLOCK}){_CLOSE}\s+(?P<name>[^:：]{{1,40}})[:：]?"
)
_NAME_FIRST = re.compile(
    rf"(?P<name>[^:：]{{1,40}}?)[,，]?\s+{_OPEN}(?P<day>{_DAY})?(?P<clock>{_CLOCK}){_CLOSE}[:：]?"
)
# LINE, a messenger, exports a message as time, tab, name, tab, text.
_TABS = re.compile(rf"(?P<clock>{_CLOCK})\t(?P<name>[^\t]{{1,40}})\t(?P<text>.*)")
_NICK = re.compile(r"<(?P<name>[^<>]{1,30})>\s*(?P<text>.+)")
_MARKS = r"(?:[-*•>#]++\s*+)?(?:\d++[.、)）]\s*+)?\**+"  # marks before a name: "- ", "1. ", "## ", "**"
_PLAIN = re.compile(rf"{_MARKS}(?P<name>[^:：\s*-][^:：*]{{0,19}}?)\**\s*[:：]\**\s*(?P<text>\S.*)")
_ABOVE = re.compile(rf"{_MARKS}(?P<name>[^:：\s*-][^:：*]{{0,19}}?)\**\s*[:：]\**")
_TIMED, _UNTIMED = (_TABS, _INLINE, _TIME_FIRST, _NAME_FIRST), (_PLAIN, _NICK, _ABOVE)
_NOTICE = re.compile(rf"\u200e?{_OPEN}{_DAY}{_CLOCK}|[-—=–\s]*{_DATE}[-—=–\s]*$|[-—=–]{{6,}}$")
# `_NUMBER`: text that is not part of a name: an account number in brackets after the name, or a title in
# brackets before the name.
_NUMBER = re.compile(r"(?:\s*[(（<][^()（）<>]*[)）>])+$|^(?:【[^】]*】|\[[^\]]*\])\s*")
_PICTURE = re.compile(r"(?:\[[^\[\]]{1,12}\]|<[^<>]{3,30}>|\u200e?(?:image|video|audio|sticker) omitted)$")
_LEVELS = {"info", "warn", "warning", "error", "debug", "trace", "fatal", "critical", "notice"}
# `_ASK`, `_REPLY`: words that stand in place of a speaker's name in a list of questions and answers. In such
# a list, each question is a conversation of its own.
_ASK = ("q", "question", "问", "问题", "提问", "問", "問題", "提問", "ask")
_REPLY = ("a", "answer", "答", "答案", "回答", "答复", "答覆", "reply")
_ANSWERING = ("客服", "卖家", "商家", "店家", "助手", "助理", "机器人", "機器人", "assistant", "bot")
_ASKING = ("客户", "买家", "用户", "顾客", "访客", "客戶", "用戶", "顧客", "訪客")
_MOST_ROWS = 0.9  # a table is a chat log if at least this share of its rows has a speaker and a text


class Message(NamedTuple):
    """One message of one speaker."""

    line: int
    name: str
    text: str
    day: str
    minute: int  # minutes since midnight, or since 1970 if the time is one number; -1: unknown
    is_block: bool  # True if a blank line, a date or a line of dashes stands above the message


@dataclass(frozen=True)
class ChatLog:
    """The conversations of a chat log."""

    records: list[Record]  # one record for each conversation, with the value {"messages": [...]}
    note: str  # a sentence for the user: how minigpt interpreted the log


def holds_chat(text: str) -> bool:
    """Return True if a text begins like a chat log, or like a .conv or YAML file of a chatbot's dialogues."""
    return dialogues_in(text) is not None or _layout(text) is not None


def read_chat(text: str, path: Path, speaker: str = "", encoding: str = "") -> ChatLog | None:
    """Read a chat log. Return None if the text is not a chat log.

    Args:
        speaker: name of the speaker who answers; "": the function chooses one.
        encoding: the encoding that the user gave. Notes and errors suggest commands, which repeat it.

    Raises:
        InputError: if it is not clear who answers; the error lists the speakers.
    """
    if dialogues := dialogues_in(text):
        return ChatLog(dialogues, f"{path}: {len(dialogues):,} dialogues, user and assistant in turn")
    layout = _layout(text)
    if layout is None:
        return None
    messages = [each for each in _messages(text, layout) if not _is_role(each.name, "system")]
    names = {each.name for each in messages}
    is_faq = layout in _UNTIMED and all(_plain_name(name) in (*_ASK, *_REPLY) for name in names)
    divided, rule = _divided(messages, layout in _TIMED, is_faq)
    as_text = f"as plain text: {advised('train --text', path, encoding)}"
    return _chat_log(divided, rule, is_faq, path, speaker, as_text)


def _chat_log(
    divided: list[list[Message]], rule: str, is_faq: bool, path: Path, speaker: str, as_text: str
) -> ChatLog:
    counts = Counter(each.name for part in divided for each in part)
    answering, why = _answering(counts, divided, path, speaker, as_text)
    records = [
        Record(part[0].line, {"messages": turns}, "")
        for whole in divided
        for part, turns in _parts(whole, answering, is_faq)
    ]
    others = [name for name, _ in counts.most_common() if name not in answering]
    if others and not is_faq:
        why = f"{why}; another one: --speaker {others[0]!r}"
    rule = "; ".join(filter(None, (rule, as_text)))
    note = (
        f"{path}: a chat log, {counts.total():,} messages of {len(counts):,} speakers: the answers are those "
        f"of {', '.join(map(repr, sorted(answering)))} ({why}); {rule}"
    )
    return ChatLog(records, note)


# -- tables with a message in each row ---------------------------------------------------------------------


class MessageColumns(NamedTuple):
    """The names of the columns of a table with one message per row. "": the table has no such column."""

    speaker: str
    text: str
    time: str
    number: str


def _columns(items: Sequence[Mapping[str, Any]]) -> MessageColumns | None:
    """Return the columns of a table of chat messages; None for any other table.

    Most rows must have a speaker and a text, and a speaker must have two rows or more on average.
    """
    counts = Counter(key for item in items for key in item if item[key] not in (None, ""))
    least = max(_FEWEST, _MOST_ROWS * len(items))
    found = [
        next((name for name in names if counts[name] >= least), "") for names in MESSAGE_COLUMNS.values()
    ]
    columns = MessageColumns(*found)
    others = [key for key in counts if key not in columns]
    if not columns.speaker or not columns.text or (len(others) > 1 and is_head(others)):
        return None
    names = Counter(str(item.get(columns.speaker)).strip() for item in items)
    roles = {_role(name) for name in names}
    is_few = len(names) > 1 and 2 * len(names) <= len(items)
    return (
        columns
        if is_few and (roles - {"system"} == {"user", "assistant"} or columns.time or columns.number)
        else None
    )


def message_columns(values: Iterable[Any], names: FieldNames) -> MessageColumns | None:
    """Return the columns of a table if its first records are messages of a chat log; else None."""
    items = [lower_keys(value) for value in values if isinstance(value, Mapping)]
    if names.question:
        return None
    if len(items) >= _FEWEST and all(item.keys() == {"0", "1"} for item in items):  # no column names
        speakers = {str(item["0"]).strip() for item in items}
        is_log = {_role(name) for name in speakers} - {"system"} == {"user", "assistant"}
        # On average, a speaker must have at least two rows. This excludes a list of words with translations,
        # such as "客户, customer", because each word has only one row.
        return MessageColumns("0", "1", "", "") if is_log and 2 * len(speakers) <= len(items) else None
    return _columns(items)


def read_messages(
    records: Iterable[Record], columns: MessageColumns, path: Path, speaker: str = ""
) -> ChatLog:
    """Group records into conversations. Each record is one message.

    If a record has no speaker or no text, the log has a record with a BadLine (the reason) in its place.

    Raises:
        InputError: if it is not clear who answers; the error lists the speakers.
    """
    bad: list[Record] = []
    messages: dict[str, list[Message]] = {}  # id of a conversation -> its messages
    for record in records:
        try:
            if isinstance(record.value, BadLine):
                raise record.value
            item = lower_keys(record.value) if isinstance(record.value, Mapping) else {}
            name = text_of(item, columns.speaker).strip()
            text = words_of(item.get(columns.text), f"`{columns.text}`").strip()
            if _is_role(name, "system"):
                raise BadLine("a message of the system, no question and no answer")
        except BadLine as reason:
            bad.append(Record(record.line, reason, ""))
            continue
        if _PICTURE.match(text):
            continue
        number, time = (str(item.get(key) or "").strip() for key in (columns.number, columns.time))
        day, minute = _moment(time)
        messages.setdefault(number, []).append(Message(record.line, name, text, day, minute, False))
    divided: list[list[Message]] = []
    is_faq = all(_plain_name(each.name) in (*_ASK, *_REPLY) for some in messages.values() for each in some)
    rule = f"each `{columns.number}` is a conversation"
    for some in messages.values():
        if columns.number:
            divided.append(some)
        else:
            divided, rule = _divided(some, bool(columns.time), is_faq and not columns.time)
    as_text = f"as plain text: {advised('train --text', path)}" if path.is_file() else ""
    log = _chat_log(divided, rule, is_faq, path, speaker, as_text)
    return replace(log, records=sorted([*log.records, *bad], key=lambda record: record.line))


def _moment(time: str) -> tuple[str, int]:
    """Return the day of a time ("": unknown), and the minute of this day (-1: unknown).

    A time that is a number of seconds or milliseconds since 1970 gives "" and the minutes since 1970.

    >>> _moment("2024-01-02T10:05:00"), _moment("1700000000")
    (('2024-01-02', 605), ('', 28333333))
    """
    if re.fullmatch(r"\d{9,13}(?:\.\d+)?", time):
        seconds = float(time)
        return "", int(seconds / (1000 if seconds > 1e11 else 1)) // 60
    found = re.search(_CLOCK, time)
    return (time[: found.start()].strip(" T"), _minute(found[0])) if found else (time, -1)


# -- recognising the form of the messages ------------------------------------------------------------------


def _layout(text: str) -> re.Pattern[str] | None:
    sample = text[:_SAMPLE]
    lines = sample.split("\n")[: None if len(sample) == len(text) else -1]
    some = [line for line in map(str.strip, lines) if line][:_LINES]
    for layout in (*_TIMED, *_UNTIMED):
        names = Counter(_name(found) for line in some if (found := layout.fullmatch(line)))
        if _is_layout(layout, names, len(some)):
            return layout
    return None


def _is_layout(layout: re.Pattern[str], names: Counter[str], lines: int) -> bool:
    said = names.total()
    if said < _FEWEST or len(names) < 2 or 2 * len(names) > said:
        return False
    if not all(re.search(r"[^\W\d_]", name) for name in names):  # a name has a letter; a time has none
        return False
    if any(name.split()[0].lower() in _LEVELS for name in names if name.split()):
        return False
    if layout in _TIMED:
        return said >= 0.15 * lines
    roles = [_role(name) for name in names]
    if not ("assistant" in roles and "user" in roles and None not in roles) and len(names) != 2:
        return False
    has_more = all(roles) or layout is _ABOVE  # True: lines without a name may continue a message
    return said >= (0.2 if has_more else 0.8) * lines


def _name(found: re.Match[str]) -> str:
    given = found.groupdict()
    name = str(given.get("nick") or given["name"]).strip()
    name = _NUMBER.sub("", name).strip() or name
    plain = _plain_name(name)
    return plain if plain in (*_ASK, *_REPLY) else name  # "Q1", "Q2", ... are one speaker


def _plain_name(name: str) -> str:
    return re.sub(r"[\d.、\s#]+", "", name).lower()


def _role(name: str) -> Role | None:
    plain = _plain_name(name)
    if plain in ROLES:
        return ROLES[plain]
    if plain in FIELDS["answer"] or plain in _REPLY or any(part in plain for part in _ANSWERING):
        return "assistant"
    is_asking = plain in FIELDS["question"] or plain in _ASK or any(part in plain for part in _ASKING)
    return "user" if is_asking else None


def _is_role(name: str, role: Role) -> bool:
    return _role(name) == role or (role == "system" and name in ("系统消息", "微信团队"))


# -- messages ----------------------------------------------------------------------------------------------


def _messages(text: str, layout: re.Pattern[str]) -> Iterator[Message]:
    """Yield the messages that have a text. Lines before the first message are left out."""
    last: Message | None = None
    said: list[str] = []
    is_block = True
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        found = layout.fullmatch(line)
        if found is not None:
            yield from _whole(last, said)
            given = found.groupdict()
            minute = _minute(given["clock"]) if "clock" in given else -1
            last = Message(number, _name(found), "", (given.get("day") or "").strip(), minute, is_block)
            said, is_block = [_plain(given.get("text") or "")], False
        elif layout in _TIMED and _NOTICE.match(line):
            yield from _whole(last, said)
            last, said, is_block = None, [], True
        elif line:
            said.append(line)
        else:
            said.append("")
            is_block = True
    yield from _whole(last, said)


def _plain(text: str) -> str:
    """Remove ** at the end of a message if the opening ** stood before the speaker, as in "**Q: what?**".

    >>> _plain("what?**"), _plain("**what**?")
    ('what?', '**what**?')
    """
    return text[:-2].rstrip() if text.endswith("**") and text.count("**") == 1 else text


def _whole(message: Message | None, lines: Sequence[str]) -> Iterable[Message]:
    text = "\n".join(line for line in lines if not _PICTURE.match(line)).strip()
    return [message._replace(text=text)] if message is not None and text else []


def _minute(clock: str) -> int:
    """Return the minutes since midnight.

    >>> _minute("下午 3:05"), _minute("11:59:01 PM"), _minute("12:10 am")
    (905, 1439, 10)
    """
    hour, minute = (int(part) for part in re.findall(r"\d+", clock)[:2])
    is_late = re.search(r"[Pp]\.?[Mm]|下午|晚上", clock)
    is_early = re.search(r"[Aa]\.?[Mm]|凌晨|上午|早上", clock)
    if is_late and hour < 12:
        hour += 12
    elif is_early and hour == 12:
        hour = 0
    return 60 * hour + minute


# -- conversations -----------------------------------------------------------------------------------------


def _divided(messages: Sequence[Message], is_timed: bool, is_faq: bool) -> tuple[list[list[Message]], str]:
    """Divide messages into conversations. Return the conversations, and a sentence with the rule used."""
    if is_faq:
        return [list(messages)], "each question with its answer is an example of its own"
    if is_timed:
        ends = [
            (last.day and each.day and each.day != last.day) or not 0 <= each.minute - last.minute <= _PAUSE
            for last, each in itertools.pairwise(messages)
        ]
        return _cut(messages, list(map(bool, ends))), (
            f"a pause of {_PAUSE} minutes, another day, or {_ANSWERS} answers end a conversation"
        )
    blocks = _cut(messages, [each.is_block for each in messages[1:]])
    if len(blocks) > 1 and 2 * sum(len(block) > 1 for block in blocks) > len(blocks):
        return blocks, "a blank line ends a conversation"
    return [list(messages)], f"{_ANSWERS} answers make a conversation"


def _cut(messages: Sequence[Message], ends: Sequence[bool]) -> list[list[Message]]:
    found: list[list[Message]] = [[]]
    for message, is_new in zip(messages, [False, *ends]):
        if is_new:
            found.append([])
        found[-1].append(message)
    return found


def _answering(
    counts: Counter[str], divided: Sequence[Sequence[Message]], path: Path, speaker: str, as_text: str
) -> tuple[set[str], str]:
    """Return the names of the speakers who answer, and the reason in words, for the note to the user."""
    listed = ", ".join(f"{name!r} ({count:,})" for name, count in counts.most_common(_SHOWN))
    if speaker:
        found = {name for name in counts if name.strip().lower() == speaker.strip().lower()}
        if not found:
            raise InputError(f"{path} has no speaker {speaker!r} (--speaker); there are {listed}")
        return found, "--speaker"
    found = {name for name in counts if _is_role(name, "assistant")}
    if found and len(found) < len(counts):
        return found, "by name"
    more = f"; {as_text}" if as_text else ""
    major = [name for name, count in counts.items() if count >= _MINOR * counts.total()]
    if len(major) != 2:
        raise InputError(
            f"{path} is a chat log of {len(counts):,} speakers, {listed}: name the one whose messages are "
            f"the answers with --speaker NAME{more}"
        )
    begun = Counter(part[0].name for part in divided if part)
    first, second = major
    chosen = second if begun[first] >= begun[second] else first
    return {chosen}, "the other one begins more often"


def _parts(
    messages: Sequence[Message], answering: set[str], is_faq: bool
) -> Iterator[tuple[list[Message], list[dict[str, str]]]]:
    """Divide one part of a log, such as the messages between two long pauses, into conversations.

    A conversation begins with a question and ends with an answer. Answers before the first question, and
    questions after the last answer, are left out.

    Yields: for each conversation, the messages of its first turn, and all of its turns.
    """
    turns: list[tuple[str, list[Message]]] = []
    for message in messages:
        role = "assistant" if message.name in answering else "user"
        if turns and turns[-1][0] == role and not is_faq:
            turns[-1][1].append(message)
        elif turns or role == "user":
            turns.append((role, [message]))
    most = 2 if is_faq else 2 * _ANSWERS
    if is_faq:  # keep a question only if an answer follows; keep only the first answer
        pairs = [
            (one, two) for one, two in itertools.pairwise(turns) if (one[0], two[0]) == ("user", "assistant")
        ]
        turns = [turn for pair in pairs for turn in pair]
    elif turns and turns[-1][0] == "user":
        turns.pop()
    for first in range(0, len(turns), most):
        some = turns[first : first + most]
        yield (
            some[0][1],
            [{"role": role, "content": "\n".join(each.text for each in said)} for role, said in some],
        )
