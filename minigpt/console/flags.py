"""Makes flags from a dataclass: parses a command line into a dictionary, and builds the text of --help.

Each field is a flag. The string below a field is its help. A comment right above a field is the title of a
group of flags in the help, and this field is the first of the group.

    n_layer: int = 6                               # --n_layer 4, --n_layer=4, --n-layer 4
    bias: bool = False                             # --bias, --no_bias
    gelu: Literal["exact", "tanh"] = "exact"       # --gelu tanh
    choices: tuple[str, ...] = ()                  # --choices 2 3 4
    run: Path = field(..., metadata=POSITIONAL)    # a value without --run; a tuple takes all remaining values
    HIDDEN: ClassVar = frozenset({"init_from"})    # fields of a base class that are not flags of this class
    generation: dict = fields_of(GenerationOptions, ["top_k"])    # fields of another class are flags, too

argparse is not used: its error messages and its help would all have to be replaced.
"""

import ast
import dataclasses
import difflib
import itertools
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minigpt.console.language import say, translated, wrapped
from minigpt.errors import InputError, Message, check_ranges, shown, unknown_name

__all__ = ["POSITIONAL", "fields_of", "flags_of", "help_text", "parse"]

POSITIONAL = {"positional": True}
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_MARGIN = 26  # width of the left column of the help, which has the flags' names
_NARROW = 60  # on a terminal with fewer columns, the help of a flag is printed below the flag's name
_ALIKE = 0.75  # for a wrong value, the error suggests a valid one with at least this similarity (0 to 1)


def fields_of(options: type, names: Iterable[str], shows_defaults: bool = True) -> Any:
    """Return a dataclass field that adds several command-line flags: fields of `options`, another dataclass.

    The value of the returned field is a dictionary with the flags that the user gave: name -> value. If a
    string literal follows the field in the source of its class, it is the title of the flags' group in the
    help. Else the flags stand in the same groups as in the help of `options`.

    Args:
        options: another dataclass.
        names: fields of `options` that become flags.
        shows_defaults: True: the help shows the defaults of `options`.
    """
    metadata = {"fields_of": options, "names": tuple(names), "shows_defaults": shows_defaults}
    return dataclasses.field(default_factory=dict, metadata=metadata)


class Flag(NamedTuple):
    """A flag of the command line."""

    name: str
    kind: Any  # type of one value: int, float, str, Path, a Literal; bool: a switch
    is_list: bool
    is_positional: bool
    default: object  # value if the user does not give the flag; dataclasses.MISSING if the flag is required
    # "": the flag is a field of the command's own dataclass. Otherwise the flag comes from another dataclass,
    # and `holder` is the name of the field that adds it with `fields_of`, such as "generation".
    holder: str

    @property
    def title(self) -> str:
        """The flag as a user types it."""
        return self.name.upper() if self.is_positional else f"--{self.name}"


def flags_of(options: type, holder: str = "", names: Sequence[str] = ()) -> dict[str, Flag]:
    """Return name -> flag for the fields of a dataclass: for all, or only for `names`.

    `holder` becomes the value of Flag.holder.
    """
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in getattr(options, "HIDDEN", ()):
            continue
        if inner := field.metadata.get("fields_of"):
            inside = flags_of(inner, field.name, field.metadata["names"])
            shown = field.metadata["shows_defaults"]
            found |= {name: flag if shown else flag._replace(default=None) for name, flag in inside.items()}
        elif not names or field.name in names:
            kind, is_list = _kind(hints[field.name])
            is_positional = "positional" in field.metadata
            found[field.name] = Flag(field.name, kind, is_list, is_positional, field.default, holder)
    return found


def _kind(hint: Any) -> tuple[Any, bool]:
    """Return (type of one value, True if the flag takes a list of values) for the type hint of a field.

    From a union such as `int | None`, the first type that a flag can have is taken.
    """
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if is_union else (hint,)
    for member in members:
        if (origin := typing.get_origin(member)) and issubclass(_class(origin), Sequence):
            return typing.get_args(member)[0], True
    return bool if bool in members else next(
        one for one in members if one in _METAVARS or typing.get_origin(one) is Literal
    ), False


def _class(origin: Any) -> type:
    return origin if isinstance(origin, type) else object


