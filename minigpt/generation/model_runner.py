"""Tokens into a model and its cache, logits out: by one call of C where there is one, else by PyTorch.

    reader = Reader(model)
    logits = reader.read(prompt, cache)              # one row, (1, V)
    logits = reader.read_rows(tokens, slots, cache)  # one token of each of several rows, (n, V)

A token that is read natively gets the same bits in any company. PyTorch's products of several tokens are
rounded in another order than those of one; so of it this holds only up to the last bits.

Letters in shapes: T tokens, n rows, V entries of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.families.registry import LanguageModel
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.native import native_step
from minigpt.generation.slot_cache import SlotCache

__all__ = ["Reader"]


class Reader:
    """What reads for one model, which is in eval mode; not for several threads at once.

    Args:
        cache_implementation: of the caches that it will be given: C reads "static" ones alone.
    """

    def __init__(self, model: LanguageModel, cache_implementation: str = "static") -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.native = native_step(model) if cache_implementation == "static" else None

    def read(
        self, ids: Sequence[int], cache: KeyValueCache, wanted: int = 1, same_bits: bool = False
    ) -> Tensor:
        """The next T tokens of a cache of one row -> logits of the last `wanted`, (wanted, V).

        Args:
            same_bits: read natively, wherever that is possible, even if PyTorch were faster: each token's
                logits are then those that it has when it is read alone. Without, a prompt is read as
                minigpt.generation.batch reads it.
        """
        is_plain = type(cache) is KeyValueCache  # C reads floats
        if self.native and is_plain and (same_bits or self.native.takes(len(ids))):
            past = cache.length
            places = torch.arange(past, past + len(ids))
            return self.native(torch.tensor([ids]), places, 0, cache, wanted)
        return self._logits(self.model.base_model(self._row(ids), past_key_values=cache), wanted)

    def read_slot(self, ids: Sequence[int], slot: int, cache: SlotCache) -> Tensor:
        """The next tokens of one slot -> logits of the last one, (1, V)."""
        if self.native and type(cache) is SlotCache and self.native.takes(len(ids)):
            return self.native.ragged([ids], [slot], cache)
        return self._logits(self.model.base_model(self._row(ids), past_key_values=cache.row(slot)), 1)

    def read_rows(self, tokens: Sequence[int], slots: Sequence[int], cache: SlotCache) -> Tensor:
        """The next token of each slot -> logits (n, V)."""
        if self.native and type(cache) is SlotCache:
            return self.native.ragged([[token] for token in tokens], slots, cache)
        rows = cache.rows(slots)
        hidden = self.model.base_model(self._row(tokens).T, rows.mask, rows.positions, rows)  # (n, 1, C)
        logits: Tensor = self.model.lm_head(hidden[:, -1]).float()  # (n, V)
        return logits

    def _row(self, ids: Sequence[int]) -> Tensor:
        row = torch.tensor([ids])  # (1, T)
        if (
            self.device.type == "cuda"
        ):  # pinned: else the host would wait for all that the device still has to do
            return row.pin_memory().to(self.device, non_blocking=True)
        return row.to(self.device)

    def _logits(self, hidden: Tensor, wanted: int) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden[0, -wanted:]).float()  # (1, T, C) -> (wanted, V)
        return logits
