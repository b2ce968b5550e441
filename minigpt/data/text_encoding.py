"""Detects the encoding of a file: byte order mark, UTF-8, or chardet's result, if it is certain.

    text, encoding = decode(Path("questions.csv").read_bytes(), "questions.csv")

No byte is dropped or replaced. In a file that is mostly UTF-8, a bad byte becomes a lone surrogate (U+DC80 to
U+DCFF, Python's "surrogateescape"). The reader can then name the lines with such surrogates and leave them
out.
"""

import codecs
import re
from typing import NamedTuple

from minigpt.errors import InputError, printable

__all__ = ["BAD_BYTES", "HALF_CHARACTER", "decode", "is_mostly_utf8", "shown_name"]

BAD_BYTES = re.compile("[\udc80-\udcff]")  # surrogates that `decode` makes of bad bytes
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate
_MARKS = {  # first bytes of a file -> Python's name of the encoding; longer marks first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# chardet's names of common encodings -> Python's codecs, each a superset of related encodings
_CANDIDATES = {
    "GB18030": "gb18030",
    "Big5": "cp950",
    "big5hkscs": "big5hkscs",
    "CP932": "cp932",
    "EUC-JP": "euc_jis_2004",
    "CP949": "cp949",
    "KOI8-R": "koi8-r",
    **{f"Windows-{page}": f"cp{page}" for page in range(1250, 1259)},
}
# ASCII; characters of Latin, Greek and Cyrillic scripts; kana, Chinese characters, Hangul; their punctuation
_SENSIBLE = re.compile(
    "[\t\n\r -~\u00a0-\u04ff\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffee]"
)
# codecs that raise an error for bad bytes
_OF_SEVERAL_BYTES = ("gb18030", "cp950", "cp932", "euc_jis_2004", "cp949")
_DAMAGED = 0.005  # a text may have this share of bad bytes among its bytes that are not ASCII
_MOSTLY = 0.95
_SAMPLE = 200_000  # number of bytes that are enough to detect an encoding
_CERTAIN = 3.0  # factor by which the best encoding must be more likely than the second
_ZEROS = 3  # a file with fewer zero bytes is not taken for UTF-16, because a few may be errors
_ENOUGH = 8  # with fewer bytes that are not ASCII, no result is certain
# codecs that Python has for its own use
_NO_FILE_HAS = ("undefined", "idna", "punycode", "unicode_escape", "raw_unicode_escape")
_SHOWN = 12  # number of characters that an error message shows
_NAMES = {
    "utf-8-sig": "UTF-8",
    "cp950": "Big5",
    "euc_jis_2004": "EUC-JP",
    "cp932": "Shift-JIS",
    "cp949": "EUC-KR",
}


def _known_encoding(name: str) -> str:
    """Return Python's name of an encoding.

    Raises:
        InputError: if the encoding is unknown.
    """
    try:
        codec = codecs.lookup(name.strip())
    except (LookupError, ValueError):
        codec = None
    # a codec such as "hex" does not decode to text
    if codec is None or not codec._is_text_encoding or codec.name.replace("-", "_") in _NO_FILE_HAS:
        raise InputError(
            f"unknown encoding {name!r}; usual ones: utf-8, gb18030, big5, shift_jis, euc_kr, utf-16, cp1252"
        )
    return codec.name


def decode(data: bytes, name: str, encoding: str = "") -> tuple[str, str]:
    """Decode bytes to text without a byte order mark. Return the text and its encoding.

    Args:
        name: the file's name, for messages.
        encoding: the encoding named by the user; "": detect it.

    Raises:
        InputError: for binary data; if several encodings are possible (the message shows the text in each
            of them); if the bytes do not fit the encoding named by the user.
    """
    if encoding:
        codec = _known_encoding(encoding)
        try:
            text = data.decode(codec).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            read = error.object  # without the byte order mark, which the decoder may have removed
            line = read.count(b"\n", 0, error.start) + 1
            byte = f"byte 0x{read[error.start]:02x}" if error.start < len(read) else "its end"
            raise InputError(f"{name}:{line}: {byte} is not {encoding}; choose another --encoding") from None
        if found := HALF_CHARACTER.search(text):  # UTF-7 allows lone surrogates
            line = text.count("\n", 0, found.start()) + 1
            raise InputError(f"{name}:{line}: half a character in {encoding}; choose another --encoding")
        return text, codec
    for mark, codec in _MARKS.items():
        if data.startswith(mark):
            return _marked(data, codec, name)
    if utf16 := _utf16_without_mark(data[:_SAMPLE]):
        return _marked(data, utf16, name)
    if b"\0" in data[:_SAMPLE]:
        raise InputError(f"{name} is a binary file (it holds zero bytes), not text")
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    if is_mostly_utf8(data):
        return data.decode("utf-8", "surrogateescape"), "utf-8"
    return _detected(data, name)


def _marked(data: bytes, codec: str, name: str) -> tuple[str, str]:
    if codec == "utf-8-sig":
        return data[3:].decode("utf-8", "surrogateescape"), "utf-8"
    try:
        return data.decode(codec).removeprefix("\ufeff"), codec
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} begins as {codec.upper()}, but byte {error.start + 1} does not fit"
        ) from None


