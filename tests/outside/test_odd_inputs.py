"""Files that look like another format, are broken, or hold unusual records: messages, and what is read."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt.data.conversation import Turn
from minigpt.data.corpus import TextOptions, read_texts
from minigpt.data.field_names import FieldNames
from minigpt.data.file_formats import open_data, read_bytes
from minigpt.data.questions import parse_questions
from minigpt.data.reader import ReadReport, read_conversations
from minigpt.data.split import split_conversations, write_split
from minigpt.errors import InputError
from minigpt.storage.json_files import read_json

ROOT = Path(__file__).parents[2]
PAIR = '{"question": "天？", "answer": "蓝。"}'
TURNS = [Turn("user", "天？"), Turn("assistant", "蓝。")]


def written(folder: Path, content: str | bytes, name: str = "d") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("answer", ["²", "9" * 5000])
def test_an_answer_that_looks_like_the_number_of_an_option(tmp_path: Path, answer: str) -> None:
    """`isdigit` accepts both, and `int` neither."""
    record = {"question": "天？", "options": ["蓝", "红"], "answer": answer}
    (found,), _ = read_conversations(written(tmp_path, json.dumps(record)))
    assert found.answer == answer


# -- JSON, or a text that begins with a bracket --------------------------------------------------------------

TEXTS = {
    "lyrics": "[Verse 1]\nLa la la\n\n[Chorus]\nLa la\n",
    "Chinese lyrics": "[主歌]\n啦啦啦\n[副歌]\n啦啦\n",
    "subtitles": "[00:12.00]第一句\n[00:15.30]第二句\n",
    "badges": "[![build](https://e.org/b.svg)](https://e.org)\n\n# Title\n\nSome words.\n",
    "badges and an example": '[![b](c)](d)\n\nA record:\n\n{"question": "a", "answer": "b"}\n\nand so on.\n',
    "an INI file": "[section]\nkey = value\n\n[other]\nkey = 2\n",
    "a TOML file": '["a.b"]\nkey = "value"\n[table]\nx = 1\n',
    "a to-do list": "[ ] buy milk\n[x] buy bread\n[ ] write\n",
    "footnotes": "[1] Smith, 2020.\n[2] Jones, 2021.\n",
    "citations": "[1][2] say so. Others do not.\n",
    "a number alone in brackets": "[1]\nSmith, 2020.\n[2]\nJones, 2021.\n",
    "a chat export": "[2024-01-02 10:00:00] 小明: 你好\n[2024-01-02 10:00:05] 小红: 你好！\n",
    "a wiki": "{{Infobox\n| name = x\n}}\nA text.\n",
    "a template": '{% extends "base.html" %}\n{{ "title" }}\n<p>words</p>\n',
    "LaTeX": "{\\bf Theorem} 1. Words.\n",
    "a play": "{Enter HAMLET}\nHamlet: Words, words, words.\n",
    "C": "{\n  int x = 1;\n  return x;\n}\n",
    "an example first": '{"a": 1} is JSON.\nIt has a key.\nThe key is text.\n',
    "one bracket": "[\nthe rest is prose\nand more prose\n",
    "a link": "[minigpt](https://e.org) is small.\n",
    "a quotation in brackets": '["Hello," she said.]\nHe left.\n',
    "an emoticon": "{^_^}\n你好\n",
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_that_begin_with_a_bracket(tmp_path: Path, kind: str, codec: str) -> None:
    path = written(tmp_path, TEXTS[kind].encode(codec), "d.txt")
    assert list(read_texts(path)) == [TEXTS[kind]]
    with pytest.raises(InputError, match="is plain text, no questions and answers"):
        read_conversations(path)


BROKEN = {
    "cut short in a text": '{"question": "a", "answ',
    "cut short behind a key": '{"question":',
    "an array over lines, cut short": '[\n  {\n    "question": "a",\n    "answer": "b"\n',
    "a comma is missing": '{"question": "a" "answer": "b"}\n' * 3,
    "single quotes": "{'question': 'a', 'answer': 'b'}\n" * 3,
    "single quotes in an array": "[{'question': 'a', 'answer': 'b'}]",
    "typographic quotes": "{“question”: “a”, “answer”: “b”}\n",
    "keys without quotes": '{question: "a", answer: "b"}\n',
    "one bracket": "{",
    "only brackets": "[[[[",
    "a text in it is open": '["one',
    "too deep": '{"a":' * 100 + "1" + "}" * 100,
    "a trailing comma": '[{"question": "a",}]',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_json_is_called_so_and_not_learned_as_text(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, BROKEN[kind], "d.txt")
    with pytest.raises(InputError, match="broken JSON"):
        read_conversations(path)
    with pytest.raises(InputError, match="broken JSON"):
        list(read_texts(path))


@pytest.mark.parametrize("first", ["{broken}", "# made by hand", "[broken]", '{"question": "a"', "garbage {"])
def test_a_bad_first_line_makes_no_text_of_json_lines(tmp_path: Path, first: str) -> None:
    path = written(tmp_path, f"{first}\n" + f"{PAIR}\n" * 3)
    conversations, report = read_conversations(path)
    assert [list(each.turns) for each in conversations] == [TURNS] * 3
    assert [line for line, _ in report.skipped] == [1]
    path = written(tmp_path, f"{first}\n" + '{"text": "甲"}\n' * 3)
    assert list(read_texts(path)) == ["甲"] * 3


def test_an_array_that_is_cut_short_gives_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations, report = read_conversations(written(tmp_path, f'[{PAIR},\n{{"question": "c", "ans'))
    assert [list(each.turns) for each in conversations] == [TURNS]
    assert [line for line, _ in report.skipped] == [2]
    path = written(tmp_path, '["one",\n "tw', "d.txt")
    assert list(read_texts(path)) == ["one"]
    assert f"{path}:2: skipped: broken JSON" in capsys.readouterr().err


def test_what_follows_a_broken_element_of_an_array_is_said_to_be_lost(tmp_path: Path) -> None:
    path = written(tmp_path, f'[{PAIR},\n{{"question": "a" "answer": "b"}},\n{PAIR},\n{PAIR}]')
    conversations, report = read_conversations(path)
    assert len(conversations) == 1
    ((line, reason),) = report.skipped
    assert line == 2
    assert "broken JSON, and all that follows it in the array is lost" in reason


def test_a_json_line_that_is_longer_than_the_beginning(tmp_path: Path) -> None:
    """Each record is longer than the part of the file by which its format is recognised."""
    long = "天地玄黄" * 100_000
    lines = json.dumps({"text": long}, ensure_ascii=False) + "\n"
    path = written(tmp_path, lines * 2)
    assert [len(text) for text in read_texts(path)] == [len(long)] * 2


@pytest.mark.parametrize(
    ("content", "questions"),
    [
        ("{x} 是什么？\n{y} 呢？\n", ["{x} 是什么？", "{y} 呢？"]),
        ("[1] 是什么？\n", ["[1] 是什么？"]),
        ('{"question": "a"}\n\n{"question": "b", "id": 1}\n', ["a", "b"]),
    ],
)
def test_questions_that_begin_with_a_bracket(content: str, questions: list[str]) -> None:
    assert parse_questions(content.encode(), "q.txt") == questions
    with pytest.raises(InputError, match=r"q\.txt:1: broken JSON"):
        parse_questions(b'{"question": "a"', "q.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", 'q.txt holds no question: one a line, or JSONL with "question"'),
        (b"\xef\xbb\xbf \n", "q.txt holds no question"),
        ("天\n地".encode("gb18030"), r"q.txt:1: not UTF-8 \(byte 0xcc at column 1\); convert it"),
        (b'{"question": "a"}\n{"q": "b"}\n', 'q.txt:2: no object with "question"'),
        (b'{"question": "a"}\n["question"]\n', 'q.txt:2: no object with "question"'),
        (b'{"question": "a"}\n{"question": " "}\n', 'q.txt:2: "question" must be text that is not empty'),
        (b'{"question": ["a"]}\n', r'q.txt:1: "question" must be text that is not empty: got \[\'a\'\]'),
    ],
)
def test_questions_that_are_none(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_questions(content, "q.txt")


@pytest.mark.parametrize(
    ("content", "pairs", "reasons"),
    [
        ('{"question": "a", "answer": [{"text": "b"}]}', [("a", "b")], []),  # one record with a list
        (
            json.dumps([{"role": name, "content": name} for name in ("user", "assistant")]),
            [("user", "assistant")],
            [],
        ),
        (f"[{PAIR},\n", [("天？", "蓝。")], [(1, "broken JSON")]),
        (f"[{PAIR} {PAIR}] x", [("天？", "蓝。")] * 2, [(1, "broken JSON")]),
        (
            f'{PAIR}\n{{"x": {{"y": 1}}, "z": {{"y": 2}}}}',
            [("天？", "蓝。")],
            [(2, "no field that is known")],
        ),
    ],
    ids=["a list in a record", "turns", "no end", "more behind it", "objects without a question"],
)
def test_values_of_json(
    tmp_path: Path, content: str, pairs: list[tuple[str, str]], reasons: list[tuple[int, str]]
) -> None:
    found, report = rows_of(written(tmp_path, content))
    assert (found, report.skipped) == (pairs, reasons)


def test_one_object_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it has 'x', 'z'"):
        read_conversations(written(tmp_path, '{"x": {"y": 1}, "z": {"y": 2}}'))


def test_rows_in_memory() -> None:
    rows: list[Any] = [{"question": b"a", "answer": "b"}, 7]
    conversations, report = read_conversations(rows)
    assert [(each.question, each.answer) for each in conversations] == [("a", "b")]
    assert report.skipped == [(2, "not an object")]


# -- CSV -----------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> tuple[list[tuple[str, str]], ReadReport]:
    conversations, report = read_conversations(path)
    return [(each.question, each.answer) for each in conversations], report


@pytest.mark.parametrize("name", ["d.csv", "d"])
@pytest.mark.parametrize("rows", [1, 60])
def test_a_beginning_that_ends_inside_quotes(tmp_path: Path, name: str, rows: int) -> None:
    """Answers have several lines, and are longer than the part by which a table is recognised."""
    answer = "一行，\n" * 50_000
    path = written(tmp_path, "question,answer\n" + f'q,"{answer}"\n' * rows, name)
    assert rows_of(path)[0] == [("q", answer)] * rows


@pytest.mark.parametrize(
    ("bad", "lines"),
    [
        ('x,"open', [101, 102, 103]),  # to the end of the file
        ('"open,x', [101, 102, 103]),
        ('x,"closed" and more', [101]),
        ('"closed" and more,x', [101]),
    ],
)
def test_a_quotation_mark_without_a_partner_is_named_with_all_that_it_swallows(
    tmp_path: Path, bad: str, lines: list[int]
) -> None:
    good = [(f"q{i}", f"a{i}") for i in range(99)]
    content = "question,answer\n" + "".join(f"{q},{a}\n" for q, a in good) + f"{bad}\nq,a\nq,a\n"
    found, report = rows_of(written(tmp_path, content, "d.csv"))
    assert found == good + [("q", "a")] * (3 - len(lines))
    assert [line for line, _ in report.skipped] == lines
    assert {reason for _, reason in report.skipped} == {"broken CSV"}
    assert "quotation mark" in report.details["broken CSV"]


def test_a_quotation_mark_that_swallows_up_to_the_next_one(tmp_path: Path) -> None:
    good = "".join(f"q{i},a{i}\n" for i in range(99))
    content = f'question,answer\n{good}x,"open\nq,a\nq,"quoted, cell"\nq,a\n'
    found, report = rows_of(written(tmp_path, content, "d.csv"))
    assert found[99:] == [("q", "a")]
    assert [line for line, _ in report.skipped] == [101, 102, 103]
    content = f'question,answer\n{good}"open,x\nq,a\nq,5"\nq,a\n'  # closed at the end of a cell
    found, report = rows_of(written(tmp_path, content, "d.csv"))
    assert found[99:] == [("q", "a")]
    assert [line for line, _ in report.skipped] == [101, 102, 103]


def test_a_small_table_with_an_open_quotation_mark_is_no_plain_text(tmp_path: Path) -> None:
    found, report = rows_of(written(tmp_path, 'question,answer\na,b\n"c,d\n', "d.csv"))
    assert (found, [line for line, _ in report.skipped]) == ([("a", "b")], [3])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", "sep=;\nquestion;answer\na;b, c\n"),  # Excel's
        ("d", 'sep=,\nquestion,answer\na,"b, c"\n'),
        ("d.csv", 'question, answer\n"a", "b, c"\n'),
        ("d", 'id,question,answer,created at\n1,a,"b, c",x\n'),
        ("d.csv", 'question,answer,\na,"b, c",\n'),
        ("d.csv", 'question,answer\ra,"b, c"\r'),
        ("d", "question|answer\na|b, c\n"),
    ],
)
def test_tables_as_programs_and_people_write_them(tmp_path: Path, name: str, content: str) -> None:
    assert rows_of(written(tmp_path, content, name))[0] == [("a", "b, c")]


@pytest.mark.parametrize(
    "text",
    [
        "Text, and more words.\nOther, words.\n",
        "Body, soul and mind.\nHeart, and life.\n",
        "Context, input and output\tare words.\n",
        "Content, body, text\nare three words.\nSo it is.\n",
        "| title | content |\n|:---|---:|\n| a | b |\n",
        "word\tits meaning\nother\tits own\n",
    ],
)
def test_prose_with_commas_and_tabs_is_no_table_to_a_corpus(tmp_path: Path, text: str) -> None:
    for codec in ("utf-8", "utf-16"):
        assert list(read_texts(written(tmp_path, text.encode(codec), "d.txt"))) == [text]


def test_a_table_of_one_column(tmp_path: Path) -> None:
    path = written(tmp_path, 'text\n"one, two"\nthree\n"four\nfive"\n', "d.csv")
    assert list(read_texts(path)) == ["one, two", "three", "four\nfive"]
    with pytest.raises(InputError, match="holds texts"):
        read_conversations(path)


def test_a_column_that_is_named_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stands there more than once"):
        read_conversations(written(tmp_path, "question,answer,answer\na,b,c\n", "d.csv"))


# -- Parquet -------------------------------------------------------------------------------------------------

FLIPPING = """
import sys
from pathlib import Path
from minigpt.data.reader import read_conversations
from minigpt.errors import InputError

