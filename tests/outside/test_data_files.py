"""Data files as users have them: encodings x formats x shapes, and what must be read from each."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from minigpt.data import file_formats
from minigpt.data.conversation import Turn
from minigpt.data.corpus import QuietTextOptions, TextOptions, find_sources, read_sources, read_texts
from minigpt.data.field_names import FieldNames
from minigpt.data.json_values import BadLine
from minigpt.data.reader import read_conversations
from minigpt.data.records import prompt_of
from minigpt.errors import InputError

# The text is long enough to make its encoding certain. The answers contain characters that break simple
# readers: a comma, a semicolon, a quotation mark, a line end, U+2028.
CHINESE = [
    ("苹果是什么？", "苹果是一种水果，味道很甜。"),
    ("四川的省会是哪里？", "四川省的省会是成都；那里有很多大熊猫。"),
    ("一年有几个季节？", '一年有四个季节："春夏秋冬"。'),
    ("请写两行诗。", "床前明月光，\n疑是地上霜。"),
    ("水的化学式是什么？", "水的化学式是H2O，由氢和氧组成。"),
]
TRADITIONAL = [
    ("今天天氣怎麼樣？", "今天天氣很好，我們一起去公園散步。"),
    ("臺灣有什麼小吃？", "臺灣的夜市有許多小吃，蚵仔煎和珍珠奶茶都很有名。"),
    ("圖書館幾點開門？", "圖書館開放時間是早上九點到晚上九點。"),
]
JAPANESE = [
    ("今日の天気はどうですか。", "今日はとても良い天気なので、公園を散歩しました。"),
    ("図書館はいつ開きますか。", "図書館は朝九時から夜九時まで開いています。"),
]
KOREAN = [
    ("오늘 날씨는 어떻습니까?", "오늘은 날씨가 아주 좋아서 공원을 산책했습니다."),
    ("도서관은 언제 엽니까?", "도서관은 아침 아홉 시부터 저녁 아홉 시까지 엽니다."),
]
RUSSIAN = [
    ("Какая сегодня погода?", "Сегодня очень хорошая погода, и мы пошли гулять в парк."),
    ("Когда открывается библиотека?", "Библиотека открыта с девяти утра до девяти вечера."),
]
Pairs = list[tuple[str, str]]


def json_lines(pairs: Pairs, q: str = "question", a: str = "answer", **more: Any) -> str:
    rows = ({q: question, a: answer, **more} for question, answer in pairs)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_array(pairs: Pairs, indent: int | None = None) -> str:
    rows = [{"question": q, "answer": a} for q, a in pairs]
    return json.dumps(rows, ensure_ascii=False, indent=indent)


def columns(pairs: Pairs) -> str:
    return json.dumps(
        {"question": [q for q, _ in pairs], "answer": [a for _, a in pairs]}, ensure_ascii=False
    )


def table(pairs: Pairs, delimiter: str = ",", head: tuple[str, ...] = ("question", "answer")) -> str:
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter)
    if head:
        writer.writerow(head)
    writer.writerows((*pair, *("7",) * (len(head) - 2)) for pair in pairs)
    return written.getvalue()


# name -> bytes; each must give CHINESE
FORMATS: dict[str, bytes] = {
    "lines": json_lines(CHINESE).encode(),
    "lines, a mark in front": json_lines(CHINESE).encode("utf-8-sig"),
    "lines ended by CR LF": json_lines(CHINESE).replace("\n", "\r\n").encode(),
    "lines without a last end": json_lines(CHINESE).rstrip().encode(),
    "lines, blank ones between": json_lines(CHINESE).replace("\n", "\n\n").encode(),
    "objects one behind the other": json_lines(CHINESE).replace("\n", "").encode(),
    "objects over several lines": "\n".join(
        json.dumps({"question": q, "answer": a}, ensure_ascii=False, indent=2) for q, a in CHINESE
    ).encode(),
    "lines of escapes": json.dumps({"question": "?", "answer": "!"}).encode()[:0]
    + "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in CHINESE).encode(),
    "array": json_array(CHINESE).encode(),
    "array over several lines": json_array(CHINESE, 2).encode(),
    "object of columns": columns(CHINESE).encode(),
    "array in an object": json.dumps({"version": 1, "data": json.loads(json_array(CHINESE))}).encode(),
    "columns as pandas writes them": json.dumps(
        {
            "question": {str(i): q for i, (q, _) in enumerate(CHINESE)},
            "answer": {str(i): a for i, (_, a) in enumerate(CHINESE)},
        }
    ).encode(),
    "csv": table(CHINESE).encode(),
    "csv of Excel": table(CHINESE).encode("utf-8-sig"),
    "csv with semicolons": table(CHINESE, ";").encode(),
    "tsv": table(CHINESE, "\t").encode(),
    "csv, more columns": table(CHINESE, head=("question", "answer", "score")).encode(),
    "csv, Chinese head": table(CHINESE, head=("问题", "答案")).encode(),
    "tsv without a head": table([(q, a.replace("\n", "")) for q, a in CHINESE], "\t", ()).encode(),
    "gzip": gzip.compress(json_lines(CHINESE).encode(), mtime=0),
    "bzip2": bz2.compress(json_lines(CHINESE).encode()),
    "xz": lzma.compress(json_lines(CHINESE).encode()),
    "gzip of a GBK csv": gzip.compress(table(CHINESE).encode("gb18030"), mtime=0),
}
ENCODINGS: dict[str, tuple[Pairs, str, Callable[[Pairs], str]]] = {
    f"{codec} {kind}": (pairs, codec, make)
    for pairs, codecs in (
        (CHINESE, ("gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        (TRADITIONAL, ("big5", "gb18030")),
        (JAPANESE, ("shift_jis", "euc_jp")),
        (KOREAN, ("euc_kr",)),
        (RUSSIAN, ("cp1251", "koi8-r")),
    )
    for codec in codecs
    for kind, make in (("lines", json_lines), ("array", json_array), ("csv", table))
}
# encodings for which the text is too short: another reading is about as likely
DOUBTFUL: set[str] = set()
SHAPES: dict[str, Any] = {  # name -> records; each gives the two turns of QUESTION
    "prompt, completion": {"prompt": "天？", "completion": "蓝。"},
    "prompt, response": {"prompt": "天？", "response": "蓝。"},
    "query, response": {"query": "天？", "response": "蓝。"},
    "q, a": {"q": "天？", "a": "蓝。"},
    "upper case": {"Question": "天？", "ANSWER": "蓝。"},
    "instruction, output": {"instruction": "天？", "output": "蓝。"},
    "instruction, empty input, output": {"instruction": "天？", "input": "", "output": "蓝。"},
    "input, output": {"input": "天？", "output": "蓝。"},
    "Chinese": {"问题": "天？", "答案": "蓝。"},
    "Chinese Alpaca": {"指令": "天？", "输入": "", "输出": "蓝。"},
    "messages": {"messages": [{"role": "user", "content": "天？"}, {"role": "assistant", "content": "蓝。"}]},
    "conversations": {
        "conversations": [{"from": "human", "value": "天？"}, {"from": "gpt", "value": "蓝。"}]
    },
    "conversations of roles": {
        "conversations": [{"role": "user", "content": "天？"}, {"role": "assistant", "content": "蓝。"}]
    },
    "a list of turns": [{"role": "user", "content": "天？"}, {"role": "assistant", "content": "蓝。"}],
    "texts in turn": {"dialog": ["天？", "蓝。"]},
    "parts of a content": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "天？"}]},
            {"role": "assistant", "content": "蓝。"},
        ]
    },
    "turns as JSON in a cell": {
        "messages": json.dumps(
            [{"role": "user", "content": "天？"}, {"role": "assistant", "content": "蓝。"}]
        )
    },
    "other fields that are NaN": {"question": "天？", "answer": "蓝。", "score": float("nan")},
    "several right answers": {"question": "天？", "answer": ["蓝。", "青。"]},
}


def turns_of(path: Path, **options: Any) -> list[tuple[Turn, ...]]:
    return [conversation.turns for conversation in read_conversations(path, **options)[0]]


def two_turns(pairs: Pairs) -> list[tuple[Turn, ...]]:
    return [(Turn("user", q), Turn("assistant", a)) for q, a in pairs]


@pytest.mark.parametrize("name", ["data", "data.jsonl", "data.txt", "data.csv"])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(tmp_path: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The content decides, not the name."""
    (tmp_path / name).write_bytes(FORMATS[kind])
    expected = CHINESE
    if kind == "tsv without a head":
        expected = [(q, a.replace("\n", "")) for q, a in CHINESE]
    conversations, report = read_conversations(tmp_path / name)
    assert [c.turns for c in conversations] == two_turns(expected)
    assert (report.lines, report.conversations, report.answers, report.skipped) == (5, 5, 5, [])
    report.print_summary()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ENCODINGS)
