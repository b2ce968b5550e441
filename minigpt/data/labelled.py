"""Reads texts with labels from files of all formats that file_formats.py knows; splits and encodes them.

    texts, report = read_labelled(Path("reviews.csv"), LabelledOptions())
    train, val = hold_out(texts, 0.1, seed=42)            # a label with several texts is in both parts
    encoded = encode_labelled(train, tokenizer, ["good", "bad"], problem_type, max_length, "reviews.csv")

A label is a text: 1, 1.0 and "1" are the same label. The order of the lines does not influence training, so a
file may be sorted by label.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from minigpt.data.field_names import FIELDS
from minigpt.data.file_formats import DataFile, open_data
from minigpt.data.json_values import REPEATED, BadLine, Record
from minigpt.data.reader import ReadReport, read_records
from minigpt.data.records import ProblemType, lower_keys, shown_keys, text_of
from minigpt.data.split import normalise
from minigpt.devices import move
from minigpt.errors import InputError

__all__ = [
    "EncodedTexts", "LabelledBatch", "LabelledOptions", "LabelledText",
    "class_weights", "encode_labelled", "hold_out", "label_names", "read_labelled",
]  # fmt: skip

TEXT_FIELDS = (
    *("text", "content", "review", "sentence", "comment", "title", "message", "tweet", "headline", "news"),
    *("文本", "内容", "评论", "句子", "正文", "标题", "短信", *FIELDS["text"]),
)
LABEL_FIELDS = (
    *("label", "labels", "category", "categories", "class", "classes", "target", "tag", "tags", "topic"),
    *("sentiment", "rating", "score", "y", "标签", "类别", "分类", "情感", "评分", "分数", "主题"),
)
_SEPARATORS = re.compile(r"[|,，、]")  # what stands between the labels of a text that has several


@dataclass(frozen=True)
class LabelledOptions:
    """Options for reading a file of texts with labels."""

    text_field: str = ""
    """name of the text's field or column; "": the usual names are tried"""
    label_field: str = ""
    """name of the label's field or column; "": the usual names are tried"""
    problem_type: ProblemType = "single_label_classification"
    encoding: str = ""
    strict: bool = False
    needs_labels: bool = True
    """False: a record without a label is a text to be classified"""
    known: tuple[str, ...] = ()
    """labels that the model knows; without `needs_labels`, a text with another label counts as unlabelled"""


class LabelledText(NamedTuple):
    """One text with its labels."""

    text: str
    labels: tuple[str, ...] | None  # None: the record has no label; several only in multi-label problems
    line: int  # line on which the record begins


# -- reading -----------------------------------------------------------------------------------------------


def read_labelled(path: Path, options: LabelledOptions) -> tuple[list[LabelledText], ReadReport]:
    """Read a file of texts with labels. Bad records are skipped, counted and named in the report.

    Raises:
        InputError: if a file cannot be read, has no field for text or label (the message lists the fields),
            or holds no good record; with `strict` also for the first bad record.
    """
    own = {name.strip().lower() for name in (options.text_field, options.label_field) if name}
    data = open_data(path, options.encoding, lambda cells: _is_head(cells, own, options.needs_labels))
    report = ReadReport(path, notes=data.notes, sha256=data.sha256)
    if data.kind == "text" and options.needs_labels:
        raise InputError(
            f"{path} is plain text without labels: give a table, or JSON Lines with text and label"
        )
    records = [_as_object(each, options) for each in (_lines(data) if data.kind == "text" else data.records)]
    if data.has_head is False:
        fields = _headless(records, path, options.needs_labels)
        report.notes += (f"{path}: no column names: text is column {int(fields.text) + 1}, label the other",)
    else:
        fields = _fields(records, options, path)
    unfit: list[tuple[int, str]] = []  # (line, label) of records with a label that the model does not have

    def labelled(record: Record) -> LabelledText:
        if not isinstance(record.value, Mapping):
            raise BadLine("not an object with text and label")
        item = lower_keys(record.value)
        text = text_of(item, fields.text)
        try:
            labels = _labels(item.get(fields.label), fields.label, options)
        except BadLine as bad:
            if options.needs_labels:
                raise
            unfit.append((record.line, bad.detail or bad.reason))
            labels = None
        if labels is None and options.needs_labels:
            raise BadLine("the label is missing", "" if fields.label in item else shown_keys(item))
        return LabelledText(text, labels, record.line)

    found = read_records(records, report, labelled, lambda each: (each.text,), options.strict)
    if unfit:
        line, shown = unfit[0]
        report.notes += (
            f"{path}: {len(unfit):,} values of `{fields.label}` are no labels of the model and count as none "
            f"(line {line}: {shown})",
        )
    if not found:
        raise InputError(f"{path} holds no text{' with a label' * options.needs_labels}: {report.reasons()}")
    return found, report