whole, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
refused = 0
for place in range(len(whole) - 520, len(whole) - 440):
    damaged = bytearray(whole)
    damaged[place] ^= 4
    path.write_bytes(damaged)
    try:
        read_conversations(path)
    except InputError:
        refused += 1
print(refused)
"""


def test_a_flipped_bit_of_the_statistics_does_not_end_the_process(tmp_path: Path) -> None:
    """The library would end the process if it were asked for the size of a damaged column."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"question": [f"q{i}" for i in range(50)], "answer": ["a"] * 50})
    parquet.write_table(table, tmp_path / "whole")
    command = [sys.executable, "-c", FLIPPING, str(tmp_path / "whole"), str(tmp_path / "damaged")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 80


# -- a workbook ----------------------------------------------------------------------------------------------


def test_the_sheet_that_is_read_is_named(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "问答"
    for row in (["question", "answer"], ["天？", "蓝。"]):
        book.active.append(row)
    book.save(tmp_path / "one.xlsx")
    assert read_conversations(tmp_path / "one.xlsx")[1].notes == ()
    book.create_sheet("more").append(["question", "answer"])
    book.save(tmp_path / "two.xlsx")
    conversations, report = read_conversations(tmp_path / "two.xlsx")
    assert [list(each.turns) for each in conversations] == [TURNS]
    (sentence,) = report.notes
    assert "'问答'" in sentence
    assert "of 2 sheets" in sentence


# -- records -------------------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "天？"}
ANSWERED = {"role": "assistant", "content": "蓝。"}
ODD_RECORDS: dict[str, tuple[str, str]] = {  # name -> (a line, a part of the message about it)
    "history is text": ('{"question": "a", "answer": "b", "history": "no"}', "`history` is text"),
    "history is a number": ('{"question": "a", "answer": "b", "history": 3}', "`history` is a number"),
    "history is an object": (
        '{"question": "a", "answer": "b", "history": {"a": 1}}',
        "`history` is an object",
    ),
    "history twice": (
        '{"question": "a", "answer": "b", "history": [["a", "b"]], "history": []}',
        "`history` stands there more than once",
    ),
    "texts, no answer": ('{"messages": ["你好"]}', "there is no answer"),
    "a list of one text": ('[["你好"]]', "a turn is no object"),
    "turns twice": ('{"messages": ["a", "b"], "messages": []}', "`messages` stands there more than once"),
    "a prompt of turns, no answer": (
        '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]}',
        "there is no answer",
    ),
    "a part without text": (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}, '
        '{"role": "assistant", "content": "b"}]}',
        "a part of `content` is no text",
    ),
    "a picture": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, '
        '{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]}',
        "a part of `content` is no text",
    ),
    "a key twice in a call": (
        '{"messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": null, "tool_calls": [{"name": "f", "name": "g"}]}]}',
        "`tool_calls` holds a key more than once",
    ),
    "a key twice in a tool": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
        '"tools": [{"name": "f", "name": "g"}]}',
        "`tools` holds a key more than once",
    ),
    "half a character in a call": (
        '{"messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "", "tool_calls": [{"name": "\\ud800"}]}]}',
        "half a character",
    ),
    "half a character in a tool": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
        '"tools": [{"name": "\\ud800"}]}',
        "half a character",
    ),
    "a turn without a role": (
        '{"messages": [{"content": "a", "id": 1}, {"role": "assistant", "content": "b"}]}',
        "a turn has no `role`: turn 1: it has 'content', 'id'",
    ),
    "a turn without a text": (
        '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}',
        "a turn is empty: turn 1",
    ),
    "a history that is a number": ('{"question": "a", "answer": "b", "history": 7}', "`history` is a number"),
    "a history of texts": ('{"question": "a", "answer": "b", "history": ["c"]}', "`history` is no list of"),
    "no answer of several": ('{"question": "a", "answer": []}', "the question has no answer"),
    "an object in a list of answers": ('{"question": "a", "answer": [{"b": 1}]}', "a turn has no `role`"),
    "a number": ("7", "not an object: it is a number"),
    "a system text that is none": ('{"question": "a", "answer": "b", "system": ["x"]}', "`system` is a list"),
    "a key twice in a cell of turns": (
        json.dumps({"messages": '[{"role": "user", "role": "assistant", "content": "a"}]'}),
        "`role` stands there more than once",
    ),
}


