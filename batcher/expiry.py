"""When requests are given up: a heap of moments, looked at by a timer, never by the engine's pace."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from batcher.request import Request

SLACK = 64
"""Requests that are over and whose moments are not worth a clean-up."""


class Expiry:
    """Moments, in seconds on the runner's clock, at which requests want to be looked at."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()
        self._over = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request, moment: float) -> None:
        """A request wants to be looked at then. It has one moment at a time."""
        heapq.heappush(self._heap, (moment, next(self._numbers), request))

    def due(self, now: float) -> Iterator[Request]:
        """The requests whose moment has come, those that are over left out."""
        while self._heap and self._heap[0][0] <= now:
            _, _, request = heapq.heappop(self._heap)
            if not request.over:
                yield request

    def is_over(self) -> None:
        """A request is over. Its moment may lie far ahead, and until then it would be kept: so most of them are not."""
        self._over += 1
        if self._over > len(self._heap) // 2 + SLACK:
            self._heap = [entry for entry in self._heap if not entry[2].over]
            heapq.heapify(self._heap)
            self._over = 0

    @property
    def next(self) -> float | None:
        """The next moment at which there is something to look at."""
        while self._heap and self._heap[0][2].over:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
