"""The terminal's language: the catalogue is whole, nothing in it is stale, and Chinese fits into its columns.

python tests/test_language.py      # after a change of a message (make catalogue): brings the catalogue up to
                                   # date, says what has no translation yet, and compiles it; needs Babel
"""

import ast
import functools
import gettext
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import string
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from minigpt.__main__ import COMMANDS
from minigpt.__main__ import main as minigpt
from minigpt.console import language
from minigpt.console.flags import _described
from minigpt.console.terminal import ProgressLine, table_text
from minigpt.errors import InputError, Message
from tests.commands import RunCommand, options_of, path_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "minigpt/translations"
# the first argument of these is a text that is translated where it is shown
MARKED = {"Message", "say", "translated", "unknown_name", "ProgressLine", "table", "show_table", "histogram"}
NAMES = {
    "batch, data, ablate",
    "max_length",
    "{error}; {remedy}",
    "{name} {value} ({how})",
    " ({advice})",
}  # the same in both languages
EVALUATIONS = ("commands/evaluate.py", "commands/compare.py")
# The first argument of these may be an f-string: it is recognised by its fixed parts where it is shown.
SHOWN = {"show", "InputError", "BadLine", "BadValue", "_DamageError", "Stopped", "warn", "note"}
# What these get is for programmers, or is no text. `split` makes a list of names.
ENGLISH = {
    "ValueError", "TypeError", "KeyError", "IndexError", "RuntimeError", "AssertionError", "AttributeError",
    "NotImplementedError", "RequestError", "compile", "split", "filterwarnings",
}  # fmt: skip
# Their words are in tables of both languages, belong to a page or a report, or are read by a model.
OWN_WORDS = (
    "lens/", "reference/", "commands/doctor.py", "commands/evaluate.py", "commands/compare.py",
    "evaluation/words.py", "evaluation/report.py", "evaluation/comparison.py", "evaluation/model_card.py",
    "evaluation/perturbations.py", "evaluation/prompts.py",
)  # fmt: skip
_FOUR_WORDS = re.compile(r"(?<![\w\\-])[a-z']+(?: [a-z']+){3}")
_COMMON_WORD = re.compile(
    r"\b(a|and|are|as|at|be|by|for|from|has|in|is|it|its|no|not|of|on|or|that|the|to|with)\b"
)


# -- what the code says ------------------------------------------------------------------------------------


@functools.cache
def package() -> dict[str, ast.Module]:
    """The package's files, relative to its folder, and what they consist of."""
    folder = ROOT / "minigpt"
    return {
        path.relative_to(folder).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    }


@functools.cache
def help_strings() -> set[str]:
    """All texts of --help: of minigpt, and of each command."""
    found = {text for _, text in COMMANDS.values()} | {"Options"}
    classes = [(options_of(verb), str(path_of(verb))) for verb in COMMANDS]
    classes.append(
        (runpy.run_path(str(ROOT / "gpt2.py"), run_name="options")["Options"], str(ROOT / "gpt2.py"))
    )
    for options, source in classes:
        found.add(" ".join((options.__doc__ or "").split()))
        found |= {text for group, _, words in _described(options, source) for text in (group, words)}
    return found - {""}


