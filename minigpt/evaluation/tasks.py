"""Tasks: files and folders of questions, read as examples.

    task = read_tasks([Path("cmmlu")])[0]           # a folder with dev and test
    task.examples[0].prompt, task.dev["anatomy"]    # a subject's examples for shots

The names of a record's fields decide the task's form (task_shapes.py). Or a TOML file describes the task:

    form = "multiple_choice"            # or cloze, generation, classification, perplexity
    test = "physics.jsonl"              # the questions, in the folder of the TOML file
    dev = "physics_dev.jsonl"           # the examples for shots
    template = "{stem}\\n{choices}\\nAnswer:"      # {stem}: a field; {choices}: A. ..., B. ...
    choices = ["{a}", "{b}", "{c}"]     # or the name of a field that holds a list
    answer = "key"                      # the field with the right answer
    score = "letter"                    # or "text"
    metrics = ["number"]                # only for generation
    stop = ["\\n"]                      # texts that end a generated answer
"""

import dataclasses
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from minigpt.console.terminal import note, warn
from minigpt.data.conversation import Conversation
from minigpt.data.field_names import FIELDS, FieldNames, is_head
from minigpt.data.file_formats import open_data
from minigpt.data.json_values import BadLine, Record
from minigpt.data.labelled import LABEL_FIELDS, TEXT_FIELDS, LabelledOptions, read_labelled
from minigpt.data.reader import ReadReport
from minigpt.data.records import meaning_of
from minigpt.errors import InputError, unknown_name, whole_number
from minigpt.evaluation.task_shapes import FORMS, Example, Form, Style, read_record
from minigpt.storage.json_files import read_toml, read_utf8, reading
from minigpt.storage.regular_files import resolved

__all__ = ["Task", "read_tasks", "task_of_records"]

