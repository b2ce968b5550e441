"""A device kept ahead of its host: bursts of decoding steps are asked for before earlier ones are read.

bursts = BurstPipeline(GraphDecoder(model, cache, max_length))
for sequence, tokens in bursts.write({slot: sequence, ...}):     # what has arrived by now
    ...
"""

from collections import deque
from collections.abc import Mapping

from minigpt.generation.cuda_graph import NOTHING, DecodeBurst, GraphDecoder
from minigpt.generation.sequence import Sequence

__all__ = ["BurstPipeline"]


class BurstPipeline:
    """Bursts that are on their way, and the sequences that they belong to.

    While the host turns the ids of one burst into text, the device computes the next. So an end that the
    device does not know (a stop string, a cancelled request) is seen up to two bursts late: the tokens behind
    it were computed in vain, and are dropped. The device sees an eos and the last token of a sequence itself,
    and writes nothing behind them.
    """

    def __init__(self, step: GraphDecoder) -> None:
        self.step = step
        self._sequences: dict[int, Sequence] = {}  # slot -> what the device writes there
        self._lengths: dict[int, int] = {}  # slot -> tokens that it holds once all bursts are done, at most
        self._bursts: deque[tuple[DecodeBurst, dict[int, Sequence]]] = deque()

    @property
    def ahead(self) -> int:
        """Bursts that have been asked for and not been read."""
        return len(self._bursts)

    def write(self, rows: Mapping[int, Sequence], columns: int = 0) -> list[tuple[Sequence, list[int]]]:
        """Ask for more tokens of these sequences, and of no others; returns those that have arrived.

        Call it again as long as a sequence has not ended, whatever it returns. It waits only for a burst that
        was asked for one call earlier, or if there is nothing more to ask for.

        Args:
            rows: slot -> sequence, whose slot holds all tokens but the last one.
            columns: what other slots hold, at most: it is left alone.
        """
        self._take_over(rows)
        ends = {slot: one.n_cached_at_first + one.limit for slot, one in rows.items()}
        open_slots = [slot for slot in rows if self._lengths[slot] < ends[slot]]
        if open_slots:
            # A first token does not wait for the rest of a burst.
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
        """Read one more burst and ask for none; when none is left, the device writes no sequence any more."""
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
            self._bursts.popleft()  # all its sequences have ended: it need not be read

    def _read(self) -> list[tuple[Sequence, list[int]]]:
        burst, owners = self._bursts.popleft()
        steps = burst.tokens()
        return [
            (sequence, [ids[slot] for ids in steps if ids[slot] != NOTHING])
            for slot, sequence in owners.items()
            if self._sequences.get(slot) is sequence  # else the slot has another sequence by now
        ]
