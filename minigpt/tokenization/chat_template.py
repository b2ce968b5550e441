"""A conversation as one prompt, by the template that comes with a model.

    tokenizer = BpeTokenizer.from_folder("Qwen3-0.6B")
    ids = encode_chat(tokenizer, [{"role": "user", "content": "你好"}], add_generation_prompt=True)

Only the template writes special tokens: `<|im_end|>` in a message stays ten characters. A second rendering
tells the two apart. In it the constants that the template *writes* hold one private character in place of
each special token. The constants that it *compares* with are the same both times, and so are the messages:
`message.content.split('</think>')` finds what it looks for. A template that puts special tokens together
from shorter constants (`'<|' + message.role + '|>'`) is rendered a third time, with each character of its
constants made private.

An answer that the model wrote is read with the ids that it wrote, where they are given (`token_ids`). Without
them its text is encoded anew, and special tokens in it that neither have a role nor stand in the template,
such as `<think>`, are read as tokens: no user has typed them.

A template is a program, and not to be trusted: template_sandbox.py runs it.
"""

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
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # the names of one thing; the first is the usual one


class ChatTokenizer(Protocol):
    """What `encode_chat` needs of a tokenizer; `minigpt.tokenization.bpe.BpeTokenizer` has it."""

    special_tokens: dict[str, int]
    """text -> id"""
    named_tokens: dict[str, str]
    """role, such as "eos_token" -> text"""

    @property
    def chat_template(self) -> str | None:
        """The template in Jinja's language, if there is one."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, none of them special, and where each token begins and ends in it."""


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
    """The conversation as text, as transformers' `apply_chat_template(..., tokenize=False)` writes it.

    It is for people. In it the special tokens that a user typed look like the template's own: what a model
    is to read comes from `encode_chat`.

    Args:
        template: in Jinja's language.
        messages: each with `role` (one of ROLES) and `content`, perhaps `reasoning_content`, `tool_calls`;
            of the assistant perhaps `token_ids`, what the content was decoded from, which no template sees.
        named_tokens: the template's variables bos_token, eos_token and so on.
        tools: descriptions of functions, as JSON has them.
        documents: texts to answer from, as JSON has them.
        add_generation_prompt: whether to end with the beginning of an answer.
        variables: others that the template knows, such as enable_thinking; one that is None is left out.

    Raises:
        InputError: for a message that is none, and for a template that fails (see `SandboxedTemplate`).
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
    """The ids of a conversation: special tokens where the template writes them, and nowhere else.

    Args:
        template: None: the tokenizer's own.
        options: as `render_chat`.

    Raises:
        InputError: as `render_chat`; without a template; and for a template whose special tokens cannot be
            told from what users type.
    """
    return _encoded(tokenizer, messages, template, options)[0]


def encode_chat_with_mask(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    **options: Any,
) -> tuple[list[int], list[int]]:
    """As `encode_chat`, and which tokens the assistant says: 1 in a `{% generation %}` block, 0 elsewhere.

    Raises:
        InputError: as `encode_chat`, and for a template without such a block.
    """
    used = tokenizer.chat_template if template is None else template
    if used is not None and not re.search(r"{%-?\s*generation\b", used):
        raise InputError(
            "the chat template has no {% generation %} block: it does not say what the assistant says"
        )
    return _encoded(tokenizer, messages, template, options)


def _encoded(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    options: dict[str, Any],
) -> tuple[list[int], list[int]]:
    template = tokenizer.chat_template if template is None else template
    if template is None:
        raise InputError("the tokenizer has no chat_template: give one, or take a model that can chat")
    given = _variables(messages, **options)
    texts = list(_texts(given))
    special = sorted(tokenizer.special_tokens, key=len, reverse=True)
    characters = sorted({character for token in special for character in token if not character.isspace()})
    written = {place: said for place, one in enumerate(messages) if (said := _ids_of(one, place))}
    count = 2 + len(special) + len(characters) + len(written)
    begin, end, *private = _private_characters(count, [template, *texts])
    stand_ins = dict(zip(special, private))
    twins = dict(zip(characters, private[len(special) :]))
    own = dict(zip(written, private[len(special) + len(characters) :]))  # message -> private character
    plain = _compiled(template).render({**tokenizer.named_tokens, **given})

    reading = _Reading(tokenizer, template, given, plain, special, stand_ins, twins, (begin, end))
    marked = reading.marked(own)
    ids_of = {char: [tokenizer.special_tokens[token]] for token, char in stand_ins.items()}
    ids_of |= {char: written[place] for place, char in own.items()}
    for token, (before, after) in getattr(tokenizer, "stripping", {}).items():
        blank, mark, char = r"\s*", f"[{begin}{end}]*", stand_ins[token]
        marked = re.sub(f"{blank}({mark}){char}", rf"\1{char}", marked) if before else marked
        marked = re.sub(f"{char}({mark}){blank}", rf"{char}\1", marked) if after else marked
    ids: list[int] = []
    mask: list[int] = []
    is_said = 0  # 1 in a generation block
    for piece in re.split(f"([{''.join(private)}])" if private else "(?!)", marked):
        if piece in ids_of:
            ids += ids_of[piece]
            mask += [is_said] * len(ids_of[piece])
            continue
        said_at: list[int] = []  # for each character of the piece
        for char in piece:
            if char in (begin, end):
                is_said = int(char == begin)
            else:
                said_at.append(is_said)
        new, offsets = tokenizer.encode_with_offsets(piece.replace(begin, "").replace(end, ""))
        ids += new
        mask += [max(said_at[start:stop], default=is_said) for start, stop in offsets]
    return ids, mask


def _ids_of(message: object, place: int) -> list[int]:
    """The ids that the assistant wrote, if they are given."""
    given = message.get("token_ids") if isinstance(message, Mapping) else None
    if not given or not message.get("content"):  # type: ignore[attr-defined]
        return []
    if not isinstance(given, Sequence) or not all(type(index) is int and index >= 0 for index in given):
        raise InputError(f"message {place + 1}: token_ids must be a list of ids: got {given!r}")
    return list(given)


@dataclass(frozen=True)
class _Reading:
    """A template's text with a private character for each special token that the template writes."""

    tokenizer: ChatTokenizer
    template: str
    given: dict[str, Any]
    plain: str  # the text as people see it
    special: list[str]  # the longest first
    stand_ins: dict[str, str]  # special token -> private character
    twins: dict[str, str]  # character of a special token -> private character
    marks: tuple[str, str]  # around generation blocks

    def marked(self, own: Mapping[int, str]) -> str:
        """The text. The contents of the messages in `own` are private characters, if the template allows it.

        Raises:
            InputError: for a template whose special tokens cannot be told from what users type.
        """
        found = self._marked(own) if own else None
        if found is None and own:  # a template that looks into one of them: this one stays
            found = self._marked({k: v for k, v in own.items() if self._marked({k: v}) is not None})
        found = self._marked({}) if found is None else found
        if found is None:
            raise InputError(
                "the chat template computes with the text of special tokens, so that they cannot be told "
                "from what users type; write them as plain constants"
            )
        return found

    def _marked(self, own: Mapping[int, str]) -> str | None:
        return self._by_tokens(own) or self._by_characters(own)

    def _rendered(self, own: Mapping[int, str], changes: Mapping[str, str]) -> str:
        """The text with changed constants, and with `own` in private characters."""
        named = {role: _replaced(changes, token) for role, token in self.tokenizer.named_tokens.items()}
        messages = [
            {**one, "content": own[place]} if place in own else self._message(one)
            for place, one in enumerate(self.given["messages"])
        ]
        compiled = _compiled(self.template, tuple(changes.items()), self.marks)
        return compiled.render({**named, **self.given, "messages": messages})

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the assistant said, with the tokens in it that only a model writes."""
        if message["role"] != "assistant" or not message.get("content"):
            return message
        known = (*self.tokenizer.named_tokens.values(), self.template)
        inner = {
            token: char for token, char in self.stand_ins.items() if not any(token in text for text in known)
        }
        return {**message, "content": _replaced(inner, message["content"])}

    def _is_right(self, text: str, own: Mapping[int, str]) -> bool:
        """Whether a text is the plain one again with its private characters replaced, and not less of it.

        Special tokens in it that are no private characters must all be typed.
        """
        typed = list(_texts(self.given))
        if any(text.count(token) > sum(one.count(token) for one in typed) for token in self.special):
            return False
        back = dict.fromkeys(self.marks, "") | {char: token for token, char in self.stand_ins.items()}
        back |= {char: self.given["messages"][place]["content"] for place, char in own.items()}
        return _replaced(back, text) == self.plain

    def _by_tokens(self, own: Mapping[int, str]) -> str | None:
        """Special tokens stand as a whole in the template's constants; None if that is not so."""
        text = self._rendered(own, self.stand_ins)
        return text if self._is_right(text, own) else None

    def _by_characters(self, own: Mapping[int, str]) -> str | None:
        """Special tokens are put together from characters of the template's constants, and from roles."""
        text = self._rendered(own, self.twins)
        origin = {twin: character for character, twin in self.twins.items()}
        plain = "".join(origin.get(character, character) for character in text)
        tokens = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        found, done, place = "", 0, 0
        while match := tokens.search(plain, place):
            start, stop = match.span()
            typed = "".join(character for character in text[start:stop] if character not in origin)
            inside = text[start + 1 : stop - 1]
            if typed == "" or (typed in ROLES and typed in inside):
                found += plain[done:start] + self.stand_ins[match[0]]
                done = place = stop
            else:
                place = start + 1
        found += plain[done:]
        return found if self._is_right(found, own) else None


