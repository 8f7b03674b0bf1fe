"""What is scheduled: a request is an ordered list of segments, and each segment becomes a row of the batch.

The request owns the order of its rows and the place of each sample in the whole; it knows neither text positions nor
encoders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from batcher.engine import EndReason, Prediction, RowRef, Segment


class Priority(Enum):
    """Whether somebody waits for it."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


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
    batch_rows: int = 0
    """The most rows that the batch had when one of its own joined, that one included."""


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


NEVER = 1 << 62
"""More steps than any row has."""


@dataclass(eq=False, slots=True)
class Row:
    """One segment on its way through the engine."""

    request: Request
    segment: Segment
    prediction: Prediction
    ref: RowRef | None = None
    """Set while the engine knows it, or has done all there was to do."""
    attempts: int = 0
    """Times that the engine failed and this row was to blame, as far as one can tell."""
    steps_done: int = 0
    ended: EndReason | None = None
    vocode_asked: int = 0
    """Steps whose vocoding was planned; reports may be a tick behind."""
    vocode_at: int = NEVER
    """Steps that must be done for the next block of samples to be asked for."""
    vocoded: int = 0
    samples: int = 0
    """Samples delivered."""
    work_steps: int = 0
    """Steps that this row still counts in the scheduler's work."""

    @property
    def finished(self) -> bool:
        """Nothing more will come of it."""
        return self.ended is not None and self.vocoded >= self.steps_done

    def reset(self) -> None:
        """The engine has forgotten it: it begins anew. Not for rows of which samples were delivered."""
        self.ref = self.ended = None
        self.steps_done = self.vocode_asked = self.vocoded = 0
        self.vocode_at = NEVER


@dataclass(eq=False, slots=True)
class Request:
    """An ordered list of segments for one reader. It may still be open: then segments are added until it is closed."""

    segments: Sequence[Segment]
    """Those that it begins with; at least one. Let go once they are rows."""
    reader: Reader
    max_rows: int
    """Rows that may be in flight at once, from join to last sample."""
    deadline: float | None = None
    """On the runner's clock, in seconds."""
    tenant: str = ""
    priority: Priority = Priority.INTERACTIVE
    stream: bool = False
    """It is listened to while it is spoken: a gap would be heard."""
    closed: bool = True
    """No segments will be added."""
    expected_steps: int = 0
    """Of all its segments, also those still to be added, as far as that is known."""
    heard_from: float | None = None
    """It goes on from audio that its listener has until then: it is no newcomer, and as urgent as that makes it."""
    later: deque[Row] = field(default_factory=deque)
    """Rows that may not run yet."""
    current: deque[Row] = field(default_factory=deque)
    """Rows that wait or run, in order, the one whose audio is being delivered first."""
    index: int = 0
    """Segments whose audio was delivered."""
    segment_start: int = 0
    """Samples delivered of the segments before the first in `current`."""
    samples: int = 0
    """Samples delivered."""
    arrived: float = 0.0
    first_join: float | None = None
    batch_rows: int = 0
    """The most rows that the batch had when one of its own joined."""
    playback_started: float | None = None
    """When the first samples were delivered, or will be heard; later by the length of each gap since."""
    held_back: bool = False
    """Its reader had no credit for the last samples that there were."""
    cut: bool = False
    """A row ended as LENGTH."""
    over: bool = False

    @property
    def head(self) -> Row | None:
        """The row whose audio is being delivered."""
        return self.current[0] if self.current else None

    @property
    def next_row(self) -> Row | None:
        """The next row to join."""
        return next((row for row in self.current if row.ref is None), None)

    @property
    def delivered(self) -> bool:
        """All of its audio has been delivered, and no more will come."""
        return self.closed and not self.current and not self.later
