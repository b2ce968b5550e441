"""Runs each block of code in the documents, and compares its output with the document.

    python tests/test_documents.py                     # after a change of a message: rewrites all outputs
    python tests/test_documents.py docs/commands.md    # after a change of a flag: those of one document

A document is followed from top to bottom, in an empty folder with `minigpt/`, `data/` and the Makefile:

- ```bash: each command is run by its script, in this process; `make demo` by its lines in the Makefile;
- ```python: run in one namespace per document, as if a reader pasted all blocks into one session;
- ```text: the output of the block above it (`...` stands for anything), which is compared;
- ```jsonl: lines of the built-in corpus; ```tree: the files of minigpt/, one per line; both are compared;
- ```diagram: a drawing; ```jsonl NAME, ```text NAME: the reader makes a file NAME with this content.

Training is shortened (TO_SHORTEN). The output of such a block is compared line by line without numbers and
answers. So the measured numbers in documents are not checked, only the form of the lines.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minigpt.data import reader
from minigpt.data.field_names import FieldNames
from minigpt.data.records import meaning_of
from minigpt.lens.words import CHINESE
from tests.commands import options_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = {  # document that is run -> its translation, with the same blocks
    "README.zh-CN.md": "README.md",
    "docs/guide.zh-CN.md": "docs/guide.md",
    "docs/families.zh-CN.md": "docs/families.md",
    "docs/sampling.zh-CN.md": "docs/sampling.md",
    "docs/architecture.zh-CN.md": "docs/architecture.md",
    "docs/api.zh-CN.md": "docs/api.md",
    "docs/commands.zh-CN.md": "docs/commands.md",
    "docs/data.zh-CN.md": "docs/data.md",
    "docs/parity.zh-CN.md": "docs/parity.md",
    "docs/html.zh-CN.md": "docs/html.md",
    "docs/onnx.zh-CN.md": "docs/onnx.md",
    "docs/training.zh-CN.md": "docs/training.md",
    "docs/fine_tuning.zh-CN.md": "docs/fine_tuning.md",
    "docs/own_model.zh-CN.md": "docs/own_model.md",
    "docs/masked_lm.zh-CN.md": "docs/masked_lm.md",
    "docs/lens.zh-CN.md": "docs/lens.md",
    "docs/evaluation.zh-CN.md": "docs/evaluation.md",
    "docs/evaluation_example.zh-CN.md": "docs/evaluation_example.md",
    "data/README.md": "",  # both languages in one file
}
BOOK = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/book").glob("*.zh-CN.md"))
DOCUMENTS |= {name: name.replace(".zh-CN", "") for name in BOOK}
FILES = [name for pair in DOCUMENTS.items() for name in pair if name]
NEEDED = {"docs/onnx.zh-CN.md": ("onnx", "onnxruntime")}  # document -> packages without which it is not run
PLACE = "DEMO-OUTPUT-HERE"  # stands where what `make demo` and `make test` print is to be pasted

THE_TUTORIAL_S_COMMANDS = [
    "python ./minigpt/build_vocab.py --data ./data/data.jsonl --output ./data/vocab.json",
    "python ./minigpt/split_data.py --input ./data/data.jsonl --train_ratio 0.8",
    "python ./minigpt/dataset_stats.py --train_data ./data/train.jsonl --vocab_path ./data/vocab.json",
    "python ./minigpt/train.py",
    "python ./minigpt/generate.py",
]

_TINY = "--n_layer 1 --n_embd 32 --n_head 2 --eval_steps 4 --logging_steps 1"
TO_SHORTEN = {  # script -> flags that the tests add; no page shows the line of --precision auto
    "train.py": f"{_TINY} --max_steps 4 --precision float32",
    "finetune.py": "--max_steps 4 --eval_steps 4 --logging_steps 1",
    "evaluate.py": "--max_new_tokens 4",
    "generate.py": "--max_new_tokens 4",
}
LENS = "docs/lens.zh-CN.md"
# The page's questions are about two layers of four heads, and about step 105.
TO_SHORTEN_LENS = {
    "train.py": "--n_layer 2 --n_embd 32 --n_head 4 --batch_size 8 --max_steps 106 --keep_every 105 "
    "--eval_steps 106",
    "train.py of widths": f"{_TINY} --max_steps 4 --eval_steps 2",
    "experiment.py": "--steps 2",
    "evaluate.py": "--max_new_tokens 4",
}
# The output of these depends on the model, so only the names of columns are compared, in the page's language.
ABOUT_A_MODEL = {"look.py", "plot.py", "experiment.py", "doctor.py", "evaluate.py"}
# quickstart trains this model in seconds, so its answers are those that a reader sees.
IN_CHINESE = ABOUT_A_MODEL - {"evaluate.py"}  # what the page shows of these; of others, English
NOT_SHORTENED = "output/shop/run/best"
TO_GO_ON = f"{_TINY} --max_steps 6"  # for --resume: more than the four steps that were done
NOT_RUN = {  # command that is not run -> reason
    "make test": "this is it",
    ". .venv/bin/activate": "changes the reader's shell",
    "tensorboard --logdir output": "a server that only Ctrl-C ends",
    "python gpt2.py 'Alan Turing theorized that computers would one day become' --n_tokens_to_generate 40": (
        "fetches 500 MB; tests/test_gpt2_command.py runs it on a small model"
    ),
    "python benchmarks/masked_lm.py --steps 400 --output masked.json": (
        "takes minutes; tests/test_benchmarks.py runs it at toy size"
    ),
    "python benchmarks/look.py --output benchmarks/results/NAME.json": (
        "takes minutes, and a quiet machine; tests/test_benchmarks.py runs a command of it"
    ),
    "python benchmarks/evaluation.py --data ../shared/data --questions 32 --output evaluation.json": (
        "needs the harness and takes minutes; tests/test_benchmarks.py runs it at toy size"
    ),
    "python benchmarks/parity.py --gpt2_124m": "takes minutes; tests/parity/ compares the same at tiny sizes",
}
TYPED = {  # command -> what the reader types at its prompt, as on a terminal
    "python ./minigpt/generate.py": "四川的省会是哪里？\n你好\n\n",
}


# -- reading a document ------------------------------------------------------------------------------------


@dataclass
class Block:
    language: str
    name: str  # name of the file that the reader makes from this block, or ""
    text: str
    line: int  # number of its first line of text, from 1
    output: "Block | None" = None  # its output in the document

    @property
    def is_output(self) -> bool:
        return self.language == "text" and not self.name


def read_blocks(document: str) -> list[Block]:
    """Return all blocks of a document, fenced or indented. The block above an output refers to it."""
    blocks: list[Block] = []
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if fence := re.fullmatch(r"(`{3,})(\S*) ?(\S*)", line):
            end = lines.index(fence[1], number + 1)
            blocks.append(Block(fence[2], fence[3], "\n".join(lines[number + 1 : end]), number + 2))
            number = end
        elif line.startswith("    ") and not lines[number - 1]:
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end]):
                end += 1
            text = textwrap.dedent("\n".join(lines[number:end])).rstrip()
            blocks.append(Block("jsonl" if text.startswith("{") else "bash", "", text, number + 1))
            number = end
        elif "```" in line:
            raise AssertionError(f"{document}:{number + 1}: a fence that cannot be read: {line}")
        number += 1
    for before, block in itertools.pairwise(blocks):
        if block.is_output:
            assert before.language in ("bash", "python"), f"{document}:{block.line}: the output of what?"
            before.output = block
    return blocks


def commands(block: Block) -> list[str]:
    """Return the commands of a bash block, without comments. A backslash joins lines."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def without_comments(block: Block) -> str:
    """Return the part of a block that must be the same in both languages."""
    if block.language == "bash":
        return "\n".join(commands(block))
    if block.language == "python":
        tokens = tokenize.generate_tokens(io.StringIO(block.text).readline)
        layout = (tokenize.COMMENT, tokenize.NL)
        return "\n".join(token.string for token in tokens if token.type not in layout)
    if block.language == "tree":
        return "\n".join(paths_of(block))
    return block.text


