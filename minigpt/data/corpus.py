"""Finds the text files of a corpus, and recognises their formats.

    for text in read_texts(Path("books")): ...    # all texts of a folder or a file

    sources = find_sources(Path("books"))         # the files, with their formats
    sources = decode_sources(sources, Path("decoded"), TextOptions())

The format of a file is recognised by its content. Plain text in UTF-8, JSON Lines and Parquet are read in
pieces, so they may be larger than the memory (see documents.py). `decode_sources` first converts files of
all other formats to one of these. The files of a folder are sorted by path.
"""

import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from minigpt.console.terminal import note, warn
from minigpt.data.chat_logs import holds_chat, message_columns
from minigpt.data.documents import Piece, Source, read_document, read_lines, whole_characters
from minigpt.data.drawn_tables import drawn_tables
from minigpt.data.field_names import FIELDS, FieldNames, head_test, is_head
from minigpt.data.file_formats import (
    COMPRESSED,
    DataFile,
    advised,
    open_data,
    refuse_foreign,
    refuse_other_text,
    refuse_piece_of_page,
)
from minigpt.data.json_values import BadLine, Record, as_json, looks_like_json, parse_line, shown_before
from minigpt.data.marked_turns import name_of_marks
from minigpt.data.nested_records import is_message_tree, unfolded
from minigpt.data.records import Text, meaning_of
from minigpt.data.study_files import cards_in, spoken_text
from minigpt.data.tables import IsHead, parquet_records, suffix_of, table_in
from minigpt.data.text_encoding import BAD_BYTES, is_mostly_utf8, shown_name
from minigpt.errors import InputError, Message
from minigpt.storage.files import atomic_open
from minigpt.storage.json_files import reading
from minigpt.storage.regular_files import open_regular

__all__ = [
    "QuietTextOptions", "Recognised", "TextOptions",
    "decode_sources", "find_sources", "read_sources", "read_texts", "recognise",
]  # fmt: skip

SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
_JSON = (".json", ".jsonl", ".ndjson")
END_OF_TEXT = "<|endoftext|>"
_HEAD = 1 << 16  # number of bytes that are read to recognise a file
_GUESSED = 200  # number of records that are read to find out which field holds the text
# `_LOST`: U+FFFD, which stands for a lost character. `_LINES`: the largest number of lines
# with this character that a warning lists.
_LOST, _LINES = "\ufffd".encode(), 5
_BLOCK = 1 << 20  # number of bytes per read
_NUMBER = re.compile(r"[\d\s.,:/%+-]*")  # matches numbers, dates and times: they are no text to learn from
_LONGEST = 1 << 26  # limit in bytes for reading one line, and for the sample of a file's first records


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options for reading the files of a corpus."""

    encoding: str = ""
    """encoding of text files, such as gb18030 or big5; "": detect it"""
    text_field: str = ""
    """name of the field that holds the text; "": a usual name such as text, or the longest field"""
    document_separator: str = "auto"
    """the line that separates documents; auto: <|endoftext|>; blank: an empty line; none: no separator"""

    is_quiet: ClassVar[bool] = False  # True: print no notes about the files (see QuietTextOptions)

    @property
    def separator(self) -> str | None:
        """Return the separator line; "": an empty line; None: each file is one document."""
        special = {"auto": END_OF_TEXT, "none": None, "blank": ""}
        return special.get(self.document_separator, self.document_separator.rstrip())


class QuietTextOptions(TextOptions):
    """Options for reading files a second time: the notes about the files are not printed again."""

    is_quiet = True


def find_sources(path: Path, options: TextOptions = TextOptions()) -> list[Source]:
    """Find the files of a corpus. The path is one file or a folder.

    Raises:
        InputError: if there is no text, or a file holds questions and answers or is not text.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist (looked for it from {Path.cwd()})")
    if path.is_file():
        files = [(path, path.name)]
    elif path.is_dir():
        files = _files_below(path)
    else:
        raise InputError(f"{path} is no file, and texts are read more than once: write it into a file first")
    sources = [source for file, name in files if (source := _source(file, name, options))]
    if sources:
        return sources
    if path.is_dir():
        raise InputError(f"{path} holds no text: every file in it is empty")
    raise InputError(f"{path} {'holds nothing but white space' if path.stat().st_size else 'is empty'}")


