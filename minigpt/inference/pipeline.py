"""A device kept ahead of its host: windows of steps are asked for before the ones before them are read.

    pipeline = Pipeline(StaticStep(model, cache, max_length))
    for row, tokens in pipeline.write({slot: row, ...}):     # what has arrived by now, often of earlier calls
        ...

While the host turns the ids of one window into text, the device computes the next. So what ends a row for a
reason that the device does not know (a stop string, somebody who cancels) is seen up to two windows late: the
tokens behind it were computed in vain, and are dropped here. An eos and the last token that a row may have
are seen on the device, and nothing is written behind them.

It owns no request and no slot: minigpt.inference.engine does.
"""

from collections import deque
from collections.abc import Mapping

from minigpt.inference.row import Row
from minigpt.inference.static_step import NOTHING, Start, StaticStep, Window

__all__ = ["Pipeline"]


class Pipeline:
    """Windows that are on their way, and the rows that they belong to."""

    def __init__(self, step: StaticStep) -> None:
        self.step = step
        self._rows: dict[int, Row] = {}  # slot -> what the device writes there
        self._lengths: dict[int, int] = {}  # slot -> tokens that it holds once all windows are done, at most
        self._windows: deque[tuple[Window, dict[int, Row]]] = deque()

    @property
    def ahead(self) -> int:
        """Windows that have been asked for and not been read."""
        return len(self._windows)

    def write(self, rows: Mapping[int, Row], columns: int = 0) -> list[tuple[int, Row, list[int]]]:
        """Ask for more tokens of these rows, and of no others; returns slot, row and tokens that have come.

        Call it again as long as a row has not ended, whatever it returns. It waits only for a window that was
        asked for one call earlier, or if there is nothing more to ask for.

        Args:
            rows: slot -> row; of each, the slot holds all tokens but the last one.
            columns: what other slots hold, at most: it is left alone.
        """
        self._take_over(rows)
        open_rows = [slot for slot, row in rows.items() if self._lengths[slot] < row.end]
        if open_rows:
            # A first token is not kept waiting for the rest of a window.
            is_new = any(self._lengths[slot] == row.first for slot, row in rows.items())
            steps = 1 if is_new else self.step.window
            for slot in open_rows:
                self._lengths[slot] = min(self._lengths[slot] + steps, rows[slot].end)
            longest = max(columns, *(self._lengths[slot] for slot in rows))
            window = self.step.run(max(rows) + 1, longest + 1, steps)
            self._windows.append((window, dict(self._rows)))
        if self._windows and (len(self._windows) > 1 or not open_rows):
            return self._read()
        return []

    def drain(self) -> list[tuple[int, Row, list[int]]]:
        """Read one more window and ask for none; when none is left, the device writes no row any more."""
        if self._windows:
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
        while self._windows and not any(self._rows.get(s) is row for s, row in self._windows[0][1].items()):
            self._windows.popleft()  # all that it is about have ended: nobody need wait for it

    def _read(self) -> list[tuple[int, Row, list[int]]]:
        window, owners = self._windows.popleft()
        steps = window.tokens()
        return [
            (slot, row, [ids[slot] for ids in steps if ids[slot] != NOTHING])
            for slot, row in owners.items()
            if self._rows.get(slot) is row  # else the slot was given to somebody else meanwhile
        ]
