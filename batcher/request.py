"""What is scheduled: a request is an ordered list of segments, and each segment becomes a row of the batch.

The request owns the order of its rows and the place of each sample in the whole; it knows neither text positions nor
encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from batcher.engine import EndReason, Prediction, RowRef, Segment


@dataclass(frozen=True, slots=True)
class Audio:
    """Samples of a request, in order."""

    data: bytes
    start_sample: int
    """The first sample's place in the request."""


@dataclass(frozen=True, slots=True)
class SegmentEnded:
    """All of a segment's audio has been delivered."""

    index: int
    start_sample: int
    end_sample: int


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """All of a request's audio has been delivered."""

    reason: EndReason
    """LENGTH where any of its segments met its cap."""
    samples: int
    queue_seconds: float
    """From arrival until the first row joined."""


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request ends here, with what was delivered so far."""

    error: Exception
    """A BatcherError, or what the one who feeds an open request gave for it."""


Event = Audio | SegmentEnded | RequestEnded | RequestFailed


class Reader(Protocol):
    """Whoever a request's events go to, and how far it lets the batcher run ahead of it."""

    starved: bool
    """Set by the scheduler when audio waits for credit: the reader's next read must wake it."""

    @property
    def samples(self) -> int:
        """Samples that may have been made for this reader since its request began."""
        ...

    def put(self, event: Event) -> None:
        """Takes the next event."""
        ...


@dataclass(eq=False, slots=True)
class Row:
    """One segment on its way through the engine."""

    request: Request
    segment: Segment
    prediction: Prediction
    ref: RowRef | None = None
    """Set when it joins."""
    steps_done: int = 0
    ended: EndReason | None = None
    vocode_asked: int = 0
    """Steps whose vocoding was planned; reports may be a tick behind."""
    vocoded: int = 0
    samples: int = 0
    """Samples delivered."""
    work_steps: int = 0
    """Steps that this row still counts in the scheduler's work."""

    @property
    def finished(self) -> bool:
        """Nothing more will come of it."""
        return self.ended is not None and self.vocoded >= self.steps_done

    def vocodable_to(self, lookahead: int) -> int:
        """The step up to which its samples are final."""
        return self.steps_done if self.ended else max(0, self.steps_done - lookahead)


@dataclass(eq=False, slots=True)
class Request:
    """An ordered list of segments for one reader. It may still be open: then segments are added until it is closed."""

    segments: Sequence[Segment]
    """Those that it begins with; at least one."""
    reader: Reader
    max_rows: int
    """Rows that may be in flight at once, from join to last sample."""
    deadline: float | None = None
    """On the runner's clock, in seconds."""
    tenant: str = ""
    closed: bool = True
    """No segments will be added."""
    expected_steps: int = 0
    """Of all its segments, also those still to be added, as far as that is known."""
    rows: list[Row] = field(default_factory=list)
    arrived: float = 0.0
    first_join: float | None = None
    head: int = 0
    """The row whose audio is being delivered."""
    next_row: int = 0
    """The next row to join."""
    released: int = 0
    """Rows before this one may join."""
    samples: int = 0
    """Samples delivered, of the rows before the head."""
    cut: bool = False
    """A row ended as LENGTH."""
    over: bool = False

    @property
    def delivered(self) -> bool:
        """All of its audio has been delivered, and no more will come."""
        return self.closed and self.head == len(self.rows)

    @property
    def startable(self) -> bool:
        """A row of it could join now."""
        return not self.over and self.next_row < self.released