@pytest.mark.parametrize("kind", ODD_RECORDS)
def test_odd_records_are_named(tmp_path: Path, kind: str) -> None:
    line, what = ODD_RECORDS[kind]
    _, report = read_conversations(written(tmp_path, f"{PAIR}\n{line}\n"))
    ((number, reason),) = report.skipped
    assert (number, what in f"{reason}: {report.details[reason]}") == (2, True), report


@pytest.mark.parametrize(
    ("more", "turns"),
    [
        ({"weight": 2}, TURNS),
        ({"weight": None}, TURNS),
        ({"input": " "}, TURNS),
        ({"input": float("nan")}, TURNS),
        ({"system": " "}, TURNS),
        ({"system": float("nan")}, TURNS),
        ({"history": []}, TURNS),
        ({"history": None}, TURNS),
        ({"history": float("nan")}, TURNS),
        ({"history": [["a", 1]]}, [Turn("user", "a"), Turn("assistant", "1"), *TURNS]),
        ({"conversation": "id-7"}, TURNS),
        ({"options": [["a"]]}, TURNS),  # no texts that could be the answer's
        ({"conversation": 7}, TURNS),
        ({"chat": {"id": 7}}, TURNS),
        ({"answer": 10**400}, [TURNS[0], Turn("assistant", str(10**400))]),
        ({"answer": 1.5}, [TURNS[0], Turn("assistant", "1.5")]),
    ],
)
def test_odd_fields_that_lose_no_record(tmp_path: Path, more: dict[str, Any], turns: list[Turn]) -> None:
    record = json.dumps({"question": "天？", "answer": "蓝。", **more})
    conversations, _ = read_conversations(written(tmp_path, f"{record}\n"), strict=True)
    assert [list(each.turns) for each in conversations] == [turns]


