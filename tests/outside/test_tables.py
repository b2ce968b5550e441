"""Spreadsheets and records of users: without a head, with unusual names, a missing label, a single record."""

import gzip
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minigpt.data import tables
from minigpt.data.corpus import TextOptions, read_texts
from minigpt.data.field_names import FieldNames
from minigpt.data.json_values import BadLine
from minigpt.data.labelled import LabelledOptions, read_labelled
from minigpt.data.preferences import preference_of, read_preferences
from minigpt.data.reader import read_conversations
from minigpt.errors import InputError

PAIRS = [("天？", "蓝。"), ("草？", "绿。"), ("雪？", "白。")]
NAMES = FieldNames("标题", "正解")


def workbook(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    pytest.importorskip("python_calamine", reason="python-calamine, which reads workbooks, is not installed")
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl, which writes workbooks, is not installed")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(list(row))
    book.save(path)
    return path


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs_of(path: Path, **options: Any) -> list[tuple[str, str]]:
    return [(each.question, each.answer) for each in read_conversations(path, **options)[0]]


# -- tables ------------------------------------------------------------------------------------------------


def test_a_workbook_of_two_columns_without_names_is_said_to_be_one(tmp_path: Path) -> None:
    path = workbook(tmp_path / "d.xlsx", [list(pair) for pair in PAIRS])
    conversations, report = read_conversations(path)
    assert [(each.question, each.answer) for each in conversations] == PAIRS
    (note,) = report.notes
    assert "no line of column names" in note
    assert "天？" in note


@pytest.mark.parametrize("last", ["d.xlsx", "d.csv", "d.csv.gz"])
def test_a_table_of_more_columns_with_unknown_names(tmp_path: Path, last: str) -> None:
    rows = [["编号", "标题", "正解"], *([str(n), *pair] for n, pair in enumerate(PAIRS))]
    if last == "d.xlsx":
        path = workbook(tmp_path / last, rows)
    else:
        content = "".join(f"{','.join(row)}\n" for row in rows).encode()
        path = written(tmp_path / last, gzip.compress(content) if last.endswith("gz") else content)
    with pytest.raises(InputError, match=r"'编号', '标题', '正解'.*--question_field NAME"):
        read_conversations(path)
    assert pairs_of(path, names=NAMES) == PAIRS


def test_a_workbook_with_a_title_above_the_names(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        ["常见问题 2024"],
        ["编号", "问题", "答案"],
        *([n, *pair] for n, pair in enumerate(PAIRS)),
    ]
    assert pairs_of(workbook(tmp_path / "d.xlsx", rows)) == PAIRS


def test_an_empty_column_is_none(tmp_path: Path) -> None:
    assert pairs_of(workbook(tmp_path / "d.xlsx", [[*pair, " "] for pair in PAIRS])) == PAIRS


def test_a_workbook_of_one_column_holds_texts(tmp_path: Path) -> None:
    path = workbook(tmp_path / "d.xlsx", [[answer] for _, answer in PAIRS])
    assert list(read_texts(path)) == [answer for _, answer in PAIRS]


def test_a_packed_table_without_names(tmp_path: Path) -> None:
    content = "".join(f"{q},{a}\n" for q, a in PAIRS).encode()
    assert pairs_of(written(tmp_path / "d.csv.gz", gzip.compress(content))) == PAIRS


# -- one record alone --------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "天？"}, {"role": "assistant", "content": "蓝。"}]
ALONE: dict[str, Any] = {
    "sources": {"question": "天？", "answer": "蓝。", "sources": [{"url": "a"}, {"url": "b"}]},
    "tools": {"messages": TURNS, "tools": [{"name": "f"}]},
    "Alpaca": {"instruction": "天？", "output": "蓝。", "tags": [{"name": "colour"}]},
    "other names of turns": {
        "dialogue": [{"speaker": "user", "text": "天？"}, {"speaker": "bot", "text": "蓝。"}]
    },
    "a wrapper": {"source": "book", "data": [{"question": "天？", "answer": "蓝。"}]},
    "a wrapper with a text": {"text": "about", "rows": [{"question": "天？", "answer": "蓝。"}]},
    "a wrapper under the name of turns": {"conversations": [{"question": "天？", "answer": "蓝。"}]},
}


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_of_one_record(tmp_path: Path, kind: str, indent: int | None) -> None:
    content = json.dumps(ALONE[kind], ensure_ascii=False, indent=indent)
    assert pairs_of(written(tmp_path / "d", content)) == [("天？", "蓝。")]


def test_a_file_of_one_text_with_a_list_of_objects(tmp_path: Path) -> None:
    content = json.dumps({"text": "天蓝", "entities": [{"name": "天"}]}, ensure_ascii=False)
    assert list(read_texts(written(tmp_path / "d", content))) == ["天蓝"]


# -- tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", ["search, weather", "{", 7, "[1, 2]", ["search"], '{"a": 1, "a": 2}'])
def test_tools_that_are_none_are_a_bad_record(tmp_path: Path, tools: Any) -> None:
    lines = [{"messages": TURNS, "tools": tools}, {"messages": TURNS}]
    path = written(tmp_path / "d.jsonl", "".join(json.dumps(each) + "\n" for each in lines))
    conversations, report = read_conversations(path)
    assert len(conversations) == 1
    ((line, reason),) = report.skipped
    assert line == 1
    assert "`tools`" in reason


@pytest.mark.parametrize("tools", [None, "", " ", float("nan"), [], "[]", "null"])
def test_no_tools(tmp_path: Path, tools: Any) -> None:
    path = written(tmp_path / "d.jsonl", json.dumps({"messages": TURNS, "tools": tools}))
    ((conversation,), _) = read_conversations(path)
    assert conversation.tools == ""


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]', {"name": "f"}, '{"name": "f"}'])
def test_tools_as_a_list_or_its_text(tmp_path: Path, tools: Any) -> None:
    path = written(tmp_path / "d.jsonl", json.dumps({"messages": TURNS, "tools": tools}))
    ((conversation,), _) = read_conversations(path)
    assert json.loads(conversation.tools) == [{"name": "f"}]


