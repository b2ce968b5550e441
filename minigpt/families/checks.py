"""Checks of settings and weight names in files of other programs, such as Hugging Face's config.json.

An unknown setting or name is an error: an InputError with a message of one line. The functions of this module
work for every model family. They open no file and do not import torch.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from minigpt.errors import InputError, whole_number

__all__ = [
    "MAX_LAYERS",
    "differences",
    "full_names",
    "listed",
    "require_fixed",
    "require_keys",
    "require_layers",
    "unwrapped",
]

MAX_LAYERS = 1000  # a config.json may name more layers than this only if the weights have as many
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of weight names, from DDP and torch.compile
_MOST_WRAPPERS = 8  # at most this number of such prefixes is removed from a name


def require_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Check the settings for which only one value is supported. A missing setting is not an error.

    Args:
        values: the settings of a file.
        fixed: name of a setting -> its only supported value.

    Raises:
        InputError: if a setting has another value; the message names the setting.
    """
    for key, value in fixed.items():
        if values.get(key, value) != value:
            raise InputError(f"{key}={values[key]!r} is not supported, only {value!r}")


def require_keys(values: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raise an InputError that names the missing keys, if there are any."""
    missing = [key for key in keys if key not in values]
    if missing:
        raise InputError(f"missing keys: {', '.join(missing)}")


def require_layers(names: Iterable[str], prefix: str, count: int, key: str) -> None:
    """Raise an InputError if a configuration has far more layers than the weights have.

    Without this check, a damaged configuration could make minigpt list the names of a billion layers.

    Args:
        names: names of the tensors. In layer i, a name begins with `prefix`, then i, then a dot.
        prefix: the part of a name before the layer's number.
        count: number of layers in the configuration.
        key: the setting that gives `count`, for the message.

    Raises:
        InputError: if `count` is larger than 1000 (MAX_LAYERS) and also larger than the number of layers in
            the weights.
    """
    numbers = (name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix))
    present = 1 + max((number for number in map(whole_number, numbers) if number is not None), default=-1)
    if count > max(present, MAX_LAYERS):
        raise InputError(f"{key}={count}, but the highest layer in the weights is number {present}")


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Remove the prefixes of torch.compile and DDP from weight names.

    A prefix is removed only if all names begin with it.

    Returns: a dict, name without prefix -> name in the file.
    """
    bare = {name: name for name in names}
    for _ in range(_MOST_WRAPPERS if bare else 0):
        prefix = next((one for one in _WRAPPERS if all(name.startswith(one) for name in bare)), "")
        if not prefix:
            break
        bare = {name.removeprefix(prefix): original for name, original in bare.items()}
    return bare


def full_names(names: Collection[str], prefix: str, head: str) -> tuple[dict[str, str], list[str]]:
    """Add `prefix` to weight names that lack it: `wte.weight` becomes `transformer.wte.weight`.

    A file of a model without lm_head has such names. Names that begin with `head`, such as `lm_head.weight`,
    do not change. If a wrapper such as torch.compile has put its own prefix before all names, that prefix is
    removed first.

    Returns: a dict, complete name -> name in the file; and a list of complaints about names that the file has
    twice, with and without the prefix.
    """
    found: dict[str, str] = {}
    twice = []
    for bare, name in unwrapped(names).items():
        full_name = bare if bare.startswith((prefix, head)) else f"{prefix}{bare}"
        if full_name in found:
            twice.append(f"{name} twice, with and without its prefix")
        else:
            found[full_name] = name
    return found, twice


def differences(
    found: Mapping[str, str],
    expected: Mapping[str, str],
    *,
    optional: Collection[str] = (),
    complaints: Collection[str] = (),
    in_file: Mapping[str, str] | None = None,
) -> str:
    """Describe all missing, unexpected and different tensors in one line. Returns "" if everything fits.

    Args:
        found: name of a tensor that exists -> its type and shape as text, for example "float32 (8, 2)".
        expected: name of a tensor that should exist -> its type and shape as text.
        optional: names in `expected` that may be absent.
        complaints: problems that the caller has already found; they are listed as unexpected.
        in_file: name in `found` -> name in the file, which the message shows instead.
    """
    kinds = {
        "missing": [name for name in expected if name not in found and name not in optional],
        "unexpected": [
            *complaints,
            *((in_file or {}).get(name, name) for name in sorted(found.keys() - expected.keys())),
        ],
        "unfit": [
            f"{name} is {found[name]}, not {text}"
            for name, text in expected.items()
            if name in found and found[name] != text
        ],
    }
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)


def listed(names: Collection[object], limit: int = 3) -> str:
    """Join names for a message. Only the first `limit` names are shown, and long names are cut."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    texts = (str(name) for name in list(names)[:limit])
    return ", ".join(text if len(text) <= 200 else f"{text[:180]}..." for text in texts) + more
