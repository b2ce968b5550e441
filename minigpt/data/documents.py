"""Reads text files as documents, in pieces, so that a file never has to fit into memory.

    for piece in plan_pieces(sources, 16 << 20, any_place=True):
        for text, ends in read_document(sources[piece.source], piece, 1 << 16, any_place=True): ...

A plain text is one document, unless lines such as <|endoftext|> separate several. In a file of records (JSON
Lines, Parquet) each text is a document; see `read_lines`. A byte order mark is removed, and CRLF becomes LF.
All other characters stay as they are.

A text may be cut only where the cut changes no token id. Byte-pair encoding first splits a text into words,
so a cut between two words changes no id. With the rules of GPT-2 and Qwen, these positions are always between
two words:

- after a newline that has characters other than white space on both sides (and no "/" on the right: the rules
  of newer tokenizers can put punctuation, the newline and "/" into one word);
- before a space that has characters other than white space on both sides;
- if there is no such position: before Chinese punctuation that follows a Chinese character.

With more white space beside the newline or the space, a cut could change ids: GPT-2's rules read "\\n\\n" as
one word at the end of a text, but as two words before a letter. A character tokenizer allows a cut anywhere
(`any_place`), but not inside CRLF.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from minigpt.data.json_values import BadLine, parse_line
from minigpt.data.records import whole_text_of
from minigpt.data.tables import parquet_records
from minigpt.errors import InputError
from minigpt.storage.regular_files import open_regular

__all__ = ["Piece", "Source", "plan_pieces", "read_document", "read_lines", "whole_characters"]

Kind = Literal["text", "jsonl", "parquet", "other"]  # other: `decode_sources` must convert the file first
_BLOCK = 1 << 20  # number of bytes per read
_LINE = 1 << 12  # number of bytes read before a cut, to see whether the cut is inside a separator line
_LONGEST = 1 << 26  # if so many bytes have no position where the file may be cut, an error is raised
_CUTS = re.compile(r"(?<=\S)\r?\n(?=[^\s/])|(?<=\S)(?= \S)")
_SPARE_CUTS = re.compile(r"(?<=[\u4e00-\u9fff])(?=[，。！？；：、])")
_CONTINUED = bytes(range(0x80, 0xC0))  # bytes that continue a UTF-8 character

Check = Callable[[str, str], bool]  # (text before a cut, text after it) -> True if the cut is allowed


@dataclass(frozen=True)
class Source:
    """A file of a corpus."""

    path: Path  # the file that is read: the original or its decoded copy
    name: str  # path relative to the corpus's folder, with "/" as separator
    kind: Kind
    size: int  # size of the file `path` in bytes
    mtime_ns: int
    field: str = "text"  # in a file of records: name of the field that holds the text
    separator: str | None = None  # line that separates documents, without trailing blanks; "": an empty line
    origin: Path = dataclasses.field(default_factory=Path)  # the original file
    origin_size: int = 0


class Piece(NamedTuple):
    """Bytes `start` to `stop` of a source. Cutting the text at these two positions changes no token id."""

    source: int  # index of the source in the list of sources
    start: int
    stop: int


# -- where to cut --------------------------------------------------------------------------------------------


def plan_pieces(
    sources: list[Source], size: int, *, any_place: bool, check: Check = lambda left, right: True
) -> list[Piece]:
    """Cut long files into pieces of about `size` bytes each, without reading whole files.

    The pieces depend only on the files, not on the number of processes.

    Args:
        any_place: True: a text may be cut anywhere, but not inside CRLF.
        check: a function that gets the text before and after a cut, and returns True if the cut is allowed.

    Raises:
        InputError: if a long part of a file has no position where it may be cut, or `check` forbids a cut.
    """
    pieces = []
    for number, source in enumerate(sources):
        start = 0
        with open_regular(source.path) as file:
            while source.kind != "parquet" and source.size - start > size * 3 // 2:
                if source.kind == "jsonl":
                    file.seek(start + size)
                    file.readline()
                    stop = file.tell()
                else:
                    stop = _cut_after(file, source, start + size, any_place, check)
                if stop >= source.size:
                    break
                pieces.append(Piece(number, start, stop))
                start = stop
        pieces.append(Piece(number, start, source.size))
    return pieces


def _cut_after(file: BinaryIO, source: Source, target: int, any_place: bool, check: Check) -> int:
    """Return the first position after `target` where the file may be cut, or the file's size."""
    width = 1 << 16
    first = max(0, target - _LINE)
    while True:
        file.seek(first)
        data = file.read(target - first + width)
        is_end = first + len(data) >= source.size
        begin = target - first
        begin += len(data[begin:]) - len(data[begin:].lstrip(_CONTINUED))  # a cut must not split a character
        # Bytes that are not UTF-8 stay in the text as surrogates: an error is raised later, when the piece is
        # read. Here, only lengths in bytes matter.
        before = data[:begin].lstrip(_CONTINUED).decode("utf-8", "surrogateescape")
        text = data[begin:].decode("utf-8", "surrogateescape")
        around = before + text
        for cut in _cuts(text, any_place):
            place = len(before) + cut
            if not _is_in_separator(around, place, source.separator):
                left, right = around[max(0, place - 256) : place], around[place : place + 256]
                _require(check(left.replace("\r\n", "\n"), right.replace("\r\n", "\n")), source)
                return first + begin + len(text[:cut].encode("utf-8", "surrogateescape"))
        if is_end:
            return source.size
        if width >= _LONGEST:
            raise _no_cut(source)
        width *= 8