def paths_of(tree: Block) -> dict[str, str]:
    """Return path -> description. Two spaces of indentation are one level; two or more separate the two."""
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in tree.text.splitlines():
        entry = re.fullmatch(r"( *)(\S+)(?:  +(\S.*))?", line)
        assert entry, f"not an entry of a tree: {line}"
        depth, name = len(entry[1]) // 2, entry[2]
        path = "".join(parents[:depth]) + name
        assert path not in found, f"{path} stands there twice"
        found[path] = entry[3] or ""
        parents[depth:] = [name]
    return found


# -- running it --------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """Follows a document in `folder`, like a reader."""

    document: str
    folder: Path
    namespace: dict[str, Any] = dataclasses.field(default_factory=lambda: {"__name__": "__main__"})
    shortened: bool = False  # the last block had a command that was shortened
    about_a_model: bool = False  # the output of the last block depends on a model

    def follow(self, block: Block) -> str | None:
        """Run a block. Return its output; None if there is nothing to run."""
        self.shortened = self.about_a_model = False
        if block.name:
            path = self.folder / block.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n", encoding="utf-8")
            return None
        match block.language:
            case "bash":
                given = commands(block)
                printed = ""
                for command in given:
                    last = command == given[-1] and block.output is not None
                    fails = last and block.output is not None and ": error: " in block.output.text
                    printed += self.command(command, code=2 if fails else 0)
                return printed
            case "python":
                printed_by_python = io.StringIO()
                code = compile("\n" * (block.line - 1) + block.text, self.document, "exec")
                with contextlib.redirect_stdout(printed_by_python):
                    exec(code, self.namespace)
                return printed_by_python.getvalue()
            case "jsonl":
                given_lines = (ROOT / "data/data.jsonl").read_text(encoding="utf-8").splitlines()
                assert set(block.text.splitlines()) <= set(given_lines), "not of the built-in corpus"
            case "tree":
                check_tree(block)
            case "text":
                pass  # the block above it is compared with this one
            case "diagram":
                pass
            case other:
                raise AssertionError(f"nobody knows how to check a block of {other!r}")
        return None

    def command(self, command: str, code: int) -> str:
        """Run one command line, which must end with `code`. Returns stdout and stderr together."""
        words = shlex.split(command)
        if command in NOT_RUN:
            assert words[0] != "make" or words[1] in makefile()
            return ""
        if words[0] == "cp":
            shutil.copy(words[1], words[2])
            return ""
        if words[0] == "make":
            return "".join(map(self._recipe_line, makefile()[words[1]]))
        from minigpt.__main__ import COMMANDS

        if words[0] == "minigpt":
            script = f"{COMMANDS[words[1]][0].split('.')[-1]}.py" if words[1] in COMMANDS else ""
        else:
            assert words[0] == "python", f"nobody knows how to run: {command}"
            script = Path(words[1]).name
        whole = {"--help", NOT_SHORTENED} & {*words}
        self.about_a_model |= self.document == LENS and script in ABOUT_A_MODEL
        is_chinese = self.document == LENS and script in IN_CHINESE
        os.environ["LC_ALL"] = "zh_CN.UTF-8" if is_chinese else "C.UTF-8"
        kind = script
        if self.document == LENS and script == "train.py" and "--keep_every" not in words:
            kind = "train.py of widths"
        extra = (TO_SHORTEN_LENS if self.document == LENS else TO_SHORTEN).get(kind)
        if extra and not whole:
            self.shortened = True
            words += shlex.split(TO_GO_ON if "--resume" in words else extra)
        run = self._repeat if command in _in_several_documents() else self._run
        return run(words, code, TYPED.get(command))

    def _recipe_line(self, line: str) -> str:
        """Run a line of a Makefile's recipe: `echo TEXT` and commands, separated by semicolons."""
        printed = ""
        for part in line.split(";"):
            words = shlex.split(part)
            printed += f"{' '.join(words[1:])}\n" if words[0] == "echo" else self.command(part.strip(), 0)
        return printed

    def _repeat(self, words: list[str], code: int, typed: str | None) -> str:
        """Run a command, or repeat what it did in another document if all files were the same there."""
        key = (*words, str(code), str(typed), os.environ["LC_ALL"])
        before = contents_of(self.folder)
        if (done := _DONE.get((key, state := _hash(before)))) is not None:
            done.repeat(self.folder)
            return done.printed
        printed = self._run(words, code, typed)
        after = contents_of(self.folder)
        changed = {path: content for path, content in after.items() if before.get(path, ...) != content}
        done = Done(printed, changed, [path for path in before if path not in after])
        if not done.names(self.folder):
            _DONE[key, state] = done
        return printed

    def _run(self, words: list[str], code: int, typed: str | None) -> str:
        from minigpt.__main__ import main

        printed = io.StringIO()
        stdin = _Terminal() if typed is None else _Terminal(typed)
        before = sys.argv, sys.path[:], sys.stdin, signal.getsignal(signal.SIGTERM)
        sys.stdin = stdin
        try:
            with (
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
                _scripts_may_run_twice(),
            ):
                if words[0] == "minigpt":
                    got: object = main(words[1:])
                else:
                    sys.argv = words[1:]
                    sys.path.insert(0, str(Path(words[1]).parent))  # as Python does; scripts replace it
                    try:
                        runpy.run_path(words[1], run_name="__main__")
                        got = 0
                    except SystemExit as stop:
                        got = stop.code or 0
        finally:
            sys.argv, sys.path[:], sys.stdin = before[:3]
            signal.signal(signal.SIGTERM, before[3])
        assert got == code, f"{shlex.join(words)} ended with {got}, not {code}:\n{printed.getvalue()}"
        return printed.getvalue()