def test_a_text_beside_a_call_is_kept_and_so_is_the_call(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f"}}]
    record = {"messages": [ASKED, {"role": "assistant", "content": "我看看。", "tool_calls": calls}]}
    ((conversation,), _) = read_conversations(written(tmp_path, json.dumps(record)))
    assert conversation.answer == '我看看。\n[{"function": {"name": "f"}}]'


def test_parts_that_are_texts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "天"}, "？"]
    record = {"messages": [{"role": "user", "content": parts}, ANSWERED]}
    ((conversation,), _) = read_conversations(written(tmp_path, json.dumps(record)))
    assert list(conversation.turns) == TURNS


# -- what a split writes -------------------------------------------------------------------------------------


def split_again(path: Path, names: FieldNames = FieldNames()) -> list[dict[str, Any]]:  # noqa: B008
    """Split the file, check that the parts give the same conversations, and return the written records."""
    conversations, report = read_conversations(path, names=names)
    folder = path.parent / "sides"
    write_split(split_conversations(conversations, 0.5), report, folder, train_ratio=0.5, seed=42)
    sides = [folder / "train.jsonl", folder / "val.jsonl"]
    again = [each for side in sides for each in read_conversations(side, strict=True)[0]]
    lines = [line for side in sides for line in side.read_text(encoding="utf-8").splitlines()]
    assert sorted(each.turns for each in again) == sorted(each.turns for each in conversations)
    return [json.loads(line) for line in lines]


