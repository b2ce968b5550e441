"""What the flags of `minigpt train` mean for each family. It needs no torch, and so `--help` is quick.

OPTIONS["gpt"].model_config(config, vocab_size)     # config: an object with the flags as attributes
OPTIONS["gpt"].UNSUPPORTED                          # flags that the family does not have
"""

from typing import Any, Literal, Protocol

from minigpt.families.gpt2 import options as gpt2
from minigpt.families.qwen3 import options as qwen3

__all__ = ["OPTIONS", "RECOMMENDED", "FamilyName", "FamilyOptions"]

FamilyName = Literal["gpt", "qwen3"]


class FamilyOptions(Protocol):
    """What a family's `options` module has."""

    # flag of another family -> the value that asks for nothing. Any other value is an error: to ignore it
    # would train something else than what was asked for.
    UNSUPPORTED: dict[str, Any]

    def model_config(self, options: Any, /, vocab_size: int) -> Any:
        """The model's configuration; InputError, in the flags' names, for sizes that make no model."""


OPTIONS: dict[FamilyName, FamilyOptions] = {"gpt": gpt2, "qwen3": qwen3}
RECOMMENDED: FamilyName = "qwen3"  # a lower loss than gpt's after equal time, at equal parameters (LOG.md)