# -- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"label": "b"}, {"text": "丁"}, {}, {"text": "丁", "label": ["a", "b"]}])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_odd_record_does_not_refuse_a_labelled_file(
    tmp_path: Path, bad: dict[str, Any], place: int
) -> None:
    rows: list[dict[str, Any]] = [{"text": "甲", "label": "a"}, {"text": "乙", "label": "b"}]
    rows.insert(place, bad)
    path = written(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    texts, report = read_labelled(path, LabelledOptions())
    assert [(each.text, each.labels) for each in texts] == [("甲", ("a",)), ("乙", ("b",))]
    assert [line for line, _ in report.skipped] == [place + 1]
    with pytest.raises(InputError, match=rf"d\.jsonl:{place + 1}: "):
        read_labelled(path, LabelledOptions(strict=True))


def test_a_short_row_of_a_labelled_table(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", "text,label\n甲,a\n丁\n乙,b\n")
    texts, report = read_labelled(path, LabelledOptions())
    assert [each.text for each in texts] == ["甲", "乙"]
    assert [line for line, _ in report.skipped] == [3]


def test_the_columns_of_a_labelled_table_without_names_are_said(tmp_path: Path) -> None:
    path = workbook(tmp_path / "d.xlsx", [["甲", "a"], ["乙", "b"], ["丙", "a"], ["丁", "b"]])
    texts, report = read_labelled(path, LabelledOptions())
    assert [each.labels for each in texts] == [("a",), ("b",)] * 2
    (note,) = report.notes
    assert "text is column 1" in note


@pytest.mark.parametrize("column", ["score", "y", "rating"])
def test_labels_that_do_not_fit_count_as_none_with_one_note(tmp_path: Path, column: str) -> None:
    path = written(tmp_path / "d.csv", f"text,{column}\n甲,4.5\n乙,good\n丙,\n")
    for kind, names, fitting in (
        ("single_label_classification", ("a", "b"), 0),
        ("multi_label_classification", ("a", "b"), 0),
        ("regression", ("LABEL_0",), 1),
    ):
        options = LabelledOptions(problem_type=kind, needs_labels=False, known=names)  # type: ignore[arg-type]
        texts, report = read_labelled(path, options)
        assert [each.text for each in texts] == ["甲", "乙", "丙"]
        assert sum(bool(each.labels) for each in texts) == fitting
        assert report.skipped == []
        (note,) = report.notes
        assert f"`{column}`" in note


# -- lost characters, repeated keys ------------------------------------------------------------------------


def test_lost_characters_are_counted_by_every_reader(tmp_path: Path) -> None:
    labelled = written(tmp_path / "l.csv", "text,label\n甲\ufffd,a\n乙,b\n")
    assert read_labelled(labelled, LabelledOptions())[1].lost == [2]
    pairs = written(tmp_path / "p.csv", "prompt,chosen,rejected\n甲,乙,丙\ufffd\n甲,乙,丙\n")
    assert read_preferences(pairs)[1].lost == [2]


def test_a_repeated_key_is_bad_for_every_reader(tmp_path: Path) -> None:
    labelled = written(
        tmp_path / "l.jsonl",
        '{"text": "甲", "label": "a", "label": "b"}\n{"text": "甲", "Text": "乙", "label": "b"}\n'
        '{"text": "甲", "label": "a"}\n',
    )
    _, report = read_labelled(labelled, LabelledOptions())
    assert [line for line, _ in report.skipped] == [1, 2]
    assert all("more than once" in reason for _, reason in report.skipped)
    pairs = written(
        tmp_path / "p.jsonl",
        '{"prompt": "甲", "chosen": "乙", "rejected": "丙", "rejected": "丁"}\n'
        '{"prompt": "甲", "chosen": "乙", "Chosen": "戊", "rejected": "丁"}\n'
        '{"prompt": "甲", "chosen": "乙", "rejected": "丙"}\n',
    )
    _, report = read_preferences(pairs)
    assert [line for line, _ in report.skipped] == [1, 2]
    assert all("more than once" in reason for _, reason in report.skipped)


# -- preferences -------------------------------------------------------------------------------------------

OWN: dict[str, Any] = {"标题": "天？", "正解": "蓝。", "rejected": "红。"}


@pytest.mark.parametrize(
    "more",
    [
        {"question": "x"},
        {"prompt": "x", "instruction": "y"},
        {"chosen": "x"},
        {"answer": "x", "output": "y"},
        {"input": "x"},
        {"context": "x"},
        {"messages": TURNS},
        {"system": "x", "history": [["x", "y"]]},
    ],
)
def test_named_fields_of_preferences_win(more: dict[str, Any]) -> None:
    pair = preference_of({**more, **OWN}, NAMES)
    assert [tuple(turn) for turn in pair.chosen.turns] == [("user", "天？"), ("assistant", "蓝。")]
    assert [tuple(turn) for turn in pair.rejected.turns] == [("user", "天？"), ("assistant", "红。")]


def test_a_named_field_of_preferences_that_is_missing() -> None:
    with pytest.raises(BadLine, match="`标题` is missing"):
        preference_of({"prompt": "天？", "正解": "蓝。", "rejected": "红。"}, NAMES)


def test_a_named_field_of_two_answers() -> None:
    pair = preference_of({"标题": "天？", "正解": ["蓝。", "红。"]}, NAMES)
    assert (pair.chosen.answer, pair.rejected.answer) == ("蓝。", "红。")


@pytest.mark.parametrize("name", ["answers", "responses", "completions", "output"])
def test_two_answers_of_a_parquet_file(tmp_path: Path, name: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"question": ["天？"], name: [["蓝。", "红。"]], "id": [1]})
    parquet.write_table(table, tmp_path / "d")
    ((pair,), _) = read_preferences(tmp_path / "d")
    assert (pair.chosen.question, pair.chosen.answer, pair.rejected.answer) == ("天？", "蓝。", "红。")


# -- names, titles, sheets, and what is no table -----------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        ("客户问题", "标准回答"),
        ("问题描述", "回复内容"),
        ("user_question", "answer_text"),
        ("質問", "答え"),
        ("problem", "solution"),
    ],
)
@pytest.mark.parametrize("last", ["d.xlsx", "d.csv", "d.txt"])
def test_names_that_are_like_the_usual_ones(tmp_path: Path, head: tuple[str, str], last: str) -> None:
    if last == "d.xlsx":
        assert pairs_of(workbook(tmp_path / last, [head, *PAIRS])) == PAIRS
    else:
        table = "".join(f"{q},{a}\n" for q, a in [head, *PAIRS])
        assert pairs_of(written(tmp_path / last, table)) == PAIRS