@dataclass
class Done:
    """What a command printed and changed: files with content, links with target, folders with None."""

    printed: str
    changed: dict[str, bytes | str | None]
    gone: list[str]

    def names(self, folder: Path) -> bool:
        """Return True if the folder's name stands anywhere: then this cannot be repeated in another one."""
        texts = [self.printed.encode(), *map(_bytes, self.changed.values())]
        return any(str(folder).encode() in text for text in texts)

    def repeat(self, folder: Path) -> None:
        """Make the same changes in another folder. A name may change from a folder to a link, and back."""
        for path in reversed(self.gone):
            _remove(folder / path)
        for path, content in self.changed.items():
            place = folder / path
            if os.path.lexists(place):
                _remove(place)
            if content is None:
                place.mkdir()
            elif isinstance(content, str):
                place.symlink_to(content)
            else:
                place.write_bytes(content)


@functools.cache
def _in_several_documents() -> set[str]:
    """Return the commands that more than one document gives."""
    given = [
        {
            command
            for block in read_blocks(document)
            if block.language == "bash"
            for command in commands(block)
        }
        for document in DOCUMENTS
    ]
    counts = Counter(itertools.chain.from_iterable(given))
    return {command for command, count in counts.items() if count > 1}


_DONE: dict[tuple[tuple[str, ...], str], Done] = {}


