"""The requests that wait for a slot: first come, first served, one row at a time."""

from __future__ import annotations

from collections import deque

from batcher.request import Request, Row


class WaitingQueue:
    """Requests with a row that could join, in the order in which they are next.

    A request that has more rows goes to the back after each, so a long text cannot hold up those behind it.
    """

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()
        self._members: set[Request] = set()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, request: Request) -> None:
        """Puts a request at the back, if it has a row to start and is not waiting already."""
        if request.startable and request not in self._members:
            self._members.add(request)
            self._requests.append(request)

    def discard(self, request: Request) -> None:
        """Forgets a request."""
        if request in self._members:
            self._members.discard(request)
            self._requests.remove(request)

    def take(self, slots: int, prefill_tokens: int) -> list[Row]:
        """Takes the rows that join now.

        At most `slots`, and no more prompt tokens than `prefill_tokens`, but at least one row.
        """
        rows: list[Row] = []
        tokens = 0
        while self._requests and len(rows) < slots:
            request = self._requests[0]
            row = request.rows[request.next_row]
            tokens += row.prediction.prompt_tokens
            if rows and tokens > prefill_tokens:
                break
            self._requests.popleft()
            self._members.discard(request)
            request.next_row += 1
            rows.append(row)
            self.add(request)
        return rows
