"""Reads tables: CSV and TSV, a sheet of an Excel workbook, Parquet.

A row becomes a dictionary: column name -> cell. A table without column names gets the names "0", "1", ...
"""

import contextlib
import csv
import importlib.util
import io
import itertools
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minigpt.data.field_names import DESCRIPTIONS, OPTION, OPTIONS, PARTNERS, TITLES
from minigpt.data.json_values import NOT_TEXT, BadLine, Record, as_json, json_object, shown_before
from minigpt.data.text_encoding import BAD_BYTES
from minigpt.errors import InputError

__all__ = [
    "IsHead", "csv_records", "most_unpacked", "parquet_records", "require_package", "require_unpacked",
    "row_record", "rows_of", "suffix_of", "table_in", "workbook_records",
]  # fmt: skip

# The type of a function that takes the cells of a table's first row in lower case. It returns True if they
# are column names. For Parquet, it takes one column name, and returns True if this column is to be read.
IsHead = Callable[[Collection[str]], bool]

PACKED = (".gz", ".bz2", ".xz", ".zst")  # suffixes of compressed files
_CELL = (1 << 31) - 1  # largest number of characters of a CSV cell; fits into a C long on every platform
_SAMPLE = 1 << 16  # number of characters that are examined to recognise a table
_ROWS = 50
_TITLES = 5  # number of rows at the beginning of a table that are searched for the column names
_BESIDE = (  # columns of a Parquet file that are read in addition to those with usual names
    *("message_id", "parent_id", "rank", "evidences", "meta_instruction"),
    *("mapping", "questions", "label", "weight", "chosen", "rejected"),
)
_MISSING = ("NaN", "nan", "<NA>", "#N/A")  # what pandas and Excel write for an empty cell
_AT_ONCE = 1 << 26  # rows become Python objects in groups of at most this number of bytes


def require_package(module: str, what: str, extra: str) -> None:
    """Raise InputError if a module is missing. The message names the extra that installs it."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs {module}: pip install 'minigpt[{extra}]'")


def most_unpacked(size: int) -> int:
    """Return how many bytes a compressed file of `size` bytes may unpack to.

    Compression shrinks a text to about a tenth, and a table of equal cells to a hundredth. A file that
    unpacks to more bytes than this function returns was probably made to fill the memory.
    """
    return (1 << 27) + 100 * size


def require_unpacked(name: str, size: int, unpacked: int) -> None:
    """Raise InputError if a file of `size` bytes unpacks to more bytes than `most_unpacked` allows."""
    if unpacked > most_unpacked(size):
        raise InputError(
            f"{name} has {size:,} bytes and unpacks to more than {most_unpacked(size):,}: it is damaged, or "
            "was made to fill the memory; unpack it yourself if you trust it"
        )


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case. For a compressed file, it is the suffix before .gz, .bz2, .xz or .zst.

    >>> suffix_of(Path("a.CSV.gz"))
    '.csv'
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


# -- CSV -----------------------------------------------------------------------------------------------------


class TableText(NamedTuple):
    """The layout of a text that is a table."""

    delimiter: str
    has_head: bool  # True if the table has a row of column names
    first_row: tuple[str, ...]
    titles: int = 0  # number of rows above the row of column names; these rows (often a title) are skipped
    has_quotes: bool = True  # False: quotation marks are part of the cells


def table_in(
    text: str, path: Path, is_head: IsHead, needs_head: bool = False, is_whole: bool = True
) -> TableText | None:
    """Recognise a table whose cells are separated by commas, tabs or the like. Return None for other text.

    Args:
        needs_head: if True, tab-separated lines without column names are a table only if the file's
            name ends in .csv or .tsv.
        is_whole: False if the text is only the beginning of a file, and may end inside a row.
    """
    named = {".csv": ",", ".tsv": "\t"}.get(suffix_of(path))
    sample = text[:_SAMPLE]
    is_whole = is_whole and len(sample) == len(text)  # False: the sample may end inside a quoted cell
    for delimiter in ",\t;|":
        if delimiter not in sample and delimiter != named:
            continue
        rows, is_sound = _first_rows(sample, delimiter)
        has_quotes = True
        if delimiter == "\t" and '"' in sample and not (is_sound and _is_even(rows)):
            plain, _ = _first_rows(sample, delimiter, has_quotes=False)
            if _is_even(plain[:-1]) and len(plain[0]) > 1:  # [:-1]: the sample may end inside the last row
                rows, is_sound, has_quotes = plain, True, False
        titles = _titles(rows, is_head)
        rows = rows[titles:]
        if not rows or (len(rows[0]) < 2 and delimiter != named):
            continue
        names = [cell.strip().lower() for cell in rows[0]]
        others = rows[1:] if is_whole else rows[1:-1]
        width = len(names)
        # A row fits if it has `width` cells. It may have additional cells if these are empty.
        fitting = sum(len(row) == width or (len(row) > width and not any(row[width:])) for row in others)
        # Prose also has commas ("Text, and ..."). A text is taken for prose if fewer than two cells of its
        # first row are without a space, or if fewer than half of the other rows fit.
        is_prose = sum(" " not in name for name in names) < 2 or 2 * fitting < len(others)
        is_prose = is_prose or any(map(_is_rule, rows[1:2]))
        if (is_head(names) or _holds_json(rows)) and (named or not is_prose):
            return TableText(delimiter, True, tuple(rows[0]), titles, has_quotes)
        is_even = fitting == len(others) > 0 and len(names) > 1 and (is_sound or not is_whole)
        # If the first cell of every row is empty, this is no table, but text that is indented with tabs.
        is_even = is_even and any(row[0].strip() for row in rows)
        if is_even and (named or (delimiter == "\t" and not needs_head)):
            has_head = bool(named) and len(names) > 2
            return TableText(delimiter, has_head, tuple(rows[0]), has_quotes=has_quotes)
    return None


def _holds_json(rows: list[list[str]]) -> bool:
    """Return True if a column has JSON in every row but the first. The first row then has column names."""
    columns = zip(*(row for row in rows if len(row) == len(rows[0])))
    starts = [[cell.lstrip()[:1] in ("[", "{") for cell in column] for column in columns]
    return any(not first and bool(others) and all(others) for first, *others in starts)


def _is_even(rows: list[list[str]]) -> bool:
    return bool(rows) and all(len(row) == len(rows[0]) for row in rows)


def _first_rows(sample: str, delimiter: str, has_quotes: bool = True) -> tuple[list[list[str]], bool]:
    """Return the first rows that are not empty, and True if all quotation marks in them are valid."""
    rows: list[list[str]] = []
    try:
        for row in itertools.islice(_reader(sample, delimiter, has_quotes), _ROWS):
            if any(cell.strip() for cell in row) and not _names_the_delimiter(row):
                rows.append(row)
    except csv.Error:
        return rows, False
    return rows, True


def _titles(rows: Sequence[Sequence[str]], is_head: IsHead) -> int:
    """Return the number of rows above the row of column names. Such a row may hold a title or a date."""
    for number, row in enumerate(rows[:_TITLES]):
        names = [cell.strip().lower() for cell in row]
        is_below_titles = all(sum(bool(cell.strip()) for cell in above) < 2 for above in rows[:number])
        if len(row) > 1 and is_head(names) and (is_below_titles or not any(map(str.isdigit, names))):
            return number
    return 0


def _names_the_delimiter(row: list[str]) -> bool:
    """Return True for Excel's optional first line, such as "sep=;"."""
    return row[0].strip().lower().startswith("sep=") and not any(row[1:])