def contents_of(folder: Path) -> dict[str, bytes | str | None]:
    """Return all files, links and folders of a desk, sorted; without minigpt itself."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        content = str(path.readlink()) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
        found[path.relative_to(folder).as_posix()] = content
    return found


def _bytes(content: bytes | str | None) -> bytes:
    return content if isinstance(content, bytes) else (content or "").encode()


def _hash(contents: dict[str, bytes | str | None]) -> str:
    total = hashlib.sha256()
    for path, content in contents.items():
        total.update(f"{path} {type(content)} {len(content or '')} ".encode() + _bytes(content))
    return total.hexdigest()


def _remove(path: Path) -> None:
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


class _Terminal(io.StringIO):
    """Standard input for `input()`, as if a user typed on a terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def _scripts_may_run_twice() -> Iterator[None]:
    with warnings.catch_warnings():  # of runpy, when another test has imported the script
        warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package")
        yield


def makefile() -> dict[str, list[str]]:
    """Return target -> its lines in the Makefile, with variables filled in."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    values = {"BIN": "", "DEMO": ""}
    for name in values:
        found = re.search(rf"^{name} := (.*)$", text, re.MULTILINE)
        assert found
        values[name] = found[1]
    targets: dict[str, list[str]] = {}
    for target, body in re.findall(r"^([\w-]+):.*\n((?:\t.*\n)*)", text, re.MULTILINE):
        for name, value in values.items():
            body = body.replace(f"$({name})", value)
        lines = [line.strip().removeprefix("@") for line in body.splitlines()]
        targets[target] = [re.sub(rf"(^|; *){values['BIN']}/", r"\1", line) for line in lines]
    return targets


def check_tree(tree: Block) -> None:
    """Check that each file of minigpt/ is listed (a folder stands for its __init__.py), and no other file."""
    listed = paths_of(tree)
    inside = {path for path in listed if path.startswith("minigpt/")} - {"minigpt/"}
    there = set()
    for path in (ROOT / "minigpt").rglob("*"):
        relative = path.relative_to(ROOT).as_posix()
        if "__pycache__" in relative:
            continue
        if path.is_dir():
            there.add(f"{relative}/")
        elif not (path.name == "__init__.py" and path.parent != ROOT / "minigpt"):
            there.add(relative)
    assert inside == there
    for name, description in listed.items():
        assert (ROOT / name).exists(), f"{name} is listed, but does not exist"
        assert (ROOT / name).is_dir() == name.endswith("/"), name
        assert description, f"{name} needs a word about it"


# -- comparing ---------------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"(?<![\w.])-?[\d,]*\d\.\d+")


def differs(documented: str, printed: str) -> str:
    """Return the difference of two outputs; "" if there is none. `...` in a document stands for anything."""
    ours, theirs = (
        "\n".join(map(str.rstrip, text.strip("\n").splitlines())) for text in (documented, printed)
    )
    masked = [_DECIMAL.sub("0.0", text) for text in (ours, theirs)]
    pattern = re.escape(masked[0]).replace(r"\.\.\.", ".*")
    if not re.fullmatch(pattern, masked[1], re.DOTALL):
        return f"the document says:\n{ours}\nbut this was printed:\n{theirs}"
    if "..." in ours:
        return ""
    for said, got in zip(_DECIMAL.findall(ours), _DECIMAL.findall(theirs), strict=True):
        # Other CPUs and thread counts round sums differently, so one unit of the last shown digit is allowed.
        unit = 10.0 ** -len(said.partition(".")[2])
        if abs(float(said.replace(",", "")) - float(got.replace(",", ""))) > 1.01 * unit:
            return f"the document says {said} where {got} was printed:\n{theirs}"
    return ""


def shapes(printed: str) -> list[str]:
    """Return the distinct lines without the parts that depend on training: numbers, durations, answers."""
    found: dict[str, None] = {}
    for line in printed.splitlines():
        if line.startswith("# ") or line == "..." or re.match(r"(measuring|answering)\b.* \d+/\d+$", line):
            continue  # a note, an omission, and progress that only a slow machine has time to show
        line = re.sub(r"^│ [✓✗ ] │.*", "│ a question │", line)
        line = re.sub(r"A: .*", "A:", line)
        line = re.sub(r"Q: .*A:", "Q: A:", line)
        line = re.sub(r"\d+ h \d+ min|\d+ min \d+ s|\d+(\.\d+)? s\b", "T", line)
        line = re.sub(r"[\d,]*\d(\.\d+)?", "0", line)
        line = re.sub(r"val 0 |(?<=validation loss 0)\*", "", line)
        line = re.sub(r"[━─]+", "━", line)
        line = re.sub(r"[┳┬╇┴┃│]━?", "|", line)
        found[" ".join(line.split())] = None
    found.pop("", None)
    return list(found)


def columns_of(text: str) -> list[tuple[str, ...]]:
    """Return the names of the columns of all tables in a text."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("┃")]
    return [tuple(cell.strip() for cell in line.strip("┃").split("┃")) for line in lines]


