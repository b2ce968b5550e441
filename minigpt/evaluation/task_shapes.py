"""Interprets a record of a task's file, such as a question with choices or a text with a gap.

The fields of a record, and the data sets that have them:

    {"question": ..., "A": ..., "B": ..., ..., "answer": "A"}      C-Eval, CMMLU; also choice0, choice1, ...
    {"question": ..., "choices": [...], "answer": 0}                MMLU, ARC; also query with gold
    {"goal": ..., "sol1": ..., "sol2": ..., "label": 0}             PIQA
    {"premise": ..., "choice1": ..., "choice2": ..., "question": "cause", "label": 0}       COPA
    {"ctx": ..., "endings": [...], "label": 0}                      HellaSwag
    {"content": "... #idiom# ...", "candidates": [...], "answer": 0}          ChID
    {"context": "... [BLANK1] ...", "choices": [...], "answers": [2, ...]}    CMRC 2019
    {"context": ..., "continuation": ...}                           a cloze: LAMBADA
    {"question": ..., "answer": "... #### 42"}                      GSM8K; CMATH has input, golden
    {"question": ..., "answer": ...}                                any question with its answer
    {"text": ..., "label": ...}                                     classification
    {"text": ...}                                                   a text: perplexity

`read_record` finds the form of a record by the names of its fields. Or a task's TOML file sets the form.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from minigpt.data.field_names import FIELDS, OPTION, OPTIONS, PARTNERS, TITLES
from minigpt.data.json_values import REPEATED, BadLine
from minigpt.data.labelled import LABEL_FIELDS, TEXT_FIELDS
from minigpt.data.records import parts_of
from minigpt.data.text_encoding import HALF_CHARACTER
from minigpt.errors import whole_number

__all__ = ["FORMS", "Example", "Form", "Style", "read_record", "render", "render_question"]

Form = Literal["multiple_choice", "cloze", "generation", "classification", "perplexity"]
FORMS: tuple[Form, ...] = ("multiple_choice", "cloze", "generation", "classification", "perplexity")
_HAN = re.compile(r"[\u3400-\u9fff]")
_GAP = re.compile(r"\[BLANK(\d+)\]")
_NUMBERED = re.compile(r"(?:choice|option|choice_|option_)(\d)")
_NUMBER_ANSWER = re.compile(r"####\s*-?[\d.,]+\s*$")
_LETTER = re.compile(r"[(（\[]?([A-Za-z])[)）\].．、:：]?")  # A, (A), A., A:
_LISTED = "{choices}"  # in a template, this stands for the choices with their letters
_REST = 80  # at most this number of characters after a gap is scored together with the word in the gap


@dataclass(frozen=True)
class Style:
    """Options for turning an example into text and measuring the answer. A task's TOML file can set them."""

    template: str = ""  # the prompt, with {field} for a record's fields; "": the default prompt
    # one template for each choice; or one entry: the name of the field that holds the list of choices
    choices: tuple[str, ...] = ()
    answer: str = ""  # name of the field that holds the right answer
    # part of a choice that is scored: "letter" or "text"; "": the letter if the prompt lists the choices,
    # else the text
    score: str = ""
    delimiter: str | None = None  # text between prompt and answer; None: " ", or "" in a text with a gap
    separator: str = "\n\n"  # text between shots
    instruction: str = ""  # text before everything else
    metrics: tuple[str, ...] = ()  # names of the metrics for generated answers; (): the default metrics
    stop: tuple[str, ...] = ()  # texts that end an answer
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Example:
    """One question of a task."""

    form: Form
    line: int  # number of the line in the file
    prompt: str  # text that the model reads
    choices: tuple[str, ...] = ()  # multiple choice, classification: possible continuations of the prompt
    answer: int = -1  # index of the right choice
    references: tuple[str, ...] = ()  # cloze, perplexity: the text to predict; generation: the answers
    letters: tuple[str, ...] = ()  # letters of the choices, if the prompt lists them
    question: str = ""  # only the question, without choices and template, to show it or to change it
    style: Style = Style()
    subject: str = ""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def delimiter(self) -> str:
        """The text between the prompt and an answer."""
        return " " if self.style.delimiter is None else self.style.delimiter

    @property
    def scored(self) -> tuple[str, ...]:
        """The text that is scored for each choice: its letter, or the choice itself."""
        return self.letters or self.choices

    @property
    def solution(self) -> str:
        """The right answer as text, to be shown when the example is used as a shot."""
        if self.form in ("multiple_choice", "classification"):
            return self.scored[self.answer]
        return self.references[0]

    def reordered(self, order: Sequence[int]) -> "Example":
        """Return the example with its choices in another order. Its first choice is choices[order[0]]."""
        choices, answer = tuple(self.choices[i] for i in order), list(order).index(self.answer)
        changed = replace(self, choices=choices, answer=answer)
        return replace(changed, prompt=render_question(changed)) if self.letters else changed

    @property
    def can_be_reordered(self) -> bool:
        """Return True if the choices may change their order. A template with {a} and {b} fixes the order."""
        return self.form == "multiple_choice" and (
            not self.letters or _LISTED in (self.style.template or _LISTED)
        )

    def asking(self, question: str) -> "Example":
        """Return the example with its question replaced by `question`."""
        if self.letters:
            changed = replace(self, question=question)
            return replace(changed, prompt=render_question(changed))
        return replace(self, prompt=self.prompt.replace(self.question, question), question=question)