def _is_rule(row: list[str]) -> bool:
    return not "".join(row).strip(" -:")


def _reader(text: str, delimiter: str, has_quotes: bool) -> Any:
    csv.field_size_limit(_CELL)
    first_line = text[: text.find("\n")] if "\n" in text else text
    spaced = all(cell.startswith(" ") for cell in first_line.split(delimiter)[1:])  # as in "question, answer"
    file = io.StringIO(text, newline="")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    return csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=spaced, quoting=quoting)


def csv_records(text: str, table: TableText) -> Iterator[Record]:
    """Yield the rows of a CSV text. Each line of a row with wrong quotation marks gives a bad record."""
    delimiter, has_head, _, titles, has_quotes = table
    reader = _reader(text, delimiter, has_quotes)
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
        if not wrong:
            if not any(cell.strip() for cell in cells) or (head is None and _names_the_delimiter(cells)):
                continue
            if titles:
                titles -= 1
                continue
            if head is None:
                head = _head(cells) if has_head else [str(i) for i in range(len(cells))]
                if has_head:
                    continue
        if head is None or wrong or _swallows(cells, len(head), delimiter):
            mark = "a quotation mark inside a cell must be written twice"
            if line < last or "unexpected end" in wrong:
                mark = f"a quotation mark that opens in line {line} has no partner up to line {last}"
            for number in range(line, last + 1):
                yield Record(number, BadLine("broken CSV", mark), "")
        # a repeated row of column names, as in files that were joined, is skipped
        elif not (has_head and _head(cells) == head):
            yield row_record(line, head, cells)


def _swallows(cells: list[str], columns: int, delimiter: str) -> bool:
    """Return True if a wrong quotation mark joined several rows into one.

    Such a row has too few cells, and its last cell contains lines that look like rows.
    """
    lines = cells[-1].split("\n")[1:] if len(cells) < columns else []
    return any(line.count(delimiter) == columns - 1 for line in lines)


