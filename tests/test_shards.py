"""Shards: the ids are those of the whole text, wherever it is cut; kills, damage and bad input are met."""

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minigpt.data import corpus, documents, file_formats, shards
from minigpt.data.corpus import TextOptions
from minigpt.data.memory_mapped import Tokens, read_manifest, write_manifest
from minigpt.data.reader import read_conversations
from minigpt.data.shards import VOCABULARY, collect_characters, end_of_text, prepare
from minigpt.data.worker_pool import run_in_processes
from minigpt.errors import InputError
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary

ROOT = Path(__file__).parents[1]
ALPHABET = "ab'st1 \n\r\t/.，。好你\u0301\u00a0\u2028\ufeff𠮷-"
TRAINING = ["it's a test, a best 12 / 1", "你好。好你，你 好！", "a\n\nb  a\r\nst 's\t\t好"] * 3
CHARACTERS = Tokenizer.from_word2id(build_vocabulary(ALPHABET))
TOKENIZERS: dict[str, shards.TextTokenizer] = {
    "char": CHARACTERS,
    "gpt2": BpeTokenizer.train(TRAINING, 300, min_frequency=1),
    "qwen2": BpeTokenizer.train(TRAINING, 300, kind="qwen2", min_frequency=1),
}


def ids_of(tokens: Tokens) -> list[int]:
    return [int(index) for index in tokens.read(0, len(tokens))]


