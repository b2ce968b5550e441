"""Turns a conversation into one prompt, with the chat template that comes with a model.

    tokenizer = BpeTokenizer.from_folder("Qwen3-0.6B")
    ids = encode_chat(tokenizer, [{"role": "user", "content": "你好"}], add_generation_prompt=True)

If a user types `<|im_end|>`, it stays a text of ten characters. If the template writes it, it becomes a
special token. To distinguish the two cases, the template is rendered twice: first as it is, then with a
private Unicode character in place of each special token in the texts that the template *writes*. Texts that
it *compares* with do not change, so `message.content.split('</think>')` still works. Users' messages do not
change either. A template may build a special token from shorter texts (`'<|' + message.role + '|>'`). For
such templates there is a third rendering. It does not replace whole special tokens, but every single
character that occurs in one of them.

If a message of the assistant has `token_ids`, the ids of its text, these ids are used. Otherwise the text is
encoded. In the assistant's texts, `<think>` becomes a special token, because the model wrote it, and not a
user. Two kinds of special tokens stay text even there: tokens that the tokenizer's configuration gives a
function (such as eos_token), and tokens that the template contains.

A template is a program that cannot be trusted; template_sandbox.py runs it.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

from jinja2 import nodes

from minigpt.errors import InputError
from minigpt.tokenization.template_sandbox import SandboxedTemplate

__all__ = ["ROLES", "ChatTokenizer", "encode_chat", "encode_chat_with_mask", "render_chat"]

ROLES = ("system", "user", "assistant", "tool")
# A message's reasoning may stand under any of these keys. All mean the same; the first is the most usual.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTokenizer(Protocol):
    """The tokenizer interface that `encode_chat` needs. `BpeTokenizer` implements it."""

    special_tokens: dict[str, int]
    """text of a special token -> id"""
    named_tokens: dict[str, str]
    """role, such as "eos_token" -> text of the token"""

    @property
    def chat_template(self) -> str | None:
        """Return the Jinja template, or None."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text, without special tokens, and each token's start and end in the text."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    named_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """Render a conversation as text, like transformers' `apply_chat_template(..., tokenize=False)`.

    The text is for people, because special tokens that a user typed look like the template's own. Use
    `encode_chat` for the input of a model.

    Args:
        template: the Jinja template.
        messages: each has `role` (one of ROLES) and `content`; optional: `reasoning_content`, `tool_calls`;
            for the assistant also `token_ids`, the ids of the content. The template does not see `token_ids`.
        named_tokens: the template's variables bos_token, eos_token and so on.
        tools: descriptions of functions, in types that JSON has.
        documents: texts to answer from, in types that JSON has.
        add_generation_prompt: True: end with the text that begins an answer of the assistant.
        variables: further variables of the template, such as enable_thinking. A variable whose value is None
            is left out.

    Raises:
        InputError: for an invalid message, and for a template that fails (see `SandboxedTemplate`).
    """
    given = _variables(messages, tools, documents, add_generation_prompt, **variables)
    return _compiled(template).render({**(named_tokens or {}), **given})


def encode_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    **options: Any,
) -> list[int]:
    """Return the ids of a conversation. Only the template and the assistant's messages give special tokens.

    Args:
        tokenizer: the tokenizer.
        messages: each has `role` and `content`; more keys are listed in `render_chat`.
        template: the Jinja template. Default: the tokenizer's own.
        options: the other arguments of `render_chat`, such as tools.

    Raises:
        InputError: as `render_chat`; also if there is no template, or if the template's special tokens
            cannot be distinguished from text that users type.
    """
    return _encoded(tokenizer, messages, template, options)[0]


