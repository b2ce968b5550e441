"""Writes the report of an evaluation as HTML and Markdown: tables, pictures, and examples of answers.

    write_report(Path("report"), "output/best", results, profiles)

The page is one file without scripts. The Markdown file shows the same; its pictures are SVG files in the same
folder. Texts of models and tasks are escaped.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minigpt.console.language import Language
from minigpt.errors import printable
from minigpt.evaluation.model_profile import Calibration, Profile
from minigpt.evaluation.task_results import Answered, TaskResult
from minigpt.evaluation.words import Say, speaker
from minigpt.storage.files import atomic_write

__all__ = ["cases", "in_markdown", "markdown_of", "profile_tables", "results_table", "write_report"]

_ENGLISH = speaker()
_CASES = 8
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "h1,h2{overflow-wrap:anywhere}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"  # wide tables can scroll
    "td,th{border:1px solid #ccc;padding:.3em .6em;"
    "text-align:left;vertical-align:top}th{background:#f4f4f4}svg{max-width:100%}pre{white-space:pre-wrap}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}th{background:#262626}"
    "td,th{border-color:#444}svg{background:#fff}}"
)
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def cases(result: TaskResult) -> tuple[list[Answered], list[Answered]]:
    """Return two lists: wrong answers that the model was sure of, and right answers that it was unsure of."""

    def sure(one: Answered) -> float:
        if one.probabilities:
            return max(one.probabilities)
        return sum(one.logprobs) if one.logprobs else 0.0

    if result.task.form == "perplexity":
        return [], []
    wrong = sorted((one for one in result.answered if not one.right), key=sure, reverse=bool(
        result.answered[0].probabilities))  # fmt: skip
    right = sorted((one for one in result.answered if one.right), key=sure)
    return wrong[:_CASES], right[:_CASES]


# -- tables ------------------------------------------------------------------------------------------------


def _numbers(results: Sequence[TaskResult], say: Say) -> Table:
    rows = []
    for result in results:
        for name, metric in result.metrics.items():
            first = name == result.main
            rows.append([
                result.task.name if first else "", name, metric.shown(say), result.guessing if first else "",
                f"{len(result.answered):,}" if first else "", str(result.shots) if first else "",
            ])  # fmt: skip
    columns = ("task", "metric", "value (95 % interval)", "guessing", "questions", "shots")
    return [*map(say, columns)], rows


def results_table(results: Sequence[TaskResult]) -> str:
    """Return a table in Markdown with a row for each metric of each task; it holds no questions."""
    return _table_in_markdown(_numbers(results, _ENGLISH))


def _efficiency(results: Sequence[TaskResult], say: Say) -> Table:
    rows = [
        [
            one.task.name, f"{one.seconds:.1f}", f"{one.tokens:,}", f"{one.tokens_read:,}",
            f"{one.tokens_written:,}", f"{one.peak_mib:,.0f}", f"{one.n_cut:,}",
            f"{one.n_in_pieces:,}", f"{one.task.skipped:,}",
        ]
        for one in results
    ]  # fmt: skip
    columns = (
        *("task", "seconds", "tokens of prompts", "tokens read", "tokens written", "MiB"),
        *("prompts cut", "choices in pieces", "skipped"),
    )
    return [*map(say, columns)], rows


def profile_tables(found: Profile, say: Say = _ENGLISH) -> list[tuple[str, Table]]:
    """Return a pair (title, table) for each part of a profile that was measured.

    The parts are calibration, robustness, positions and contamination.
    """
    tables: list[tuple[str, Table]] = []
    columns: tuple[str, ...]
    if c := found.calibration:
        columns = ("expected calibration error", "95 % interval", "temperature", "error with it", "fitted on")
        interval = say("{low} to {high}", low=f"{c.low:.4f}", high=f"{c.high:.4f}")
        numbers = [f"{c.error:.4f}", interval, f"{c.temperature:.3g}", f"{c.error_after:.4f}"]
        rows = [[*numbers, say(c.fitted_on)]]
        tables.append((say("Calibration"), ([*map(say, columns)], rows)))
    if found.robustness:
        rows = [
            [
                say(name),
                f"{d.value:+.4f}",
                say("{low} to {high}", low=f"{d.low:+.4f}", high=f"{d.high:+.4f}"),
                f"{d.p:.2g}",
                f"{d.count:,}",
            ]
            for name, d in sorted(found.robustness.items(), key=lambda item: item[1].value)
        ]
        title = say("Robustness: what a change of the question costs")
        names = [say("change"), say("difference"), say("95 % interval"), "p", say("questions")]
        tables.append((title, (names, rows)))
    if p := found.positions:
        rows = [
            [letter, f"{p.chosen[letter]:.1%}", f"{p.right[letter]:.1%}" if letter in p.right else ""]
            for letter in p.chosen
        ]
        title = say(
            "Position: the same choice in every order for {share} of the questions",
            share=f"{p.consistent:.1%}",
        )
        columns = ("letter", "chosen", "accuracy where it is right")
        tables.append((title, ([*map(say, columns)], rows)))
    if t := found.contamination:
        columns = ("questions looked for", "all of it in the training data", "half of it or more")
        rows = [[f"{t.count:,}", f"{len(t.exact):,}", f"{len(t.near):,}"]]
        tables.append((say("Contamination"), ([*map(say, columns)], rows)))
    return tables


def _case_table(some: Sequence[Answered], say: Say) -> Table:
    rows = []
    for one in some:
        example = one.example
        right = example.choices[example.answer] if example.choices else (example.references or ("",))[0]
        sure = f"{max(one.probabilities):.0%}" if one.probabilities else ""
        rows.append([str(example.line), _short(example.question), _short(right), _short(one.given), sure])
    return [*map(say, ("line", "question", "right", "given", "sure"))], rows


def _short(text: str, limit: int = 160) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= limit else f"{plain[: limit - 1]}…"


# -- pictures ----------------------------------------------------------------------------------------------


def _bars(results: Sequence[TaskResult], say: Say) -> str:
    """Draw a bar for the first metric of each task, with its interval and the score of random guessing."""
    some = [
        one for one in results if one.metrics[one.main].higher_is_better and one.metrics[one.main].value <= 1
    ]
    if not some:
        return ""
    parts, width = [], 360
    for row, one in enumerate(some):
        y, metric = 12 + 28 * row, one.metrics[one.main]
        low, high = (v if np.isfinite(v) else metric.value for v in (metric.low, metric.high))
        guess = one.guessing
        parts.append(
            f'<text x="190" y="{y + 12}" text-anchor="end">{_html(_short(one.task.name, 24))}</text>'
            f'<rect x="200" y="{y}" width="{width * metric.value:.1f}" height="16" fill="#4c78a8"/>'
            f'<path d="M{200 + width * low:.1f} {y + 8}H{200 + width * high:.1f}" stroke="#111"/>'
            + (f'<path d="M{200 + width * float(guess):.1f} {y - 3}v22" stroke="#e45756" stroke-width="2"/>'
               if guess else "")
            + f'<text x="{205 + width}" y="{y + 12}">{metric.value:.3f}</text>'
        )  # fmt: skip
    y = 24 + 28 * len(some)
    legend = say("black: 95 % interval; red: what a guess gets right")
    parts.append(f'<text x="200" y="{y}" fill="#666">{legend}</text>')
    return _svg(640, y + 10, "".join(parts))


def _reliability(found: Calibration, say: Say) -> str:
    """Draw a dot for each bin of the calibration: x is the mean probability, y the share of right answers.

    A larger dot stands for more questions.
    """
    most = max(count for _, _, count in found.bins)
    dots = "".join(
        f'<circle cx="{40 + 240 * sure:.1f}" cy="{250 - 240 * right:.1f}" '
        f'r="{2 + 8 * (count / most) ** 0.5:.1f}" fill="#4c78a8" fill-opacity=".7"/>'
        for sure, right, count in found.bins
    )
    return _svg(
        300, 290,
        '<path d="M40 10V250H280" fill="none" stroke="#888"/><path d="M40 250L280 10" stroke="#bbb" '
        f'stroke-dasharray="4"/>{dots}<text x="160" y="280" text-anchor="middle">{say("how sure")}'
        '</text><text x="14" y="130" transform="rotate(-90 14 130)" text-anchor="middle">'
        f'{say("how often right")}</text><text x="40" y="264" text-anchor="middle">0</text>'
        '<text x="280" y="264" text-anchor="middle">1</text><text x="32" y="14" text-anchor="end">1</text>',
    )  # fmt: skip


def _svg(width: int, height: int, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12">'
        # The white background keeps the black text readable on a dark page.
        f'<rect width="100%" height="100%" fill="#fff"/>{content}</svg>'
    )


# -- index.html and README.md -----------------------------------------------------------------------------


def _sections(
    results: Sequence[TaskResult], profiles: Mapping[str, Profile], say: Say
) -> list[tuple[str, str, list[Table], tuple[str, str]]]:
    """Return the sections of the report in order.

    A section is (level of the heading, title, tables, (name of the picture, SVG)).
    """
    found: list[tuple[str, str, list[Table], tuple[str, str]]] = [
        ("2", say("Results"), [_numbers(results, say)], ("results", _bars(results, say)))
    ]
    for number, result in enumerate(results, 1):
        own = profiles.get(result.task.name)
        worst, surprising = cases(result)
        if own is None and not worst and not surprising:
            continue
        found.append(("2", result.task.name, [], ("", "")))
        for title, one in profile_tables(own, say) if own else []:
            picture = ("", "")
            if title == say("Calibration") and own is not None and own.calibration is not None:
                picture = (f"reliability-{number}", _reliability(own.calibration, say))
            found.append(("3", title, [one], picture))
        for title, some in (
            ("The worst cases: wrong, and sure of it", worst),
            ("The most surprising cases: right against the odds", surprising),
        ):
            if some:
                found.append(("3", say(title), [_case_table(some, say)], ("", "")))
    found.append(("2", say("Efficiency"), [_efficiency(results, say)], ("", "")))
    return found


def _html(text: str) -> str:
    return html.escape(printable(text))


def in_markdown(text: str) -> str:
    """Escape a text for Markdown, so that it cannot become HTML, a link, code, or the end of a table cell."""
    return re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(printable(text), quote=False))


def _table_in_markdown(one: Table) -> str:
    columns, rows = one
    lines = [
        " | ".join(columns),
        " | ".join("---" for _ in columns),
        *(" | ".join(map(in_markdown, row)) for row in rows),
    ]
    return "\n".join(f"| {line} |" for line in lines)


def markdown_of(
    model: str, results: Sequence[TaskResult], profiles: Mapping[str, Profile], say: Say = _ENGLISH
) -> str:
    """Return the report in Markdown, with links to the pictures of `write_report`."""
    parts = [f"# {say('Evaluation of {model}', model=in_markdown(model))}"]
    for level, title, tables, (name, svg) in _sections(results, profiles, say):
        parts.append(f"{'#' * int(level)} {in_markdown(title)}")
        parts += [_table_in_markdown(one) for one in tables]
        if svg:
            parts.append(f"![{title}]({name}.svg)")
    return "\n\n".join(parts) + "\n"


def _page(
    model: str, results: Sequence[TaskResult], profiles: Mapping[str, Profile], language: Language
) -> str:
    say = speaker(language)
    heading = say("Evaluation of {model}", model=_html(model))
    parts = [f"<h1>{heading}</h1>"]
    for level, title, tables, (_, svg) in _sections(results, profiles, say):
        parts.append(f"<h{level}>{_html(title)}</h{level}>")
        for columns, rows in tables:
            head = "".join(f"<th>{html.escape(one)}</th>" for one in columns)
            body = "".join(f"<tr>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>" for row in rows)
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        parts.append(svg)
    return (
        f'<!doctype html><html lang="{language}"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{heading}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(parts)}</body></html>\n"
    )


def write_report(
    folder: Path,
    model: str,
    results: Sequence[TaskResult],
    profiles: Mapping[str, Profile] | None = None,
    language: Language = "en",
) -> list[Path]:
    """Write index.html, README.md and the pictures. Returns the paths of these files.

    Args:
        model: the model's name, for the title.
        profiles: a task's name -> its profile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own, say = profiles or {}, speaker(language)
    contents = {
        "index.html": _page(model, results, own, language),
        "README.md": markdown_of(model, results, own, say),
    }
    contents |= {f"{name}.svg": svg for _, _, _, (name, svg) in _sections(results, own, say) if svg}
    for name, text in contents.items():
        atomic_write(folder / name, text)
    return [folder / name for name in contents]