# -- parsing -----------------------------------------------------------------------------------------------


def parse(options: type, argv: Sequence[str]) -> dict[str, Any]:
    """Parse a command line. Return a dictionary: name of a field -> value, for the flags that were given.

    Raises:
        InputError: if a flag is unknown (the message suggests a similar name), or a value is missing,
            cannot be read, or is outside the range that RANGES gives.
    """
    flags = flags_of(options)
    places = [flag for flag in flags.values() if flag.is_positional]
    given: dict[str, Any] = {}
    strays: list[str] = []

    def take(flag: Flag, value: object) -> None:
        (given.setdefault(flag.holder, {}) if flag.holder else given)[flag.name] = value

    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":  # all later words are values, even if they begin with a dash
            strays += words
            break
        if not _is_flag(word):
            strays.append(word)
            continue
        written, equals, text = word.partition("=")
        flag, is_on = _find(flags, written)
        if flag.kind is bool:
            if equals:
                raise InputError(f"{written} takes no value: write --{flag.name} or --no_{flag.name}")
            take(flag, is_on)
            continue
        texts = [text] if equals else []
        while words and not equals and not _is_flag(words[0]) and (flag.is_list or not texts):
            texts.append(words.pop(0))
        if not texts:
            raise InputError(
                Message("{flag} needs a value (one that begins with '-': {flag}=VALUE)", flag=flag.title)
            )
        values = tuple(_read(flag, text) for text in texts)
        take(flag, values if flag.is_list else values[0])
    for flag, text in zip(places, strays):
        if flag.is_list:  # a list is the last positional argument and takes all remaining words
            take(flag, tuple(_read(flag, one) for one in strays[places.index(flag) :]))
            break
        take(flag, _read(flag, text))
    if (more := strays[len(places) :]) and not (places and places[-1].is_list):
        text = "unexpected argument: {words} (a value with spaces needs quotes around it)"
        raise InputError(Message(text, words=" ".join(more)))
    for flag in flags.values():
        if flag.default is dataclasses.MISSING and not flag.holder and flag.name not in given:
            raise InputError(Message("{flag} is missing: see --help", flag=flag.title))
    for field in dataclasses.fields(options):
        if (inner := field.metadata.get("fields_of")) and field.name in given:
            check_ranges(inner, given[field.name])
    check_ranges(options, given)
    return given


def _is_flag(word: str) -> bool:
    """Return True if a word begins with a dash, but is no number such as -1.

    A long dash counts, too: word processors write it in place of "-".
    """
    if word[:1] not in ("-", "—", "–") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _find(flags: dict[str, Flag], written: str) -> tuple[Flag, bool]:
    """Return (the flag that a word names, True); for a switch that is written with `--no_`: (flag, False)."""
    name = written.removeprefix("--").replace("-", "_") if written.startswith("--") else ""
    positive = name.removeprefix("no_")
    known = {name: flag for name, flag in flags.items() if not flag.is_positional}
    if name in known:
        return known[name], True
    if positive in known and known[positive].kind is bool:
        return known[positive], False
    if name in flags:
        raise InputError(f"unknown flag {written!r}; write {flags[name].title} without a flag before it")
    text = unknown_name("flag", written, [f"--{one}" for one in [*known, "help"]])
    places = ", ".join(flag.title for flag in flags.values() if flag.is_positional and not name)
    if places:
        more = "{text} ({place} that begins with '-' is written at the end, after --)"
        text = Message(more, text=text, place=places)
    raise InputError(text)


def _read(flag: Flag, text: str) -> object:
    if typing.get_origin(flag.kind) is Literal:
        if text not in (choices := typing.get_args(flag.kind)):
            if difflib.get_close_matches(text, choices, n=1, cutoff=_ALIKE):
                raise InputError(unknown_name(flag.title, text, choices))
            known = ", ".join(map(repr, choices))
            words = "{flag} must be one of {known}: got {value}"
            raise InputError(Message(words, flag=flag.title, known=known, value=shown(text)))
        return text
    if flag.kind is Path and not text:
        raise InputError(f"{flag.title} must be a path: got ''")
    kind: Callable[[str], object] = flag.kind
    try:
        return kind(text)
    except ValueError:
        what = Message("a whole number" if flag.kind is int else "a number")
        words = "{flag} must be {what}: got {value}"
        raise InputError(Message(words, flag=flag.title, what=what, value=shown(text))) from None


