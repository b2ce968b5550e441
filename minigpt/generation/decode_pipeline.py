"""A device kept ahead of its host: bursts of steps are asked for before the ones before them are read.

    pipeline = Pipeline(StaticStep(model, cache, max_length))
    for row, tokens in pipeline.write({slot: row, ...}):     # what has arrived by now, often of earlier calls
        ...

While the host turns the ids of one burst into text, the device computes the next. So what ends a row for a
reason that the device does not know (a stop string, somebody who cancels) is seen up to two bursts late: the
tokens behind it were computed in vain, and are dropped here. An eos and the last token that a row may have
are seen on the device, and nothing is written behind them.

It owns no request and no slot: minigpt.generation.engine does.
"""

from collections import deque
from collections.abc import Mapping

from minigpt.generation.cuda_graph import NOTHING, Burst, Start, StaticStep
from minigpt.generation.sequence import Row

__all__ = ["Pipeline"]


class Pipeline:
    """Windows that are on their way, and the rows that they belong to."""

    def __init__(self, step: StaticStep) -> None:
        self.step = step
        self._rows: dict[int, Row] = {}  # slot -> what the device writes there
        self._lengths: dict[int, int] = {}  # slot -> tokens that it holds once all bursts are done, at most
        self._bursts: deque[tuple[Burst, dict[int, Row]]] = deque()

    @property
    def ahead(self) -> int:
        """Windows that have been asked for and not been read."""
        return len(self._bursts)

    def write(self, rows: Mapping[int, Row], columns: int = 0) -> list[tuple[int, Row, list[int]]]:
        """Ask for more tokens of these rows, and of no others; returns slot, row and tokens that have come.

        Call it again as long as a row has not ended, whatever it returns. It waits only for a burst that was
        asked for one call earlier, or if there is nothing more to ask for.

        Args:
            rows: slot -> row; of each, the slot holds all tokens but the last one.
            columns: what other slots hold, at most: it is left alone.
        """
        self._take_over(rows)
        open_rows = [slot for slot, row in rows.items() if self._lengths[slot] < row.end]
        if open_rows:
            # A first token is not kept waiting for the rest of a burst.
            is_new = any(self._lengths[slot] == row.first for slot, row in rows.items())
            steps = 1 if is_new else self.step.burst
            for slot in open_rows:
                self._lengths[slot] = min(self._lengths[slot] + steps, rows[slot].end)
            longest = max(columns, *(self._lengths[slot] for slot in rows))
            burst = self.step.run(max(rows) + 1, longest + 1, steps)
            self._bursts.append((burst, dict(self._rows)))
        if self._bursts and (len(self._bursts) > 1 or not open_rows):
            return self._read()
        return []

    def drain(self) -> list[tuple[int, Row, list[int]]]:
        """Read one more burst and ask for none; when none is left, the device writes no row any more."""
        if self._bursts:
            return self._read()
        self._take_over({})
        return []

    def _take_over(self, rows: Mapping[int, Row]) -> None:
        for slot, row in list(self._rows.items()):
            if rows.get(slot) is not row:
                self.step.stop(slot)
                del self._rows[slot], self._lengths[slot]
        for slot, row in rows.items():
            if slot not in self._rows:
                self._rows[slot], self._lengths[slot] = row, row.length - 1
                start = Start(row.last, row.length - 1, row.first, row.end, row.eos, row.tokens)
                self.step.start(slot, start, row.options, row.uniform)
        while self._bursts and not any(self._rows.get(s) is row for s, row in self._bursts[0][1].items()):
            self._bursts.popleft()  # all that it is about have ended: nobody need wait for it

    def _read(self) -> list[tuple[int, Row, list[int]]]:
        burst, owners = self._bursts.popleft()
        steps = burst.tokens()
        return [
            (slot, row, [ids[slot] for ids in steps if ids[slot] != NOTHING])
            for slot, row in owners.items()
            if self._rows.get(slot) is row  # else the slot was given to somebody else meanwhile
        ]
