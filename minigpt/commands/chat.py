r"""A conversation in the terminal, with any model: your own, GPT-2, or Qwen3.

    minigpt chat                                   # /help lists the commands of the conversation
    minigpt chat --model Qwen3-0.6B --think off
    minigpt chat --precision int8 --temperature 0.8
    minigpt chat < questions.txt                   # no terminal: one question per line, one answer per line

The answer is shown while it is generated. Ctrl-C stops it; at the prompt, two Ctrl-C or one Ctrl-D end the
program. You can paste several lines (if the terminal supports bracketed paste). A line that ends with a
backslash is continued by the next line. A model trained on questions and answers sees only the last question,
unless --history says that it was trained on conversations. A model of plain text continues the conversation
as one text.

Commands such as /help also work without a terminal; their output goes to stderr. Without a terminal, line
ends and control characters in an answer are written as escapes (\n), so that an answer is one line.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.console.flags import fields_of
from minigpt.console.language import say, translated
from minigpt.errors import InputError, Message, printable, printable_lines
from minigpt.generation.loading import load_to_answer
from minigpt.generation.options import GenerationOptions

if TYPE_CHECKING:
    from minigpt.generation.conversation import Conversation

_CHAT_TOKENS = 1024  # largest number of tokens of a chat model's answer, its reasoning included
_EXPLAINED = 60  # largest number of tokens in the table that the command /why prints
_DRAWING = ("temperature", "top_k", "top_p")  # options that turn sampling on; temperature 0 turns it off


@dataclass(frozen=True, kw_only=True)
class Options(command_line.ModelOptions):
    """A conversation in the terminal, with any model."""

    # Conversation
    form: Literal["auto", "chat", "question", "text"] = "auto"
    """prompt format: chat template, question with <sep>, or plain text; auto: as the model's folder says"""
    system: str = ""
    """system message, read before all else; without a chat template it is a line above the question"""
    think: Literal["auto", "on", "off"] = "auto"
    """let a chat model think before it answers; auto: as its template does by default"""
    history: bool = False
    """the model also reads the earlier questions and answers; for models trained on conversations"""
    assistant_model: Path | None = None
    """folder of a much smaller model with the same tokenizer, which guesses tokens: same answers, faster"""

    generation: dict[str, Any] = fields_of(  # noqa: RUF009
        GenerationOptions,
        (
            *("max_new_tokens", "temperature", "top_k", "top_p", "seed", "prompt_lookup_num_tokens"),
            *("num_assistant_tokens", "max_cache_mib"),
        ),
        shows_defaults=False,
    )
    """How to choose tokens (default: as the folder advises; a chat model writes up to 1,024 tokens)"""


def main(options: Options) -> dict[str, Any]:
    """Load the model, and talk until the user ends the conversation."""
    talk = _conversation(options)
    if sys.stdin.isatty():
        _talk(talk)
    else:
        _answer_lines(talk)
    return {"questions": len(talk.turns)}


