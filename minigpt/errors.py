"""The error that a user sees, and how its sentence is written. This module imports nothing of minigpt."""

import difflib
import re
from collections.abc import Iterable

__all__ = ["InputError", "printable", "printable_lines", "unknown_name"]


class InputError(ValueError):
    """Bad input or usage. Its text is the one line that a user sees: what, where, what to do."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence about a flag, key or recipe that does not exist, with the nearest one that does.

    >>> unknown_name("flag", "--n_layers", ["--n_layer", "--n_head"])
    "unknown flag '--n_layers'; did you mean '--n_layer'?"
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return f"unknown {kind} {name!r}; {hint}"


def printable(text: str) -> str:
    r"""Text that any stream can print in one line: escapes for line ends, terminal codes and lone surrogates.

    >>> print(printable("四川\n\x1b[31m\udc80"))
    四川\n\x1b[31m\udc80
    """
    unsafe = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unsafe, lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    r"""As `printable`, but line ends and tabs stay: for texts that may take several lines.

    >>> print(printable_lines("四川\n\x1b[31m"))
    四川
    \x1b[31m
    """
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def warn(text: str) -> None:
    """One line on stderr; results on stdout stay clean."""
    print(printable(f"warning: {' '.join(text.split())}"), file=sys.stderr)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print warnings of minigpt's own categories as `warn` does; others, and filters, are Python's matter."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.split(".")[0] == "minigpt":
            warn(str(message))
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