def expected(tokenizer: shards.TextTokenizer, *texts: str) -> list[int]:
    """The slow twin: encode every document as a whole."""
    return [i for text in texts for i in (*tokenizer.encode_array(text).tolist(), end_of_text(tokenizer))]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces, chunks and blocks a few bytes long, so that texts are cut everywhere."""
    monkeypatch.setattr(shards, "PIECE", 24)
    monkeypatch.setattr(shards, "CHUNK", 5)
    monkeypatch.setattr(documents, "_BLOCK", 7)


# -- the same ids -------------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(alphabet=ALPHABET, min_size=1, max_size=300),
    st.lists(st.sampled_from([*TRAINING, "\n", " ", "\r\n", "  \n", "a", "。"]), min_size=1, max_size=40).map(
        "".join
    ),
)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=texts)
@example(text="a  \nb a\n\nb a.\nb a.\n/b it's\r\n's " * 20)
@example(text="你好，好" * 40)
@example(text="\r\n" * 60)
@example(text="𠮷" * 40)
def test_borders_change_no_id(tmp_path: Path, name: str, text: str) -> None:
    file, tokenizer = tmp_path / "t.txt", TOKENIZERS[name]
    file.write_bytes(text.encode())
    meant = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not meant.strip(" \n\r\t"):
        with pytest.raises(InputError, match="holds nothing but white space"):
            prepare(file, tmp_path / "shards", tokenizer, workers=1)
        return
    tokens = prepare(file, tmp_path / "shards", tokenizer, workers=1)
    assert ids_of(tokens) == expected(tokenizer, meant)
    assert tokens.manifest["characters"] == len(meant)
    assert tokens.manifest["text_bytes"] == len(meant.encode())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_texts_are_cut_at_all(tmp_path: Path, name: str) -> None:
    """Long texts are cut. Otherwise the test above would only see one shard and one chunk."""
    (tmp_path / "t.txt").write_text("a best test，你好。\n" * 30, encoding="utf-8")
    tokens = prepare(tmp_path / "t.txt", tmp_path / "shards", TOKENIZERS[name], workers=1)
    assert len(tokens.manifest["shards"]) > 10
    source = corpus.find_sources(tmp_path / "t.txt")[0]
    whole = documents.Piece(0, 0, source.size)
    chunks = list(documents.read_document(source, whole, 5, any_place=name == "char"))
    assert len(chunks) > 20
    assert "".join(text for text, _ in chunks) == "a best test，你好。\n" * 30


def test_reading_across_shards(tmp_path: Path, small: None) -> None:
    (tmp_path / "t.txt").write_text("ab好1 " * 50, encoding="utf-8")
    tokens = prepare(tmp_path / "t.txt", tmp_path / "shards", CHARACTERS, workers=1)
    every = ids_of(tokens)
    for start in range(0, len(every), 3):
        for count in (0, 1, 13, 64):
            if start + count <= len(every):
                assert tokens.read(start, count).tolist() == every[start : start + count]


def test_processes_make_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE", 4096)
    (tmp_path / "t.txt").write_text("it's a test, 你好。\n" * 2000, encoding="utf-8")
    folders = []
    for workers in (1, 2, 3):
        folders.append(tmp_path / str(workers))
        prepare(tmp_path / "t.txt", folders[-1], TOKENIZERS["qwen2"], workers=workers)
    assert content(folders[0]) == content(folders[1]) == content(folders[2])
    assert len(content(folders[0])) > 5


def test_what_goes_wrong_in_a_process_is_said_by_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PIECE", 4096)
    (tmp_path / "t.txt").write_bytes("it's a test，好\n".encode() * 6000 + b"\xff" + b"it's a test\n" * 3000)
    with pytest.raises(InputError, match=r"t\.txt:6001: not UTF-8: byte 0xff at column 1"):
        prepare(tmp_path / "t.txt", tmp_path / "s", CHARACTERS, workers=2)
    assert not [name for name in content(tmp_path / "s") if "tmp" in name]
    with pytest.raises(InputError, match="a process was killed"):
        list(run_in_processes(die, None, [0, 1, 2], [1, 1, 1], workers=2, title="dying"))


def die(shared: None, number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    many = Tokenizer.from_word2id(build_vocabulary(map(chr, range(0x10000, 0x10000 + 70_000))))
    (tmp_path / "t.txt").write_text(chr(0x10000 + 69_999), encoding="utf-8")
    tokens = prepare(tmp_path / "t.txt", tmp_path / "shards", many)
    assert tokens.manifest["dtype"] == "<u4"
    assert ids_of(tokens) == [70_002, 2]


# -- documents ----------------------------------------------------------------------------------------------


def test_a_folder_is_its_files_in_the_order_of_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books = tmp_path / "books"
    for name, text in {
        "b.txt": "b", "a/z.md": "s", "a/1.txt": "1", "c.jsonl": '{"text": "ab"}\n\n{"no": 1}\n{"text": "st"}',
        "empty.txt": "", ".hidden.txt": "x", "a/.git/x.txt": "x", "image.png": "x", "code.py": "x",
    }.items():  # fmt: skip
        (books / name).parent.mkdir(parents=True, exist_ok=True)
        (books / name).write_text(text, encoding="utf-8")
    tokens = prepare(books, tmp_path / "shards", CHARACTERS)
    assert ids_of(tokens) == expected(CHARACTERS, "1", "s", "b", "ab", "st")
    assert tokens.manifest["documents"] == 5
    said = capsys.readouterr().err
    assert "1 .png, 1 .py" in " ".join(sorted(re.findall(r"1 \.p\w+,? ?", said))) or "1 .png" in said
    assert f"{books / 'c.jsonl'}:3: skipped: `text` is missing" in said


def test_lines_are_counted_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE", 40)
    lines = ['{"text": "ab"}'] * 30
    lines[20] = "{"
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    tokens = prepare(tmp_path / "t.jsonl", tmp_path / "shards", CHARACTERS, workers=1)
    assert len(tokens.manifest["shards"]) > 5
    assert [(name, line) for name, line, _ in tokens.manifest["skipped"]] == [("t.jsonl", 21)]
    assert ids_of(tokens) == expected(CHARACTERS, *["ab"] * 29)


def test_unknown_characters_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("a天地a天a", encoding="utf-8")
    tokens = prepare(tmp_path / "t.txt", tmp_path / "shards", CHARACTERS)
    assert tokens.manifest["unknown"] == {"天": 2, "地": 1}
    assert "3 characters, 2 different ones" in capsys.readouterr().err
    prepare(tmp_path / "t.txt", tmp_path / "shards", CHARACTERS)
    assert "天 (2x)" in capsys.readouterr().err  # also when it was prepared before


def test_the_vocabulary_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE", 10)
    (tmp_path / "t.txt").write_bytes("\ufeff好a\r\nb\u2028a".encode() * 9)
    found = collect_characters(corpus.find_sources(tmp_path / "t.txt"), workers=1)
    assert found == set("好a\nb\u2028\ufeff")
    tokenizer = Tokenizer.from_word2id(build_vocabulary(found))
    tokens = prepare(tmp_path / "t.txt", tmp_path / "s", None, workers=1)
    assert Tokenizer(tmp_path / "s" / VOCABULARY) == tokenizer
    assert ids_of(tokens) == expected(tokenizer, "好a\nb\u2028a" + "\ufeff好a\nb\u2028a" * 8)
    monkeypatch.setattr(shards, "collect_characters", None)  # not called again
    prepare(tmp_path / "t.txt", tmp_path / "s", None)
    prepare(tmp_path / "t.txt", tmp_path / "s", tokenizer)
    (tmp_path / "s" / VOCABULARY).unlink()
    with pytest.raises(TypeError, match="NoneType"):  # it would be called: the vocabulary is gone
        prepare(tmp_path / "t.txt", tmp_path / "s", None)


BORDERING = ["it's", " a", "best 12", "你好", "，", "\n", "\r\n", "\n\n", " \n", "\t"]
BORDERING += ["<|endoftext|>", "* * *", "* *", "-", "- "]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("separator", ["auto", "blank", "* * *", "-"])
@settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(parts=st.lists(st.sampled_from(BORDERING), min_size=1, max_size=60))
def test_separators_wherever_the_borders_are(
    tmp_path: Path, name: str, separator: str, parts: list[str]
) -> None:
    """The slow twin splits the whole text into lines."""
    file, tokenizer = tmp_path / "t.txt", TOKENIZERS[name]
    text = "".join(parts)
    file.write_bytes(text.encode())
    line = {"auto": "<|endoftext|>", "blank": ""}.get(separator, separator)
    documents_: list[str] = [""]
    for each in text.replace("\r\n", "\n").splitlines(keepends=True):
        if each.rstrip(" \t\n") == line:
            documents_.append("")
        else:
            documents_[-1] += each
    meant = [each for each in documents_ if each]
    options = TextOptions(document_separator=separator)
    if not meant or not text.strip(" \n\r\t"):
        with pytest.raises(InputError, match="holds no"):
            prepare(file, tmp_path / "shards", tokenizer, options=options, workers=1)
        return
    tokens = prepare(file, tmp_path / "shards", tokenizer, options=options, workers=1)
    assert ids_of(tokens) == expected(tokenizer, *meant)
    assert tokens.manifest["documents"] == len(meant)


def test_a_separator_that_comes_late(tmp_path: Path) -> None:
    """The separator comes after the part by which a file is recognised, also in another encoding."""
    text = "ab好1 \n" * 20_000
    for codec in ("utf-8", "utf-16"):
        (tmp_path / "t.txt").write_bytes(f"{text}<|endoftext|>\nst\n".encode(codec))
        tokens = prepare(tmp_path / "t.txt", tmp_path / codec, CHARACTERS, workers=1)
        assert ids_of(tokens) == expected(CHARACTERS, text, "st\n")


# -- kept, damaged, changed ---------------------------------------------------------------------------------


def test_prepared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "t.txt", tmp_path / "shards"
    file.write_text("ab")
    first = prepare(file, folder, CHARACTERS)
    assert "prepared in" in capsys.readouterr().out
    (folder / "notes.txt").write_text("mine")
    before = content(folder)
    os.utime(file, (1, 1))  # touched, not changed
    again = prepare(file, folder, CHARACTERS)
    assert "as prepared in" in capsys.readouterr().out
    assert content(folder) == before
    assert again.fingerprint == first.fingerprint
    file.write_text("st")
    other = prepare(file, folder, CHARACTERS)
    assert "as prepared" not in capsys.readouterr().out
    assert ids_of(other) == expected(CHARACTERS, "st")
    assert other.fingerprint != first.fingerprint
    assert ids_of(prepare(file, folder, TOKENIZERS["gpt2"])) == expected(TOKENIZERS["gpt2"], "st")
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(ids_of(first)) == 3  # mapped: what was replaced stays readable to who has opened it


OPTIONS = {
    "text_field": (b'{"text": "a", "b": "st"}\n' * 2, TextOptions(text_field="b"), ["st"] * 2, ["a"] * 2),
    "encoding": (b"\xc3\xa4" * 9, TextOptions(encoding="cp1252"), ["\u00c3\u00a4" * 9], ["\u00e4" * 9]),
    "document_separator": (b"a\n\nb", TextOptions(document_separator="blank"), ["a\n", "b"], ["a\n\nb"]),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("before", [False, True], ids=["as written now", "as written before"])
def test_what_was_read_otherwise_is_not_kept(
    tmp_path: Path, kind: str, before: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    data, options, meant, usual = OPTIONS[kind]
    file, folder = tmp_path / "t", tmp_path / "shards"
    file.write_bytes(data)
    own = Tokenizer.from_word2id(build_vocabulary("abst\n\u00c3\u00a4\u00e4"))

    def prepared(reading: TextOptions) -> tuple[list[int], bool]:
        tokens = prepare(file, folder, own, options=reading)
        return ids_of(tokens), "as prepared" in capsys.readouterr().out

    assert prepared(TextOptions()) == (expected(own, *usual), False)
    if before:  # a manifest that says nothing of how the files were read: as usual
        manifest = read_manifest(folder)
        assert manifest is not None
        del manifest["reading"]
        write_manifest(folder, manifest)
        assert prepared(TextOptions()) == (expected(own, *usual), True)
    assert prepared(options) == (expected(own, *meant), False)
    assert prepared(options) == (expected(own, *meant), True)
    assert prepared(TextOptions()) == (expected(own, *usual), False)


def test_shards_of_before_that_were_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a\n\nb")
    prepare(tmp_path / "t", tmp_path / "s", CHARACTERS, options=TextOptions(document_separator="blank"))
    manifest = read_manifest(tmp_path / "s")
    assert manifest is not None
    del manifest["reading"]
    manifest["sources"][0]["separator"] = ""
    write_manifest(tmp_path / "s", manifest)
    assert ids_of(prepare(tmp_path / "t", tmp_path / "s", CHARACTERS)) == expected(CHARACTERS, "a\n\nb")


def test_a_vocabulary_of_characters_that_were_read_otherwise(tmp_path: Path) -> None:
    file, folder = tmp_path / "t.jsonl", tmp_path / "shards"
    file.write_text('{"text": "a", "b": "st"}\n' * 2)
    prepare(file, folder, None)
    prepare(file, folder, None, options=TextOptions(text_field="b"))
    assert Tokenizer(folder / VOCABULARY) == Tokenizer.from_word2id(build_vocabulary("st"))


def test_decoded_copies_are_made_once_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = "床前明月光，疑是地上霜。\n" * 30
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_bytes(texts.encode("gb18030"))
    (tmp_path / "t" / "b.csv").write_text("id,text\n1,霜\n", encoding="utf-8")
    opened: list[str] = []
    one = file_formats.open_data

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.name)
        return one(path, *arguments, **options)

    monkeypatch.setattr(corpus, "open_data", counted)
    tokens = prepare(tmp_path / "t", tmp_path / "s", None, workers=1)
    assert ids_of(tokens) == expected(Tokenizer(tmp_path / "s" / VOCABULARY), texts, "霜")
    assert sorted(opened) == ["a.txt", "b.csv"]
    assert sorted(content(tmp_path / "s")) == ["shard-00000.bin", "shards.json", "vocab.json"]


def test_lines_of_decoded_copies_are_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text('id,text\n1,"a\nb"\n\n2,st,more\n3,\n4,st\n')
    tokens = prepare(tmp_path / "t.csv", tmp_path / "s", CHARACTERS, workers=1)
    assert ids_of(tokens) == expected(CHARACTERS, "a\nb", "st")
    skipped = [(line, why.split(":")[0]) for _, line, why in tokens.manifest["skipped"]]
    assert skipped == [(5, "more cells than the head has"), (6, "`text` is empty")]
    assert (
        f"{tmp_path / 't.csv'}:5: skipped: more cells than the head has: 3 for 2" in capsys.readouterr().err
    )


def test_a_bad_byte_of_a_decoded_copy_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress("好\n好\n好\n".encode() + b"a\xff\n"))
    said = refusal(tmp_path / "t.txt.gz", tmp_path / "s")
    assert f"{tmp_path / 't.txt.gz'}:4: not UTF-8: byte 0xff at column 2" in said


# -- files that are larger than what is read whole ----------------------------------------------------------


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the limit for files that are read whole, so that a test can exceed it."""
    monkeypatch.setattr(file_formats, "_MOST", 100_000)
    monkeypatch.setattr(file_formats, "_BLOCK", 1000)


