"""What a batcher tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class Counters:
    """What has happened since the start. Only ever grows, but for `cancel_ticks_max`, which is a maximum."""

    ticks: int = 0
    steps: int = 0
    row_steps: int = 0
    joins: int = 0
    prefill_tokens: int = 0
    """Of prompts."""
    prefill_padding: int = 0
    """Tokens that prompts were padded with, to the longest of their group."""
    samples: int = 0
    """Samples made for readers."""
    submitted: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    expired_waiting: int = 0
    expired_running: int = 0
    engine_failures: int = 0
    out_of_memory: int = 0
    put_back: int = 0
    """Rows that began anew after the engine failed or lacked memory."""
    underruns: int = 0
    """Gaps that a stream's listener heard, by our fault."""
    stale_reports: int = 0
    """Reports of rows that had left: dropped."""
    dropped_steps: int = 0
    """Steps done for rows whose request ended before they did."""
    cancel_ticks_max: int = 0
    """Ticks that began between a cancel and the plan that freed its slots."""
    dispatched: dict[str, int] = field(
        default_factory=lambda: {"underrun": 0, "first_audio": 0, "overdue": 0, "turn": 0, "batch": 0}
    )
    """Joins, by why the row came next."""
    refused: dict[str, int] = field(default_factory=lambda: {"full": 0, "late": 0, "displaced": 0, "first_audio": 0})


class Observer(Protocol):
    """Hears of durations, in seconds, on the engine's thread."""

    def tick(self, seconds: float, rows: int) -> None:
        """The engine ran a plan with so many rows in slots."""
        ...

    def first_audio(self, seconds: float) -> None:
        """A stream's first samples are there, so long after it came."""
        ...

    def underrun(self, seconds: float) -> None:
        """A stream's listener heard a gap."""
        ...


class Deaf:
    """An observer who does nothing with what it hears."""

    def tick(self, seconds: float, rows: int) -> None:
        """Nothing."""

    def first_audio(self, seconds: float) -> None:
        """Nothing."""

    def underrun(self, seconds: float) -> None:
        """Nothing."""
