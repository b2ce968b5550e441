r"""A conversation in the terminal, with any model: one trained here, GPT-2, Qwen3.

    minigpt chat                                   # /help lists what may be typed besides questions
    minigpt chat --model Qwen3-0.6B --think off
    minigpt chat --precision int8 --temperature 0.8
    minigpt chat < questions.txt                   # no terminal: a question a line, an answer a line

The answer appears while it is being written. Ctrl-C stops it, and at the prompt, twice, the program; Ctrl-D
leaves. Several lines can be pasted (where the terminal knows bracketed paste); a backslash at the end of a
line continues it in the next one. A model trained on questions and answers reads each question alone, unless
--history says that it was trained on conversations. A model of plain text continues all that is there.

Without a terminal commands work too; what they say goes to stderr. Line ends and control characters in an
answer are then written as escapes (\n), so that it takes one line.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.console.flags import fields_of
from minigpt.errors import InputError, printable, printable_lines
from minigpt.generation.loading import load_to_answer
from minigpt.generation.options import GenerationOptions

if TYPE_CHECKING:
    from minigpt.generation.conversation import Conversation

_CHAT_TOKENS = 1024  # of a chat model's answer, which may think before; others have 128
_EXPLAINED = 60  # tokens in the table of /why
_DRAWING = ("temperature", "top_k", "top_p")  # to give one of them is to draw; temperature 0: not to


@dataclass(frozen=True, kw_only=True)
class Options(command_line.ModelOptions):
    """A conversation in the terminal, with any model."""

    # The conversation
    form: Literal["auto", "chat", "question", "text"] = "auto"
    """chat: by the template; question: then <sep>; text: continue it; auto: as the folder says"""
    system: str = ""
    """what a chat model reads before all else"""
    think: Literal["auto", "on", "off"] = "auto"
    """whether a chat model thinks before it answers; auto: as its template has it"""
    history: bool = False
    """for models trained on conversations of questions and answers: what was said before is read, too"""
    assistant_model: Path | None = None
    """sooner: folder of a much smaller model with the same tokenizer, which guesses"""

    generation: dict[str, Any] = fields_of(  # noqa: RUF009
        GenerationOptions,
        (
            *("max_new_tokens", "temperature", "top_k", "top_p", "seed", "prompt_lookup_num_tokens"),
            *("num_assistant_tokens", "max_cache_mib"),
        ),
        shows_defaults=False,
    )
    """How to choose tokens (left out: as the folder advises; a chat model writes up to 1,024 of them)"""


def main(options: Options) -> dict[str, Any]:
    """Load the model, then talk until the user leaves."""
    talk = _conversation(options)
    if sys.stdin.isatty():
        _talk(talk)
    else:
        _answer_lines(talk)
    return {"questions": len(talk.turns)}


def _conversation(options: Options) -> "Conversation":
    given = {name: value for name, value in options.generation.items() if name not in _DRAWING}
    GenerationOptions(**given)  # complain before the model is loaded
    folder, model, tokenizer, assistant = load_to_answer(options, options.assistant_model)
    from minigpt.generation.conversation import Conversation
    from minigpt.generation.generation_config import prompt_format, recommended_options
    from minigpt.generation.slash_commands import obey

    form = prompt_format(folder, tokenizer) if options.form == "auto" else options.form
    if form == "chat":
        longest = min(_CHAT_TOKENS, model.config.max_position_embeddings // 2)
        given = {"max_new_tokens": longest, **given}
    chosen = GenerationOptions(**{**recommended_options(folder), **given})
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
    """Ask and answer until the user leaves."""
    from minigpt.generation.slash_commands import command_name, is_command

    with contextlib.suppress(ImportError):
        import readline  # gives input() line editing and a history, where there is one

        readline.parse_and_bind("set enable-bracketed-paste on")
    what = {"chat": "a chat model", "question": "a model of questions and answers", "text": "a model of text"}
    print(f"{what[talk.form]}; /help lists the commands, Ctrl-D leaves")
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
        except InputError as error:  # the next one may be better
            print(f"({error})")
        except KeyboardInterrupt:
            print(" (stopped)")


def _typed() -> str | None:
    """What the user types, its lines joined; None at Ctrl-D, or at the second Ctrl-C in a row."""
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
            print("(Ctrl-C once more, or Ctrl-D, leaves)")
            warned, lines = True, []
            continue
        except UnicodeDecodeError:
            print("(that was not UTF-8: please set the terminal to it)")
            continue
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def _show(talk: "Conversation", text: str) -> None:
    """Print an answer piece by piece."""
    if unknown := talk.tokenizer.unknown_characters(text):
        print(f"(not in the vocabulary, read as <unk>: {' '.join(map(repr, unknown[:20]))})")
    before = talk.forgotten
    pieces = talk.say(text)
    if before == 0 < talk.forgotten:  # said once, until /reset
        print("(the context is full: from now on the oldest turns are left out)")
    with contextlib.closing(pieces):  # the turn is kept as it stands when Ctrl-C comes
        for piece in pieces:
            print(printable_lines(piece), end="", flush=True)
    print()
    reason = talk.turns[-1].stop_reason
    if reason == "length":
        print(f"(cut at {talk.options.wanted} tokens: /max_new_tokens N changes that)")
    elif reason == "context":
        print("(the context is full: /reset empties it)")


def _obey(talk: "Conversation", line: str) -> None:
    from minigpt.generation.slash_commands import candidates, command_name, obey

    said = obey(talk, line)
    if command_name(line) == "/why":
        _explain(talk, candidates(line))
    if said:
        print(printable_lines(said))


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
    more = f", the first {_EXPLAINED} of {len(choices)}" if len(choices) > _EXPLAINED else ""
    table(f"tokens of the last answer{more}", ("token", "probability", "instead of"), rows, numeric=(1,))
    if any(choice.drawn for choice in choices):
        options = talk.turns[-1].options
        names = ("temperature", "top_k", "top_p")
        given = ", ".join(f"{name} {getattr(options, name):g}" for name in names)
        print(f"(as the model says > as it was drawn from: {given})")


def percent(share: float) -> str:
    """A probability with so many digits that it is told from 0 and from 1.

    >>> [percent(p) for p in (0.5, 0.99987, 0.00004, 1.0, 0.0, 1e-12)]
    ['50.0%', '99.99%', '0.004%', '100%', '0%', '1e-10%']
    """
    if share in (0, 1):
        return f"{share:.0%}"
    for digits in range(1, 6):
        if 0 < round(100 * share, digits) < 100:
            return f"{share:.{digits}%}"
    return f"{100 * share:.0e}%" if share < 0.5 else "100%"


# -- without one --------------------------------------------------------------------------------------------


def _answer_lines(talk: "Conversation") -> None:
    """A line of standard input, an answer on a line of standard output."""
    from minigpt.console.terminal import warn
    from minigpt.generation.slash_commands import command_name, is_command, obey

    for line in _read_lines():
        if is_command(line):
            name = command_name(line)
            if name == "/exit":
                return
            if name == "/why":
                raise InputError("/why draws a table: it needs a terminal")
            print(printable_lines(obey(talk, line.strip())), file=sys.stderr)
            continue
        answer = ""
        if line.strip():
            if unknown := talk.tokenizer.unknown_characters(line.strip()):
                warn(f"not in the vocabulary, read as <unk>: {' '.join(map(repr, unknown[:20]))}")
            try:
                answer = "".join(talk.say(line.strip()))
            except InputError as error:  # too long: the next one may be shorter
                warn(str(error))
        print(printable(answer), flush=True)


def _read_lines() -> Iterator[str]:
    """The lines of standard input; one that ends with a backslash continues in the next."""
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
