"""Progress, tables and bars: plain lines in a log, aligned Chinese text, and no text is read as markup."""

import io
import math
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, suppress
from pathlib import Path

import pytest
from rich.cells import cell_len

from minigpt.__main__ import COMMANDS
from minigpt.console.terminal import ProgressLine, histogram, seconds, table, table_text, warn
from minigpt.errors import InputError, printable, printable_lines

ROOT = Path(__file__).parents[1]

# Texts that rich would read as markup, an escape, an emoji or a link, and codes that must not reach a
# terminal.
STRANGE = [
    "[red]红[/red]",
    "[/]",
    "[",
    "]",
    "[[",
    "\\",
    "\\\\",
    "C:\\[folder]\\",
    "\\[red]",
    "a\\[",
    ":smile:",
    "[link=x]y[/link]",
    "[@click=f]x",
    "{task.total}",
    "%s",
    "🦆é",
]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("minigpt.console.terminal.time.monotonic", made)
    return made


class Terminal(io.StringIO):
    """A stream that collects the output, and pretends to be a terminal."""

    def isatty(self) -> bool:
        return True


# -- durations and warnings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0.0 s"),
        (0.04, "0.0 s"),
        (0.25, "0.2 s"),
        (0.949, "0.9 s"),
        (0.951, "1 s"),
        (1, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"),
        (119.7, "2 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (7199, "1 h 59 min"),
        (360_000, "100 h 00 min"),
        (-5, "-5 s"),
        (-90, "-1 min 30 s"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
        (-math.inf, "unknown"),
    ],
)
def test_seconds(value: float, expected: str) -> None:
    assert seconds(value) == expected


def test_longer_is_never_said_to_be_shorter() -> None:
    def read(text: str) -> float:
        parts = re.findall(r"([\d.]+) (s|min|h)", text)
        return sum(float(number) * {"s": 1, "min": 60, "h": 3600}[unit] for number, unit in parts)

    said = [read(seconds(tenth / 10)) for tenth in range(80_000)]
    assert said == sorted(said)
    # to the tenth below a second, to the second below an hour, to the minute above
    assert all(abs(value - tenth / 10) <= (0.5 if value < 3600 else 60) for tenth, value in enumerate(said))


def test_a_warning_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    warn("first\n  second \x1b[31m\udc80 [red]四川")
    assert capsys.readouterr() == ("", "warning: first second \\x1b[31m\\udc80 [red]四川\n")


# -- tables ------------------------------------------------------------------------------------------------


def borders(line: str) -> list[int]:
    """Return the screen columns of a table's vertical lines."""
    return [cell_len(line[:index]) for index, character in enumerate(line) if character in "│┃"]


def test_a_table_with_chinese_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("四川省的省会是哪里？", 1), ("a", 22), ("混合 mixed 文字", 333), ("", 4444), ("🦆", 5)]
    table("统计", ("问题", "次数"), rows, numeric=(1,))
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.rstrip() == "统计"
    assert len({cell_len(line) for line in lines}) == 1
    assert len({tuple(borders(line)) for line in lines if borders(line)}) == 1
    body = [line for line in lines if line.startswith("│")]
    assert [line.strip("│").split("│")[0].strip() for line in body] == [row[0] for row in rows]
    cells = [line.strip("│").split("│")[1] for line in body]
    assert [cell.strip() for cell in cells] == [str(row[1]) for row in rows]
    assert all(cell.endswith(" ") and cell[-2].isdigit() for cell in cells), "numbers stand right"


