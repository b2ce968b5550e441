"""The parts of a view: tables and charts, shown in a terminal, a notebook, a page, or as JSON.

    view = attention(model, tokenizer, "四川的省会是哪里？")
    view.probabilities        # the numbers, as an array
    view                      # in a notebook: its tables and heat maps
    print(in_terminal(view, "zh"))
    page([view], "zh")        # a page of HTML that needs no network

A view is a small frozen dataclass with the numbers that a function of minigpt.lens has computed. `parts(say)`
returns its tables and charts. `say` translates each text (words.py). Texts of users and tokens are escaped in
HTML.
"""

import dataclasses
import html
import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len

from minigpt.console.language import Language
from minigpt.console.terminal import table_text, wrapped
from minigpt.errors import printable
from minigpt.lens.words import Say, speaker

__all__ = [
    "NOTHING",
    "Bars",
    "Floats",
    "Heat",
    "Lines",
    "Part",
    "Table",
    "View",
    "in_terminal",
    "longest_bar",
    "page",
    "percent",
    "shown",
]

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
NOTHING = "∅"  # shown for an empty answer
_INVISIBLE = ("Cf", "Zs", "Zl", "Zp")  # Unicode categories of characters that cannot be seen
_SHADES = " ░▒▓█"
_MOST_MAPS = 2  # if a view has more heat maps than this, a terminal shows none of them
_SPARKS = "▁▂▃▄▅▆▇█"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:1.5em;color:#1a1a1a;background:#fff}"
    # the next two lines keep pictures and tables within the screen of a phone
    "svg{max-width:100%}figure{margin:0;overflow-wrap:anywhere}"
    "table{display:block;overflow-x:auto}"
    "table{border-collapse:collapse;margin:.3em 0 1.2em}caption{text-align:left;font-weight:600}"
    "td,th{border:1px solid #ccc;padding:.15em .5em;text-align:left;vertical-align:top}"
    "td.n,th.n{text-align:right}td.h{text-align:center;min-width:1.4em}th{white-space:nowrap}"
)


class Table(NamedTuple):
    """A table. The columns whose indices are in `numeric` are aligned right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    numeric: Sequence[int] = ()


class Heat(NamedTuple):
    """A heat map with R rows and C columns: R * C squares.

    `cells`: a text for each square, shown only if there is enough space; (): no texts.
    """

    title: str
    values: Floats
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[str]] = ()


class Bars(NamedTuple):
    """A bar chart: one bar for each label."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]


class Lines(NamedTuple):
    """A line chart. `series`: name of a curve -> (x values, y values)."""

    title: str
    x: str
    y: str
    series: dict[str, tuple[Sequence[float], Sequence[float]]]


Part: TypeAlias = Table | Heat | Bars | Lines


@dataclass(frozen=True)
class View:
    """The base class of all views: the result of a function of minigpt.lens, with its tables and charts."""

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of the view, in the language of `say`."""
        raise NotImplementedError

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}.

        The option `--along` of `minigpt look` shows such a row for each checkpoint.
        """
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as a dict that JSON can hold."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def _repr_html_(self) -> str:
        return fragment(self)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def percent(value: float) -> str:
    """Return a probability as short text, with more digits near 0 and 1.

    >>> [percent(value) for value in (1, 0.99987, 0.996, 0.87, 0.071, 0.0042, 0.00001, 0)]
    ['100%', '>99.9%', '99.6%', '87%', '7.1%', '0.42%', '<0.01%', '0%']
    """
    if value in (0, 1):
        return f"{value:.0%}"
    if value < 0.0001:
        return "<0.01%"
    if value >= 0.9995:
        return ">99.9%"
    digits = 1 if value >= 0.995 or 0.00995 <= value < 0.0995 else 0 if value >= 0.0995 else 2
    return f"{value:.{digits}%}"


def shown(text: str) -> str:
    r"""Make each character of a token's text visible: a space becomes ␣, a newline becomes ↵.

    >>> shown(" a\n\u200b")
    '␣a↵\\u200b'
    """
    seen = printable(text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥"))
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in _INVISIBLE else c for c in seen)


