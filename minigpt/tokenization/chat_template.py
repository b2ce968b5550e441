"""A conversation as one prompt, by the template that ships with a model.

    tokenizer = BpeTokenizer.from_folder("Qwen3-0.6B")
    ids = encode_chat(tokenizer, [{"role": "user", "content": "你好"}], add_generation_prompt=True)

Only the template writes special tokens: `<|im_end|>` in a message stays ten characters. How the two are told
apart: the template is rendered a second time, in which the constants that it *writes* hold one private
character for each special token. Those that it *compares* with, and the messages, are the same both times, so
that a template's `message.content.split('</think>')` finds what it looks for.

A template is a program from strangers: minigpt/tokenization/template_sandbox.py runs it. Tools and pictures are not known.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Protocol

from jinja2 import nodes

from minigpt.errors import InputError
from minigpt.tokenization.template_sandbox import SandboxedTemplate

__all__ = ["ROLES", "ChatTokenizer", "encode_chat", "render_chat"]

ROLES = ("system", "user", "assistant", "tool")

_STEPS, _STEPS_PER_MESSAGE = 100_000, 2_000  # Qwen3's needs about 100 for each message
_CHARACTERS, _CHARACTERS_PER_CHARACTER = 1_000_000, 100


class ChatTokenizer(Protocol):
    """What `encode_chat` needs of a tokenizer; `minigpt.tokenization.bpe.BpeTokenizer` has it."""

    special_tokens: dict[str, int]
    """text -> id"""
    named_tokens: dict[str, str]
    """role, such as "eos_token" -> text"""

    @property
    def chat_template(self) -> str | None:
        """The template in Jinja's language, if there is one."""

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, none of them special."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    named_tokens: Mapping[str, str] | None = None,
) -> str:
    """The conversation as text, as transformers' `apply_chat_template(..., tokenize=False)` writes it.

    It is for people. In it the special tokens that a user typed look like the template's own: what a model
    is to read comes from `encode_chat`.

    Args:
        template: in Jinja's language.
        messages: each with `role` (one of ROLES) and `content`, perhaps `reasoning_content`; all text.
        add_generation_prompt: whether to end with the beginning of an answer.
        enable_thinking: for models that can think before they answer; None leaves it to the template.
        named_tokens: the template's variables bos_token, eos_token and so on.

    Raises:
        InputError: for a message that is none, and for a template that fails (see `SandboxedTemplate`).
    """
    return _Conversation(messages, add_generation_prompt, enable_thinking).rendered(
        template, named_tokens or {}
    )


def encode_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> list[int]:
    """The ids of a conversation: special tokens where the template writes them, and nowhere else.

    Args: as `render_chat`; a template of None is the tokenizer's own.

    Raises:
        InputError: as `render_chat`; without a template; and for a template
            whose special tokens cannot be told from what users type.
    """
    template = tokenizer.chat_template if template is None else template
    if template is None:
        raise InputError("the tokenizer has no chat_template: give one, or take a model that can chat")
    conversation = _Conversation(messages, add_generation_prompt, enable_thinking)
    special = tokenizer.special_tokens
    stand_ins = _stand_ins(special, [template, *conversation.texts])
    mark = partial(_marked_text, stand_ins)
    plain = conversation.rendered(template, tokenizer.named_tokens)
    marked = conversation.rendered(
        template, {role: mark(token) for role, token in tokenizer.named_tokens.items()}, stand_ins
    )
    written = marked.translate({ord(stand_in): token for token, stand_in in stand_ins.items()})
    more = [token for token in special if marked.count(token) > conversation.count(token)]
    if written != plain or more:
        raise InputError(
            "the chat template computes with the text of special tokens"
            + (f", such as {more[0]}," if more else "")
            + " so that they cannot be told from what users type; write them as plain constants"
        )
    id_of = {stand_in: special[token] for token, stand_in in stand_ins.items()}
    ids: list[int] = []
    for piece in re.split(f"([{''.join(id_of)}])" if id_of else "(?!)", marked):
        ids += [id_of[piece]] if piece in id_of else tokenizer.encode_text(piece)
    return ids


class _Conversation:
    """Checked messages, and how to render them."""

    def __init__(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, enable_thinking: bool | None
    ) -> None:
        if isinstance(messages, str | Mapping) or not messages:
            raise InputError("a conversation is a list of at least one message with `role` and `content`")
        for number, message in enumerate(messages, 1):
            _require_message(message, f"message {number}")
        self.messages = messages
        self.texts = [text for message in messages for text in message.values()]
        self.options = {"add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            self.options["enable_thinking"] = enable_thinking

    def count(self, token: str) -> int:
        """How often the messages hold a special token's text."""
        return sum(text.count(token) for text in self.texts)

    def rendered(
        self, template: str, named_tokens: Mapping[str, str], stand_ins: Mapping[str, str] | None = None
    ) -> str:
        """The text; with stand-ins for the special tokens that the template writes, if any are given."""
        messages = [dict(message) for message in self.messages]
        return _prepared(template, tuple((stand_ins or {}).items())).render(
            {**named_tokens, **self.options, "messages": messages},
            steps=_STEPS + _STEPS_PER_MESSAGE * len(messages),
            characters=_CHARACTERS + _CHARACTERS_PER_CHARACTER * sum(map(len, self.texts)),
        )


@lru_cache(maxsize=8)  # translating takes longer than rendering
def _prepared(template: str, stand_ins: tuple[tuple[str, str], ...]) -> SandboxedTemplate:
    return SandboxedTemplate(template, partial(_mark, partial(_marked_text, dict(stand_ins))))


def _require_message(message: object, name: str) -> None:
    """Plain text and nothing else comes within a template's reach."""
    if not isinstance(message, Mapping):
        raise InputError(f"{name} must have `role` and `content`: got {message!r}")
    for key in ("role", "content"):
        if key not in message:
            raise InputError(f"{name} has no {key!r}")
    for key, value in message.items():
        if type(key) is not str or type(value) is not str:
            raise InputError(f"{name}: {key!r} must be text: got {value!r}")
        if half := re.search("[\ud800-\udfff]", value):
            raise InputError(
                f"{name}: {key!r}, position {half.start()}: U+{ord(half[0]):04X} is half a character "
                f"(a lone surrogate); remove it"
            )
    if message["role"] not in ROLES:
        raise InputError(f"{name}: role must be one of {', '.join(ROLES)}: got {message['role']!r}")


def _stand_ins(special: Iterable[str], texts: Iterable[str]) -> dict[str, str]:
    """For each special token a character of Unicode's last private plane that none of the texts holds."""
    used = set().union(*texts)
    free = (chr(point) for point in range(0x100000, 0x10FFFE) if chr(point) not in used)
    stand_ins = dict(zip(special, free))
    if len(stand_ins) < len(set(special)):
        raise InputError("the messages hold too many characters of Unicode's private plane 16")
    return stand_ins


def _marked_text(stand_ins: Mapping[str, str], text: str) -> str:
    for token in sorted(stand_ins, key=len, reverse=True):
        text = text.replace(token, stand_ins[token])
    return text


def _mark(mark: partial[str], node: nodes.Node) -> None:
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
            # of .split() and .startswith(); to a macro or a namespace one hands what will be written
            _mark(mark, node.node)
        case _:
            for child in node.iter_child_nodes():
                _mark(mark, child)