@pytest.mark.parametrize("names", [("question_id", "answer_count"), ("回答1", "回答2")])
def test_names_that_are_only_alike(tmp_path: Path, names: tuple[str, str]) -> None:
    record = json.dumps({names[0]: "1", names[1]: "2", "title": "t"})
    with pytest.raises(InputError, match=names[0]):
        read_conversations(written(tmp_path / "d.jsonl", record))


@pytest.mark.parametrize("title", ["常见问题\n", "常见问题,,\n", "常见问题,,\n更新于2024年,,\n", ",,\n"])
def test_a_table_with_a_title_above_the_names(tmp_path: Path, title: str) -> None:
    table = f"{title}编号,问题,答案\n" + "".join(f"{n},{q},{a}\n" for n, (q, a) in enumerate(PAIRS))
    assert pairs_of(written(tmp_path / "d.csv", table.encode("gb18030")), encoding="gb18030") == PAIRS


def test_the_sheet_with_the_known_names_is_read(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl, which writes workbooks, is not installed")
    pytest.importorskip("python_calamine", reason="python-calamine, which reads workbooks, is not installed")
    book = openpyxl.Workbook()
    book.active.append(["本表由客服部维护"])
    book.create_sheet("空")
    sheet = book.create_sheet("问答")
    for row in [("问题", "答案"), *PAIRS]:
        sheet.append(row)
    book.save(tmp_path / "d.xlsx")
    assert pairs_of(tmp_path / "d.xlsx") == PAIRS
    assert "of 3 sheets, '问答' is read" in read_conversations(tmp_path / "d.xlsx")[1].notes[0]


def test_three_columns_without_names_are_asked_about(tmp_path: Path) -> None:
    path = written(tmp_path / "d", "".join(f"{n}\t{q}\t{a}\n" for n, (q, a) in enumerate(PAIRS)))
    with pytest.raises(InputError, match="--question_field 1 --answer_field 2"):
        read_conversations(path)
    assert pairs_of(path, names=FieldNames("1", "2")) == PAIRS


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return content.getvalue()


def of_version_9(archive: bytes) -> bytes:
    """Say in the directory of a zip archive that unpacking needs version 9.1 of the format."""
    at = archive.index(b"PK\x01\x02") + 6
    return archive[:at] + b"\x5b" + archive[at + 1 :]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (zipped("[Content_Types].xml", "word/document.xml"), "a Word document"),
        (zipped("mimetype", "OEBPS/a.html"), "an EPUB book"),
        (zipped("qa.csv"), r"a zip archive \(unpack it\)"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "no workbook that can be read"),
        (of_version_9(zipped("[Content_Types].xml", "xl/workbook.xml")), "no workbook that can be read"),
        (b"{\\rtf1\\ansi hello}", r"an RTF document \(save it as text\)"),
        (b"<html><table><tr><td>a</td></tr></table></html>", "with a table: open it in Excel"),
        (b'<?xml version="1.0"?>\n<?mso-application progid="Excel.Sheet"?>\n<Workbook/>', "open it in Excel"),
    ],
)
def test_documents_that_are_no_data(tmp_path: Path, content: bytes, what: str) -> None:
    if content.startswith(b"\xd0") or b"xl/" in content:
        pytest.importorskip("python_calamine", reason="python-calamine is not installed")
    for name in ("d", "d.xlsx"):
        with pytest.raises(InputError, match=what):
            read_conversations(written(tmp_path / name, content))
        with pytest.raises(InputError, match=what):
            list(read_texts(tmp_path / name))


