"""The commands that a user can type in a conversation: /temperature 0.8, /reset, /why, ...

    reply = obey(talk, "/temperature 0.8")     # "temperature 0.8 (drawn at random)"

A command changes the conversation or shows information. `obey` returns the text to show and prints nothing.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt.console.language import translated, wrapped
from minigpt.errors import InputError, Message, unknown_name
from minigpt.generation.conversation import Conversation

__all__ = ["COMMANDS", "candidates", "command_name", "help_text", "is_command", "obey"]

_DRAWING = ("temperature", "top_p", "top_k")
_MOST_CANDIDATES = 50
_NARROW = 60  # in a terminal with fewer columns, a command's help text stands below its name


def is_command(line: str) -> bool:
    """Return True if a line is a command: it begins with a slash.

    To ask a question that begins with a slash, the user types a space first.
    """
    return line.startswith("/")


def obey(talk: Conversation, line: str) -> str:
    """Run the command that the user has typed. Return the text to show, perhaps several lines.

    Raises:
        InputError: if the command is unknown (the message suggests a similar name), or its value is wrong.
    """
    _, _, value = line.partition(" ")
    return COMMANDS[command_name(line)].run(talk, value.strip())


def command_name(line: str) -> str:
    """Return the command that a line names. The first letters are enough if they fit only one command.

    Raises:
        InputError: if the command is unknown (the message suggests a similar name), or several commands
            begin with these letters.
    """
    name = line.split(maxsplit=1)[0]
    if name in COMMANDS:
        return name
    found = [command for command in COMMANDS if len(name) > 1 and command.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        text = "{name} may be {found}: type one more letter"
        raise InputError(Message(text, name=name, found=", ".join(found)))
    raise InputError(unknown_name("command", name, COMMANDS))


def help_text() -> str:
    """Return the list of all commands, each with its help text."""
    width, room = (
        max(len(f"{n} {c.argument}") for n, c in COMMANDS.items()),
        shutil.get_terminal_size().columns,
    )
    lines = []
    for name, command in COMMANDS.items():
        head, text = f"{name} {command.argument}", translated(command.help)
        if room < _NARROW:
            lines += [head.rstrip(), *(f"    {line}" for line in wrapped(text, room - 4))]
        else:
            lines.append(f"{head:<{width}}  {text}")
    return "\n".join(lines)


def _set(name: str, talk: Conversation, value: str) -> str:
    options = talk.options
    if value:
        number = _number(name, value)
        if name == "temperature" and number == 0:
            options = dataclasses.replace(options, do_sample=False, temperature=1.0)
        else:
            drawn = options.do_sample or name in _DRAWING
            options = dataclasses.replace(options, **dict[str, Any]({name: number, "do_sample": drawn}))
        talk.choose(options)
    likely = "always the most likely token: /temperature 1 draws"
    how = Message("drawn at random" if options.do_sample else likely)
    shown = getattr(options, name)
    if name == "max_new_tokens":
        return f"max_new_tokens {options.wanted}"
    return Message("{name} {value} ({how})", name=name, value="none" if shown is None else shown, how=how)


def _number(name: str, value: str) -> float | int:
    kind: type[int] | type[float] = float if name in ("temperature", "top_p") else int
    try:
        return kind(value)
    except ValueError:
        what = Message("a number" if kind is float else "a whole number")
        text = "/{name} must be {what}: got {value!r}"
        raise InputError(Message(text, name=name, what=what, value=value)) from None


def _reset(talk: Conversation, value: str) -> str:
    talk.reset()
    return "all that was said is forgotten"


def _system(talk: Conversation, value: str) -> str:
    if talk.form == "text":
        raise InputError("/system is for models that answer: this one continues a text")
    talk.system = value
    if not value:
        return "no system message"
    unknown = " ".join(map(repr, talk.tokenizer.unknown_characters(value)[:_MOST_CANDIDATES]))
    if not unknown:
        return Message("system: {text}", text=value)
    read_as = talk.tokenizer.unknown_read_as
    return Message(
        "system: {text} (not in the vocabulary, {read_as}: {unknown})",
        text=value,
        read_as=read_as,
        unknown=unknown,
    )


def _think(talk: Conversation, value: str) -> str:
    if not talk.can_think:
        raise InputError("/think is for models whose chat template can switch thinking: this one's cannot")
    if value not in ("", "on", "off"):
        raise InputError(f"/think must be on or off: got {value!r}")
    if value:
        talk.thinking = value == "on"
    how = {None: "as the template has it", True: "on", False: "off"}
    return Message("thinking: {how}", how=Message(how[talk.thinking]))


def candidates(line: str) -> int:
    """Return the N of `/why N`: how many other candidates are shown for each token (default 3).

    Raises:
        InputError: if N is not a whole number, or is out of range.
    """
    value = line.partition(" ")[2].strip()
    number = int(value) if value.isascii() and value.isdigit() else 0
    if value and not 1 <= number <= _MOST_CANDIDATES:
        raise InputError(f"/why must be a whole number from 1 to {_MOST_CANDIDATES}: got {value!r}")
    return number or 3


def _why(talk: Conversation, value: str) -> str:
    candidates(f"/why {value}")
    return ""  # no text here, because `minigpt chat` prints a table of the candidates


def _history(talk: Conversation, value: str) -> str:
    if talk.form != "question":
        raise InputError("/history is for models of questions and answers: this one reads all that was said")
    if value not in ("", "on", "off"):
        raise InputError(f"/history must be on or off: got {value!r}")
    if value:
        talk.history = value == "on"
    how = Message("on, earlier turns are read, too" if talk.history else "off, each question is read alone")
    return Message("history: {how}", how=how)


def _save(talk: Conversation, value: str) -> str:
    if not value:
        raise InputError("/save needs a file name: /save FILE")
    if not talk.turns:
        raise InputError("nothing was said yet: there is nothing to save")
    path = Path(value).expanduser()
    if path.exists() and path not in talk.saved:
        raise InputError(Message("{path} exists already: choose another name", path=path))
    talk.save(path)
    return Message("{count} turns written to {path}", count=len(talk.turns), path=path)


def _help(talk: Conversation, value: str) -> str:
    return help_text()


def _setting(name: str) -> Callable[[Conversation, str], str]:
    return lambda talk, value: _set(name, talk, value)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its argument, one line of help, and the function that runs it."""

    argument: str
    help: str
    run: Callable[[Conversation, str], str]