@pytest.mark.usefixtures("little")
def test_texts_are_of_any_size(tmp_path: Path) -> None:
    """This holds for text, JSON Lines and Parquet, for guessing the field, and for collecting characters."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    story = ["ab st 好 " * 50, "st ab"] * 400
    rows = [{"id": f"{i}", "story": text} for i, text in enumerate(story)]
    files = {
        "t.txt": "".join(story),
        "t.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    # text that cannot be compressed, because the file must be as large as its content
    noise = [hashlib.sha512(str(i).encode()).hexdigest() for i in range(800)]
    long = [f"{text}{extra}" for text, extra in zip(story, noise)]
    parquet.write_table(pyarrow.table({"id": noise, "story": long}), tmp_path / "t.parquet")
    for name in ("t.txt", "t.jsonl", "t.parquet"):
        assert (tmp_path / name).stat().st_size > 100_000
        with pytest.raises(InputError, match="not read whole"):
            file_formats.read_bytes(tmp_path / name)
        texts_ = "".join(corpus.read_texts(tmp_path / name))
        assert texts_.startswith(story[0][:9])
        tokens = prepare(tmp_path / name, tmp_path / f"s {name}", None, workers=1)
        assert tokens.manifest["characters"] == len(texts_)
    assert corpus.recognise(tmp_path / "t.txt").holds_texts
    conversations = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.table({"question": noise, "answer": noise}), conversations)
    assert len(read_conversations(conversations)[0]) == 800


@pytest.mark.usefixtures("little")
def test_what_is_read_whole_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("床前明月光" * 30_000, encoding="gb18030")
    with pytest.raises(InputError, match="not read whole"):
        prepare(tmp_path / "t.txt", tmp_path / "s", CHARACTERS)
    (tmp_path / "t.gz").write_bytes(gzip.compress(b"a" * 200_000))
    with pytest.raises(InputError, match="unpacks to more than"):
        prepare(tmp_path / "t.gz", tmp_path / "s", CHARACTERS)


def test_the_longest_field_of_parquet_is_found_among_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    # `system` and `tools` are known names of fields in conversations
    table = pyarrow.table({"system": ["a", "b"], "Story": ["st st", "ab ab"], "tools": ["a", "b"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    tokens = prepare(tmp_path / "t.parquet", tmp_path / "s", CHARACTERS)
    assert ids_of(tokens) == expected(CHARACTERS, "st st", "ab ab")
    assert "'Story'" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_noticed(tmp_path: Path, damage: str) -> None:
    file, folder = tmp_path / "t.txt", tmp_path / "shards"
    file.write_text("ab" * 100)
    prepare(file, folder, CHARACTERS)
    shard = folder / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[77] ^= 1
    match damage:
        case "flip":
            shard.write_bytes(data)
        case "cut":
            shard.write_bytes(data[:-2])
        case "remove":
            shard.unlink()
    with pytest.raises(InputError, match=r"shard-00000\.bin .* damaged; remove .*shards\.json"):
        prepare(file, folder, CHARACTERS)
    (folder / "shards.json").unlink()  # what the message says
    assert ids_of(prepare(file, folder, CHARACTERS)) == expected(CHARACTERS, "ab" * 100)


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "tokenizer": 3}']
)
def test_a_damaged_manifest_is_made_anew(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "t.txt").write_text("ab")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards.json").write_text(manifest)
    assert ids_of(prepare(tmp_path / "t.txt", tmp_path / "shards", CHARACTERS)) == expected(CHARACTERS, "ab")


SCRIPT = """
import sys
from pathlib import Path
from minigpt.data import shards
from minigpt.tokenizer import Tokenizer

