"""Flags are read as users write them. An error gives one line and an exit code."""

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from minigpt.__main__ import COMMANDS, main
from minigpt.commands import look
from minigpt.console import command_line
from minigpt.console.command_line import CommandOptions, exit_code, run
from minigpt.console.flags import POSITIONAL, Flag, fields_of, flags_of, help_text, parse
from minigpt.console.terminal import ProgressLine, table
from minigpt.errors import InputError, printable, unknown_name
from minigpt.training.config import TrainConfig
from minigpt.training.finetune_config import FinetuneConfig
from tests.commands import options_of, path_of

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(CommandOptions):
    """Try things."""

    # The data
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
    options, default = Example(**parse(Example, argv)), Example()
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Example)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        Example(**parse(Example, argv))
    text = str(caught.value)
    assert "\n" not in text
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


def test_only_what_is_given_is_returned() -> None:
    assert parse(Example, ["--question", "?", "--n_layer=3"]) == {"question": "?", "n_layer": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Options of something else, which are flags, too."""

    # How many
    count: int | None = None
    """how many"""
    words: str | tuple[str, ...] = ()
    """one or several"""
    hidden: dict[str, int] | None = None
    """no flag"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide(CommandOptions):
    """All kinds."""

    place: Path = dataclasses.field(default=Path("here"), metadata=POSITIONAL)
    """where"""
    rates: tuple[float, ...] = ()
    """some"""
    inner: dict[str, Any] = fields_of(Inner, ("count", "words"))  # noqa: RUF009
    required: int
    """a number"""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["x"], {"place": Path("x")}),
        (["--", "-x"], {"place": Path("-x")}),
        (["--rates", "1", "-2e3", ".5"], {"rates": (1.0, -2000.0, 0.5)}),
        (["--rates", "1", "--rates", "2"], {"rates": (2.0,)}),
        (["--rates=1", "x"], {"rates": (1.0,), "place": Path("x")}),
        (["--words", "a b", "", "c"], {"inner": {"words": ("a b", "", "c")}}),
        (["--count=3", "--words=-"], {"inner": {"count": 3, "words": ("-",)}}),
        (["--rates", "1", "--", "x"], {"rates": (1.0,), "place": Path("x")}),
    ],
)
def test_lists_places_and_the_fields_of_another_class(argv: list[str], expected: dict[str, Any]) -> None:
    assert parse(Wide, ["--required", "1", *argv]) == {"required": 1, **expected}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--required is missing: see --help"),
        (["--place", "x"], "unknown flag '--place'; write PLACE without a flag before it"),
        (["--rates"], "--rates needs a value (one that begins with '-': --rates=VALUE)"),
        (["--rates", "1", "x"], "--rates must be a number: got 'x'"),
        (["a", "b", "c"], "unexpected argument: b c (a value with spaces needs quotes around it)"),
        (["--hidden", "x"], "unknown flag '--hidden'; known: "),
        (["-x"], " (PLACE that begins with '-' is written at the end, after --)"),
        (["--", ""], "PLACE must be a path: got ''"),
    ],
)
def test_lists_and_places_that_are_refused(argv: list[str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(Wide, argv)
    assert expected in str(caught.value)


def test_options_of_a_module_with_postponed_annotations_have_switches() -> None:
    # `from __future__ import annotations` makes field.type a text
    fields: list[tuple[str, Any, Any]] = [("deep", "bool", True)]
    later = dataclasses.make_dataclass("Later", fields, bases=(CommandOptions,), frozen=True, kw_only=True)
    assert parse(later, ["--no_deep"]) == {"deep": False}


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--n_layers", "4"], "unknown flag '--n_layers'; did you mean '--n_layer'?"),
        (["--n_layers=4"], "unknown flag '--n_layers'; did you mean '--n_layer'?"),
        (["--n-layers=4"], "unknown flag '--n-layers'; did you mean '--n_layer'?"),
        (["--lr", "4"], "unknown flag '--lr'; did you mean '--learning_rate'?"),
        (["--layers=4"], "unknown flag '--layers'; did you mean '--n_layer'?"),
        (["-n_layer", "4"], "unknown flag '-n_layer'; did you mean '--n_layer'?"),
        (["—n_layer", "4"], "unknown flag '—n_layer'; did you mean '--n_layer'?"),
        (["--data", ""], "--data must be a path: got ''"),
        (["--n_layer", "1" * 5000], f"--n_layer must be a whole number: got '{'1' * 79}..."),
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


@pytest.mark.parametrize(
    ("options", "argv", "expected"),
    [
        (TrainConfig, ["--model", "m"], "unknown flag '--model'; did you mean '--init_from'?"),
        (TrainConfig, ["--model_path", "m"], "unknown flag '--model_path'; did you mean '--init_from'?"),
        (FinetuneConfig, ["--init_from", "m"], "unknown flag '--init_from'; did you mean '--model'?"),
        (look.Options, ["tokenz"], "unknown VIEW 'tokenz'; did you mean 'tokens'?"),
        (FinetuneConfig, ["--task", "sfft"], "unknown --task 'sfft'; did you mean 'sft'?"),
    ],
)
def test_what_stands_under_another_name(options: type, argv: list[str], expected: str) -> None:
    """The flag for a model differs between commands; a wrong choice names the nearest one."""
    with pytest.raises(InputError) as caught:
        parse(options, argv)
    assert str(caught.value) == expected


def test_rubbish_is_named() -> None:
    assert refusal("--question", "how", "are", "you").startswith("unexpected argument: are you (")


def test_a_flag_like_no_other_is_sent_to_the_help() -> None:
    names = [f"--a{number}" for number in range(13)]
    assert unknown_name("flag", "--zzz", names) == "unknown flag '--zzz'; --help lists the flags"
    assert unknown_name("flag", "--zzz", names[:2]) == "unknown flag '--zzz'; known: --a0, --a1"


def test_long_values_stay_in_one_piece() -> None:
    value = "x" * 90
    assert refusal("--precision", value).endswith(f" got '{value}'")
    assert len(refusal("--precision", value * 1000)) < 200


@pytest.mark.parametrize("value", ["\x1b[31m", "a\nb", "\udc80", "[red]x[/red]", "│", "─" * 5])
def test_strange_values_are_refused_in_one_line(value: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(Example, ["--n_layer", value])
    assert str(caught.value) == f"--n_layer must be a whole number: got {value!r}"


# -- numbers out of range ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranged(CommandOptions):
    """Numbers."""

    RANGES = {"count": (1, 10**6), "rate": (0.0, 0.5), "seed": (0, 2**63 - 1, "as torch takes it")}

    count: int = 1
    rate: float = 0.1
    seed: int | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1, "rate": 0, "seed": 0}, ""),
        ({"count": 10**6, "rate": 0.5, "seed": 2**63 - 1}, ""),
        ({"count": 0}, "count must be from 1 to 1000000: got count=0"),
        ({"count": 10**6 + 1}, "count must be from 1 to 1000000: got count=1000001"),
        ({"count": 1.0}, "count must be a whole number from 1 to 1000000: got count=1.0"),
        ({"count": True}, "count must be a whole number from 1 to 1000000: got count=True"),
        ({"count": None}, "count must be a whole number from 1 to 1000000: got count=None"),
        ({"count": 10**400}, "count must be from 1 to 1000000: got count=a number of 1329 bits"),
        ({"rate": math.nan}, "rate must be from 0 to 0.5: got rate=nan"),
        ({"rate": math.inf}, "rate must be from 0 to 0.5: got rate=inf"),
        ({"rate": -1e-9}, "rate must be from 0 to 0.5: got rate=-1e-09"),
        ({"rate": 10**5000}, "rate must be from 0 to 0.5: got rate=a number of 16610 bits"),
        ({"rate": "x" * 200}, f"rate must be a number from 0 to 0.5: got rate='{'x' * 79}..."),
        ({"seed": -1}, "seed must be from 0 to 9223372036854775807 (as torch takes it): got seed=-1"),
    ],
)
def test_ranges(values: dict[str, Any], message: str) -> None:
    if not message:
        Ranged(**values)
        return
    with pytest.raises(InputError) as caught:
        Ranged(**values)
    assert str(caught.value) == message


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