def test_half_characters_and_repeated_keys_beside_the_turns(tmp_path: Path) -> None:
    records = [f'{{"question": "q{i}", "answer": "a", "id": "\\ud800", "x": 1, "x": 2}}' for i in range(2)]
    found = split_again(written(tmp_path, f"[{records[0]},\n{records[1]}]"))
    assert [(each["id"], each["x"]) for each in found] == [("\ud800", None)] * 2


def test_only_a_question_with_its_answer_is_written_as_one(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet as parquet

    talks = [
        [{"role": "system", "content": "s"}, {"role": "assistant", "content": "1"}],
        [{"role": "tool", "content": "t"}, {"role": "assistant", "content": "2"}],
        [{"role": "user", "content": "u"}, {"role": "assistant", "content": "3"}],
        [{"role": "assistant", "content": "4"}],
    ]
    parquet.write_table(pyarrow.table({"messages": talks}), tmp_path / "d")
    found = split_again(tmp_path / "d")
    assert sorted(map(len, found)) == [1, 1, 1, 2]
    assert {"question": "u", "answer": "3"} in found


def test_the_sides_keep_the_order_of_a_file_of_one_line(tmp_path: Path) -> None:
    content = json.dumps([{"question": f"q{i:02}", "answer": "a"} for i in range(40)])
    conversations, _ = read_conversations(written(tmp_path, content))
    split = split_conversations(conversations, 0.5)
    for side in (split.train, split.val):
        assert [each.question for each in side] == sorted(each.question for each in side)


# -- encodings and bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["undefined", "idna", "punycode", "unicode_escape", "raw_unicode_escape"])
def test_what_python_calls_an_encoding_but_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="unknown encoding"):
        read_conversations(written(tmp_path, PAIR), encoding=name)


