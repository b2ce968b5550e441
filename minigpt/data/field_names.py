"""Lists the names that fields and columns may have, and tells whether a table's row holds column names.

Upper and lower case count as equal. Most names are English or Chinese. Options of a command can give other
names.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from minigpt.data.conversation import SPEAKER_KEYS, TEXT_KEYS
from minigpt.data.json_values import NESTED
from minigpt.errors import InputError

__all__ = [
    "ALIKE", "DESCRIPTIONS", "FIELDS", "LAST", "MESSAGE_COLUMNS", "OPTION", "OPTIONS", "PARTNERS", "TITLES",
    "DataOptions", "FieldNames", "has_answers", "head_test", "is_doubtful", "is_head",
]  # fmt: skip

FIELDS: dict[str, tuple[str, ...]] = {  # part of a record -> field names, the most usual names first
    "question": (
        *("question", "prompt", "instruction", "query", "q", "human", "ask", "problem"),
        *("问题", "提问", "指令", "问", "问句", "問題", "提問", "問", "問句"),
        *("frage", "pregunta", "pergunta", "domanda", "вопрос", "質問", "질문"),
        *("user", "用户", "用戶", "source"),
    ),
    "answer": (
        *("answer", "completion", "output", "response", "reply", "solution", "answers"),
        *("答案", "回答", "输出", "回复", "答", "答复", "輸出", "回覆", "答覆"),
        *("antwort", "réponse", "respuesta", "resposta", "risposta", "ответ", "答え", "답변"),
        *("assistant", "bot", "gpt", "助手", "target", "a"),
    ),
    "input": ("input", "context", "输入", "輸入"),
    "system": ("system", "system_prompt", "系统", "系统提示", "系統", "系統提示"),
    "history": ("history", "历史", "歷史"),
    "turns": (
        *("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat", "contents"),
        *("对话", "消息", "對話", "訊息"),
    ),
    "text": (
        *("text", "content", "内容", "文本", "正文", "內容", "body", "passage", "document", "article"),
        *("paragraphs",),
    ),
    "tools": ("tools",),
}
# For a table with one chat message in each row: part of a message -> usual names of its column.
MESSAGE_COLUMNS: dict[str, tuple[str, ...]] = {
    "speaker": (
        *SPEAKER_KEYS,
        *("talker", "nickname", "from_name", "发送人", "发送者", "发送方", "发言人", "说话人", "昵称"),
        *("發送人", "發送者", "發言人", "說話人", "暱稱"),
    ),
    "text": (*TEXT_KEYS, "message", "msg", "strcontent", "消息内容", "聊天内容", "消息", "訊息內容", "訊息"),
    "time": (
        *("time", "date", "timestamp", "datetime", "created_at", "createtime", "strtime"),
        *("时间", "发送时间", "日期", "時間", "發送時間"),
    ),
    "number": (
        *("conversation_id", "session_id", "dialog_id", "dialogue_id", "chat_id", "thread_id"),
        *("会话id", "对话id", "会话编号", "会话号"),
    ),
}
# A field `user` or `source` may hold the question, but also a person's name, or the record's origin. So it
# counts as the question only if no other field holds the question, and if the answer is in one of the fields
# on the right (its partners).
PARTNERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("user", "用户", "用戶"), ("assistant", "bot", "gpt", "助手", "机器人")),
    "source": ("target",),
}
# Matches the name of a field that holds one option of a multiple-choice question: A, 选项A, A选项, option_a.
# The pattern's group is the option's letter.
OPTION = re.compile(r"(?:选项|選項|option|choice|op)?[ _.]?([a-h])[.、:：]?(?:选项|選項)?")
# names of a field that holds all options of a multiple-choice question
OPTIONS = ("choices", "options", "选项", "選項")
# Fields that may stand beside a question and its answer, such as an id, a time or a system text. If a record
# has only such fields beside `user` and the answer, `user` holds the question, whatever the name of the
# answer's field is. Beside any other field, `user` may hold a person's name.
_NO_TEXT = {"id", "index", "", *MESSAGE_COLUMNS["time"], *MESSAGE_COLUMNS["number"]}
_NO_TEXT |= {"label", "score", "weight", "category", "类别", *FIELDS["system"], *FIELDS["history"], "tools"}
LAST = {"question": tuple(PARTNERS), "answer": ("assistant", "bot", "gpt", "助手", "target", "a")}
# Matches what may follow a field's name: a note in brackets, such as （必填）, and then a colon or "*".
_NOTE = r"(?:\s*[（(\[【].{0,12}[）)\]】])?\s*[:：*]?"
# Longer field names, such as 客户问题 and 标准回答, or user_question and answer_text. They are used if
# the record has no field with a usual name (see `FIELDS`).
ALIKE = {
    "question": re.compile(
        r"\*?(?:.{0,8}(?:问题|提问|问句|問題|提問)(?:内容|描述|文本)?|(?:\w+[ _])?question(?:[ _]text)?)"
        + _NOTE
    ),
    "answer": re.compile(
        r"\*?(?:.{0,8}(?:答案|回答|答复|回复|回覆|答覆)(?:内容|文本)?"
        r"|(?:\w+[ _])?(?:answer|response)(?:[ _]text)?)" + _NOTE
    ),
}
# Words in a field's name that exclude it: related_question is not the question, wrong_answer not the answer.
OTHER = {
    "question": re.compile(
        r"(?<![a-z])(?:next|follow\w*|related|previous)(?![a-z])|下一|上一|追加|追问|追問|相关|相關"
    ),
    "answer": re.compile(
        r"(?<![a-z])(?:wrong|incorrect|reject\w*|bad|worse|negative|distract\w*)(?![a-z])"
        r"|错|錯|误|誤|拒|差评|较差|較差|差的|差回|干扰|干擾"
    ),
}
# Fields of a forum's question: `TITLES` for its title, `DESCRIPTIONS` for its details.
TITLES = ("title", "标题", "题目", "標題", "題目")
DESCRIPTIONS = ("desc", "description", "描述", "问题描述")
_LONGEST_NAME = 30  # largest number of characters of a column's name; a longer cell is a text


@dataclass(frozen=True)
class FieldNames:
    """Field names given by the user. An empty name means that the usual names are tried."""

    question: str = ""
    answer: str = ""
    speaker: str = ""  # for a chat log: the name of the speaker who answers

    def __post_init__(self) -> None:
        if bool(self.question) != bool(self.answer):
            raise InputError("--question_field and --answer_field go together: give both")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options for reading a data file."""

    # How the data is read
    encoding: str = ""
    """encoding of the data file, such as gb18030 or big5; left out: found out"""
    question_field: str = ""
    """name of the question's field or column; left out: the usual names are known"""
    answer_field: str = ""
    """name of the answer's field or column"""
    speaker: str = ""
    """of a chat log: name of the speaker whose messages are the answers; left out: found out, or asked for"""
    strict: bool = False
    """stop at the first bad record instead of skipping it"""

    @property
    def field_names(self) -> FieldNames:
        """Return the field names given by the user."""
        return FieldNames(self.question_field, self.answer_field, self.speaker)