def read_record(value: Any, line: int, style: Style, form: Form | None = None) -> list[Example]:
    """Return the examples of a record: one example, or one for each gap of a text.

    Raises:
        BadLine: if the record is not an example, or a part of it is wrong.
    """
    if isinstance(value, BadLine):
        raise value
    if not isinstance(value, Mapping):
        raise BadLine("not an object with fields")
    item = {str(key).strip().lower(): part for key, part in value.items()}
    for name, part in item.items():
        if part is REPEATED:
            raise BadLine(f"field {name!r} is there twice")
    found = (
        _by_style(item, line, style, form)
        if style.template or style.choices
        else _by_shape(_with_usual_names(item), line, style)
    )
    for one in found:
        _check(one)
        if form is not None and one.form != form:
            raise BadLine(f"the record is of the form {one.form}, not {form}")
    return [replace(one, record=item) for one in found]


def _check(one: Example) -> None:
    if any(map(HALF_CHARACTER.search, (one.prompt, one.question, *one.choices, *one.references))):
        raise BadLine("half a character (a lone surrogate)")
    if one.form in ("multiple_choice", "classification"):
        if len(one.choices) < 2:
            raise BadLine("fewer than two choices")
        for number, choice in enumerate(one.choices):
            if not choice.strip():
                raise BadLine("an empty choice", f"number {number + 1}")
        twice = [choice for choice in one.choices if one.choices.count(choice) > 1]
        if twice and one.choices[one.answer] in twice:
            raise BadLine("the right choice is there twice", repr(twice[0][:40]))
    elif one.form != "perplexity" and not (one.references and all(text.strip() for text in one.references)):
        raise BadLine("the answer is empty")


# -- records of known data sets ----------------------------------------------------------------------------


