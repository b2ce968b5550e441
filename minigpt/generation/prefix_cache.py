"""Beginnings that many prompts share, a system prompt say: read once, copied from then on.

Prompts are kept in blocks of a fixed number of tokens, each under *all* ids up to its end: the keys and
values of a token depend on everything before it. So two prompts share their common beginning, stored once.
The memory is taken at the start; where it is full, the block that was unused for longest goes.

Letters in shapes: L layers, H heads, T tokens of a block, D channels of one head.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from minigpt.errors import InputError
from minigpt.generation.cache import MIB, KeyValueCache

__all__ = ["PrefixCache"]


class PrefixCache:
    """Keys and values of prompts' beginnings.

    Args:
        cache: whose slots are filled.
        block: tokens of a block.
        prefix_mib: MiB (2**20 bytes) to take, at most.

    Raises:
        InputError: if not one block fits.
    """

    def __init__(self, cache: KeyValueCache, block: int, prefix_mib: float) -> None:
        kinds = cache.columns(0, 0, 1)  # (L, H, 1, ...) each
        size = sum(kind.nbytes for kind in kinds) * block
        count = int(prefix_mib * MIB / size)
        if count < 1:
            raise InputError(
                f"prefix_mib={prefix_mib:g} has no room for one block of {block} tokens, {size / MIB:.2f} MiB"
            )
        self.block = block
        self._cache = cache
        self._memory = [
            torch.empty(
                (count, *kind.shape[:2], block, kind.shape[3]), dtype=kind.dtype, device=kind.device
            )  # (blocks, L, H, T, ...)
            for kind in kinds
        ]
        self._free = list(range(count))[::-1]
        self._places: OrderedDict[tuple[int, ...], int] = (
            OrderedDict()
        )  # all ids up to a block's end -> place

    @property
    def bytes(self) -> int:
        """Memory taken, whether it is in use yet or not."""
        return sum(kind.nbytes for kind in self._memory)

    def restore(self, prompt: Sequence[int], slot: int) -> int:
        """Fill an empty slot with what is known of a prompt's beginning; returns the number of tokens.

        The last token is never among them: it has to be read for its logits.
        """
        found = []
        for end in range(self.block, len(prompt), self.block):
            place = self._places.get(tuple(prompt[:end]))
            if place is None:
                break
            found.append(place)
        for number, place in enumerate(found):
            start = self._cache.reserve(slot, self.block)
            for held, kind in zip(self._cache.columns(slot, start, start + self.block), self._memory):
                held.copy_(kind[place])
            self._cache.advance(slot, self.block)
            assert start == number * self.block, "the slot was empty"
        # The first block counts as used last: what goes first is an end, not a beginning that others need.
        for number in reversed(range(1, len(found) + 1)):
            self._places.move_to_end(tuple(prompt[: number * self.block]))
        return len(found) * self.block

    def keep(self, prompt: Sequence[int], slot: int) -> None:
        """Remember the block that a slot has just come to the end of, if it has."""
        end = self._cache.length(slot)
        key = tuple(prompt[:end])
        if end % self.block or not end or end > len(prompt) or key in self._places:
            return
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        for kind, held in zip(self._memory, self._cache.columns(slot, end - self.block, end)):
            kind[place].copy_(held)
        self._places[key] = place