# -- shapes of JSON ----------------------------------------------------------------------------------------

ROWS = [{"question": q, "answer": a} for q, a in PAIRS]
WRAPPED: dict[str, Any] = {
    "parts": {"train": ROWS[:2], "test": ROWS[2:]},
    "an answer of a server": {"code": 0, "message": "ok", "data": {"total": 3, "list": ROWS}},
    "pairs as turns": [{"conversation": [{"human": q, "assistant": a}]} for q, a in PAIRS],
    "roles as keys": [{"conversations": [{"human": q}, {"gpt": a}]} for q, a in PAIRS],
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_records(tmp_path: Path, kind: str) -> None:
    assert pairs_of(written(tmp_path / "d", json.dumps(WRAPPED[kind]))) == PAIRS


def test_lines_that_end_with_a_comma(tmp_path: Path) -> None:
    content = "".join(f"{json.dumps(row)},\n" for row in ROWS)
    conversations, report = read_conversations(written(tmp_path / "d", content))
    assert len(conversations) == 3
    assert report.skipped == []


def test_quotation_marks_in_cells_between_tabs(tmp_path: Path) -> None:
    """Lines between tabs that no CSV program wrote: a quotation mark is a character."""
    pairs = [("他说什么？", '"你好" 他说。'), ('"好"是什么意思？', "很不错。"), ("几点？", '"九点')]
    content = "".join(f"{question}\t{answer}\n" for question, answer in pairs)
    assert pairs_of(written(tmp_path / "d", content)) == pairs
    assert pairs_of(written(tmp_path / "d.tsv", f"question\tanswer\n{content}")) == pairs
    quoted = [("a", "two\nlines"), ("b", 'a "word"')]
    table = "".join(f'{q}\t"{a.replace(chr(34), chr(34) * 2)}"\n' for q, a in quoted)
    assert pairs_of(written(tmp_path / "d.tsv", f"question\tanswer\n{table}")) == quoted


def test_names_below_rows_of_several_cells(tmp_path: Path) -> None:
    content = "导出时间,2024-01-01\n部门,客服\n\n问题,答案\n" + "".join(f"{q},{a}\n" for q, a in PAIRS)
    assert pairs_of(written(tmp_path / "d.csv", content)) == PAIRS


def test_a_text_of_parquet_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    for kind in (pyarrow.string(), pyarrow.large_string()):
        stored = pyarrow.binary() if kind == pyarrow.string() else pyarrow.large_binary()
        answers = pyarrow.array(["蓝。".encode(), b"\xff\xfe", "白。".encode()], stored).view(kind)
        table = pyarrow.table({"question": [q for q, _ in PAIRS], "answer": answers, "score": [1, 2, 3]})
        parquet.write_table(table, tmp_path / "d")
        conversations, report = read_conversations(tmp_path / "d")
        assert [(each.question, each.answer) for each in conversations] == [PAIRS[0], PAIRS[2]]
        assert report.skipped == [(2, "bytes that are no character")]


def test_columns_without_a_usual_name_are_all_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"one": ["a"], "two": ["b"]}), tmp_path / "d")
    with pytest.raises(InputError, match="no field that is known: it has 'one', 'two'"):
        read_conversations(tmp_path / "d")
    assert pairs_of(tmp_path / "d", names=FieldNames("one", "two")) == [("a", "b")]