def test_encodings(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, codec, make = ENCODINGS[kind]
    path = tmp_path / "data"
    path.write_bytes(make(pairs).encode(codec))
    if kind in DOUBTFUL:  # the message shows both readings, and the flag chooses one
        with pytest.raises(InputError, match="--encoding"):
            read_conversations(path)
        assert turns_of(path, encoding=codec) == two_turns(pairs)
        return
    conversations, report = read_conversations(path)
    report.print_summary()
    assert capsys.readouterr().err.startswith("note: "), "how a file is read is said"
    assert [c.turns for c in conversations] == two_turns(pairs)


@pytest.mark.parametrize(
    "kind", [kind for kind in ENCODINGS if kind.startswith(("gb18030", "big5", "utf", "shift_jis", "euc_kr"))]
)
def test_what_chinese_and_japanese_people_have_is_certain(tmp_path: Path, kind: str) -> None:
    pairs, codec, make = ENCODINGS[kind]
    path = tmp_path / "data"
    path.write_bytes(make(pairs * 3).encode(codec))  # some hundred characters
    assert turns_of(path) == two_turns(pairs * 3)


def test_a_doubtful_encoding_shows_what_each_would_read(tmp_path: Path) -> None:
    text = json_lines(
        [("Où est-il passé ?", "L'été, la forêt est très animée à midi."), ("Noël ?", "Bien sûr.")]
    )
    (tmp_path / "french.jsonl").write_bytes(text.encode("cp1252"))
    with pytest.raises(InputError, match="its encoding is not certain") as error:
        read_conversations(tmp_path / "french.jsonl")
    assert "--encoding cp1252: " in str(error.value)
    assert "Où" in str(error.value)
    assert "--encoding cp1250: " in str(error.value)
    assert "\n" not in str(error.value)
    assert turns_of(tmp_path / "french.jsonl", encoding="cp1252")[1][1].content == "Bien sûr."


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "utf-16"])
def test_an_encoding_that_does_not_fit_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "d").write_bytes(json_lines(CHINESE).encode("gb18030")[:-1])
    with pytest.raises(InputError, match=f"is not {encoding}; choose another --encoding"):
        read_conversations(tmp_path / "d", encoding=encoding)


