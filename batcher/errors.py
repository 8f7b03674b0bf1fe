"""Why the batcher did not speak. Callers of the batcher turn these into their own errors."""

from __future__ import annotations


class BatcherError(Exception):
    """A request that ends without its audio."""


class QueueFullError(BatcherError):
    """Too much work lies before the engine."""

    def __init__(self, retry_after: float) -> None:
        """`retry_after`: seconds until there should be room."""
        super().__init__(f"room in {retry_after:.3f} s")
        self.retry_after = retry_after


class FirstAudioUnreachableError(QueueFullError):
    """A stream would have to wait too long for its first audio."""


class DeadlineUnreachableError(BatcherError):
    """The deadline would pass before the work is done, so it is not begun."""


class DeadlinePassedError(BatcherError):
    """The deadline passed while the request waited or ran."""


class RowFailedError(BatcherError):
    """The engine could not speak one of the segments."""


class EngineFailedError(BatcherError):
    """The engine failed as a whole while the request ran. A new try may work."""


class StoppedError(BatcherError):
    """The batcher is stopping or has stopped."""
