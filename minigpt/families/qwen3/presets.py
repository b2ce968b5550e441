"""The six published sizes of dense Qwen3, as data.

    preset("0.6B").config()        # a Qwen3Config
    preset("Qwen3-0.6B").config()  # Hugging Face's name works, too

All sizes share the defaults of Qwen3Config: the vocabulary, heads of 128 channels (8 key and value heads),
40,960 positions, and the base of RoPE. The instruct versions have the same sizes as the base models.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt.errors import InputError, unknown_name

if TYPE_CHECKING:  # only for type checkers, because importing torch takes a second
    from minigpt.families.qwen3.model import Qwen3Config

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True)
class Preset:
    """A published model: its name and the sizes that differ between models."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool

    @property
    def repository(self) -> str:
        """The name of the model's repository at Hugging Face."""
        return f"Qwen/Qwen3-{self.name}"

    def config(self) -> "Qwen3Config":
        """Return the model configuration."""
        from minigpt.families.qwen3.model import Qwen3Config

        return Qwen3Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            tie_word_embeddings=self.tie_word_embeddings,
        )


# Sizes from https://arxiv.org/abs/2505.09388, table 1; hidden_size and intermediate_size from the published
# config.json files.
PRESETS = (
    Preset("0.6B", 1024, 3072, 28, 16, True),
    Preset("1.7B", 2048, 6144, 28, 16, True),
    Preset("4B", 2560, 9728, 36, 32, True),
    Preset("8B", 4096, 12288, 36, 32, False),
    Preset("14B", 5120, 17408, 40, 40, False),
    Preset("32B", 5120, 25600, 64, 64, False),
)


def preset(name: str) -> Preset:
    """Return the preset of a name, "0.6B" or "Qwen3-0.6B".

    Raises:
        InputError: for an unknown name; the message suggests the most similar name.
    """
    known = {row.name: row for row in PRESETS} | {f"Qwen3-{row.name}": row for row in PRESETS}
    if name not in known:
        raise InputError(unknown_name("Qwen3 model", name, known))
    return known[name]
