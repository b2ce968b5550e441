"""What a data file is, and the records in it. The content decides, not the name.

    data = open_data(Path("questions.csv"))
    data.kind, data.encoding                   # "csv", "gb18030"
    for record in data.records: ...            # Record(line, value, raw), or a BadLine in place of the value

First come compression and the encoding, then the format: JSON Lines, a JSON array, an object of columns, CSV
or TSV, an Excel workbook, Parquet, plain text. What a record means is minigpt.data.records' work.

A file is read whole; what a file may hold is bounded. Long plain texts have a way of their own: see
corpus.py.
"""

import bz2
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minigpt.data.text_encoding import BAD_BYTES, decode
from minigpt.errors import InputError

__all__ = [
    "BadLine", "DataFile", "Kind", "Record",
    "open_data", "parse_line", "read_bytes", "refuse_foreign", "refuse_other_text", "rows_of",
]  # fmt: skip

IsHead = Callable[[Collection[str]], bool]

Kind = Literal["jsonl", "json", "csv", "xlsx", "parquet", "text"]
NOT_TEXT = "bytes that are no character"
_MOST = 4 << 30  # bytes of a file that is read whole, also of what comes out of a compressed one
_CELL = 1 << 24  # characters of one CSV cell
_DEEPEST = 64  # levels of a JSON value: conversations have three or four


