"""A card that is only modelled: its time is taken by sleeping, and shared by all processes that name it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

MAX_CARRY_SECONDS = 0.1
"""More than this is not made up for: a process that was suspended must not run free afterwards."""


class Card:
    """A device whose time is shared by all processes of this user that name it.

    Whoever computes holds a lock on a file, so the others wait. What was computed meanwhile counts; what a sleep took
    too long or too short is made up for by the next one: the rate is right on average.
    """

    def __init__(self, name: str, sleep: Callable[[float], None], clock: Callable[[], float]) -> None:
        self.lock_file = Path(tempfile.gettempdir(), f"chorus-card-{os.getuid()}-{quote(name, safe='')}.lock")
        self._sleep = sleep
        self._clock = clock
        self._descriptor: int | None = None
        self._since = 0.0
        self._carried = 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the card; waits for it while another holds it."""
        if self._descriptor is None:
            self._descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._since = self._clock()
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def spend(self, seconds: float) -> None:
        """Sleeps until the card, which must be held, has been held for so long."""
        end = self._since + seconds + self._carried
        if (rest := end - self._clock()) > 0:
            self._sleep(rest)
        self._carried = min(max(end - self._clock(), -MAX_CARRY_SECONDS), MAX_CARRY_SECONDS)

    def close(self) -> None:
        """Closes the file. It stays: others may hold it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