def constants(node: ast.expr, names: dict[str, list[str]]) -> Iterator[str]:
    """The constant strings that an expression may be. A name stands for what was assigned to it."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr() | ast.BinOp(op=ast.Add()):
            for filled in f_strings(node, names):
                first, *rest = filled.split("\0")
                yield first + "".join(f"{{{number}}}{part}" for number, part in enumerate(rest))
        case ast.IfExp(body=body, orelse=orelse):
            yield from constants(body, names)
            yield from constants(orelse, names)
        case ast.Name(id=name):
            yield from names.get(name, ())
        case ast.Subscript(value=value):
            yield from constants(value, names)
        case ast.Dict(values=values):
            for value in values:
                yield from constants(value, names)
        case ast.Tuple(elts=values) | ast.List(elts=values):
            for value in values:
                yield from constants(value, names)


def f_strings(node: ast.expr, names: dict[str, list[str]]) -> list[str]:
    """The texts that an f-string may make, with \\0 for each value that the code alone does not tell."""
    match node:
        case ast.Constant(value=str(text)):
            return [text.replace("{", "{{").replace("}", "}}")]
        case ast.JoinedStr(values=values):
            parts = [f_strings(value, names) for value in values]
            if math.prod(map(len, parts)) > 8:
                parts = [part if len(part) == 1 else ["\0"] for part in parts]
            return ["".join(chosen) for chosen in itertools.product(*parts)]
        case ast.FormattedValue(value=ast.Constant() | ast.IfExp() as value, conversion=-1, format_spec=None):
            return f_strings(value, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [a + b for a in f_strings(left, names) for b in f_strings(right, names)]
        case ast.IfExp(body=body, orelse=orelse):
            return f_strings(body, names) + f_strings(orelse, names)
        case _:
            return ["\0"]


def given(tree: ast.AST, functions: set[str]) -> Iterator[tuple[str, str]]:
    """The functions that a file calls, each with a text that it gets; of tables, the columns' names, too."""
    scopes: list[ast.AST] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for scope in [*scopes, tree]:
        inside = list(ast.walk(scope))
        names: dict[str, list[str]] = {}
        for node in [*getattr(tree, "body", ()), *(inside if scope is not tree else ())]:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names.setdefault(node.targets[0].id, []).extend(constants(node.value, {}))
        for node in inside:
            if not (isinstance(node, ast.Call) and node.args):
                continue
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in functions:
                is_table = function in ("table", "show_table")
                for argument in node.args[: 2 if is_table else 1]:
                    yield from ((function, text) for text in constants(argument, names))


@functools.cache
def texts_of(*functions: str) -> frozenset[str]:
    """The texts that the package gives to these functions; without a name: to all of MARKED and SHOWN."""
    return frozenset(text for function, text in _given() if function in functions or not functions)


