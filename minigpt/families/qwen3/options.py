"""The flags of `minigpt train` that describe a Qwen3 model."""

from typing import TYPE_CHECKING, Any

from minigpt.errors import InputError, Message

if TYPE_CHECKING:
    from minigpt.families.qwen3.model import Qwen3Config

__all__ = ["UNSUPPORTED", "model_config"]

UNSUPPORTED: dict[str, Any] = {"dropout": 0.0, "bias": False, "gelu": "exact"}
_FLAGS = {  # field of Qwen3Config -> its flag, which all families share
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "block_size",
}


def model_config(options: Any, /, vocab_size: int) -> "Qwen3Config":
    """Build the model configuration from the flags.

    If head_dim, num_key_value_heads or intermediate_size is 0, a suitable value is computed.

    Raises:
        InputError: if the sizes are impossible together (n_head must divide n_embd, ...).
    """
    from minigpt.families.qwen3.model import Qwen3Config

    n_head, n_embd = options.n_head, options.n_embd
    if not options.head_dim and (n_head < 1 or n_embd % n_head):
        text = "n_head must divide n_embd: got n_head={n_head}, n_embd={n_embd}; or give --head_dim"
        raise InputError(Message(text, n_head=n_head, n_embd=n_embd))
    # Qwen3's MLP has three matrices of C x I (n_embd x intermediate_size); GPT's MLP has two of C x 4C. With
    # I = 8/3 C, both have the same number of weights: 3 C I = 2 C 4C. I is rounded to a multiple of 8,
    # because an AVX2 instruction computes 8 floats.
    same_size = max(8, round(n_embd / 3) * 8)
    try:
        return Qwen3Config(
            vocab_size=vocab_size,
            **{theirs: getattr(options, ours) for theirs, ours in _FLAGS.items()},
            num_key_value_heads=options.num_key_value_heads or n_head,
            head_dim=options.head_dim or n_embd // n_head,
            intermediate_size=options.intermediate_size or same_size,
            rope_theta=options.rope_theta,
            tie_word_embeddings=options.tie_word_embeddings,
        )
    except ValueError as error:
        text = str(error)
        for theirs, ours in _FLAGS.items():  # replace names of fields by names of flags in the error message
            text = text.replace(theirs, ours)
        raise InputError(text) from None