# -- the terminal ------------------------------------------------------------------------------------------


def in_terminal(view: View, language: Language = "en", width: int = 80) -> str:
    """Return a view as text of at most `width` columns, without colour."""
    say = speaker(language)
    parts = view.parts(say)
    maps = [part for part in parts if isinstance(part, Heat)]
    left_out = maps if len(maps) > _MOST_MAPS else []
    texts = [_as_text(part, say, width) for part in parts if not any(part is one for one in left_out)]
    if left_out:
        note = say("({count} heat maps: --plot FILE draws them)", count=len(left_out))
        texts.append(wrapped(note, width))
    return "\n".join(text for text in texts if text)


def _as_text(part: Part, say: Say, width: int) -> str:
    match part:
        case Table():
            return table_text(part.title, part.columns, part.rows, part.numeric, width)
        case Heat():
            return _heat_text(part, say, width)
        case Lines():
            return _lines_text(part, width)
    return ""  # bars are not drawn, because the view's table has their numbers


def _heat_text(heat: Heat, say: Say, width: int) -> str:
    """Draw a heat map as text. Each square is two characters wide, so each column label is cut to two."""
    left = max(map(cell_len, heat.rows), default=0)
    if left + 1 + 2 * len(heat.columns) > width:
        note = "({title}: too wide for {width} columns; --plot FILE draws it)"
        return wrapped(say(note, title=heat.title, width=width), width)
    highest = float(np.nanmax(heat.values, initial=0.0)) or 1.0
    lines = [
        wrapped(heat.title, width),
        " " * (left + 1) + "".join(_fitted(name, 2) for name in heat.columns),
    ]
    for name, row in zip(heat.rows, heat.values):
        steps = [0 if math.isnan(one) else math.ceil(one / highest * (len(_SHADES) - 1) - 0.5) for one in row]
        lines.append(f"{_fitted(name, left)} " + "".join(_SHADES[max(0, step)] * 2 for step in steps))
    return "\n".join(line.rstrip() for line in lines)


def _fitted(text: str, width: int) -> str:
    while cell_len(text) > width:
        text = text[:-1]
    return text + " " * (width - cell_len(text))


