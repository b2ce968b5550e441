"""`minigpt quickstart`: its files, its printed commands, interruptions, bad input."""

import contextlib
import gzip
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minigpt import build_vocab
from minigpt.commands import chat, quickstart
from minigpt.data import corpus, file_formats, reader
from minigpt.errors import InputError
from minigpt.training import autosize
from minigpt.training.autosize import Shape
from minigpt.training.step import TrainStep
from tests.commands import RunCommand

SHOP = (Path(__file__).parents[1] / "data/shop.csv").read_text(encoding="utf-8")
MINUTES = 20  # the data ends a run, not the clock
ROMANCE = "".join(f"第{n}回　　山中有一座小庙，庙里住着{n}个和尚，天天下山挑水。\n" for n in range(60))


class Made(NamedTuple):
    folder: Path
    result: dict[str, Any]
    printed: str

    @property
    def commands(self) -> list[str]:
        found: list[str] = self.result["commands"]
        return found


@contextlib.contextmanager
def tiny_models(steps: int) -> Iterator[None]:
    """Let quickstart take some seconds: one small shape, few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autosize, "LADDER", (Shape(1, 32, 1),))
        patch.setattr(autosize, "_STEPS_OF_LITTLE_DATA", steps)
        patch.setattr(autosize, "_EPOCHS_OF_TEXT", 1.0)
        patch.setattr(sys, "stdin", io.StringIO())
        yield


def make(file: Path, folder: Path, steps: int = 60, **options: Any) -> Made:
    printed = io.StringIO()
    with tiny_models(steps), contextlib.redirect_stdout(printed):
        given = quickstart.Options(file=file, output=folder, minutes=MINUTES, **options)
        return Made(folder, quickstart.main(given), printed.getvalue())


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Run quickstart on a table of fifty pairs, as Excel saves it in China."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.csv").write_bytes(SHOP.encode("gb18030"))
    return make(folder / "shop.csv", folder / "made")


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("novel")
    (folder / "novel.txt").write_bytes(ROMANCE.encode("gb18030"))
    return make(folder / "novel.txt", folder / "made", steps=8)


def verbs(made: Made) -> list[str]:
    return [command.split()[1] for command in made.commands]


# -- what is left behind ------------------------------------------------------------------------------------


def test_the_folder_is_that_of_the_single_commands(shop: Made) -> None:
    names = {path.name for path in shop.folder.iterdir()}
    assert names >= {"vocab.json", "train.jsonl", "val.jsonl", "split.json", "run"}
    assert (shop.folder / "run/best/model.safetensors").exists()
    assert verbs(shop) == ["vocab", "split", "stats", "train", "eval", "eval", "chat"]
    lines = shop.printed.splitlines()
    assert [line[2:] for line in lines if line.startswith("$ ")] == shop.commands
    assert "50 pairs" in lines[0]
    assert lines[-1] == f"$ minigpt chat --model {shop.folder / 'run/best'}"


def test_the_numbers_are_those_of_the_commands(shop: Made) -> None:
    result = shop.result
    assert (result["split"]["result"]["train"], result["split"]["result"]["val"]) == (45, 5)
    right, wrong = result["right"], result["wrong"]
    asked = result["evaluation"]["count"]
    assert asked == 5
    assert len(right) == min(4, round(asked * result["evaluation"]["exact_match"]))
    assert all(row["expected"] == row["given"] for row in right)
    assert all(row["expected"] != row["given"] for row in wrong)
    # It knows the pairs of training, because fifty pairs are few.
    assert result["recall"]["exact_match"] > 0.9


def again(made: Made, folder: Path, run_command: RunCommand, stdin: str) -> list[str]:
    """Run the printed commands again, in another folder. Return the output of each."""
    printed = []
    with tiny_models(60 if made.result["kind"] == "pairs" else 8):
        for command in made.commands:
            words = shlex.split(command.replace(str(made.folder), str(folder)))
            assert words[0] == "minigpt"
            result = run_command(words[1], *words[2:], stdin=stdin.encode())
            assert result.code == 0, f"{command}: {result.err}"
            printed.append(result.out)
    return printed


def test_each_command_works_when_typed(shop: Made, tmp_path: Path, run_command: RunCommand) -> None:
    printed = again(shop, tmp_path / "typed", run_command, "几点开门？\n")
    for name in ("vocab.json", "train.jsonl", "val.jsonl"):
        assert (tmp_path / "typed" / name).read_bytes() == (shop.folder / name).read_bytes()
    match = f"exact match   {shop.result['evaluation']['exact_match']:.1%} of 5 questions"
    assert match in printed[4]
    assert printed[-1].strip()  # an answer


def test_text_is_continued(novel: Made, tmp_path: Path, run_command: RunCommand) -> None:
    assert verbs(novel) == ["vocab", "train", "generate", "generate", "chat"]
    assert f"text, {len(ROMANCE):,} characters" in novel.printed
    printed = again(novel, tmp_path / "typed", run_command, "山中\n")
    for text, said in zip(printed[2:4], novel.result["continuations"], strict=True):
        assert said["prompt"] in ROMANCE[-len(ROMANCE) // 3 :]
        assert text.rstrip("\n") == said["text"].rstrip("\n")


def test_few_pairs_are_learned_by_heart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line for number, line in enumerate(SHOP.splitlines()[1:]) if number % 5 == 0]
    file = tmp_path / "few.csv"
    file.write_text("\n".join(["问题,答案", *rows]), encoding="utf-8")
    made = make(file, tmp_path / "made", steps=100)
    assert made.result["evaluation"]["exact_match"] == 1.0
    assert made.result["evaluation"]["count"] == 10
    err = capsys.readouterr().err
    assert "only 10 pairs: the model learns all of them by heart" in err
    assert "about 300" in err


def test_answers_that_come_once_are_learned_by_heart_too() -> None:
    pairs = [("问题一？", "甲"), ("问题二？", "乙"), ("问题三？", "丙")] * 20
    several = [quickstart_pair(q, a) for q, a in pairs]
    assert quickstart._by_heart(several) == ""
    once = [quickstart_pair(f"问{n}？", f"答{n}") for n in range(60)]
    assert "100% of the answers come once" in quickstart._by_heart(once)
    many = [quickstart_pair(f"问{n}？", f"答{n}") for n in range(1001)]
    assert quickstart._by_heart(many) == ""


def quickstart_pair(question: str, answer: str) -> Any:
    from minigpt.data.conversation import conversation_of_pair

    return conversation_of_pair(question, answer)


def test_conversations_are_talked_about_with_their_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [line.split(",") for line in SHOP.splitlines()[1:]]
    lines = []
    for first, second in zip(turns, turns[7:] + turns[:7]):
        roles = zip(("user", "assistant") * 2, (*first, *second))
        messages = [{"role": role, "content": text} for role, text in roles]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(quickstart, "_RECALLED", 99)  # 50 conversations, but 100 answers take their time
    made = make(tmp_path / "talks.jsonl", tmp_path / "made", steps=2)
    assert made.commands[-1].endswith("--history")
    assert made.result["read"]["pairs"] == 100
    assert "recall" not in made.result


def test_on_a_terminal_the_conversation_begins(
    shop: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[chat.Options] = []
    monkeypatch.setattr(chat, "main", begun.append)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    options = quickstart.Options(file=shop.folder.parent / "shop.csv", output=shop.folder)
    result = quickstart.main(options)
    assert [each.model for each in begun] == [shop.folder / "run/best"]
    # run again on the same file: nothing is trained
    assert "training is finished" in capsys.readouterr().out
    assert [command.split()[1] for command in result["commands"]] == ["train", "eval", "eval", "chat"]


# -- interruptions ------------------------------------------------------------------------------------------


def test_ctrl_c_in_training_and_the_same_command_again(
    tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shop.csv"
    file.write_text(SHOP, encoding="utf-8")
    typed = ("quickstart", file, "--output", tmp_path / "made", "--minutes", MINUTES)
    original, steps = TrainStep.update, iter(range(1000))

    def update(self: TrainStep, *arguments: Any) -> None:
        original(self, *arguments)
        if (self.progress.steps_done, next(steps)) == (3, 3):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainStep, "update", update)
    with tiny_models(12):
        first = run_command(*typed)
        assert first.code == 130, first.err
        *progress, last = first.err.splitlines()
        assert last == f"minigpt quickstart: interrupted; the same command continues in {tmp_path / 'made'}"
        assert not [line for line in progress if "Error" in line or "Traceback" in line]
        monkeypatch.setattr(TrainStep, "update", original)
        second = run_command(*typed, "--json")
    assert second.code == 0, second.err
    assert "resumed from" in second.out
    result = json.loads(second.out.splitlines()[-1])
    assert result["training"]["steps"] == 12
    assert f"minigpt train --output {tmp_path / 'made/run'} --resume" in result["commands"]


def test_ctrl_c_before_training(
    tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shop.csv"
    file.write_text(SHOP, encoding="utf-8")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_vocab, "build", interrupted)
    result = run_command("quickstart", file, "--output", tmp_path / "made")
    assert result.code == 130
    assert len(result.err.splitlines()) == 1
    assert "the same command continues" in result.err


def test_without_a_model_the_newest_one_is_named(
    shop: Made, tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output/shop").symlink_to(shop.folder)
    monkeypatch.chdir(tmp_path)
    for verb in ("generate", "chat", "eval"):
        result = run_command(verb, stdin="几点开门？\n".encode())
        assert result.code == 2
        assert result.err.endswith(
            "output/best does not exist; the newest model here: --model output/shop/run/best\n"
        )
    answer = run_command("generate", "--model", "output/shop/run/best", "--question", "几点开门？")
    assert answer.code == 0


# -- bad input ----------------------------------------------------------------------------------------------


def test_other_data_in_the_same_folder_is_refused(
    shop: Made, run_command: RunCommand, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text(SHOP.replace("人民路", "中山路"), encoding="utf-8")
    before = (shop.folder / "vocab.json").read_bytes()
    result = run_command("quickstart", other, "--output", shop.folder)
    assert result.code == 2
    assert result.err.splitlines() == [
        f"quickstart.py: error: {shop.folder} was made from other data: choose another folder with --output, "
        "or move it away"
    ]
    assert (shop.folder / "vocab.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, (), "does not exist"),
        (b"", (), "is empty"),
        (b'{"a": 1}\n', (), "holds no question with an answer"),
        (SHOP.encode(), ("--minutes", 0), "minutes must be from 0.01 to 14400: got minutes=0.0"),
        (SHOP.encode(), ("--minute", 1), "did you mean '--minutes'"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, run_command: RunCommand, content: bytes | None, more: tuple[object, ...], message: str
) -> None:
    file = tmp_path / "file.csv"
    if content is not None:
        file.write_bytes(content)
    result = run_command("quickstart", file, "--output", tmp_path / "made", *more)
    assert result.code == 2, result.err
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "made/run").exists()


def test_too_little_time_is_told_in_minutes(
    tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shop.csv"
    file.write_text(SHOP, encoding="utf-8")
    asked: list[str] = []

    def affordable(self: Any, shape: Shape) -> tuple[int, int]:
        asked.append(self.size.text)
        return (0, 1) if self.size.text == "0.1min" else (40, 1)

    monkeypatch.setattr(autosize._Choice, "_affordable", affordable)
    with tiny_models(2):
        made = run_command("quickstart", file, "--output", tmp_path / "made", "--minutes", 0.1, "--json")
    assert made.code == 0, made.err
    assert "the time is raised from --minutes 0.1 to 0." in made.err
    commands = json.loads(made.out.splitlines()[-1])["commands"]
    (train,) = [command for command in commands if " train " in command]
    assert "--size 0.1min" not in train  # what is reported works when typed
    assert len(set(asked)) == 2


def test_a_large_file_is_not_measured_for_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_MEASURED", 3)
    file = tmp_path / "shop.csv"
    file.write_text(SHOP, encoding="utf-8")
    made = make(file, tmp_path / "made", steps=2)
    assert made.result["evaluation"]["count"] == 3


def test_a_system_text_and_foreign_columns_are_read(tmp_path: Path, run_command: RunCommand) -> None:
    messages = [
        {"role": role, "content": text}
        for role, text in (("system", "甲"), ("user", "乙"), ("assistant", "丙"))
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": messages}, ensure_ascii=False), encoding="utf-8")
    vocabulary = tmp_path / "vocab.json"
    assert run_command("vocab", "--data", file, "--output", vocabulary).code == 0
    assert "\n" in json.loads(vocabulary.read_text(encoding="utf-8"))["word2id"], (
        "between the system text and the question"
    )
    table = tmp_path / "fragen.csv"
    table.write_text("Frage;Antwort\nWo?;Hier.\nWann?;Jetzt.\n", encoding="utf-8")
    result = run_command("vocab", "--data", table, "--output", vocabulary)
    assert "from 2 pairs" in result.out
    assert result.err == ""


def test_named_fields_are_those_of_the_file_and_not_of_its_split(
    tmp_path: Path, run_command: RunCommand
) -> None:
    file = tmp_path / "shop.csv"
    file.write_text(SHOP.replace(SHOP.splitlines()[0], "标题,正解"), encoding="utf-8")
    made = make(file, tmp_path / "made", steps=2, question_field="标题", answer_field="正解")
    flags = shlex.join(["--question_field", "标题", "--answer_field", "正解"])
    assert [flags in command for command in made.commands] == [True, True, *[False] * 5]
    few = tmp_path / "few.csv"  # learned by heart, from the file itself
    few.write_text("标题,正解\n天？,蓝。\n草？,绿。\n", encoding="utf-8")
    made = make(few, tmp_path / "few", steps=2, question_field="标题", answer_field="正解")
    assert verbs(made) == ["vocab", "split", "stats", "train", "eval", "chat"]
    assert [flags in command for command in made.commands] == [True] * 5 + [False]


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_very_few_pairs(tmp_path: Path, count: int) -> None:
    file = tmp_path / "few.csv"
    file.write_text("\n".join(SHOP.splitlines()[: count + 1]), encoding="utf-8")
    made = make(file, tmp_path / "made", steps=2)
    assert made.result["evaluation"]["count"] == count
    assert verbs(made) == ["vocab", *(["split"] if count > 1 else []), "stats", "train", "eval", "chat"]


def test_what_to_compute_on_is_passed_on(tmp_path: Path) -> None:
    for name, content in (("shop.csv", SHOP), ("novel.txt", ROMANCE)):
        (tmp_path / name).write_text(content, encoding="utf-8")
        made = make(tmp_path / name, tmp_path / name[:4], steps=2, device="cpu", threads=1)
        computing = [c for c in made.commands if c.split()[1] in ("train", "eval", "generate", "chat")]
        assert all("--device cpu --threads 1" in command for command in computing), computing
        assert len(computing) == 4


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "shop.csv").write_text(SHOP, encoding="utf-8")
    with pytest.raises(InputError, match="device 'cuda:99' cannot be used here"):
        make(tmp_path / "shop.csv", tmp_path / "made", device="cuda:99")
    assert not (tmp_path / "made").exists()


def test_a_file_is_opened_once_to_make_its_vocabulary(
    tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    one = file_formats.open_data

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.name)
        return one(path, *arguments, **options)

    for module in (corpus, reader):
        monkeypatch.setattr(module, "open_data", counted)
    files = {
        "shop.csv": SHOP.encode("gb18030"),
        "novel.txt": ROMANCE.encode("gb18030"),
        "texts.csv": b"text\none\ntwo\n",
        "packed.gz": gzip.compress(SHOP.encode(), mtime=0),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        result = run_command("vocab", "--data", tmp_path / name, "--output", tmp_path / f"{name}.json")
        assert result.code == 0, result.err
        assert result.err.count("read as GB18030") == (name in ("shop.csv", "novel.txt"))
    assert opened == list(files)


@pytest.mark.parametrize("name", ["novel.txt", "novel.csv", "novel.jsonl"])
def test_a_text_is_read_once_and_what_is_said_of_it_too(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / name
    rows = [{"id": f"{n}", "story": line} for n, line in enumerate(ROMANCE.splitlines())]
    if name == "novel.txt":
        file.write_text(ROMANCE, encoding="gb18030")
    elif name == "novel.csv":
        table = "".join(f"{n},7,{row['story']}\n" for n, row in enumerate(rows))
        file.write_text(f"id,score,story\n{table}", encoding="gb18030")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = {} if name != "novel.csv" else {"text_field": "story"}
    if name == "novel.jsonl":
        monkeypatch.setattr(build_vocab, "recognised", lambda options: corpus.Recognised(True))
    first = make(file, tmp_path / "made", steps=2, **more)
    err = capsys.readouterr().err
    assert err.count("read as GB18030") == (name != "novel.jsonl")
    assert err.count("the longest field") == (name == "novel.jsonl")
    (train,) = [command for command in first.commands if " train " in command]
    assert ("--text_field story" in train) == (name != "novel.txt")
    assert ("--encoding gb18030" in train) == (name != "novel.jsonl")

    def read(*_: object, **__: object) -> Any:
        raise AssertionError("the texts are read again")

    monkeypatch.setattr(corpus, "read_sources", read)
    again = make(file, tmp_path / "made", steps=2, **more)
    for key in ("characters", "continuations"):
        assert again.result[key] == first.result[key]
    assert again.result["characters"] == sum(map(len, ROMANCE.splitlines())) + 60 * (name == "novel.txt")