# -- what ends a command ------------------------------------------------------------------------------------

SCRIPT = '''
import dataclasses, os, sys, time
from pathlib import Path
from minigpt.console.command_line import CommandOptions, exit_code, run
from minigpt.errors import InputError

@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """A script."""

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
        case "opened":
            with open("opened", "w") as file:
                file.write("an answer\\n")
                raise InputError("a complaint")
    return {"loss": float("nan"), "top": [float("-inf"), 1.5, (float("inf"),)], "path": Path("a") / "b",
            "text": '四川 "\\n\\udc80 \\U0001f986', "none": None, "deep": {"ok": True, "n": 3}}

if __name__ == "__main__":
    run(Options, main)
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripts") / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def start(script: Path, *argv: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(script), *argv],
        cwd=script.parent,
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


def test_done_is_0_and_silent(script: Path) -> None:
    assert outcome(start(script)) == (0, "", "")


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
def test_bad_input_is_2_and_one_line(script: Path, argv: list[str], line: str) -> None:
    assert outcome(start(script, *argv)) == (2, "", f"script.py: error: {line}\n")


def test_a_bug_is_1_and_keeps_its_traceback(script: Path) -> None:
    code, out, err = outcome(start(script, "--what", "bug"))
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith("ValueError: a bug, not the user's fault\n")


def test_a_command_may_choose_its_own_code(script: Path) -> None:
    assert outcome(start(script, "--what", "exit")) == (5, "", "")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals(script: Path, number: int, code: int, word: str) -> None:
    cleaned = script.parent / "cleaned"
    cleaned.unlink(missing_ok=True)
    process = start(script, "--what", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert outcome(process) == (code, "", f"script.py: {word}\n")
    assert cleaned.exists(), "what a script opened must be closed"


def test_a_reader_that_goes_away_is_not_a_traceback(script: Path) -> None:
    process = start(script, "--what", "many")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    # 128 + SIGPIPE, as `seq 1000000 | head -1` leaves in PIPESTATUS: the work was not done
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_a_reader_that_went_before_the_complaint_still_leaves_the_complaint(script: Path) -> None:
    code = "print('x' * 100); raise InputError('bad')"
    path = script.parent / "late.py"
    path.write_text(re.sub(r"def main\(options\):\n", f"def main(options):\n    {code}\n", SCRIPT))
    process = start(path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b"late.py: error: bad\n"
    assert process.wait(timeout=60) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(script: Path) -> None:
    for what in ("many", "answer"):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [sys.executable, str(script), "--what", what],
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
                stdout=full,
                stderr=subprocess.PIPE,
            )
        assert (done.returncode, done.stderr) == (2, b"script.py: error: No space left on device\n")


def test_json_is_the_last_line(script: Path) -> None:
    code, out, err = outcome(start(script, "--what", "answer", "--json"))
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


def test_json_is_json_where_stdout_knows_no_chinese(script: Path) -> None:
    code, out, _ = outcome(start(script, "--what", "answer", "--json", PYTHONIOENCODING="latin-1"))
    assert code == 0
    assert json.loads(out.splitlines()[-1])["text"] == '四川 "\n\udc80 \U0001f986'


@pytest.mark.parametrize("result", [None, {}])
def test_json_of_nothing_is_an_empty_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: dict[str, Any] | None
) -> None:
    monkeypatch.setattr(sys, "argv", ["folder/script.py", "--json"])
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

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with pytest.raises(SystemExit) as stop:
        run(Example, main)
    assert stop.value.code == 0
    assert capsys.readouterr() == ("", "warning: one line \\x1b[31m\n")
    assert shown == ["as Python does"]
    warnings.warn("after it", Ours, stacklevel=1)
    assert shown == ["as Python does", "after it"]


def test_a_wrong_flag_is_refused_before_the_options_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minigpt try", "--n_layers", "3"])
    with pytest.raises(SystemExit) as stop:
        run(Example, lambda _: None, build=lambda _: pytest.fail("it may load torch, or print"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "minigpt try: error: unknown flag '--n_layers'; did you mean '--n_layer'?\n"
    )


# -- streams that are closed -------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
@pytest.mark.parametrize(
    ("argv", "closed", "code", "out", "err"),
    [
        ("--what answer", "<&-", 0, "四川 \\udc80\n", ""),
        ("--what answer", "2>&-", 0, "四川 \\udc80\n", ""),
        ("--what input", "2>&-", 2, "", ""),
        ("--what answer", "0<&- 2>&-", 0, "四川 \\udc80\n", ""),
        ("--what answer", ">&-", 2, "", "error: standard output is closed: give it a file, or /dev/null\n"),
        ("--help", ">&-", 2, "", "error: standard output is closed: give it a file, or /dev/null\n"),
        ("--what answer", "0<&- >&- 2>&-", 2, "", ""),
        ("--what opened", "2>&-", 2, "", ""),
    ],
)
def test_closed_streams(script: Path, argv: str, closed: str, code: int, out: str, err: str) -> None:
    command = ["sh", "-c", f'"$0" script.py {argv} {closed}', sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.removeprefix("script.py: ")) == (code, out, err)
    if "opened" in argv:  # the file that is opened first must not get the number of stderr
        assert (script.parent / "opened").read_text() == "an answer\n"


def test_the_front_page_survives_closed_streams_and_readers() -> None:
    def front(command: str) -> tuple[int, str, str]:
        done = subprocess.run(["sh", "-c", command, sys.executable], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert front('"$0" -m minigpt trian 2>&-') == (2, "", "")
    assert front('"$0" -m minigpt --help >&-')[::2] == (
        2,
        "minigpt: error: standard output is closed: give it a file, or /dev/null\n",
    )
    code = front('{ "$0" -m minigpt --help; echo $? >&2; } | true')[2]
    assert code in ("141\n", "0\n")


def test_a_table_for_a_reader_that_went_away_ends_as_other_text_does(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:  # noqa: PTH123 -- a descriptor has no path
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_code("try", lambda: table("title", ["a"], [["b"]])) == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_notes_that_cannot_be_written_stop_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def work() -> None:
        command_line.warn("lost")
        print("lost, too", file=sys.stderr, flush=True)
        with ProgressLine("steps", 2) as progress:
            progress.update(1, force=True)
        done.append(1)

    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert exit_code("try", work) == 0
        assert sys.stderr is stream
    assert done


def test_a_message_never_quotes_a_whole_file(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        command_line.warn("first " + "x" * 10**6 + " last")
        raise InputError("first " + "y" * 10**6 + " last")

    assert exit_code("try", work) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert len(warning) < 3100
    assert len(error) < 3100
    assert error.startswith("try: error: first yy")
    assert error.endswith("yy last")
    with pytest.raises(InputError) as refused:
        parse(Example, ["--n_layer", "x" * 10**6])
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 116. TiB"),
        RuntimeError("[enforce fail] ...: can't allocate memory: 9"),
    ],
)
def test_too_little_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert exit_code("try", work) == 2
    assert capsys.readouterr().err == f"try: error: not enough memory: {error}\n"
    with pytest.raises(RuntimeError, match="a bug"):
        exit_code("try", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_streams_are_open_before_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that an import opens must not get the number of a closed stream."""
    order: list[str] = []
    monkeypatch.setattr(command_line, "_open_closed_streams", lambda: order.append("streams"))
    monkeypatch.setattr(runpy, "run_module", lambda *_, **__: order.append("command"))
    assert main(["vocab"]) == 0
    assert order == ["streams", "command"]
    monkeypatch.setattr(command_line, "_open_closed_streams", lambda: True)
    assert main(["vocab"]) == 2
    assert order == ["streams", "command"], "nothing is computed whose answer nobody could read"


# -- every command's flags ---------------------------------------------------------------------------------


def help_of(verb: str) -> str:
    """Return the output of `minigpt VERB --help`."""
    options = options_of(verb)
    return help_text(options, f"minigpt {verb}", str(path_of(verb)))


def numbers_of(verb: str) -> Iterator[tuple[Flag, tuple[Any, ...] | None]]:
    """Yield the flags of a command that take numbers, with the range of each."""
    options = options_of(verb)
    holders = {field.name: field.metadata["fields_of"] for field in dataclasses.fields(options)
               if "fields_of" in field.metadata}  # fmt: skip
    for flag in flags_of(options).values():
        if flag.kind in (int, float):
            owners = holders.get(flag.holder, options).__mro__
            tables = [vars(owner).get("RANGES", {}) for owner in owners]
            yield flag, next((table[flag.name] for table in tables if flag.name in table), None)


@pytest.mark.parametrize("verb", [verb for verb in COMMANDS if any(numbers_of(verb))])
def test_every_number_flag_has_a_range_which_is_checked_at_once(verb: str) -> None:
    options = options_of(verb)
    required = [f"--{flag.name}=1" for flag in flags_of(options).values()
                if flag.default is dataclasses.MISSING and not flag.is_positional]  # fmt: skip
    required += ["x" for flag in flags_of(options).values()
                 if flag.default is dataclasses.MISSING and flag.is_positional]  # fmt: skip
    for flag, ends in numbers_of(verb):
        assert ends is not None, f"minigpt {verb}: --{flag.name} has no range: add it to RANGES"
        low, high = ends[:2]
        assert {type(low), type(high)} == {flag.kind}, (verb, flag.name)
        assert high < math.inf
        for inside in (low, high):
            parse(options, [*required, f"--{flag.name}={inside!r}"])
        step = 1 if flag.kind is int else max(abs(low), abs(high))
        for outside in (low - step, high + step, 10**400, -(10**400)):
            with pytest.raises(InputError, match=f"^{flag.name} must be from .{{3,160}}$"):
                parse(options, [*required, f"--{flag.name}={outside!r}"])


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_flag_of_every_command_has_one_line_of_help(verb: str) -> None:
    text = help_of(verb)
    assert max(map(len, text.splitlines())) <= 80
    flags = flags_of(options_of(verb))
    entries = re.split(r"\n  (?=-|[A-Z]+  )", text)[1:]
    assert len(entries) == len(flags)
    for entry in entries:
        name = re.match(r"(?:--)?(?:\[no_\])?(\w+)", entry)
        assert name
        words = " ".join(entry.split("\n\n")[0].split()).partition(" ")[2]
        assert name[1].lower() in flags
        assert re.search(r"[a-z]{2,} [a-z0-9]", words), f"{verb}: {name[1]} has no help"
        assert len(words) <= 160, f"{verb}: {name[1]}: more than a line"


def test_help_has_groups_choices_defaults_and_eighty_columns() -> None:
    assert help_text(Example, "try", __file__, Example(n_layer=9)).splitlines() == [
        "usage: try [flags]",
        "",
        "Try things.",
        "",
        "The data",
        "  --data PATH             the file [red] to read (default data.jsonl)",
        "  --n_layer N             blocks (default 9)",
        "  --learning_rate X       how far to go (default 0.5)",
        "  --question TEXT         what to ask",
        "  --precision {float32,bfloat16}",
        "                          arithmetic (default float32)",
        "  --[no_]use_cache        remember keys and values",
        "",
        "The output",
        "  --json                  also print the result as one JSON object on the last",
        "                          line, for programs",
        "  --language {auto,en,zh} English, Chinese, or what LC_ALL, LC_MESSAGES or LANG",
        "                          says (default auto)",
    ]
    lines = help_text(Wide, "try", __file__).splitlines()
    assert lines[0] == "usage: try [PLACE] [flags]"
    assert "  PLACE                   where (default here)" in lines
    assert lines[lines.index("How many") + 1 :][:2] == [
        "  --count N               how many",
        "  --words TEXT [TEXT]     one or several",
    ]


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_of_every_command(verb: str, tmp_path: Path) -> None:
    """From another folder: exit code 0, the help is printed, torch is not imported, nothing is written."""
    spy = (
        "import sys; from minigpt.__main__ import main\n"
        f"try: code = main([{verb!r}, '--help'])\n"
        "finally: print(code, sorted({'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", spy]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    *text, last = done.stdout.splitlines()
    assert (last, done.stderr, list(tmp_path.iterdir())) == ("0 []", "", [])
    if verb not in ("train", "finetune"):  # their help shows the values of a recipe
        assert "\n".join(text) == help_of(verb)


def test_a_closed_terminal_stops_a_program_unless_nohup_forbids_it() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            assert (signal.SIGHUP in command_line.stop_signals()) is stops
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_the_program_begins_is_no_traceback() -> None:
    """The process interrupts itself while `minigpt.__main__` imports its first module."""
    program = (
        "import os, signal, sys\n"
        "class Struck:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'minigpt.console':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Struck())\n"
        "import minigpt.__main__\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(("swallows", "imported"), [(True, False), (False, True)])
def test_a_signal_that_an_import_swallows_is_obeyed_after_it(
    swallows: bool, imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_library.py").write_text(
        "import gc, os, signal\n"
        "collects = gc.isenabled()\n"
        "try:\n"
        f"    {'os.kill(os.getpid(), signal.SIGINT)' if swallows else 'pass'}\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [command_line.CarefulImport("slow_library"), *sys.meta_path])
    finders = len(sys.meta_path)
    for _ in range(2):  # as a library does that asks whether the module is there
        spec = importlib.util.find_spec("slow_library")
        assert spec is not None
        assert spec.origin == str(tmp_path / "slow_library.py")
    assert len(sys.meta_path) == finders
    reached, frozen = [], gc.get_freeze_count()

    def work() -> None:
        module = importlib.import_module("slow_library")
        reached.append(module.collects)

    try:
        assert exit_code("try", work) == (130 if swallows else 0)
    finally:
        sys.modules.pop("slow_library", None)
        if not frozen:
            gc.unfreeze()
    assert (reached == [False]) is imported
    assert gc.isenabled()
    assert len(sys.meta_path) == finders - 1


@pytest.mark.parametrize("is_on", [True, False])
def test_imports_inside_imports_collect_no_garbage(is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []  # whether the garbage collection was on again when objects were frozen
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(frozen))
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    before = gc.isenabled()
    try:
        (gc.enable if is_on else gc.disable)()
        with command_line.lasting_imports():
            with command_line.lasting_imports():
                assert not gc.isenabled()
            assert not gc.isenabled()
            assert frozen == []
        assert gc.isenabled() is is_on
        assert frozen == [True] * is_on
    finally:
        (gc.enable if before else gc.disable)()


def test_a_signal_while_the_flags_are_read_is_no_wrong_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def struck(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command_line, "parse", struck)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        run(CommandOptions, lambda options: None)
    assert stopped.value.code == 143


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no thread for signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_obeyed_within_one_long_call_of_a_library(number: str) -> None:
    """Python runs a handler only after the call: here a hash that takes minutes."""
    program = (
        "import dataclasses, hashlib, sys\n"
        "from minigpt.console import command_line\n"
        "command_line._PATIENCE = 0.2\n"
        "def main(options):\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)\n"
        "sys.argv = ['x']\n"
        "command_line.run(command_line.CommandOptions, main)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while process.poll() is None:  # once may be too early: before the call
            process.send_signal(getattr(signal, number))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        assert process.returncode == 128 + getattr(signal, number)