def _lines_text(lines: Lines, width: int) -> str:
    left = min(width // 3, max(map(cell_len, lines.series), default=0))
    drawn = [wrapped(lines.title, width)]
    every = [value for _, values in lines.series.values() for value in values if math.isfinite(value)]
    # all curves have the same scale, so that they can be compared
    low, high = min(every, default=0), max(every, default=0)
    for name, (_, values) in lines.series.items():
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            continue
        if len(finite) == 1:  # a single value is no curve, so print the number
            drawn.append(f"{_fitted(name, left)} {_number(finite[0])}")
            continue
        ends = f" {_number(finite[0])} → {_number(finite[-1])}"
        count = max(1, min(len(finite), width - left - 2 - len(ends)))
        some = [finite[i * (len(finite) - 1) // max(1, count - 1)] for i in range(count)]
        steps = [round((value - low) / ((high - low) or 1) * (len(_SPARKS) - 1)) for value in some]
        drawn.append(f"{_fitted(name, left)} {''.join(_SPARKS[step] for step in steps)}{ends}")
    return "\n".join(drawn)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# -- HTML --------------------------------------------------------------------------------------------------


def fragment(view: View, language: Language = "en") -> str:
    """Return a view as HTML, for a notebook or a page. All texts are escaped."""
    parts = view.parts(speaker(language))
    longest = longest_bar(parts)
    return "\n".join(_as_html(part, longest) for part in parts)


def longest_bar(parts: Sequence[Part]) -> float | None:
    """Return the length of the longest bar in bar charts that share one scale.

    Returns None if each chart has its own scale: there are fewer than two bar charts, or their labels differ.
    """
    bars = [part for part in parts if isinstance(part, Bars)]
    if len(bars) < 2 or any([*one.labels] != [*bars[0].labels] for one in bars):
        return None
    return max((float(value) for one in bars for value in one.values), default=0.0) or None


def page(views: Sequence[View], language: Language = "en", title: str = "minigpt look") -> str:
    """Return views as one HTML page, which has no scripts and needs no network."""
    body = "\n".join(fragment(view, language) for view in views)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _escaped(text: object) -> str:
    return html.escape(printable(str(text)))


def _as_html(part: Part, longest: float | None) -> str:
    out = io.StringIO()
    if isinstance(part, Lines):
        return _lines_html(part)
    out.write(f"<table><caption>{_escaped(part.title)}</caption>")
    if isinstance(part, Bars):
        top = longest or max(part.values, default=0) or 1
        for label, value in zip(part.labels, part.values):
            width = f"calc(min(20em,30vw)*{max(0.0, value / top):.4f})"
            bar = f'<div style="background:#4477aa;height:1em;width:{width}"></div>'
            out.write(f"<tr><td>{_escaped(label)}</td><td>{bar}</td><td class=n>{value:.4g}</td></tr>")
        return out.getvalue() + "</table>"
    numeric = part.numeric if isinstance(part, Table) else ()
    heads = part.columns if isinstance(part, Table) else ["", *part.columns]
    if any(heads):
        cells = "".join(_cell("th", "n" * (i in numeric), one) for i, one in enumerate(heads))
        out.write(f"<tr>{cells}</tr>")
    if isinstance(part, Table):
        for row in part.rows:
            cells = "".join(_cell("td", "n" * (i in numeric), one) for i, one in enumerate(row))
            out.write(f"<tr>{cells}</tr>")
        return out.getvalue() + "</table>"
    highest = float(np.nanmax(part.values, initial=0.0)) or 1.0
    for number, (name, values) in enumerate(zip(part.rows, part.values)):
        cells = ""
        for column, value in enumerate(values):
            share = 0.0 if math.isnan(value) else max(0.0, float(value) / highest)
            text = part.cells[number][column] if part.cells else ""
            style = f"background:rgba(68,119,170,{share:.3f})"
            cells += f'<td class=h style="{style}" title="{value:.4g}">{_escaped(text)}</td>'
        out.write(f"<tr><th>{_escaped(name)}</th>{cells}</tr>")
    return out.getvalue() + "</table>"


def _cell(tag: str, kind: str, text: object) -> str:
    return f"<{tag} class={kind or 't'}>{_escaped(text)}</{tag}>"


_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#666666")


def _lines_html(lines: Lines) -> str:
    points = [(x, y) for xs, ys in lines.series.values() for x, y in zip(xs, ys) if math.isfinite(y)]
    if not points:
        return f"<p>{_escaped(lines.title)}</p>"
    (left, right), (low, high) = [(min(axis), max(axis)) for axis in zip(*points)]
    scale_x, scale_y = 560 / ((right - left) or 1), 200 / ((high - low) or 1)
    drawn, names = "", ""
    for number, (name, (xs, ys)) in enumerate(lines.series.items()):
        at = [
            (20 + (x - left) * scale_x, 220 - (y - low) * scale_y) for x, y in zip(xs, ys) if math.isfinite(y)
        ]
        colour = _COLOURS[number % len(_COLOURS)]
        drawn += f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
        drawn += " ".join(f"{x:.1f},{y:.1f}" for x, y in at) + '"/>'
        names += f'<span style="color:{colour}">■</span> {_escaped(name)} '
    ends = f"{_escaped(lines.x)}: {_number(left)} – {_number(right)}; "
    ends += f"{_escaped(lines.y)}: {_number(low)} – {_number(high)}"
    svg = f'<svg viewBox="0 0 600 240" width="600" role="img">{drawn}</svg>'
    return (
        f"<figure><figcaption><b>{_escaped(lines.title)}</b><br>{names}<br>{ends}</figcaption>{svg}</figure>"
    )