@functools.cache
def _given() -> frozenset[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for name, tree in package().items():
        # the words of the lens and of evaluations are in their own words.py
        own = {"say"} if name.startswith(("lens/", "evaluation/", *EVALUATIONS)) else set()
        found |= {*given(tree, (MARKED | SHOWN) - own)}
    return frozenset(found)


def literals(node: ast.AST, skipped: set[str]) -> Iterator[str]:
    """The strings and f-strings of a piece of code, but docstrings, annotations and what `skipped` get."""
    parts: list[ast.AST]
    match node:
        case ast.Assert() | ast.Expr(value=ast.Constant()):
            return
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in skipped:
            return
        case ast.AnnAssign(value=value):
            parts = [] if value is None else [value]
        case ast.FunctionDef(body=body):
            parts = [*body]
        case ast.Constant(value=str()):
            yield from constants(node, {})
            return
        case ast.JoinedStr(values=values):
            yield from constants(node, {})
            parts = [each for each in values if not isinstance(each, ast.Constant)]
        case ast.BinOp(op=ast.Add()):
            yield from constants(node, {})
            parts = [node.left, node.right]
        case _:
            parts = list(ast.iter_child_nodes(node))
    for part in parts:
        yield from literals(part, skipped)


def is_sentence(text: str) -> bool:
    return bool(_FOUR_WORDS.search(text) and _COMMON_WORD.search(text)) and not text.startswith("{%")


@functools.cache
def all_literals(only_sentences: bool) -> frozenset[str]:
    """The texts of the package; or the sentences, but those of OWN_WORDS and for programmers."""
    found: set[str] = set()
    for name, tree in package().items():
        if not only_sentences:
            found |= {*literals(tree, set())}
        elif not name.startswith(OWN_WORDS):
            skipped = ENGLISH | ({"say"} if name.startswith("evaluation/") else set())
            found |= {*filter(is_sentence, literals(tree, skipped))}
    return frozenset(found)


@functools.cache
def strings(optional: bool = False) -> frozenset[str]:
    """The texts that must have a translation; with `optional`, also those that may have one.

    A text that is shown must have one, and a text of four words in a row anywhere in the package, because it
    becomes a part of a message.
    """
    found = help_strings() | {os.strerror(number) for number in language.SYSTEM_ERRORS}
    found |= texts_of()
    found |= all_literals(only_sentences=not optional)
    from minigpt.generation.slash_commands import COMMANDS as SLASH

    found |= {command.help for command in SLASH.values()}
    from minigpt.tokenizer import Tokenizer

    found |= {Tokenizer.unknown_read_as}
    is_text = re.compile(r"(?!{\w+}$).*[A-Za-z]{2}", re.DOTALL)
    return frozenset(filter(is_text.match, found))


def catalogue() -> dict[str, str]:
    """English text -> Chinese text."""
    with (FOLDER / "zh.mo").open("rb") as file:
        entries: dict[str, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    return {text: chinese for text, chinese in entries.items() if text}


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


# -- the catalogue -----------------------------------------------------------------------------------------


def test_every_text_has_a_translation() -> None:
    assert sorted(strings() - catalogue().keys()) == []


def test_no_translation_is_stale() -> None:
    assert sorted(catalogue().keys() - strings(optional=True)) == []


def test_nothing_is_printed_past_the_catalogue() -> None:
    """What `print` gets is translated by `say` or `translated` before; `show` does both."""
    for name, tree in package().items():
        if name.startswith("reference/"):  # programs to read and to run alone
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and node.args:
                for text in constants(node.args[0], {}):
                    assert not re.search("[a-z]{2,} [a-z]{2,}", text), f"{name}:{node.lineno}: {text}"


def test_translations_are_chinese_with_the_same_fields() -> None:
    messages = texts_of("Message", "say")
    for text, chinese in catalogue().items():
        assert "{0}" not in text or "}{" not in text, f"where does the first value of {text!r} end?"
        assert re.search("[\u4e00-\u9fff]", chinese) or text in NAMES, text
        if text in messages:
            assert fields(text) >= fields(chinese), text
            assert fields(text) - fields(chinese) <= {"several", "whole"}, text
        assert (text[:1] == "\n", text[-1:] == "\n") == (chinese[:1] == "\n", chinese[-1:] == "\n")
        flags = re.findall(r"--\w+|`[^`]+`", text)
        assert all(flag in chinese for flag in flags), f"{flags} in {chinese}"


@pytest.mark.skipif(
    importlib.util.find_spec("babel") is None, reason="Babel, which reads the .po file, is missing"
)
def test_the_compiled_catalogue_is_the_written_one() -> None:
    compiled, entries = io.BytesIO(), read()
    from babel.messages.mofile import write_mo

    write_mo(compiled, entries)
    assert compiled.getvalue() == (FOLDER / "zh.mo").read_bytes(), "run: make catalogue"
    assert [message.id for message in entries if message.id and not message.string] == []


def read() -> Any:
    from babel.messages.pofile import read_po

    with (FOLDER / "zh.po").open("rb") as file:
        return read_po(file, locale="zh_CN")


def write_anew(more: dict[str, str] | None = None) -> list[str]:
    """Bring the catalogue up to date. Return the texts that have no translation."""
    from babel.messages import Catalog
    from babel.messages.mofile import write_mo
    from babel.messages.pofile import write_po

    known = (
        {message.id: message.string for message in read() if message.id and message.string}
        if (FOLDER / "zh.po").exists()
        else {}
    )
    known |= more or {}
    date = datetime(2026, 1, 1, tzinfo=UTC)  # a date of today would change the file for nothing
    header = "# The terminal's messages in Chinese: python tests/test_language.py keeps this file up to date."
    entries = Catalog(
        "zh_CN", header_comment=header, project="minigpt", version="0",
        creation_date=date, revision_date=date,
        last_translator="minigpt", language_team="minigpt", copyright_holder="minigpt",
        msgid_bugs_address="minigpt", fuzzy=False,
    )  # fmt: skip
    used = strings() | (known.keys() & strings(optional=True))
    for text in sorted(used):
        entries.add(text, known.get(text, ""))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, write in (("zh.po", write_po), ("zh.mo", write_mo)):
        with (FOLDER / name).open("wb") as file:
            write(file, entries, **({"width": 110} if write is write_po else {}))
    return [text for text in sorted(used) if not known.get(text)]


# -- the choice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "environment", "chosen"),
    [
        ([], {}, "en"),
        ([], {"LANG": "zh_CN.UTF-8"}, "zh"),
        ([], {"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ([], {"LANG": "C", "LC_ALL": "zh_TW.UTF-8"}, "zh"),
        (["--language", "zh"], {}, "zh"),
        (["--json", "--language=en"], {"LANG": "zh_CN.UTF-8"}, "en"),
        (["--language"], {"LANG": "zh_CN.UTF-8"}, "zh"),
    ],
)
def test_the_language_is_chosen(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], environment: dict[str, str], chosen: str
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    assert language.language_of(argv) == chosen


@pytest.fixture
def chinese() -> Iterator[None]:
    language.set_language("zh")
    yield
    language.set_language("en")


def test_a_message_is_english_but_on_a_terminal(chinese: None) -> None:
    message = Message("{path} does not exist (looked for it from {folder})", path="a{b}.txt", folder="here")
    assert message == "a{b}.txt does not exist (looked for it from here)"
    assert str(InputError(message)) == message
    assert json.dumps(message) == json.dumps(str(message))
    shown = language.translated(message)
    assert "a{b}.txt" in shown
    assert re.search("[\u4e00-\u9fff]", shown)
    copy = pickle.loads(pickle.dumps(message))
    assert (copy, language.translated(copy)) == (message, shown)


def test_values_that_are_messages_are_translated_and_others_are_not(chinese: None) -> None:
    inner = Message("{value}", value="The machine")
    assert language.translated("The machine") == "机器"
    assert language.translated(inner) == "The machine"
    assert language.translated(Message("{value}", value=Message("The machine"))) == "机器"


def test_a_text_with_its_values_is_recognised(chinese: None) -> None:
    """What an f-string made: behind a place, with values of its own, and endless ones."""
    shown = language.translated("b.jsonl:3: a.txt is quantised: give the folder that it was made from")
    assert shown.startswith("b.jsonl:3: a.txt")
    assert "量化" in shown
    unlike = "; ".join(f"a{i}: b{i} c{i}" for i in range(5000))
    for endless in ("a: " * 5000, "x holds " * 5000 + "y", "x is y: " * 5000, unlike):
        assert len(language.translated(endless)) > 5000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a.txt is empty; training failed", "a.txt 是空的；训练失败"),  # two messages that were joined
        ("nobody says it; nor this", "nobody says it; nor this"),
        (  # "{0} has no {1}" would fit, too
            "b.csv: a quotation mark that opens in line 2 has no partner up to line 3",
            "b.csv: 第 2 行开的引号到第 3 行还没有关上",
        ),
        (  # the first message does not reach to the last bracket
            "x (1 record, first: line 2); y (3 records, first: line 4)",
            "x（1 条记录，最先在第 2 行）；y（3 条记录，最先在第 4 行）",
        ),
    ],
)
def test_joined_messages_are_recognised(chinese: None, text: str, shown: str) -> None:
    assert language.translated(text) == shown


@pytest.mark.parametrize("text", ["", "x: ", "x holds; ", ": ", "; ", "a b: ; "])
def test_nothing_is_translated_to_the_head_of_the_catalogue(chinese: None, text: str) -> None:
    assert language.translated(text) == text


USERS = (
    "How many files in this folder?", "What is blue, not green?", "texts/my files in here/a.txt",
    "who has no fear", "a box holds cats", "what is empty", "it has rained", "my records",
)  # fmt: skip


@pytest.mark.parametrize("words", USERS)
def test_words_of_a_user_are_no_message(chinese: None, words: str) -> None:
    """Short entries, such as "{0} has no {1}", do not fit into a value, nor behind ": "."""
    assert language.translated(f"unlike: {words}") == f"unlike: {words}"
    for text in (
        f"{words} is damaged gzip data: it ends",
        f"x is a chat log of 3 speakers, {words}: name the one whose messages are the answers with "
        "--speaker NAME; as plain text: minigpt train --text a",
    ):
        shown = language.translated(text)
        assert words in shown
        assert shown != text


def test_short_messages_are_recognised(chinese: None) -> None:
    assert (
        language.translated("texts/my files in here/a.txt is empty") == "texts/my files in here/a.txt 是空的"
    )
    assert language.translated("a.jsonl:3: `answer` is empty") == "a.jsonl:3: `answer` 是空的"
    assert "5 个样本" in language.translated("keywords in 5 samples: cat 3 times in 5")


def test_the_doctors_numbers_have_chinese_names() -> None:
    names = runpy.run_path(str(path_of("doctor")), run_name="options")["_LABELS"]["zh"]["numbers"]
    texts = (ROOT / "minigpt/diagnosis/findings.toml").read_text(encoding="utf-8")
    numbers = {*re.findall(r"{(\w+):", texts)} - {"dropout"}
    assert sorted(numbers - names.keys()) == []


def test_what_has_no_translation_stays_as_it_is(chinese: None) -> None:
    assert language.translated("") == ""
    assert language.translated("nobody says this") == "nobody says this"
    assert language.translated(Message("{label}", label="text")) == "text", "a user's label"


# -- what commands print -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_help_fits_into_the_terminal(
    monkeypatch: pytest.MonkeyPatch, chinese: None, verb: str, width: int
) -> None:
    from minigpt.console.flags import help_text

    monkeypatch.setenv("COLUMNS", str(width))
    text = help_text(options_of(verb), f"minigpt {verb}", str(path_of(verb)))
    for line in text.splitlines():
        assert language.columns(line) <= width, line
        assert not line.strip() or line.strip()[0] not in "，。；：、）"
    flags = re.findall(r"^  --(?:\[no_\])?(\w+)", text, re.MULTILINE)
    assert "language" in flags
    assert "英文、中文" in text


