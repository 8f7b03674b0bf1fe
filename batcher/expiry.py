"""When requests are given up: a heap of moments, looked at by a timer, never by the engine's pace."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from batcher.request import Request


class Expiry:
    """Moments, in seconds on the runner's clock, at which requests want to be looked at."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()

    def add(self, request: Request, moment: float) -> None:
        """A request wants to be looked at then. It may have several moments."""
        heapq.heappush(self._heap, (moment, next(self._numbers), request))

    def due(self, now: float) -> Iterator[Request]:
        """The requests whose moment has come, those that are over left out."""
        while self._heap and self._heap[0][0] <= now:
            _, _, request = heapq.heappop(self._heap)
            if not request.over:
                yield request

    @property
    def next(self) -> float | None:
        """The next moment at which there is something to look at."""
        while self._heap and self._heap[0][2].over:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
