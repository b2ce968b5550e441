"""Flags are read as people write them; what ends a door is one line and an exit code."""

import ast
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest

from minigpt.__main__ import DOORS
from minigpt.console.command_line import DoorOptions, parse, run
from minigpt.errors import InputError, printable, unknown_name

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(DoorOptions):
    """Try things."""

    # A comment about the group, which is nobody's help
    data: Path = Path("data.jsonl")
    """the file [red] to read"""
    n_layer: int = 3
    """blocks"""
    learning_rate: float = 0.5
    """how far to go"""
    question: str = ""
    """what to ask"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """arithmetic"""
    use_cache: bool = True
    """remember keys and values"""

    def __post_init__(self) -> None:
        if self.n_layer == 7:
            raise InputError("n_layer must not be 7: got n_layer=7")


def changed(*argv: str) -> dict[str, Any]:
    options, default = parse(Example, list(argv)), Example()
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Example)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(Example, list(argv))
    text = str(caught.value)
    assert "\n" not in text
    assert not set(text) & set("│╭╰─"), "the parser's box"
    assert not re.search(r"Error parsing|Example|base 10|Unrecognized", text), "the parser's words"
    return text


# -- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--n_layer", "4"], {"n_layer": 4}),
        (["--n_layer=4"], {"n_layer": 4}),
        (["--n-layer", "4"], {"n_layer": 4}),
        (["--n-layer=4"], {"n_layer": 4}),
        (["--n_layer", "-1"], {"n_layer": -1}),
        (["--n_layer=-1"], {"n_layer": -1}),
        (["--learning_rate", "-1e-4"], {"learning_rate": -1e-4}),
        (["--learning-rate=3e-4"], {"learning_rate": 3e-4}),
        (["--n_layer", "4", "--n_layer", "5"], {"n_layer": 5}),
        (["--question=-1"], {"question": "-1"}),
        (["--question=-what?"], {"question": "-what?"}),
        (["--question=--n_layer"], {"question": "--n_layer"}),
        (["--question=--"], {"question": "--"}),
        (["--question=a=b"], {"question": "a=b"}),
        (["--question", "四川省的省会是哪里？"], {"question": "四川省的省会是哪里？"}),
        (["--question", " two  spaces "], {"question": " two  spaces "}),
        (["--question", "[red]│\n"], {"question": "[red]│\n"}),
        (["--question", "\udc80"], {"question": "\udc80"}),
        (["--question", "None"], {"question": "None"}),
        (["--question="], {}),
        (["--data", "-"], {"data": Path("-")}),
        (["--precision", "bfloat16"], {"precision": "bfloat16"}),
        (["--no_use_cache"], {"use_cache": False}),
        (["--no-use-cache"], {"use_cache": False}),
        (["--use_cache"], {}),
        (["--json"], {"json": True}),
    ],
)
def test_what_is_read(argv: list[str], expected: dict[str, Any]) -> None:
    assert changed(*argv) == expected


def test_defaults_may_come_from_elsewhere() -> None:
    options = parse(Example, ["--question", "?"], Example(n_layer=9, use_cache=False, data=Path("x")))
    assert options == Example(n_layer=9, use_cache=False, data=Path("x"), question="?")


def test_options_of_a_module_with_postponed_annotations_have_switches() -> None:
    # `from __future__ import annotations` makes field.type a text
    fields: list[tuple[str, Any, Any]] = [("deep", "bool", True)]
    later = dataclasses.make_dataclass("Later", fields, bases=(DoorOptions,), frozen=True, kw_only=True)
    assert vars(parse(later, ["--no_deep"])) == {"json": False, "deep": False}


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--n_layers", "4"], "unknown flag '--n_layers'; did you mean '--n_layer'?"),
        (["--n_layers=4"], "unknown flag '--n_layers'; did you mean '--n_layer'?"),
        (["--n-layers=4"], "unknown flag '--n-layers'; did you mean '--n_layer'?"),
        (["--n_lay", "4"], "unknown flag '--n_lay'; did you mean '--n_layer'?"),
        (["--n__layer", "4"], "unknown flag '--n__layer'; did you mean '--n_layer'?"),
        (["--quesiton=a"], "unknown flag '--quesiton'; did you mean '--question'?"),
        (["--no_n_layer"], "unknown flag '--no_n_layer'; did you mean '--n_layer'?"),
        (["--use_cache=False"], "--use_cache takes no value: write --use_cache or --no_use_cache"),
        (["--no-use-cache=1"], "--no-use-cache takes no value: write --use_cache or --no_use_cache"),
        (["--n_layer", "many"], "--n_layer must be a whole number: got 'many'"),
        (["--n_layer", "3.5"], "--n_layer must be a whole number: got '3.5'"),
        (["--n-layer="], "--n_layer must be a whole number: got ''"),
        (["--learning_rate", "fast"], "--learning_rate must be a number: got 'fast'"),
        (["--precision", "int4"], "--precision must be one of 'float32', 'bfloat16': got 'int4'"),
        (["--n_layer"], "--n_layer needs a value (one that begins with '-': --n_layer=VALUE)"),
        (["--question", "-what?"], "--question needs a value (one that begins with '-': --question=VALUE)"),
        (["--n_layer", "--json"], "--n_layer needs a value (one that begins with '-': --n_layer=VALUE)"),
        (["--n_layer", "7"], "n_layer must not be 7: got n_layer=7"),
        (["junk"], "unexpected argument: junk (a value with spaces needs quotes around it)"),
        (["--use_cache", "False"], "unexpected argument: False (a value with spaces needs quotes around it)"),
    ],
)
def test_what_is_refused(argv: list[str], expected: str) -> None:
    assert refusal(*argv) == expected


@pytest.mark.parametrize("argv", [["--question", "how", "are", "you"], ["-n_layer", "4"], ["—n_layer", "4"]])
def test_rubbish_is_named(argv: list[str]) -> None:
    assert argv[-1] in refusal(*argv)


def test_a_flag_like_no_other_lists_them_all() -> None:
    text = refusal("--zzzzzz")
    assert all(f"--{field.name}" in text for field in dataclasses.fields(Example))


def test_long_values_stay_in_one_piece() -> None:
    value = "x" * 300  # wider than the box in which the parser would break it
    assert refusal("--precision", value).endswith(f" got '{value}'")


@pytest.mark.parametrize("value", ["\x1b[31m", "a\nb", "\udc80", "[red]x[/red]", "│", "─" * 5])
def test_strange_values_are_refused_in_one_line(value: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(Example, ["--n_layer", value])
    assert str(caught.value) == f"--n_layer must be a whole number: got {value!r}"


def test_the_width_of_the_terminal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("47", None):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        refusal("--n_layer", "x")
        assert os.environ.get("COLUMNS") == columns


def test_unknown_name_without_a_near_one_lists_the_known() -> None:
    assert (
        unknown_name("recipe", "xyz", ["qa-cpu", "qa-gpu"]) == "unknown recipe 'xyz'; known: qa-cpu, qa-gpu"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("四川 [red] \\ é 🦆", "四川 [red] \\ é 🦆"),
        ("a\nb\r\t\x00\x1b[2J\x7f\x9b", r"a\nb\r\t\x00\x1b[2J\x7f\x9b"),
        ("\ud83d\udc80", r"\ud83d\udc80"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\u3000", "\u3000"),  # the space of Chinese text is a character like others
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert len(printable(text).encode("utf-8").splitlines()) == 1


# -- what ends a door --------------------------------------------------------------------------------------

DOOR = '''
import dataclasses, os, sys, time
from pathlib import Path
from minigpt.console.command_line import DoorOptions, run
from minigpt.errors import InputError

@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DoorOptions):
    """A door."""

    what: str = ""
    """what to do"""

def main(options):
    match options.what:
        case "input": raise InputError("line one\\nline two \\x1b[31m \\udc80 四川")
        case "missing": open("no/such/file")
        case "directory": open(".")
        case "bare": raise OSError("the disk went away")
        case "empty": raise OSError()
        case "bug": raise ValueError("a bug, not the user's fault")
        case "wait":
            try:
                print("ready", flush=True)
                time.sleep(60)
            finally:
                Path("cleaned").touch()
        case "many":
            for i in range(1_000_000): print(i)
        case "answer": print("四川 \\udc80")
        case "exit": sys.exit(5)
    return {"loss": float("nan"), "top": [float("-inf"), 1.5, (float("inf"),)], "path": Path("a") / "b",
            "text": '四川 "\\n\\udc80 \\U0001f986', "none": None, "deep": {"ok": True, "n": 3}}

if __name__ == "__main__":
    run(Options, main)
'''


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doors") / "door.py"
    path.write_text(DOOR, encoding="utf-8")
    return path


def start(door: Path, *argv: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(door), *argv],
        cwd=door.parent,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": "",
            "PYTHONUNBUFFERED": "",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def outcome(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode("utf-8"), err.decode("utf-8")


def test_done_is_0_and_silent(door: Path) -> None:
    assert outcome(start(door)) == (0, "", "")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--what", "input"], r"line one line two \x1b[31m \udc80 四川"),
        (["--what", "missing"], "no/such/file: No such file or directory"),
        (["--what", "directory"], ".: Is a directory"),
        (["--what", "bare"], "the disk went away"),
        (["--what", "empty"], "OSError"),
        (["--waht", "input"], "unknown flag '--waht'; did you mean '--what'?"),
        (["--what=a", "b\udc80\x1b"], r"unexpected argument: b\udc80\x1b (a value with spaces needs quotes around it)"),  # noqa: E501
    ],
)  # fmt: skip
def test_bad_input_is_2_and_one_line(door: Path, argv: list[str], line: str) -> None:
    assert outcome(start(door, *argv)) == (2, "", f"door.py: error: {line}\n")


def test_a_bug_is_1_and_keeps_its_traceback(door: Path) -> None:
    code, out, err = outcome(start(door, "--what", "bug"))
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith("ValueError: a bug, not the user's fault\n")


def test_a_door_may_choose_its_own_code(door: Path) -> None:
    assert outcome(start(door, "--what", "exit")) == (5, "", "")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals(door: Path, number: int, code: int, word: str) -> None:
    cleaned = door.parent / "cleaned"
    cleaned.unlink(missing_ok=True)
    process = start(door, "--what", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert outcome(process) == (code, "", f"door.py: {word}\n")
    assert cleaned.exists(), "what a door opened must be closed"


def test_a_reader_that_goes_away_is_not_a_traceback(door: Path) -> None:
    process = start(door, "--what", "many")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    # 128 + SIGPIPE, as `seq 1000000 | head -1` leaves in PIPESTATUS: the work was not done
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_a_reader_that_went_before_the_complaint_still_leaves_the_complaint(door: Path) -> None:
    code = "print('x' * 100); raise InputError('bad')"
    path = door.parent / "late.py"
    path.write_text(re.sub(r"def main\(options\):\n", f"def main(options):\n    {code}\n", DOOR))
    process = start(path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b"late.py: error: bad\n"
    assert process.wait(timeout=60) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(door: Path) -> None:
    for what in ("many", "answer"):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [sys.executable, str(door), "--what", what],
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
                stdout=full,
                stderr=subprocess.PIPE,
            )
        assert (done.returncode, done.stderr) == (2, b"door.py: error: No space left on device\n")


def test_json_is_the_last_line(door: Path) -> None:
    code, out, err = outcome(start(door, "--what", "answer", "--json"))
    assert (code, err) == (0, "")
    first, last = out.splitlines()
    assert first == r"四川 \udc80"
    expected = {
        "loss": None,  # JSON has no word for NaN; `null` is what other writers put there
        "top": [None, 1.5, [None]],
        "path": str(Path("a") / "b"),
        "text": '四川 "\n\udc80 \U0001f986',
        "none": None,
        "deep": {"ok": True, "n": 3},
    }
    assert json.loads(last, parse_constant=pytest.fail) == expected
    assert "四川" in last, "readable for people too"


def test_json_is_json_where_stdout_knows_no_chinese(door: Path) -> None:
    code, out, _ = outcome(start(door, "--what", "answer", "--json", PYTHONIOENCODING="latin-1"))
    assert code == 0
    assert json.loads(out.splitlines()[-1])["text"] == '四川 "\n\udc80 \U0001f986'


@pytest.mark.parametrize("result", [None, {}])
def test_json_of_nothing_is_an_empty_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: dict[str, Any] | None
) -> None:
    monkeypatch.setattr(sys, "argv", ["folder/door.py", "--json"])
    with pytest.raises(SystemExit) as stop:
        run(Example, lambda _: result)
    assert stop.value.code == 0
    assert capsys.readouterr().out == "{}\n"


class Ours(RuntimeWarning):
    __module__ = "minigpt.somewhere"


class Theirs(RuntimeWarning):
    __module__ = "minigpts"


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_minigpt_s_own_warnings_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def main(_: Example) -> None:
        warnings.warn("one\nline \x1b[31m", Ours, stacklevel=1)
        warnings.warn("as Python does", Theirs, stacklevel=1)

    monkeypatch.setattr(sys, "argv", ["door.py"])
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with pytest.raises(SystemExit) as stop:
        run(Example, main)
    assert stop.value.code == 0
    assert capsys.readouterr() == ("", "warning: one line \\x1b[31m\n")
    assert shown == ["as Python does"]
    warnings.warn("after it", Ours, stacklevel=1)
    assert shown == ["as Python does", "after it"]


def test_a_wrong_flag_is_refused_before_the_defaults_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minigpt try", "--n_layers", "3"])
    with pytest.raises(SystemExit) as stop:
        run(Example, lambda _: None, defaults=lambda _: pytest.fail("it may load torch, or print"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "minigpt try: error: unknown flag '--n_layers'; did you mean '--n_layer'?\n"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "latin-1", "ascii"])
def test_a_complaint_does_not_depend_on_the_encoding_of_stdout(door: Path, encoding: str) -> None:
    # the parser's box is drawn in ASCII where stdout's encoding is not spelt "utf-8"
    code, _, err = outcome(start(door, "--what", PYTHONIOENCODING=encoding))
    assert (code, err) == (
        2,
        "door.py: error: --what needs a value (one that begins with '-': --what=VALUE)\n",
    )


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_complaint_on_a_terminal_holds_no_colours(door: Path) -> None:
    # the parser colours its box when stdout is a terminal, though the box goes to stderr
    terminal, side = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(door), "--what"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=side,
        stderr=side,
    )
    os.close(side)
    said = b""
    with (
        contextlib.suppress(OSError),
        os.fdopen(terminal, "rb", buffering=0) as stream,
    ):  # EIO: the other side closed
        while piece := stream.read(1000):
            said += piece
    assert process.wait(timeout=60) == 2
    assert said == b"door.py: error: --what needs a value (one that begins with '-': --what=VALUE)\r\n"


# -- every door's flags ------------------------------------------------------------------------------------


def option_classes(module_name: str) -> list[type[DoorOptions]]:
    module = importlib.import_module(module_name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, DoorOptions) and value is not DoorOptions
    ]
    assert found, f"{module_name} has no options"
    return found


def documented(options: type[DoorOptions]) -> dict[str, str]:
    """The text below each field of a class and its bases."""
    found: dict[str, str] = {}
    for base in options.__mro__:
        if not dataclasses.is_dataclass(base):
            continue
        source = sys.modules[base.__module__].__file__
        assert source is not None
        tree = ast.parse(Path(source).read_text(encoding="utf-8"))
        body = next(
            node.body
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name == base.__name__
        )
        for field, text in itertools.pairwise(body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    found[name] = words
    return found


@pytest.mark.parametrize("verb", DOORS)
def test_every_flag_of_every_door_has_one_line_of_help(verb: str) -> None:
    for options in option_classes(DOORS[verb][0]):
        texts = documented(options)
        for field in dataclasses.fields(options):
            assert field.name in texts, f"{options.__name__}.{field.name} has no help below it"
            words = texts[field.name]
            assert words.strip(), f"{options.__name__}.{field.name} has no help below it"
            assert words == words.lstrip(), (field.name, words)
            assert "\n" not in words, f"{options.__name__}.{field.name}: more than one line"
            assert len(words) <= 110, f"{options.__name__}.{field.name}: {len(words)} characters"


@pytest.mark.parametrize("verb", DOORS)
def test_help_of_every_door(verb: str, tmp_path: Path) -> None:
    """As a script, from elsewhere: exit 0, every flag, its help, no torch, and nothing written."""
    module = DOORS[verb][0]
    script = ROOT / Path(*module.split(".")).with_suffix(".py")
    spy = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = {folder!r}\n"
    spy += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    spy += "finally: print('LOADED', sorted({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", spy.format(folder=str(script.parent)), str(script), "--help"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "400", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    *text, loaded = done.stdout.splitlines()
    assert loaded == "LOADED []"
    for options in option_classes(module):
        if options.__doc__ is None or options.__doc__.splitlines()[0] not in done.stdout:
            continue  # another door's options, which this one imports
        shown = " ".join(" ".join(text).replace("│", " ").split())
        by_place = {
            field.name for field in dataclasses.fields(options) if hasattr(field.type, "__metadata__")
        }
        for name, words in documented(options).items():
            flag = name.upper() if name in by_place else f"--{name}"
            assert re.search(rf"{flag}\b[^(]* {re.escape(words)}", shown), f"--{name} or its help is missing"
        break
    else:
        pytest.fail("the help begins with no options' docstring")


def test_a_signal_while_the_flags_are_read_is_no_wrong_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    import tyro

    def struck(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tyro, "cli", struck)
    monkeypatch.setattr(sys, "argv", ["door.py"])
    with pytest.raises(SystemExit) as stopped:
        run(DoorOptions, lambda options: None)
    assert stopped.value.code == 143