def encode_chat_with_mask(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    **options: Any,
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation, and a mask of the same length: 1 for the assistant's tokens, else 0.

    If the template has `{% generation %}` blocks, these mark the assistant's tokens. Otherwise these tokens
    are the contents of the assistant's messages, and the special token after each content. Exception: if the
    template removes the reasoning (the text before `</think>`), only the text after `</think>` gets a 1.

    Raises:
        InputError: as `encode_chat`; also if a template without `{% generation %}` blocks changes texts of
            the assistant.
    """
    used = tokenizer.chat_template if template is None else template
    if used is None or re.search(r"{%-?\s*generation\b", used):
        return _encoded(tokenizer, messages, template, options)
    try:
        return _encoded(tokenizer, messages, template, options, before="")
    except _LostError:
        return _encoded(tokenizer, messages, template, options, before="</think>")


class _LostError(InputError):
    """Raised if a template changes, repeats or omits texts of the assistant. The mask is then unknown."""


def _encoded(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    options: dict[str, Any],
    before: str | None = None,
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation, and a mask: 1 for the assistant's tokens, else 0.

    Args:
        before: decides which part of each content of the assistant gets a 1. None: the template's
            `{% generation %}` blocks decide. "": the whole content. A text such as "</think>": the part after
            the last "</think>", or the whole content if it has no "</think>".
    """
    template = tokenizer.chat_template if template is None else template
    if template is None:
        raise InputError("the tokenizer has no chat_template: give one, or take a model that can chat")
    given = _variables(messages, **options)
    special = sorted(tokenizer.special_tokens, key=len, reverse=True)
    characters = sorted({char for token in special for char in token if not char.isspace()})
    written = {place: own_ids for place, one in enumerate(messages) if (own_ids := _written_ids(one, place))}
    needed = 2 + len(special) + len(characters) + len(written)
    begin, end, *private = _private_characters(needed, [template, *_texts(given)])
    stand_ins = dict(zip(special, private))
    twins = dict(zip(characters, private[len(special) :]))
    own = dict(zip(written, private[len(special) + len(characters) :]))
    plain = _compiled(template).render({**tokenizer.named_tokens, **given})
    count = None
    if before is not None:
        given, count = _with_marks(given, begin, end, before)
    reading = _Reading(tokenizer, template, given, plain, stand_ins, twins, (begin, end), count)
    marked = reading.marked(own)
    for token, (left, right) in getattr(tokenizer, "stripping", {}).items():
        around, char = f"[\\s{begin}{end}]*", stand_ins[token]
        pattern = f"{around if left else ''}{char}{around if right else ''}"
        marked = re.sub(pattern, lambda match: re.sub(r"\s", "", match[0]), marked)

    ids: list[int] = []
    mask: list[int] = []
    # `is_said` is 1 inside a text of the assistant. `closing` is 1 for white space right after such a text,
    # and for the special token that follows.
    is_said = closing = 0
    ids_of = {char: [tokenizer.special_tokens[token]] for token, char in stand_ins.items()}
    ids_of |= {char: written[place] for place, char in own.items()}
    for piece in re.split(f"([{''.join(private)}])" if private else "(?!)", marked):
        if piece in ids_of:
            ids += ids_of[piece]
            mask += [is_said | closing] * len(ids_of[piece])
            closing = 0
            continue
        # for each character of `piece` except the marks `begin` and `end`: 1 if the assistant says it
        said_at: list[int] = []
        for char in piece:
            if char in (begin, end):
                is_said = int(char == begin)
                closing = int(char == end and before is not None)
            else:
                closing &= char.isspace()
                said_at.append(is_said | closing)
        new, offsets = tokenizer.encode_with_offsets(piece.replace(begin, "").replace(end, ""))
        ids += new
        mask += [max(said_at[start:stop], default=is_said) for start, stop in offsets]
    return ids, mask


def _written_ids(message: Mapping[str, Any], place: int) -> list[int]:
    """Return the `token_ids` of an assistant's message, or [] if there are none."""
    ids = message.get("token_ids")
    if not ids or not message.get("content") or message["role"] != "assistant":
        return []
    if not isinstance(ids, Sequence) or not all(type(index) is int and index >= 0 for index in ids):
        raise InputError(f"message {place + 1}: token_ids must be a list of ids: got {ids!r:.80}")
    return list(ids)


def _with_marks(given: dict[str, Any], begin: str, end: str, before: str) -> tuple[dict[str, Any], int]:
    """Put the characters `begin` and `end` around the assistant's texts.

    If a text contains `before`, only the text after the last `before` is marked. White space at both ends is
    not marked, because many templates strip it.

    Returns: the template's variables with marked texts, and the number of marked texts.
    """
    messages = []
    count = 0
    for message in given["messages"]:
        if message["role"] == "assistant" and message.get("content") is not None:
            head, found, said = (
                message["content"].rpartition(before) if before else ("", "", message["content"])
            )
            core = said.strip()
            left, _, right = said.partition(core) if core else ("", "", said)
            message = {**message, "content": f"{head}{found}{left}{begin}{core}{end}{right}"}
            count += 1
        messages.append(message)
    return {**given, "messages": messages}, count


@dataclass(frozen=True)
class _Reading:
    """Renders a template. A Unicode private-use character replaces each special token that it writes."""

    tokenizer: ChatTokenizer
    template: str
    given: dict[str, Any]  # the template's variables; the assistant's texts may have `marks` around them
    plain: str  # the conversation as `render_chat` returns it, to check other renderings against
    stand_ins: dict[str, str]  # special token -> private character that replaces it; longest tokens first
    twins: dict[str, str]  # each character of the special tokens -> private character that replaces it
    marks: tuple[str, str]  # (character before each text of the assistant, character after it)
    count: int | None  # number of marked texts of the assistant; None: the template itself writes the marks

    def marked(self, own: dict[int, str]) -> str:
        """Return the rendered text with private characters in place of special tokens.

        Args:
            own: index of a message -> private character that replaces its whole text. If the template
                examines the text of a message, this text is not replaced.

        Raises:
            _LostError: if the template leaves out or repeats texts of the assistant that have `marks`.
            InputError: if the template's special tokens cannot be distinguished from text that users type.
        """
        found = self._marked(own)
        if found is None and own:
            found = self._marked({k: v for k, v in own.items() if self._marked({k: v}) is not None})
        if found is None and own:
            found = self._marked({})
        if found is not None:
            return found
        if not self._has_marks(self._rendered({}, self.stand_ins)):
            raise _LostError(
                "the chat template has no {% generation %} block, and it leaves out or repeats what the "
                "assistant says: which tokens are to be learned is not known"
            )
        raise InputError(
            "the chat template computes with the text of special tokens, so that they cannot be told "
            "from what users type; write them as plain constants"
        )

    def _marked(self, own: Mapping[int, str]) -> str | None:
        for render in (self._by_tokens, self._by_characters):
            if self._is_right(text := render(own), own):
                return text
        return None

    def _by_tokens(self, own: Mapping[int, str]) -> str:
        """Render with private characters in place of special tokens.

        A special token is not found if the template joins it from several texts.
        """
        return self._rendered(own, self.stand_ins)

    def _by_characters(self, own: Mapping[int, str]) -> str:
        """Render as `_by_tokens`, but also replace special tokens that the template joins from several texts.

        own: as in `marked`.
        """
        text = self._rendered(own, self.twins)
        origin = {twin: char for char, twin in self.twins.items()}
        plain = "".join(origin.get(char, char) for char in text)
        tokens = re.compile("|".join(map(re.escape, self.stand_ins)) or "(?!)")
        found, done, place = "", 0, 0
        while match := tokens.search(plain, place):
            start, stop = match.span()
            typed = "".join(char for char in text[start:stop] if char not in origin)
            inside = text[start + 1 : stop - 1]
            if typed == "" or (typed in ROLES and typed in inside):
                found += plain[done:start] + self.stand_ins[match[0]]
                done = place = stop
            else:
                place = start + 1
        return found + plain[done:]

    def _rendered(self, own: Mapping[int, str], changes: Mapping[str, str]) -> str:
        """Render the template.

        Args:
            own: index of a message -> private character that replaces its whole text.
            changes: part of a text in the template -> private character that replaces this part.
        """
        named = {role: _replaced(changes, token) for role, token in self.tokenizer.named_tokens.items()}
        compiled = _compiled(self.template, tuple(changes.items()), self.marks)
        messages = [self._message(one, own.get(place)) for place, one in enumerate(self.given["messages"])]
        return compiled.render({**named, **self.given, "messages": messages})

    def _message(self, message: dict[str, Any], own: str | None) -> dict[str, Any]:
        """Return a message for the template. Only the assistant's messages are changed.

        If `own` is given, this private character replaces the whole text. Otherwise a private character
        replaces each special token in the text. Exceptions: tokens with a role (such as eos_token), and
        tokens that the template contains.
        """
        content = message.get("content")
        if message["role"] != "assistant" or not content:
            return message
        if own is not None:
            begin, end = self.marks
            return {**message, "content": f"{begin}{own}{end}" if begin in content else own}
        known = (*self.tokenizer.named_tokens.values(), self.template)
        inner = {
            token: char for token, char in self.stand_ins.items() if not any(token in text for text in known)
        }
        return {**message, "content": _replaced(inner, content)}

    def _is_right(self, text: str, own: Mapping[int, str]) -> bool:
        """Return True if the private characters in a rendered text stand for the template's special tokens.

        Three conditions must hold:

        - The text equals `plain`, if each private character is replaced by what it stands for (a special
          token or a message's text), and the marks (the characters around the assistant's texts) are removed.
        - The text has all marks.
        - The text contains special tokens as text only where users typed them.
        """
        typed = list(_texts(self.given))
        if any(text.count(token) > sum(one.count(token) for one in typed) for token in self.stand_ins):
            return False
        back = {char: self.given["messages"][place]["content"] for place, char in own.items()}
        back |= dict.fromkeys(self.marks, "") | {char: token for token, char in self.stand_ins.items()}
        return _replaced(back, text) == self.plain and self._has_marks(text)

    def _has_marks(self, text: str) -> bool:
        return self.count is None or all(text.count(mark) == self.count for mark in self.marks)


@lru_cache(maxsize=8)  # compiling a template takes longer than rendering it
def _compiled(
    template: str, stand_ins: tuple[tuple[str, str], ...] = (), marks: tuple[str, str] = ("", "")
) -> SandboxedTemplate:
    return SandboxedTemplate(template, partial(_mark, partial(_replaced_constant, dict(stand_ins))), marks)


def _variables(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Check and copy the template's variables. The template gets only types that JSON has."""
    if isinstance(messages, str | Mapping) or not messages:
        raise InputError("a conversation is a list of at least one message with `role` and `content`")
    given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    given |= {name: value for name, value in more.items() if value is not None}
    given = {name: _plain(value, name) for name, value in given.items()}
    return {**given, "messages": [_message(each, f"message {i}") for i, each in enumerate(messages, 1)]}


def _message(message: object, name: str) -> dict[str, Any]:
    """Check a message, and return a copy of it for the template.

    If the message has a reasoning, the copy has it as `thinking` and as `reasoning_content`, because
    templates use different keys. The copy has no `token_ids` and no key whose value is None.
    """
    if not isinstance(message, Mapping):
        raise InputError(f"{name} must have `role` and `content`: got {message!r:.80}")
    for key in ("role",) if message.get("tool_calls") else ("role", "content"):
        if key not in message:
            raise InputError(f"{name} has no {key!r}")
    for key in ("role", "content"):
        value = message.get(key, "")
        if type(value) is not str and not (value is None and key == "content" and message.get("tool_calls")):
            raise InputError(f"{name}: {key!r:.80} must be text: got {message[key]!r:.80}")
    if message["role"] not in ROLES:
        raise InputError(f"{name}: role must be one of {', '.join(ROLES)}: got {message['role']!r:.80}")
    kept = {key: value for key, value in message.items() if value is not None and key != "token_ids"}
    plain: dict[str, Any] = _plain(kept, name)
    thoughts = [plain[key] for key in _REASONING if key in plain]
    return {"thinking": thoughts[0], **plain, "reasoning_content": thoughts[0]} if thoughts else plain


def _plain(value: Any, name: str) -> Any:
    """Copy a value of JSON's types. Raise InputError for other types and for lone surrogates."""
    if type(value) is str and (half := re.search("[\ud800-\udfff]", value)):
        raise InputError(
            f"{name}, position {half.start()}: U+{ord(half[0]):04X} is half a character "
            f"(a lone surrogate); remove it"
        )
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {_plain(key, name): _plain(item, f"{name}: {key!r}") for key, item in value.items()}
    raise InputError(f"{name} must be text, or what JSON can hold: got {value!r:.80}")


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value of JSON's types, dict keys included."""
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _texts(item)
        case dict():
            for item in (*value.keys(), *value.values()):
                yield from _texts(item)


def _private_characters(count: int, texts: Iterable[str]) -> list[str]:
    """Return characters of Unicode's private plane 16 that occur in none of the texts."""
    used = set().union(*texts)
    unused = (char for char in map(chr, range(0x100000, 0x10FFFE)) if char not in used)
    free = list(itertools.islice(unused, count))
    if len(free) < count:
        raise InputError("the messages hold too many characters of Unicode's private plane 16")
    return free


def _replaced(stand_ins: Mapping[str, str], text: str) -> str:
    for token, stand_in in stand_ins.items():
        text = text.replace(token, stand_in)
    return text


def _replaced_constant(stand_ins: Mapping[str, str], text: str) -> str:
    """Replace each key of `stand_ins` by its value (a private character) in a text of the template.

    A key is a special token, or a single character of the special tokens, such as s. The placeholders %s, {}
    and {name} do not change, because the template puts values in their place later.
    """
    parts = re.split(r"(%(?:\.\d)?[sdrfx]|{\w*})", text)
    return "".join(part if index % 2 else _replaced(stand_ins, part) for index, part in enumerate(parts))


def _mark(mark: Callable[[str], str], node: nodes.Node) -> None:
    """Apply `mark` to the texts that a template writes, but not to texts with which it compares."""
    match node:
        case nodes.TemplateData():
            node.data = mark(node.data)
        case nodes.Const(value=str()):
            node.value = mark(node.value)
        case nodes.Compare() | nodes.Test():
            pass
        case nodes.Filter(name="format" | "join") | nodes.Call(node=nodes.Getattr(attr="format" | "join")):
            for child in node.iter_child_nodes():  # a filter such as `join` writes its arguments, too
                _mark(mark, child)
        case nodes.Filter() | nodes.Getitem() if node.node is not None:
            _mark(mark, node.node)
        case nodes.Call() if not isinstance(node.node, nodes.Name):
            # A method such as .split('<think>') compares with its argument. So the arguments of a method stay
            # unchanged. (A macro writes its arguments, so these are changed.)
            _mark(mark, node.node)
        case _:
            for child in node.iter_child_nodes():
                _mark(mark, child)
