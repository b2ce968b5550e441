"""Adds rows to a model's embedding and head, so that the vocabulary can have more tokens.

resize_token_embeddings(model, tokenizer.get_vocab_size())
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel

__all__ = ["NewRows", "resize_token_embeddings"]

NewRows: TypeAlias = Literal["mean", "zeros", "sampled"]


@torch.no_grad()
def resize_token_embeddings(model: LanguageModel, vocab_size: int, new_rows: NewRows = "mean") -> None:
    """Resize a model's embedding and head to `vocab_size` rows, in place. Logits of old tokens do not change.

    Args:
        vocab_size: number of rows; it must not be smaller than before.
        new_rows: values of the new rows.
            "mean": the mean of the old rows (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
            "zeros": zeros.
            "sampled": samples of a normal distribution with the old rows' mean and covariance.

    Raises:
        InputError: if vocab_size is smaller than before.
    """
    old = model.config.vocab_size
    if vocab_size < old:
        raise InputError(f"the model has {old:,} rows of embeddings: they cannot become {vocab_size:,}")
    if vocab_size == old:
        return
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    head: Any = getattr(model, "lm_head", None)  # a classifier has no lm_head
    is_tied = head is not None and head.weight is embedding.weight
    embedding.weight = _longer(embedding.weight, vocab_size, new_rows)
    embedding.num_embeddings = vocab_size
    if head is not None:
        head.out_features = vocab_size
        head.weight = embedding.weight if is_tied else _longer(head.weight, vocab_size, new_rows)
    config = dataclasses.replace(model.config, vocab_size=vocab_size)
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config = config  # type: ignore[assignment]


def _longer(weight: Tensor, rows: int, how: NewRows) -> nn.Parameter:
    """Return a copy of a matrix with new rows after the old rows: (old rows, C) -> (`rows`, C)."""
    more = rows - len(weight)
    mean = weight.double().mean(dim=0)  # (C,)
    if how == "zeros":
        new = torch.zeros_like(mean).expand(more, -1)
    elif how == "mean":
        new = mean.expand(more, -1)
    else:
        new = mean + _drawn(weight.double() - mean, more)
    together = torch.cat([weight, new.to(weight.dtype)])
    return nn.Parameter(together, requires_grad=weight.requires_grad)


def _drawn(centred: Tensor, rows: int) -> Tensor:
    """Sample vectors (rows, C) from a normal distribution with mean 0 and the covariance of `centred` (V, C).

    Random linear combinations of the rows of `centred` have this distribution, because the mean of the rows
    is 0. So no covariance matrix is computed.
    """
    mixture = torch.randn(rows, len(centred), dtype=centred.dtype, device=centred.device)
    drawn: Tensor = mixture @ centred / len(centred) ** 0.5
    return drawn
