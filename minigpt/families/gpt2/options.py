"""The flags of `minigpt train` that describe a GPT model."""

from typing import TYPE_CHECKING, Any

from minigpt.errors import InputError

if TYPE_CHECKING:
    from minigpt.model import GPTConfig

__all__ = ["UNSUPPORTED", "model_config"]

UNSUPPORTED: dict[str, Any] = {
    "head_dim": 0,
    "num_key_value_heads": 0,
    "intermediate_size": 0,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
_FLAGS = ("n_embd", "n_head", "n_layer", "dropout", "block_size", "bias", "gelu")


def model_config(options: Any, /, vocab_size: int) -> "GPTConfig":
    """Build the model configuration from the flags.

    Raises:
        InputError: if the sizes are impossible together (n_head must divide n_embd, ...).
    """
    from minigpt.model import GPTConfig

    try:
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(options, name) for name in _FLAGS})
    except ValueError as error:
        raise InputError(str(error)) from None