def _files_below(folder: Path) -> list[tuple[Path, str]]:
    if (folder / "config.json").exists():
        raise InputError(f"{folder} is a model's folder, not text to learn from")
    found: list[tuple[str, Path]] = []
    others: dict[str, int] = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if suffix_of(path) in SUFFIXES:
            found.append((relative.as_posix(), path))
        else:
            others[path.suffix or "without a suffix"] = others.get(path.suffix or "without a suffix", 0) + 1
    kinds = ", ".join(SUFFIXES)
    if not found:
        raise InputError(f"{folder} holds no {kinds} file; put texts there, or give one file by its name")
    if others:
        left = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items())[:5])
        text = "{folder}: files that are not {kinds} are left out: {left}"
        warn(Message(text, folder=folder, kinds=kinds, left=left))
    return [(path, name) for name, path in sorted(found)]


def _source(path: Path, name: str, options: TextOptions) -> Source | None:
    """Recognise a file, and find the field of its texts. Return None for a file without text."""
    source = _recognised(path, name, options)
    if source is not None and source.kind == "text" and suffix_of(path) in _JSON and not options.is_quiet:
        warn(f"{path} is no JSON, though it is named so: it is read as plain text")
    if source is None or source.kind in ("text", "other"):
        return source
    return replace(source, field=_field(path, _sample(source), options))


