"""Checks of what others wrote, settings and names of weights: what does not fit is an InputError of one line.

Nothing is guessed and nothing is skipped. This module knows no family, opens no file and needs no torch.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from minigpt.errors import InputError

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

MAX_LAYERS = 1000  # of any model
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's


def require_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Check the keys that have one value here and several elsewhere. An absent key means the same value.

    Raises:
        InputError: naming the first key with another value.
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
    """Refuse a configuration with far more layers than the weights have, before all their names are listed.

    Args:
        names: of the tensors; those of layer i begin with prefix, i and a dot.
        count: layers in the configuration, under `key`.

    Raises:
        InputError: if the weights have fewer layers, and no model has so many.
    """
    numbers = (name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix))
    present = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    if count > max(present, MAX_LAYERS):
        raise InputError(f"{key}={count}, but the highest layer in the weights is number {present}")


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Names without what DistributedDataParallel and torch.compile put before each one -> as they are."""
    bare = {name: name for name in names}
    while bare:
        prefix = next((one for one in _WRAPPERS if all(name.startswith(one) for name in bare)), "")
        if not prefix:
            break
        bare = {name.removeprefix(prefix): original for name, original in bare.items()}
    return bare


def full_names(names: Collection[str], prefix: str, head: str) -> tuple[dict[str, str], list[str]]:
    """Names with the prefix that a file of the model without its head leaves out: wte is transformer.wte.

    A wrapper's prefix in front of all names is taken away.

    Returns: full name -> name in the file, and complaints about names that the file has in both forms.
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
    """All that is missing, unexpected or different, in one line; empty if everything fits.

    Args:
        found: name of each tensor -> its type and shape as text, "float32 (8, 2)" say.
        expected: the same of every tensor that may be there.
        optional: names that may be absent.
        complaints: what the caller has found unexpected already.
        in_file: what an unexpected name is in the file.
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
    """The names, or the first of very many: a message is one line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, list(names)[:limit])) + more