def _cuts(text: str, any_place: bool) -> Iterator[int]:
    last = len(text) - 4  # no cut after this position: the text that was read may end inside a character
    if any_place:
        yield from (i for i in range(1, last) if text[i - 1] != "\r")
        return
    for pattern in (_CUTS, _SPARE_CUTS):
        yield from (found.end() for found in pattern.finditer(text) if 0 < found.end() < last)


def _is_in_separator(text: str, cut: int, separator: str | None) -> bool:
    """Return True if a cut would split a separator line, or a group of empty lines between documents."""
    if separator is None:
        return False
    begin, end = text.rfind("\n", 0, cut) + 1, text.find("\n", cut)
    return text[begin : end if end >= 0 else len(text)].rstrip() == separator


def _last_cut(text: str, any_place: bool, start: int) -> int:
    """Return the last position after `start` where a text may be cut; 0 if there is none.

    The document continues after the text. So a cut at the end of the text is safe only with `any_place`.
    """
    if any_place:
        return len(text)
    for pattern in (_CUTS, _SPARE_CUTS):
        # Search the last 4096 characters first: they usually have a position to cut. A long search is slow.
        for first in (max(start, len(text) - 4096), start):
            cut = max((m.end() for m in pattern.finditer(text, first)), default=0)
            if cut > first:
                return cut
    return 0


def _no_cut(source: Source) -> InputError:
    return InputError(
        f"{source.origin} runs on for {_LONGEST >> 20} MB without a line's end or a space between words "
        "where byte-pair encoding may be cut; break its lines, or use a character vocabulary"
    )


def _require(allowed: bool, source: Source) -> None:
    if not allowed:
        raise InputError(
            f"{source.origin}: this tokenizer joins what stands on both sides of a line's end or a space, so "
            "that long texts cannot be encoded in pieces; use one that cuts words as GPT-2's or Qwen's does"
        )


# -- plain text ----------------------------------------------------------------------------------------------


def read_document(
    source: Source,
    piece: Piece,
    chunk: int,
    *,
    any_place: bool,
    check: Check = lambda left, right: True,
) -> Iterator[tuple[str, bool]]:
    """Read a piece of a text file in chunks. A document is cut whenever `chunk` characters or more were read.

    All chunks together are the piece's text without separators. Encoding the chunks one by one gives the
    same ids as encoding the whole text. For `any_place` and `check`, see `plan_pieces`.

    Yields: (chunk, False), or ("", True) where a separator ends a document. The end of the file is not
    marked.

    Raises:
        InputError: for bytes that are not UTF-8 text; the message names file, line and column.
    """
    parts = (part for part in _split(source, piece, _decoded(source, piece)) if part != "")
    is_first = piece.start == 0
    for is_separator, group in itertools.groupby(parts, key=lambda part: part is None):
        if not is_separator:
            for text in _chunks(source, filter(None, group), chunk, any_place, check):
                yield text, False
        elif not is_first:  # a separator before the first document ends no document
            yield "", True
        is_first = False


def _split(source: Source, piece: Piece, parts: Iterator[str]) -> Iterator[str | None]:
    """Yield the text without separator lines, and None in place of each separator line."""
    separator = source.separator
    if separator is None:
        yield from parts
        return
    border = re.compile(rf"(?m)^{re.escape(separator)}[ \t]*\n")
    in_line = not _begins_a_line(source, piece)  # True: `held` (text to be yielded) begins inside a line
    held = ""
    for part in parts:
        held += part
        begin, last = 0, held.rfind("\n") + 1
        for found in border.finditer(held, held.find("\n") + 1 if in_line else 0, last):
            yield held[begin : found.start()]
            yield None
            begin = found.end()
        yield held[begin:last]
        in_line = in_line and not last
        held = held[last:]
        may_be_one = separator.startswith(held) or held.rstrip(" \t") == separator
        if in_line or not may_be_one:
            yield held
            held, in_line = "", in_line or bool(held)
    if piece.stop < source.size or held.rstrip(" \t") != separator:
        yield held


