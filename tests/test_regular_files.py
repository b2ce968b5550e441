"""Pipes, devices, folders and links to themselves instead of files: each gives one line, without waiting."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.regular_files import open_regular, read_bytes, read_text
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights.pretrained import save_pretrained
from tests.commands import RunCommand

VOCABULARY = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *"你好吗 abc"])}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to(os.devnull)


def loop(path: Path) -> None:
    path.symlink_to(path)


KINDS: list[Callable[[Path], None]] = [pipe, device, Path.mkdir, loop]
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
kinds = pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a model, an adapter's configuration, data and a vocabulary."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = BpeTokenizer.train(["你好吗"], 280)
    model = GPTLMHeadModel(GPTConfig(8, 2, 1, 0.1, 32, 280, False, "exact"))
    save_pretrained(model, folder / "model", tokenizer)
    Tokenizer.from_word2id(VOCABULARY).save(folder / "vocab.json")
    pair = json.dumps({"question": "你好", "answer": "好"}, ensure_ascii=False) + "\n"
    (folder / "data.jsonl").write_text(pair * 3, encoding="utf-8")
    (folder / "prompts.txt").write_text("你好\n", encoding="utf-8")
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(folder)
    return folder


GENERATE = ("generate", "--model", "model", "--question", "你好", "--device", "cpu", "--max_new_tokens", "1")
TRAIN = ("train", "--train_data", "data.jsonl", "--val_data", "data.jsonl", "--vocab_path", "vocab.json")
COMMANDS = {  # path that is not a regular file -> command that reads it
    "data.jsonl": ("vocab", "--data", "data.jsonl", "--output", "new.json"),
    "vocab.json": ("stats", "--train_data", "data.jsonl", "--vocab_path", "vocab.json"),
    "model/config.json": GENERATE,
    "model/model.safetensors": GENERATE,
    "model/tokenizer.json": GENERATE,
    "model/tokenizer_config.json": GENERATE,
    "model/generation_config.json": GENERATE,
    "model/chat_template.jinja": GENERATE,
    "model/manifest.json": GENERATE,
    "prompts.txt": ("generate", "--model", "model", "--file", "prompts.txt", "--device", "cpu"),
    "recipe.toml": (*TRAIN, "--recipe", "recipe.toml", "--output", "run"),
    "text.txt": ("train", "--text", "text.txt", "--output", "run"),
    "task.toml": ("eval", "--model", "model", "--task", "task.toml", "--device", "cpu"),
    "run/run.json": ("doctor", "run"),
    "old.pth": ("import", "old.pth", "--vocab", "vocab.json", "--output", "new"),
    "tokens.txt": (*TRAIN, "--init_from", "model", "--add_tokens", "tokens.txt", "--output", "run"),
    "model/model.safetensors.index.json": GENERATE,
    "adapter/adapter_config.json": (*GENERATE, "--adapter", "adapter"),
}


@kinds
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_so_in_one_line(
    here: Path, run_command: RunCommand, name: str, make: Callable[[Path], None]
) -> None:
    path = here / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if path.name.endswith(".index.json"):
        path.with_name("model.safetensors").unlink()
    make(path)
    result = run_command(*COMMANDS[name])
    assert result.code == 2, result
    *notes, error = result.err.splitlines()
    assert "error: " in error
    assert Path(name).name in error or path.parent.name in error
    assert all(note.startswith(("warning: ", "note: ")) for note in notes)


@kinds
def test_opening_one_is_an_error_of_the_system(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    make(path)
    lowest = os.dup(0)
    os.close(lowest)
    for read in (open_regular, read_bytes, read_text):
        with pytest.raises(OSError, match=r"no regular file, but a|Is a directory|symbolic links") as caught:
            read(path)
        assert caught.value.filename == str(path)
    free = os.dup(0)
    os.close(free)
    assert free == lowest, "no descriptor is left open"


def test_a_pipe_of_the_shell_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    path = f"/dev/fd/{reader}"
    with pytest.raises(OSError, match="is no regular file, but a pipe"):
        read_bytes(path)
    assert read_bytes(path, or_pipe=True) == b"text"
    os.close(reader)
    pipe(tmp_path / "named")
    with pytest.raises(OSError, match="is no regular file, but a pipe"):
        read_bytes(tmp_path / "named", or_pipe=True)


def test_text_is_read_as_path_read_text_does(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff中\r\nb\rc\n".encode())
    assert read_text(path, "utf-8-sig") == path.read_text(encoding="utf-8-sig") == "中\nb\nc\n"
    path.write_bytes(b"\xff")
    assert read_text(path, errors="replace") == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        read_text(path)
