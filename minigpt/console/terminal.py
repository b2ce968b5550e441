"""Shows progress, tables and bars: live on a terminal, as plain lines elsewhere.

The library `rich` draws these, and knows that a Chinese character takes two columns. If a user's text
contains rich's markup, such as [red], the markup is printed as text.
"""

import io
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from minigpt.console.command_line import warn
from minigpt.console.language import say, translated
from minigpt.console.language import wrapped as lines_of
from minigpt.errors import Message, printable

__all__ = [
    "ProgressLine", "histogram", "note", "seconds", "shortened", "table", "table_text", "warn", "wrapped",
]  # fmt: skip

_NUMBER = re.compile(r"[\d.,+-]+")
_LONGEST_NUMBER = 24  # largest width of a number, in columns; a wider word is a path or an address
_NARROW = 60  # on a terminal with fewer columns, a table has no vertical lines


class _Console(Console):
    """A console that raises BrokenPipeError when stdout is closed. Rich's Console would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise  # raise the BrokenPipeError again, because rich calls this method while it handles that error


def note(text: str) -> None:
    """Print a note, which is not a warning, as one line on stderr."""
    print(printable(say("note: {text}", text=" ".join(translated(text).split()))), file=sys.stderr)


def seconds(value: float) -> str:
    """Return a duration, given in seconds, as text.

    >>> [seconds(v) for v in (0.25, 7, 75, 3720, float("inf"))]
    ['0.2 s', '7 s', '1 min 15 s', '1 h 02 min', 'unknown']
    """
    if not math.isfinite(value):
        return "unknown"
    if value < 0:
        return f"-{seconds(-value)}"
    if value < 0.95:  # from 0.95 on, "1.0 s" would be printed; "1 s" is printed instead
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shortened(text: str, limit: int = 40) -> str:
    """Return a printable text of at most `limit` characters. The end of a longer text becomes "…".

    >>> shortened("天地玄黄", 3), shortened("天地", 3)
    ('天地…', '天地')
    """
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = ()
) -> None:
    """Print a table. Columns whose indices are in `numeric` are aligned right.

    Title, column names, and cells of the class `Message` are translated.

    On a narrow terminal, or if a word or a number would otherwise be broken, `table_text` makes the table.
    """
    console = _Console(highlight=False)
    rows = _translated(rows)
    cells = _printable(columns, rows)
    least = [max(map(_longest_word, column)) for column in zip(*cells)]
    room = console.width - 3 * len(least) - 1
    if console.width < _NARROW or sum(least) > room:
        print(table_text(title, columns, rows, numeric, console.width))
        return
    console.print(_table(title, columns, rows, numeric, 3, _widths(cells, least, room)))


def table_text(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    numeric: Sequence[int] = (),
    width: int = 80,
) -> str:
    """Return a table as text of at most `width` columns, without colour.

    On a narrow terminal, or if the columns would not fit otherwise, the table has no vertical lines. If it is
    still too wide, it becomes a list: a paragraph for each row, with the name and the value of each column.
    """
    console = Console(file=io.StringIO(), highlight=False, width=width, color_system=None)
    rows = _translated(rows)
    cells = _printable(columns, rows)
    least = [max(map(_longest_word, column)) for column in zip(*cells)]
    with console.capture() as captured:
        console.print(_text(translated(title)))
        # Width of the gap between two cells -> width that is left for the cells. A gap of 3 has a vertical
        # line.
        rooms = {3: width - 3 * len(least) - 1, 2: width - 2 * len(least) + 1, 1: width - len(least) + 1}
        gaps = (2, 1) if width < _NARROW else (3, 2, 1)
        gap = next((gap for gap in gaps if sum(least) <= rooms[gap]), None)
        if gap is None and len(least) <= 2:  # no gap fits: allow breaks in long paths and addresses
            least = [max(1, *map(_longest_number, column)) for column in zip(*cells)]
            gap = next((gap for gap in gaps if sum(least) <= rooms[gap]), None)
        if gap is None:
            for first, *others in cells[1:]:
                pairs = [f"{name} {cell}" for name, cell in zip(cells[0][1:], others) if cell]
                head = f"{cells[0][0]} {first}" if _NUMBER.fullmatch(first) else first
                lines = wrapped(f"{head}  {'  '.join(pairs)}".strip(), max(1, width - 2)).splitlines()
                console.out("\n  ".join(line.strip() for line in lines), highlight=False)
        else:
            console.print(_table("", columns, rows, numeric, gap, _widths(cells, least, rooms[gap])))
    return "\n".join(map(str.rstrip, captured.get().splitlines()))


def wrapped(text: str, width: int) -> str:
    """Return a text in lines of at most `width` columns."""
    console = Console(file=io.StringIO(), highlight=False, width=width, color_system=None)
    with console.capture() as captured:
        console.print(_text(text))
    return captured.get().rstrip("\n")


def _translated(rows: Sequence[Sequence[object]]) -> list[list[object]]:
    """Translate the cells of the class `Message`. Other cells may be texts of the user, so they stay."""
    return [[translated(cell) if isinstance(cell, Message) else cell for cell in row] for row in rows]


def _printable(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[list[str]]:
    """Return the cells as they are printed; the first row has the names of the columns."""
    return [[printable(str(cell)) for cell in row] for row in ([*map(translated, columns)], *rows)]


def _widths(cells: Sequence[Sequence[str]], least: Sequence[int], room: int) -> list[int] | None:
    """Return the widths of the columns, or None if there is too little room.

    The widest columns are made narrower first, but never narrower than `least`, so that no word is broken.
    """
    found = [max(map(cell_len, column)) for column in zip(*cells)]
    while sum(found) > room:
        wide = [i for i, width in enumerate(found) if width > least[i]]
        if not wide:
            return None
        found[max(wide, key=found.__getitem__)] -= 1
    return found


def _longest_word(cell: str) -> int:
    """Return how many columns a cell needs, so that no word in it is broken over two lines.

    A word that is not ASCII, such as Chinese text, may be broken, so it counts as 12 columns at most.
    Exception: a number is never broken (see `_longest_number`).
    """
    least = [cell_len(word) if word.isascii() else min(cell_len(word), 12) for word in cell.split()]
    return max([_longest_number(cell), *least])


def _longest_number(cell: str) -> int:
    """Return the width of a cell's longest number, with sign or unit; 0 if the cell has no number.

    A word with digits that is wider than 24 columns is not a number, but a path or an address.
    """
    words = (word for word in cell.split() if any(map(str.isdigit, word)))
    return max((cell_len(word) for word in words if cell_len(word) <= _LONGEST_NUMBER), default=0)


def _table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    numeric: Sequence[int],
    gap: int = 3,
    widths: Sequence[int] | None = None,
) -> Table:
    bare: Any = {"box": SIMPLE_HEAD, "padding": (0, gap - 1, 0, 0), "show_edge": False}
    shape: Any = {} if gap == 3 else bare
    shape["show_header"] = any(columns)
    view = Table(
        title=_text(translated(title)) if title else None, title_justify="left", header_style="bold", **shape
    )
    for index, column in enumerate(columns):
        side: Any = "right" if index in numeric else "left"
        width = widths[index] if widths else None
        view.add_column(_text(translated(column)), justify=side, overflow="fold", width=width)
    for row in rows:
        view.add_row(*(_text(cell, widths[index] if widths else None) for index, cell in enumerate(row)))
    return view


def _text(cell: object, width: int | None = None) -> Text:
    """Return a cell as an object of rich's class Text, because rich interprets `[red]` in a str as markup.

    Text with Chinese characters that is wider than `width` is wrapped here: rich would end a line at a space,
    even if more Chinese characters fit into the line.
    """
    text = printable(str(cell))
    if width and not text.isascii() and cell_len(text) > width:
        text = "\n".join(lines_of(text, width))
    return Text(text)


def histogram(title: str, labels: Sequence[str], counts: Sequence[int], width: int = 40) -> None:
    """Print a bar for each label, with its count and share.

    The longest bar has `width` columns, or fewer where the terminal is narrow.
    """
    total, most = max(sum(counts), 1), max(max(counts, default=0), 1)
    shown = [printable(label) for label in labels]
    label_width = max(map(cell_len, shown), default=0)
    room = shutil.get_terminal_size().columns - label_width - 20  # 20: the indent, the count, the share
    width = max(1, min(width, room))
    print(printable(translated(title)))
    for label, count in zip(shown, counts, strict=True):
        bar = "█" * round(width * count / most) or ("▏" if count else "")
        padding = " " * (label_width - cell_len(label))
        print(f"  {padding}{label} {bar:<{width}} {count:>8,} {count / total:6.1%}")


class ProgressLine:
    """A context manager that shows progress: a live bar on a terminal, elsewhere plain lines.

    `update(done, text)` may be called often. It draws at most ten times a second, and otherwise takes
    microseconds.

    Args:
        total: number of items; 0: unknown.
        interval: seconds between two plain lines.
        patience: seconds before anything is shown.
    """

    def __init__(self, title: str, total: int, interval: float = 10.0, patience: float = 0.0) -> None:
        self.title, self.total, self.interval = translated(title), total, interval
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._next = time.monotonic() + patience
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        # `_last`: the newest line about the progress. `_shown`: the line that was printed last.
        self._last = self._shown = ""

    def __enter__(self) -> "ProgressLine":
        return self

    def update(self, done: int, text: str = "", force: bool = False) -> None:
        """Show that `done` of `total` items are finished, with `text` after the bar."""
        now = time.monotonic()
        is_due = now >= self._next or force
        if self._live and is_due:
            self._next = now + 0.1
            self._draw(done, printable(translated(text)))
        elif not self._live:
            self._last = printable(f"{self.title} {self._count(done)} {translated(text)}".rstrip())
            if is_due:
                self._next = now + self.interval
                self._print_last()

    def _count(self, done: int) -> str:
        return f"{done}/{self.total}" if self.total else f"{done}"

    def _print_last(self) -> None:
        self._shown = self._last
        print(self._shown, file=sys.stderr, flush=True)

    def _draw(self, done: int, text: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}", markup=False),
                TextColumn("{task.fields[text]}", markup=False),
                console=_Console(stderr=True, highlight=False),
                auto_refresh=False,
                transient=True,
                # True: rich prints the lines of stdout above the bar. If stdout is a file, the lines must go
                # into that file.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._bar.start()
            title = printable(self.title)
            self._task = self._bar.add_task(title, total=self.total or None, text=text, count="")
        assert self._task is not None
        self._bar.update(self._task, completed=done, text=text, count=self._count(done))
        self._bar.refresh()

    def write(self, text: str) -> None:
        """Print a line above the bar (on stdout)."""
        self._clear()
        sys.stderr.flush()
        print(printable(translated(text)), flush=True)

    def _clear(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()
        if kind is None and self._shown and self._shown != self._last:
            self._print_last()  # print the final state, too, if earlier lines were printed