if __name__ == "__main__":
    shards.PIECE = int(sys.argv[4])
    shards.prepare(Path(sys.argv[1]), Path(sys.argv[2]), Tokenizer(sys.argv[3]), workers=2)
"""


def test_killed_while_it_prepares_it_goes_on(tmp_path: Path) -> None:
    """It gets SIGKILL twice, each time after another shard. No process is left, and the files are equal."""
    file, script, vocabulary = tmp_path / "t.txt", tmp_path / "script.py", tmp_path / "vocab.json"
    script.write_text(SCRIPT)
    file.write_text("it's a best test，你好。\n" * 100_000, encoding="utf-8")  # about 3 MB
    CHARACTERS.save(vocabulary)

    def start(folder: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(script), str(file), str(tmp_path / folder), str(vocabulary), "200000"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)

    def finished() -> int:
        return len(list((tmp_path / "killed").glob("shard-*.json")))

    straight = start("straight")
    assert straight.communicate(timeout=120)[0].count(b"prepared in") == 1
    kills = 0
    for _ in range(2):
        before, killed = finished(), start("killed")
        while killed.poll() is None and finished() <= before:
            time.sleep(0.002)
        killed.kill()
        kills += killed.wait() == -signal.SIGKILL
        # Its child processes also hold its stdout, so reading to the end waits for them.
        killed.communicate(timeout=60)
        assert not (tmp_path / "killed" / "shards.json").exists() or killed.returncode == 0
    assert kills
    at_last = start("killed")
    said, _ = at_last.communicate(timeout=120)
    assert at_last.returncode == 0, said
    assert b"shards were finished before, and are kept" in said
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


def test_a_kept_shard_is_verified_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shards, "PIECE", 1000)
    (tmp_path / "t.txt").write_text("abst" * 2000)
    made: Iterator[int] = iter(range(3))
    one = shards._make

    def interrupted(shared: tuple[Path, shards.TextTokenizer], job: shards._Job) -> object:
        if next(made, None) is None:
            raise KeyboardInterrupt
        return one(shared, job)

    monkeypatch.setattr(shards, "_make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "t.txt", tmp_path / "s", CHARACTERS, workers=1)
    names = set(content(tmp_path / "s"))
    assert names == {f"shard-0000{i}.{kind}" for i in range(3) for kind in ("bin", "json")}
    damaged = tmp_path / "s" / "shard-00001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    (tmp_path / "s" / ".shard-00005.bin.tmp-99").write_text("a killed process's")
    monkeypatch.setattr(shards, "_make", one)
    tokens = prepare(tmp_path / "t.txt", tmp_path / "s", CHARACTERS, workers=1)
    assert "2 of 8 shards were finished before" in capsys.readouterr().out
    assert ids_of(tokens) == expected(CHARACTERS, "abst" * 2000)
    assert {name for name in content(tmp_path / "s") if not name.endswith(".bin")} == {"shards.json"}


def test_a_text_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("ab")
    one = shards._make

    def and_change(shared: tuple[Path, shards.TextTokenizer], job: shards._Job) -> object:
        record = one(shared, job)
        (tmp_path / "t.txt").write_text("abc")
        return record

    monkeypatch.setattr(shards, "_make", and_change)
    with pytest.raises(InputError, match="was changed while it was read"):
        prepare(tmp_path / "t.txt", tmp_path / "s", CHARACTERS)
    assert not (tmp_path / "s" / "shards.json").exists()


MEMORY = """
import resource, sys
from pathlib import Path
from minigpt.data.worker_pool import run_in_processes
from minigpt.data.shards import prepare
from minigpt.tokenizer import Tokenizer

