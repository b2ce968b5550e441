"""A conversation as one prompt, by the template that comes with a model.

    tokenizer = BpeTokenizer.from_folder("Qwen3-0.6B")
    ids = encode_chat(tokenizer, [{"role": "user", "content": "你好"}], add_generation_prompt=True)

Only the template writes special tokens: `<|im_end|>` in a message stays ten characters. A second rendering
tells the two apart. In it the constants that the template *writes* hold one private character in place of
each special token. The constants that it *compares* with are the same both times, and so are the messages:
`message.content.split('</think>')` finds what it looks for.

A template is a program, and not to be trusted: template_sandbox.py runs it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        messages: each with `role` (one of ROLES) and `content`, perhaps `reasoning_content`, `tool_calls`.
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
    """As `encode_chat`, and which tokens the assistant says: 1 there, 0 elsewhere.

    A template with `{% generation %}` blocks says itself which ones these are. With another one they are the
    contents of the assistant's messages, each with the special token behind it. (What such a
    content holds before a `</think>` does not count, if the template takes it out.)

    Raises:
        InputError: as `encode_chat`, and for a template without such a block that changes the contents.
    """
    used = tokenizer.chat_template if template is None else template
    if used is None or re.search(r"{%-?\s*generation\b", used):
        return _encoded(tokenizer, messages, template, options)
    try:
        return _encoded(tokenizer, messages, template, options, before="")
    except _LostError:
        return _encoded(tokenizer, messages, template, options, before="</think>")


class _LostError(InputError):
    """The template does not write all contents of the assistant's messages as they are."""


def _encoded(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    template: str | None,
    options: dict[str, Any],
    before: str | None = None,
) -> tuple[list[int], list[int]]:
    """See `encode_chat_with_mask`.

    Args:
        before: None: the template marks what the assistant says. Otherwise the contents of its messages are
            marked, from behind the last `before` on, where they hold it.
    """
    template = tokenizer.chat_template if template is None else template
    if template is None:
        raise InputError("the tokenizer has no chat_template: give one, or take a model that can chat")
    given = _variables(messages, **options)
    texts = list(_texts(given))
    special = sorted(tokenizer.special_tokens, key=len, reverse=True)
    begin, end, *private = _private_characters(2 + len(special), [template, *texts])
    stand_ins = dict(zip(special, private))
    named = {role: _replaced(stand_ins, token) for role, token in tokenizer.named_tokens.items()}
    plain = _compiled(template).render({**tokenizer.named_tokens, **given})
    if before is not None:
        given, count = _with_marks(given, begin, end, before)
    marked = _compiled(template, tuple(stand_ins.items()), (begin, end)).render({**named, **given})
    if before is not None and not count == marked.count(begin) == marked.count(end):
        raise _LostError(
            "the chat template has no {% generation %} block, and it leaves out or repeats what the "
            "assistant says: which tokens are to be learned is not known"
        )
    written = _replaced({begin: "", end: "", **{char: token for token, char in stand_ins.items()}}, marked)
    more = [token for token in special if marked.count(token) > sum(text.count(token) for text in texts)]
    if written != plain or more:
        raise InputError(
            "the chat template computes with the text of special tokens"
            + (f", such as {more[0]}," if more else "")
            + " so that they cannot be told from what users type; write them as plain constants"
        )

    ids: list[int] = []
    mask: list[int] = []
    said = closing = 0  # 1 in what the assistant says; right behind it
    id_of = {char: tokenizer.special_tokens[token] for token, char in stand_ins.items()}
    for piece in re.split(f"([{''.join(private)}])" if private else "(?!)", marked):
        if piece in id_of:
            ids.append(id_of[piece])
            mask.append(said | closing)
            closing = 0
            continue
        said_at: list[int] = []  # for each character of the piece
        for char in piece:
            if char in (begin, end):
                said = int(char == begin)
                closing = int(char == end and before is not None)
            else:
                closing &= char.isspace()
                said_at.append(said | closing)
        new, offsets = tokenizer.encode_with_offsets(piece.replace(begin, "").replace(end, ""))
        ids += new
        mask += [max(said_at[start:stop], default=said) for start, stop in offsets]
    return ids, mask


def _with_marks(given: dict[str, Any], begin: str, end: str, before: str) -> tuple[dict[str, Any], int]:
    """The template's variables with marks around what the assistant says, and the number of its messages.

    The marks stand inside the white space at both ends, which many templates remove.
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


@lru_cache(maxsize=8)  # compiling takes longer than rendering
def _compiled(
    template: str, stand_ins: tuple[tuple[str, str], ...] = (), marks: tuple[str, str] = ("", "")
) -> SandboxedTemplate:
    return SandboxedTemplate(template, partial(_mark, partial(_replaced, dict(stand_ins))), marks)


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
    plain: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None}, name)
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


def _mark(mark: Callable[[str], str], node: nodes.Node) -> None:
    """Put stand-ins into the constants that a template writes, not into those that it compares with."""
    match node:
        case nodes.TemplateData():
            node.data = mark(node.data)
        case nodes.Const(value=str()):
            node.value = mark(node.value)
        case nodes.Compare() | nodes.Test():
            pass
        case nodes.Filter() | nodes.Getitem() if node.node is not None:
            _mark(mark, node.node)
        case nodes.Call() if not isinstance(node.node, nodes.Name):
            # .split('<think>') looks for its argument; a macro or a namespace writes it
            _mark(mark, node.node)
        case _:
            for child in node.iter_child_nodes():
                _mark(mark, child)
