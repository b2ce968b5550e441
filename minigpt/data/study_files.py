"""Reads the texts of flash cards (left) and subtitles (right), without settings, numbers and times.

    #separator:tab                      1
    #html:true                          00:00:01,000 --> 00:00:02,500
    #tags column:3                      你好
    你好？<TAB>你好！<TAB>hello
                                        2
                                        ...

Flash cards are exports of Anki. Their first lines are settings. Columns of tags, decks or the like are left
out. A line "#columns:" may name the columns of question and answer. Without such names, the first column is
the question, and the other columns together are the answer. Subtitles are .srt or .vtt files.
"""

import csv
import html
import io
import re

from minigpt.data.json_values import BadLine, Record, as_json

__all__ = ["cards_in", "spoken_text"]

_BEGINNING = 4096  # a text is not read as subtitles if its first 4096 characters have no "-->"
_SETTING = re.compile(r"#(separator|html|columns|notetype|deck|tags|guid|if matches|[a-z]+ column):(.*)")
_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " ", "colon": ":"}
# Names of Anki's columns: _FRONT for the question, _BACK for the answer, _ASIDE for columns to leave out.
_FRONT = ("front", "question", "q", "正面", "问题", "問題")
_BACK = ("back", "answer", "a", "背面", "反面", "答案", "回答")
_ASIDE = ("tags", "tag", "deck", "id", "guid", "note id", "notetype", "note type", "source", "标签", "来源")
_LINE_END, _TAG = re.compile(r"<br\s*/?>|</(?:div|p|li)>\s*", re.IGNORECASE), re.compile(r"<[^<>]+>")
_CLOCK = r"(?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3}"
_TIMES = re.compile(rf"{_CLOCK}\s+-->\s+{_CLOCK}.*")
_VOICE = re.compile(r"<v(?:\.[\w.]+)?\s++([^<>]+)>")  # in .vtt files: a tag that names the speaker
_STYLE = re.compile(r"</?(?:[biuc]|font|v|lang|ruby|rt)\b[^<>]*>|\{\\[^{}]*\}")


def cards_in(text: str) -> list[Record] | None:
    """Return a record of question and answer for each card; None if the text is no export of Anki."""
    if not text.startswith("#separator:"):  # Anki writes this line first
        return None
    lines = text.split("\n")
    settings: dict[str, str] = {}
    for line in lines:
        setting = _SETTING.fullmatch(line.strip())
        if not setting:
            break
        settings[setting[1]] = setting[2].strip()
    written = settings.get("separator", "").lower()
    delimiter = _DELIMITERS.get(written, written)
    if len(delimiter) != 1:
        return None
    names = [name.strip().lower() for name in settings.get("columns", "").split(delimiter)]
    apart = {int(value) - 1 for key, value in settings.items() if key.endswith(" column") and value.isdigit()}
    apart |= {column for column, name in enumerate(names) if name in _ASIDE}
    front = next((column for column, name in enumerate(names) if name in _FRONT), None)
    answer = next((column for column, name in enumerate(names) if name in _BACK), None)
    has_marks = settings.get("html") == "true"
    first = len(settings)
    body = io.StringIO("\n".join(lines[first:]), newline="")
    reader = csv.reader(body, delimiter=delimiter, strict=True)  # strict: a quotation mark has to be closed
    records: list[Record] = []
    number = first + 1  # number of the line at which a row begins
    try:
        for row in reader:
            cells = {column: cell for column, cell in enumerate(row) if column not in apart}
            if has_marks:
                cells = {column: _without_marks(cell) for column, cell in cells.items()}
            if any(map(str.strip, cells.values())):
                asked = min(cells) if front is None else front
                back = [cell for column, cell in cells.items() if column != asked and cell.strip()]
                whole = "\n".join(back) if answer is None else cells.get(answer, "")
                value = {"question": cells.get(asked, ""), "answer": whole}
                records.append(Record(number, value, as_json(value)))
            number = first + reader.line_num + 1
    except csv.Error as error:
        records += [
            Record(line, BadLine("broken CSV", str(error)), "") for line in range(number, len(lines) + 1)
        ]
    return records


def _without_marks(cell: str) -> str:
    return html.unescape(_TAG.sub("", _LINE_END.sub("\n", cell))).strip()


def spoken_text(text: str) -> str | None:
    """Return the spoken text of subtitles, one line per caption; None if the text is not subtitles.

    If a tag names the speaker, the line begins with this name.
    """
    if "-->" not in text[:_BEGINNING]:
        return None
    blocks = [
        block.strip().split("\n") for block in re.split(r"\n[ \t]*(?:\n[ \t]*)+", text.replace("\r", ""))
    ]
    blocks = [block for block in blocks if block != [""]]
    if blocks and blocks[0][0].startswith("WEBVTT"):
        del blocks[0]
    timed = [block for block in blocks if any(map(_TIMES.fullmatch, block[:2]))]
    blocks = [block for block in blocks if not re.match(r"(?:NOTE|STYLE|REGION)(?:\s|$)", block[0])]
    if len(timed) < 2 or len(blocks) - len(timed) > 1 + len(blocks) / 3:
        return None
    said: list[str] = []
    for block in blocks:
        below = next((number + 1 for number, line in enumerate(block[:2]) if _TIMES.fullmatch(line)), 0)
        spoken = " ".join(_STYLE.sub("", _VOICE.sub(r"\1: ", line)).strip() for line in block[below:])
        if below or not said:
            said.append(spoken)
        else:  # an empty line divided the caption above; this is the rest of its text
            said[-1] = f"{said[-1]} {spoken}".strip()
    return "".join(f"{line}\n" for line in said if line)