def _exit(talk: Conversation, value: str) -> str:
    return ""  # no text here; `minigpt chat` ends the conversation


COMMANDS = {
    "/reset": Command("", "forget all that was said", _reset),
    "/temperature": Command("X", "below 1 likely tokens gain; 0: the most likely", _setting("temperature")),
    "/top_p": Command("X", "draw among the most likely whose probabilities add up to X", _setting("top_p")),
    "/top_k": Command("K", "draw among the K most likely tokens; 0: among all", _setting("top_k")),
    "/seed": Command("N", "the same seed draws the same answers", _setting("seed")),
    "/max_new_tokens": Command("N", "tokens of an answer, at most", _setting("max_new_tokens")),
    "/system": Command("TEXT", "what the model reads before all else; no text: nothing", _system),
    "/think": Command("on|off", "whether a chat model thinks before it answers", _think),
    "/history": Command("on|off", "whether a model of questions and answers reads earlier turns", _history),
    "/why": Command("N", "the last answer's tokens, their probabilities, and N others for each", _why),
    "/save": Command("FILE", "write all that was said as a line of JSON, which can be trained on", _save),
    "/help": Command("", "this list", _help),
    "/exit": Command("", "leave; so do Ctrl-D, and Ctrl-C twice", _exit),
}  # fmt: skip
