"""How a row is cut into blocks of samples.

The grid depends on the step alone, never on load or readers: so the same row is always vocoded in the same blocks.
"""

from __future__ import annotations

from bisect import bisect_right


class Blocks:
    """Blocks end at `first`, twice and four times as far, and so on until `regular`; from there at regular distances.

    A short first block lets sound start early; long later ones cost less.
    """

    def __init__(self, first: int, regular: int) -> None:
        """Lengths in steps; `first` is at most `regular`."""
        self._ramp = [0, first]
        while self._ramp[-1] < regular:
            self._ramp.append(2 * self._ramp[-1])
        self._regular = regular

    def last(self, steps: int) -> int:
        """The last block end that is at most `steps`; 0 before the first."""
        over = steps - self._ramp[-1]
        if over >= 0:
            return steps - over % self._regular
        return self._ramp[max(0, bisect_right(self._ramp, steps) - 1)]

    def after(self, steps: int) -> int:
        """The first block end after `steps`."""
        if steps >= self._ramp[-1]:
            return self.last(steps) + self._regular
        return self._ramp[bisect_right(self._ramp, steps)]
