"""Runs a chat template without trusting it. A template is a program that comes with a model's weights.

    template = SandboxedTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    template.render({"messages": [{"content": "hello"}]})

Jinja's immutable sandbox hides Python's internals, but does not limit time or memory. This module adds a
limit, the budget of a rendering. Each character that the template makes, and each entry of a list that it
builds, is subtracted from the budget ("charged"). Each charge also checks the thread's CPU time. An operation
must not take much more time or memory than it is charged for. So operations that make a large result from
small inputs (`'x' * 10**9`, `.ljust`, `9 ** 9 ** 9`) are charged before they run, or forbidden.

Templates can use all features that transformers offers: `raise_exception`, `strftime_now`, its `tojson`,
`{% generation %}` blocks, `break` and `continue`. Filters that no chat template needs are left out.
"""

import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from minigpt.errors import InputError

__all__ = ["SandboxedTemplate"]

MAX_TEMPLATE = 200_000  # largest number of characters of a template; published ones have up to 30,000
# The budget of a rendering is CHARACTERS, plus PER_CHARACTER for each character in the template's variables.
CHARACTERS, PER_CHARACTER = 1_000_000, 100
STEP = 10  # subtracted from the budget for each call and for each iteration of a loop
SECONDS = 5.0  # largest CPU time of a rendering; Qwen3's template needs about 0.1 s for 1,000 messages
MAX_NUMBER = 10**15  # largest operand of arithmetic, because computing with huge integers is slow

FILTERS = (
    "abs attr count d default dictsort filesizeformat first float groupby int items last length list map max "
    "min reject rejectattr reverse select selectattr sort unique"
)
# Filters that convert their arguments to text. The length of this text is subtracted from the budget.
TEXT_FILTERS = (
    "capitalize e escape forceescape lower pprint safe string striptags title truncate upper urlencode "
    "wordcount xmlattr"
)
# Filters that may make a result much larger than their arguments. The budget is checked before they run.
WIDE_FILTERS = "batch center slice sum wordwrap"
# Methods that fill a string up to a given width.
PADDING = "center ljust rjust zfill"
METHODS: dict[type, str] = {
    str: f"{PADDING} capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal "
    "isdigit islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper",
    dict: "copy get items keys values",
    list: "copy count index",
    tuple: "count index",
    range: "start step stop",
    int: "",
    float: "is_integer",
}
"""The attributes of Python's own types that a template may use."""

# The % formats that are allowed, such as "%s: %.2f". They have no width: "%99999999s" would make a huge text.
PERCENT_FORMAT = re.compile(r"(?:[^%]|%%|%(?:\.\d)?[sdrfx])*")
# The formats of str.format that are allowed: {}, {0}, {name}, but no {:999} and no {x.attribute}.
BRACE_FORMAT = re.compile(r"(?:[^{}]|{{|}}|{\w*})*")


class SandboxedTemplate:
    """A compiled template. It can be rendered many times, in any thread.

    Args:
        source: the Jinja template.
        rewrite: a function that changes the parsed template in place before it is compiled.
        marks: two strings that are written around the text of each `{% generation %}` block.

    Raises:
        InputError: if the template is too long or not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        rewrite: Callable[[nodes.Template], None] | None = None,
        marks: tuple[str, str] = ("", ""),
    ) -> None:
        if len(source) > MAX_TEMPLATE:
            raise InputError(f"the chat template has {len(source):,} characters, more than {MAX_TEMPLATE:,}")
        self._sandbox = _Sandbox(marks)
        with _explained():
            parsed = self._sandbox.parse(source)
            if rewrite is not None:
                rewrite(parsed)
            self._template = self._sandbox.from_string(_Charged(self._sandbox).visit(parsed))

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text that the template makes from the variables.

        Args:
            variables: values of JSON's types: text, numbers, booleans, None, lists and dicts.

        Raises:
            InputError: if the template rejects its variables (raise_exception), fails, uses a forbidden
                operation, or exceeds a limit.
        """
        with _explained():
            budget = self._sandbox.budget
            budget.characters, budget.end = sys.maxsize, time.thread_time() + SECONDS
            budget.characters = CHARACTERS + PER_CHARACTER * self._sandbox.size(dict(variables), as_text=True)
            return self._template.render(variables)