def test_half_a_character_that_an_encoding_lets_through(tmp_path: Path) -> None:
    path = written(
        tmp_path, '{"question": "+2AA-", "answer": "b"}'.replace("{", "+AHs-").replace("}", "+AH0-")
    )
    with pytest.raises(InputError, match="half a character"):
        read_conversations(path, encoding="utf-7")


def test_the_place_of_a_bad_byte_behind_a_mark(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbfab\n\xffcd")
    with pytest.raises(InputError, match=r"d:2: byte 0xff is not utf-8-sig"):
        open_data(path, "utf-8-sig")


def test_files_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`read(n)` allocates n bytes before it reads, which would be 4 GiB for a small file."""
    content = PAIR.encode()
    asked: list[int] = []

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size if size is not None else -1)
            return super().read(size)

    opened = Path.open

    def counting(self: Path, *arguments: Any, **options: Any) -> Any:
        file = opened(self, *arguments, **options)
        return Counting(file.detach()) if isinstance(file, io.BufferedReader) else file

    path = written(tmp_path, content)
    packed = written(tmp_path, gzip.compress(content), "d.gz")
    monkeypatch.setattr(Path, "open", counting)
    unpacking = gzip.GzipFile.read

    def read(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        asked.append(size if size is not None else -1)
        return unpacking(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    assert read_bytes(path) == content
    assert len(read_conversations(packed)[0]) == 1
    assert asked
    assert all(0 <= size <= 1 << 24 for size in asked)


def test_json_files_are_read_in_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, b"{}")
    asked: list[int] = []

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size if size is not None else -1)
            return super().read(size)

    monkeypatch.setattr("minigpt.storage.json_files.open_regular", lambda path: Counting(io.FileIO(path)))
    assert read_json(path) == {}
    assert asked == [2]


def test_a_text_of_another_encoding_is_read_once_as_text(tmp_path: Path) -> None:
    text = "[主歌] 床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n" * 20
    for name, content in {
        "a.txt": text.encode("gb18030"),
        "a.txt.gz": gzip.compress(text.encode("gb18030")),
        "b.txt": text.encode("utf-16-le"),
    }.items():
        assert list(read_texts(written(tmp_path, content, name), options=TextOptions())) == [text]
