"""Text to read: files and folders as documents, in pieces that never need the whole file in memory.

    sources = find_sources(Path("books"))
    for piece in plan_pieces(sources, 16 << 20, any_place=True):
        for document in read_piece(sources[piece.source], piece, 1 << 16, any_place=True):
            for chunk in document: ...

What a document is: a .txt or .md file is one; in a .jsonl or .parquet file each "text" is one. Files of a
folder come in the order of their paths. A byte order mark and the CR of CRLF are no part of the text, as in
minigpt/data/reader.py; nothing else is changed.

Where a text may be cut: byte-pair encoding first cuts a text into words, and a cut at a border between two
words changes no id. Two places are such borders for GPT-2's and Qwen's rules alike, whatever stands around:

- behind a line's end that has something other than white space on both sides ("/" on the right does not
  count: later rules take it to the left);
- before a space that has something other than white space on both sides;
- where those are lacking, before Chinese punctuation that follows a Chinese character.

(White space on either side would not do: GPT-2's rules take "\n\n" at a text's end as one word, and before a
letter as two.) Who encodes characters one by one may cut anywhere (`any_place`) but inside CRLF.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from minigpt.console.terminal import warn
from minigpt.data.formats import BOM, refuse_gb18030, refuse_other_formats
from minigpt.data.parquet import parquet_rows
from minigpt.data.records import BadLine, parse_line, shape_of, text_of
from minigpt.errors import InputError

__all__ = ["Piece", "Source", "find_sources", "plan_pieces", "read_document", "read_lines", "read_texts"]

Kind = Literal["text", "jsonl", "parquet"]
SUFFIXES: dict[str, Kind] = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
_WANTED = "a text in UTF-8"
_BLOCK = 1 << 20  # bytes read at a time
_LONGEST = 1 << 26  # bytes without a place to cut that are still held in memory
_CUTS = re.compile(r"(?<=\S)\r?\n(?=[^\s/])|(?<=\S)(?= \S)")
_SPARE_CUTS = re.compile(r"(?<=[\u4e00-\u9fff])(?=[，。！？；：、])")


class Source(NamedTuple):
    """A file of a corpus."""

    path: Path
    name: str  # below the corpus's folder, with "/"
    kind: Kind
    size: int  # bytes
    mtime_ns: int


class Piece(NamedTuple):
    """Bytes `start` to `stop` of a source; both are places where it may be cut."""

    source: int  # its number
    start: int
    stop: int


def find_sources(path: Path) -> list[Source]:
    """The files of a corpus: the one file given, whatever its name (.jsonl: JSON), or a folder's.

    Raises:
        InputError: if there is none, or one is empty of content, of another format or encoding.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist (looked for it from {Path.cwd()})")
    if path.is_file():
        files = [(path, path.name, SUFFIXES.get(path.suffix, "text"))]
    elif path.is_dir():
        files = _files_below(path)
    else:
        raise InputError(f"{path} is neither a file nor a folder: text is read more than once")
    sources = []
    for file, name, kind in files:
        status = file.stat()
        if not status.st_size and len(files) > 1:
            continue  # an empty document
        with file.open("rb") as opened:
            head = opened.read(4096)
        if not head:
            raise InputError(f"{file} is empty; it needs {_WANTED}")
        if kind != "parquet":
            refuse_other_formats(head, file, _WANTED, "new.txt")
        sources.append(Source(file, name, kind, status.st_size, status.st_mtime_ns))
    if not sources:
        raise InputError(f"{path} holds no text: every file in it is empty")
    return sources


def _files_below(folder: Path) -> list[tuple[Path, str, Kind]]:
    found: list[tuple[str, Path, Kind]] = []
    others: dict[str, int] = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if path.suffix in SUFFIXES:
            found.append((relative.as_posix(), path, SUFFIXES[path.suffix]))
        else:
            others[path.suffix or "without a suffix"] = others.get(path.suffix or "without a suffix", 0) + 1
    kinds = ", ".join(SUFFIXES)
    if not found:
        raise InputError(
            f"{folder} holds no {kinds} file; put UTF-8 text there, or give one file by its name"
        )
    if others:
        left = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items())[:5])
        warn(f"{folder}: files that are not {kinds} are left out: {left}")
    return [(path, name, kind) for name, path, kind in sorted(found)]