class Fields(NamedTuple):
    """The keys under which a record has its text and its label."""

    text: str
    label: str  # "": the records have no label


def _as_object(record: Record, options: LabelledOptions) -> Record:
    """Put the text of a record without fields into an object. Other records are returned unchanged."""
    is_text = isinstance(record.value, str) and not options.needs_labels
    return record._replace(value={options.text_field or "text": record.value}) if is_text else record


def _lines(data: DataFile) -> Iterator[Record]:
    """Yield the lines of a plain text as records, without blank lines."""
    (_, whole, _), *_ = data.records
    for number, line in enumerate(str(whole).split("\n"), 1):
        if line.strip():
            yield Record(number, line.strip(), "")


def _is_head(cells: Collection[str], own: set[str], needs_labels: bool) -> bool:
    if own & set(cells):
        return True
    has_text, has_label = bool(set(TEXT_FIELDS) & set(cells)), bool(set(LABEL_FIELDS) & set(cells))
    # For Parquet, this function gets the name of one column, and returns True if the column should be read.
    if len(cells) == 1:
        return has_text or has_label
    return has_text and (has_label or not needs_labels)


def _headless(records: Sequence[Record], path: Path, needs_labels: bool) -> Fields:
    """Decide which of two columns without names has the texts, and which has the labels.

    The label is the column with fewer different values. If both have equally many, the text is the column
    with more characters.

    Raises:
        InputError: if the first line looks like column names.
    """
    cells = [each.value for each in records if isinstance(each.value, dict)]
    counts = [Counter(str(each.get(key)).strip() for each in cells) for key in ("0", "1")]
    lengths = [sum(map(len, column.elements())) for column in counts]
    label = 0 if (len(counts[0]), lengths[0]) < (len(counts[1]), lengths[1]) else 1
    first = str(cells[0].get(str(label))).strip() if cells else ""
    # True: no value of this column occurs twice. Then its values may be row numbers (1, 2, 3), not labels.
    differ = len(counts[label]) == len(cells)
    if len(cells) > 1 and counts[label][first] == 1 and (needs_labels or not differ):
        names = ", ".join(repr(str(part)[:40]) for part in cells[0].values())
        raise InputError(
            f"{path}: no column has a usual name for a text and its label; the first line is {names}: if "
            "these are column names, give --text_field NAME --label_field NAME"
        )
    return Fields(str(1 - label), str(label))


def _fields(records: Sequence[Record], options: LabelledOptions, path: Path) -> Fields:
    """Choose the keys of text and label for the whole file.

    If the user gave a name, this name is the key. Else the key is the first usual name that at least half of
    the records have. If there is none, it is the usual name that occurs in the largest number of records.

    Raises:
        InputError: if no record has a key for the text, or for a label that is needed; the message lists the
            keys of the first record.
    """
    items = [lower_keys(each.value) for each in records if isinstance(each.value, Mapping)]
    counts = Counter(key for item in items for key in item)
    keys = []
    for kind, named, usual in (
        ("text", options.text_field, TEXT_FIELDS),
        ("label", options.label_field, LABEL_FIELDS),
    ):
        names = [name for name in ((named.strip().lower(),) if named else usual) if counts[name]]
        is_needed = kind == "text" or options.needs_labels
        if items and not names and is_needed:
            what = f"no field {named!r}" if named else f"no field with a usual name for the {kind}"
            raise InputError(f"{path}: {what}; {shown_keys(items[0])}: give --{kind}_field NAME")
        often = (name for name in names if 2 * counts[name] >= len(items))
        keys.append(next(often, max(names, key=lambda name: counts[name], default="")))
    return Fields(*keys)


def _labels(value: Any, key: str, options: LabelledOptions) -> tuple[str, ...] | None:
    """Return the labels of a record, or None if it has no label.

    Raises:
        BadLine: if the value is not a label, or not one of `options.known`; if there are several labels and
            the problem type allows only one.
    """
    several = options.problem_type == "multi_label_classification"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if value is REPEATED:
        raise BadLine(f"`{key}` stands there more than once")
    if isinstance(value, list):
        names = [_label(each, key) for each in value]
        if not several and len(names) != 1:
            raise BadLine(
                "several labels, which take --problem_type multi_label_classification",
                ", ".join(names)[:80],
            )
    elif several:
        names = [part.strip() for part in _SEPARATORS.split(_label(value, key))]
    else:
        names = [_label(value, key)]
    found = tuple(dict.fromkeys(filter(None, names)))
    if options.problem_type == "regression":
        for name in found:
            if not _is_number(name):
                raise BadLine(f"`{key}` is no finite number", repr(name[:40]))
    elif wrong := [name for name in found if options.known and name not in options.known]:
        raise BadLine("the model has no such label", repr(wrong[0][:40]))
    return found if found or several else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _label(value: Any, key: str) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # pandas turns 1 into 1.0 in a column with missing values
    if not isinstance(value, int | float | str):
        raise BadLine(f"`{key}` is neither text nor number", type(value).__name__)
    text = str(value).strip()
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise BadLine(f"`{key}` holds what no text has")
    return text


