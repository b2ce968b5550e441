"""The commands that read data get bad input: they print one helpful line, and destroy nothing.

Most cases run a command inside this process, as Python runs a script. A few start a process, because only
that shows exit codes, a closed pipe, or a full disk behind stdout.
"""

import gzip
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import Result, RunCommand

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"vocab": "build_vocab.py", "split": "split_data.py", "stats": "dataset_stats.py"}
GOOD = '{"question": "你好", "answer": "我很好"}'
OTHER = '{"question": "再见", "answer": "下次见"}'
LINES = f"{GOOD}\n{OTHER}\n"
VOCABULARY = {"<pad>": 0, "<unk>": 1, "<sep>": 2, **{c: i for i, c in enumerate("下次你再好很我见", 3)}}


Command = Callable[..., Result]


@pytest.fixture
def command(run_command: RunCommand) -> Command:
    """Return a function that runs the command of a verb."""
    return lambda verb, *arguments: run_command(SCRIPTS[verb], *arguments)


class Workplace(NamedTuple):
    """A folder with the output of an earlier, successful run."""

    folder: Path
    data: Path
    vocab: Path

    def arguments(self, verb: str) -> list[object]:
        return {
            "vocab": ["--data", self.data, "--output", self.vocab],
            "split": ["--input", self.data, "--train_ratio", 0.5],
            "stats": ["--train_data", self.data, "--vocab_path", self.vocab],
        }[verb]

    def contents(self) -> dict[str, bytes]:
        return {entry.name: entry.read_bytes() for entry in self.folder.iterdir() if entry != self.data}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    for name in ("train.jsonl", "val.jsonl", "split.json", "stats.png"):
        (tmp_path / name).write_text(f"old {name}")
    data, vocab = tmp_path / "data.jsonl", tmp_path / "vocab.json"
    data.write_text(LINES, encoding="utf-8")
    vocab.write_text(json.dumps({"word2id": VOCABULARY}), encoding="utf-8")
    return Workplace(tmp_path, data, vocab)


def assert_refused(result: Result, verb: str, *fragments: str) -> None:
    assert result.code == 2
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n")
    assert result.err.startswith(f"{SCRIPTS[verb]}: error: ")
    for fragment in fragments:
        assert fragment in result.err


def json_lines(*objects: object) -> str:
    return "\n".join(json.dumps(item) for item in objects)


# outside/test_data_files.py has the files that can be read (an array, UTF-16, gzip, a table, ...).
WHOLE_FILES = {
    "empty": (b"", "is empty"),
    "blank lines": (b"\n\n \r\n", "holds nothing but white space"),
    "binary": (b"\x7fELF\x02\x01\x01\0\0\n\0\xff", "is a program, not data to learn from"),
    "text": ("你好\n我很好\n", "is plain text, no questions and answers; to learn"),
    "no question": (json_lines({"answer": "a"}, {"answer": "b"}), "`question` is missing: it has 'answer'"),
    "null": (json_lines({"question": None, "answer": "a"}), "`question` is null, not text"),
    "empty text": (json_lines({"question": "", "answer": "a"}), "`question` is empty (1 record, first: "),
    "white space": (json_lines({"question": "\u3000 \n", "answer": "a"}), "`question` is empty"),
    "no objects": (
        json_lines([1], [2]),
        "a turn is no object: turn 1 is a number (2 records, first",
    ),
    "duplicate keys": ('{"question": "a", "question": "b", "answer": "c"}', "stands there more than once"),
    "NaN": ('{"question": "a", "answer": NaN}', "`answer` is missing (NaN), not text"),
    "lone surrogate": ('{"question": "\\ud800", "answer": "c"}', "half a character (a lone surrogate)"),
    "NUL": ('{"question": "\\u0000", "answer": "c"}', "`question` holds NUL"),
    "invalid UTF-8": (b'{"question": "\xff", "answer": "c"}', "not UTF-8, and its encoding is not certain"),
}


@pytest.mark.parametrize("verb", SCRIPTS)
@pytest.mark.parametrize(("content", "message"), WHOLE_FILES.values(), ids=WHOLE_FILES.keys())
def test_files_that_are_refused(
    command: Command, place: Workplace, verb: str, content: str | bytes, message: str
) -> None:
    if verb == "vocab" and message.startswith("is plain text"):
        pytest.skip("a vocabulary of plain text is what `minigpt train --text` needs")
    place.data.write_bytes(content.encode() if isinstance(content, str) else content)
    before = place.contents()
    assert_refused(command(verb, *place.arguments(verb)), verb, str(place.data), message)
    assert place.contents() == before