@lru_cache(maxsize=8)  # compiling takes longer than rendering
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
    """The template's variables, checked and copied: a template sees plain JSON and nothing else."""
    if isinstance(messages, str | Mapping) or not messages:
        raise InputError("a conversation is a list of at least one message with `role` and `content`")
    given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    given |= {name: value for name, value in more.items() if value is not None}
    given = {name: _plain(value, name) for name, value in given.items()}
    return {**given, "messages": [_message(each, f"message {i}") for i, each in enumerate(messages, 1)]}


def _message(message: object, name: str) -> dict[str, Any]:
    """A message without keys that are None, and its reasoning under the names that templates use."""
    if not isinstance(message, Mapping):
        raise InputError(f"{name} must have `role` and `content`: got {message!r}")
    for key in ("role",) if message.get("tool_calls") else ("role", "content"):
        if key not in message:
            raise InputError(f"{name} has no {key!r}")
    for key in ("role", "content"):
        value = message.get(key, "")
        if type(value) is not str and not (value is None and key == "content" and message.get("tool_calls")):
            raise InputError(f"{name}: {key!r} must be text: got {message[key]!r}")
    if message["role"] not in ROLES:
        raise InputError(f"{name}: role must be one of {', '.join(ROLES)}: got {message['role']!r}")
    kept = {key: value for key, value in message.items() if value is not None and key != "token_ids"}
    plain: dict[str, Any] = _plain(kept, name)
    thoughts = [plain[key] for key in _REASONING if key in plain]
    return {"thinking": thoughts[0], **plain, "reasoning_content": thoughts[0]} if thoughts else plain