def _head(cells: list[Any]) -> list[str]:
    return [str(cell).strip() or str(number) for number, cell in enumerate(cells)]


def row_record(line: int, head: list[str], cells: list[str]) -> Record:
    """Return a row as a record. If it has too many cells or undecodable bytes, the value is a BadLine."""
    # A delimiter at the end of each row adds an empty cell. Remove such cells.
    while len(cells) > len(head) and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) > len(head):
        return Record(line, BadLine("more cells than the head has", f"{len(cells)} for {len(head)}"), "")
    for name, cell in zip(head, cells):
        if found := BAD_BYTES.search(cell):
            byte, before = ord(found[0]) - 0xDC00, shown_before(cell, found.start())
            return Record(line, BadLine(NOT_TEXT, f"byte 0x{byte:02x} in {name!r}, behind {before}"), "")
    cells = ["" if cell in _MISSING else cell.replace("\r\n", "\n") for cell in cells]
    value = json_object(zip(head, cells))
    return Record(line, value, as_json(value))


# -- Excel ---------------------------------------------------------------------------------------------------


class Sheet(NamedTuple):
    """A sheet of a workbook."""

    records: list[Record]
    notes: tuple[str, ...]  # notes for the user about the sheets that are not read
    is_known: bool  # True if minigpt knows the column names
    has_head: bool | None  # None: the sheet has one column, whose cells are texts
    first_row: tuple[str, ...]


def workbook_records(content: bytes, path: Path, is_head: IsHead) -> Sheet:
    """Read one sheet of a workbook: the first with known column names.

    If there is none, read the first sheet with two or more columns, or else the first that is not empty.

    The column names are in the first row, or in one of the next few rows, below a title. As in CSV, unknown
    names count as column names if there are more than two columns. A sheet of one column is a list of texts.

    Raises:
        InputError: for a damaged workbook, for a zip file that is no workbook, or without python-calamine.
    """
    require_package("python_calamine", f"{path}: reading a workbook", "excel")
    from python_calamine import CalamineWorkbook

    unpacked = 0
    with (
        contextlib.suppress(zipfile.BadZipFile, ValueError, OSError, NotImplementedError),
        zipfile.ZipFile(io.BytesIO(content)) as parts,
    ):
        unpacked = sum(part.file_size for part in parts.infolist())
    require_unpacked(str(path), len(content), unpacked)
    try:
        book = CalamineWorkbook.from_filelike(io.BytesIO(content))
        names = book.sheet_names
        rows = [book.get_sheet_by_name(name).to_python(skip_empty_area=True) for name in names]
    except BaseException as error:  # a panic in python-calamine's Rust code is no `Exception`
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise InputError(f"{path} is no workbook that can be read: {str(error)[:200]}") from None
    if not names:
        raise InputError(f"{path} is a workbook without sheets")
    sheets = [
        _sheet(
            cells, (f"{path}: of {len(names)} sheets, {name!r} is read",) if len(names) > 1 else (), is_head
        )
        for name, cells in zip(names, rows)
    ]
    found = [sheet for sheet in sheets if sheet.records]
    table = [sheet for sheet in found if sheet.has_head is not None]
    return next((sheet for sheet in found if sheet.is_known), (table or found or sheets)[0])


def _sheet(cells: list[list[Any]], notes: tuple[str, ...], is_head: IsHead) -> Sheet:
    texts = [[_cell(cell) for cell in row] for row in cells]
    rows = [(number, row) for number, row in enumerate(texts, 1) if any(cell.strip() for cell in row)]
    width = max((i + 1 for _, row in rows for i, cell in enumerate(row) if cell.strip()), default=0)
    rows = [(number, row[:width]) for number, row in rows]
    first = tuple(rows[0][1]) if rows else ()
    place = _titles([row for _, row in rows], is_head)
    is_known = bool(rows) and is_head([cell.strip().lower() for cell in rows[place][1]])
    if is_known or width > 2:
        head = _head(rows[place][1])
        records = [row_record(number, head, row) for number, row in rows[place + 1 :] if _head(row) != head]
        return Sheet(records, notes, is_known, True, first)
    if width < 2:
        records = [Record(number, text, as_json(text)) for number, (text,) in rows]
        return Sheet(records, notes, False, None, first)
    return Sheet([row_record(number, ["0", "1"], row) for number, row in rows], notes, False, False, first)