BAD_LINES = [
    ("{'question': 1}", "broken JSON"),
    ('{"question": "a"}', "`answer` is missing"),
    ('{"question": "a", "answer": ""}', "`answer` is empty"),
    ("7", "not an object"),
]


@pytest.mark.parametrize("verb", SCRIPTS)
def test_bad_lines_are_skipped_or_with_strict_refused(command: Command, place: Workplace, verb: str) -> None:
    lines = [GOOD, *(line for line, _ in BAD_LINES), OTHER, *[BAD_LINES[0][0]] * 7]
    place.data.write_text("\n".join(lines), encoding="utf-8")
    before = place.contents()
    strict = command(verb, *place.arguments(verb), "--strict")
    assert_refused(strict, verb, f"{place.data}:2: broken JSON: ")
    assert place.contents() == before

    result = command(verb, *place.arguments(verb), "--json")
    assert result.code == 0
    warnings = result.err.splitlines()
    assert len(warnings) == 5
    assert all(line.startswith(f"warning: {place.data}: skipped ") for line in warnings)
    assert "skipped 8: broken JSON (line 2, 7, 8, 9, 10, ...; line 2: " in warnings[0]
    for number, (_, reason) in enumerate(BAD_LINES[1:], 3):
        assert f"skipped 1: {reason} (line {number}" in result.err
    assert warnings[-1].endswith("skipped 11 of 13 records in all; --strict stops there")
    report = json.loads(result.out.splitlines()[-1])
    assert (report.get("read") or report["input"])["skipped"] == 11


@pytest.mark.parametrize("verb", SCRIPTS)
@pytest.mark.parametrize("kind", ["missing", "a directory", "below a file"])
def test_no_file_to_read(command: Command, place: Workplace, verb: str, kind: str) -> None:
    before = place.contents()
    place.data.unlink()
    wrong = place.data
    if kind == "a directory":
        place.data.mkdir()
    if kind == "below a file":
        wrong = place.vocab / "data.jsonl"
    arguments = [wrong if argument == place.data else argument for argument in place.arguments(verb)]
    said = {
        "missing": "does not exist",
        "a directory": "is a folder; give a file",
        "below a file": "Not a directory",
    }
    if verb == "vocab":  # which also takes a folder of texts
        said["a directory"] = "holds no .txt"
    result = command(verb, *arguments)
    assert_refused(result, verb, str(wrong), said[kind])
    if kind == "a directory":
        place.data.rmdir()
    assert place.contents() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; make it with: minigpt vocab"),
        ("", "is not JSON: "),
        ("not JSON", "is not JSON: "),
        ("[]", "must hold a JSON object: got list"),
        ('{"id2word": {}}', "has no object `word2id`"),
        (json.dumps({"word2id": {"a": 0}}), "<pad> must have id 0, but is missing"),
        (json.dumps({"word2id": {**VOCABULARY, "<sep>": 99}}), "<sep> must have id 2, but has id 99"),
        (json.dumps({"word2id": {**VOCABULARY, "x": 99}}), "id 11 is missing"),
        (json.dumps({"word2id": {**VOCABULARY, "x": 3}}), "id 3 is given twice"),
        (json.dumps({"word2id": {**VOCABULARY, "x": -3}}), "the id of 'x' is -3"),
        (json.dumps({"word2id": {**VOCABULARY, "x": 11.0}}), "the id of 'x' is 11.0"),
        (json.dumps({"word2id": {**VOCABULARY, "xy": 11}}), "entry 'xy' (id 11) is not one character"),
        (
            json.dumps({"word2id": VOCABULARY, "id2word": {"0": "?"}}),
            "word2id and id2word disagree about id 0",
        ),
    ],
)
def test_bad_vocabularies(command: Command, place: Workplace, content: str | None, message: str) -> None:
    place.vocab.unlink()
    if content is not None:
        place.vocab.write_text(content)
    assert_refused(command("stats", *place.arguments("stats")), "stats", str(place.vocab), message)


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "1.0001", "nan", "inf", "0.999", "0.001"])
def test_ratios_that_leave_nothing(command: Command, place: Workplace, ratio: str) -> None:
    before = place.contents()
    result = command("split", "--input", place.data, f"--train_ratio={ratio}")
    assert_refused(result, "split", "train_ratio")
    assert place.contents() == before


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("split", ["--train_ratio", "most"], "--train_ratio"),
        ("split", ["--train_ratios", "0.8"], "unknown flag '--train_ratios'; did you mean '--train_ratio'?"),
        ("split", ["--seed", "1.5"], "--seed"),
        ("split", ["data.jsonl"], "data.jsonl"),
        ("vocab", ["--out", "v.json"], "unknown flag '--out'; did you mean '--output'?"),
        ("vocab", ["--data"], "--data"),
        ("vocab", ["--vocab_size", str(10**12)], "vocab_size must be from 1 to 1000000: got vocab_size=1000"),
        ("split", ["--seed", "-1"], "seed must be from 0 to"),
        ("stats", ["--max_length", "0"], "max_length must be from 1 to 1000000: got max_length=0"),
        ("stats", ["--max_length", "long"], "--max_length"),
        ("stats", ["--vocab", "v.json"], "unknown flag '--vocab'; did you mean '--vocab_path'?"),
        ("stats", ["--plot", "stats.doc"], "--plot stats.doc: .doc cannot be written"),
    ],
)
def test_flags(command: Command, place: Workplace, verb: str, arguments: list[str], message: str) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    before = place.contents()
    assert_refused(command(verb, *place.arguments(verb), *arguments), verb, message)
    assert place.contents() == before