@pytest.mark.parametrize("name", ["utf-9", "hex", " ", "rot13", "中文"])
def test_an_unknown_encoding(tmp_path: Path, name: str) -> None:
    (tmp_path / "d").write_text(json_lines(CHINESE), encoding="utf-8")
    with pytest.raises(InputError, match=r"unknown encoding .*gb18030"):
        read_conversations(tmp_path / "d", encoding=name)


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "d.jsonl").write_text(
        (json.dumps(SHAPES[kind], ensure_ascii=False) + "\n") * 2, encoding="utf-8"
    )
    assert turns_of(tmp_path / "d.jsonl") == two_turns([("天？", "蓝。")] * 2)


def test_a_file_may_mix_shapes(tmp_path: Path) -> None:
    lines = "".join(json.dumps(item) + "\n" for item in SHAPES.values())
    (tmp_path / "d.jsonl").write_text(lines, encoding="utf-8")
    assert turns_of(tmp_path / "d.jsonl") == two_turns([("天？", "蓝。")] * len(SHAPES))


def test_alpaca_s_input_system_and_history(tmp_path: Path) -> None:
    item = {
        "instruction": "翻译。",
        "input": "天",
        "output": "sky",
        "system": "你是翻译。",
        "history": [["你好", "您好"]],
    }
    (tmp_path / "d.json").write_text(json.dumps([item]), encoding="utf-8")
    (turns,) = turns_of(tmp_path / "d.json")
    assert turns == (
        Turn("system", "你是翻译。"),
        Turn("user", "你好"),
        Turn("assistant", "您好"),
        Turn("user", "翻译。\n天"),
        Turn("assistant", "sky"),
    )


