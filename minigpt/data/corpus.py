"""Text to read: files and folders as documents, in pieces that never need the whole file in memory.

    sources = find_sources(Path("books"))
    for piece in plan_pieces(sources, 16 << 20, any_place=True):
        for document in read_piece(sources[piece.source], piece, 1 << 16, any_place=True):
            for chunk in document: ...

A plain text is one document, unless a line of its own, such as <|endoftext|>, separates several. In a file of
records (JSON Lines, Parquet, CSV, ...) each text is one. The content decides what a file is. What is neither
UTF-8 nor JSON Lines nor Parquet is turned into one of these first (`decode_sources`). Files of a folder come
in the order of their paths. A byte order mark and the CR of CRLF are no part of the text; nothing else is
changed.

Where a text may be cut: byte-pair encoding first cuts a text into words, and a cut at a border between two
words changes no id. Two places are such borders for GPT-2's and Qwen's rules alike, whatever stands around:

- behind a line's end that has something other than white space on both sides ("/" on the right does not
  count: later rules take it to the left);
- before a space that has something other than white space on both sides;
- where those are lacking, before Chinese punctuation that follows a Chinese character.

(White space on either side would not do: GPT-2's rules take "\n\n" at a text's end as one word, and before a
letter as two.) An encoder of single characters may cut anywhere (`any_place`) but inside CRLF.
"""

import dataclasses
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from minigpt.console.terminal import note, warn
from minigpt.data.file_formats import BadLine, open_data, parse_line, refuse_foreign, refuse_other_text
from minigpt.data.records import FIELDS, FieldNames, Text, is_head, meaning_of, text_of
from minigpt.data.text_encoding import decode
from minigpt.errors import InputError
from minigpt.storage.files import atomic_open

__all__ = [
    "Piece", "Source", "TextOptions", "decode_sources", "find_sources", "plan_pieces", "read_document",
    "read_lines", "read_texts",
]  # fmt: skip

Kind = Literal["text", "jsonl", "parquet", "other"]  # other: to be decoded first
SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst")
END_OF_TEXT = "<|endoftext|>"
_HEAD = 1 << 16  # bytes by which a file is recognised
_GUESSED = 200  # records by which a text's field is guessed
_BLOCK = 1 << 20  # bytes read at a time
_LONGEST = 1 << 26  # bytes without a place to cut that are still held in memory
_CUTS = re.compile(r"(?<=\S)\r?\n(?=[^\s/])|(?<=\S)(?= \S)")
_SPARE_CUTS = re.compile(r"(?<=[\u4e00-\u9fff])(?=[，。！？；：、])")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How the files of a corpus are to be read."""

    encoding: str = ""
    """encoding of text files, such as gb18030 or big5; left out: found out"""
    text_field: str = ""
    """name of the field that holds the text; left out: text and its like, or the longest"""
    document_separator: str = "auto"
    """a line that separates documents, or blank for empty lines, or none; auto: <|endoftext|>"""


@dataclass(frozen=True)
class Source:
    """A file of a corpus."""

    path: Path  # what is read: the file, or its decoded copy
    name: str  # below the corpus's folder, with "/"
    kind: Kind
    size: int  # bytes of `path`
    mtime_ns: int
    field: str = "text"  # of records: where the text stands
    separator: str | None = None  # a line between documents; "": an empty line
    origin: Path = dataclasses.field(default_factory=Path)  # the file itself
    origin_size: int = 0

    @property
    def is_whole(self) -> bool:
        """Is the file one document?"""
        return self.separator is None


class Piece(NamedTuple):
    """Bytes `start` to `stop` of a source; both are places where it may be cut."""

    source: int  # its number
    start: int
    stop: int


def find_sources(path: Path, options: TextOptions = TextOptions()) -> list[Source]:
    """The files of a corpus: the one file given, or a folder's.

    Raises:
        InputError: if there is none, or one holds questions and answers, or is no text at all.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist (looked for it from {Path.cwd()})")
    if path.is_file():
        files = [(path, path.name)]
    elif path.is_dir():
        files = _files_below(path)
    else:
        raise InputError(f"{path} is neither a file nor a folder: text is read more than once")
    sources = [_source(file, name, options) for file, name in files if file.stat().st_size or len(files) == 1]
    if not sources:
        raise InputError(f"{path} holds no text: every file in it is empty")
    return sources