def plan_pieces(
    sources: list[Source],
    size: int,
    *,
    any_place: bool,
    check: Callable[[str, str], bool] = lambda left, right: True,
) -> list[Piece]:
    """Cut long files into pieces of about `size` bytes each, without reading them whole.

    The pieces depend on the files alone, not on who works on them.

    Args:
        check: told the text on both sides of a cut, says whether it may be made.

    Raises:
        InputError: if a file has no place to cut for too long.
    """
    pieces = []
    for number, source in enumerate(sources):
        start = 0
        with source.path.open("rb") as file:
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


def _cut_after(
    file: BinaryIO, source: Source, target: int, any_place: bool, check: Callable[[str, str], bool]
) -> int:
    """The first byte behind `target` where the text may be cut, or the file's size."""
    width = 1 << 16
    while True:
        file.seek(target)
        data = file.read(width)
        is_end = target + len(data) >= source.size
        inside = len(data) - len(data.lstrip(bytes(range(0x80, 0xC0))))  # the rest of a character
        # bad bytes are complained about where they are read; here they must only keep their places
        text = data[inside:].decode("utf-8", "surrogateescape")
        cut = _first_cut(text, any_place)
        if cut:
            before = len(text[:cut].encode("utf-8", "surrogateescape"))
            left, right = text[:cut].replace("\r\n", "\n"), text[cut : cut + 256].replace("\r\n", "\n")
            _require(check(left[-256:], right), source)
            return target + inside + before
        if is_end:
            return source.size
        if width >= _LONGEST:
            raise _no_cut(source)
        width *= 8


def _first_cut(text: str, any_place: bool) -> int:
    if any_place:
        return next((i for i in range(1, min(len(text), 4)) if text[i - 1] != "\r"), 0)
    last = len(text) - 4  # behind it a character may be incomplete
    for pattern in (_CUTS, _SPARE_CUTS):
        found = pattern.search(text)
        if found and 0 < found.end() < last:
            return found.end()
    return 0


def _last_cut(text: str, any_place: bool, start: int) -> int:
    """The last place behind `start` where a text that goes on may be cut; 0: none."""
    if any_place:
        return len(text)
    for pattern in (_CUTS, _SPARE_CUTS):
        for first in (max(start, len(text) - 4096), start):  # most often it is near
            cut = max((m.end() for m in pattern.finditer(text, first)), default=0)
            if cut > first:
                return cut
    return 0


def _no_cut(source: Source) -> InputError:
    return InputError(
        f"{source.path} runs on for {_LONGEST >> 20} MB without a line's end or a space between words where "
        "byte-pair encoding may be cut; break its lines, or use a character vocabulary"
    )


def _require(allowed: bool, source: Source) -> None:
    if not allowed:
        raise InputError(
            f"{source.path}: this tokenizer joins what stands on both sides of a line's end or a space, so "
            "that long texts cannot be encoded in pieces; use one that cuts words as GPT-2's or Qwen's does"
        )