def test_roles_and_tools_are_kept(tmp_path: Path) -> None:
    item = {
        "conversations": [
            {"from": "system", "value": "帮忙。"},
            {"from": "human", "value": "几点？"},
            {"from": "function_call", "value": '{"name": "clock"}'},
            {"from": "observation", "value": "九点"},
            {"from": "gpt", "value": "九点。"},
        ],
        "tools": [{"name": "clock"}],
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(item) + "\n", encoding="utf-8")
    ((conversation,), report) = read_conversations(tmp_path / "d.jsonl")
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.exchanges == (("帮忙。\n几点？", '{"name": "clock"}'), ("九点", "九点。"))
    assert json.loads(conversation.tools) == [{"name": "clock"}]
    assert report.counted == "1 conversation with 2 answers"


def test_named_fields(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(table(CHINESE, head=("标题", "正解", "x")).encode("gb18030"))
    with pytest.raises(InputError, match=r"no field that is known.*--question_field NAME"):
        read_conversations(tmp_path / "d.csv")
    names = FieldNames(question="标题", answer="正解")
    assert turns_of(tmp_path / "d.csv", names=names) == two_turns(CHINESE)
    with pytest.raises(InputError, match="go together"):
        FieldNames(question="标题")


def test_what_is_not_understood_is_listed_by_its_keys(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"foo": 1, "bar": "x"}\n' * 3, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_conversations(tmp_path / "d.jsonl")
    for part in ("'foo', 'bar'", "3 records, first: line 1", "question/answer", "--question_field"):
        assert part in str(error.value)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    questions, answers = map(list, zip(*CHINESE))
    plain = {"question": questions, "answer": answers}
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHINESE]
    kinds = {
        "strings": pyarrow.table(plain),
        "large strings": pyarrow.table(
            {k: pyarrow.array(v, pyarrow.large_string()) for k, v in plain.items()}
        ),
        "dictionaries": pyarrow.table({k: pyarrow.array(v).dictionary_encode() for k, v in plain.items()}),
        "binary": pyarrow.table({k: pyarrow.array([t.encode() for t in v]) for k, v in plain.items()}),
        "lists of structs": pyarrow.table({"messages": turns}),
        "other columns": pyarrow.table(
            {
                **plain,
                "score": [float("nan")] * 5,
                "blob": [b"\xff\xfe"] * 5,
                "when": pyarrow.array([0] * 5, "date32"),
            }
        ),
    }
    for kind, made in kinds.items():
        parquet.write_table(made, tmp_path / "d")  # its name says nothing
        assert turns_of(tmp_path / "d") == two_turns(CHINESE), kind


def test_a_workbook(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["编号", "问题", "答案"])
    for number, (question, answer) in enumerate(CHINESE, 1):
        book.active.append([number, question, answer])
    book.active.append([6, "一加一等于几？", 2])
    book.save(tmp_path / "d")
    assert turns_of(tmp_path / "d") == two_turns([*CHINESE, ("一加一等于几？", "2")])