def _files_below(folder: Path) -> list[tuple[Path, str]]:
    if (folder / "config.json").exists():
        raise InputError(f"{folder} is a model's folder, not text to learn from")
    found: list[tuple[str, Path]] = []
    others: dict[str, int] = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        packed = path.suffix.lower() in PACKED
        suffix = (path.with_suffix("") if packed else path).suffix.lower()
        if suffix in SUFFIXES:
            found.append((relative.as_posix(), path))
        else:
            others[path.suffix or "without a suffix"] = others.get(path.suffix or "without a suffix", 0) + 1
    kinds = ", ".join(SUFFIXES)
    if not found:
        raise InputError(f"{folder} holds no {kinds} file; put texts there, or give one file by its name")
    if others:
        left = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items())[:5])
        warn(f"{folder}: files that are not {kinds} are left out: {left}")
    return [(path, name) for name, path in sorted(found)]


def _source(path: Path, name: str, options: TextOptions) -> Source:
    """Recognise a file by its beginning."""
    status = path.stat()
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise InputError(f"{path} is empty; it needs a text")
    refuse_foreign(head, path)
    source = Source(
        path, name, "other", status.st_size, status.st_mtime_ns, origin=path, origin_size=status.st_size
    )
    if head.startswith(b"PAR1"):
        return replace(source, kind="parquet", field=_field(path, options))
    if options.encoding or not _is_utf8(path, head):
        return source
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] in (b"{", b"["):
        first = start.split(b"\n", 1)[0]
        try:
            _, value = parse_line(first)
        except BadLine:
            return source  # JSON over several lines
        if isinstance(value, dict) and len(first) < len(start) - 1:
            return replace(source, kind="jsonl", field=_field(path, options))
        return source
    text = head.decode("utf-8", "ignore")
    if path.suffix.lower() in (".csv", ".tsv"):
        return source
    refuse_other_text(text, path)
    return replace(source, kind="text", separator=_separator(text, options))


def _separator(text: str, options: TextOptions) -> str | None:
    wanted = options.document_separator
    if wanted == "auto":
        return END_OF_TEXT if re.search(rf"(?m)^{re.escape(END_OF_TEXT)}\r?$", text) else None
    return {"none": None, "blank": ""}.get(wanted, wanted)


def _is_utf8(path: Path, head: bytes) -> bool:
    """Is it neither compressed nor in another encoding? (The reader names single bad bytes later.)"""
    if b"\0" in head[:4096] or head.startswith(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
    ):
        return False
    try:
        head[: len(head) - 4 if len(head) == _HEAD else None].decode("utf-8")
        return True
    except UnicodeDecodeError:
        return decode(path.read_bytes(), str(path))[1] == "utf-8"


def _field(path: Path, options: TextOptions) -> str:
    """Where the texts of a file of records stand.

    Raises:
        InputError: if it holds questions and answers.
    """
    if options.text_field:
        return options.text_field
    records = open_data(path, options.encoding, is_head, only_beginning=True).records
    samples = [record.value for record in itertools.islice(records, _GUESSED)]
    return _guessed(path, samples)


def _guessed(path: Path, samples: list[Any]) -> str:
    lengths: dict[str, int] = {}
    for value in samples:
        if not isinstance(value, Mapping):
            continue
        try:
            if not isinstance(meaning_of(value, FieldNames()), Text):
                raise InputError(f"{path} holds questions and answers, no texts: give it as --train_data")
        except BadLine:
            pass
        for key, part in value.items():
            if isinstance(part, str):
                lengths[key] = lengths.get(key, 0) + len(part)
    known = next((key for name in FIELDS["text"] for key in lengths if key.strip().lower() == name), None)
    if known is not None or not lengths:
        return known or "text"
    guessed = max(lengths, key=lambda key: lengths[key])
    warn(f"{path}: the texts are taken from {guessed!r}, the longest field; another one: --text_field NAME")
    return guessed


def decode_sources(sources: list[Source], folder: Path, options: TextOptions) -> list[Source]:
    """The same sources, with copies in UTF-8 below `folder` of those that are something else.

    Raises:
        InputError: for a file that cannot be decoded or holds no text.
    """
    return [
        _decoded_copy(source, folder / f"{number:05d}", options) if source.kind == "other" else source
        for number, source in enumerate(sources)
    ]