def _cell(value: Any) -> str:
    """Return a cell's text as the workbook shows it: "3", not "3.0"."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return "" if value is None else str(value)


# -- Parquet -------------------------------------------------------------------------------------------------


def parquet_records(source: Path | bytes, name: str, is_read: IsHead) -> Iterator[Record]:
    """Yield the rows of a Parquet file, which is read in small batches.

    Args:
        source: path of the file, or its bytes.
        is_read: a function that gets a list with one column name in lower case, and returns True if this
            column should be read. If it returns True for no column, all columns are read.

    Raises:
        InputError: for a damaged file, for a file that claims more content than its size allows, or without
            pyarrow.
    """
    require_package("pyarrow", f"{name}: reading Parquet", "datasets")
    import pyarrow
    import pyarrow.parquet

    try:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        where = str(source) if isinstance(source, Path) else pyarrow.BufferReader(source)
        with pyarrow.parquet.ParquetFile(where) as file:
            names = file.schema_arrow.names
            wanted = [each for each in names if is_read([each.strip().lower()])]
            wanted += [each for each in names if _is_beside(each) and each not in wanted]
            lower = {each.strip().lower() for each in names}
            # If a file has a column such as `user`, but no column such as `assistant`, it is not certain
            # that `user` holds questions. The other columns show whether it does, so all columns are read
            # in this case.
            doubtful = any(name in lower and lower.isdisjoint(PARTNERS[name]) for name in PARTNERS)
            if doubtful or not any(is_read([each.strip().lower()]) for each in wanted):
                wanted = names
            kinds = {each: file.schema_arrow.field(each).type for each in wanted}
            nested = any(map(pyarrow.types.is_nested, kinds.values()))
            # The size is taken from the row groups, not from their columns: in a damaged file, pyarrow can
            # crash when it is asked for a column's size.
            groups = range(file.metadata.num_row_groups)
            require_unpacked(name, size, sum(file.metadata.row_group(i).total_byte_size for i in groups))
            if file.metadata.num_rows > 100 * size:
                raise InputError(f"{name} has {size:,} bytes and claims {file.metadata.num_rows:,} rows")
        # Columns of text are read dictionary-encoded: a text that many rows share is then in memory once.
        types = pyarrow.types
        texts = [each for each, kind in kinds.items() if types.is_string(kind) or types.is_binary(kind)]
        if not isinstance(source, Path):
            where = pyarrow.BufferReader(source)
        number = unpacked = 0
        with pyarrow.parquet.ParquetFile(where, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=16 if nested else 256, columns=wanted):
                for rows in _in_pieces(batch):
                    for row in rows:
                        number += 1
                        unpacked += sum(len(cell) for cell in row.values() if isinstance(cell, str | bytes))
                        yield Record(number, _plain(row), "")
                    require_unpacked(name, size, unpacked)
                if nested:
                    unpacked += batch.nbytes
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise InputError(f"{name} is damaged or no Parquet file: {str(error)[:200]}") from None


def _is_beside(column: str) -> bool:
    name = column.strip().lower()
    return name in (*_BESIDE, *TITLES, *DESCRIPTIONS, *OPTIONS) or bool(OPTION.fullmatch(name))


def _rows_of_batch(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch as dictionaries.

    If a text is not UTF-8, the batch is read again with all texts as bytes. `_plain` decodes these bytes.
    """
    import pyarrow

    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        columns = [
            column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
            for column in batch.columns
        ]
        columns = [
            column.cast(pyarrow.large_binary())
            if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
            else column
            for column in columns
        ]
        rows = pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
    return rows


def _in_pieces(batch: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a batch in groups, so that a group's Python objects do not fill the memory.

    In the file, many rows may share one copy of a text. As Python objects, each row has its own copy.
    """
    import pyarrow
    import pyarrow.compute

    arrays = batch.columns
    shared = [array for array in arrays if pyarrow.types.is_dictionary(array.type) and len(array.dictionary)]
    longest = sum(
        pyarrow.compute.max(pyarrow.compute.binary_length(array.dictionary)).as_py() or 0
        for array in shared
        if pyarrow.types.is_binary(array.dictionary.type) or pyarrow.types.is_string(array.dictionary.type)
    )
    if longest * batch.num_rows > _AT_ONCE:
        step = max(1, _AT_ONCE // longest)
        for begin in range(0, batch.num_rows, step):
            yield _rows_of_batch(batch.slice(begin, step))
        return
    decoded = [
        array.dictionary_decode() if pyarrow.types.is_dictionary(array.type) else array for array in arrays
    ]
    yield _rows_of_batch(pyarrow.RecordBatch.from_arrays(decoded, names=batch.schema.names))


def _plain(value: Any) -> Any:
    """Decode all bytes in a value, because some programs store text as bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def rows_of(rows: Iterable[Any]) -> Iterator[Record]:
    """Yield rows in memory, such as a datasets.Dataset, as records."""
    for number, row in enumerate(rows, 1):
        value = _plain(dict(row)) if hasattr(row, "keys") else row
        yield Record(number, value, "")