# _TEST and _DEV hold names of files and folders.
_TEST = ("test", "val", "validation", "valid", "dev")  # measure on the first of these that exists
_DEV = ("dev", "train", "trial", "val", "validation")  # take shots from the first of these that exists
_ENDINGS = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".xlsx", ".gz"}
_COLUMNS = {  # if the first row of a table has at least two of these names, it holds the column names
    *("a", "b", "c", "d", "question", "answer", "answerkey", "ctx", "endings", "goal", "sol1", "sol2"),
    *("premise", "choice0", "choice1", "choice2", "query", "gold", "choices", "context", "continuation"),
    *TEXT_FIELDS, *LABEL_FIELDS, *FIELDS["question"], *FIELDS["answer"],
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task: the examples to measure, and the examples for shots."""

    name: str
    form: Form
    examples: list[Example] = field(repr=False)
    # Subject -> its examples for shots.
    dev: Mapping[str, list[Example]] = field(default_factory=dict, repr=False)
    skipped: int = 0  # number of bad records, which were left out
    files: tuple[Path, ...] = ()  # files of the examples
    is_own_dev: bool = False  # True: the file for shots is the measured file itself

    @property
    def style(self) -> Style:
        """The style of all examples."""
        return self.examples[0].style

    def limited(self, limit: int) -> "Task":
        """Return the task with at most `limit` examples, spread evenly over all; 0: all."""
        n = len(self.examples)
        if not limit or limit >= n:
            return self
        return replace(self, examples=[self.examples[i * n // limit] for i in range(limit)])


@dataclass(frozen=True)
class _Source:
    """A task whose files were found but not yet read."""

    name: str
    parts: list[tuple[str, Path, Path | None]]  # (subject, file to measure on, file for shots)
    style: Style = field(default_factory=Style)
    form: Form | None = None


def read_tasks(
    paths: Sequence[Path],
    *,
    dev: Path | None = None,
    style: Style | None = None,
    strict: bool = False,
    encoding: str = "",
) -> list[Task]:
    """Read tasks from files, folders and TOML files.

    Args:
        dev: a file or folder to take shots from, instead of the task's own dev part.
        style: changes to the tasks' own styles. Fields with their default value change nothing.
        strict: raise an error at the first bad record, instead of skipping it.
        encoding: encoding of the files; "": detect it.

    Raises:
        InputError: if a file cannot be read, holds no example, or holds examples of several forms.
    """
    tasks = []
    for path in paths:
        for source in _sources(path):
            changed = _merged(source.style, style or Style())
            tasks.append(_read(replace(source, style=changed), dev, strict, encoding))
    twice = [task.name for task in tasks if [one.name for one in tasks].count(task.name) > 1]
    if twice:
        tasks = [replace(t, name=str(t.files[0]) if t.name in twice else t.name) for t in tasks]
    return tasks


def task_of_records(records: Sequence[Mapping[str, Any]], style: Style = Style(), name: str = "task") -> Task:  # noqa: B008
    """Return a task made of records. Raises InputError at the first bad record."""
    examples: list[Example] = []
    for number, record in enumerate(records, 1):
        try:
            examples += read_record(record, number, style)
        except BadLine as bad:
            raise InputError(f"record {number}: {bad}") from None
    if not examples:
        raise InputError("there is no record: a task needs at least one")
    if {one.form for one in examples} == {"classification"}:
        examples, _ = _with_labels(name, examples, {})
    return Task(name, examples[0].form, examples)


def _merged(base: Style, over: Style) -> Style:
    """Return a copy of `base`, updated by all fields of `over` that differ from their default value."""
    changed = {f.name: getattr(over, f.name) for f in dataclasses.fields(Style)
               if getattr(over, f.name) != f.default}  # fmt: skip
    return replace(base, **changed)


# -- files -------------------------------------------------------------------------------------------------


def _sources(path: Path) -> list[_Source]:
    if path.suffix == ".toml":
        return [_from_toml(path)]
    if not path.is_dir():
        stem, folder = _stem(path), resolved(path).parent.name
        name = folder if stem == "test" else f"{folder}/{stem}" if stem in _TEST else stem
        return [_Source(name, [("", path, _sibling(path))])]
    name = resolved(path).name
    for test in _TEST:
        if (path / test).is_dir():
            dev = next((path / one for one in _DEV if one != test and (path / one).is_dir()), None)
            shots = {} if dev is None else {_subject(file): file for file in _files(dev)}
            subjects = {_subject(file): file for file in _files(path / test)}
            if test == "test" and (path / "val").is_dir() and not any(map(_has_answers, subjects.values())):
                continue  # "test" without answers, as in C-Eval: measure on "val" instead
            if not subjects:
                raise InputError(f"{path / test} holds no file of questions")
            return [_Source(name, [(one, file, shots.get(one)) for one, file in subjects.items()])]
    files = _files(path)
    named = {_stem(file): file for file in files}
    for test in _TEST:
        if test in named:
            return [_Source(name, [("", named[test], _sibling(named[test]))])]
    if not files:
        raise InputError(f"{path} holds no task: give it test/ and dev/, or files of questions")
    return [one for file in files for one in _sources(file)]


def _has_answers(path: Path) -> bool:
    """Return True if the first line of a file contains a word for an answer, such as "answer" or "label"."""
    with reading(path) as file:
        first = file.read(1 << 16).split(b"\n")[0].lower()
    return any(name in first for name in (b"answer", b"label", b"gold", b"target"))


def _files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir()
        if file.suffix.lower() in _ENDINGS and file.name not in ("SOURCE.txt", "class.txt", "README.txt")
    )  # fmt: skip


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").split(".")[0]


def _subject(path: Path) -> str:
    """Return the subject of a file, such as "astronomy" for astronomy_test.csv and astronomy_dev.csv."""
    stem = _stem(path)
    return next(
        (stem.removesuffix(f"_{part}") for part in {*_TEST, *_DEV} if stem.endswith(f"_{part}")), stem
    )


def _sibling(path: Path) -> Path | None:
    """Return the file for shots in the same folder as a file such as test.jsonl, or None if there is none."""
    if (part := _stem(path)) not in _TEST:
        return None
    beside = {_stem(file): file for file in _files(path.parent)} if path.parent.is_dir() else {}
    return next((beside[one] for one in _DEV if one in beside and one != part), None)


def _from_toml(path: Path) -> _Source:
    try:
        content = read_toml(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist (looked for it from {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no TOML file: {error}") from None
    own = {"form": str, "test": str, "dev": str, "name": str}
    kinds = get_type_hints(Style)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in own and key not in kinds:
            raise InputError(f"{path}: {unknown_name('key', key, [*own, *kinds])}")
        wanted = own.get(key) or kinds[key]
        is_list = wanted == tuple[str, ...]
        if is_list and isinstance(value, str):
            value = [value]
        good = isinstance(value, list) and all(isinstance(one, str) for one in value) if is_list else (
            isinstance(value, get_args(wanted) or wanted) and not isinstance(value, bool)
        )  # fmt: skip
        if not good:
            what = (
                "a text or a list of texts" if is_list else "a number" if wanted == int | None else "a text"
            )
            raise InputError(f"{path}: {key} must be {what}: got {value!r}")
        values[key] = tuple(value) if is_list else value
    if values.get("form") not in (None, *FORMS):
        raise InputError(f"{path}: form must be one of {', '.join(FORMS)}: got {values['form']!r}")
    if values.get("max_new_tokens", 1) < 1:
        raise InputError(f"{path}: max_new_tokens must be at least 1: got {values['max_new_tokens']}")
    if values.get("score") not in (None, "letter", "text"):
        raise InputError(f"{path}: score must be letter or text: got {values['score']!r}")
    if "" in values.get("stop", ()):
        raise InputError(f"{path}: stop holds an empty text: an answer would end before it begins")
    if "choices" in values and values.get("form") in ("cloze", "generation", "perplexity"):
        raise InputError(f"{path}: choices do not fit form = {values['form']!r}: leave one of them out")
    if "test" not in values:
        raise InputError(f'{path} names no file: test = "questions.jsonl"')
    if ("choices" in values or values.get("form") in ("cloze", "generation")) and not values.get("template"):
        raise InputError(f'{path} needs a template, such as template = "{{question}}\\nAnswer:"')
    test = path.parent / values["test"]
    dev = path.parent / values["dev"] if "dev" in values else _sibling(test)
    style = Style(**{key: value for key, value in values.items() if key in kinds})
    return _Source(values.get("name") or path.stem, [("", test, dev)], style, values.get("form"))


# -- examples ----------------------------------------------------------------------------------------------


def _read(source: _Source, dev: Path | None, strict: bool, encoding: str) -> Task:
    examples: list[Example] = []
    shots: dict[str, list[Example]] = {}
    skipped = 0
    others = {_subject(file): file for file in _files(dev)} if dev is not None and dev.is_dir() else {}
    for subject, path, beside in source.parts:
        found, n_bad = _examples(path, source, strict, encoding)
        examples += [replace(one, subject=subject) for one in found]
        skipped += n_bad
        own = others.get(subject) if dev is not None and dev.is_dir() else dev or beside
        if own is not None:
            same = resolved(own) == resolved(path)
            shots[subject] = found if same else _examples(own, source, strict, encoding)[0]
    forms = sorted({one.form for one in examples})
    if len(forms) > 1:
        raise InputError(f"{source.name} mixes forms: {', '.join(forms)}; one task has one form")
    measured = {one.style.metrics for one in examples}
    if len(measured) > 1 and forms == ["generation"]:
        raise InputError(
            f"{source.name} mixes answers with a number behind #### and others, which have other metrics; "
            "make two tasks of them"
        )
    others_forms = {one.form for some in shots.values() for one in some} - {*forms}
    if others_forms:
        raise InputError(
            f"{source.name}: the dev part is of the form {', '.join(sorted(others_forms))}, the task of the "
            f"form {forms[0]}; name another one with --dev"
        )
    if forms == ["classification"]:
        examples, shots = _with_labels(source.name, examples, shots)
    files = tuple(path for _, path, _ in source.parts)
    is_own = dev is not None and dev.is_file() and resolved(dev) in {resolved(file) for file in files}
    return Task(source.name, examples[0].form, examples, shots, skipped, files, is_own)


def _with_labels(
    name: str, examples: list[Example], shots: dict[str, list[Example]]
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Give each text all labels of the data as choices. If a TOML file names the labels, change nothing."""
    every = [*examples, *(one for some in shots.values() for one in some)]
    if all(one.style.choices for one in every):
        return examples, shots
    labels = sorted({one.choices[0] for one in every}, key=lambda text: (len(text), text))
    if len(labels) < 2:
        raise InputError(f"{name} has one label, {labels[0]!r}: there is nothing to tell apart")
    if len(labels) > 1000:
        raise InputError(f"{name} has {len(labels):,} labels; is the label a text?")

    def labelled(one: Example) -> Example:
        return replace(one, choices=tuple(labels), letters=(), answer=labels.index(one.choices[0]))

    return [*map(labelled, examples)], {key: [*map(labelled, some)] for key, some in shots.items()}


def _examples(path: Path, source: _Source, strict: bool, encoding: str) -> tuple[list[Example], int]:
    """Read a file, and warn about bad records. Return the examples, and the number of bad records."""
    report = ReadReport(path)
    found: list[Example] = []
    for line, value in _records(path, report, encoding):
        report.lines += 1
        try:
            found += read_record(value, line, source.style, source.form)
        except BadLine as bad:
            if strict:
                raise InputError(f"{path}:{line}: {bad}") from None
            report.skipped.append((line, bad.reason))
            report.details.setdefault(bad.reason, bad.detail)
    if not found:
        reasons = [
            f"{reason}{f' ({report.details[reason]})' if report.details[reason] else ''}, line {lines[0]}"
            for reason, lines in list(report.by_reason().items())[:3]
        ]
        raise InputError(f"{path} holds no example of a task: {'; '.join(reasons) or 'it has no record'}")
    for sentence in report.notes:
        note(sentence)
    for reason, lines in report.by_reason().items():
        why = f"{reason}: {report.details[reason]}" if report.details[reason] else reason
        places = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        warn(f"{path}: skipped {len(lines):,}: {why} (line {places})")
    twice = sum(len(set(one.choices)) < len(one.choices) for one in found if one.form == "multiple_choice")
    if twice:
        warn(f"{path}: {twice:,} questions have the same wrong choice twice")
    return found, len(report.skipped)


def _records(path: Path, report: ReadReport, encoding: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of each record. Of a conversation, only the last question and answer are used."""
    data = open_data(path, encoding, is_head=_is_head)
    if data.kind == "text":
        if path.name.removesuffix(".gz").lower().endswith((".jsonl", ".json")):
            raise InputError(f"{path} holds no JSON, though its name says so: a plain text is a task as .txt")
        ((_, whole, _),) = data.records
        if path.suffix.lower() != ".txt" or "\t" not in str(whole):
            yield 1, {"text": str(whole)}
            return
    rows = [] if data.kind == "text" else list(data.records)
    if not rows and data.kind == "csv":
        raise InputError(f"{path} has the names of columns and no row below them")
    if rows and data.kind == "csv" and (headless := _without_head(rows)):
        yield from headless
        return
    if not rows or (data.kind == "csv" and not _is_named(rows[0].value)):
        # A table without column names must have a column of texts and a column of labels. If there is a file
        # class.txt, its line N, counted from 0, is the name of the label N.
        texts, _ = read_labelled(path, LabelledOptions(encoding=encoding))
        names = path.parent / "class.txt"
        names_of = read_utf8(names).split("\n") if names.exists() else []
        for one in texts:
            (label,) = one.labels or ("",)
            number = whole_number(label)
            named = names_of[number] if number is not None and number < len(names_of) else label
            yield one.line, {"text": one.text, "label": named.strip() or label}
        return
    report.notes = data.notes
    for line, value, raw in rows:
        keys = {str(key).lower() for key in value} if isinstance(value, Mapping) else set()
        is_turns = isinstance(value, list) or bool(keys & set(FIELDS["turns"]) and not keys & {"reference"})
        if is_turns:
            try:
                talk = meaning_of(value, FieldNames(), line, raw)
            except BadLine as bad:
                yield line, bad
                continue
            if isinstance(talk, Conversation):
                yield line, {"question": talk.question, "answer": talk.answer}
                continue
        yield line, value


def _without_head(rows: Sequence[Record]) -> list[tuple[int, Any]]:
    """Return the records of a table in MMLU's own form; [] if the table has another form.

    MMLU's tables have no column names: each row is a question, the choices and a letter. `rows` was read with
    the first row as column names. Here, this row becomes a record again, and the columns get names.
    """
    first = rows[0].value
    if not isinstance(first, Mapping) or len(first) < 4:
        return []
    last = [[*first][-1], *([*row.value.values()][-1] for row in rows if isinstance(row.value, Mapping))]
    letters = string.ascii_uppercase[: len(first) - 2]
    if any(str(cell).strip() not in [*letters] for cell in last):
        return []
    names = ["question", *letters.lower(), "answer"]
    found: list[tuple[int, Any]] = [(1, dict(zip(names, first)))]
    for line, value, _ in rows:
        found.append((line, dict(zip(names, value.values())) if isinstance(value, Mapping) else value))
    return found


def _is_head(cells: Collection[str]) -> bool:
    return len(_COLUMNS & set(cells)) >= min(2, len(cells)) or is_head(cells)


def _is_named(value: Any) -> bool:
    return isinstance(value, BadLine) or (
        isinstance(value, Mapping) and _is_head({str(k).lower() for k in value})
    )
