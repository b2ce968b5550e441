"""Recognises the format of a data file by its content, not by its name, and reads the records.

    data = open_data(Path("questions.csv"))
    data.kind, data.encoding                   # "csv", "gb18030"
    for record in data.records: ...            # Record(line, value, raw); the value may be a BadLine

The steps are: decompress, decode, recognise the format. Formats are JSON and JSON Lines (json_values.py);
CSV, TSV, Excel and Parquet (tables.py); tables drawn with characters (drawn_tables.py); chat logs
(chat_logs.py); and plain text. The module records.py interprets the records.

All files except Parquet are read whole, so their size is limited. corpus.py reads long plain texts and JSON
Lines in pieces.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import re
import shlex
import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from minigpt.data.drawn_tables import drawn_tables
from minigpt.data.json_values import Record, json_records, looks_like_json
from minigpt.data.study_files import cards_in, spoken_text
from minigpt.data.tables import (
    IsHead,
    csv_records,
    parquet_records,
    require_package,
    require_unpacked,
    suffix_of,
    table_in,
    workbook_records,
)
from minigpt.data.text_encoding import decode, shown_name
from minigpt.errors import InputError, Message
from minigpt.storage.files import sha256
from minigpt.storage.regular_files import open_regular

__all__ = [
    "COMPRESSED", "DataFile", "open_data", "read_bytes", "refuse_foreign", "refuse_other_text",
    "refuse_piece_of_page",
]  # fmt: skip

# "table": a table drawn with characters, such as Markdown's. "chat": a chat log. "json": one JSON value.
Kind = Literal["jsonl", "json", "csv", "table", "xlsx", "parquet", "text", "chat"]
_OF_RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
_MOST = 4 << 30  # largest size in bytes of a file that is read as a whole, before and after decompression
# Number of bytes per call of read(). It is not larger, because read() reserves this much memory even if the
# file is small.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """A data file whose format was recognised."""

    kind: Kind
    encoding: str  # Python's name of the encoding; "" if the format defines its own
    records: Iterable[Record]  # a plain text is one record
    sha256: str  # SHA-256 of the file's bytes
    notes: tuple[str, ...] = ()  # sentences for the user about how the file is read
    has_head: bool | None = None  # for CSV and workbooks: False if there are no column names
    first_row: tuple[str, ...] = ()  # cells of the first row, if there are no column names


# -- bytes -------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """Read all bytes of a regular file, or of a pipe that the shell passes as <(...) or /dev/stdin.

    Raises:
        InputError: if the path is missing, a folder, a device or a named pipe, or too large.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(_folder_sentence(path))
        if status.st_size > _MOST:
            raise _too_large(f"{path} has {status.st_size >> 30} GiB")
        with open_regular(path, or_pipe=True) as file:
            return _all_of(file, f"{path} has")
    except InputError:  # an InputError is a ValueError: `except (OSError, ValueError)` would catch it, too
        raise
    except FileNotFoundError:
        raise InputError(
            Message("{path} does not exist (looked for it from {folder})", path=path, folder=Path.cwd())
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _all_of(file: BinaryIO, what: str, packed: int | None = None) -> bytes:
    """Read a file to its end.

    Args:
        what: beginning of the error message for a file that is too large.
        packed: size of the compressed file in bytes; None: the file is not compressed.
    """
    buffer = io.BytesIO()
    while block := file.read(_BLOCK):
        buffer.write(block)
        if packed is not None:
            require_unpacked(what.removesuffix(" unpacks to"), packed, buffer.tell())
        if buffer.tell() > _MOST:
            raise _too_large(f"{what} more than {_MOST >> 30} GiB")
    return buffer.getvalue()


def _too_large(what: str) -> InputError:
    return InputError(f"{what}; more than {_MOST >> 30} are not read whole: cut it into several files")


def _folder_sentence(path: Path) -> str:
    if (path / "config.json").exists():
        return Message("{path} is a model's folder, not data", path=path)
    files = [file for file in sorted(path.iterdir()) if suffix_of(file) in _OF_RECORDS]
    if files:
        text = "{path} is a folder; give one of its files, such as {file}{more}"
        is_lines = len(files) > 1 and all(suffix_of(file) == ".jsonl" for file in files)
        joined = Message("; or join them: cat {path}/*.jsonl > all.jsonl", path=shlex.quote(str(path)))
        return Message(text, path=path, file=files[0], more=joined if is_lines else "")
    return Message(
        "{path} is a folder; give a file. To learn from a folder of texts: {command}",
        path=path,
        command=advised("train --text", path),
    )


def advised(command: str, path: Path, encoding: str = "") -> str:
    """Return a minigpt command for an error message, with the path quoted for the shell.

    >>> advised("train --text", Path("my book.txt"), "big5")
    "minigpt train --text 'my book.txt' --encoding big5"
    """
    more = f" --encoding {encoding}" if encoding else ""
    return f"minigpt {command} {shlex.quote(str(path))}{more}"


# first bytes of a compressed file -> method of compression
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _decompressed(data: bytes, name: str) -> tuple[bytes, str]:
    """Return the decompressed bytes and the method; or the bytes unchanged and "" if not compressed.

    Raises:
        InputError: for damaged data, for too much data, or for zstd without pyarrow.
    """
    method = next((method for mark, method in COMPRESSED.items() if data.startswith(mark)), "")
    if not method:
        return data, ""
    try:
        if method == "zstd":
            require_package("pyarrow", f"{name}: reading zstd", "datasets")
            import pyarrow

            stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd")
        else:
            openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
            stream = openers[method](io.BytesIO(data))
        with stream as file:
            return _all_of(file, f"{name} unpacks to", packed=len(data)), method
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{name} is damaged {method} data: {error}") from None


# -- formats -----------------------------------------------------------------------------------------------

_FOREIGN = {  # first bytes of a file -> name of its format, which minigpt does not read
    b"%PDF": "a PDF file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x80\x02": "a pickle",
    b"GGUF": "a GGUF model",
    b"\x7fELF": "a program",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"{\\rtf": "an RTF document (save it as text)",
}
# `_TAG`: an HTML tag with which a page's body may begin. `_ANY_TAG`: any HTML tag.
_TAG = re.compile(r"<(body|div|section|article|main|table|ul|ol|p|h[1-6]|span)(?:\s[^<>]*)?>")
_ANY_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
_FEWEST_TAGS = 3  # a text with fewer lines that begin with a tag is no piece of a web page
# Suffixes of files that may contain HTML tags: Markdown and the cells of tables use tags for their layout.
_MAY_HOLD_TAGS = (".md", ".markdown", ".mdx", ".csv", ".tsv")
_ZIPPED = {"word/": "a Word document (save it as text)", "ppt/": "a presentation", "OEBPS/": "an EPUB book"}
_XLSX, _XLS = b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def open_data(
    path: Path, encoding: str = "", is_head: IsHead = lambda cells: False, needs_head: bool = False
) -> DataFile:
    """Recognise the format of a file, and open its records.

    Args:
        encoding: encoding of the text; "": detect it.
        is_head: a function with two uses. For a text table: it gets the cells of the first row in lower case,
            and returns True if they are column names. For Parquet: it is called once for each column name,
            and returns True if this column should be read.
        needs_head: if True, tab-separated lines without column names are plain text, unless the file's name
            ends in .csv or .tsv.

    Raises:
        InputError: for a folder, an empty or binary file, an LFS pointer, or a web page.
    """
    if _is_parquet(path):
        return DataFile("parquet", "", parquet_records(path, str(path), is_head), sha256(path))
    data = read_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if not data:
        raise InputError(f"{path} is empty")
    content, method = _decompressed(data, str(path))
    notes = [f"{path}: {method} data"] if method else []
    refuse_foreign(content, path)
    if content.startswith(b"PAR1"):
        return DataFile("parquet", "", parquet_records(content, str(path), is_head), digest, tuple(notes))
    if content.startswith((_XLSX, _XLS)):
        _refuse_archive(content, path)
        sheet = workbook_records(content, path, is_head)
        return DataFile(
            "xlsx", "", sheet.records, digest, (*notes, *sheet.notes), sheet.has_head, sheet.first_row
        )
    text, codec = decode(content, str(path), encoding)
    if codec not in ("utf-8", "ascii") and not encoding:
        notes.append(f"{path}: read as {shown_name(codec)}")
    if not text.strip():
        raise InputError(f"{path} holds nothing but white space")
    refuse_other_text(text, path)
    if looks_like_json(text):
        kind, records = json_records(text, is_head)
        return DataFile(kind, codec, records, digest, tuple(notes))
    if cards := cards_in(text):
        notes.append(Message("{path}: {count:,} cards of Anki", path=path, count=len(cards)))
        return DataFile("csv", codec, cards, digest, tuple(notes))
    if (said := spoken_text(text)) is not None:
        notes.append(Message("{path}: subtitles, read without their times", path=path))
        return DataFile("text", codec, [Record(1, said, "")], digest, tuple(notes))
    if drawn := drawn_tables(text, path, is_head, needs_head):
        return DataFile("table", codec, drawn.records, digest, (*notes, *drawn.notes))
    if table := table_in(text, path, is_head, needs_head):
        records = csv_records(text, table)
        return DataFile("csv", codec, records, digest, tuple(notes), table.has_head, table.first_row)
    refuse_piece_of_page(text, path)
    return DataFile("text", codec, [Record(1, text, "")], digest, tuple(notes))


def _refuse_archive(content: bytes, path: Path) -> None:
    """Raise InputError for a zip file that is no workbook. A damaged zip file gives an error later."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    if any(name.startswith(("xl/", "content.xml")) for name in names):
        return
    kinds = [kind for start, kind in _ZIPPED.items() if any(name.startswith(start) for name in names)]
    what = "an EPUB book" if "mimetype" in names else next(iter(kinds), "a zip archive (unpack it)")
    raise InputError(f"{path} is {what}, not data to learn from")


def _is_parquet(path: Path) -> bool:
    with contextlib.suppress(OSError):  # a file that cannot be read is reported later, by `read_bytes`
        if path.is_file():
            with open_regular(path) as file:
                return file.read(4) == b"PAR1"
    return False


def refuse_foreign(content: bytes, path: Path) -> None:
    """Raise InputError if the first bytes are those of a PDF, a picture, a model or another known format."""
    for mark, what in _FOREIGN.items():
        if content.startswith(mark):
            raise InputError(f"{path} is {what}, not data to learn from")


def refuse_other_text(text: str, path: Path) -> None:
    """Raise InputError for text that is not data: an LFS pointer or a web page."""
    start = text[:512].lstrip().lower()
    if start.startswith("version https://git-lfs.github.com/spec/"):
        raise InputError(f"{path} is a Git LFS pointer, not the data itself: fetch it with `git lfs pull`")
    page = ("<!doctype html", "<html", *(() if suffix_of(path) in _MAY_HOLD_TAGS else ("<table",)), "<?xml")
    is_table = "<table" in text[:_BLOCK].lower() or "mso-application" in start
    if start.startswith(page) and is_table:
        raise InputError(
            f"{path} is a web page or XML with a table: open it in Excel and save it as .xlsx, or download "
            "the file behind it"
        )
    if start.startswith("<?xml"):
        raise InputError(
            f"{path} is XML, and its marks would be learned as text: save what it holds as CSV or text"
        )
    if start.startswith(("<!doctype html", "<html")):
        raise InputError(f"{path} is a web page, not the file behind it: download it again")


def refuse_piece_of_page(text: str, path: Path) -> None:
    """Raise InputError for text that is no table and whose lines are mostly HTML.

    The README of many projects begins with a few lines of HTML: these are no reason to refuse it.
    """
    sample = text[:_BLOCK]
    tag = _TAG.match(sample[:512].lstrip().lower())
    if tag is None or f"</{tag[1]}>" not in sample.lower() or suffix_of(path) in _MAY_HOLD_TAGS:
        return
    lines = [line.strip() for line in sample.split("\n") if line.strip()]
    marked = sum(bool(_ANY_TAG.match(line)) for line in lines)
    if marked >= max(_FEWEST_TAGS, len(lines) / 2):
        raise InputError(
            f"{path} is a piece of a web page, and its marks would be learned as text: save what it holds as "
            "text"
        )
