"""Writes a view as a picture (PNG, SVG, PDF) or as a page of HTML.

A picture shows the charts of the views; if there are no charts, it shows the tables. A page shows both, and
needs no matplotlib.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len

from minigpt.console.fonts import picture_bytes, picture_kind
from minigpt.console.language import Language
from minigpt.errors import InputError, printable
from minigpt.lens.results import Bars, Heat, Lines, Part, Table, View, longest_bar, page
from minigpt.lens.words import speaker
from minigpt.storage.files import atomic_write

__all__ = ["check_picture", "write_picture"]

_MOST = 144  # largest number of charts in a picture
_LABELS = 48  # largest number of labels on an axis; if there are more, only every n-th label is drawn
_ROWS = 40  # largest number of rows of a table in a picture


def check_picture(path: Path, flag: str = "--plot") -> None:
    """Raise InputError if a picture cannot be written to `path`. Call this before a long computation."""
    if path.suffix.lower() not in (".html", ".htm"):
        picture_kind(path, flag)
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder: give a file, such as {path / 'look.png'}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: the folder {path.parent} does not exist")


def write_picture(views: Sequence[View], path: Path, language: Language = "en") -> None:
    """Write views to a file. The suffix decides the format: .html, .png, .svg, ...

    Raises:
        InputError: if matplotlib is missing (HTML does not need it), for an unknown suffix, or if the file
            cannot be written.
    """
    check_picture(path)
    if path.suffix.lower() in (".html", ".htm"):
        atomic_write(path, page(views, language, title=path.stem))
        return
    every = [part for view in views for part in view.parts(speaker(language))]
    count = len(_chosen(every))
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (min(40.0, max(8.0, 5.0 * columns)), min(40.0, max(4.0, 4.2 * rows)))
    # a single heat map: make the picture large enough for its labels
    if count == 1 and isinstance(only := _chosen(every)[0], Heat):
        size = (min(16.0, max(8.0, 0.3 * len(only.columns))), min(13.0, max(4.0, 0.25 * len(only.rows))))

    def draw(figure: Any, has_chinese: bool) -> None:
        say = speaker(language if has_chinese else "en")
        charts = _chosen([part for view in views for part in view.parts(say)])
        longest = longest_bar(charts)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, chart in zip(grid.flat, charts):
            _draw(axes, chart, longest)
        if _same_labels(charts):
            for number, axes in enumerate(grid.flat[: len(charts)]):
                if number % columns:
                    axes.set_yticks([])
                if number + columns < len(charts):
                    axes.set_xticks([])
        for axes in grid.flat[len(charts) :]:
            axes.axis("off")

    lacking = "the labels are English, and Chinese tokens are empty boxes"
    atomic_write(path, picture_bytes(draw, picture_kind(path), size, lacking))


def _chosen(parts: Sequence[Part]) -> list[Part]:
    charts: list[Part] = [part for part in parts if not isinstance(part, Table)]
    return [*(charts or parts)][:_MOST]


def _same_labels(charts: Sequence[Part]) -> bool:
    """Return True if all charts are heat maps with equal labels.

    If True, only the charts at the left of the picture show row labels, and only the charts at the bottom
    show column labels.
    """
    first = charts[0]
    return isinstance(first, Heat) and all(
        isinstance(one, Heat) and (one.rows, one.columns) == (first.rows, first.columns) for one in charts
    )


def _plain(text: object) -> str:
    return printable(str(text)).replace("$", r"\$")  # in matplotlib, a dollar sign would start a formula


def _draw(axes: Any, part: Part, longest: float | None) -> None:
    from matplotlib.colors import PowerNorm

    axes.set_title(_plain(part.title), fontsize=10)
    match part:
        case Heat():
            # Colours show the square root of a value. In a long text most attention shares are small, and
            # would otherwise look white.
            top = float(np.nanmax(part.values, initial=0.0)) or 1.0
            image = axes.imshow(part.values, cmap="Blues", aspect="auto", norm=PowerNorm(0.5, 0, top))
            axes.figure.colorbar(image, ax=axes, fraction=0.04)
            _ticks(axes.set_xticks, part.columns)
            # From 20 columns on, a column has space for two Latin letters or one Chinese character. Longer
            # labels are turned by 90 degrees.
            if len(part.columns) >= 20:
                for label in axes.get_xticklabels():
                    label.set_rotation(90 if cell_len(label.get_text()) > 2 else 0)
            _ticks(axes.set_yticks, part.rows)
            if part.cells and part.values.size <= 400:
                middle = float(np.nanmax(part.values, initial=0.0)) / 2
                for (row, column), value in np.ndenumerate(part.values):
                    colour = "white" if value > middle else "black"
                    text = _plain(part.cells[row][column])
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        case Bars():
            places = range(len(part.values))
            axes.barh(places, part.values, color="#4477aa")
            if longest is not None:
                axes.set_xlim(0, longest * 1.05)
            axes.invert_yaxis()
            _ticks(axes.set_yticks, part.labels)
        case Lines():
            for name, (xs, ys) in part.series.items():
                axes.plot(xs, ys, label=_plain(name), marker="." if len(xs) < 30 else None)
            axes.set(xlabel=part.x, ylabel=part.y)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        case Table():
            axes.axis("off")
            rows = [[_plain(cell)[:60] for cell in row] for row in part.rows[:_ROWS]]
            if rows:
                axes.table(rows, colLabels=[_plain(name) for name in part.columns], loc="upper center")


def _ticks(put: Any, labels: Sequence[str]) -> None:
    every = max(1, math.ceil(len(labels) / _LABELS))
    places = range(0, len(labels), every)
    put(places, [_plain(labels[place])[:24] for place in places], fontsize=8)
