"""Runs each command that a message about data recommends, on the input that caused the message."""

import json
import os
import re
import shlex
import threading
from pathlib import Path

import pytest

from minigpt.data.memory_mapped import read_manifest
from minigpt.data.reader import read_conversations
from tests.commands import Result, RunCommand

POEM = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n" * 9
FRENCH = "Où est-il passé ? L'été, la forêt est très animée à midi.\n" * 3
PAIRS = [(f"{i}加一等于几？", f"{i + 1}。") for i in range(8)]
QUESTIONS = "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in PAIRS)
SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=2", "--max_steps=1"]
# verb -> the flags that name the data; output goes below the folder "out"
READING = {
    "vocab": "--data",
    "split": "--input",
    "stats": "--train_data",
    "eval": "--data",
    "train": "--train_data",
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the working folder, with a vocabulary and a folder that looks like a model until it is loaded."""
    monkeypatch.chdir(tmp_path)
    words = {"<pad>": 0, "<unk>": 1, "<sep>": 2, "a": 3}
    (tmp_path / "vocab.json").write_text(json.dumps({"word2id": words}))
    (tmp_path / "model").mkdir()
    return tmp_path


def refusal(run: RunCommand, verb: str, *arguments: object) -> str:
    more = {
        "stats": ["--vocab_path=vocab.json"],
        "train": ["--vocab_path=vocab.json", "--output=out"],
        "eval": [] if "--model=model" in arguments else ["--model=model"],
        "vocab": ["--output=out/vocab.json"],
    }
    result = run(verb, *arguments, *more.get(verb, []))
    assert result.code == 2, result
    assert result.err.count("error:") == 1
    return result.err


def follow(run: RunCommand, said: str, *more: str) -> Result:
    """Run the command at the end of a message."""
    found = re.search(r"minigpt ((?:train|split) .*)$", said.strip())
    assert found, said
    result = run(*shlex.split(found[1]), *more)
    assert result.code == 0, result.err
    return result


def train_as_said(run: RunCommand, said: str) -> dict[str, int]:
    """Run `minigpt train --text ...` as the message says. Return what it has read."""
    follow(run, said, *SMALL, "--output=out", "--device=cpu")
    manifest = read_manifest(Path("out/shards"))
    assert manifest
    return manifest


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        *((verb, "plain text") for verb in ("split", "stats", "eval", "train")),
        ("stats", "records"),
        ("stats", "an encoding that was named"),
    ],
)
def test_texts_are_read_by_the_command_that_is_named(
    desk: Path, run_command: RunCommand, verb: str, kind: str
) -> None:
    path, text, more = desk / "my texts.data", POEM, []
    path.write_text(POEM, encoding="utf-8")
    if kind == "records":
        path.write_text(json.dumps({"text": POEM}) + "\n" + json.dumps({"text": POEM}) + "\n")
        text = POEM * 2
    if kind == "an encoding that was named":
        path.write_text(FRENCH, encoding="cp1252")
        text, more = FRENCH, ["--encoding=cp1252"]
    said = refusal(run_command, verb, READING[verb], path, *more)
    assert train_as_said(run_command, said)["characters"] == len(text)


@pytest.mark.parametrize("verb", ["split", "train"])
def test_a_folder_of_texts(desk: Path, run_command: RunCommand, verb: str) -> None:
    (desk / "books").mkdir()
    for name in ("a.txt", "b.md"):
        (desk / "books" / name).write_text(POEM, encoding="utf-8")
    said = refusal(run_command, verb, READING[verb], "books")
    assert train_as_said(run_command, said)["characters"] == 2 * len(POEM)


@pytest.mark.parametrize("verb", ["eval", "train", "vocab"])
def test_questions_given_as_texts(desk: Path, run_command: RunCommand, verb: str) -> None:
    (desk / "books").mkdir()
    path = desk / "books" / "q a.jsonl"
    path.write_text(QUESTIONS, encoding="utf-8")
    flags = {"eval": ("--text", path), "train": ("--text", path), "vocab": ("--data", "books")}
    said = refusal(run_command, verb, *flags[verb])
    follow(run_command, said)
    sides = [
        read_conversations(desk / "books" / f"{side}.jsonl", strict=True)[0] for side in ("train", "val")
    ]
    assert sorted((c.question, c.answer) for side in sides for c in side) == PAIRS


def test_texts_of_a_pipe(desk: Path, run_command: RunCommand) -> None:
    """No command can read a pipe twice, so the message must not recommend the pipe as a file."""
    assert "write it into a file first" in refusal_of_a_pipe(run_command, "train", "--text", POEM)
    said = refusal_of_a_pipe(run_command, "vocab", "--data", POEM)
    advice = re.search(r"write it into a file, and learn from it with `minigpt (train --text FILE)`", said)
    assert advice
    (desk / "FILE").write_text(POEM, encoding="utf-8")
    assert train_as_said(run_command, f"minigpt {advice[1]}")["characters"] == len(POEM)


def refusal_of_a_pipe(run: RunCommand, verb: str, flag: str, content: str) -> str:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as file:
        file.write(content)  # fits into a pipe's buffer
    try:
        return refusal(run, verb, flag, f"/dev/fd/{reading}")
    finally:
        os.close(reading)


@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_the_encoding_of_a_task(desk: Path, run_command: RunCommand, verb: str) -> None:
    (desk / "d.csv").write_text("text,label\n" + "Où est-il ?,là\nL'été,ça\n" * 2, encoding="cp1252")
    models = ["model", "model"] if verb == "compare" else ["--model=model"]
    said = refusal(run_command, verb, *models, "--task", "d.csv")
    (shown,) = [codec for codec, text in re.findall(r"--encoding (\w+): ([^;]*)", said) if "Où" in text][:1]
    # The file is read now. The next message is about the folder that only looks like a model.
    assert "model" in refusal(run_command, verb, *models, "--task", "d.csv", "--encoding", shown)


def test_a_model_that_is_missing(desk: Path, run_command: RunCommand) -> None:
    """The message names no flag that the command lacks."""
    said = refusal(run_command, "compare", "none", "model", "--task=d")
    assert "none does not exist: give the folder of a model" in said
    assert "--" not in said
    assert "name its folder with --model" in refusal(run_command, "generate", "--model=none", "--question=a")


def test_conversations_of_a_pipe(desk: Path, run_command: RunCommand) -> None:
    """The content is larger than a pipe's buffer, and comes in small parts."""
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb", buffering=0) as file:
            for line in (QUESTIONS * 400).splitlines(keepends=True):
                file.write(line.encode())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        result = run_command("vocab", "--data", f"/dev/fd/{reading}", "--output=out/vocab.json")
    finally:
        os.close(reading)
        writer.join()
    assert result.code == 0, result.err
    assert "3,200 pairs" in result.out


@pytest.mark.parametrize("verb", ["split", "stats", "vocab", "eval", "train"])
def test_the_encoding_that_a_message_shows(desk: Path, run_command: RunCommand, verb: str) -> None:
    (desk / "d").write_text(FRENCH, encoding="cp1252")
    flag = "--text" if verb in ("eval", "train") else READING[verb]
    said = refusal(run_command, verb, flag, "d")
    (shown,) = [choice for choice in re.findall(r"--encoding (\w+): ([^;]*)", said) if "Où" in choice[1]][:1]
    if verb in ("split", "stats"):
        assert "--encoding cp1252" in refusal(run_command, verb, flag, "d", "--encoding", shown[0])
    elif verb == "vocab":
        done = run_command(verb, flag, "d", "--encoding", shown[0], "--output=out/vocab.json")
        assert "Où"[1] in json.loads((desk / "out/vocab.json").read_text("utf-8"))["word2id"], done.err
    else:
        train_as_said(run_command, f"minigpt train --text d --encoding {shown[0]}")
        if verb == "eval":
            done = run_command("eval", "--text", "d", "--encoding", shown[0], "--model=out/best", "--json")
            assert done.code == 0, done.err
            assert json.loads(done.out.splitlines()[-1])["characters"] == len(FRENCH)


@pytest.mark.parametrize("verb", ["eval", "train", "vocab"])
def test_the_field_that_a_message_names(desk: Path, run_command: RunCommand, verb: str) -> None:
    """The text is not the longest field. `--text_field` finds it in each command that recommends it."""
    lines = [{"id": "x" * 200, "story": POEM[:99]}, {"id": "y" * 200, "story": POEM[:99]}]
    (desk / "d.json").write_text(json.dumps(lines), encoding="utf-8")
    (desk / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    train = run_command("train", "--text=d.json", "--text_field=story", *SMALL, "--output=out")
    assert train.code == 0, train.err
    flags = {
        "eval": ["--text=d.json", "--model=out/best"],
        "train": ["--text=d.json", *SMALL, "--output=new"],
    }
    arguments = flags.get(verb, ["--data=d.json", "--output=out/vocab.json"])
    for name in ("d.json", "d.jsonl"):
        of_name = [each.replace("d.json", name) for each in arguments]
        wrong = run_command(verb, *of_name, "--text_field=none")
        assert wrong.code == 2
        assert re.search("holds no text .*another field.*--text_field", wrong.err), wrong.err
    done = run_command(verb, *arguments, "--text_field=story", "--json")
    assert done.code == 0, done.err
    if verb == "eval":
        assert json.loads(done.out.splitlines()[-1])["characters"] == 2 * 99
    if verb == "eval":
        guessed = run_command(verb, *arguments)
        assert "taken from 'id', the longest field; another one: --text_field NAME" in guessed.err


@pytest.mark.parametrize("verb", ["split", "stats", "vocab"])
def test_the_fields_that_a_message_names(desk: Path, run_command: RunCommand, verb: str) -> None:
    rows = "".join(json.dumps({"标题": q, "正解": a}, ensure_ascii=False) + "\n" for q, a in PAIRS)
    (desk / "d").write_text(rows, encoding="utf-8")
    assert "--question_field NAME --answer_field NAME" in refusal(run_command, verb, READING[verb], "d")
    more = {"stats": ["--vocab_path=vocab.json"], "vocab": ["--output=out/vocab.json"]}.get(verb, [])
    fields = ["--question_field", "标题", "--answer_field", "正解"]
    assert run_command(verb, READING[verb], "d", *fields, *more).code == 0


@pytest.mark.parametrize("verb", ["split", "stats", "vocab"])
def test_texts_under_another_name(desk: Path, run_command: RunCommand, verb: str) -> None:
    lines = [{"id": "1", "story": POEM}] * 3
    (desk / "my stories").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    said = refusal(run_command, verb, READING[verb], "my stories")
    assert train_as_said(run_command, said)["characters"] == 3 * len(POEM)


@pytest.mark.parametrize("kind", ["a log", "rows"])
def test_a_group_that_talks_as_texts(desk: Path, run_command: RunCommand, kind: str) -> None:
    said = [(name, f"{name}{n}") for n, name in enumerate("甲乙丙" * 20)]
    if kind == "a log":
        content = "".join(f"2024-01-02 10:00:{n:02} {name}\n{text}\n" for n, (name, text) in enumerate(said))
        characters = len(content)
    else:
        rows = [
            {"sender": name, "content": text, "time": f"10:00:{n:02}"} for n, (name, text) in enumerate(said)
        ]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        characters = sum(len(text) for _, text in said)
    (desk / "the group").write_text(content, encoding="utf-8")
    refused = refusal(run_command, "vocab", "--data", "the group")
    assert "name the one whose messages are the answers with --speaker NAME" in refused
    assert train_as_said(run_command, refused)["characters"] == characters
    for verb in ("vocab", "split"):
        flags = {"vocab": ["--output=out/v.json"], "split": ["--output_dir=out", "--train_ratio=0.5"]}[verb]
        done = run_command(verb, READING[verb], "the group", "--speaker=丙", *flags)
        assert done.code == 0, done.err
