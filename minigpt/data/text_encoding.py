"""Detects the encoding of a file, and decodes its bytes to text.

    text, encoding = decode(Path("questions.csv").read_bytes(), "questions.csv")

First, a byte order mark is looked for. Without a mark, these encodings are tried in this order: UTF-16 and
UTF-32, then UTF-8, then those that chardet finds likely. If it is not certain which of the likely encodings
is right, `decode` raises an InputError.

No bad byte is lost. In a file with few bad bytes, each bad byte becomes a lone surrogate (U+DC80 to U+DCFF,
Python's "surrogateescape"), from which the byte can be restored. The data reader later skips the lines with
these surrogates, and a warning names the lines. The rest of such a line may be wrong: a bad byte can be
decoded together with the next character's first byte.
"""

import codecs
import re
from collections.abc import Collection
from typing import NamedTuple

from minigpt.errors import InputError, printable

__all__ = ["BAD_BYTES", "HALF_CHARACTER", "decode", "is_mostly_utf8", "shown_name"]

BAD_BYTES = re.compile("[\udc80-\udcff]")  # surrogates that `decode` makes of bad bytes
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate: half of a character in UTF-16
_MARKS = {  # first bytes of a file -> Python's name of the encoding; longer marks first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# chardet's name of an encoding -> Python's codec. A codec may include older, smaller encodings: gb18030
# includes gbk and gb2312.
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
# Characters of ordinary texts: ASCII, Latin, Greek, Cyrillic, kana, Chinese, Hangul, and their punctuation. A
# wrong encoding often gives other characters.
_SENSIBLE = re.compile(
    "[\t\n\r -~\u00a0-\u04ff\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffee]"
)
# Encodings with characters of several bytes. Not all sequences of bytes are valid, so damage is noticed.
_OF_SEVERAL_BYTES = ("gb18030", "cp950", "cp932", "euc_jis_2004", "cp949")
_NAMED_OF_SEVERAL_BYTES = (  # encodings with characters of several bytes that a user may name in --encoding
    *(*_OF_SEVERAL_BYTES, "gbk", "gb2312", "big5", "big5hkscs", "shift_jis", "shift_jisx0213", "euc_jp"),
    *("shift_jis_2004", "euc_kr", "johab"),
)
# Bytes that stand for no character in an encoding. Python's codec does not refuse them: like Windows, it
# decodes them to private-use characters. This table turns these characters into surrogates, as for bad bytes.
_UNASSIGNED = {
    "cp932": {ord(bytes([byte]).decode("cp932")): 0xDC00 + byte for byte in (0x80, 0xA0, 0xFD, 0xFE, 0xFF)}
}
# If a text has few invalid bytes, the text is damaged. If it has more, the encoding is wrong. Up to three
# invalid bytes are always few, because a single error (one byte too many) can make three bytes invalid.
_FEW = 3
# In a long text, invalid bytes are few if they are at most this share of the bytes that are not ASCII.
_DAMAGED = 0.005
_MOSTLY = 0.95
_SAMPLE = 200_000  # number of bytes that are enough to detect an encoding
_CERTAIN = 3.0  # the best encoding must be more than three times as likely as the second best
_ZEROS = 3  # a file with fewer zero bytes is not taken for UTF-16, because a few may be errors
_ENOUGH = 8  # with fewer bytes that are not ASCII, the encoding is never certain
# Python's codecs that are no encodings of files.
_NO_FILE_HAS = ("undefined", "idna", "punycode", "unicode_escape", "raw_unicode_escape")
# If the encoding is uncertain, an error message shows a part of each decoded text: at most this number of
# characters, from the first difference between the texts on (and a few characters before it).
_SHOWN = 12
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
    # `_is_text_encoding` is False for a codec such as "hex", which does not decode to text.
    if codec is None or not codec._is_text_encoding or codec.name.replace("-", "_") in _NO_FILE_HAS:
        raise InputError(
            f"unknown encoding {name!r}; usual ones: utf-8, gb18030, big5, shift_jis, euc_kr, utf-16, cp1252"
        )
    return codec.name


def decode(data: bytes, name: str, encoding: str = "") -> tuple[str, str]:
    """Decode bytes to text without a byte order mark. Return the text and its encoding.

    Args:
        name: the file's name, for error messages.
        encoding: the encoding named by the user; "": detect it.

    Raises:
        InputError: for binary data; if several encodings are possible (the message shows the text in each
            of them); if the bytes do not fit the encoding named by the user.
    """
    if encoding:
        codec = _known_encoding(encoding)
        if (damaged := _damaged_text(data, codec)) and codec in _NAMED_OF_SEVERAL_BYTES:
            return damaged, codec
        try:
            text = data.decode(codec).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            # `error.start` is a position in `error.object`. With utf-8-sig, this is `data` without its first
            # three bytes, the byte order mark.
            read = error.object
            line = read.count(b"\n", 0, error.start) + 1
            byte = f"byte 0x{read[error.start]:02x}" if error.start < len(read) else "its end"
            raise InputError(f"{name}:{line}: {byte} is not {encoding}; choose another --encoding") from None
        if found := HALF_CHARACTER.search(text):  # some encodings, such as UTF-7, allow lone surrogates
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
        # some programs write the mark twice
        return data[3:].decode("utf-8", "surrogateescape").removeprefix("\ufeff"), "utf-8"
    try:
        return data.decode(codec).removeprefix("\ufeff"), codec
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} begins as {codec.upper()}, but byte {error.start + 1} does not fit"
        ) from None