def test_zstandard(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    packed = pyarrow.compress(json_lines(CHINESE).encode(), "zstd", asbytes=True)
    (tmp_path / "d.jsonl.zst").write_bytes(packed)
    assert turns_of(tmp_path / "d.jsonl.zst") == two_turns(CHINESE)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
        (b"", "is empty"),
        (b" \n\t\n", "nothing but white space"),
        (b"\x00\x01\x02\x03" * 40, "binary file"),
        (b"words\x00\n" * 9, "binary file"),
        (b"\xff\xfe{\x00a", "begins as UTF-16, but byte 5 does not fit"),
        (bytes(range(0x80, 0xA0)) * 20, "text in no encoding that minigpt can tell; name it with --encoding"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"GGUF\x03\x00", "GGUF model"),
        (b"\x89PNG\r\n\x1a\n", "picture"),
        (b"\x1f\x8b\x08\x00broken", "damaged gzip data"),
        (b"PAR1 and nothing else", "damaged or no Parquet"),
        ("天地玄黄，宇宙洪荒。\n".encode() * 9, "plain text.*minigpt train --text"),
        (b'{"text": "a"}\n', "holds texts.*minigpt train --text"),
        (b'["a", "b"]', "holds texts.*minigpt train --text"),
        (b"[]", "holds no record"),
        (b"[1, 2]", "not an object"),
        (b'[{"question": "a", "answ', "broken JSON"),
        (b"{", "broken JSON"),
    ],
)
def test_what_is_no_data_is_named_as_what_it_is(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(InputError, match=what) as error:
        read_conversations(tmp_path / "d")
    assert "\n" not in str(error.value)


def test_folders_devices_and_pipes_are_refused(tmp_path: Path) -> None:
    import os

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, what in {
        "model": "a model's folder",
        ".": "is a folder; give a file",
        "nowhere": "does not exist",
        "loop": "cannot be read",
        "pipe": "no regular file",
    }.items():
        with pytest.raises(InputError, match=what):
            read_conversations(tmp_path / name)
    with pytest.raises(InputError, match="no regular file"):
        read_conversations(Path(os.devnull))


def test_lost_characters_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.jsonl").write_text(json_lines([("好", "好"), ("坏\ufffd", "好")]), encoding="utf-8")
    _, report = read_conversations(tmp_path / "d.jsonl")
    report.print_summary()
    assert "1 records hold U+FFFD" in capsys.readouterr().err
    assert (report.lost, report.as_dict()["lost_characters"]) == ([2], 1)


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl", "d.utf16"])
def test_lost_characters_of_texts_are_counted_and_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"第{n}行{['�', '', ''][n % 3]}。\n" for n in range(1, 21)]
    if name == "d.jsonl":
        texts = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (tmp_path / name).write_text("".join(texts), encoding="utf-16" if name == "d.utf16" else "utf-8")
    assert "".join(read_texts(tmp_path / name)).count("\ufffd") == 6
    said = [line for line in capsys.readouterr().err.splitlines() if "U+FFFD" in line]
    assert len(said) == 1
    assert "6 times U+FFFD" in said[0]
    assert "(line 3, 6, 9, 12, 15, ...)" in said[0]
    list(read_texts(tmp_path / name, options=QuietTextOptions()))
    assert "U+FFFD" not in capsys.readouterr().err


# -- texts -------------------------------------------------------------------------------------------------