def test_shared_texts_become_objects_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [(f"{n}？", "答" * 9) for n in range(7)]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("question", "answer"))}
    parquet.write_table(pyarrow.table(columns), tmp_path / "d")
    monkeypatch.setattr(tables, "_AT_ONCE", 100)  # three rows of 31 bytes
    assert pairs_of(tmp_path / "d") == rows


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    with pytest.raises(InputError, match=r"d\.x: reading it needs no_such: pip install 'minigpt\[y\]'"):
        tables.require_package("no_such", "d.x: reading it", "y")


# -- bytes that are no character ---------------------------------------------------------------------------

LONGER = {
    "gb18030": "第{n}号商品多少钱？第{n}号商品要三元，全国包邮。",
    "big5": "第{n}號商品多少錢？第{n}號商品要三元，全國免運費。",
    "euc_kr": "상품 {n}의 가격은 얼마입니까? 가격은 삼백 원입니다.",
}


@pytest.mark.parametrize("codec", LONGER)
def test_one_bad_byte_makes_no_other_encoding(tmp_path: Path, codec: str) -> None:
    """Encodings of one byte per character fit any bytes, and would give wrong text without a message."""
    lines = [LONGER[codec].format(n=n) for n in range(20)]
    rows = [
        json.dumps({"question": f"{n}", "answer": text}, ensure_ascii=False) for n, text in enumerate(lines)
    ]
    content = bytearray("".join(f"{row}\n" for row in rows).encode(codec))
    content[len(content) // 2 - 20] = 0xFF
    conversations, report = read_conversations(written(tmp_path / "d.jsonl", bytes(content)))
    ((bad, reason),) = report.skipped
    assert "bytes that are no character" in reason
    assert [each.answer for each in conversations] == [*lines[: bad - 1], *lines[bad:]]
    text = bytearray("".join(f"{line}\n" for line in lines).encode(codec))
    text[len(text) // 2] = 0xFF
    with pytest.raises(InputError, match=r"d\.txt:\d+: .*byte 0xff"):
        list(read_texts(written(tmp_path / "d.txt", bytes(text))))


SHORT = {  # so little text that a damaged one is easily taken for text of another encoding
    "gb18030": ["苹果是一种水果，味道很甜。", "四川省的省会是成都。", "水由氢和氧组成。"],
    "big5": ["今天天氣很好，我們一起去公園散步。", "臺灣的夜市有許多小吃。", "圖書館早上九點開門。"],
    "shift_jis": ["今日はとても良い天気です。", "図書館は朝九時に開きます。", "公園を散歩しました。"],
    "euc_jp": ["今日はとても良い天気です。", "図書館は朝九時に開きます。", "公園を散歩しました。"],
    "euc_kr": ["오늘은 날씨가 아주 좋아요.", "도서관은 아홉 시에 엽니다.", "공원을 산책했습니다."],
}


@pytest.mark.parametrize("byte", [0x80, 0xFF])
@pytest.mark.parametrize("codec", SHORT)
def test_a_bad_byte_is_named_with_its_line_and_no_other_line_suffers(
    tmp_path: Path, codec: str, byte: int
) -> None:
    texts = SHORT[codec]
    table = ["question,answer", *(f"{n},{text}" for n, text in enumerate(texts))]
    rows = [
        json.dumps({"question": f"{n}", "answer": text}, ensure_ascii=False) for n, text in enumerate(texts)
    ]
    for name, lines, damaged in (("d.csv", table, 2), ("d.jsonl", rows, 1), ("d.txt", texts, 1)):
        for place in (-6, -5):  # in front of a character, inside it
            content = [line.encode(codec) for line in lines]
            end = place - (2 if name == "d.jsonl" else 0)
            content[damaged] = content[damaged][:end] + bytes([byte]) + content[damaged][end:]
            path = written(tmp_path / name, b"\n".join(content) + b"\n")
            for encoding in ("", codec):
                if name == "d.txt":
                    with pytest.raises(InputError, match=r"d\.txt:2: byte 0x.. is no character of") as error:
                        list(read_texts(path, options=TextOptions(encoding=encoding)))
                    assert "not UTF-8" not in str(error.value)
                    continue
                conversations, report = read_conversations(path, encoding=encoding)
                assert [each.answer for each in conversations] == [texts[0], texts[2]]
                assert report.skipped == [(damaged + 1, "bytes that are no character")]
                assert "byte 0x" in report.details["bytes that are no character"]
                assert "behind" in report.details["bytes that are no character"]


@pytest.mark.parametrize("head", [("问题：", "答案："), ("问题（必填）", "答案（必填）"), ("*问题", "*答案")])
def test_names_with_marks(tmp_path: Path, head: tuple[str, str]) -> None:
    assert pairs_of(workbook(tmp_path / "d.xlsx", [head, *PAIRS])) == PAIRS


@pytest.mark.parametrize("name", ["text", "paragraphs", "content", "verses"])
def test_a_text_as_a_list_of_lines(tmp_path: Path, name: str) -> None:
    poem = {
        "author": "李白",
        "title": "静夜思",
        name: ["床前明月光，", "疑是地上霜。", "举头望明月，", "低头思故乡。"],
    }
    for content in (json.dumps([poem] * 2), f"{json.dumps(poem)}\n" * 2):
        path = written(tmp_path / "d", content)
        assert list(read_texts(path)) == ["\n".join(poem[name])] * 2
