"""Reads the questions that a model is asked: a text with one question per line, or JSON Lines.

In JSON Lines, each question is in the field "question". The content decides which format a file has.
"""

from minigpt.data.json_values import looks_like_json
from minigpt.errors import InputError
from minigpt.storage.json_files import parse_json

__all__ = ["parse_questions"]


def parse_questions(content: bytes, source: str) -> list[str]:
    """Parse the questions of a text or JSONL file. In a text, each line is a question, even a blank one.

    Args:
        source: name of the file, for error messages.

    Raises:
        InputError: if a line is not UTF-8, if a line of JSONL has no question, or if the file is blank.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise InputError(f'{source} holds no question: one a line, or JSONL with "question"')
    lines = content.removesuffix(b"\n").split(b"\n")  # not str.splitlines(), which also splits at U+2028
    is_jsonl = content.lstrip().startswith(b"{") and looks_like_json(content.decode("utf-8", "replace"))
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); "
                "convert it, from GBK for instance: iconv -f GB18030 -t UTF-8 OLD > NEW"
            ) from None
        if not is_jsonl:
            questions.append(text)
        elif text:
            questions.append(_json_question(text, f"{source}:{number}"))
    return questions


def _json_question(text: str, where: str) -> str:
    try:
        question = parse_json(text)["question"]
    except ValueError as error:
        raise InputError(f"{where}: broken JSON ({error})") from None
    except (KeyError, TypeError):
        raise InputError(f'{where}: no object with "question"') from None
    if not isinstance(question, str) or not question.strip():
        raise InputError(f'{where}: "question" must be text that is not empty: got {question!r}')
    return question
