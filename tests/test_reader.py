"""Reading JSONL: what is kept, what is skipped and why, and what is refused as a whole."""

import gzip
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data.reader import Pair, read_pairs
from minigpt.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the test data beside the project are not there"
)
quick = settings(derandomize=True, deadline=None, max_examples=100)

GOOD = '{"question": "你好", "answer": "我很好"}'
PAIR = Pair("你好", "我很好", 1, GOOD)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, strict: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        read_pairs(path, strict=strict)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_pairs_with_line_and_original_text(tmp_path: Path) -> None:
    second = '{"answer":"b" , "question" : "a\\n", "more": [1, {"x": null}]}'
    path = write(tmp_path / "d.jsonl", f"{GOOD}\n\n  \n{second}\n")
    pairs, report = read_pairs(path, strict=True)
    assert pairs == [PAIR, Pair("a\n", "b", 4, second)]
    assert (report.lines, report.pairs, report.skipped) == (2, 2, [])
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_pairs(str(path))[0] == pairs


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        f"{GOOD}\n",
        f"{GOOD}\r\n",
        f"{GOOD}\r",
        f"\ufeff{GOOD}\r\n",
    ],
)
def test_line_ends_and_byte_order_mark_are_no_text(tmp_path: Path, content: str) -> None:
    assert read_pairs(write(tmp_path / "d.jsonl", content), strict=True)[0] == [PAIR]


def test_a_byte_order_mark_of_a_file_that_was_appended(tmp_path: Path) -> None:
    pairs, _ = read_pairs(write(tmp_path / "d.jsonl", f"\ufeff{GOOD}\n\ufeff{GOOD}\n"), strict=True)
    assert [pair.raw for pair in pairs] == [GOOD, GOOD]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\\u000b", "\\n", "\\r\\n"])
def test_only_lf_ends_a_line(tmp_path: Path, separator: str) -> None:
    line = f'{{"question": "a{separator}b", "answer": "c"}}'
    pairs, _ = read_pairs(write(tmp_path / "d.jsonl", f"{line}\n{GOOD}\n"), strict=True)
    assert pairs[0].question == json.loads(line)["question"]
    assert pairs[0].raw == line
    assert pairs[1].line == 2


def test_a_long_answer_is_kept(tmp_path: Path) -> None:
    answer = "很长" * 25_000
    path = write(tmp_path / "d.jsonl", json.dumps({"question": "q", "answer": answer}))
    assert read_pairs(path, strict=True)[0][0].answer == answer


def test_spaces_around_a_question_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"question": " a　", "answer": "\\tb"}')
    assert read_pairs(path, strict=True)[0][0][:2] == (" a　", "\tb")


