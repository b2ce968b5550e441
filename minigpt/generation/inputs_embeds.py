"""Prompts as vectors instead of ids, like Hugging Face's inputs_embeds, for soft prompts and experiments.

The models read ids. So a prompt gets one placeholder id for each vector, and a hook replaces the output of
the token embedding by the vectors. The model then treats positions as usual.

Letters in shapes: B rows, S columns, C channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.weights.quantized import NarrowEmbedding

__all__ = ["placeholders", "replaced_embeddings"]


def token_embedding(model: LanguageModel) -> nn.Embedding | NarrowEmbedding:
    """Return the module that turns ids into vectors: the first embedding module of the model."""
    kinds = nn.Embedding | NarrowEmbedding
    return next(module for module in model.base_model.modules() if isinstance(module, kinds))


def placeholders(
    model: LanguageModel, prompts: Sequence[Sequence[int]], inputs_embeds: Sequence[Tensor]
) -> list[list[int]]:
    """Return prompts of placeholder ids, one id for each vector.

    Raises:
        InputError: if there are also prompts of ids; if vectors have a wrong shape, are not floats, or are
            not finite.
    """
    if prompts:
        raise InputError("prompts and inputs_embeds both say what to continue: leave the prompts empty")
    width = token_embedding(model).weight.shape[1]
    for number, vectors in enumerate(inputs_embeds, 1):
        if vectors.ndim != 2 or vectors.shape[1] != width or not vectors.is_floating_point():
            raise InputError(
                f"inputs_embeds {number} must be floats of shape (tokens, {width}): got {vectors.dtype} "
                f"{tuple(vectors.shape)}"
            )
        if not vectors.isfinite().all():
            raise InputError(f"inputs_embeds {number} has values that are not finite numbers")
    return [[0] * len(vectors) for vectors in inputs_embeds]


@contextmanager
def replaced_embeddings(model: LanguageModel, vectors: Tensor) -> Iterator[None]:
    """In a `with` block, vectors (tokens, C) replace the embeddings of the first tokens of each row."""

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()  # (B, S, C)
        output[:, : len(vectors)] = vectors
        return output

    hook = token_embedding(model).register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