def test_an_input_is_never_overwritten(command: Command, place: Workplace) -> None:
    before = place.data.read_bytes()
    result = command("vocab", "--data", place.data, "--output", place.data)
    assert_refused(result, "vocab", f"{place.data} is the data and would be overwritten")
    train = place.data.rename(place.folder / "train.jsonl")
    assert_refused(
        command("split", "--input", train, "--train_ratio", 0.5),
        "split",
        str(train),
        "choose another --output_dir",
    )
    assert train.read_bytes() == before


def writing(place: Workplace, verb: str, goal: Path) -> list[object]:
    """Arguments that make a command write to `goal` (split: into the folder)."""
    if verb == "stats":
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
        return [*place.arguments("stats"), "--plot", goal]
    if verb == "vocab":
        return ["--data", place.data, "--output", goal]
    return [*place.arguments("split"), "--output_dir", goal]


@pytest.mark.parametrize("verb", SCRIPTS)
def test_a_place_that_cannot_be_written(command: Command, place: Workplace, verb: str) -> None:
    # below a regular file: not even root can write there
    before = place.contents()
    result = command(verb, *writing(place, verb, place.vocab / "x.png"))
    assert_refused(result, verb, f"cannot write {place.vocab / 'x.png'}", "nothing was changed")
    if verb != "split":
        result = command(verb, *writing(place, verb, place.folder))
        assert_refused(result, verb, f"cannot write {place.folder}", "is a directory")
    assert place.contents() == before


@pytest.mark.parametrize(
    ("verb", "failing"), [("vocab", 1), ("stats", 1), ("split", 1), ("split", 2), ("split", 3)]
)
def test_a_disk_that_fills_up(
    command: Command, place: Workplace, monkeypatch: pytest.MonkeyPatch, verb: str, failing: int
) -> None:
    before = place.contents()
    calls = itertools.count(1)
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) >= failing:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    goal = {"vocab": place.vocab, "split": place.folder, "stats": place.folder / "stats.png"}[verb]
    arguments = writing(place, verb, goal)
    monkeypatch.setattr(os, "fsync", fsync)
    assert_refused(command(verb, *arguments), verb, "No space left on device")
    assert place.contents() == before  # and no temporary file beside them


def test_odd_but_good(command: Command, place: Workplace) -> None:
    odd = json.dumps({"question": "a\u2028b", "answer": "很" * 50_000}, ensure_ascii=False)
    place.data.write_bytes(b"\xef\xbb\xbf" + f"{odd}\r\n{GOOD}\r\n".encode())
    result = command("stats", *place.arguments("stats"), "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out.splitlines()[-1])  # no character of the data may look like a line's end
    assert report["tokens"]["answers"]["max"] == 50_000
    assert [u["character"] for u in report["unknown_characters"]] == ["a", "\u2028", "b"]
    assert command("split", *place.arguments("split")).code == 0
    sides = (place.folder / "train.jsonl").read_bytes() + (place.folder / "val.jsonl").read_bytes()
    assert sorted(sides.split(b"\n")) == sorted([b"", odd.encode(), GOOD.encode()])


# Small files that unpack to much


def bomb(kind: str) -> bytes:
    """A small file that unpacks to 150 MB or more."""
    packed = io.BytesIO()
    if kind == "gzip":
        with gzip.open(packed, "wb", 9) as file:
            for _ in range(150):
                file.write(bytes(10**6))
    elif kind == "workbook":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            archive.writestr("xl/worksheets/sheet1.xml", bytes(150 * 10**6))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="the extra `datasets` is not installed")
        text = pyarrow.array(["a" * 10**6])
        shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 150, pyarrow.int8()), text)
        whole = shared if kind == "parquet, shared" else shared.dictionary_decode()
        table = pyarrow.table({"question": whole, "answer": whole})
        importlib.import_module("pyarrow.parquet").write_table(
            table, packed, use_dictionary=kind == "parquet, shared", compression="zstd"
        )
    return packed.getvalue()