def _begins_a_line(source: Source, piece: Piece) -> bool:
    if piece.start == 0:
        return True
    with open_regular(source.path) as file:
        file.seek(piece.start - 1)
        return file.read(1) == b"\n"


def _chunks(source: Source, parts: Iterator[str], chunk: int, any_place: bool, check: Check) -> Iterator[str]:
    text, searched, tail = "", 0, ""
    for part in parts:
        text += part
        while len(text) >= chunk:
            cut = _last_cut(text, any_place, max(searched - 2, 0))
            if not cut:
                searched = len(text)
                if len(text) > _LONGEST:
                    raise _no_cut(source)
                break
            _require(check((tail + text[:cut])[-256:], text[cut : cut + 256]), source)
            yield text[:cut]
            tail, text, searched = text[max(0, cut - 256) : cut], text[cut:], 0
    if text:
        yield text


def _decoded(source: Source, piece: Piece) -> Iterator[str]:
    """Yield the piece's text in blocks, without byte order mark, with CRLF replaced by LF.

    No block ends between CR and LF, because this CRLF would then not be replaced.
    """
    with open_regular(source.path) as file:
        file.seek(piece.start)
        position, carry = piece.start, b""
        while position < piece.stop:
            block = file.read(min(_BLOCK, piece.stop - position))
            if not block:
                raise InputError(f"{source.origin} has become shorter while it was read")
            position += len(block)
            data = carry + block
            begin = position - len(data)
            end = len(data)
            if position < piece.stop:
                end = whole_characters(data)
            good, carry = data[:end], data[end:]
            try:
                text = good.decode("utf-8")
            except UnicodeDecodeError as error:
                line, column = _place(source.path, begin + error.start)
                raise InputError(
                    f"{source.origin}:{line}: not UTF-8: byte 0x{good[error.start]:02x} at column {column}; "
                    "repair that line, or name the encoding of the whole file with --encoding"
                ) from None
            if "\0" in text:
                line, column = _place(source.path, begin + good.index(b"\0"))
                raise InputError(
                    f"{source.origin}:{line}: a zero byte at column {column}: this is no text file"
                )
            if begin == 0:
                text = text.removeprefix("\ufeff")
            yield text.replace("\r\n", "\n")


def whole_characters(data: bytes) -> int:
    """Return how many bytes of `data` are whole UTF-8 characters, without a CR at the end (LF may follow)."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # first byte of a character of 2, 3 or 4 bytes
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if back >= length else len(data) - back
        if byte < 0x80:
            break
    return len(data) - 1 if data.endswith(b"\r") else len(data)


def _place(path: Path, offset: int) -> tuple[int, int]:
    """Return line and column of the byte at `offset`. Both begin at 1; the column is counted in bytes."""
    line, column, left = 1, 1, offset
    with open_regular(path) as file:
        while left > 0:
            block = file.read(min(_BLOCK, left))
            left -= len(block)
            line += block.count(b"\n")
            behind = len(block) - 1 - block.rfind(b"\n")
            column = behind + 1 if b"\n" in block else column + len(block)
    return line, column


# -- records -------------------------------------------------------------------------------------------------


def read_lines(source: Source, piece: Piece) -> Iterator[tuple[int, str | BadLine]]:
    """Yield (number, text or BadLine) for each record. The first line or row of the piece has number 1."""
    if source.kind == "parquet":
        field = source.field.strip().lower()
        for number, value, _ in parquet_records(
            source.path, str(source.origin), lambda names: field in names
        ):
            yield number, _text_or_bad(value, source)
        return
    with open_regular(source.path) as file:
        file.seek(piece.start)
        number = 0
        while file.tell() < piece.stop and (line := file.readline()):
            number += 1
            line = line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, _text_or_bad(parse_line(line), source)
            except BadLine as bad:
                yield number, bad


def _text_or_bad(value: Any, source: Source) -> str | BadLine:
    if isinstance(value, str) and source.path != source.origin:
        return BadLine(value)  # `decode_sources` replaced a bad record by the reason why it is bad
    if not isinstance(value, Mapping):
        return BadLine("not an object")
    try:
        return whole_text_of(value, source.field).replace("\r\n", "\n")
    except BadLine as bad:
        return bad