def lacks_columns(documented: str, printed: str) -> str:
    """Return an error for the first table whose columns were not printed in this order; "" if none."""
    tables = iter(columns_of(printed))
    for names in columns_of(documented):
        if names not in tables:
            return f"no table (any more) with the columns {names} in:\n{printed}"
    return ""


def lacks(documented: str, printed: str) -> str:
    """Return an error for the first form of line that was not printed in this order; "" if there is none."""
    lines = iter(shapes(printed))
    for line in shapes(documented):
        if line not in lines:
            return f"no line (any more) of the shape {line!r} in:\n{printed}"
    return ""


# -- the tests ---------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder in which a document is followed."""
    with at_desk(tmp_path):
        yield tmp_path


@contextlib.contextmanager
def at_desk(folder: Path) -> Iterator[None]:
    import torch

    (folder / "minigpt").symlink_to(ROOT / "minigpt")
    (folder / "Makefile").symlink_to(ROOT / "Makefile")
    (folder / "data").mkdir()
    for name in ("data.jsonl", "make_corpus.py", "README.md", "shop.csv"):
        shutil.copy(ROOT / "data" / name, folder / "data")
    shutil.copytree(ROOT / "data/facts", folder / "data/facts")
    remember = pytest.MonkeyPatch()
    remember.setattr(reader, "meaning_of", functools.partial(_remembered, meaning_of))
    threads, state, here = torch.get_num_threads(), torch.get_rng_state(), Path.cwd()
    environment = {name: os.environ.get(name) for name in ("COLUMNS", "FORCE_COLOR", "CUDA_VISIBLE_DEVICES")}
    os.environ |= {"COLUMNS": "100", "CUDA_VISIBLE_DEVICES": ""}  # the documents' reader has no GPU
    os.environ.pop("FORCE_COLOR", None)
    os.chdir(folder)
    try:
        yield
    finally:
        remember.undo()
        os.chdir(here)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


