"""Keeps keys and values of beginnings that many prompts share, such as a system prompt.

Keys and values are kept in blocks of a fixed number of tokens. A block is looked up by *all* ids up to its
end, because the keys and values of a token depend on all tokens before it. Prompts that begin with the same
ids share the blocks of this beginning. The memory is allocated once, when the cache is made. If it is full,
the least recently used block is replaced.

Letters in shapes: L layers, H heads, T tokens of a block, D channels of one head.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

import torch

from minigpt.errors import InputError
from minigpt.generation.cache import MIB, KeyValueCache

__all__ = ["PrefixCache"]

Adapters: TypeAlias = tuple[str, ...]


class PrefixCache:
    """Keeps keys and values of the beginnings of prompts.

    Args:
        cache: the cache of the running sequences, into whose slots `restore` copies blocks.
        block: number of tokens in a block.
        prefix_mib: largest number of MiB (2**20 bytes) that the blocks may take.

    Raises:
        InputError: if not even one block fits.
    """

    def __init__(self, cache: KeyValueCache, block: int, prefix_mib: float) -> None:
        kinds = cache.columns(0, 0, 1)  # keys and values of one token, (L, H, 1, D) each
        size = sum(kind.nbytes for kind in kinds) * block
        count = int(prefix_mib * MIB / size)
        if count < 1:
            raise InputError(
                f"prefix_mib={prefix_mib:g} has no room for one block of {block} tokens, {size / MIB:.2f} MiB"
            )
        self.block = block
        self._cache = cache
        # (blocks, L, H, T, D): the blocks of keys, and the blocks of values
        self._memory = [
            torch.empty((count, *kind.shape[:2], block, kind.shape[3]), dtype=kind.dtype, device=kind.device)
            for kind in kinds
        ]
        self._free = list(range(count))[::-1]
        # (adapters, all ids up to the block's end) -> index of the block in _memory
        self._places: OrderedDict[tuple[Adapters, tuple[int, ...]], int] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Size of the allocated memory in bytes."""
        return sum(kind.nbytes for kind in self._memory)

    def restore(self, prompt: Sequence[int], slot: int, adapters: Adapters = ()) -> int:
        """Copy the longest kept beginning of a prompt into an empty slot. Return the number of tokens copied.

        The last token of the prompt is never copied, because the model must read it to get the logits after
        the prompt.

        Args:
            adapters: names of the adapters with which the model reads the prompt. Keys and values depend on
                the adapters, so only blocks that were read with the same adapters are copied.
        """
        found = []
        for end in range(self.block, len(prompt), self.block):
            place = self._places.get((adapters, tuple(prompt[:end])))
            if place is None:
                break
            found.append(place)
        for number, place in enumerate(found):
            start = self._cache.reserve(slot, self.block)
            for held, kind in zip(self._cache.columns(slot, start, start + self.block), self._memory):
                held.copy_(kind[place])
            self._cache.advance(slot, self.block)
            assert start == number * self.block, "the slot was empty"
        # Mark the blocks as recently used, from the prompt's last block to its first. Later blocks are then
        # replaced sooner than earlier blocks. A block is useless without all blocks before it.
        for number in reversed(range(1, len(found) + 1)):
            self._places.move_to_end((adapters, tuple(prompt[: number * self.block])))
        return len(found) * self.block

    def keep(self, prompt: Sequence[int], slot: int, adapters: Adapters = ()) -> None:
        """Keep a copy of the keys and values of the last `self.block` tokens in a slot, as one block.

        `prompt` is the prompt whose tokens the slot holds. Nothing is copied if the slot's number of tokens
        is not a multiple of `self.block`, if the slot also holds tokens after the prompt, or if the block is
        already kept.
        """
        end = self._cache.length(slot)
        key = (adapters, tuple(prompt[:end]))
        if end % self.block or not end or end > len(prompt) or key in self._places:
            return
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        for kind, held in zip(self._memory, self._cache.columns(slot, end - self.block, end)):
            kind[place].copy_(held)
        self._places[key] = place