if __name__ == "__main__":
    small, large, folder, vocabulary = sys.argv[1:]
    tokenizer = Tokenizer(vocabulary)
    prepare(Path(small), Path(folder) / "1", tokenizer, workers=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare(Path(large), Path(folder) / "2", tokenizer, workers=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    script, vocabulary = tmp_path / "script.py", tmp_path / "vocab.json"
    script.write_text(MEMORY)
    CHARACTERS.save(vocabulary)
    line = "it's a best test，你好。\n"
    for name, megabytes in (("small", 3), ("large", 30)):
        (tmp_path / name).write_text(line * (megabytes * 1_000_000 // len(line.encode())), encoding="utf-8")
    command = [
        sys.executable,
        str(script),
        *(str(tmp_path / name) for name in ("small", "large", "", "vocab.json")),
    ]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    # 27 MB more of text, 36 MB more of ids; what grows is the allocator's slack of a few blocks
    assert int(ran.stdout.splitlines()[-1]) < 12_000


# -- rubbish ------------------------------------------------------------------------------------------------


def refusal(path: Path, folder: Path, tokenizer: shards.TextTokenizer = CHARACTERS) -> str:
    with pytest.raises(InputError) as caught:
        prepare(path, folder, tokenizer, workers=1)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (folder / "shards.json").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "holds nothing but white space"),
        (b"\n \r\n", "holds nothing but white space"),
        (b"ab\nab\0", "is a binary file (it holds zero bytes)"),
        (b"a\xe5\xa5\xbd\nab\xff\n", ":2: not UTF-8: byte 0xff at column 3"),
        ("好\n".encode() * 9 + b"\xe5\xa5", ":10: not UTF-8: byte 0xe5 at column 1"),
        (b"\xed\xa0\x80", "its encoding is not certain"),
        (b"%PDF-1.7", "is a PDF file"),
        (b"PAR1", "is damaged or no Parquet file"),
    ],
)
def test_rubbish_is_refused(tmp_path: Path, data: bytes, message: str, small: None) -> None:
    (tmp_path / "t.txt").write_bytes(data)
    assert message in refusal(tmp_path / "t.txt", tmp_path / "s")


def test_a_zero_byte_behind_what_is_read_to_recognise_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PIECE", 4000)
    monkeypatch.setattr(shards, "CHUNK", 500)
    monkeypatch.setattr(documents, "_BLOCK", 700)
    (tmp_path / "t.txt").write_bytes(b"ab\n" * 30_000 + b"ab\0")
    expected = ":30001: a zero byte at column 3: this is no text file"
    assert expected in refusal(tmp_path / "t.txt", tmp_path / "s")


def test_no_folder_no_files(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none", tmp_path / "s")
    (tmp_path / "books").mkdir()
    assert "holds no .txt, .md, .jsonl, .ndjson, .json, .csv, .tsv, .xlsx, .parquet file" in refusal(
        tmp_path / "books", tmp_path / "s"
    )
    (tmp_path / "books" / "a.txt").touch()
    (tmp_path / "books" / "b.txt").write_text("\n")
    assert "every file in it is empty" in refusal(tmp_path / "books", tmp_path / "s")


def test_questions_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert "minigpt split --input" in refusal(tmp_path / "t.jsonl", tmp_path / "s")


def test_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    (tmp_path / "t.txt").write_text("a" * 3000)
    assert ids_of(prepare(tmp_path / "t.txt", tmp_path / "c", CHARACTERS)) == expected(CHARACTERS, "a" * 3000)
    bpe = TOKENIZERS["gpt2"]  # nowhere to cut: encoded as a whole
    assert ids_of(prepare(tmp_path / "t.txt", tmp_path / "b", bpe)) == expected(bpe, "a" * 3000)
    monkeypatch.setattr(documents, "_LONGEST", 1000)
    assert "without a line's end or a space" in refusal(tmp_path / "t.txt", tmp_path / "s", bpe)


class _Joining:
    """A tokenizer whose tokens are any two characters, so a text cannot be cut anywhere."""

    fingerprint, eos_token_id = "joining", 0

    def get_vocab_size(self) -> int:
        return 1 << 16

    def encode_array(self, text: str, /) -> npt.NDArray[np.int32]:
        return np.array([hash(text[i : i + 2]) % 60_000 for i in range(0, len(text), 2)], dtype=np.int32)


def test_a_tokenizer_that_joins_words_is_noticed(tmp_path: Path, small: None) -> None:
    (tmp_path / "t.txt").write_text("a best, tested\n" * 20)
    assert "this tokenizer joins what stands on both sides" in refusal(
        tmp_path / "t.txt", tmp_path / "s", _Joining()
    )


def test_no_token_to_end_a_document(tmp_path: Path) -> None:
    tokenizer = _Joining()
    tokenizer.eos_token_id = None  # type: ignore[assignment]
    (tmp_path / "t.txt").write_text("ab")
    with pytest.raises(InputError, match="no end-of-text token"):
        prepare(tmp_path / "t.txt", tmp_path / "s", tokenizer)