def read_document(
    source: Source,
    piece: Piece,
    chunk: int,
    *,
    any_place: bool,
    check: Callable[[str, str], bool] = lambda left, right: True,
) -> Iterator[str]:
    """The text of a piece of a text file, in chunks of at least `chunk` characters but for the last.

    Joined, the chunks of all pieces are the file's text; encoded one by one, they are its ids.

    Raises:
        InputError: for bytes that are no UTF-8 text, with file, line and column.
    """
    text, searched, tail = "", 0, ""
    for part in _decoded(source, piece):
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
    """The piece's text without BOM and with LF alone, in blocks that do not end in CR."""
    with source.path.open("rb") as file:
        file.seek(piece.start)
        position, carry = piece.start, b""
        while position < piece.stop:
            block = file.read(min(_BLOCK, piece.stop - position))
            if not block:
                raise InputError(f"{source.path} has become shorter while it was read")
            position += len(block)
            data = carry + block
            begin = position - len(data)
            end = len(data)
            if position < piece.stop:
                end = _whole(data)
            good, carry = data[:end], data[end:]
            try:
                text = good.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(source, begin + error.start, good[error.start]) from None
            if "\0" in text:
                offset = begin + good.index(b"\0")
                line, column = _place(source.path, offset)
                raise InputError(
                    f"{source.path}:{line}: a zero byte at column {column}: this is no text file"
                )
            if begin == 0:
                text = text.removeprefix("\ufeff")
            yield text.replace("\r\n", "\n")


def _whole(data: bytes) -> int:
    """How many bytes of data end in neither half a character nor a CR whose LF may follow."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # begins a character of 2, 3 or 4 bytes
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if back >= length else len(data) - back
        if byte < 0x80:
            break
    return len(data) - 1 if data.endswith(b"\r") else len(data)


def _not_utf8(source: Source, offset: int, byte: int) -> InputError:
    with source.path.open("rb") as file:
        refuse_gb18030(file, source.path, "new.txt")
    line, column = _place(source.path, offset)
    return InputError(
        f"{source.path}:{line}: not UTF-8: byte 0x{byte:02x} at column {column}; "
        "repair that line, or drop such bytes: iconv -c -f UTF-8 -t UTF-8"
    )


def _place(path: Path, offset: int) -> tuple[int, int]:
    """Line and column (in bytes) of a byte, both from 1."""
    line, column, left = 1, 1, offset
    with path.open("rb") as file:
        while left > 0:
            block = file.read(min(_BLOCK, left))
            left -= len(block)
            line += block.count(b"\n")
            behind = len(block) - 1 - block.rfind(b"\n")
            column = behind + 1 if b"\n" in block else column + len(block)
    return line, column


def read_lines(source: Source, piece: Piece) -> Iterator[tuple[int, str | BadLine]]:
    """The texts of a piece of a JSONL or Parquet file, each with its number within the piece, from 1.

    Raises:
        InputError: if the first object of the piece is a question and answer: those have another way in.
    """
    if source.kind == "parquet":
        for number, row in enumerate(parquet_rows(source.path), 1):
            try:
                yield number, text_of(row, "text").replace("\r\n", "\n")
            except BadLine as bad:
                yield number, bad
        return
    is_known = False
    with source.path.open("rb") as file:
        file.seek(piece.start)
        number = 0
        while file.tell() < piece.stop and (line := file.readline()):
            number += 1
            line = line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(BOM)
            if not line.strip():
                continue
            try:
                _, item = parse_line(line)
                if not is_known and (shape := shape_of(item)):
                    is_known = True
                    if shape != "text":
                        raise InputError(
                            f"{source.path} holds questions and answers, no texts: give it as --train_data"
                        )
                yield number, text_of(item, "text").replace("\r\n", "\n")
            except BadLine as bad:
                yield number, bad


def read_texts(path: Path, strict: bool = False, chunk: int = 1 << 16) -> Iterator[str]:
    """All texts of a corpus, long ones in chunks cut as for byte-pair encoding; bad lines give a warning.

    Raises:
        InputError: as `find_sources` and `read_document`; with `strict` also for the first bad line.
    """
    for number, source in enumerate(find_sources(path)):
        whole = Piece(number, 0, source.size)
        if source.kind == "text":
            yield from read_document(source, whole, chunk, any_place=False)
            continue
        skipped = 0
        for line, text in read_lines(source, whole):
            if isinstance(text, str):
                yield text
            elif strict:
                raise InputError(f"{source.path}:{line}: {text}")
            else:
                skipped += 1
                if skipped == 1:
                    warn(f"{source.path}:{line}: skipped: {text}")
        if skipped > 1:
            warn(f"{source.path}: skipped {skipped:,} lines in all")
