"""Run a Jinja template that came with somebody's weights, without trusting it.

It runs in Jinja's sandbox, out of reach of Python's inner parts, and what it does is bounded: the lines of
code that it runs, the characters that it puts together. So a template that loops for ever, or doubles a text
forty times, ends in one line of complaint.

The bounds hold for a template's own loops, calls, operators and output. One that is built for it may still
keep the processor busy in a single step: use templates of people from whom you would take weights.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from minigpt.errors import InputError

__all__ = ["SandboxedTemplate"]

_SOURCE = 1_000_000  # characters; published templates have some ten thousand
_ITEMS = 10_000  # of one range()
_FACTOR = 1_000  # in a product, and as an exponent
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "select"),
    *("selectattr", "title", "trim", "unique", "upper"),
)
# one call makes much out of little, or runs a small language of its own
_METHODS = {"format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "encode"}


class SandboxedTemplate:
    """A template, ready to be rendered any number of times, in any thread.

    Args:
        source: in Jinja's language.
        rewrite: changes the parsed template, in place, before it is translated.

    Raises:
        InputError: for a source that is not Jinja's language.
    """

    def __init__(self, source: str, rewrite: Callable[[nodes.Template], None] | None = None) -> None:
        if len(source) > _SOURCE:
            raise InputError(f"the chat template has {len(source):,} characters, more than {_SOURCE:,}")
        self._sandbox = _Sandbox()
        with _explained():
            self._sandbox.left.characters = _SOURCE  # what consists of constants is put together here
            parsed = self._sandbox.parse(source)
            if rewrite is not None:
                rewrite(parsed)
            self._template = self._sandbox.from_string(_Measured().visit(parsed))

    def render(self, variables: Mapping[str, Any], *, steps: int, characters: int) -> str:
        """The text that the template makes of some variables.

        Args:
            variables: numbers, text, lists and dictionaries of these; nothing that has methods of its own.
            steps: how many lines of code it may run, those of Jinja's runtime included.
            characters: how many it may put together, those that it throws away again included.

        Raises:
            InputError: for a template that refuses its variables (raise_exception), fails, reaches for what
                it must not, or oversteps a bound.
        """
        with _explained():
            self._sandbox.left.characters = characters
            with _bounded_steps(steps):
                return self._template.render(variables)


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever a template brings about, as an InputError."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the chat template, line {error.lineno}, is not understood: {error.message}"
        ) from None
    except _OverstepError as error:
        raise InputError(f"the chat template {error}") from None
    except _RefusalError as error:
        raise InputError(f"the chat template refuses this conversation: {error}") from None
    except SecurityError as error:
        raise InputError(f"the chat template tries what it must not: {error}") from None
    except RecursionError:
        raise InputError("the chat template calls itself too often, or is nested too deeply") from None
    except Exception as error:  # whatever Python's operators raise about a template's operands
        raise InputError(f"the chat template fails: {type(error).__name__}: {error}") from None


class _OverstepError(BaseException):
    """A bound is passed. No Exception: Jinja's filters catch some of those, and go on."""


class _RefusalError(Exception):
    """The template called raise_exception."""


class _Measured(NodeTransformer):
    """What Jinja would not count otherwise: `a ~ b` as a call, plain text as something that is printed."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        node = super().visit(node, *args, **kwargs)
        if isinstance(node, nodes.TemplateData):
            return nodes.Const(node.data, lineno=node.lineno, environment=node.environment)
        if not isinstance(node, nodes.Concat):
            return node
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return nodes.Filter(
            parts, "join", [], [], None, None, lineno=node.lineno, environment=node.environment
        )


class _Left(threading.local):
    """What the rendering of this thread may still put together."""

    characters = 0


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with fewer tools, which count what they put together."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,  # these two: every published template was written for them
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=self.printed,
            cache_size=0,
        )
        self.left = _Left()
        self.filters = {name: self.filters[name] for name in _FILTERS} | {
            "join": self.joined,
            "replace": self.replaced,
            "string": self.text,
            "tojson": self.to_json,
        }
        self.globals = {
            "namespace": self.globals["namespace"],
            "range": self.numbers,
            "raise_exception": self.refuse,
        }

    def charge(self, amount: int) -> None:
        """Count characters, or entries of a list."""
        self.left.characters -= amount
        if self.left.characters < 0:
            raise _OverstepError("puts together too much text")

    @pass_context  # without it, Jinja would print constants while it translates, and count them once
    def printed(self, context: Any, value: Any) -> Any:
        """Each piece of the text passes here."""
        return self.counted(value)

    def counted(self, value: Any) -> Any:
        """A value that becomes text."""
        if isinstance(value, list | tuple | dict):
            # Python's way to write a list is no prompt; and one that holds itself many times never ends
            raise SecurityError(f"to print a {type(value).__name__}")
        self.charge(len(value) if isinstance(value, str) else 1)
        return value

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would offer its own `format` here: safe, but as wide as one likes."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may look at an attribute."""
        return attr not in _METHODS and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Jinja would go on with nothing in its place."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__}")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Each call passes here."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", None)
        if isinstance(owner, str) and name == "join":
            return self.joined(args[0], owner)
        if isinstance(owner, str) and name == "replace":
            return self.replaced(owner, *args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Each of the intercepted operators passes here."""
        if operator != "+":
            if not (isinstance(left, int | float) and isinstance(right, int | float)):
                raise SecurityError(f"{operator!r} with something other than numbers")
            if operator != "%" and max(abs(left), abs(right)) > _FACTOR:
                raise SecurityError(f"{operator!r} with a number above {_FACTOR:,}")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            self.charge(len(result))
        return result

    def text(self, value: Any) -> str:
        """The filter `string`."""
        return str(self.counted(value))

    def joined(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        """The filter and method `join`, and `~`. The names of its arguments are Jinja's."""
        if attribute is not None:
            raise SecurityError("to join by attribute")
        parts = []
        for item in value:
            parts.append(self.text(item))
            self.charge(len(d))
        return d.join(parts)

    def replaced(self, s: str, old: str, new: str, count: int | None = None) -> str:
        """The filter and method `replace`. The names of its arguments are Jinja's."""
        s = self.text(s)
        self.charge(s.count(old) * len(new))
        return s.replace(old, new, -1 if count is None else count)

    def to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """The filter `tojson`: transformers' version, which leaves < and > as they are."""
        pieces = []
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii,
            indent=None if indent is None else min(indent, 8),
            separators=separators,
            sort_keys=sort_keys,
        )
        for piece in encoder.iterencode(value):  # piece by piece, for the same reason as in `counted`
            self.charge(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    def numbers(self, *limits: int) -> range:
        """The function `range`."""
        result = range(*limits)
        if len(result) > _ITEMS:
            raise SecurityError(f"a range of {len(result):,} numbers")
        return result

    def refuse(self, message: object = "") -> None:
        """The function `raise_exception`."""
        raise _RefusalError(str(self.counted(message)))


@contextmanager
def _bounded_steps(count: int) -> Iterator[None]:
    """End the block's code after so many lines, to whichever loop or call they belong.

    Jinja translates a template to Python, and Python tells a tracing function of each line that it runs.
    That depends on nothing but the template, as a clock would not, and works in every thread, as a signal
    would not.
    """
    left = count

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _OverstepError(f"does not come to an end within {count:,} steps")
        return on_line

    before = sys.gettrace()
    sys.settrace(on_line)
    try:
        yield
    finally:
        sys.settrace(before)
