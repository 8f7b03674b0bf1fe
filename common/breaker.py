"""A circuit breaker: what fails again and again is left alone, and tried once a second until it answers."""

from __future__ import annotations

import random
from collections.abc import Callable

FAILURES = 5
"""In a row, after which it opens."""
PROBE_SECONDS = 1.0
JITTER = 0.2


class Breaker:
    """Closed: everything passes. Open: one probe a second does."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._next_probe: float | None = None

    @property
    def open(self) -> bool:
        """Only probes pass."""
        return self._next_probe is not None

    @property
    def due(self) -> bool:
        """Whether one would pass now."""
        return self._next_probe is None or self._clock() >= self._next_probe

    def allows(self) -> bool:
        """Whether one may pass now. Who asks and may must tell what came of it."""
        if self._next_probe is None:
            return True
        now = self._clock()
        if now < self._next_probe:
            return False
        self._next_probe = now + self._pause()
        return True

    def succeeded(self) -> None:
        """There was an answer."""
        self._failures = 0
        self._next_probe = None

    def failed(self, *, costly: bool = False) -> None:
        """There was none. `costly`: it was waited for, so nobody else is to wait for another."""
        self._failures += FAILURES if costly else 1
        if self._failures >= FAILURES and self._next_probe is None:
            self._next_probe = self._clock() + self._pause()

    def _pause(self) -> float:
        """Many processes do not probe at the same moment."""
        return PROBE_SECONDS * random.uniform(1.0, 1.0 + JITTER)  # noqa: S311 (no secret)