def _conversation(options: Options) -> "Conversation":
    given = {name: value for name, value in options.generation.items() if name not in _DRAWING}
    GenerationOptions(**given)  # raises an error for a bad option before the model is loaded
    folder, model, tokenizer, assistant = load_to_answer(options, options.assistant_model)
    from minigpt.console.terminal import warn
    from minigpt.generation.conversation import Conversation
    from minigpt.generation.generation_config import notes_of, prompt_format, recommended_options
    from minigpt.generation.slash_commands import obey

    form = options.form
    if form == "auto":
        form = prompt_format(folder, tokenizer, options.adapter)
    if form == "chat":
        longest = min(_CHAT_TOKENS, model.config.max_position_embeddings // 2)
        given = {"max_new_tokens": longest, **given}
    chosen = GenerationOptions(**{**recommended_options(folder), **given})
    for note in notes_of(folder, tokenizer):
        warn(note)
    talk = Conversation(model, tokenizer, form, chosen, history=options.history, assistant_model=assistant)
    for name in filter(options.generation.__contains__, _DRAWING):
        obey(talk, f"/{name} {options.generation[name]}")
    if options.system:
        obey(talk, f"/system {options.system}")
    if options.think != "auto":
        obey(talk, f"/think {options.think}")
    return talk


# -- on a terminal ------------------------------------------------------------------------------------------


def _talk(talk: "Conversation") -> None:
    """Read questions from the terminal and print answers, until the user ends the conversation."""
    from minigpt.generation.slash_commands import command_name, is_command

    with contextlib.suppress(ImportError):
        import readline  # importing readline gives input() line editing and a history

        readline.parse_and_bind("set enable-bracketed-paste on")
    what = {"chat": "a chat model", "question": "a model of questions and answers", "text": "a model of text"}
    print(say("{what}; /help lists the commands, Ctrl-D leaves", what=Message(what[talk.form])))
    while (line := _typed()) is not None:
        if not line.strip():
            continue
        try:
            if is_command(line):
                if command_name(line) == "/exit":
                    return
                _obey(talk, line.strip())
            else:
                _show(talk, line.strip())
        except InputError as error:  # an error does not end the conversation
            print(f"({translated(error.args[0])})")
        except KeyboardInterrupt:
            print(translated(" (stopped)"))


def _typed() -> str | None:
    """Return the text that the user types. A line that ends with a backslash is joined with the next line.

    Returns None if the user presses Ctrl-D, or Ctrl-C twice in a row.
    """
    lines: list[str] = []
    warned = False
    while True:
        try:
            line = input("... " if lines else "> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            if warned:
                raise
            print(translated("(Ctrl-C once more, or Ctrl-D, leaves)"))
            warned, lines = True, []
            continue
        except UnicodeDecodeError:
            print(translated("(that was not UTF-8: please set the terminal to it)"))
            continue
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def _show(talk: "Conversation", text: str) -> None:
    """Generate an answer and print it piece by piece."""
    if unknown := talk.tokenizer.unknown_characters(text):
        shown = " ".join(map(repr, unknown[:20]))
        read_as = Message(talk.tokenizer.unknown_read_as)
        print(say("(not in the vocabulary, {read_as}: {shown})", read_as=read_as, shown=shown))
    before = talk.forgotten
    pieces = talk.say(text)
    if before == 0 < talk.forgotten:  # turns are left out for the first time: tell the user once
        print(translated("(the context is full: from now on the oldest turns are left out)"))
    # `closing` is for Ctrl-C: the conversation then keeps the part of the answer that was generated before.
    with contextlib.closing(pieces):
        for piece in pieces:
            print(printable_lines(piece), end="", flush=True)
    print()
    reason = talk.turns[-1].stop_reason
    if reason == "length":
        print(say("(cut at {count} tokens: /max_new_tokens N changes that)", count=talk.options.wanted))
    elif reason == "context":
        print(translated("(the context is full: /reset empties it)"))


def _obey(talk: "Conversation", line: str) -> None:
    from minigpt.generation.slash_commands import candidates, command_name, obey

    said = obey(talk, line)
    if command_name(line) == "/why":
        _explain(talk, candidates(line))
    if said:
        print(printable_lines(translated(said)))


def _explain(talk: "Conversation", others: int) -> None:
    from minigpt.console.terminal import table
    from minigpt.generation.conversation import token_text

    def shown(token: int) -> str:
        text = token_text(talk.tokenizer, token)
        return f"'{text}'" if text != text.strip() else text

    choices = talk.why(others)
    rows = []
    for choice in choices[:_EXPLAINED]:
        numbers = [percent(p) for p in (choice.probability, *(p for _, p in choice.others))]
        if choice.drawn:
            numbers = [f"{p} > {percent(drawn)}" for p, drawn in zip(numbers, choice.drawn)]
        others_shown = (shown(token) for token, _ in choice.others)
        instead = "   ".join(f"{name} {number}" for name, number in zip(others_shown, numbers[1:]))
        rows.append((shown(choice.token), numbers[0], instead))
    title = "tokens of the last answer"
    if len(choices) > _EXPLAINED:
        text = "tokens of the last answer, the first {count} of {total}"
        title = Message(text, count=_EXPLAINED, total=len(choices))
    table(title, ("token", "probability", "instead of"), rows, numeric=(1,))
    if any(choice.drawn for choice in choices):
        options = talk.turns[-1].options
        drawn_by = ("temperature", "top_k", "top_p")
        given = ", ".join(f"{name} {getattr(options, name):g}" for name in drawn_by)
        print(say("(as the model says > as it was drawn from: {given})", given=given))


def percent(share: float) -> str:
    """Format a probability with enough digits to distinguish it from 0 and 1.

    >>> [percent(p) for p in (0.5, 0.99987, 0.00004, 1.0, 0.0, 1e-12)]
    ['50.0%', '99.99%', '0.004%', '100%', '0%', '1e-10%']
    """
    if share in (0, 1):
        return f"{share:.0%}"
    for digits in range(1, 6):
        if 0 < round(100 * share, digits) < 100:
            return f"{share:.{digits}%}"
    return f"{100 * share:.0e}%" if share < 0.5 else "100%"


# -- without a terminal -------------------------------------------------------------------------------------


def _answer_lines(talk: "Conversation") -> None:
    """Answer each line of standard input with a line on standard output."""
    from minigpt.console.terminal import warn
    from minigpt.generation.slash_commands import command_name, is_command, obey

    for line in _read_lines():
        if is_command(line):
            name = command_name(line)
            if name == "/exit":
                return
            if name == "/why":
                raise InputError("/why draws a table: it needs a terminal")
            print(printable_lines(translated(obey(talk, line.strip()))), file=sys.stderr)
            continue
        answer = ""
        if line.strip():
            if unknown := talk.tokenizer.unknown_characters(line.strip()):
                shown = " ".join(map(repr, unknown[:20]))
                warn(f"not in the vocabulary, {talk.tokenizer.unknown_read_as}: {shown}")
            try:
                answer = "".join(talk.say(line.strip()))
            except InputError as error:
                # The question may be too long for the model. Warn, and go on to the next line.
                warn(str(error))
        print(printable(answer), flush=True)


def _read_lines() -> Iterator[str]:
    """Yield the lines of standard input. A line that ends with a backslash is joined with the next line."""
    before = ""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"standard input:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at column "
                f"{error.start + 1}); convert it, from GBK for instance: iconv -f GB18030 -t UTF-8 OLD > NEW"
            ) from None
        if line.endswith("\\"):
            before += line.removesuffix("\\") + "\n"
            continue
        yield before + line
        before = ""
    if before:
        yield before.removesuffix("\n")


if __name__ == "__main__":
    command_line.run(Options, main)
