"""Who holds which slot of the engine."""

from __future__ import annotations

import itertools

from batcher.engine import RowRef


class Slots:
    """Slots with a count of their occupants, so that nothing said of a past one is taken for the present one's."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._generations = [0] * count
        self._seated: dict[int, RowRef] = {}
        self._rows = itertools.count()

    @property
    def free(self) -> int:
        """Slots that a row could take now."""
        return len(self._free)

    def seat(self) -> RowRef:
        """Gives a slot to a new row, and a name that was never used before."""
        slot = self._free.pop()
        self._generations[slot] += 1
        ref = self._seated[slot] = RowRef(next(self._rows), slot, self._generations[slot])
        return ref

    def release(self, ref: RowRef) -> None:
        """Takes a slot back, unless its occupant gave it back before."""
        if self._seated.get(ref.slot) == ref:
            del self._seated[ref.slot]
            self._free.append(ref.slot)
