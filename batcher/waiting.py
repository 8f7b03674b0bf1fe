"""The requests that wait for a slot, earliest due first."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence

from batcher.request import Priority, Request

Entry = tuple[float, int, Request]

SLACK = 64
"""Entries of requests that left which are not worth a clean-up."""


class Waiting:
    """Requests with a row that could join. A request is here once, however many rows it has."""

    def __init__(self) -> None:
        self._heaps: dict[Priority, list[Entry]] = {priority: [] for priority in Priority}
        self._entries: dict[Request, Entry] = {}
        self._numbers = itertools.count()
        self._fresh: dict[str, dict[Request, None]] = {}
        """By tenant: the requests of which no row has joined yet, oldest first."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: Request) -> bool:
        return request in self._entries

    def add(self, request: Request, due: float) -> None:
        """Puts a request in its place. `due`: when its next row should start, in seconds."""
        entry = self._entries[request] = (due, next(self._numbers), request)
        heapq.heappush(self._heaps[request.priority], entry)
        if request.first_join is None:
            self._fresh.setdefault(request.tenant, {})[request] = None

    def discard(self, request: Request) -> None:
        """Forgets a request."""
        if self._entries.pop(request, None) is None:
            return
        fresh = self._fresh.get(request.tenant, {})
        fresh.pop(request, None)
        if not fresh:
            self._fresh.pop(request.tenant, None)
        self._clean(request.priority)

    def first(self, priorities: Sequence[Priority]) -> tuple[float, Request] | None:
        """The request of these classes that is due first, and when that is."""
        tops = [top for priority in priorities if (top := self._top(priority)) is not None]
        return min(tops)[::2] if tops else None

    def in_order(self) -> list[tuple[float, Request]]:
        """All of them, as they are due."""
        return [(due, request) for due, _, request in sorted(self._entries.values())]

    def newest_fresh(self, tenant: str) -> Iterator[Request]:
        """The tenant's requests of which no row has joined yet, the last one first."""
        return reversed(self._fresh.get(tenant, {}))

    def _top(self, priority: Priority) -> Entry | None:
        heap = self._heaps[priority]
        while heap and self._entries.get(heap[0][2]) is not heap[0]:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _clean(self, priority: Priority) -> None:
        """Drops the entries of those who left, once they are most of the heap: what it holds stays bounded."""
        heap = self._heaps[priority]
        if len(heap) > 2 * len(self._entries) + SLACK:
            heap[:] = [entry for entry in heap if self._entries.get(entry[2]) is entry]
            heapq.heapify(heap)
