"""How audio reaches its reader: a queue on the event loop that tells the scheduler how far it may run ahead.

The reader never blocks the engine: the scheduler only looks at `samples`, and vocodes no further.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from batcher.request import Audio, Event, RequestEnded, RequestFailed

BYTES_PER_SAMPLE = 2


class Outbox:
    """The events of one request, and its reader's credit. All but `samples` and `starved` belong to the event loop.

    At most `window` samples beyond those taken ever lie in it.
    """

    __slots__ = ("_ended", "_events", "_held", "_taken", "_waiter", "_wake", "_window", "starved")

    def __init__(self, window: int, wake: Callable[[], None], *, held: bool = False) -> None:
        """Opens it.

        `window`: samples. `wake`: tells the runner that there is credit again; called from the event loop.
        `held`: it has no credit until it is released.
        """
        self._events: deque[Event] = deque()
        self._ended = False
        self._taken = 0
        self._waiter: asyncio.Future[None] | None = None
        self._wake = wake
        self._window = window
        self._held = held
        self.starved = False

    @property
    def samples(self) -> int:
        """Samples that may have been made since the request began. Read by the scheduler, on its thread."""
        return 0 if self._held else self._taken + self._window

    def put(self, event: Event) -> None:
        """Adds an event, in order. After the end nothing counts: what was on its way then is dropped."""
        if self._ended:
            return
        self._ended = isinstance(event, RequestEnded | RequestFailed)
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, event: Event) -> None:
        """Ends the events here: what was not taken is dropped, and this comes next."""
        self._events.clear()
        self._ended = False
        self.put(event)

    def release(self) -> None:
        """It is read from now on."""
        if self._held:
            self._held = False  # before `starved` is read, as in `get`
            self._wake_starved()

    def close(self) -> None:
        """Nobody reads any more: what was not taken is dropped, and so is what comes."""
        self._events.clear()
        self._ended = True

    async def get(self) -> Event:
        """Takes the next event, waiting for it. One reader only."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event = self._events.popleft()
        if isinstance(event, Audio):
            # In this order: the scheduler sets `starved` before it reads the credit, so one of the two sees the other.
            self._taken += len(event.data) // BYTES_PER_SAMPLE
            self._wake_starved()
        return event

    def _wake_starved(self) -> None:
        if self.starved:
            self.starved = False
            self._wake()