def _decoded_copy(source: Source, target: Path, options: TextOptions) -> Source:
    path = source.origin
    data = open_data(path, options.encoding, is_head)
    for sentence in data.notes:
        note(sentence)
    target.parent.mkdir(parents=True, exist_ok=True)
    if data.kind == "text":
        (record,) = data.records
        text = str(record.value)
        with atomic_open(target) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
        status = target.stat()
        separator = _separator(text, options)
        return replace(source, path=target, kind="text", size=status.st_size, separator=separator)
    records = list(data.records)
    field = options.text_field or _guessed(path, [record.value for record in records[:_GUESSED]])
    count = 0
    with atomic_open(target) as file:
        for _, value, _ in records:
            if isinstance(value, BadLine):
                line: Any = None  # a bad record stays one, so that it is counted
            elif isinstance(value, str):
                line = {field: value}
            else:
                line = {field: value[field]} if isinstance(value, Mapping) and field in value else {}
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")
            count += bool(line)
    if not count:
        raise InputError(f"{path} holds no text under {field!r}; name another field with --text_field")
    return replace(source, path=target, kind="jsonl", size=target.stat().st_size, field=field)


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
) -> Iterator[tuple[str, bool]]:
    """The text of a piece of a text file, in chunks of at least `chunk` characters but for the last of a
    document.

    Joined, the chunks of all pieces are the file's text without its separators; encoded one by one, they are
    its ids.

    Yields: chunks, and whether a document ends behind each. (The end of the file is the caller's to know.)

    Raises:
        InputError: for bytes that are no UTF-8 text, with file, line and column.
    """
    parts = _decoded(source, piece)
    if source.separator is None:
        for text in _chunks(source, parts, chunk, any_place, check):
            yield text, False
        return
    # a separator is a whole line: what may be a beginning of one is held back
    line = rf"{re.escape(source.separator)}[ \t]*\n" if source.separator else r"(?:[ \t]*\n)+"
    border = re.compile(rf"(?m)^{line}")
    held = ""
    for part in parts:
        held += part
        begin = 0
        last = held.rfind("\n") + 1  # whole lines
        for found in border.finditer(held, 0, last):
            if found.start() > begin:
                yield from (
                    (text, False)
                    for text in _chunks(source, iter([held[begin : found.start()]]), chunk, any_place, check)
                )
            yield "", True
            begin = found.end()
        if last - begin > chunk:
            yield from (
                (text, False) for text in _chunks(source, iter([held[begin:last]]), chunk, any_place, check)
            )
            begin = last
        held = held[begin:]
    rest = held.removesuffix(source.separator) if held.rstrip() == source.separator.strip() else held
    if rest:
        yield rest, False


def _chunks(
    source: Source, parts: Iterator[str], chunk: int, any_place: bool, check: Callable[[str, str], bool]
) -> Iterator[str]:
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
    """The piece's text without BOM and with LF alone, in blocks that do not end in CR."""
    with source.path.open("rb") as file:
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
    line, column = _place(source.path, offset)
    return InputError(
        f"{source.path}:{line}: not UTF-8: byte 0x{byte:02x} at column {column}; repair that line, or name "
        "the encoding of the whole file with --encoding"
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
    """The texts of a piece of a JSONL or Parquet file, each with its number within the piece, from 1."""
    if source.kind == "parquet":
        for number, value, _ in open_data(source.path, "", lambda row: source.field in row).records:
            yield number, _text_or_bad(value, source.field)
        return
    with source.path.open("rb") as file:
        file.seek(piece.start)
        number = 0
        while file.tell() < piece.stop and (line := file.readline()):
            number += 1
            line = line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, _text_or_bad(parse_line(line)[1], source.field)
            except BadLine as bad:
                yield number, bad


def _text_or_bad(value: Any, field: str) -> str | BadLine:
    try:
        if isinstance(value, BadLine):
            return value
        if not isinstance(value, Mapping):
            return BadLine("not an object")
        return text_of(value, field).replace("\r\n", "\n")
    except BadLine as bad:
        return bad


def read_texts(
    path: Path,
    strict: bool = False,
    chunk: int = 1 << 16,
    options: TextOptions = TextOptions(),
) -> Iterator[str]:
    """All texts of a corpus, long ones in chunks cut as for byte-pair encoding; bad lines give a warning.

    Raises:
        InputError: as `find_sources` and `read_document`; with `strict` also for the first bad line.
    """
    with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
        for number, source in enumerate(decode_sources(find_sources(path, options), Path(folder), options)):
            whole = Piece(number, 0, source.size)
            if source.kind == "text":
                for text, _ in read_document(source, whole, chunk, any_place=False):
                    if text:
                        yield text
                continue
            skipped = 0
            for line, found in read_lines(source, whole):
                if isinstance(found, str):
                    yield found
                elif strict:
                    raise InputError(f"{source.origin}:{line}: {found}")
                else:
                    skipped += 1
                    if skipped == 1:
                        warn(f"{source.origin}:{line}: skipped: {found}")
            if skipped > 1:
                warn(f"{source.origin}: skipped {skipped:,} lines in all")