# -- names of the labels; training part and validation part --------------------------------------------------


def label_names(texts: Iterable[LabelledText], where: str) -> tuple[str, ...]:
    """Return all different labels, sorted by value if all are whole numbers, else by code points.

    Raises:
        InputError: if there are fewer than two labels.
    """
    names = {name for each in texts for name in each.labels or ()}
    if len(names) < 2:
        only = f"one label alone, {min(names)!r}" if names else "no label"
        raise InputError(f"{where} has {only}: there is nothing to tell apart")
    if all(re.fullmatch(r"-?\d{1,15}", name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def hold_out(
    texts: Sequence[LabelledText], share: float, seed: int
) -> tuple[list[LabelledText], list[LabelledText]]:
    """Split texts into a training part and a validation part, separately for each label.

    Texts that differ only in case, spaces or full-width characters go to the same part. The split
    depends on the seed and the texts, not on the order of lines. If a label has only one text, that text is
    for training. If every label has only one text, the labels are ignored.

    Raises:
        InputError: if there are no two different texts.
    """
    groups: dict[str, list[LabelledText]] = {}
    for each in texts:
        groups.setdefault(normalise(each.text), []).append(each)
    by_label: dict[tuple[str, ...], list[str]] = {}
    for name, group in groups.items():
        by_label.setdefault(group[0].labels or (), []).append(name)
    if all(len(names) < 2 for names in by_label.values()):  # every label has only one text: ignore labels
        by_label = {(): list(groups)}
    held: set[str] = set()
    for names in by_label.values():
        names.sort(key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
        held.update(names[: min(max(1, round(share * len(names))), len(names) - 1)])
    if not held:
        raise InputError(f"{len(texts):,} texts cannot be divided: give --val_data FILE, or more texts")
    train = [each for name, group in groups.items() if name not in held for each in group]
    val = [each for name, group in groups.items() if name in held for each in group]
    return sorted(train, key=lambda each: each.line), sorted(val, key=lambda each: each.line)


# -- encoding ----------------------------------------------------------------------------------------------


class TextTokenizer(Protocol):
    """The tokenizer interface that this module needs."""

    def encode_array(self, text: str, /) -> npt.NDArray[np.int32]:
        """Encode a text without adding special tokens."""


class LabelledBatch(NamedTuple):
    """One batch. Rows are padded on the right to the length of the longest row."""

    input_ids: torch.Tensor  # (B, T) int64
    token_mask: torch.Tensor  # (B, T) bool: True for real tokens, False for padding
    last: torch.Tensor  # (B,) int64: position of a row's last real token
    # (B,) int64: index of the label. Multi-label: (B, number of labels) float32. Regression: (B, 1) float32.
    labels: torch.Tensor
    weights: torch.Tensor  # (B,) float32: factor for the loss of each row
    rows: npt.NDArray[np.int64]  # (B,): for each row, the index of its text in `EncodedTexts`

    def to(self, device: torch.device) -> "LabelledBatch":
        """Copy the batch to another device."""
        return LabelledBatch(*(move(tensor, device) for tensor in self[:-1]), self.rows)  # type: ignore[arg-type, call-arg]

    def some(self, which: slice) -> "LabelledBatch":
        """Return a batch that has only the rows in the slice `which`."""
        return LabelledBatch(*(tensor[which] for tensor in self[:-1]), self.rows[which])  # type: ignore[arg-type, call-arg]

    def blank(self) -> "LabelledBatch":
        """Return a batch of the first row with weight 0, so that it adds nothing to the loss.

        Several processes share the rows of a batch and do each step together. A process that gets no row
        uses this batch.
        """
        first = self.some(slice(1))
        return first._replace(weights=torch.zeros_like(first.weights), rows=self.rows[:0])


@dataclass(frozen=True)
class EncodedTexts:
    """All texts as one long array of ids."""

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]  # (N + 1,): text i is ids[starts[i]:starts[i + 1]]
    # (N,) int64: index of the label. Multi-label: (N, number of labels) float32, 1 for a label of the text,
    # else 0. Regression: (N, 1) float32, the number to predict.
    labels: npt.NDArray[Any]
    weights: npt.NDArray[np.float32]  # (N,): factor for the loss of each text
    lines: npt.NDArray[np.int64]  # (N,): number of each text's line in the data file, from 1
    pad_token_id: int
    n_cut: int  # number of texts that max_length shortened

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each text, (N,)."""
        return np.diff(self.starts)

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the data that training uses."""
        digest = hashlib.sha256()
        for array in (self.ids, self.starts, self.labels, self.weights):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def batch(self, rows: npt.NDArray[np.int64], pad_to: int = 0) -> LabelledBatch:
        """Build a batch of some texts, padded to the longest text, or to `pad_to` tokens if that is more."""
        lengths = self.lengths[rows]  # (B,): number of tokens of each text
        column = np.arange(max(pad_to, int(lengths.max())))[None, :]  # (1, T): index of each column
        real = column < lengths[:, None]  # (B, T): True for tokens, False for padding
        flat = np.where(real, self.starts[rows][:, None] + column, 0)
        ids = np.where(real, self.ids[flat], self.pad_token_id).astype(np.int64)
        return LabelledBatch(
            input_ids=torch.from_numpy(ids),
            token_mask=torch.from_numpy(real),
            last=torch.from_numpy(lengths - 1),
            labels=torch.from_numpy(self.labels[rows]),
            weights=torch.from_numpy(self.weights[rows]),
            rows=rows,
        )

    def in_order(self, batch_size: int) -> Iterator[LabelledBatch]:
        """Yield batches for an evaluation: each text once, sorted by length."""
        order = np.argsort(self.lengths, kind="stable")
        for first in range(0, len(order), batch_size):
            yield self.batch(order[first : first + batch_size])

    @property
    def rows(self) -> int:
        """Return the number of texts that an evaluation uses: all texts."""
        return len(self)

    @property
    def answer_share(self) -> float:
        """Return the share of tokens for which a label is predicted: one token of each text, the last."""
        return len(self) / len(self.ids)

    @property
    def mean_targets(self) -> float:
        """Return the mean number of tokens of a text."""
        return float(self.lengths.mean())


def encode_labelled(
    texts: Sequence[LabelledText],
    tokenizer: TextTokenizer,
    names: Sequence[str],
    problem_type: ProblemType,
    max_length: int,
    where: str,
    *,
    begin: int | None = None,
    end: int | None = None,
    pad_token_id: int = 0,
    weights: Mapping[str, float] | None = None,
) -> EncodedTexts:
    """Encode texts and labels. The end of a text that is too long is cut off.

    Args:
        names: all labels; a label's number is its index in this list.
        where: name of the texts' file, for error messages.
        begin: id to put before each text; None: none.
        end: id to append to each text; None: none.
        weights: factor of each label in the loss. Default: 1.

    Raises:
        InputError: if a label is not in `names`, or a text has no token.
    """
    number = {name: index for index, name in enumerate(names)}
    before, after = (np.array([] if one is None else [one], dtype=np.int32) for one in (begin, end))
    room = max(0, max_length - len(before) - len(after))
    pieces: list[npt.NDArray[np.int32]] = []
    labels, counts, n_cut = [], [], 0
    for each in texts:
        for name in each.labels or () if problem_type != "regression" else ():
            if name not in number:
                raise InputError(
                    f"{where}:{each.line}: the label {name!r} does not occur in the training data, which has "
                    f"{', '.join(map(repr, names[:10]))}"
                )
        ids = tokenizer.encode_array(each.text)
        n_cut += len(ids) > room
        pieces.append(np.concatenate([before, ids[:room], after]))
        if not len(pieces[-1]):
            raise InputError(f"{where}:{each.line}: the text has no token")
        labels.append(_numbers(each.labels, number, problem_type))
        counts.append(weights[each.labels[0]] if weights and each.labels else 1.0)
    is_single = problem_type == "single_label_classification"
    return EncodedTexts(
        ids=np.concatenate(pieces),
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        labels=np.array(labels, dtype=np.int64 if is_single else np.float32),
        weights=np.array(counts, dtype=np.float32),
        lines=np.array([each.line for each in texts], dtype=np.int64),
        pad_token_id=pad_token_id,
        n_cut=n_cut,
    )


def _numbers(labels: tuple[str, ...] | None, number: Mapping[str, int], kind: ProblemType) -> Any:
    """Return a text's label as numbers. A text without label gets 0 or zeros.

    Single-label: the index of the label. Multi-label: a list with 1 or 0 for each label that the model knows.
    Regression: a list with only the value to predict.
    """
    if kind == "single_label_classification":
        return number[labels[0]] if labels else 0
    if kind == "regression":
        return [float(labels[0]) if labels else 0.0]
    row = [0.0] * len(number)
    for name in labels or ():
        row[number[name]] = 1.0
    return row


def class_weights(texts: Sequence[LabelledText]) -> dict[str, float]:
    """Return a weight in the loss for each label, so that rare and frequent labels count equally.

    The weight is N / (K n): N texts, K labels, n texts with this label. The mean weight over all texts is 1.
    """
    counts = Counter(name for each in texts for name in each.labels or ())
    return {name: len(texts) / (len(counts) * count) for name, count in counts.items()}