def _with_usual_names(item: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the usual names of fields: 选项A becomes `a`, 题目 becomes `question`.

    The fields `user` and `source` can hold the question. If they hold something else, they are left out.
    """
    parts = parts_of(item)
    new = {name: part for name, part in item.items() if name not in PARTNERS or name == parts["question"]}
    usual = {
        name: part for part in ("question", "answer") if (name := parts[part]) and name not in FIELDS[part]
    }
    title = next((name for name in TITLES if name in item), "")
    if title and parts["answer"] and not parts["question"]:
        usual[title] = "question"
    letters = {name: found[1] for name in new if (found := OPTION.fullmatch(name))}
    if {"a", "b"} <= {*letters.values()}:
        usual |= letters
    renamed = {usual.get(name, name): part for name, part in new.items()}
    given = next((renamed.pop(name) for name in OPTIONS[2:] if name in renamed), renamed.get("options"))
    if isinstance(given, list) and all(
        isinstance(one, Mapping) and {"label", "text"} <= one.keys() for one in given
    ):
        given = {str(one["label"]): one["text"] for one in given}
    if isinstance(given, Mapping) and all(len(str(letter)) == 1 for letter in given):
        by_letter = sorted((str(letter).upper(), text) for letter, text in given.items())
        keys, texts = zip(*by_letter) if by_letter else ((), ())
        is_lettered = string.ascii_uppercase.startswith("".join(keys))
        given = [*texts] if is_lettered else {"label": [*keys], "text": [*texts]}
    if given is not None:
        renamed["options"] = given
    return renamed if len(renamed) >= len(new) else item


def _by_shape(item: dict[str, Any], line: int, style: Style) -> list[Example]:
    if "turns" in item and "reference" in item:
        raise BadLine("open questions without a right answer", "such as MT-Bench: a judge has to read them")
    if "endings" in item:
        return [_hellaswag(item, line, style)]
    if {"goal", "sol1", "sol2"} <= item.keys():
        solutions = (_text(item, "sol1"), _text(item, "sol2"))
        return [_choice(line, style, _text(item, "goal"), solutions, item.get("label"), asks=True)]
    if {"premise", "choice1", "choice2"} <= item.keys():
        return [_copa(item, line, style)]
    if "candidates" in item and "content" in item:
        return [_idiom(item, line, style)]
    if "context" in item and isinstance(item.get("choices"), list) and "answers" in item:
        return _sentences(item, line, style)
    if "context" in item and "continuation" in item:
        context, rest = _text(item, "context"), _text(item, "continuation").strip()
        return [Example("cloze", line, context, references=(rest,), question=context, style=style)]
    if "a" in item and "b" in item and (name := _name(item, FIELDS["question"], ("a", "b"))):
        letters = [letter for letter in string.ascii_lowercase[:10] if letter in item]
        choices = _cells(item, letters)
        return [_listed(item, line, style, _text(item, name), choices)]
    if columns := sorted(key for key in item if _NUMBERED.fullmatch(key)):
        name = _required(item, FIELDS["question"])
        # If the choices are numbered from 1, as WinoGrande's option1, the answer counts from 1, too.
        # Exception: a number in a field `label` always counts from 0.
        numbers = [key[-1] for key in columns] if _right_name(item) != "label" else []
        from_1 = numbers[:1] == ["1"] and re.fullmatch(r"\d+(\.0)?", str(_right(item)).strip())
        return [
            _listed(item, line, style, _text(item, name), _cells(item, columns), numbers if from_1 else ())
        ]
    for name in ("choices", "options"):
        if name in item:
            return [_with_choices(item, line, style, item[name])]
    for label in LABEL_FIELDS:
        if label in item and (text := _name(item, TEXT_FIELDS, (label,))):
            return [_label(item, line, style, _text(item, text), item[label])]
    if "golden" in item and "input" in item:
        return [_answer(item, line, style, _text(item, "input"), item["golden"], ("number",))]
    question, answer = _name(item, FIELDS["question"]), _name(item, FIELDS["answer"])
    if question and answer:
        text, more = _text(item, question), item.get(_name(item, FIELDS["input"], (question,)))
        if isinstance(more, str) and more.strip():
            text = f"{text}\n{more}"
        return [_answer(item, line, style, text, item[answer])]
    if question and not answer:
        raise BadLine("a question without an answer")
    if name := _name(item, FIELDS["text"]):
        return [Example("perplexity", line, "", references=(_text(item, name),), style=style)]
    raise BadLine(
        "no known shape", f"fields: {', '.join(sorted(item)[:8])}; a TOML file may describe the task"
    )


def _name(item: Mapping[str, Any], names: Sequence[str], but: Sequence[str] = ()) -> str:
    return next((name for name in names if name in item and name not in but), "")


def _required(item: Mapping[str, Any], names: Sequence[str]) -> str:
    if not (name := _name(item, names)):
        fields = ", ".join(sorted(item)[:8])
        raise BadLine("no question", f"fields: {fields}; a TOML file may describe the task")
    return name


def _text(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if isinstance(value, bool) or not _is_text(value):
        raise BadLine(f"field {name!r} is no text")
    if not str(value).strip():
        raise BadLine(f"field {name!r} is empty")
    return str(value).strip("\n") if isinstance(value, str) else str(value)


def _is_text(value: Any) -> bool:
    """Return True for a text, or for a finite number (which is then used as a text)."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _cells(item: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Return the choices in the fields `names` of a record. Empty choices at the end are left out."""
    values = [item[name] for name in names]
    if not all(value is None or _is_text(value) for value in values):
        raise BadLine("the choices are no list of texts")
    while len(values) > 2 and (values[-1] is None or not str(values[-1]).strip()):
        values.pop()
    return tuple("" if value is None else str(value).strip() for value in values)


def _choices_of(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(map(_is_text, values)):
        raise BadLine("the choices are no list of texts")
    return tuple(str(value).strip() for value in values)


def _index(value: Any, choices: Sequence[str], labels: Sequence[str] = ()) -> int:
    """Return the index of the right choice.

    Args:
        value: the answer in the record: the index of the right choice; its letter, such as A, (A) or A.; its
            label; its text; or a list with one of these.
    """
    if isinstance(value, list) and len(value) > 1:
        raise BadLine("several right answers", f"{len(value)}; one is needed")
    value = (value or [None])[0] if isinstance(value, list) else value
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadLine("a question without an answer")
    places = {label: i for i, label in enumerate(labels)}
    if not labels:
        places = {str(i): i for i in range(len(choices))}
        if isinstance(value, str | bool):
            # The answer "A" or "1" may be a letter, the text of a choice, or a number. The first of these
            # that fits counts. So letters are entered last: they replace equal keys.
            places |= {choice: choices.index(choice) for choice in choices}
            places |= {letter: i for i, letter in enumerate(string.ascii_lowercase[: len(choices)])}
            places |= {letter: i for i, letter in enumerate(string.ascii_uppercase[: len(choices)])}
    text = str(value).strip()
    number = re.sub(r"^(\d+)\.0$", r"\1", text)  # in a column with empty cells, pandas writes 1 as 1.0
    letter = _LETTER.fullmatch(text)
    for one in (text, number, *(letter.groups() if letter else ())):
        if one in places:
            return places[one]
    if len(choices) < 2:
        return -1
    known = f"labels {', '.join(labels)}" if labels else f"{len(choices)} choices"
    counted = f", counted from 0 to {len(choices) - 1}" if number.isdecimal() and not labels else ""
    raise BadLine("the answer is none of the choices", f"got {text[:40]!r}; {known}{counted}")


def _right(item: Mapping[str, Any]) -> Any:
    return item[_right_name(item)]


def _right_name(item: Mapping[str, Any]) -> str:
    if name := _name(item, ("answer", "gold", "answerkey", "label", "target", "correct", "答案")):
        return name
    raise BadLine("a question without an answer")


def _is_chinese(text: str) -> bool:
    return bool(_HAN.search(text))


def _listed(
    item: Mapping[str, Any],
    line: int,
    style: Style,
    question: str,
    choices: tuple[str, ...],
    labels: Sequence[str] = (),
) -> Example:
    """Return an example with choices. The prompt lists the choices, unless style.score is "text"."""
    answer = _index(_right(item), choices, labels[: len(choices)])
    if style.score == "text":
        return _choice(line, style, question, choices, answer, asks=True)
    return _lettered(line, style, question, choices, answer)


def _lettered(line: int, style: Style, question: str, choices: tuple[str, ...], answer: int) -> Example:
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise BadLine("fewer than two choices" if len(choices) < 2 else "more than 26 choices in a list")
    letters = tuple(string.ascii_uppercase[: len(choices)])
    one = Example("multiple_choice", line, "", choices, answer, (), letters, question.strip(), style)
    return replace(one, prompt=render_question(one))


def render_question(one: Example) -> str:
    """Return the prompt of a question whose choices are listed."""
    rows = [f"{letter}. {choice}" for letter, choice in zip(one.letters, one.choices)]
    if one.style.template:
        return render(one.style.template, {**one.record, "choices": "\n".join(rows)})
    return "\n".join(
        [one.question, *rows, "答案：" if _is_chinese(one.question + one.choices[0]) else "Answer:"]
    )


def _choice(
    line: int, style: Style, question: str, choices: tuple[str, ...], answer: Any,
    *, asks: bool = False, labels: Sequence[str] = (),
) -> Example:  # fmt: skip
    """Return an example with choices, whose texts are scored as continuations of the prompt.

    Exception: if `asks` is True and style.score is "letter", the prompt lists the choices with letters, and
    the letters are scored.

    Args:
        asks: True: the prompt is "Question: ... Answer:". False: the prompt is `question` itself.
    """
    right, prompt = _index(answer, choices, labels), question
    if asks and style.score == "letter":
        return _lettered(line, style, question, choices, right)
    if asks:
        chinese = _is_chinese(question)
        prompt = f"问题：{question}\n答案：" if chinese else f"Question: {question}\nAnswer:"
    return Example("multiple_choice", line, prompt, choices, right, (), (), question, style)


def _with_choices(item: dict[str, Any], line: int, style: Style, given: Any) -> Example:
    name = _required(item, FIELDS["question"])
    question = _text(item, name)
    if isinstance(given, Mapping):  # ARC's choices are {"text": [...], "label": [...]}
        choices, labels = _choices_of(given.get("text")), given.get("label") or []
        if not isinstance(labels, list):
            raise BadLine("the labels of the choices are no list")
        labels = [str(one) for one in labels]
        if len(choices) != len(labels):
            raise BadLine("choices and labels differ in number", f"{len(choices)} and {len(labels)}")
        if len({*labels}) < len(labels):
            raise BadLine("two choices have the same label")
        return _choice(line, style, question, choices, _right(item), asks=True, labels=labels)
    choices = _choices_of(given)
    if name == "query":  # `query` is the whole prompt: a question, or the beginning of a sentence
        one = _choice(line, style, question, choices, _right(item))
        asks = question.startswith("Question:") and not question.rstrip().endswith("Answer:")
        return replace(one, prompt=f"{question}\nAnswer:") if asks else one
    if style.score == "text":
        return _choice(line, style, question, choices, _right(item), asks=True)
    return _listed(item, line, style, question, choices)


def _hellaswag(item: dict[str, Any], line: int, style: Style) -> Example:
    if {"ctx_a", "ctx_b", "activity_label"} <= item.keys():
        rest = "" if item["ctx_b"] in (None, "") else _text(item, "ctx_b")
        start = f"{_text(item, 'activity_label')}: {_text(item, 'ctx_a')} {rest.capitalize()}"
    else:
        start = _text(item, "ctx")
    choices = tuple(map(_without_brackets, _choices_of(item["endings"])))
    label = item.get("label")
    if (number := whole_number(str(label))) is not None:
        label = number
    return _choice(line, style, _without_brackets(start), choices, label)


def _without_brackets(text: str) -> str:
    """Remove marks such as "[title]" from HellaSwag's texts, as other evaluation programs do."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _copa(item: dict[str, Any], line: int, style: Style) -> Example:
    words = {"cause": "because", "effect": "therefore"}
    if str(item.get("question")) not in words:
        raise BadLine("COPA asks for a cause or an effect", f"got {item.get('question')!r}")
    prompt = f"{_text(item, 'premise').strip()[:-1]} {words[item['question']]}"
    choices = tuple(text[0].lower() + text[1:] for text in (_text(item, "choice1"), _text(item, "choice2")))
    return _choice(line, style, prompt, choices, item.get("label"))


def _idiom(item: dict[str, Any], line: int, style: Style) -> Example:
    content, choices = _text(item, "content"), _choices_of(item["candidates"])
    before, gap, after = content.partition("#idiom#")
    if not gap or "#idiom#" in after:
        raise BadLine("not one #idiom# in the text")
    index = _index(_right(item), choices)
    filled = tuple(choice + after[:_REST] for choice in choices)
    return Example(
        "multiple_choice", line, before, filled, index, (), (), before, replace(style, delimiter="")
    )


def _sentences(item: dict[str, Any], line: int, style: Style) -> list[Example]:
    context, choices = _text(item, "context"), _choices_of(item["choices"])
    answers, gaps = item["answers"], list(_GAP.finditer(context))
    if not isinstance(answers, list) or len(answers) != len(gaps) or not gaps:
        raise BadLine("not as many answers as gaps", f"{len(gaps)} gaps")
    found, before, place = [], "", 0
    for gap, answer in zip(gaps, answers):
        before += context[place : gap.start()]
        after = context[gap.end() :]
        rest = after[: min(_REST, next((g.start() for g in _GAP.finditer(after)), len(after)))]
        index = _index(answer, choices)
        filled = tuple(choice + rest for choice in choices)
        if not before.strip():
            before = ""
        found.append(
            Example(
                "multiple_choice", line, before, filled, index, (), (), before, replace(style, delimiter="")
            )
        )
        before, place = before + (choices[index] if 0 <= index < len(choices) else ""), gap.end()
    return found


def _label(item: Mapping[str, Any], line: int, style: Style, text: str, label: Any) -> Example:
    """Return an example of classification. tasks.py later replaces its two choices by all labels."""
    if label is None or not str(label).strip():
        raise BadLine("a text without a label")
    if not _is_text(label):
        raise BadLine("the label is no text", "a text has one label")
    value = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()
    return Example("classification", line, text, (value, f"not {value}"), 0, (value,), (), text, style)


def _answer(
    item: Mapping[str, Any],
    line: int,
    style: Style,
    question: str,
    answer: Any,
    metrics: tuple[str, ...] = (),
) -> Example:
    if isinstance(answer, Mapping) and "text" in answer:  # SQuAD: {"text": [...], "answer_start": [...]}
        answer = answer["text"]
    given = answer if isinstance(answer, list) else [answer]
    if not given or any(one is None or not str(one).strip() for one in given):
        raise BadLine("a question without an answer")
    if not all(map(_is_text, given)):
        raise BadLine("the answer is no text")
    texts = tuple(str(one).strip() for one in given)
    if all(_NUMBER_ANSWER.search(text) for text in texts):
        metrics = ("number",)
    chosen = style.metrics or metrics or ("exact_match", "character_f1")
    return Example("generation", line, question, references=texts, question=question,
                   style=replace(style, metrics=chosen))  # fmt: skip


# -- a task described by a TOML file -----------------------------------------------------------------------

_FIELD = re.compile(r"\{(\w+)\}")


def render(template: str, item: Mapping[str, Any]) -> str:
    """Return a template with a record's fields in place of {field}. Raises BadLine for a missing field."""

    def value(match: re.Match[str]) -> str:
        found = item.get(match[1].lower())
        if found is None:
            raise _no_field(match[1], item)
        if not _is_text(found):
            raise BadLine(f"field {match[1]!r} is no text")
        return str(found)

    return _FIELD.sub(value, template)


def _no_field(name: str, item: Mapping[str, Any]) -> BadLine:
    return BadLine(f"no field {name!r}", f"fields: {', '.join(sorted(item)[:8])}")


def _field(item: Mapping[str, Any], name: str) -> Any:
    if name.lower() not in item:
        raise _no_field(name, item)
    return item[name.lower()]


def _by_style(item: dict[str, Any], line: int, style: Style, form: Form | None) -> list[Example]:
    if style.choices:
        if len(style.choices) == 1 and "{" not in style.choices[0]:
            choices = _choices_of(_field(item, style.choices[0]))
        else:
            choices = tuple(render(one, item) for one in style.choices)
        right = _field(item, style.answer) if style.answer else _right(item)
        if str(right) not in choices and (number := whole_number(str(right))) is not None:
            right = number
        letters = tuple(string.ascii_uppercase[: len(choices)]) if style.score == "letter" else ()
        if letters and len(letters) < len(choices):
            raise BadLine("more than 26 choices in a list")
        one = Example(form or "multiple_choice", line, "", choices, _index(right, choices), (), letters, "",
                      style, record=item)  # fmt: skip
        prompt = render_question(one) if letters else render(style.template, item)
        return [replace(one, prompt=prompt, question=prompt)]
    prompt = render(style.template, item)
    if form == "perplexity":
        return [Example("perplexity", line, "", references=(prompt,), style=style)]
    answer = _field(item, style.answer) if style.answer else _right(item)
    if form == "classification":
        return [_label(item, line, style, prompt, answer)]
    if form == "cloze":
        if answer is not None and not _is_text(answer):
            raise BadLine("the answer is no text")
        text = "" if answer is None else str(answer).strip()
        return [Example("cloze", line, prompt, references=(text,), question=prompt, style=style)]
    return [_answer(item, line, style, prompt, answer)]