def _recognised(
    path: Path, name: str, options: TextOptions, is_head: IsHead = is_head, needs_head: bool = True
) -> Source | None:
    """Recognise a file by its first bytes. Return None for an empty or blank file.

    Args:
        is_head: a function: gets the cells of a table's first row, returns True if they are column names.
        needs_head: if True, tab-separated lines without column names are plain text.
    """
    with reading(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        source = Source(path, name, "other", size, status.st_mtime_ns, origin=path, origin_size=size)
        head = file.read(_HEAD)
        if len(head) == size and not head.removeprefix(b"\xef\xbb\xbf").strip():
            return None
        refuse_foreign(head, path)
        if head.startswith(b"PAR1"):
            return replace(source, kind="parquet")
        if options.encoding or not _is_utf8(head):
            return source
        text = head.decode("utf-8-sig", "ignore")
        if looks_like_json(text):
            return replace(source, kind="jsonl") if _are_lines(file) else source
    if drawn_tables(text, path, is_head, needs_head) or cards_in(text) or spoken_text(text) is not None:
        return source
    if table_in(text, path, is_head, needs_head, is_whole=size == len(head)):
        return source
    refuse_other_text(text, path)
    refuse_piece_of_page(text, path)
    return replace(source, kind="text", separator=options.separator)


def _is_utf8(head: bytes) -> bool:
    """Return True if the first bytes of a file are UTF-8 text: not compressed, in no other encoding.

    A few bad bytes are allowed here: the code that reads the whole file reports them.
    """
    if b"\0" in head[:4096] or head.startswith((*COMPRESSED, b"PK\x03\x04")):
        return False
    head = head[: whole_characters(head)]
    try:
        head.decode("utf-8")
    except UnicodeDecodeError:
        return is_mostly_utf8(head)
    return True


def _are_lines(file: BinaryIO) -> bool:
    """Return True if most of the first lines are JSON objects, even if the very first line is broken."""
    file.seek(0)
    lines = (line for line in iter(lambda: file.readline(_LONGEST), b"") if line.strip())
    first = next(lines, b"")
    if isinstance(_value_or_none(first), dict):
        return next(lines, None) is not None
    if not first.strip(b"[ \t\r\n"):  # the first line is only "[": a JSON array, not JSON Lines
        return False
    some = [first, *itertools.islice(lines, 19)]
    return 2 * sum(isinstance(_value_or_none(line), dict) for line in some) > len(some)


def _value_or_none(line: bytes) -> Any:
    try:
        return parse_line(line)
    except BadLine:
        return None


def _sample(source: Source) -> list[Any]:
    """Return the values of the first records of a JSONL or Parquet file."""
    if source.kind == "parquet":
        records = parquet_records(source.path, str(source.path), lambda names: True)
        return [record.value for record in itertools.islice(records, _GUESSED)]
    values: list[Any] = []
    with reading(source.path) as file:
        while len(values) < _GUESSED and file.tell() < _LONGEST and (line := file.readline()):
            values.append(_value_or_none(line))
    return values


class Recognised(NamedTuple):
    """The kind of a data file: texts or conversations."""

    holds_texts: bool  # True: plain text, or records with texts; False: conversations
    # The open file, if it had to be read as a whole. Its records can be iterated only once.
    opened: DataFile | None = None


def recognise(
    path: Path,
    options: TextOptions = TextOptions(),
    names: FieldNames = FieldNames(),  # noqa: B008 -- frozen
) -> Recognised:
    """Find out whether a file holds texts or conversations. The first good record decides.

    If the options name the field of the text, the file holds texts.

    Raises:
        InputError: if the file cannot be read, or is not data, such as a picture.
    """
    test, is_named = head_test(names), bool(options.text_field)
    source = _recognised(path, path.name, options, test, needs_head=is_named)
    if source is None:
        return Recognised(is_named)
    if source.kind == "text":
        with reading(path) as file:
            return Recognised(is_named or not holds_chat(file.read(_HEAD).decode("utf-8-sig", "ignore")))
    if source.kind != "other":
        return Recognised(is_named or _are_texts(_sample(source), names))
    data = open_data(path, options.encoding, test, needs_head=is_named)
    records = iter(data.records)
    first = list(itertools.islice(records, _GUESSED))
    data = replace(data, records=itertools.chain(first, records))
    if data.kind == "text":
        return Recognised(is_named or not holds_chat(str(first[0].value)), data)
    return Recognised(is_named or _are_texts([record.value for record in first], names), data)


def _are_texts(values: list[Any], names: FieldNames) -> bool:
    if message_columns(values, names) or is_message_tree(values):
        return False
    if not names.question:
        values = [record.value for record in unfolded(Record(0, value, "") for value in values)]
    for value in values:
        try:
            if not isinstance(value, BadLine):
                meaning = meaning_of(value, names)
                return isinstance(meaning, Text) and not name_of_marks(meaning)
        except BadLine:
            continue
    return False


def _field(path: Path, samples: list[Any], options: TextOptions) -> str:
    """Return the name of the field that holds the texts of some records.

    Raises:
        InputError: if the records are questions and answers.
    """
    if options.text_field:
        return options.text_field
    lengths: dict[str, int] = {}
    for _, value, _ in unfolded(Record(0, value, "") for value in samples):
        try:
            if not isinstance(meaning_of(value, FieldNames()), Text):
                raise InputError(
                    Message(
                        "{path} holds questions and answers, no texts; to learn from them, first: {command}",
                        path=path,
                        command=advised("split --input", path, options.encoding),
                    )
                )
        except BadLine:
            pass
        for key, part in value.items() if isinstance(value, Mapping) else ():
            texts = part if isinstance(part, list) else [part]
            if all(isinstance(text, str) for text in texts) and not all(map(_NUMBER.fullmatch, texts)):
                lengths[key] = lengths.get(key, 0) + sum(map(len, texts))
    known = next((key for name in FIELDS["text"] for key in lengths if key.strip().lower() == name), None)
    if known is not None or not lengths:
        return known or "text"
    guessed = max(lengths, key=lambda key: lengths[key])
    if not options.is_quiet:
        warn(
            f"{path}: the texts are taken from {guessed!r}, the longest field; another one: --text_field NAME"
        )
    return guessed


def decode_sources(
    sources: list[Source], folder: Path, options: TextOptions, opened: DataFile | None = None
) -> list[Source]:
    """For each source that cannot be read in pieces, write a UTF-8 copy into `folder`.

    Returns: all sources, with the copies in place of their originals.

    Args:
        opened: the open file, if there is only one file and `recognise` has opened it already.

    Raises:
        InputError: if a file cannot be decoded or holds no text.
    """
    sources = [
        _decoded_copy(source, folder / f"{number:05d}", options, opened) if source.kind == "other" else source
        for number, source in enumerate(sources)
    ]
    for source in () if options.is_quiet else sources:
        _warn_of_lost_characters(source)
    return sources


def _warn_of_lost_characters(source: Source) -> None:
    """Warn if a file contains U+FFFD, which programs write in place of characters they cannot decode."""
    count, lines = 0, list[int]()
    line = 1
    with open_regular(source.path) as file:
        while source.kind != "parquet" and (block := file.read(_BLOCK) + file.readline(_LONGEST)):
            if found := block.count(_LOST):
                count += found
                rows = enumerate(block.split(b"\n"), line)
                lines += [number for number, row in rows if _LOST in row][: 1 + _LINES - len(lines)]
            line += block.count(b"\n")
    if count:
        shown = ", ".join(map(str, lines[:_LINES])) + (", ..." if len(lines) > _LINES else "")
        text = (
            "{path}: {count:,} times U+FFFD (�): another program lost characters there (line {lines}); go "
            "back to the file before that"
        )
        warn(Message(text, path=source.origin, count=count, lines=shown))


def _decoded_copy(source: Source, target: Path, options: TextOptions, opened: DataFile | None) -> Source:
    """Write a UTF-8 copy of a file, and return the source with the path of the copy.

    Where possible, a record keeps its line number. A bad record is replaced by a text that says what is bad.
    """
    path = source.origin
    data = opened or open_data(path, options.encoding, is_head, needs_head=True)
    for sentence in () if options.is_quiet else data.notes:
        note(sentence)
    target.parent.mkdir(parents=True, exist_ok=True)
    if data.kind == "text":
        (record,) = data.records
        _require_good_bytes(path, str(record.value), data.encoding)
        with atomic_open(target) as file:
            file.write(str(record.value).encode("utf-8", "surrogateescape"))
        return replace(
            source, path=target, kind="text", size=target.stat().st_size, separator=options.separator
        )
    records = list(data.records)
    if not records:
        raise InputError(f"{path} holds no record")
    field = _field(path, [record.value for record in records[:_GUESSED]], options)
    lines, is_text = 0, False
    with atomic_open(target) as file:
        for line, value, _ in records:
            if isinstance(value, str):
                value = {field: value}
            if isinstance(value, Mapping):
                is_text = is_text or value.get(field) is not None
                value = {field: value[field]} if field in value else dict.fromkeys(value)
            elif isinstance(value, BadLine):
                value = str(value)
            file.write(b"\n" * (line - lines - 1) + as_json(value).encode() + b"\n")
            lines = max(lines + 1, line)
    if is_text:
        return replace(source, path=target, kind="jsonl", size=target.stat().st_size, field=field)
    for line, value, _ in records:
        if isinstance(value, BadLine):
            raise InputError(f"{path}:{line}: {value}")
    raise _no_text(path, field)


def _require_good_bytes(path: Path, text: str, encoding: str) -> None:
    """Raise InputError if a text has a bad byte: one that stands for no character in the encoding.

    `encoding` is the text's encoding. UTF-8 is not checked here: `read_document` does this later.
    """
    found = None if encoding == "utf-8" else BAD_BYTES.search(text)
    if found:
        begin = text.rfind("\n", 0, found.start()) + 1
        number = text.count("\n", 0, begin) + 1
        byte, before = ord(found[0]) - 0xDC00, shown_before(text[begin:], found.start() - begin)
        raise InputError(
            f"{path}:{number}: byte 0x{byte:02x} is no character of {shown_name(encoding)}, behind {before}; "
            "repair that line, or name the encoding of the whole file with --encoding"
        )


def _no_text(path: Path, field: str) -> InputError:
    return InputError(f"{path} holds no text under {field!r}; name another field with --text_field")


def read_texts(
    path: Path,
    strict: bool = False,
    chunk: int = 1 << 16,
    options: TextOptions = TextOptions(),
) -> Iterator[str]:
    """Yield all texts of a corpus. Bad lines are skipped with a warning.

    Long texts are cut into chunks, at positions where a cut changes no id of a byte-pair encoding.

    Raises:
        InputError: if there is no text, or a file is not UTF-8 text; with `strict`, also for a bad line.
    """
    yield from read_sources(find_sources(path, options), strict, chunk, options)


def read_sources(
    sources: list[Source],
    strict: bool = False,
    chunk: int = 1 << 16,
    options: TextOptions = TextOptions(),
    opened: DataFile | None = None,
) -> Iterator[str]:
    """Yield the texts of the files that `find_sources` found, as `read_texts` does for a path.

    A file that cannot be read in pieces is first converted to a temporary UTF-8 copy.
    """
    for number, source in enumerate(sources):
        with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
            (source,) = decode_sources([source], Path(folder), options, opened)
            whole = Piece(number, 0, source.size)
            if source.kind == "text":
                yield from (text for text, _ in read_document(source, whole, chunk, any_place=False) if text)
            else:
                yield from _texts_of_records(source, whole, strict)


def _texts_of_records(source: Source, whole: Piece, strict: bool) -> Iterator[str]:
    skipped, is_text = 0, False
    for line, found in read_lines(source, whole):
        if isinstance(found, str):
            is_text = True
            yield found
        elif strict:
            raise InputError(f"{source.origin}:{line}: {found}")
        else:
            skipped += 1
            if skipped == 1:
                warn(f"{source.origin}:{line}: skipped: {found}")
    if skipped > 1:
        warn(f"{source.origin}: skipped {skipped:,} lines in all")
    if not is_text:
        raise _no_text(source.origin, source.field)