class _LimitError(BaseException):
    """Raised when a limit is exceeded.

    It is a BaseException, because some of Jinja's filters catch every Exception.
    """


class _RefusalError(Exception):
    """Raised when the template calls raise_exception, for example because the roles do not alternate."""


@contextmanager
def _explained() -> Iterator[None]:
    """Convert any error of a template to an InputError."""
    try:
        yield
    except (_LimitError, Exception) as error:  # any Exception, because a template can raise all kinds
        match error:
            case jinja2.TemplateSyntaxError():
                reason = f"has an error in line {error.lineno}: {error.message}"
            case RecursionError():
                reason = "exceeds a limit: it is nested too deeply"
            case _LimitError():
                reason = f"exceeds a limit: {error}; use another template"
            case _RefusalError():
                reason = f"refuses this conversation: {error}"
            case SecurityError():
                reason = f"tries something forbidden: {error}"
            case _:
                reason = f"fails: {type(error).__name__}: {error}"
        raise InputError(f"the chat template {reason}") from None


class _Generation(Extension):
    """Adds to Jinja the block `{% generation %}...{% endgeneration %}`, which marks the assistant's text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.FilterBlock(body, _filter(None, ":generation"), lineno=line)


def _filter(node: Any, name: str) -> nodes.Filter:
    # Our filters have names such as ":built". A template cannot call them: Jinja allows no colon in a name.
    return nodes.Filter(node, name, [], [], None, None)


class _Charged(NodeTransformer):
    """Rewrites a template, so that each operation is charged: its cost is subtracted from the budget.

    Jinja compiles some operations, such as making a list, to plain Python, which nothing charges. So the
    rewritten template passes the results of these operations to filters that charge them.
    """

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        node = self.generic_visit(node)
        new: nodes.Node = node
        match node:
            case nodes.TemplateData():  # text outside of {{ }} becomes {{ "text" }}, so that it is charged
                new = nodes.Const(node.data)
            case nodes.Concat():  # Jinja's operator ~, which joins texts, becomes the filter `join`
                new = _filter(nodes.List(node.nodes), "join")
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                new = _filter(node, ":built")
            case nodes.For():
                node.iter = _filter(node.iter, ":each")
        if new is not node:
            new.set_lineno(node.lineno, override=True)
        new.set_environment(self._environment)
        return new


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, which also limits the time and the memory of a rendering by a budget."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, marks: tuple[str, str]) -> None:
        super().__init__(
            trim_blocks=True,  # this and the next setting are those of transformers; templates rely on them
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self.printed,
            optimized=False,  # True would compute constants when the template is compiled, without a budget
            cache_size=0,
        )
        # Each thread has its own values: `characters` is the rest of the budget, and `end` is the value of
        # time.thread_time() at which the rendering must stop.
        self.budget = threading.local()
        self.filters = {name: self.charged(JINJA_FILTERS[name]) for name in FILTERS.split()}
        self.filters |= {
            name: self.charged(JINJA_FILTERS[name], as_text=True) for name in TEXT_FILTERS.split()
        }
        self.filters |= {name: self.widened(JINJA_FILTERS[name]) for name in WIDE_FILTERS.split()}
        self.filters |= {
            ":built": self.built,
            ":each": self.each,
            ":generation": lambda text: marks[0] + text + marks[1],
            "format": self.formatted,
            "indent": self.indented,
            "join": self.joined,
            "replace": self.replaced,
            "round": self.rounded,
            "tojson": self.to_json,
            "trim": self.trimmed,
        }
        self.methods: dict[str, Callable[..., str]] = {
            "format": functools.partial(self.formatted, with_braces=True),
            "join": lambda d, value: self.joined(value, d),
            "replace": self.replaced,
            **{name: functools.partial(self.padded, name) for name in PADDING.split()},
        }
        self.globals = {
            "cycler": Cycler,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "joiner": Joiner,
            "namespace": Namespace,
            "raise_exception": self.refuse,
            "range": self.globals["range"],  # Jinja's own version, which gives at most 100,000 numbers
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        }

    def charge(self, amount: int) -> None:
        """Subtract an amount (of characters or list entries) from the budget, and check the CPU time."""
        self.budget.characters -= amount
        if self.budget.characters < 0:
            raise _LimitError("it makes too much text or too long lists")
        if time.thread_time() > self.budget.end:
            raise _LimitError(f"it takes more than {SECONDS:g} seconds")

    def size(self, value: Any, as_text: bool = False) -> int:
        """Count the entries of a value, including nested entries. Counting stops if the budget is exceeded.

        Args:
            value: the value.
            as_text: also add an estimate of the length of str(value), which may be up to ten times too low.
        """
        total, todo = 0, [value]
        while todo and total <= self.budget.characters:
            item = todo.pop()
            total += 1
            if isinstance(item, dict):
                todo += item.keys()
                todo += item.values()
            elif isinstance(item, list | tuple):
                todo += item
            elif as_text:
                if isinstance(item, str):
                    total += len(item)
                elif isinstance(item, int):
                    total += item.bit_length() // 3
                elif not (item is None or isinstance(item, float | jinja2.Undefined)):
                    raise SecurityError(f"to print a {type(item).__name__}")
        return total

    # -- what the compiled template calls ------------------------------------------------------------------

    @pass_context  # so that Jinja does not call this function when it compiles the template
    def printed(self, context: Any, value: Any) -> Any:
        """Return `value`, a piece of the output, and subtract its length from the budget."""
        self.charge(self.size(value, as_text=True))
        return value

    def built(self, value: Any) -> Any:
        """Return `value`, a list, slice, ... that the template makes. Subtract its size from the budget."""
        self.charge(self.size(value, as_text=isinstance(value, str)))
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the items of a `for` loop. Subtract a fixed amount from the budget for each iteration."""
        for value in values:
            self.charge(STEP)
            yield value

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, method or macro of a template. Subtract what the call costs from the budget."""
        given = [value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")]
        self.charge(STEP + self.size((args, given)))
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            # A method such as strip or rfind may compare each character of the string with each character
            # of an argument. So the charge grows with the product of both lengths.
            self.charge(len(owner) * sum(len(text) for text in args if isinstance(text, str)) // 1000)
            if name in self.methods:
                function = functools.partial(self.methods[name], owner)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str) or isinstance(owner, str):
            self.charge(self.size(result, as_text=True))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an arithmetic operator. Check its operands, and subtract its cost from the budget."""
        if operator == "%" and isinstance(left, str):
            return self.formatted(left, *right) if isinstance(right, tuple) else self.formatted(left, right)
        if operator != "+" or isinstance(left, int | float):
            if not (isinstance(left, int | float) and isinstance(right, int | float)):
                raise SecurityError(f"{operator!r} with something other than numbers")
            most = MAX_NUMBER if operator != "**" else 100
            if max(abs(left), abs(right)) > most:
                raise SecurityError(f"{operator!r} with a number above {most:,}")
        result = super().call_binop(context, operator, left, right)
        self.charge(len(result) if isinstance(result, str | list | tuple) else 1)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return True if a template may use an attribute."""
        allowed = next((names.split() for kind, names in METHODS.items() if isinstance(obj, kind)), [attr])
        return super().is_safe_attribute(obj, attr, value) and attr in allowed

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Raise an error for a forbidden attribute. (Jinja would give the template an undefined value.)"""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        """Return None, so that Jinja does not handle str.format itself. The method `call` handles it."""

    # -- filters and functions; the arguments have the names that Jinja gives them -------------------------

    def charged(self, function: Callable[..., Any], as_text: bool = False) -> Callable[..., Any]:
        """Wrap a Jinja filter, so that its cost is subtracted from the budget.

        The cost is STEP. If the result is a list, tuple or dict, its length is added. With as_text,
        the size of the arguments is added, too, and if the result is a text, its length.
        """

        @functools.wraps(function)  # wraps keeps Jinja's markers, such as pass_environment
        def filtered(*args: Any, **kwargs: Any) -> Any:
            inner = (jinja2.Environment, jinja2.nodes.EvalContext, jinja2.runtime.Context)
            given = [arg for arg in (*args, *kwargs.values()) if not isinstance(arg, inner)]
            self.charge(STEP + (self.size(given, as_text=True) if as_text else 0))
            result = function(*args, **kwargs)
            if isinstance(result, list | tuple | dict) or (as_text and isinstance(result, str)):
                self.charge(len(result))
            return result

        return filtered

    def widened(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a Jinja filter that can make a large result from a number, such as a width.

        The filter's cost is subtracted from the budget before the filter runs.
        """

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            inner = (jinja2.Environment, jinja2.nodes.EvalContext, jinja2.runtime.Context)
            given = [arg for arg in (*args, *kwargs.values()) if not isinstance(arg, inner)]
            given = [list(arg) if isinstance(arg, Iterator) else arg for arg in given]
            numbers = sum(abs(arg) for arg in given if isinstance(arg, int))
            size = self.size(given, as_text=True)
            self.charge(STEP + size * (1 + size // 1000) + (1 + size) * min(numbers, MAX_NUMBER))
            first = [arg for arg in args if isinstance(arg, inner)]
            result = function(*first, *given[: len(args) - len(first)], **kwargs)
            return list(result) if isinstance(result, Iterator) else result

        return filtered

    def formatted(self, pattern: str, *args: Any, with_braces: bool = False, **kwargs: Any) -> str:
        """Implement `'%s' % x`, the filter `'%s'|format(x)`, and the method `'{}'.format(x)`."""
        holes = pattern.count("{" if with_braces else "%")
        self.charge((1 + holes) * self.size((pattern, args, kwargs), as_text=True))
        if not (BRACE_FORMAT if with_braces else PERCENT_FORMAT).fullmatch(pattern):
            raise SecurityError(f"to format with {pattern[:80]!r}: widths and attributes are not allowed")
        return pattern.format(*args, **kwargs) if with_braces else pattern % args

    def indented(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        """Implement the filter `indent`."""
        size = width if isinstance(width, int) else len(width)
        self.charge(self.size(s, as_text=True) + (1 + str(s).count("\n")) * abs(size))
        return JINJA_FILTERS["indent"](s, width, first, blank)  # type: ignore[no-any-return]

    def joined(self, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        """Implement the filter `join`, the string method `join` and the operator `~`."""
        parts = []
        for item in value if attribute is None else map(make_attrgetter(self, attribute), value):
            self.charge(self.size((item, d), as_text=True))
            parts.append(str(item))
        return str(d).join(parts)

    def replaced(self, s: Any, old: str, new: str, count: int | None = None) -> str:
        """Implement the filter and the method `replace`."""
        self.charge(self.size((s, old, new), as_text=True))
        s, old, new = str(s), str(old), str(new)
        self.charge(s.count(old) * len(new))
        return str.replace(s, old, new, -1 if count is None else count)

    def rounded(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        """Implement the filter `round`."""
        if abs(precision) > 100:
            raise SecurityError(f"to round to {precision} digits")
        return JINJA_FILTERS["round"](value, precision, method)

    def to_json(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        """Implement the filter `tojson`. Unlike Jinja's, it leaves < and > unchanged, as in transformers."""
        self.charge(self.size(value, as_text=True))
        if indent is not None and indent > 16:
            raise SecurityError(f"to indent JSON by {indent}")
        pieces = []
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        # With indentation, the JSON may be much longer than `value`. So each piece of it is charged, too.
        for piece in encoder.iterencode(value):
            self.charge(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    def trimmed(self, value: Any, chars: str | None = None) -> str:
        """Implement the filter `trim`."""
        size = self.size(value, as_text=True)
        # `strip` may compare each character of the text with each character of `chars`.
        self.charge(size + size * len(chars or "") // 1000)
        return str(value).strip(chars)

    def padded(self, name: str, s: str, width: int, *fill: str) -> str:
        """Implement the methods that fill a string up to a width (PADDING)."""
        self.charge(abs(width))
        return getattr(str, name)(s, width, *fill)  # type: ignore[no-any-return]

    def refuse(self, message: object = "") -> NoReturn:
        """Implement the function `raise_exception`."""
        self.charge(self.size(message, as_text=True))
        raise _RefusalError(str(message))