def is_head(cells: Collection[str]) -> bool:
    """Return True if cells in lower case are the column names of a table of conversations or texts.

    >>> is_head(["id", "question", "answer"]), is_head(["label", "text"]), is_head(["hello", "text and more"])
    (True, True, False)
    """
    found = {part for part, names in FIELDS.items() if set(names) & set(cells)}
    found |= {part for part, pattern in ALIKE.items() if sum(map(bool, map(pattern.fullmatch, cells))) == 1}
    of_messages = {part for part, names in MESSAGE_COLUMNS.items() if set(names) & set(cells)}
    if len(cells) == 1:
        return bool(found | of_messages)
    known = {"speaker", "text"} <= of_messages
    known |= (
        {"question", "answer"} <= found or {"input", "answer"} <= found or bool(found & {"turns", "text"})
    )
    known |= "answer" in found and bool(set(TITLES) & set(cells))
    known |= bool((NESTED.keys() - {"prompt"}) & set(cells)) or set(cells) == {"id", "data"}
    return known and all(len(cell) <= _LONGEST_NAME for cell in cells)


def is_doubtful(question: str | None, answer: str | None, names: Collection[str]) -> bool:
    """Return True if the field taken for the question may hold the name of a person or a source instead.

    Args:
        names: the names of all fields of the record.

    >>> [is_doubtful("user", "reply", ["user", "reply", *more]) for more in (["review"], ["time"], [])]
    [True, False, False]
    """
    if question not in PARTNERS or answer in PARTNERS[question]:
        return False
    others = [name for name in names if name not in (question, answer)]
    return bool(others) and (question == "source" or not _NO_TEXT.issuperset(others))


def has_answers(cells: Collection[str]) -> bool:
    """Return True if one of the column names, which are in lower case, is a name for answers.

    >>> has_answers(["问题", "答案"]), has_answers(["title", "content"])
    (True, False)
    """
    return any(cell in FIELDS["answer"] or ALIKE["answer"].fullmatch(cell) for cell in cells)


def head_test(names: FieldNames) -> Callable[[Collection[str]], bool]:
    """Return a function that gets the cells of a table's first row, and tells if they are column names.

    With field names given by the user: True if a cell is one of these names. Without: `is_head`.
    """
    own = {name.strip().lower() for name in (names.question, names.answer) if name}
    return (lambda cells: bool(own & set(cells))) if own else is_head
