"""The flags of `minigpt train` for each family. This module does not import torch, so `--help` is quick.

OPTIONS["gpt"].model_config(config, vocab_size)     # config: an object with the flags as attributes
OPTIONS["gpt"].UNSUPPORTED                          # flags that the family does not have
"""

from typing import Any, Literal, Protocol

from minigpt.families.gpt2 import options as gpt2
from minigpt.families.qwen3 import options as qwen3

__all__ = ["OPTIONS", "RECOMMENDED", "FamilyName", "FamilyOptions"]

FamilyName = Literal["gpt", "qwen3"]


class FamilyOptions(Protocol):
    """The interface of a family's `options` module."""

    # A flag that only another family has -> its default value. If the user gives such a flag another value,
    # that is an error: this family cannot do what the user wants.
    UNSUPPORTED: dict[str, Any]

    def model_config(self, options: Any, /, vocab_size: int) -> Any:
        """Build the model configuration.

        Raises:
            InputError: if the sizes are impossible together; the message names the flags to change.
        """


OPTIONS: dict[FamilyName, FamilyOptions] = {"gpt": gpt2, "qwen3": qwen3}
# With equal training time and equal size, Qwen3 reaches a lower loss than GPT (measured, see LOG.md).
RECOMMENDED: FamilyName = "qwen3"
