"""What a scheduler is allowed, and how it weighs one caller against another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Mode(Enum):
    """How rows share forward passes."""

    CONTINUOUS = "continuous"
    """Rows join and leave at every tick."""
    STATIC = "static"
    """Rows of similar length join together, and nobody joins until all of them have ended."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the scheduler is allowed. Times are in seconds."""

    mode: Mode = Mode.CONTINUOUS
    static_wait: float = 0.05
    """In static mode: how long an incomplete batch waits for more rows."""

    # -- what may lie before the engine
    max_waiting: int = 1000
    """Requests that wait for a slot."""
    max_delay: float = 2.0
    """Work, in seconds of the engine's time."""
    max_parked: int = 1024
    """Rows that have ended and whose readers are slow: beyond it nobody is admitted."""
    first_audio_limit: float = math.inf
    """A stream that would wait longer for its first audio is refused, also one that waits already."""

    # -- what a tick may hold
    tick_seconds: float = 0.008
    """What the steps of one tick should take."""
    max_steps_per_tick: int = 32
    prefill_tokens: int = 4096
    """Prompt tokens that may join in one tick."""
    prefill_seconds: float = 0.1
    """How long their prefill may take while others run: for so long nobody's audio goes on."""
    first_block_steps: int = 8
    """A row's first samples are made when so many steps are final; each later block is twice as long …"""
    block_steps: int = 24
    """… up to this."""
    interactive_share: float = 0.25
    """The share of the rows that batch work leaves free for interactive work, since nothing is preempted."""

    # -- who comes first: see `batcher/due.py`
    reserve: float = 1.0
    """A stream's next row is due so long before its listener would hear a gap."""
    first_audio_patience: float = 0.1
    """A new stream is due so long after it came."""
    patience: float = 2.0
    """What is not a stream is due so long after it came, or earlier for its deadline."""
    batch_patience: float = 30.0
    """Batch work is due so much later."""

    # -- when the engine fails
    max_attempts: int = 3
    """How often a row is tried."""
    recovery_seconds: float = 5.0
    """After a lack of memory: how long until each step back towards full width."""
