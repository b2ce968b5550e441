"""Tables: CSV and TSV, the first sheet of a workbook, Parquet. A row becomes a dictionary of its columns.

A table without column names has the columns "0", "1", ...
"""

import csv
import importlib.util
import io
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from minigpt.data.json_values import NOT_TEXT, BadLine, Record, as_json, json_object
from minigpt.data.text_encoding import BAD_BYTES
from minigpt.errors import InputError

__all__ = [
    "IsHead", "csv_records", "delimiter_of", "parquet_records", "require_package", "rows_of",
    "workbook_records",
]  # fmt: skip

# Told the cells of a table's first row, in small letters: are they column names? Told one column of a Parquet
# file: is it read?
IsHead = Callable[[Collection[str]], bool]

_CELL = (1 << 31) - 1  # characters of one CSV cell, at most: what a C long holds everywhere
_SAMPLE = 1 << 16  # characters by which a table is recognised
_ROWS = 50
_LARGEST = 4 << 30  # bytes that one row group of a Parquet file may unpack to


def require_package(module: str, what: str, extra: str) -> None:
    """Raise InputError, with the extra that installs it, if a module is missing."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs {module}: pip install 'minigpt[{extra}]'")


# -- CSV -----------------------------------------------------------------------------------------------------


def delimiter_of(
    text: str, path: Path, is_head: IsHead, needs_head: bool = False, is_whole: bool = True
) -> tuple[str, bool] | None:
    """The delimiter of a table and whether it has a head; None if the text is no table.

    Args:
        needs_head: no lines with tabs alone make a table, unless the file's name does.
        is_whole: False: the text may be cut anywhere.
    """
    named = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    sample = text[:_SAMPLE]
    for delimiter in ",\t;|":
        if delimiter not in sample and delimiter != named:
            continue
        rows: list[list[str]] = []
        broken = False
        try:
            rows.extend(row for row in itertools.islice(_reader(sample, delimiter), _ROWS) if row)
        except csv.Error:
            broken = is_whole and len(text) <= _SAMPLE  # else the sample may end inside quotes
        if not rows or (len(rows[0]) < 2 and delimiter != named):
            continue
        if is_head([cell.strip().lower() for cell in rows[0]]):
            return delimiter, True
        whole = rows[:-1] or rows  # the sample may break the last one off
        is_even = len({len(row) for row in whole}) == 1 and len(whole) > 1 and len(rows[0]) > 1
        if is_even and not broken and (named or (delimiter == "\t" and not needs_head)):
            return delimiter, bool(named) and len(rows[0]) > 2
    return None


def _reader(text: str, delimiter: str) -> Any:
    csv.field_size_limit(_CELL)
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def csv_records(text: str, delimiter: str, has_head: bool) -> Iterator[Record]:
    """The rows of a CSV text. A row whose quotation marks are wrong is bad in each line that it takes."""
    reader = _reader(text, delimiter)
    head: list[str] | None = None
    while True:
        line, wrong = reader.line_num + 1, ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells, wrong = [], str(error)
        last = reader.line_num
        if not wrong and not any(cell.strip() for cell in cells):
            continue
        if head is None and not wrong:
            head = _head(cells) if has_head else [str(i) for i in range(len(cells))]
            if has_head:
                continue
        if wrong or (head is not None and _swallows(cells, len(head), delimiter)):
            mark = (
                "a quotation mark inside a cell must be written twice"
                if line == last
                else (f"a quotation mark opens in line {line} and has no partner up to line {last}")
            )
            for number in range(line, last + 1):
                yield Record(number, BadLine("broken CSV", mark), "")
        elif head is not None:
            yield _row(line, head, cells)


def _swallows(cells: list[str], columns: int, delimiter: str) -> bool:
    """Is a row too short, and its last cell holds lines that would be rows of their own?"""
    lines = cells[-1].split("\n")[1:] if len(cells) < columns else []
    return any(line.count(delimiter) == columns - 1 for line in lines)


def _head(cells: list[Any]) -> list[str]:
    return [str(cell).strip() or str(number) for number, cell in enumerate(cells)]


def _row(line: int, head: list[str], cells: list[str]) -> Record:
    if len(cells) > len(head):
        return Record(line, BadLine("more cells than the head has", f"{len(cells)} for {len(head)}"), "")
    if any(BAD_BYTES.search(cell) for cell in cells):
        return Record(line, BadLine(NOT_TEXT), "")
    value = json_object(zip(head, cells))
    return Record(line, value, as_json(value))


# -- Excel ---------------------------------------------------------------------------------------------------


def workbook_records(content: bytes, path: Path, is_head: IsHead) -> tuple[Iterable[Record], str]:
    """The rows of the first sheet of a workbook, and a sentence about the other sheets, or "".

    Raises:
        InputError: for a damaged workbook, or another zip file; without python-calamine.
    """
    require_package("python_calamine", f"{path}: reading a workbook", "excel")
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
    names = book.sheet_names
    others = f"{path}: the first of {len(names)} sheets, {names[0]!r}, is read" if len(names) > 1 else ""
    return _sheet(rows, is_head), others


def _sheet(rows: list[list[Any]], is_head: IsHead) -> Iterator[Record]:
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


# -- Parquet -------------------------------------------------------------------------------------------------


def parquet_records(source: Path | bytes, name: str, is_read: IsHead) -> Iterator[Record]:
    """The rows of a Parquet file, read as they are needed.

    Args:
        source: the file, or its bytes.
        is_read: which columns are; if none: all.

    Raises:
        InputError: for a damaged file, or one that claims more than its bytes can hold; without pyarrow.
    """
    require_package("pyarrow", f"{name}: reading Parquet", "datasets")
    import pyarrow
    import pyarrow.parquet

    try:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        where = str(source) if isinstance(source, Path) else pyarrow.BufferReader(source)
        with pyarrow.parquet.ParquetFile(where) as file:
            names = file.schema_arrow.names
            wanted = [each for each in names if is_read([each.strip().lower()])] or names
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            largest = max(
                (sum(g.column(i).total_uncompressed_size for i in range(g.num_columns)) for g in groups),
                default=0,
            )
            if largest > _LARGEST or file.metadata.num_rows > 100 * size:
                raise InputError(
                    f"{name} says that it holds {largest >> 20} MiB in one group, "
                    f"{file.metadata.num_rows} rows in all"
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
