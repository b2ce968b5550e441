"""Rewards for a model's answers: built-in rewards, or a function in the user's file.

    exact    1 if the answer equals the data's answer, apart from white space at the ends; else 0
    regex    1 if --reward_regex matches the whole answer; else 0
    length   1 - |length of the answer - N| / N, but at least 0, where N is --reward_length (in characters)
    json     1 if the answer is JSON; else 0
    file.py:function      a function of lists that returns a list of numbers, one for each answer:

        def polite(completions, prompts, answers):
            return [float("请" in text) for text in completions]

The function may take any of these three arguments, by these names. A further argument must have the name of a
field in the data's records: it gets a list of the field's values, None where a record lacks the field.
`**kwargs` receives all three arguments and all fields.
"""

import inspect
import json
import math
import re
import runpy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from minigpt.errors import InputError
from minigpt.evaluation.answers import exact_match

__all__ = ["RewardError", "Rewards", "make_rewards"]

_ARGUMENTS = ("completions", "prompts", "answers")
_LARGEST = 1e30  # largest allowed weighted sum of rewards; much larger sums would overflow float32
Fields: TypeAlias = Sequence[Mapping[str, Any]]  # records, one for each completion
Function: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str], Fields], list[float]]


class RewardError(InputError):
    """Raised when a reward function fails. The training loop then saves the steps done so far."""


class Rewards(NamedTuple):
    """A weighted sum of several rewards, as a function of answers."""

    functions: list[Function]
    weights: list[float]

    def __call__(
        self,
        completions: Sequence[str],
        prompts: Sequence[str],
        answers: Sequence[str],
        fields: Fields = (),
    ) -> list[float]:
        """Return the weighted sum of the rewards for each completion.

        Args:
            completions: answers of the model.
            prompts: the questions, one for each completion.
            answers: the answers in the data, one for each completion.
            fields: the records of the data, one for each completion.

        Raises:
            RewardError: if a function raises an error, if it does not return one finite number for each
                completion, or if a weighted sum is above 1e30 (or below -1e30).
        """
        parts = [function(completions, prompts, answers, fields) for function in self.functions]
        sums = [sum(w * part for w, part in zip(self.weights, row)) for row in zip(*parts)]
        for total, completion in zip(sums, completions):
            if not abs(total) <= _LARGEST:  # `not ... <=` is also true for NaN
                raise RewardError(
                    f"--reward gave {total:g} for the completion {_short(completion)}: rewards must be from "
                    f"-{_LARGEST:g} to {_LARGEST:g}"
                )
        return sums


def make_rewards(
    names: Sequence[str],
    weights: Sequence[float] = (),
    regex: str = "",
    length: int = 0,
    fields: Collection[str] = (),
) -> Rewards:
    """Build the rewards from the user's options.

    Args:
        names: exact, regex, length, json or file.py:function.
        weights: a factor for each name; (): all are 1.
        fields: names of the fields that the data's records have.

    Raises:
        InputError: for an unknown name, a file without that function, or an invalid pattern.
    """
    if weights and len(weights) != len(names):
        raise InputError(f"--reward_weights needs a number for each reward: got {len(weights)}, {len(names)}")
    if not all(map(math.isfinite, weights)):
        raise InputError(f"--reward_weights must be finite numbers: got {' '.join(map(str, weights))}")
    functions = [_function(name, regex, length, fields) for name in names]
    return Rewards(functions, [*(weights or [1.0] * len(names))])


def _function(name: str, regex: str, length: int, fields: Collection[str]) -> Function:
    if name == "exact":
        return lambda found, _, answers, *more: [float(exact_match(*pair)) for pair in zip(found, answers)]
    if name == "json":
        return lambda found, *_: [float(_is_json(text)) for text in found]
    if name == "length":
        return lambda found, *_: [max(0.0, 1 - abs(len(text) - length) / length) for text in found]
    if name == "regex":
        try:
            pattern = re.compile(regex, re.DOTALL)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"--reward_regex {regex!r} is no regular expression: {error}") from None
        return lambda found, *_: [float(pattern.fullmatch(text) is not None) for text in found]
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(f"--reward {name}: known are exact, regex, length, json, and FILE.py:FUNCTION")
    return _of_file(Path(path), function, name, fields)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _of_file(path: Path, name: str, shown: str, fields: Collection[str]) -> Function:
    if not path.is_file():
        raise InputError(f"--reward {shown}: there is no file {path}")
    try:
        found = runpy.run_path(str(path)).get(name)
    except (Exception, SystemExit) as error:  # a script may end with sys.exit
        raise InputError(f"--reward {shown}: {path} cannot be run: {_said(error)}") from None
    if not callable(found):
        raise InputError(f"--reward {shown}: {path} has no function {name}")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        raise InputError(f"--reward {shown}: {name} does not say its arguments: write a function") from None
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    names = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
    needed = {one.name for one in parameters if one.default is one.empty and one.name in names}
    known = [*_ARGUMENTS, *(field for field in fields if field not in _ARGUMENTS)]
    if strange := needed - {*known} - {one.name for one in parameters if one.kind is one.VAR_POSITIONAL}:
        raise InputError(
            f"--reward {shown}: {name} needs {', '.join(sorted(strange))}; it is given {', '.join(known)}, "
            "by name"
        )
    own = [field for field in known[len(_ARGUMENTS) :] if takes_all or field in names]

    def call(
        completions: Sequence[str], prompts: Sequence[str], answers: Sequence[str], records: Fields
    ) -> list[float]:
        given: dict[str, list[Any]] = {field: [one.get(field) for one in records] for field in own}
        for key, value in zip(_ARGUMENTS, (completions, prompts, answers)):
            if takes_all or key in names:
                given[key] = list(value)
        try:
            rewards = found(**given)
            if isinstance(rewards, Iterator):
                rewards = list(rewards)  # a generator runs here, and may raise an error
        except (Exception, SystemExit) as error:
            raise RewardError(f"--reward {shown} raised {_said(error)}") from None
        return _numbers(rewards, completions, shown)

    return call


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _numbers(rewards: Any, completions: Sequence[str], shown: str) -> list[float]:
    """Convert the result of a reward function to floats, and check them."""
    try:
        values = list(rewards) if not isinstance(rewards, str | dict) else None
    except TypeError:
        values = None
    if values is None:
        raise RewardError(f"--reward {shown} must return a list of numbers: got {_short(rewards)}")
    if len(values) != len(completions):
        raise RewardError(
            f"--reward {shown} must return a number for each of {len(completions)} completions: "
            f"got {len(values)}"
        )
    numbers = []
    for value, completion in zip(values, completions):
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except Exception:  # not a number, too large for a float, or an object whose methods fail
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"--reward {shown} must return finite numbers: got {_short(value)} for the completion "
                f"{_short(completion)}"
            )
        numbers.append(number)
    return numbers


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
