"""Static batches, for comparison and for engines that compute whole utterances: similar rows start together."""

from __future__ import annotations

from batcher.grouping import MAX_PADDING
from batcher.policy import Policy
from batcher.request import Row
from batcher.waiting import Waiting


class StaticBatches:
    """Chooses batches. One that is not full waits for more rows, at most `static_wait` seconds."""

    def __init__(self, policy: Policy) -> None:
        self._wait = policy.static_wait
        self.complete_at: float | None = None
        """When the batch that waits for more rows will start without them."""

    def choose(self, waiting: Waiting, rows: int, now: float) -> list[tuple[float, Row]]:
        """At most so many rows with their due dates: the first one due, and those of about its length after it."""
        self.complete_at = None
        candidates = [(due, row) for due, request in waiting.in_order() if (row := request.next_row) is not None]
        if not candidates or not rows:
            return []
        batch = [(due, row) for due, row in candidates if _similar(row, candidates[0][1])][:rows]
        complete_at = min(row.request.arrived for _, row in candidates) + self._wait
        if len(batch) < rows and now < complete_at:
            self.complete_at = complete_at
            return []
        return batch


def _similar(row: Row, first: Row) -> bool:
    lengths = sorted((row.prediction.steps_p50, first.prediction.steps_p50))
    return lengths[0] >= (1 - MAX_PADDING) * lengths[1]
