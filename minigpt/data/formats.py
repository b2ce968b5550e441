"""What a file is that is no UTF-8 text: one error that says so, and how to make text of it."""

import shlex
from pathlib import Path
from typing import BinaryIO

from minigpt.errors import InputError

__all__ = ["BOM", "refuse_gb18030", "refuse_other_formats", "to_convert"]

BOM = b"\xef\xbb\xbf"

_ENCODINGS = {  # what a file starts with -> iconv's name; the longer marks first
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_FORMATS = {  # what a file starts with -> what it is, the program that makes text of it
    b"\x1f\x8b": ("compressed (gzip)", "gzip -dc"),
    b"\xfd7zXZ\0": ("compressed (xz)", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", "zstd -dc"),
    b"BZh": ("compressed (bzip2)", "bzip2 -dc"),
    b"PK\x03\x04": ("a zip or Excel file", ""),
    b"PAR1": ("a Parquet file", ""),
    b"SQLite format 3\0": ("an SQLite database", ""),
    b"%PDF": ("a PDF file", ""),
}


def refuse_other_formats(head: bytes, path: Path, wanted: str, new: str, keys: tuple[str, ...] = ()) -> None:
    """Judge a file by its first bytes.

    Args:
        wanted: what the file should hold, for the message.
        new: the name that the message gives to a converted file.
        keys: words that a file of JSON objects begins with; in UTF-16 without a mark they show the encoding.

    Raises:
        InputError: if the bytes are of another encoding or format; for a known one with the command to run.
    """
    encoding = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)
    for code in ("UTF-16LE", "UTF-16BE"):  # without a mark: a zero in every character of a key
        for key in keys:
            if head.find(f'"{key}"'.encode(code)) % 2 == 0:  # at an odd place, it is the other code's text
                encoding = encoding or code
    if encoding:
        raise to_convert(path, f"is {encoding[:6]}, not UTF-8", f"iconv -f {encoding} -t UTF-8", new)
    for mark, (what, program) in _FORMATS.items():
        if head.startswith(mark):
            if program:
                raise to_convert(path, f"is {what}", program, new)
            raise InputError(f"{path} is {what}; export it as text, {wanted}")


def to_convert(path: Path, what: str, program: str, new: str = "new.jsonl") -> InputError:
    """The error about a file that a program can convert."""
    return InputError(f"{path} {what}; convert it: {program} {shlex.quote(str(path))} > {new}")


def refuse_gb18030(file: BinaryIO, path: Path, new: str = "new.jsonl") -> None:
    """Tell a Chinese file in another encoding from a UTF-8 file with damaged lines: which has more lines?

    No byte of a GB18030 character is LF, so that lines can be judged one by one.

    Raises:
        InputError: if most lines that are not ASCII are GB18030.
    """
    if not file.seekable():
        return
    here = file.tell()
    file.seek(0)
    utf8 = gb18030 = 0
    for line in file:
        if line.isascii():
            continue
        if _decodes(line, "utf-8"):
            utf8 += 1
        elif _decodes(line, "gb18030"):
            gb18030 += 1
        else:
            gb18030 = 0
            break
    file.seek(here)
    if gb18030 > utf8:
        raise to_convert(path, "looks like GBK/GB18030, not UTF-8", "iconv -f GB18030 -t UTF-8", new)


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