def _plain(value: Any, name: str) -> Any:
    """A copy of JSON's values; anything else, and half a character, is an InputError."""
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
    raise InputError(f"{name} must be text, or what JSON can hold: got {value!r}")


def _texts(value: Any) -> Iterator[str]:
    """Every text in JSON's values, the keys included."""
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
    """Characters of Unicode's last private plane that none of the texts holds."""
    used = set().union(*texts)
    free = [chr(point) for point in range(0x100000, 0x10FFFE) if chr(point) not in used][:count]
    if len(free) < count:
        raise InputError("the messages hold too many characters of Unicode's private plane 16")
    return free


def _replaced(stand_ins: Mapping[str, str], text: str) -> str:
    for token, stand_in in stand_ins.items():
        text = text.replace(token, stand_in)
    return text


def _replaced_constant(stand_ins: Mapping[str, str], text: str) -> str:
    """As _replaced, but the places of values in a pattern of `format` stay: %s, {} and {name}."""
    parts = re.split(r"(%(?:\.\d)?[sdrfx]|{\w*})", text)
    return "".join(part if index % 2 else _replaced(stand_ins, part) for index, part in enumerate(parts))


def _mark(mark: Callable[[str], str], node: nodes.Node) -> None:
    """Put stand-ins into the constants that a template writes, not into those that it compares with."""
    match node:
        case nodes.TemplateData():
            node.data = mark(node.data)
        case nodes.Const(value=str()):
            node.value = mark(node.value)
        case nodes.Compare() | nodes.Test():
            pass
        case nodes.Filter(name="format" | "join") | nodes.Call(node=nodes.Getattr(attr="format" | "join")):
            for child in node.iter_child_nodes():  # these write their arguments
                _mark(mark, child)
        case nodes.Filter() | nodes.Getitem() if node.node is not None:
            _mark(mark, node.node)
        case nodes.Call() if not isinstance(node.node, nodes.Name):
            # .split('<think>') looks for its argument; a macro or a namespace writes it
            _mark(mark, node.node)
        case _:
            for child in node.iter_child_nodes():
                _mark(mark, child)