# -- help --------------------------------------------------------------------------------------------------


def help_text(options: type, program: str, source: str, defaults: object = None) -> str:
    """Build the help of a command: all flags in groups, each with its help, choices and default.

    Args:
        options: the dataclass of the command's options.
        program: the command's name in the line of usage.
        source: the command's source file. The help texts of a class whose `__module__` is "__main__" are read
            from it, because under `minigpt VERB`, sys.modules["__main__"] is another module.
        defaults: an object whose values are shown as defaults, instead of the class's defaults.
    """
    width = min(80, shutil.get_terminal_size().columns)
    flags = {name: flag._replace(default=getattr(defaults, name, flag.default))
             for name, flag in flags_of(options).items()}  # fmt: skip
    places = "".join(f" {flag.title}" if flag.default is dataclasses.MISSING else f" [{flag.title}]"
                     for flag in flags.values() if flag.is_positional)  # fmt: skip
    shown = [*wrapped(say("usage: {command} [flags]", command=f"{program}{places}"), width), ""]
    shown += wrapped(translated(" ".join((options.__doc__ or "").split())), width)
    group = None
    for title, name, words in _described(options, source):
        if title != group:
            shown += ["", *wrapped(translated(title or "Options"), width)]
            group = title
        shown += _entry(flags[name], translated(words), width)
    return "\n".join(shown)


def _entry(flag: Flag, words: str, width: int) -> list[str]:
    label = f"  {flag.title}"
    if flag.kind is bool:
        label = f"  --[no_]{flag.name}" if flag.default is True else label
    elif not flag.is_positional:
        choices = typing.get_args(flag.kind)
        metavar = f"{{{','.join(choices)}}}" if choices else _METAVARS[flag.kind]
        label += f" {metavar}" + (f" [{metavar}]" if flag.is_list and not choices else "")
    is_silent = flag.default is dataclasses.MISSING or isinstance(flag.default, bool)
    if not is_silent and flag.default not in (None, "", (), Path()):
        value = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
        words += say(" (default {value})", value=value)
    margin = _MARGIN if width >= _NARROW else 6
    lines = wrapped(words, width - margin)
    if lines and len(label) < margin:
        heads = [f"{label:<{margin}}{lines.pop(0)}".rstrip()]
    else:  # the flag with its choices is too long for the left column
        heads = textwrap.wrap(
            label.replace(",", ", ") if len(label) > width else label, width, subsequent_indent=" " * 8
        )
        heads[0] = f"  {heads[0].lstrip()}"
    return [*heads, *(" " * margin + line for line in lines)]


def _described(options: type, source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (group, name, help) of each flag, in the order of the source. Flags of base classes come last."""
    seen = set()
    fields = {field.name: field for field in dataclasses.fields(options)}
    for owner in filter(dataclasses.is_dataclass, options.__mro__):
        for title, name, words in _texts(owner, source):
            if name in seen or name not in fields or name in getattr(options, "HIDDEN", ()):
                continue
            seen.add(name)
            if inner := fields[name].metadata.get("fields_of"):
                wanted = fields[name].metadata["names"]
                inside = (row for row in _texts(inner, source) if row[1] in wanted)
                yield from ((words or group, *rest) for group, *rest in inside)  # type: ignore[misc]
            else:
                yield title, name, words


def _texts(owner: type, source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (group, name, help) for each field of a class, read from its source code.

    The group is the last comment that stands on a line of its own above the field. The help is the string
    below the field.
    """
    module = sys.modules.get(owner.__module__)
    path = source if module is None or owner.__module__ == "__main__" else str(module.__file__)
    text = Path(path).read_text(encoding="utf-8")
    lines, group = text.splitlines(), ""
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.ClassDef) and node.name == owner.__name__):
            continue
        for field, below in itertools.pairwise([*node.body, ast.Pass()]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                above = lines[field.lineno - 2].strip()
                group = above.removeprefix("# ") if above.startswith("# ") else group
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                yield group, field.target.id, str(below.value.value) if is_text else ""  # type: ignore[attr-defined]