def _utf16_without_mark(head: bytes) -> str | None:
    """Return the codec of text in UTF-16 or UTF-32 without a byte order mark; None for other bytes.

    In these encodings, ASCII characters contain zero bytes.
    """
    if head.count(0) < _ZEROS:
        return None
    for codec, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
        text = head[: len(head) // width * width].decode(codec, "replace")
        has_ascii = any(" " <= character <= "~" or character == "\n" for character in text)
        if has_ascii and len(_SENSIBLE.findall(text)) > _MOSTLY * len(text):
            return codec
    return None


def is_mostly_utf8(data: bytes) -> bool:
    """Return True if at least half of the lines that are not ASCII are valid UTF-8."""
    good = bad = 0
    for line in data.split(b"\n"):  # safe: no candidate encoding has this byte inside another character
        if not line.isascii():
            try:
                line.decode("utf-8")
                good += 1
            except UnicodeDecodeError:
                bad += 1
    return 0 < good >= bad


def _detected(data: bytes, name: str) -> tuple[str, str]:
    readings = _readings(data)
    damaged, rivals = _damaged(data, [codec for _, codec, _ in readings])
    # A damaged text is preferred to `readings`: some encodings decode any bytes, so it proves nothing that a
    # file can be decoded with them.
    if damaged:
        return damaged.text, damaged.codec
    if _is_certain(readings, data) and not rivals:
        return readings[0].text, readings[0].codec
    readings = sorted([*readings, *rivals], key=lambda reading: -reading.confidence)
    if not readings:
        raise InputError(
            f"{name} is text in no encoding that minigpt can tell; name it with --encoding (usual ones: "
            "gb18030, big5, shift_jis, euc_kr, cp1252)"
        )
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
    """The text that a file's bytes give in one of the candidate encodings."""

    confidence: float
    codec: str
    text: str


def _readings(data: bytes) -> list[_Reading]:
    """Decode the bytes in each possible encoding. Return the different texts, the most likely first."""
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
        if all(text != known.text for known in readings):  # no encoding before gave the same text
            readings.append(_Reading(float(item["confidence"]), codec, text))
    return readings


def _is_certain(readings: list[_Reading], data: bytes) -> bool:
    is_enough = _count_beyond_ascii(data[:_SAMPLE]) >= _ENOUGH
    return is_enough and (
        len(readings) == 1
        or (len(readings) > 1 and readings[0].confidence > _CERTAIN * readings[1].confidence)
    )


def _damaged(data: bytes, sound: Collection[str]) -> tuple[_Reading | None, list[_Reading]]:
    """Search for an encoding in which the text is only damaged: few of its bytes are invalid.

    Args:
        sound: encodings in which no byte is invalid.

    Returns: (text in such an encoding, []) if the encoding is certain; else (None, texts in encodings that
        are nearly as likely as the most likely encoding).
    """
    rivals = []
    for codec in (each for each in _OF_SEVERAL_BYTES if each not in sound or each in _UNASSIGNED):
        text = _damaged_text(data, codec)
        if not text:
            continue
        # Judge the encoding by lines without invalid bytes: after an invalid byte, the rest of the line is
        # wrong.
        good = b"\n".join(line for line in data.split(b"\n") if not _bad_bytes(line, codec)[1])
        readings = _readings(good) if good.strip() else []
        own = next((each for each in readings if each.codec == codec), None)
        if own is None:
            continue
        if readings[0] is own and _is_certain(readings, good):
            return _Reading(own.confidence, codec, text), []
        if _CERTAIN * own.confidence >= readings[0].confidence:
            rivals.append(_Reading(own.confidence, codec, text))
    return None, rivals


def _damaged_text(data: bytes, codec: str) -> str:
    """Return the text decoded by `codec` if a few bytes are invalid; "" if none or many are invalid."""
    others = _count_beyond_ascii(data[:_SAMPLE])
    most = max(_FEW, _DAMAGED * others)
    # + 3: the sample may end inside a character, whose up to three bytes are then invalid.
    if len(data) > _SAMPLE and _bad_bytes(data[:_SAMPLE], codec)[1] > most + 3:
        return ""
    text, bad = _bad_bytes(data, codec)
    most = max(_FEW, _DAMAGED * _count_beyond_ascii(data)) if bad > most else most
    return text if 0 < bad <= most else ""


def _count_beyond_ascii(data: bytes) -> int:
    return len(data.translate(None, bytes(range(0x80))))


def _bad_bytes(data: bytes, codec: str) -> tuple[str, int]:
    """Decode bytes. Return the text with a lone surrogate for each bad byte, and the number of bad bytes."""
    try:
        text = data.decode(codec, "surrogateescape")
    except UnicodeDecodeError:  # encodings such as UTF-16 do not know "surrogateescape"
        return "", len(data)
    if codec in _UNASSIGNED:
        text = text.translate(_UNASSIGNED[codec])
    return text, len(BAD_BYTES.findall(text))


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