@pytest.mark.parametrize("width", [80, 40])
def test_the_list_of_verbs_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert minigpt(["--help", "--language", "zh"]) == 0
    text = capsys.readouterr().out
    assert all(language.columns(line) <= width for line in text.splitlines()), text
    assert "用你自己的对话" in re.sub(r"\s+", "", text)


def test_errors_warnings_and_results_are_chinese_and_json_is_not(
    run_command: RunCommand, tmp_path: Path
) -> None:
    data, vocab = tmp_path / "data.jsonl", tmp_path / "vocab.json"
    data.write_text('{"question": "天？", "answer": "蓝。"}\n{"question": "x"}\n', encoding="utf-8")
    given = ("--data", data, "--output", vocab, "--json")
    english, chinese = (run_command("vocab", *given, "--language", one) for one in ("en", "zh"))
    assert english.code == chinese.code == 0
    assert english.out.splitlines()[-1] == chinese.out.splitlines()[-1]
    assert english.out.splitlines()[0] != chinese.out.splitlines()[0]
    assert "警告：" in chinese.err
    assert "warning: " in english.err
    wrong = run_command("vocab", "--data", tmp_path / "nothing.jsonl", "--language", "zh")
    assert wrong.code == 2
    assert "错误：" in wrong.err
    assert "nothing.jsonl" in wrong.err
    assert run_command("vocab", "--knd", "--language=zh").err.count("您") == 0
    assert run_command("vocab", "--data", tmp_path / "nothing.jsonl").err.count("错误") == 0, (
        "the next one is English"
    )