@pytest.mark.parametrize("kind", ["gzip", "workbook", "parquet, shared", "parquet"])
def test_a_small_file_that_unpacks_to_much(command: Command, place: Workplace, kind: str) -> None:
    if kind == "workbook":
        pytest.importorskip("python_calamine", reason="the extra `excel` is not installed")
    place.data.write_bytes(content := bomb(kind))
    assert len(content) < 10**6
    result = command("vocab", *place.arguments("vocab"))
    assert_refused(result, "vocab", f"{place.data} has {len(content):,} bytes and unpacks to more than")


# Processes of their own


def start(*command: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        [sys.executable, *map(str, command)],
        stderr=subprocess.PIPE,
        timeout=60,
        cwd=ROOT,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    return done


def test_the_documents_commands_from_the_root(tmp_path: Path) -> None:
    """The commands are those of the documents, except for the folder of the data."""
    data = tmp_path / "data.jsonl"
    data.write_text(LINES * 2 + '{"question": "谁", "answer": "我"}\n', encoding="utf-8")
    commands = [
        ["./minigpt/build_vocab.py", "--data", data, "--output", tmp_path / "vocab.json"],
        ["./minigpt/split_data.py", "--input", data, "--train_ratio", "0.8"],
        [
            "./minigpt/dataset_stats.py",
            *("--train_data", tmp_path / "train.jsonl", "--vocab_path", tmp_path / "vocab.json"),
        ],
    ]
    for command in commands:
        done = start("-W", "error", *command, stdout=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout
    assert len((tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert len((tmp_path / "val.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_a_verb_is_the_script_and_loads_no_torch(tmp_path: Path) -> None:
    missing = tmp_path / "no such file.jsonl"
    done = start("-m", "minigpt", "vocab", "--data", missing, stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.decode().startswith(f"minigpt vocab: error: {missing} does not exist")
    assert done.stderr.count(b"\n") == 1

    done = start("-X", "importtime", "-m", "minigpt", "vocab", "--help", stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert b"vocabulary file to write" in done.stdout  # the help texts are found under a verb, too
    modules = {line.rpartition(b"|")[2].strip() for line in done.stderr.splitlines()}
    assert b"minigpt.console.command_line" in modules
    assert not modules & {b"torch", b"numpy", b"matplotlib"}


def test_no_torch_behind_vocab_and_split(place: Workplace) -> None:
    program = (
        "import runpy, sys\n"
        "for verb, arguments in {commands!r}:\n"
        "    sys.argv = ['minigpt ' + verb, *arguments]\n"
        "    try:\n"
        "        runpy.run_module({{'vocab': 'minigpt.build_vocab', 'split': 'minigpt.split_data'}}[verb],"
        " run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, stop.code\n"
        "assert not {{'torch', 'matplotlib'}} & sys.modules.keys()\n"
    ).format(commands=[(verb, [*map(str, place.arguments(verb))]) for verb in ("vocab", "split")])
    done = start("-c", program, stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_dev_full(place: Workplace) -> None:
    done = start(
        "minigpt/build_vocab.py", "--data", place.data, "--output", "/dev/full", stdout=subprocess.PIPE
    )
    assert done.returncode == 2
    assert b"/dev/full" in done.stderr
    assert b"No space left on device" in done.stderr
    assert done.stderr.count(b"\n") == 1
    with Path("/dev/full").open("wb") as full:  # the disk that stdout goes to
        done = start("minigpt/dataset_stats.py", *place.arguments("stats"), stdout=full)
    assert done.returncode == 2
    assert b"No space left on device" in done.stderr
    assert done.stderr.count(b"\n") == 1
