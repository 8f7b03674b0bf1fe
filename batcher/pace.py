"""How much slower the engine is than it says: steps are foretold, and ticks hold prefills and vocoding besides."""

from __future__ import annotations

MEMORY_SECONDS = 2.0
"""Of a full engine's time: what lies further back counts less than half."""
LEAST, MOST = 0.25, 10.0


class Pace:
    """Compares the time that passes with the time that the steps done should have taken.

    Ticks with many rows count more: admission asks what a full engine makes.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        """Seconds that pass for each foretold."""
        self._began: float | None = None
        self._took = self._foretold = MEMORY_SECONDS / 4

    def tick(self, now: float, share: float, foretold: float) -> None:
        """A tick begins. Of the one before: `share` of the rows that ran, and seconds foretold for what they did."""
        if self._began is not None and share > 0:
            self._took += share * (now - self._began)
            self._foretold += share * foretold
            if self._took > MEMORY_SECONDS:
                self._took /= 2
                self._foretold /= 2
            self.factor = max(LEAST, min(MOST, self._took / self._foretold))
        self._began = now
