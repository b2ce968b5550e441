"""Progress, tables and bars: live on a terminal, plain lines elsewhere.

`rich` draws them and counts a Chinese character as two columns. A user's text is never read as rich's markup.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from minigpt.console.command_line import warn
from minigpt.errors import printable

__all__ = ["ProgressLine", "histogram", "note", "seconds", "table", "warn"]


def note(text: str) -> None:
    """One line on stderr that is no warning: how something was understood."""
    print(printable(f"note: {' '.join(text.split())}"), file=sys.stderr)


def seconds(value: float) -> str:
    """A duration in words.

    >>> [seconds(v) for v in (0.25, 7, 75, 3720, float("inf"))]
    ['0.2 s', '7 s', '1 min 15 s', '1 h 02 min', 'unknown']
    """
    if not math.isfinite(value):
        return "unknown"
    if value < 0:
        return f"-{seconds(-value)}"
    if value < 0.95:  # from there on it rounds to 1
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = ()
) -> None:
    """Print a table; the columns whose indices are in `numeric` are aligned right."""
    view = Table(title=_text(title), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        view.add_column(_text(column), justify="right" if index in numeric else "left", overflow="fold")
    for row in rows:
        view.add_row(*map(_text, row))
    Console(highlight=False).print(view)


def _text(cell: object) -> Text:
    return Text(printable(str(cell)))  # Text, not str: in a str rich takes `[red]` for an instruction


def histogram(title: str, labels: Sequence[str], counts: Sequence[int], width: int = 40) -> None:
    """Print one bar a label, the longest `width` columns long, with its count and share."""
    total, most = max(sum(counts), 1), max(max(counts, default=0), 1)
    shown = [printable(label) for label in labels]
    label_width = max(map(cell_len, shown), default=0)
    print(printable(title))
    for label, count in zip(shown, counts, strict=True):
        bar = "█" * round(width * count / most) or ("▏" if count else "")
        padding = " " * (label_width - cell_len(label))
        print(f"  {padding}{label} {bar:<{width}} {count:>8,} {count / total:6.1%}")


class ProgressLine:
    """A live progress bar on a terminal; elsewhere one plain line every `interval` seconds.

    A context manager. `update(done, text)` may be called often: it draws at most ten times a second and costs
    microseconds otherwise. Nothing is drawn before `patience` seconds have passed. A total of 0 is one
    that is not known.
    """

    def __init__(self, title: str, total: int, interval: float = 10.0, patience: float = 0.0) -> None:
        self.title, self.total, self.interval = title, total, interval
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._next = time.monotonic() + patience
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = self._shown = ""  # plain lines

    def __enter__(self) -> "ProgressLine":
        return self

    def update(self, done: int, text: str = "", force: bool = False) -> None:
        """Show that `done` of `total` are finished, with `text` behind the bar."""
        now = time.monotonic()
        is_due = now >= self._next or force
        if self._live and is_due:
            self._next = now + 0.1
            self._draw(done, printable(text))
        elif not self._live:
            self._last = printable(f"{self.title} {self._count(done)} {text}".rstrip())
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
                console=Console(stderr=True, highlight=False),
                auto_refresh=False,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # else rich would print a file's lines on the terminal
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
        print(printable(text), flush=True)

    def _clear(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()
        if kind is None and self._shown and self._shown != self._last:
            self._print_last()  # a log that has begun shows the end, too