TEN_COLUMNS = 10


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("一二三四五六", ["一二三四五", "六"]),
        ("一二三四五，六", ["一二三四", "五，六"]),
        ("一二三四（五）", ["一二三四", "（五）"]),
        ("ab 一二三 cd", ["ab 一二三", "cd"]),
        ("一 abcdefghijkl", ["一", "abcdefghij", "kl"]),
        ("", []),
    ],
)
def test_chinese_is_wrapped_by_columns(text: str, lines: list[str]) -> None:
    assert language.wrapped(text, TEN_COLUMNS) == lines


def test_tables_and_progress_are_translated(
    chinese: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = table_text("model", ["part", "parameters"], [["token_embedding", "1,024"]], width=40)
    assert "参数" in text
    assert "token_embedding" in text
    with ProgressLine("training", 10) as line:
        line.update(3, Message("{count:,} tokens of {what}", count=1, what="x"), force=True)
    assert "训练" in capsys.readouterr().err


NUMBERS = r"[-+<>~*]?[\d.,:×x%/]+"
# What stays: paths, options and their values, fields of a configuration, parts of a model, quoted names.
STAYS = re.compile(
    rf"\S*[/_.=]\S*|[a-z]+(?:-[a-z]+)+|--\w+|`[^`]*`|'[^']*'|<\w+>|{NUMBERS}\w*|^\$? ?minigpt .*|minigpt \w+",
    re.MULTILINE,
)
UNITS = {"GFLOP", "GiB", "MiB", "KiB", "min", "nat", "ms", "ns"}
PRODUCTS = {
    "AVX", "AMX", "VNNI", "BF", "CPython", "CUDA", "GPU", "HTML", "JSON", "LayerNorm", "OpenMP", "minigpt",
    "python", "torch",
}  # fmt: skip
OPTIONS = {"cpu", "precision", "auto", "float", "bfloat", "int", "qa", "norm", "NAME"}


def english_words(text: str) -> set[str]:
    """The English words of an output, but names of files, options, units and products."""
    return {*re.findall("[A-Za-z]{2,}", STAYS.sub(" ", text))} - UNITS - PRODUCTS - OPTIONS


def test_english_words_are_found() -> None:
    assert english_words("完成：3 步，用时 0.1 s：out/best, done in 3 min") == {"done", "in"}


def test_commands_print_no_english(
    run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a class sees: from the data to a trained model, and what is made of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    pairs = [{"question": f"{a}加{b}得几？", "answer": f"得{a + b}。"} for a in range(6) for b in range(6)]
    pairs += [pairs[0], {"question": "一加一得几？", "answer": "得二。"}, {"question": "谁？"}]
    lines = "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
    Path("data.jsonl").write_text(lines, encoding="utf-8")
    model = "--n_layer 1 --n_head 1 --n_embd 8 --max_steps 2 --output 甲"
    used = {"stats": 40, "doctor": 40}  # command -> columns of its terminal
    for command in (
        "vocab --data data.jsonl --output vocab.json",
        "split --input data.jsonl --train_ratio 0.8",
        "stats --train_data train.jsonl --vocab_path vocab.json --max_length 16",
        f"train --train_data train.jsonl --val_data val.jsonl --vocab_path vocab.json {model}",
        f"train --train_data train.jsonl --val_data val.jsonl --vocab_path vocab.json {model} --resume",
        "quantize --model 甲/best --output 甲/small",
        "convert --model 甲/best --output page.html",
        "plot 甲",
        "doctor 甲 --no_deep",
        "experiment",
        "env",
    ):
        verb, *flags = command.split()
        columns = used.get(verb, 80)
        monkeypatch.setenv("COLUMNS", str(columns))
        result = run_command(verb, *flags)
        assert result.code == (2 if "--resume" in flags else 0), result.err
        text = result.out + result.err
        if verb == "env":  # elsewhere are names of packages and of this machine's parts
            text = "\n".join(line for line in text.splitlines() if line.startswith(("核数", "内存")))
        assert english_words(text) == set(), text
        assert re.search("[\u4e00-\u9fff]", text), command
        rows = [line for line in text.splitlines() if line[:1] in "┏┃┡│└"]
        assert len({language.columns(line) for line in rows} - {0}) <= text.count("┏"), "a table is crooked"
        assert all(language.columns(line) <= columns for line in rows)


if __name__ == "__main__":
    missing = write_anew()
    print("\n".join(missing) or f"all texts have a translation: {FOLDER.relative_to(ROOT)}")
    sys.exit(bool(missing))