POEM = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n" * 4


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", POEM.encode(), [POEM]),
        ("a", POEM.encode("gb18030"), [POEM]),
        ("a.md", POEM.encode("utf-16"), [POEM]),
        ("a.txt.gz", gzip.compress(POEM.encode(), mtime=0), [POEM]),
        ("a.json", b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.txt", b'[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ("a.json", b'["one", "two"]', ["one", "two"]),
        ("a.jsonl", '{"内容": "一"}\n{"内容": "二"}\n'.encode(), ["一", "二"]),
        (
            "a.jsonl",
            b'{"id": "1", "story": "a long story"}\n{"id": "2", "story": "another"}\n',
            ["a long story", "another"],
        ),
        ("a.csv", "label,text\n1,好\n0,坏\n".encode("gb18030") * 1, ["好", "坏"]),
        ("a.txt", b"one\n<|endoftext|>\ntwo\n<|endoftext|>\n", ["one\n", "two\n"]),
    ],
)
def test_texts(
    tmp_path: Path, name: str, content: bytes, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    if name == "a.csv":  # four characters are not enough to detect an encoding
        assert list(read_texts(tmp_path / name, options=TextOptions(encoding="gb18030"))) == expected
        return
    assert list(read_texts(tmp_path / name)) == expected
    assert ("'story'" in capsys.readouterr().err) == (b"story" in content)


def test_empty_lines_separate_documents_where_they_are_said_to(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nmore\n\n\ntwo\n", encoding="utf-8")
    assert list(read_texts(tmp_path / "a.txt")) == ["one\nmore\n\n\ntwo\n"]
    options = TextOptions(document_separator="blank")
    assert list(read_texts(tmp_path / "a.txt", options=options)) == ["one\nmore\n", "two\n"]


def test_questions_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json_lines(CHINESE), encoding="utf-8")
    with pytest.raises(
        InputError, match="questions and answers, no texts; to learn from them, first: minigpt split"
    ):
        list(read_texts(tmp_path / "a.jsonl"))


def test_a_second_reading_says_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(("床前明月光，疑是地上霜。\n" * 30).encode("gb18030"))
    (tmp_path / "b.jsonl").write_text('{"id": "1", "story": "words"}\n' * 3)
    options = TextOptions(document_separator="none")
    quiet = QuietTextOptions(**asdict(options))
    for name, said in (("a.txt", "read as GB18030"), ("b.jsonl", "the longest field")):
        first = list(read_texts(tmp_path / name, options=options))
        assert capsys.readouterr().err.count(said) == 1
        assert list(read_texts(tmp_path / name, options=quiet)) == first
        assert capsys.readouterr().err == ""
    assert asdict(quiet) == asdict(options), "what is recorded of both is the same"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"text": null}, {"text": null}]',
            "holds no text under 'text'; name another field with --text_field",
        ),
        ('[{"text": null}, {"text": }]', ":1: broken JSON, and all that follows it in the array is lost"),
        ('[{"text": "a"}, 5]', "holds no text under 'body'; name another field"),
        ('{"text": null}\n{"text": []}\n', "holds no text under 'text'; name another field"),
    ],
)
def test_records_without_a_text(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    options = TextOptions(text_field="body" if "body" in message else "")
    with pytest.raises(InputError, match=rf"a\.json ?{message}"):
        list(read_texts(tmp_path / "a.json", options=options))


def test_bad_lines_are_counted_or_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"text": "天"}'.encode(), b'{"text": "\xff"}', '{"text": "地"}'.encode(), b"{", b"7"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert list(read_texts(tmp_path / "a.jsonl")) == ["天", "地"]
    said = capsys.readouterr().err.replace("\n", " ")
    assert "a.jsonl:2: skipped: " in said
    assert "skipped 3 lines in all" in said
    with pytest.raises(InputError, match=r"a\.jsonl:2: bytes that are no character.*byte 0xff"):
        list(read_texts(tmp_path / "a.jsonl", strict=True))


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_formats, "_MOST", 100)
    (tmp_path / "a").write_bytes(b"a" * 101)
    (tmp_path / "b").write_bytes(gzip.compress(b"a" * 101))
    for name, what in (("a", "a has 0 GiB"), ("b", "b unpacks to more than 0 GiB")):
        with pytest.raises(InputError, match=f"{what}; more than 0 are not read whole: cut it"):
            read_conversations(tmp_path / name)


def test_a_packed_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.Table.from_pylist([{"question": q, "answer": a} for q, a in CHINESE])
    parquet.write_table(table, tmp_path / "d.parquet")
    (tmp_path / "d.parquet.gz").write_bytes(gzip.compress((tmp_path / "d.parquet").read_bytes()))
    assert turns_of(tmp_path / "d.parquet.gz") == two_turns(CHINESE)


def test_a_model_s_folder_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(InputError, match="is a model's folder, not text to learn from"):
        list(read_texts(tmp_path))


def test_a_text_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 100)
    sources = find_sources(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("words ")
    with pytest.raises(InputError, match=r"a\.txt has become shorter while it was read"):
        list(read_sources(sources))


def test_texts_of_a_pipe_are_written_into_a_file_first() -> None:
    reader, writer = os.pipe()
    os.write(writer, "天地玄黄，宇宙洪荒。\n".encode() * 9)
    os.close(writer)
    try:
        with pytest.raises(InputError, match="plain text, no questions and answers; write it into a file"):
            read_conversations(Path(f"/dev/fd/{reader}"))
    finally:
        os.close(reader)


def test_a_weight_that_is_no_number_is_counted_or_an_error(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"question": "a", "answer": "b", "weight": "5 kg"}\n')
    conversations, report = read_conversations(tmp_path / "d.jsonl")
    assert (conversations[0].weight, report.unweighted) == (1.0, [1])
    with pytest.raises(InputError, match=r"d\.jsonl:1: `weight` is no number"):
        read_conversations(tmp_path / "d.jsonl", strict=True)


def test_a_text_asks_for_no_answer() -> None:
    with pytest.raises(BadLine, match="a text, no prompt"):
        prompt_of({"text": "a"}, FieldNames())
    with pytest.raises(BadLine, match="not an object"):
        prompt_of(7, FieldNames())