class BadLine(Exception):  # noqa: N818 -- the reader's business, not an error of anybody else
    """A record that is left out. `reason` groups such records, `detail` is the record's own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Record(NamedTuple):
    """One record of a file."""

    line: int  # where it begins, from 1; in Parquet and Excel the row, from 1
    value: Any  # what JSON has: a dictionary, list, text, ...; or a BadLine
    raw: str  # the record as one line of JSON


@dataclass(frozen=True)
class DataFile:
    """A file that was recognised."""

    kind: Kind
    encoding: str  # Python's name; "" where the format has its own
    records: Iterable[Record]  # of a text: one, the whole text
    sha256: str  # of the file's bytes
    notes: tuple[str, ...] = ()  # what a person should know about how it is read


# -- bytes -------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file, or of what the shell gives as <(...) or /dev/stdin.

    Raises:
        InputError: for what is missing, a folder, a device, a named pipe, or too large.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(_folder_sentence(path))
        shell = stat.S_ISFIFO(status.st_mode) and str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/"))
        if not (stat.S_ISREG(status.st_mode) or shell):
            raise InputError(f"{path} is no regular file")
        if status.st_size > _MOST:
            raise InputError(
                f"{path} has {status.st_size >> 30} GiB; more than {_MOST >> 30} are not read whole"
            )
        with path.open("rb") as file:
            data = file.read(_MOST + 1)
    except InputError:  # which is a ValueError
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist (looked for it from {Path.cwd()})") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > _MOST:
        raise InputError(f"{path} gives more than {_MOST >> 30} GiB")
    return data


def _folder_sentence(path: Path) -> str:
    if (path / "config.json").exists():
        return f"{path} is a model's folder, not data"
    return f"{path} is a folder; give a file (of a folder of texts: --text {path})"


_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def decompressed(data: bytes, name: str) -> tuple[bytes, str]:
    """The bytes inside a compressed file and the method; other bytes as they are, and "".

    Raises:
        InputError: for damaged data, too much of it, or zstd without pyarrow.
    """
    method = next((method for mark, method in _COMPRESSED.items() if data.startswith(mark)), "")
    if not method:
        return data, ""
    try:
        if method == "zstd":
            _require("pyarrow", f"{name}: reading zstd", "datasets")
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
                found = stream.read(_MOST + 1)
        else:
            openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
            with openers[method](io.BytesIO(data)) as file:
                found = file.read(_MOST + 1)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{name} is damaged {method} data: {error}") from None
    if len(found) > _MOST:
        raise InputError(f"{name} unpacks to more than {_MOST >> 30} GiB")
    return found, method


def _require(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs {module}: pip install 'minigpt[{extra}]'")


# -- formats -----------------------------------------------------------------------------------------------

_FOREIGN = {  # what a file starts with -> what it is
    b"%PDF": "a PDF file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x80\x02": "a pickle",
    b"GGUF": "a GGUF model",
    b"\x7fELF": "a program",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}
_XLSX, _XLS = b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def open_data(
    path: Path,
    encoding: str = "",
    is_head: IsHead = lambda cells: False,
    only_beginning: bool = False,
) -> DataFile:
    """Recognise a file.

    Args:
        encoding: what the user says that its text is in; "": find out.
        is_head: told the cells of a table's first row, in small letters, says whether they are column names;
            told one column of a Parquet file, whether it is read.
        only_beginning: a megabyte is enough, for who only wants to see some records. (Parquet is read whole.)

    Raises:
        InputError: for what is no data: a folder, an empty or binary file, an LFS pointer, a web page.
    """
    data = read_bytes(path)
    if only_beginning and not data.startswith(b"PAR1"):
        data = data[: data.rfind(b"\n", 0, 1 << 20) + 1 or 1 << 20] if len(data) > 1 << 20 else data
    digest = hashlib.sha256(data).hexdigest()
    if not data:
        raise InputError(f"{path} is empty")
    content, method = decompressed(data, str(path))
    notes = [f"{path}: {method} data"] if method else []
    refuse_foreign(content, path)
    if content.startswith(b"PAR1"):
        return DataFile("parquet", "", _parquet(content, str(path), is_head), digest, tuple(notes))
    if content.startswith((_XLSX, _XLS)):
        return DataFile("xlsx", "", _workbook(content, path, is_head), digest, tuple(notes))
    text, codec = decode(content, str(path), encoding)
    if codec not in ("utf-8", "ascii") and not encoding:
        from minigpt.data.text_encoding import shown_name

        notes.append(f"{path}: read as {shown_name(codec)}")
    if not text.strip():
        raise InputError(f"{path} holds nothing but white space")
    refuse_other_text(text, path)
    start = text.lstrip()[:1]
    if start and start in "[{":
        kind, records = _json(text)
        return DataFile(kind, codec, records, digest, tuple(notes))
    if table := _table(text, path, is_head):
        delimiter, head = table
        if not head:
            notes.append(f"{path}: no line of column names: the first column is taken for the question")
        return DataFile("csv", codec, _csv(text, delimiter, head), digest, tuple(notes))
    return DataFile("text", codec, [Record(1, text, "")], digest, tuple(notes))


def refuse_foreign(content: bytes, path: Path) -> None:
    """Raise InputError for a PDF, a picture, a model, ..., told by the first bytes."""
    for mark, what in _FOREIGN.items():
        if content.startswith(mark):
            raise InputError(f"{path} is {what}, not data to learn from")


def refuse_other_text(text: str, path: Path) -> None:
    """Raise InputError for what is text, but no data: an LFS pointer, a web page."""
    start = text[:512].lstrip().lower()
    if start.startswith("version https://git-lfs.github.com/spec/"):
        raise InputError(f"{path} is a Git LFS pointer, not the data itself: fetch it with `git lfs pull`")
    if start.startswith(("<!doctype html", "<html")):
        raise InputError(f"{path} is a web page, not the file behind it: download it again")


# -- JSON --------------------------------------------------------------------------------------------------


def parse_line(line: bytes) -> tuple[str, Any]:
    """The text of a line of JSON Lines without its end, and the value in it.

    Raises:
        BadLine: if it is not UTF-8, or not one JSON value.
    """
    text = line.decode("utf-8", "surrogateescape")
    if found := BAD_BYTES.search(text):
        raise _not_text(text, found.start())
    value, end = _value(text, _end_of_blank(text, 0))
    if _end_of_blank(text, end) < len(text):
        raise BadLine("broken JSON", f"something follows the value at column {end + 1}")
    return text, value


class _Repeated:
    """Stands for the value of a key that an object has twice: which one is meant?"""


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        seen: set[str] = set()
        for key, _ in items:
            if key in seen:
                found[key] = _Repeated
            seen.add(key)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _value(text: str, begin: int) -> tuple[Any, int]:
    """The JSON value at a place, and its end. Raises BadLine."""
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        raise BadLine("broken JSON", f"{error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
        raise BadLine("broken JSON", "a value that cannot be read") from None
    if _depth(value) > _DEEPEST:
        raise BadLine("broken JSON", f"nested more than {_DEEPEST} levels deep")
    return value, end


def _depth(value: Any) -> int:
    level, values = 0, [value]
    while values and level <= _DEEPEST:
        level += 1
        inner: list[Any] = []
        for each in values:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        values = inner
    return level


_BLANK = re.compile(r"[ \t\r\n\ufeff]*")


def _json(text: str) -> tuple[Kind, Iterable[Record]]:
    """A file that begins with [ or {: one value with everything in it, or a value a line."""
    begin = _end_of_blank(text, 0)
    line_end = text.find("\n", begin)
    first_line = text[begin : len(text) if line_end < 0 else line_end]
    try:
        _, end = _value(first_line, 0)
        alone = _end_of_blank(text, begin + end) == len(text)
    except BadLine:
        alone = True  # no whole value in the first line: the first value may go on in the next
    if not alone:
        return "jsonl", _lines(text)
    try:
        value, end = _value(text, begin)
    except BadLine:
        if text[begin] == "[":
            return "json", _values(text, _end_of_blank(text, begin + 1), in_array=True)
        return "jsonl", _lines(text)
    if _end_of_blank(text, end) < len(text):
        return "json", _values(text, begin)
    if isinstance(value, list):
        if value and all(isinstance(item, dict) and _is_turn(item) for item in value):
            return "json", [Record(1, value, _dump(value))]  # one conversation
        return "json", _values(text, _end_of_blank(text, begin + 1), in_array=True)
    inside = _inside(value)
    if inside is not None:
        return "json", [Record(number, item, _dump(item)) for number, item in enumerate(inside, 1)]
    raw = text[begin:end]
    return "jsonl", [Record(text.count("\n", 0, begin) + 1, value, raw if "\n" not in raw else _dump(value))]


def _is_turn(item: dict[str, Any]) -> bool:
    return ("role" in item and "content" in item) or ("from" in item and "value" in item)


def _inside(value: dict[str, Any]) -> list[Any] | None:
    """The records of an object of columns, or around a list of records; None: it is a record itself."""
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    if lists and len(lists) == len(value) and len({len(item) for item in lists.values()}) == 1:
        count = len(next(iter(lists.values())))
        if len(lists) > 1 and not any(
            isinstance(item, dict | list) for row in lists.values() for item in row
        ):
            return [{key: lists[key][i] for key in lists} for i in range(count)]
    records = [item for item in lists.values() if item and all(isinstance(row, dict) for row in item)]
    if len(records) == 1 and not all(_is_turn(row) for row in records[0]):
        return records[0]
    by_index = list(value.values())
    if by_index and all(isinstance(item, dict) for item in by_index):
        keys = [list(item) for item in by_index]
        if all(key.isdigit() for item in keys for key in item) and len(set(map(tuple, keys))) == 1:
            return [{name: column[key] for name, column in value.items()} for key in keys[0]]  # pandas
    return None


def _end_of_blank(text: str, begin: int) -> int:
    found = _BLANK.match(text, begin)
    return found.end() if found else begin


def _lines(text: str) -> Iterator[Record]:
    """A value a line; several in a line, one behind the other, are read, too."""
    # not splitlines(): U+2028 and others may stand inside an answer
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r").removeprefix("\ufeff")
        if not line.strip():
            continue
        if found := BAD_BYTES.search(line):
            yield Record(number, _not_text(line, found.start()), line)
            continue
        begin, several = _end_of_blank(line, 0), []
        try:
            while begin < len(line):
                value, end = _value(line, begin)
                several.append(Record(number, value, line[begin:end]))
                begin = _end_of_blank(line, end)
        except BadLine as bad:
            several.append(Record(number, bad, line[begin:]))
        if len(several) == 1:
            yield several[0]._replace(raw=line)
        else:
            yield from several


def _not_text(line: str, place: int) -> BadLine:
    byte = ord(line[place]) - 0xDC00
    column = len(line[:place].encode("utf-8", "surrogateescape")) + 1
    return BadLine(NOT_TEXT, f"byte 0x{byte:02x} at column {column}")


def _values(text: str, begin: int, in_array: bool = False) -> Iterator[Record]:
    """Values one behind the other, or the elements of an array, each over as many lines as it takes."""
    line, counted = 1, 0
    while begin < len(text) and not (in_array and text[begin] == "]"):
        line, counted = line + text.count("\n", counted, begin), begin
        try:
            value, end = _value(text, begin)
        except BadLine as bad:
            yield Record(line, bad, "")
            return
        yield Record(line, value, _dump(value))
        begin = _end_of_blank(text, end)
        if in_array and text[begin : begin + 1] == ",":
            begin = _end_of_blank(text, begin + 1)
    if in_array and begin >= len(text):
        yield Record(line, BadLine("broken JSON", "the array has no end: the file is cut short"), "")


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# -- tables ------------------------------------------------------------------------------------------------


def _table(text: str, path: Path, is_head: IsHead) -> tuple[str, bool] | None:
    """The delimiter of a table and whether it has a head; None if the text is no table."""
    is_named = path.suffix.lower() in (".csv", ".tsv")
    sample = text[: 1 << 16]
    for delimiter in ",\t;|":
        if delimiter not in sample:
            continue
        try:
            rows = [row for row, _ in zip(_rows(sample, delimiter), range(50)) if row]
        except csv.Error:
            continue
        if not rows or len(rows[0]) < 2:
            continue
        if is_head([cell.strip().lower() for cell in rows[0]]):
            return delimiter, True
        whole = rows[:-1] or rows  # the sample may break the last one off
        if len({len(row) for row in whole}) == 1 and (delimiter == "\t" or is_named) and len(whole) > 1:
            return delimiter, is_named and len(rows[0]) > 2
    return None


def _rows(text: str, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(_CELL)
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def _csv(text: str, delimiter: str, has_head: bool) -> Iterator[Record]:
    csv.field_size_limit(_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    head: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            here, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if head is None:
                head = _head(cells) if has_head else [str(i) for i in range(len(cells))]
                if has_head:
                    continue
            yield _row(here, head, cells)
    except csv.Error as error:
        yield Record(line, BadLine("broken CSV", str(error)), "")


def _head(cells: list[Any]) -> list[str]:
    return [str(cell).strip() or str(number) for number, cell in enumerate(cells)]


def _row(line: int, head: list[str], cells: list[Any]) -> Record:
    if len(cells) > len(head):
        return Record(line, BadLine("more cells than the head has", f"{len(cells)} for {len(head)}"), "")
    value: dict[str, Any] = dict(zip(head, cells))
    if any(isinstance(cell, str) and BAD_BYTES.search(cell) for cell in cells):
        return Record(line, BadLine(NOT_TEXT), "")
    return Record(line, value, _dump(value))


def _workbook(content: bytes, path: Path, is_head: IsHead) -> Iterator[Record]:
    _require("python_calamine", f"{path}: reading a workbook", "excel")
    from python_calamine import CalamineWorkbook

    try:
        book = CalamineWorkbook.from_filelike(io.BytesIO(content))
        rows = book.get_sheet_by_index(0).to_python(skip_empty_area=True)
    except BaseException as error:  # a Rust panic is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise InputError(
            f"{path} is a zip file, but no workbook that can be read: {str(error)[:200]}"
        ) from None
    head: list[str] | None = None
    for number, cells in enumerate(rows, 1):
        texts = [_cell(cell) for cell in cells]
        if not any(text.strip() for text in texts):
            continue
        if head is None:
            has_head = is_head([text.strip().lower() for text in texts])
            head = _head(texts) if has_head else [str(i) for i in range(len(texts))]
            if has_head:
                continue
        yield _row(number, head, texts)


def _cell(value: Any) -> str:
    """A cell as its reader sees it: 3, not 3.0."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return "" if value is None else str(value)


# -- Parquet -----------------------------------------------------------------------------------------------


def _parquet(content: bytes, name: str, is_head: IsHead) -> Iterator[Record]:
    _require("pyarrow", f"{name}: reading Parquet", "datasets")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)) as file:
            names = file.schema_arrow.names
            wanted = [each for each in names if is_head([each.strip().lower()])] or names
            size = sum(
                file.metadata.row_group(i).column(j).total_uncompressed_size
                for i in range(file.metadata.num_row_groups)
                for j in range(file.metadata.num_columns)
            )
            if size > _MOST or file.metadata.num_rows > 100 * len(content):
                raise InputError(
                    f"{name} says that it holds {size >> 20} MiB in {file.metadata.num_rows} rows"
                )
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, _plain(row), "")
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise InputError(f"{name} is damaged or no Parquet file: {str(error)[:200]}") from None


def _plain(value: Any) -> Any:
    """Text for bytes, which some writers store text as."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def rows_of(rows: Iterable[Any]) -> Iterator[Record]:
    """Rows in memory (of a datasets.Dataset, say) as records."""
    for number, row in enumerate(rows, 1):
        value = _plain(dict(row)) if hasattr(row, "keys") else row
        yield Record(number, value, "")
