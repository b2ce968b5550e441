"""Checks a pickle before torch reads it: allows only some opcodes and names, and limits depth and size.

    check_pickle(archive.read("archive/data.pkl"))     # ValueError if it holds more than tensors

A pickle is a program that builds values. The pickle that torch.save writes for weights needs two dozen
opcodes, and the names of a few classes and functions. This module goes through the opcodes but builds
nothing. For each value it keeps two numbers: how deep its nesting is, and how many values it contains. A
pickle can use one value many times, so a short pickle can describe a list of 2**1000 values. Python would
need for ever to print or hash such a list.
"""

import pickletools

from minigpt.errors import shown

__all__ = ["check_pickle"]

# Largest number of bytes and of opcodes of a pickle. The pickle of GPT-2 XL and its optimiser has 400,000
# bytes and 70,000 opcodes.
_BYTES, _OPCODES = 8_000_000, 400_000
_DEPTH, _SIZE = 60, 4_000_000

_PLAIN = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "GLOBAL", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
}
_OF_SEVERAL = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1}
# opcode -> number of values that the opcode moves from the top of the stack into the value below them
_INTO = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_FROM_MARK = {"APPENDS", "SETITEMS"}
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    "torch.storage UntypedStorage",
    *(f"torch {kind}Storage" for kind in _STORAGES),
    *(f"torch {kind}" for kind in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")),
}


class _Value:
    """What is known of a value in the pickle: its nesting depth, the number of values in it, `is_used`.

    `is_used` is True if the value is inside another value.
    """

    __slots__ = ("depth", "is_used", "size")

    def __init__(self, parts: "list[_Value]" = []) -> None:  # noqa: B006 -- the list is never changed
        self.depth, self.size, self.is_used = 0, 1, False
        self.take(parts)

    def take(self, parts: "list[_Value]") -> None:
        """Add inner values to this value, as a list's `append` does.

        Raises:
            ValueError: if this value becomes too deep or too large. Also if this value is already inside
                another value, because the depth and size of that other value would become wrong.
        """
        if (self.is_used and parts) or self in parts:
            raise ValueError("it changes a value that is part of another one")
        for part in parts:
            part.is_used = True
            self.depth = max(self.depth, part.depth + 1)
            self.size += part.size
        if self.depth > _DEPTH:
            raise ValueError("it is nested too deeply")
        if self.size > _SIZE:
            raise ValueError("it repeats its values too often")


def check_pickle(content: bytes) -> None:
    """Check the pickle in a file of torch.save. This takes less than a second and runs no code of the pickle.

    Raises:
        ValueError: if the pickle is damaged or too large, or has an opcode or name that tensors do not need.
            The message is one line.
    """
    if len(content) > _BYTES:
        raise ValueError(f"its list of tensors has {len(content):,} bytes: more than {_BYTES:,} are not read")
    stack: list[_Value] = []
    marks: list[int] = []  # length of the stack at each MARK opcode that is still open
    memo: dict[object, _Value] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count > _OPCODES:
                raise ValueError(f"its list of tensors has more than {_OPCODES:,} entries")
            _step(opcode.name, argument, stack, marks, memo)
    except (IndexError, KeyError):
        raise ValueError("its list of tensors is damaged") from None
    if len(stack) != 1 or marks:
        raise ValueError("its list of tensors is damaged")


def _step(
    name: str, argument: object, stack: list[_Value], marks: list[int], memo: dict[object, _Value]
) -> None:
    floor = marks[-1] if marks else 0  # number of values below the newest mark; no opcode may take them
    if name == "GLOBAL" and argument not in _ALLOWED:
        asked = str(argument).replace(" ", ".")
        raise ValueError(f"it asks for {shown(asked)[1:-1]}, but only tensors are read; no code was run")
    if name in _PLAIN:
        stack.append(_Value())
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "MARK":
        marks.append(len(stack))
    elif name in _FROM_MARK or name == "TUPLE":
        begin = marks.pop()
        parts = stack[begin:]
        del stack[begin:]
        if name == "TUPLE":
            stack.append(_Value(parts))
        else:
            stack[-1].take(parts)
    elif name in _INTO or name in _OF_SEVERAL:
        count = _INTO.get(name) or _OF_SEVERAL[name]
        if len(stack) - floor < count + (name in _INTO):
            raise ValueError("its list of tensors is damaged")
        parts = stack[-count:]
        del stack[-count:]
        if name in _INTO:
            stack[-1].take(parts)
        else:
            stack.append(_Value(parts))
    elif name not in ("PROTO", "STOP"):
        raise ValueError(f"it holds the instruction {name}, which no list of tensors needs")
