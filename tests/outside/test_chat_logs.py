"""Chat logs as messengers export them: which files become conversations, and which stay texts."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from minigpt.data.chat_logs import holds_chat
from minigpt.data.corpus import read_texts, recognise
from minigpt.data.field_names import FieldNames
from minigpt.data.reader import read_conversations
from minigpt.errors import InputError
from tests.commands import RunCommand

SAID = [
    ("小明", "在吗？"),
    ("小红", "在的，\n什么事？"),
    ("小明", "去公园吗"),
    ("小红", "去。"),
    ("小红", "几点？"),
]
TALK = [
    ("user", "在吗？"),
    ("assistant", "在的，\n什么事？"),
    ("user", "去公园吗"),
    ("assistant", "去。\n几点？"),
]
PREFACE = "消息记录（文本格式）\n\n================\n消息分组:我的好友\n================\n消息对象:小红\n\n"


def lines(form: str, said: list[tuple[str, str]] = SAID, **more: Any) -> str:
    """Return the log of a conversation. {n} in `form` is the number of the message."""
    return "".join(form.format(n=n, name=name, text=text, **more) for n, (name, text) in enumerate(said))


LOGS = {
    "QQ": PREFACE + lines("2024-01-02 10:0{n}:00 {name}(1000{n})\n{text}\n\n"),
    "QQ, the name first": lines("{name}(10001) 2024-01-02 10:0{n}:00\n{text}\n\n"),
    "QQ, a mail address": lines("2024-01-02 10:0{n}:00 {name}<a@b.org>\n{text}\n\n"),
    "QQ, a title": lines("2024-01-02 10:0{n}:00 【群主】{name}(10001)\n{text}\n"),
    "WeChat": lines("{name} 2024/1/2 10:0{n}\n{text}\n"),
    "WeChat, a Chinese date": lines("{name} 2024年1月2日 上午10:0{n}\n{text}\n\n"),
    "WeChat by mail": "———— 2024-01-02 ————\n\n" + lines("{name}  10:0{n}\n\n{text}\n\n"),
    "WhatsApp": "12/31/23, 10:00 PM - Messages are encrypted.\n"
    + lines("12/31/23, 10:0{n} PM - {name}: {text}\n"),
    "WhatsApp on a phone": lines("[31.12.23, 22:0{n}:03] {name}: {text}\n"),
    "WhatsApp at midnight": lines("12/31/23, 12:1{n} AM - {name}: {text}\n"),
    "Telegram": lines("{name}, [31.12.2023 22:0{n}]\n{text}\n\n"),
    "time in brackets": lines("[2024-01-02 10:0{n}:00] {name}: {text}\n"),
    "a time alone": lines("10:0{n} {name}：{text}\n"),
    "IRC": lines("[10:0{n}] <{name}> {text}\n"),
    "pictures": lines(
        "2024-01-02 10:00:00 {name}\n{text}\n", [("小明", "[图片]"), *SAID, ("小明", "[动画表情]")]
    ),
    "names and texts": lines("{name}：{text}\n", [(name, text.replace("\n", "")) for name, text in SAID]),
    "names above texts": lines("{name}:\n{text}\n\n"),
    "Windows": lines("2024-01-02 10:0{n}:00 {name}\n{text}\n\n").replace("\n", "\r\n"),
}


@pytest.mark.parametrize("codec", ["utf-8", "utf-16", "gb18030"])
@pytest.mark.parametrize("kind", LOGS)
def test_logs(tmp_path: Path, kind: str, codec: str) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(LOGS[kind].encode(codec))
    expected = TALK
    if kind == "names and texts":
        expected = [(role, text.replace("，\n", "，")) for role, text in TALK]
    assert not recognise(path).holds_texts
    ((conversation,), report) = read_conversations(path)
    assert [tuple(turn) for turn in conversation.turns] == expected
    assert report.skipped == []
    note = report.notes[-1]
    assert "the answers are those of '小红'" in note
    assert "another one: --speaker '小明'" in note
    (swapped, *_), _ = read_conversations(path, names=FieldNames(speaker="小明"))
    assert swapped.answer.startswith("去公园吗")
    assert "".join(read_texts(path)) == LOGS[kind].replace("\r\n", "\n"), "--text reads it as it is"


NO_LOGS = {
    "a program's log": lines("2024-01-02 10:0{n}:00 {name}: {text}\n", [("INFO", "a"), ("ERROR", "b")] * 3),
    "a play of many": lines("{name}: {text}\n", [(f"第{n % 3}人", "话") for n in range(9)]),
    "fields": "name: a\nage: 3\ncity: b\nname: c\nage: 4\ncity: d\n",
    "subtitles": lines("[00:1{n}.00]{text}\n", [("", "第一句")] * 6),
    "a diary": lines("2024-01-0{n} 星期二 晴\n{text}\n", [("", "今天很好。")] * 6),
    "a timetable": "会议 10:00\n讨论\n午饭 12:00\n吃饭\n出发 14:00\n坐车\n到达 18:00\n回家\n",
    "a novel": "他说：“你好。”\n她说：“再见。”\n山中有一座小庙，庙里住着和尚。\n" * 4,
    "a program's log without times": lines("{name} 7: {text}\n", [("Info", "a"), ("Error", "b")] * 3),
    "a monologue": lines("2024-01-02 10:0{n}:00 {name}\n{text}\n", [("小明", "在")] * 6),
}


# Patterns that try a text in all ways need minutes to years for these.
SLOW = {
    "a ruler of #": "#" * 40 + "\nNotes, taken by hand.\n\n- one\n- two\n",
    "a banner": "# " + "-" * 60 + "\n# Notes!\nBy hand.\n- one\n- two\n",
    "keys": "key:\n  " * 40 + "No key\n- one\n- two\n",
    "spaces": " " * 20_000 + "x!\n- one\n- two\n",
    "spaces behind a time": "10:00" + " " * 15_000 + "x\n",
    "stars": "*" * 15_000 + "x\n",
}


@pytest.mark.parametrize("kind", SLOW)
def test_texts_that_almost_have_a_form_are_told_at_once(kind: str) -> None:
    assert not holds_chat(SLOW[kind])


def test_many_spaces_in_tables_and_turns(tmp_path: Path) -> None:
    spaces = " " * 50_000
    path = tmp_path / "d"
    path.write_text(f"| question | answer |\n|---|---|\n| a | b |\n{spaces}x\n")
    (conversation,), _ = read_conversations(path)
    assert (conversation.question, conversation.answer) == ("a", "b")
    path.write_text(
        json.dumps({"text": f"<|im_start|>user\na{spaces}b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"})
    )
    (conversation,), _ = read_conversations(path)
    assert (conversation.question, conversation.answer) == (f"a{spaces}b", "c")


@pytest.mark.parametrize("kind", NO_LOGS)
def test_texts_that_are_no_logs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d.txt"
    path.write_text(NO_LOGS[kind], encoding="utf-8")
    assert recognise(path).holds_texts
    with pytest.raises(InputError, match="is plain text"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("ask", "answer"), [("问", "答"), ("Q", "A"), ("Question", "Answer"), ("Q{n}", "A{n}"), ("{n}. 问", "答")]
)
def test_questions_and_answers_in_lines(tmp_path: Path, ask: str, answer: str) -> None:
    form = f"{ask}：天{{n}}？\n{answer}：蓝。\n真蓝。\n\n"
    (tmp_path / "faq.txt").write_text("".join(form.format(n=n) for n in range(1, 5)), encoding="utf-8")
    conversations, report = read_conversations(tmp_path / "faq.txt")
    assert [(each.question, each.answer) for each in conversations] == [
        (f"天{n}？", "蓝。\n真蓝。") for n in range(1, 5)
    ]
    assert "each question with its answer is an example" in report.notes[-1]
    assert [each.line for each in conversations] == [1, 5, 9, 13]


def test_what_ends_a_conversation(tmp_path: Path) -> None:
    hours = (9, 9, 9, 9, 12, 12, 23, 23)
    said = [(name, f"{n}") for n, name in enumerate(["小明", "小红"] * 4)]
    form = "2024-01-0{day} {hour}:0{n}:00 {name}\n{text}\n"
    text = "".join(
        form.format(day=1 + (n > 6), hour=hour, n=n, name=name, text=words)
        for n, (hour, (name, words)) in enumerate(zip(hours, said))
    )
    path = tmp_path / "d"
    path.write_text(text, encoding="utf-8")
    conversations, _ = read_conversations(path)
    # The last two messages are of two days: a question, and an answer without a question.
    assert [[turn.content for turn in each.turns] for each in conversations] == [list("0123"), list("45")]

    path.write_text(lines("{name}：{text}\n", said * 4), encoding="utf-8")
    assert [len(each.exchanges) for each in read_conversations(path)[0]] == [8, 8]
    blocks = "".join(lines("{name}：{text}\n", said[:size]) + "\n" for size in (4, 2, 6))
    path.write_text(blocks, encoding="utf-8")
    conversations, report = read_conversations(path)
    assert [len(each.exchanges) for each in conversations] == [2, 1, 3]
    assert "a blank line ends a conversation" in report.notes[-1]


def test_the_one_with_the_name_of_a_role_answers(tmp_path: Path) -> None:
    said = [
        ("客服小美", "您好"),
        ("王先生", "多少钱"),
        ("客服小美", "十元"),
        ("李女士", "在吗"),
        ("客服小张", "在"),
    ]
    path = tmp_path / "d"
    path.write_text(lines("2024-01-02 10:0{n}:00 {name}\n{text}\n", said * 2), encoding="utf-8")
    (conversation,), report = read_conversations(path)
    assert [turn.content for turn in conversation.turns][:4] == ["多少钱", "十元", "在吗", "在\n您好"]
    assert "'客服小张', '客服小美' (by name" in report.notes[-1]


def test_a_group_is_asked_about(tmp_path: Path, run_command: RunCommand) -> None:
    said = [(name, f"{name}{n}") for n, name in enumerate(["甲", "乙", "丙"] * 4)]
    path = tmp_path / "group.txt"
    path.write_text(lines("2024-01-02 10:00:{n:02} {name}\n{text}\n", said), encoding="utf-8")
    result = run_command("vocab", "--data", path, "--output", tmp_path / "v.json")
    assert result.code == 2
    assert "3 speakers, '甲' (4), '乙' (4), '丙' (4): name the one" in result.err
    assert len(result.err.splitlines()) == 1
    wrong = run_command("vocab", "--data", path, "--output", tmp_path / "v.json", "--speaker", "丁")
    assert (wrong.code, "has no speaker '丁'" in wrong.err) == (2, True)
    split = (
        "split",
        "--input",
        path,
        "--output_dir",
        tmp_path / "s",
        "--speaker",
        "丙",
        "--train_ratio",
        0.5,
    )
    path.write_text(
        lines(
            "2024-01-02 1{n}:00:00 甲\n{text}\n2024-01-02 1{n}:00:10 乙\n嗯\n2024-01-02 1{n}:00:20 丙\n好\n",
            said[:4],
        ),
        encoding="utf-8",
    )
    done = run_command(*split)
    assert done.code == 0, done.err
    records = [
        json.loads(line)
        for side in ("train", "val")
        for line in (tmp_path / "s" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(record["question"] for record in records) == sorted(f"{text}\n嗯" for _, text in said[:4])


def test_no_message_is_said_twice(tmp_path: Path) -> None:
    """Every message between the first question and the last answer is in one turn."""
    said = [("小明" if n % 3 else "小红", f"话{n}话") for n in range(2, 58)]
    path = tmp_path / "d"
    path.write_text(lines("2024-01-02 10:{n:02}:00 {name}\n{text}\n", said), encoding="utf-8")
    conversations, _ = read_conversations(path)
    contents = itertools.chain(*([turn.content for turn in each.turns] for each in conversations))
    assert "\n".join(contents).split("\n") == [text for _, text in said]


@pytest.mark.parametrize(
    "form", ["- question: {q}\n  answer: {a}\n", "**Q:** {q}\n\n**A:** {a}\n\n", "* 问：{q}\n* 答：{a}\n"]
)
def test_marks_of_lists_and_headings(tmp_path: Path, form: str) -> None:
    pairs = [(f"天{n}？", f"蓝{n}。") for n in range(4)]
    path = tmp_path / "faq.md"
    path.write_text("# 常见问题\n\n" + "".join(form.format(q=q, a=a) for q, a in pairs), encoding="utf-8")
    assert [(each.question, each.answer) for each in read_conversations(path)[0]] == pairs


# -- a message in each row ---------------------------------------------------------------------------------

ROWS: dict[str, tuple[list[str], Any]] = {  # name -> (columns: speaker, text, others; the row of a message)
    "JSON Lines of turns": (["role", "content"], lambda n, who, text: [("user", "assistant")[who], text]),
    "a table of a help desk": (
        ["会话ID", "发送人", "内容"],
        lambda n, who, text: [f"{n // 2}", ("王先生", "客服小美")[who], text],
    ),
    "with times": (
        ["CreateTime", "NickName", "StrContent"],
        lambda n, who, text: [1_700_000_000 + 3600 * (n // 2) + who, ("小明", "小红")[who], text],
    ),
    "with days": (
        ["date", "sender", "message"],
        lambda n, who, text: [f"2024-01-{1 + n // 2:02}T10:0{who}:00", ("小明", "小红")[who], text],
    ),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["d.csv", "d.txt", "d.jsonl", "d.json", "d.parquet"])
def test_a_message_in_each_row(tmp_path: Path, kind: str, name: str) -> None:
    head, row = ROWS[kind]
    rows = [row(n, n % 2, f"话{n}") for n in range(8)]
    path = tmp_path / name
    if name in ("d.csv", "d.txt"):
        content = "".join(",".join(map(str, cells)) + "\n" for cells in [head, *rows])
    elif name == "d.parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {key: [cells[i] for cells in rows] for i, key in enumerate(head)}
        parquet.write_table(pyarrow.table({**columns, "extra": [1] * 8}), path)
        content = ""
    else:
        records = [dict(zip(head, cells)) for cells in rows]
        content = "".join(json.dumps(each) + "\n" for each in records)
        if name == "d.json":  # as Telegram exports it
            content = json.dumps({"name": "小红", "type": "personal_chat", "messages": records})
    if content:
        path.write_text(content, encoding="utf-8")
    assert not recognise(path).holds_texts
    conversations, report = read_conversations(path)
    said = [[turn.content for turn in each.turns] for each in conversations]
    several = [[f"话{n}", f"话{n + 1}"] for n in range(0, 8, 2)]
    assert said == ([[f"话{n}" for n in range(8)]] if kind == "JSON Lines of turns" else several)
    is_conversation = (kind, name) == ("JSON Lines of turns", "d.json")  # with roles: a record as it is
    assert is_conversation or "a chat log, 8 messages of 2 speakers" in report.notes[-1]
    ending = f"; as plain text: minigpt train --text {path}"
    assert is_conversation or report.notes[-1].endswith(ending)
    assert all("; ;" not in note for note in report.notes)
    assert report.skipped == []


def test_a_list_of_words_that_are_roles_is_no_log(tmp_path: Path) -> None:
    words = [("human", "人"), ("model", "模型"), ("user", "用户"), ("assistant", "助手")]
    path = tmp_path / "words.csv"
    path.write_text("".join(f"{a},{b}\n" for a, b in words), encoding="utf-8")
    conversations, _ = read_conversations(path)
    assert [(each.question, each.answer) for each in conversations] == words


def test_rows_that_are_no_messages_are_counted(tmp_path: Path) -> None:
    rows = [{"role": ("user", "assistant")[n % 2], "content": f"话{n}"} for n in range(40)]
    lines = [json.dumps(row) for row in rows]
    lines[2:2] = ['{"role": "user", "content": ""}', "broken", '{"role": "system", "content": "s"}']
    lines.append('{"role": "user", "content": "[图片]"}')  # a picture is no text, and no bad message
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    _, report = read_conversations(path)
    assert [line for line, _ in report.skipped] == [3, 4, 5]


@pytest.mark.parametrize(
    "row",
    [
        {"from": "a", "text": "words"},  # texts of one author each, or of one
        {"speaker": "a", "question": "q", "answer": "b"},
        {
            "role": "user",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
    ],
)
def test_rows_that_are_records(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text((json.dumps(row) + "\n") * 6, encoding="utf-8")
    found = recognise(path)
    assert found.holds_texts == ("text" in row)
    if "text" not in row:
        assert len(read_conversations(path)[0]) == 6


def test_the_speaker_who_answers_in_turns_without_roles(tmp_path: Path) -> None:
    talk = {"dialogue": [{"speaker": "A", "text": "天？"}, {"speaker": "B", "text": "蓝。"}]}
    path = tmp_path / "d.jsonl"
    path.write_text((json.dumps(talk) + "\n") * 2, encoding="utf-8")
    with pytest.raises(InputError, match="--speaker NAME says who answers"):
        read_conversations(path)
    conversations, _ = read_conversations(path, names=FieldNames(speaker="b"))
    assert [(each.question, each.answer) for each in conversations] == [("天？", "蓝。")] * 2
    assert [each.raw for each in conversations] == ["", ""], "a split writes the roles"


MORE_LOGS = {
    "Chinese brackets": lines("【2024-01-02 10:0{n}:00】{name}：{text}\n"),
    "a date without a year": lines("{name}(技术部) 01-02 10:0{n}:00\n{text}\n\n"),
    "Teams": lines("[1/2 10:0{n} AM] {name}\n{text}\n"),
    "LINE": "[LINE] 聊天记录\n保存日期：2024/01/02 10:00\n\n" + lines("10:0{n}\t{name}\t{text}\n"),
    "words around it": "专访\n" + lines("{name}：{text}\n", [(n, t.replace("\n", "")) for n, t in SAID] * 3),
}


@pytest.mark.parametrize("kind", MORE_LOGS)
def test_more_logs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d.txt"
    path.write_text(MORE_LOGS[kind], encoding="utf-8")
    (conversation, *_), report = read_conversations(path)
    assert [turn.content.replace("，\n", "，") for turn in conversation.turns][:3] == [
        text.replace("，\n", "，") for _, text in TALK
    ][:3]
    assert "'小红'" in report.notes[-1]