def test_the_command_line_answers_without_rich() -> None:
    """`--help` of every verb works, so an installation without its dependencies can say what it needs."""
    program = (
        "import runpy, sys\n"
        "sys.modules['rich'] = sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from minigpt.__main__ import COMMANDS, main\n"
        "for verb in sorted(COMMANDS, key=lambda verb: verb == 'quickstart'):\n"  # it imports others
        "    assert main([verb, '--help']) == 0, verb\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert done.stdout.count(b"usage: minigpt ") == len(COMMANDS)


@pytest.mark.parametrize("text", STRANGE)
def test_a_table_shows_what_it_was_given(capsys: pytest.CaptureFixture[str], text: str) -> None:
    table(text, [text, "other"], [[text, "x"], [f"{text}x", "y"]])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.rstrip() == text
    cells = [re.split("[│┃]", line)[1].strip() for line in lines if borders(line)]
    assert cells == [text, text, f"{text}x"]


def test_a_table_escapes_what_no_terminal_should_be_sent(capsys: pytest.CaptureFixture[str]) -> None:
    table("t\n", ["c\x1b[2J"], [["a\nb\tc\x1b[31m\udc80"]])
    out = capsys.readouterr().out
    assert r"a\nb\tc\x1b[31m\udc80" in out
    assert r"c\x1b[2J" in out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 6, "title, four lines of frame, one row: " + out


def test_a_cell_wider_than_the_screen_is_folded_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table("t", ["c"], [["字" * 50]])
    out = capsys.readouterr().out
    assert out.count("字") == 50
    assert all(cell_len(line) <= 40 for line in out.splitlines())


@pytest.mark.parametrize("width", [40, 50, 70, 80, 90])
def test_no_word_of_a_table_is_broken(width: int) -> None:
    columns = ("task", "metric", "first", "difference (95 %)", "count")
    rows = [("val", "exact_match", "0.9700", "-0.0200 (-0.0600 to +0.0200)", "100")]
    text = table_text("two models", columns, rows, (2, 3, 4), width)
    assert max(map(cell_len, text.splitlines())) <= width
    for word in " ".join([*columns, *rows[0]]).split():
        assert word in text or word == "task"  # a list leaves out what its first column is, if it is a name
    assert table_text("", ("line", *columns), [(7, *rows[0])], (), 30).startswith("\nline 7  task val")


@pytest.mark.parametrize("width", [20, 30, 40, 59, 80])
def test_no_number_is_broken_at_any_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", f"{width}")
    numbers = ["-0.123456", "12,345,678", "98.7%", "1.5e-05", "3.21±0.04", "4096"]
    names = ["layer", "token", "probability", "rank", "loss", "count"]
    table("numbers", names, [numbers], range(6))
    table(
        "two",
        ["a/long/path/to/a/folder/that/is/wider/than/all/of/the/screens", "n"],
        [("四川" * 30, "12,345,678")],
    )
    histogram("counts", ["0-127", "128-255"], [12_345, 1])
    lines = capsys.readouterr().out.splitlines()
    words = " ".join(lines).replace("│", " ").split()
    assert {*numbers, "12,345,678", "12,345"} <= {*words}
    assert all(cell_len(line) <= max(width, 28) for line in lines), "a histogram needs 28 columns"


def test_a_table_gives_up_its_lines_before_it_becomes_a_list() -> None:
    columns = ("", "reads", "id", "target", "id", "mask", "counts")
    rows = [(27, "。", 56, "<sep>", 2, 1, "✓"), (0, "的", 937, "中", 1078, 1, "")]
    # the widest words have 2 + 5 + 3 + 6 + 4 + 4 + 6 = 30 columns, and 3, 2 or 1 more for each of seven cells
    for width, lines in ((80, True), (54, False), (46, False), (38, False)):
        text = table_text("", columns, rows, (0, 2, 4, 5), width)
        assert ("│" in text) is lines, width
        assert ("─" in text) is True, width
        assert max(map(cell_len, text.splitlines())) <= width
        assert len(text.splitlines()) == (7 if lines else 5), "a line for each row"
    list_of_rows = table_text("", columns, rows, (0, 2, 4, 5), 30)
    assert "─" not in list_of_rows
    paragraphs = [line for line in list_of_rows.splitlines() if line and not line.startswith("  ")]
    assert len(paragraphs) == 2, "later lines of a row are set in"
    assert paragraphs[0].startswith("27  reads 。  id 56")


def test_tables_without_rows_or_with_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    table("empty", ["a", "b"], [])
    table("types", ["a", "b"], [(None, 1.5), (Path("x"), True)])
    out = capsys.readouterr().out
    assert all(word in out for word in ("empty", "None", "1.5", "x", "True"))


# -- histograms --------------------------------------------------------------------------------------------


def test_histogram(capsys: pytest.CaptureFixture[str]) -> None:
    histogram("lengths", ["0-9", "10-19", "20-"], [1, 2, 1], width=4)
    assert capsys.readouterr().out.splitlines() == [
        "lengths",
        "    0-9 ██          1  25.0%",
        "  10-19 ████        2  50.0%",
        "    20- ██          1  25.0%",
    ]


def test_histogram_with_chinese_labels_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    histogram("长度", ["一", "二十到三十", "x", "[red]"], [5, 1000, 0, 1], width=10)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "长度"
    assert len({cell_len(line) for line in lines}) == 1
    assert [line.count("█") for line in lines] == [0, 10, 0, 0]
    assert [line.count("▏") for line in lines] == [1, 0, 0, 1], "few is not none"
    assert "1,000" in lines[1]
    assert "[red]" in lines[3]
    shares = [float(line.split()[-1].rstrip("%")) for line in lines]
    assert sum(shares) == pytest.approx(100, abs=0.2)  # four shares, each rounded to 0.1


def test_histograms_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    histogram("nothing", [], [])
    histogram("zeros", ["a", "b"], [0, 0], width=3)
    assert capsys.readouterr().out.splitlines() == ["nothing", "zeros", "  a            0   0.0%",
                                                    "  b            0   0.0%"]  # fmt: skip
    with pytest.raises(ValueError, match="zip"):
        histogram("unequal", ["a"], [1, 2])


# -- progress in a log -------------------------------------------------------------------------------------


def test_a_log_gets_one_line_per_interval(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with ProgressLine("training", 100, interval=10) as progress:
        for step in range(1, 101):
            clock.now += 1
            progress.update(step, f"loss {step / 100}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        # the first at once: a log should say that something has begun
        *(f"training {step}/100 loss {step / 100}" for step in range(1, 101, 10)),
        "training 100/100 loss 1.0",  # and the last, though its interval was not over
    ]


def test_the_last_line_is_not_said_twice(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with ProgressLine("reading", 2, interval=1) as progress:
        for step in (1, 2):
            clock.now += 5
            progress.update(step)
    assert capsys.readouterr().err.splitlines() == ["reading 1/2", "reading 2/2"]


def test_short_work_is_silent(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with ProgressLine("reading", 10, patience=2) as progress:
        for step in range(10):
            clock.now += 0.15
            progress.update(step)
    assert capsys.readouterr() == ("", "")


def test_patience_then_lines(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with ProgressLine("reading", 10, interval=3, patience=2) as progress:
        for step in range(1, 11):
            clock.now += 1
            progress.update(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading 2/10", "reading 5/10", "reading 8/10", "reading 10/10"]


def test_force_does_not_wait(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with ProgressLine("x", 5, interval=100, patience=100) as progress:
        progress.update(1)
        progress.update(2, force=True)
        progress.update(3)
        progress.update(4, force=True)
        progress.update(4)
    assert capsys.readouterr().err.splitlines() == ["x 2/5", "x 4/5"]


def test_an_error_gets_no_last_line(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), ProgressLine("x", 5) as progress:  # noqa: PT012
        progress.update(1)
        progress.update(2)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["x 1/5"]


def test_nothing_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("x", 0):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_total_that_is_not_known_is_not_shown(
    capsys: pytest.CaptureFixture[str], clock: Clock, screen: Terminal
) -> None:
    with ProgressLine("reading, records", 0) as progress:
        progress.update(7, "x")
    assert capsys.readouterr().err == "reading, records 7 x\n"
    with redirect_stderr(screen), ProgressLine("reading, records", 0) as progress:
        progress.update(7, "x")
    text = without_codes(screen.getvalue())
    assert " 7 x" in text
    assert "/" not in text


@pytest.mark.parametrize("text", STRANGE)
def test_a_log_line_shows_what_it_was_given(
    capsys: pytest.CaptureFixture[str], clock: Clock, text: str
) -> None:
    with ProgressLine(text, 1) as progress:
        progress.update(1, text)
        progress.write(text)
    assert capsys.readouterr() == (f"{text}\n", f"{text} 1/1 {text}\n")


def test_written_lines_go_to_stdout_and_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("x", 1) as progress:
        progress.write("A: 四川\n\x1b[2J\udc80")
    assert capsys.readouterr() == ("A: 四川\\n\\x1b[2J\\udc80\n", "")


# -- progress on a terminal --------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_gets_a_bar(screen: Terminal, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with redirect_stderr(screen), ProgressLine("training", 10) as progress:
        for step in range(1, 11):
            clock.now += 1
            progress.update(step, f"loss {step}")
    text = without_codes(screen.getvalue())
    assert "training" in text
    assert "━" in text
    assert all(f"{step}/10 loss {step}" in text for step in range(1, 11))
    assert screen.getvalue().endswith("\x1b[2K"), "the bar is wiped away at the end"
    assert "\x1b[?25h" in screen.getvalue(), "the cursor is back"
    assert capsys.readouterr().out == ""


def test_a_terminal_is_drawn_at_most_ten_times_a_second(screen: Terminal, clock: Clock) -> None:
    with redirect_stderr(screen), ProgressLine("training", 1000) as progress:
        for step in range(1000):
            clock.now += 0.001
            progress.update(step, f"step-{step};")
    drawn = set(re.findall(r"step-\d+;", without_codes(screen.getvalue())))
    assert 9 <= len(drawn) <= 11  # of a second of a thousand updates


@pytest.mark.parametrize("text", STRANGE)
def test_a_bar_shows_what_it_was_given(screen: Terminal, clock: Clock, text: str) -> None:
    with redirect_stderr(screen), ProgressLine(f"«{text}»", 1) as progress:
        progress.update(1, f"‹{text}›")
    shown = without_codes(screen.getvalue())
    assert f"«{text}»" in shown
    assert f"‹{text}›" in shown


def test_a_bar_stays_one_line(screen: Terminal, clock: Clock) -> None:
    with redirect_stderr(screen), ProgressLine("训练", 10) as progress:
        progress.update(1, "字" * 200)
        progress.update(2, "a\nb\x1b[2J", force=True)
    lines = [line for piece in screen.getvalue().split("\r") for line in without_codes(piece).splitlines()]
    assert max(map(cell_len, lines)) <= 100
    assert "\x1b[2J" not in screen.getvalue()
    assert r"a\nb\x1b[2J" in without_codes(screen.getvalue())


def test_a_line_above_the_bar(screen: Terminal, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with redirect_stderr(screen), ProgressLine("training", 10) as progress:
        progress.update(1)
        progress.write("step 1 [red]四川")
        assert capsys.readouterr().out == "step 1 [red]四川\n"
        assert screen.getvalue().endswith("\x1b[2K"), "the bar is gone while the line is printed"
        clock.now += 1
        progress.update(2)
    assert "2/10" in without_codes(screen.getvalue())


def test_an_error_takes_the_bar_away(screen: Terminal, clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), redirect_stderr(screen), ProgressLine("training", 10) as progress:  # noqa: PT012
        progress.update(1)
        raise KeyboardInterrupt
    assert screen.getvalue().endswith("\x1b[2K")
    assert "\x1b[?25h" in screen.getvalue()


def test_a_dumb_terminal_gets_plain_lines(
    screen: Terminal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(screen), ProgressLine("training", 10) as progress:
        progress.update(1)
    assert screen.getvalue() == "training 1/10\n"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_results_in_a_file_stay_there_while_the_bar_is_on_the_terminal(tmp_path: Path) -> None:
    # rich's live display would carry whatever is printed meanwhile from the file to the terminal
    code = (
        "from minigpt.console.terminal import ProgressLine, warn\n"
        "with ProgressLine('reading', 3) as progress:\n"
        "    progress.update(1); print('a result'); warn('careful'); progress.update(2, force=True)\n"
    )
    terminal_side, program_side = os.openpty()
    results = tmp_path / "results"
    with results.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
            stdout=file,
            stderr=program_side,
        )
    os.close(program_side)
    shown = b""
    # EIO is how Linux says that the other side has closed
    with suppress(OSError), os.fdopen(terminal_side, "rb", buffering=0) as stream:
        while piece := stream.read(1000):
            shown += piece
    assert process.wait(timeout=60) == 0
    assert results.read_text() == "a result\n"
    text = without_codes(shown.decode())
    assert "2/3" in text
    assert "━" in text
    assert "warning: careful" in text
    assert "a result" not in text


@pytest.mark.parametrize(
    "code", [0, 7, 0x1B, 0x7F, 0x9B, 0x61C, 0x200E, 0x202E, 0x2066, 0x2069, 0x2028, 0xD800, 0xE0041]
)
def test_what_steers_a_terminal_is_escaped_wherever_text_is_shown(code: int) -> None:
    """Control characters, marks of direction, surrogates: in tables, errors and samples."""
    text = f"a{chr(code)}b"
    for shown in (
        printable(text),
        printable_lines(text),
        table_text("t", ("c",), [(text,)]),
        str(InputError(text)),
    ):
        assert chr(code) not in shown
        assert f"{code:x}b" in shown


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    assert str(InputError("a.txt:\n  Couldn't read\r\nit\n")) == "a.txt: Couldn't read it"
    assert len(str(InputError("a" * 10**6))) <= 3000
    assert str(InputError("two  blanks stay")) == "two  blanks stay"


def test_chinese_in_a_cell_fills_its_lines() -> None:
    """A space within Chinese is as good a place to end a line as any other."""
    text = table_text(
        "", ("", ""), [("n_layer", "12 种形状里，每个参数读得到 2 个词元的最大的一种")], width=40
    )
    assert [line[9:] for line in text.splitlines()[1:]] == [
        "12 种形状里，每个参数读得到 2",  # 29 of 40 - 9 columns; a space and one more character would be 32
        "个词元的最大的一种",
    ]