def _utf16_without_mark(head: bytes) -> str | None:
    """Return the codec of UTF-16 or UTF-32 text with ASCII characters (which have zero bytes), or None."""
    if head.count(0) < _ZEROS:
        return None
    for codec, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
        text = head[: len(head) // width * width].decode(codec, "replace")
        has_ascii = any(" " <= character <= "~" for character in text)
        if has_ascii and len(_SENSIBLE.findall(text)) > _MOSTLY * len(text):
            return codec
    return None


def is_mostly_utf8(data: bytes) -> bool:
    """Return True if at least half of the lines that are not ASCII are valid UTF-8."""
    good = bad = 0
    for line in data.split(b"\n"):  # no candidate encoding has this byte inside a character
        if not line.isascii():
            try:
                line.decode("utf-8")
                good += 1
            except UnicodeDecodeError:
                bad += 1
    return 0 < good >= bad


def _detected(data: bytes, name: str) -> tuple[str, str]:
    readings = _readings(data)
    if _is_certain(readings, data) and readings[0].codec in _OF_SEVERAL_BYTES:
        return readings[0].text, readings[0].codec
    if damaged := _damaged(data):  # try this first, because one-byte encodings accept any bytes
        return damaged
    if not readings:
        raise InputError(
            f"{name} is text in no encoding that minigpt can tell; name it with --encoding (usual ones: "
            "gb18030, big5, shift_jis, euc_kr, cp1252)"
        )
    if _is_certain(readings, data):
        return readings[0].text, readings[0].codec
    if len(readings) == 1:
        readings.append(readings[0])
    texts = [text for _, _, text in readings[:4]]
    shown = "; ".join(
        f"--encoding {codec}: {_excerpt(text, texts[0] if text is not texts[0] else texts[1])}"
        for _, codec, text in readings[:4]
    )
    raise InputError(
        f"{name} is not UTF-8, and its encoding is not certain; choose what reads right: {shown}"
    )


class _Reading(NamedTuple):
    """A text in one of the candidate encodings."""

    confidence: float
    codec: str
    text: str


def _readings(data: bytes) -> list[_Reading]:
    """Return the different texts that the bytes may be, the most likely first."""
    import chardet  # imported here, because files in UTF-8 do not need it

    readings: list[_Reading] = []
    found = chardet.detect_all(data[:_SAMPLE], ignore_threshold=True, include_encodings=tuple(_CANDIDATES))
    for item in found:
        codec = _CANDIDATES.get(item["encoding"] or "")
        if codec is None:
            continue
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            continue
        if all(text != known.text for known in readings):  # skip encodings that give the same text
            readings.append(_Reading(float(item["confidence"]), codec, text))
    return readings


def _is_certain(readings: list[_Reading], data: bytes) -> bool:
    is_enough = sum(byte >= 0x80 for byte in data[:_SAMPLE]) >= _ENOUGH
    return is_enough and (
        len(readings) == 1
        or (len(readings) > 1 and readings[0].confidence > _CERTAIN * readings[1].confidence)
    )


def _damaged(data: bytes) -> tuple[str, str] | None:
    """If data has a few bad bytes, and the encoding of the rest is certain, return text and encoding."""
    others = sum(byte >= 0x80 for byte in data)
    for codec in _OF_SEVERAL_BYTES:
        text = data.decode(codec, "surrogateescape")
        bad = len(BAD_BYTES.findall(text))
        if not 0 < bad <= max(1, _DAMAGED * others):
            continue
        # a bad byte shifts all characters behind it, so its whole line is left out
        good = b"\n".join(line for line in data.split(b"\n") if _is_text(line, codec))
        readings = _readings(good) if good else []
        if _is_certain(readings, good) and readings[0].codec == codec:
            return text, codec
    return None


def _is_text(line: bytes, codec: str) -> bool:
    try:
        line.decode(codec)
    except UnicodeDecodeError:
        return False
    return True


def _excerpt(text: str, other: str) -> str:
    """Return some characters around the first position at which two decoded texts differ."""
    first = next((i for i, (one, two) in enumerate(zip(text, other)) if one != two), 0)
    return printable(f"{text[max(0, first - 4) : first + _SHOWN]!r}")


def shown_name(codec: str) -> str:
    """Return the usual name of an encoding.

    >>> shown_name("cp950"), shown_name("gb18030"), shown_name("cp1252")
    ('Big5', 'GB18030', 'Windows-1252')
    """
    if codec.startswith("cp125"):
        return f"Windows-{codec[2:]}"
    return _NAMES.get(codec, codec.upper())