_MEANINGS: dict[tuple[str, FieldNames, int], Any] = {}


def _remembered(original: Callable[..., Any], value: Any, names: FieldNames, line: int, raw: str) -> Any:
    """Interpret a record once: the documents read the built-in corpus 200 times."""
    if not raw:
        return original(value, names, line, raw)
    key = (raw, names, line)
    if key not in _MEANINGS:
        _MEANINGS[key] = original(value, names, line, raw)
    return _MEANINGS[key]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_says_is_so(document: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDED.get(document, ()):
        pytest.importorskip(package, reason=f"{package}, which this document is about, is not installed")
    person = Reader(document, desk)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")  # a reader changes it
    for block in read_blocks(document):
        where = f"{document}:{block.line}"
        try:
            printed = person.follow(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        if printed is None or PLACE in (block.output.text if block.output else ""):
            continue
        if block.output is None:
            # a command may say more than a document repeats; a snippet without a print has nothing to show
            assert block.language == "bash" or not printed, (
                f"{where} prints, but no output follows:\n{printed}"
            )
        elif set(commands(block) if block.language == "bash" else ["python"]) - set(NOT_RUN):
            compare = lacks if person.shortened else differs
            compare = lacks_columns if person.about_a_model else compare
            complaint = compare(block.output.text, printed)
            assert not complaint, f"{document}:{block.output.line}: {complaint}"


@pytest.mark.parametrize(("one", "other"), [pair for pair in DOCUMENTS.items() if pair[1]])
def test_both_languages_have_the_same_blocks(one: str, other: str) -> None:
    first, second = read_blocks(one), read_blocks(other)
    for ours, theirs in zip(first, second):
        where = f"{one}:{ours.line} and {other}:{theirs.line}"
        assert (ours.language, ours.name) == (theirs.language, theirs.name), where
        if one == LENS and "│" in theirs.text and ours.text != theirs.text:  # in the page's language
            translated = [
                tuple(CHINESE.get(name, name) for name in names) for names in columns_of(theirs.text)
            ]
            assert translated == columns_of(ours.text), where
            continue
        assert without_comments(ours) == without_comments(theirs), where
    assert len(first) == len(second)
    sections = [re.findall(r"^#+", (ROOT / name).read_text("utf-8"), re.MULTILINE) for name in (one, other)]
    assert sections[0] == sections[1], "the same sections, in the same order"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_tutorial_s_commands_stand_in_the_readme(readme: str) -> None:
    lines = [
        line for block in read_blocks(readme) if block.language == "bash" for line in block.text.splitlines()
    ]
    assert [line for line in lines if line in THE_TUTORIAL_S_COMMANDS] == THE_TUTORIAL_S_COMMANDS


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_demo_s_output_was_pasted(readme: str) -> None:
    assert PLACE not in (ROOT / readme).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", FILES)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        assert "#" not in link, f"{link}: headings change, and nobody notices"
        assert link.startswith("https://") or (path.parent / link).exists(), f"{document}: {link}"


CHINESE_PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md"))
)


def without_fences(text: str) -> str:
    """A page without its fenced blocks; lines keep their numbers."""
    return re.sub(
        r"^(`{3,})[^`].*?^\1$", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("page", CHINESE_PAGES)
def test_no_line_ends_between_two_chinese_characters(page: str) -> None:
    """The renderer turns the end of a line into a space, which is a gap in Chinese."""
    lines = without_fences((ROOT / page).read_text(encoding="utf-8")).split("\n")
    for number, (line, following) in enumerate(itertools.pairwise(lines), 1):
        ends = re.search(r"[\u3400-\u9fff）”》】]$", line) and not line.startswith(("#", "|", "    "))
        goes_on = re.match(r" *[\u3400-\u9fff（“《【]", following) and not following.startswith("    ")
        assert not (ends and goes_on), (
            f"{page}:{number}: a gap between {line[-4:]} and {following.strip()[:4]}"
        )


@pytest.mark.parametrize("page", [page for page in CHINESE_PAGES if page.endswith(".zh-CN.md")])
def test_chinese_prose_has_one_word_for_token(page: str) -> None:
    """It is 词元; the English word may stand behind it in brackets, and on the page of words."""
    text = without_fences((ROOT / page).read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", text)
    found = re.findall(r"(?<![\w<|-])tokens?(?![\w>-])(?!）)", text)
    assert not found or page == "docs/book/words.zh-CN.md"


def _inline_code(document: str) -> list[str]:
    text = re.sub(
        r"^(`{3,}).*?^\1$", "", (ROOT / document).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("document", FILES)
def test_paths_in_the_text_exist(document: str) -> None:
    made_by_commands = {"data/vocab.json", "data/train.jsonl", "data/val.jsonl", "data/split.json"}
    for code in _inline_code(document):
        if (
            re.fullmatch(r"(minigpt|tests|docs|data|benchmarks)/[\w./-]*", code)
            and code not in made_by_commands
        ):
            assert (ROOT / code).exists(), f"{document}: {code}"


@pytest.mark.parametrize("document", FILES)
def test_flags_in_the_text_exist(document: str) -> None:
    from minigpt.__main__ import COMMANDS
    from minigpt.console.flags import flags_of

    classes = [options_of(verb) for verb in COMMANDS] + [importlib.import_module("gpt2").Options]
    known = {flag for one in classes for flag in flags_of(one)} | {"help", "version", "check", "no_bias"}
    known |= {"model_args", "tasks"}  # lm-evaluation-harness's
    for code in _inline_code(document):
        for flag in re.findall(r"(?<!\S)--(\w+)", code):
            assert flag in known, f"{document}: --{flag}"


def test_no_exception_is_stale() -> None:
    given = {
        line
        for name in FILES
        for block in read_blocks(name)
        if block.language == "bash"
        for line in commands(block)
    }
    assert set(NOT_RUN) | set(TYPED) <= given


@pytest.mark.parametrize(
    ("documented", "printed", "same"),
    [
        ("a 1.25\n", "a 1.26  \n", True),
        ("a 1.25", "a 1.27", False),
        ("a 125", "a 126", False),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a\n...\nd", "a\nb\nc\ne", False),
        ("(a+b)*", "(a+b)*", True),
        ("1,024.5", "1,024.6", True),
    ],
)
def test_outputs_are_compared(documented: str, printed: str, same: bool) -> None:
    assert (not differs(documented, printed)) is same


def test_shapes_are_compared() -> None:
    printed = (
        "recipe x\ntraining 1/20 loss 7.2  2 s left\n"
        "training 2/20 loss 7.1  val 7.3  1 s left\ndone: 20 steps\n"
    )
    documented = (
        "training 7/10 loss 0.1  1 s left\n...\n"
        "training 9/10 loss 0.1  val 0.2  1 min 02 s left\ndone: 9 steps"
    )
    assert not lacks(documented, printed)
    assert "finished" in lacks("finished: 1,000 steps", printed)
    assert lacks("done: 1 steps\nrecipe x", printed), "in this order"
    # pasted output may begin with a note
    assert not lacks("# two cores\nrecipe x\n...\ndone: 3 steps", printed)


def test_the_tree_must_be_whole() -> None:
    with pytest.raises(AssertionError):
        check_tree(Block("tree", "", "minigpt/  the package\n  model.py  the model", 1))


# -- writing the blocks anew -------------------------------------------------------------------------------


def write_anew(names: list[str]) -> None:
    """Replace each output that is compared exactly by the present output, in both languages."""
    for document, translation in DOCUMENTS.items():
        if names and not {document, translation} & set(names):
            continue
        with tempfile.TemporaryDirectory() as folder, at_desk(Path(folder)):
            person = Reader(document, Path(folder))
            found = []
            for block in read_blocks(document):
                printed = person.follow(block)
                exact = block.output is not None and not person.shortened and printed is not None
                if exact and block.output is not None and printed and "..." not in block.output.text:
                    text = "\n".join(map(str.rstrip, printed.strip("\n").splitlines()))
                    found.append((read_blocks(document).index(block.output), text))
        for name in filter(None, (document, translation)):
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            blocks = read_blocks(name)
            for index, text in reversed(found):
                start = blocks[index].line - 1
                lines[start : start + len(blocks[index].text.splitlines())] = text.splitlines()
            (ROOT / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_anew(sys.argv[1:])
