"""Keeps the GPU busy: starts decoding steps before the host (CPU) has read the tokens of earlier steps.

A burst is a group of decoding steps that are launched together. A slot is a sequence's place in the cache.

bursts = BurstPipeline(GraphDecoder(model, cache, max_length))
for sequence, tokens in bursts.write({slot: sequence, ...}):     # the tokens that have arrived
    ...
"""

from collections import deque
from collections.abc import Mapping

from minigpt.generation.cuda_graph import NOTHING, DecodeBurst, GraphDecoder
from minigpt.generation.sequence import Sequence

__all__ = ["BurstPipeline"]


class BurstPipeline:
    """Holds the started bursts (groups of decoding steps) whose tokens the host (CPU) has not read yet.

    While the host turns the ids of one burst into text, the GPU computes the next burst. The GPU itself stops
    a sequence after an eos or after its largest number of tokens. Only the host detects stop strings and
    cancelled requests, up to two bursts late. It drops the tokens that the GPU has computed in the meantime.
    """

    def __init__(self, step: GraphDecoder) -> None:
        self.step = step
        self._sequences: dict[int, Sequence] = {}  # slot of the cache -> the sequence that is decoded in it
        # slot of the cache -> number of tokens that it will hold after all started bursts, if no eos occurs
        self._lengths: dict[int, int] = {}
        self._bursts: deque[tuple[DecodeBurst, dict[int, Sequence]]] = deque()

    @property
    def ahead(self) -> int:
        """Number of started bursts (groups of decoding steps) whose tokens the CPU has not read yet."""
        return len(self._bursts)

    def write(self, rows: Mapping[int, Sequence], columns: int = 0) -> list[tuple[Sequence, list[int]]]:
        """Start a burst of decoding steps for these sequences only. Return the tokens of an earlier burst.

        The result is a list of (sequence, new tokens), which may be empty. Call this method until all
        sequences have ended. The method waits for the GPU only if two bursts are pending, or if no sequence
        needs another burst.

        Args:
            rows: slot of the cache -> sequence. The slot holds all tokens of the sequence but the last token.
            columns: number of tokens in the fullest used slot, even if that slot is not in `rows`. A burst
                overwrites one column (the place of one token) in all slots. So that no token is lost, it
                takes a column after the last token of the fullest slot.
        """
        self._take_over(rows)
        ends = {slot: one.n_cached_at_first + one.limit for slot, one in rows.items()}
        open_slots = [slot for slot in rows if self._lengths[slot] < ends[slot]]
        if open_slots:
            # A burst that decodes a new sequence has only one step, so that its first token arrives early.
            is_new = any(self._lengths[slot] == one.n_cached_at_first for slot, one in rows.items())
            steps = 1 if is_new else self.step.burst
            for slot in open_slots:
                self._lengths[slot] = min(self._lengths[slot] + steps, ends[slot])
            longest = max(columns, *(self._lengths[slot] for slot in rows))
            burst = self.step.run(max(rows) + 1, longest + 1, steps)
            self._bursts.append((burst, dict(self._sequences)))
        if self._bursts and (len(self._bursts) > 1 or not open_slots):
            return self._read()
        return []

    def drain(self) -> list[tuple[Sequence, list[int]]]:
        """Return the tokens of the oldest burst (group of decoding steps) that the CPU has not read yet.

        If there is no such burst, return [], and stop decoding on the GPU. The sequences can then be decoded
        without this pipeline.
        """
        if self._bursts:
            return self._read()
        self._take_over({})
        return []

    def _take_over(self, rows: Mapping[int, Sequence]) -> None:
        for slot, sequence in list(self._sequences.items()):
            if rows.get(slot) is not sequence:
                self.step.stop(slot)
                del self._sequences[slot], self._lengths[slot]
        for slot, one in rows.items():
            if slot not in self._sequences:
                self._sequences[slot], self._lengths[slot] = one, len(one.context) - 1
                self.step.start(slot, one)
        while self._bursts and not any(
            self._sequences.get(slot) is one for slot, one in self._bursts[0][1].items()
        ):
            self._bursts.popleft()  # skip this burst: none of its sequences is decoded any more

    def _read(self) -> list[tuple[Sequence, list[int]]]:
        burst, owners = self._bursts.popleft()
        steps = burst.tokens()
        return [
            (sequence, [ids[slot] for ids in steps if ids[slot] != NOTHING])
            for slot, sequence in owners.items()
            if self._sequences.get(slot) is sequence  # the slot still belongs to this sequence
        ]