BAD_LINES = [
    ("{", "broken JSON"),
    ('{"question": "a", "answer": "b"', "broken JSON"),
    ('{"question": "a" "answer": "b"}', "broken JSON"),
    ("{'question': 'a', 'answer': 'b'}", "broken JSON"),
    ('{"question": "a", "answer": "b"},', "broken JSON"),
    ('{"question": "a\tb", "answer": "b"}', "broken JSON"),
    ('{"question": "a", "answer": "b", "score": NaN}', "broken JSON"),
    ('{"question": "a", "answer": -Infinity}', "broken JSON"),
    ('{"question": "a", "answer": "b", "n": ' + "9" * 5000 + "}", "broken JSON"),
    ('{"a": ' * 100_000, "broken JSON"),
    ("你好", "broken JSON"),
    ('["a", "b"]', "not an object"),
    ('"text"', "not an object"),
    ("42", "not an object"),
    ("null", "not an object"),
    ("true", "not an object"),
    ("{}", "`question` is missing"),
    ('{"Question": "a", "answer": "b"}', "`question` is missing"),
    ('{"question": "a"}', "`answer` is missing"),
    ('{"question": null, "answer": "b"}', "`question` is null, not text"),
    ('{"question": "a", "answer": 7}', "`answer` is a number, not text"),
    ('{"question": "a", "answer": 7.5}', "`answer` is a number, not text"),
    ('{"question": "a", "answer": false}', "`answer` is true or false, not text"),
    ('{"question": ["a"], "answer": "b"}', "`question` is a list, not text"),
    ('{"question": "a", "answer": {"text": "b"}}', "`answer` is an object, not text"),
    ('{"question": "", "answer": "b"}', "`question` is empty"),
    ('{"question": "a", "answer": " \\t\\u3000\\n"}', "`answer` is empty"),
    ('{"question": "a", "answer": "b", "question": "c"}', "`question` stands there more than once"),
    ('{"question": "a", "answer": "b", "answer": "b"}', "`answer` stands there more than once"),
    ('{"question": "a\\u0000", "answer": "b"}', "`question` holds NUL"),
    ('{"question": "a", "answer": "b\\ud800"}', "`answer` holds half a character (a lone surrogate)"),
    (f"{GOOD}\r{GOOD}", "several lines, ended by CR instead of LF"),
    (b'{"question": "a", "answer": "\xff"}', "not UTF-8"),
    (b'{"question": "a", "answer": "\xed\xa0\x80"}', "not UTF-8"),
    (b'{"question": "\0", "answer": "b"}', "broken JSON"),
    (b"\0\0\0", "broken JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_skipped_and_named(tmp_path: Path, line: str | bytes, reason: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "d.jsonl", GOOD.encode() + b"\n\n" + raw + b"\n" + GOOD.encode())
    pairs, report = read_pairs(path)
    assert pairs == [PAIR, PAIR._replace(line=4)]
    assert report.skipped == [(3, reason)]
    assert (report.lines, report.pairs) == (3, 2)
    assert refusal(path, strict=True).startswith(f"{path}:3: {reason}")


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_file_of_bad_lines_alone_says_why(tmp_path: Path, line: str | bytes, reason: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    text = refusal(write(tmp_path / "d.jsonl", raw + b"\n" + raw))
    if raw == b"{":
        assert "jq -c ." in text
    elif b"\r" in raw:
        assert "tr '\\r' '\\n' <" in text
    elif raw == b"\0\0\0":
        assert "is no text file" in text
    elif raw == b"":
        assert "GB18030" in text
    else:
        assert "holds no good pair" in text
        assert reason in text
        assert "(2 lines, first: 1)" in text


def test_details_help_to_find_the_place(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", f'{GOOD}\n{{"question": "a", "answer" "b"}}\n')
    assert refusal(path, strict=True) == f"{path}:2: broken JSON: Expecting ':' delimiter at column 28"
    write(path, f'{GOOD}\n{{"prompt": "a", "response": "b"}}\n')
    assert refusal(path, strict=True) == f"{path}:2: `question` is missing: it has 'prompt', 'response'"
    write(path, GOOD.encode() + b'\n{"question": "\xff"}\n')
    assert refusal(path, strict=True) == f"{path}:2: not UTF-8: byte 0xff at column 15"


def test_duplicate_keys_elsewhere_do_no_harm(tmp_path: Path) -> None:
    line = '{"question": "a", "answer": "b", "tag": 1, "tag": 2}'
    assert read_pairs(write(tmp_path / "d.jsonl", line), strict=True)[0] == [Pair("a", "b", 1, line)]


def test_summary_groups_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [GOOD, *["{}"] * 7, '{"question": "a", "answer": ""}', '{"question": 1}', GOOD]
    path = write(tmp_path / "d.jsonl", "\n".join(lines))
    _, report = read_pairs(path)
    assert report.as_dict() == {
        "lines": 11,
        "pairs": 2,
        "skipped": 9,
        "reasons": {
            "`question` is missing": 7,
            "`answer` is empty": 1,
            "`question` is a number, not text": 1,
        },
    }
    report.print_summary()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"warning: {path}: skipped 7: `question` is missing "
        "(line 2, 3, 4, 5, 6, ...; line 2: it has no keys at all)",
        f"warning: {path}: skipped 1: `answer` is empty (line 9)",
        f"warning: {path}: skipped 1: `question` is a number, not text (line 10)",
        f"warning: {path}: skipped 9 of 11 lines in all; --strict stops there",
    ]


def test_nothing_is_said_when_nothing_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = read_pairs(write(tmp_path / "d.jsonl", GOOD))
    report.print_summary()
    assert capsys.readouterr() == ("", "")


LINES = f"{GOOD}\n" * 3
ARRAY = [json.loads(GOOD)] * 2


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"", ["is empty", '{"question": "...", "answer": "..."}']),
        (b"\n \r\n\t\n", ["only blank lines"]),
        (b"\xef\xbb\xbf\n", ["only blank lines"]),
        (json.dumps(ARRAY), ["JSON array", "jq -c '.[]'"]),
        (json.dumps(ARRAY, indent=2), ["JSON array", "jq -c '.[]'"]),
        ("[\n" + ",\n".join(map(json.dumps, ARRAY)) + "\n]", ["JSON array", "jq -c '.[]'"]),
        ("[]", ["holds no good pair", "not an object: it is a list"]),
        (json.dumps(ARRAY[0], indent=2), ["spread over many lines", "jq -c ."]),
        (f"{json.dumps(ARRAY[0], indent=2)}\n" * 2, ["spread over many lines", "jq -c ."]),
        ('{"question": "a",\n"answer": "b"}', ["spread over many lines", "jq -c ."]),
        (f"{GOOD}\r{GOOD}\r", ["end with CR", "tr '\\r' '\\n' <"]),
        (LINES.encode("utf-16"), ["UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        (b"\xfe\xff" + LINES.encode("utf-16-be"), ["UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        (LINES.encode("utf-16-le"), ["UTF-16", "iconv -f UTF-16LE -t UTF-8"]),
        (LINES.encode("utf-16-be"), ["UTF-16", "iconv -f UTF-16BE -t UTF-8"]),
        (LINES.encode("utf-32"), ["UTF-32", "iconv -f UTF-32 -t UTF-8"]),
        (LINES.encode("gbk"), ["looks like GBK/GB18030", "iconv -f GB18030 -t UTF-8"]),
        ((LINES + '{"question": "𠮷", "answer": "㐀"}').encode("gb18030"), ["looks like GBK/GB18030"]),
        (b'{"question": "a", "answer": "b"}\n' + LINES.encode("gbk"), ["looks like GBK/GB18030"]),
        (gzip.compress(LINES.encode(), mtime=0), ["compressed (gzip)", "gzip -dc"]),
        (b"PK\x03\x04" + bytes(100), ["a zip or Excel file", "export it as text"]),
        (b"\x7fELF\0\0\0", ["is no text file"]),
        ("question,answer\n你好,我很好\n", ["holds no good pair", "broken JSON"]),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_whole_files_of_another_kind(
    tmp_path: Path, content: str | bytes, fragments: list[str], strict: bool
) -> None:
    path = write(tmp_path / "d.jsonl", content)
    text = refusal(path, strict)
    if not strict or text.startswith(f"{path} "):
        assert all(fragment in text for fragment in fragments), text
    else:  # strict stops at the first line, before the whole is known
        assert text.startswith(f"{path}:1: ")


def test_a_conversion_quotes_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "my data.jsonl", gzip.compress(b"x", mtime=0))
    assert f"gzip -dc '{path}' > new.jsonl" in refusal(path)


def test_damaged_lines_in_utf8_are_not_taken_for_gbk(tmp_path: Path) -> None:
    good = f"{GOOD}\n".encode()
    for damage in (GOOD.encode("gbk"), GOOD.encode()[:-3]):
        pairs, report = read_pairs(write(tmp_path / "d.jsonl", good + damage + b"\n" + good))
        assert [pair.line for pair in pairs] == [1, 3]
        assert report.skipped == [(2, "not UTF-8")]


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.jsonl")
    assert "is a directory; give a JSONL file" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("content", [LINES.encode(), LINES.encode("gbk")])
def test_a_pipe_is_read_once(tmp_path: Path, content: bytes) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    if content == LINES.encode():
        assert len(read_pairs(pipe)[0]) == 3
    else:
        assert "not UTF-8" in refusal(pipe)
    writer.join()


@quick
@given(st.lists(st.binary(max_size=40) | st.sampled_from([line for line, _ in BAD_LINES[:9]] + [GOOD])))
def test_arbitrary_bytes_never_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str | bytes]
) -> None:
    raw = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    path = write(tmp_path_factory.mktemp("bytes") / "d.jsonl", raw)
    try:
        pairs, report = read_pairs(path)
    except InputError:  # the test is that nothing else is raised
        return
    assert report.pairs + len(report.skipped) == report.lines
    kept = raw.split(b"\n")
    for pair in pairs:
        assert pair.raw.encode() in kept[pair.line - 1]
        assert json.loads(pair.raw)["question"] == pair.question


texts = st.text(
    alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
).filter(lambda text: text.strip() != "")


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1), st.booleans())
def test_what_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, str]], ascii_only: bool
) -> None:
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=ascii_only) for q, a in items]
    path = write(tmp_path_factory.mktemp("json") / "d.jsonl", "\n".join(lines))
    pairs, _ = read_pairs(path, strict=True)
    assert [(pair.question, pair.answer) for pair in pairs] == items
    assert [pair.raw for pair in pairs] == lines


@needs_shared
@pytest.mark.parametrize(("name", "count"), [("baike_dialogue", 14652), ("kdconv", 4659)])
def test_real_files(name: str, count: int) -> None:
    path = SHARED / name / "qa.jsonl"
    pairs, _ = read_pairs(path, strict=True)
    assert len(pairs) == count
    assert "".join(f"{pair.raw}\n" for pair in pairs).encode() == path.read_bytes()
