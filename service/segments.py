"""Single flight for texts that are spoken while they are written: each segment is made once for all who say the same.

Nobody knows such a text when it begins, so it has no key; each of its segments has one, once it is written. What is
made is a flight of one row. It is heard while it is made, and when it has ended it is kept for those who say it again:
here, and in the cache's store for those who say it elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from audio.frames import SAMPLE_BYTES
from batcher.engine import EndReason, Segment
from batcher.errors import BatcherError, QueueFullError
from batcher.request import Audio, Event, Priority, RequestEnded, RequestFailed, SegmentEnded
from batcher.runner import Runner, Speaking
from common import metrics
from common.calls import Call
from common.generations import GENERATION_SECONDS
from common.keys import flight_names, segment_key
from common.lru import Lru
from common.settings import Settings
from common.shelf import MEMORY, Shelf, Tags
from common.store import Store
from common.tape import Tape
from service.speaking import told

CHUNK_SECONDS = 0.5
"""Of audio that comes from the store."""
OVERHEAD_BYTES = 2048
"""What a kept segment takes beside its audio."""


class Origin(Enum):
    """Where a segment's audio comes from."""

    MADE = "made"
    """It is made for the one who asks."""
    JOINED = "joined"
    """It is being made for another."""
    KEPT = "kept"
    """It was made before."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The batcher takes the segment, or the store had it: the first thing that is heard of one."""


FlightEvent: TypeAlias = Admitted | Event


@dataclass(frozen=True, slots=True)
class Listener:
    """Somebody for whom segments are spoken."""

    call: Call
    scope: str
    """Who may share them with it."""
    deadline: float
    """Until when it waits, on the runner's clock."""


@dataclass(eq=False, slots=True)
class Flight:
    """A segment that is being made, or was."""

    heard_from: float | None
    """When the first who needs it does, on the runner's clock; None: none of them was let in before."""
    deadline: float
    """Of the one who waits longest."""
    released: bool = False
    """All that comes before it is there, for one at least: its samples are wanted."""
    speaking: Speaking | None = None
    """While it is in the batcher."""
    found: bool = False
    """It was in the store."""
    needed: asyncio.Event = field(default_factory=asyncio.Event)
    """By somebody who was let in."""
    tape: Tape[FlightEvent] = field(init=False)

    @property
    def samples(self) -> int:
        """Those that are there."""
        return self.tape.bytes // SAMPLE_BYTES

    def begin(self, speaking: Speaking) -> None:
        """It is in the batcher, and its turn may have come on its way there."""
        self.speaking = speaking
        if self.released:
            speaking.release()

    def release(self) -> None:
        """Its samples are wanted now."""
        if not self.released:
            self.released = True
            if self.speaking is not None:
                self.speaking.release()

    def need(self, heard_from: float) -> None:
        """Somebody who was let in needs it then."""
        if self.heard_from is None or heard_from < self.heard_from:
            self.heard_from = heard_from
            self.needed.set()
            if self.speaking is not None:
                self.speaking.need(heard_from)

    async def wait(self, seconds: float) -> None:
        """Waits for room so long, or until somebody needs it who was let in."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.needed.wait()

    def extend(self, deadline: float) -> None:
        """Somebody waits so long."""
        if deadline > self.deadline:
            self.deadline = deadline
            if self.speaking is not None:
                self.speaking.allow(deadline)


class Segments:
    """All segments of a service that are shared."""

    def __init__(self, settings: Settings, runner: Runner, revision: str, store: Store) -> None:
        """`revision`: of what the runner's engine speaks. `store`: the cache's."""
        self.runner = runner
        self.batching = settings.batcher
        self._most_bytes = settings.flights.bytes
        self._revision = revision
        self._flights: dict[str, Flight] = {}
        cache = settings.cache
        self._kept: Lru[str, Flight] = Lru(cache.segment_bytes if cache.enabled else 0, cache.seconds, runner.now)
        self._shelf = Shelf("segment", store, cache, None, follow=(MEMORY,))
        metrics.SEGMENTS_OPEN.set_function(lambda: len(self._flights))
        metrics.SEGMENT_BYTES.set_function(lambda: self.bytes)
        metrics.SEGMENT_KEPT_BYTES.set_function(lambda: self._kept.bytes)

    @property
    def bytes(self) -> int:
        """Of all that are being made."""
        # Metrics are read on another thread, while flights come and go.
        return sum(flight.tape.bytes for flight in tuple(self._flights.values()))

    @property
    def room(self) -> bool:
        """Whether one more text may share its segments."""
        return self.bytes < self._most_bytes

    def find(self, segment: Segment, listener: Listener, heard_from: float | None) -> tuple[Flight, Origin]:
        """The flight of a segment, which is to be followed at once, and what it is for the one who asks.

        `heard_from`: when that one will need it, on the runner's clock; None: it was not let in yet.
        """
        key = segment_key(segment, self._revision, listener.scope)
        names = flight_names(key, listener.call.priority)
        for name in names:
            flight = self._flights.get(name)
            if flight is not None and flight.tape.joinable:
                flight.extend(listener.deadline)
                if heard_from is not None:
                    flight.need(heard_from)
                return flight, Origin.JOINED
        if (kept := self._kept.get(key)) is not None:
            return kept, Origin.KEPT
        flight = Flight(heard_from, listener.deadline)
        self._start(key, names[-1], flight, segment, listener.call)
        return flight, Origin.MADE

    async def follow_purges(self) -> None:
        """Forgets when the cache is purged, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(GENERATION_SECONDS)

    async def refresh(self) -> None:
        """Looks whether the cache was purged."""
        if await self._shelf.refresh():  # also the first time: it may have come late
            self._kept.clear()
            self._flights.clear()  # those who hear them hear on, and nobody else joins them

    async def settle(self) -> None:
        """Waits until the store has heard of all that was kept."""
        await self._shelf.settle()

    def _start(self, key: str, name: str, flight: Flight, segment: Segment, call: Call) -> None:
        tags = Tags(segment.voice, self._revision)
        asked = self._shelf.generations

        def done(tape: Tape[FlightEvent]) -> None:
            if self._flights.get(name) is flight:
                del self._flights[name]
            # What was begun before a purge is not kept.
            if tape.complete and _is_whole(tape) and asked is self._shelf.generations:
                self._kept.put(key, flight, tape.bytes + OVERHEAD_BYTES)
                if not flight.found:
                    audio = [event.data for event in tape.messages if isinstance(event, Audio)]
                    self._shelf.put(bytes.fromhex(key), tags, audio, asked)

        flight.tape = Tape(self._found_or_made(key, tags, segment, call, flight), size=_size, done=done)
        self._flights[name] = flight

    async def _found_or_made(
        self, key: str, tags: Tags, segment: Segment, call: Call, flight: Flight
    ) -> AsyncGenerator[FlightEvent, None]:
        """A segment's events, from the store if it is there.

        Raises:
            ChorusError: what became of it instead.
        """
        kept = await self._shelf.get(bytes.fromhex(key), tags, lambda audio: audio)
        if kept is not None:
            flight.found = True
            for event in _replayed(kept, self.runner.engine.caps.sample_rate_hertz):
                yield event
            return
        async with aclosing(self._made(segment, call, flight)) as events:
            async for event in events:
                yield event

    async def _made(self, segment: Segment, call: Call, flight: Flight) -> AsyncGenerator[FlightEvent, None]:
        """A segment's events while it is made.

        Raises:
            ChorusError: what became of it instead.
        """
        # Who has heard something already is not sent away at once.
        patience = self.batching.first_audio_limit if segment.index else 0.0
        give_up = self.runner.now() + patience
        while True:
            try:
                async with aclosing(self._spoken(segment, call, flight)) as events:
                    async for event in events:
                        yield event
                return
            except QueueFullError as refusal:
                left = give_up - self.runner.now()
                if left <= 0:
                    raise told(refusal) from refusal
                await flight.wait(min(left, refusal.retry_after))
            except BatcherError as error:
                raise told(error) from error

    async def _spoken(self, segment: Segment, call: Call, flight: Flight) -> AsyncGenerator[FlightEvent, None]:
        """The same once, with the batcher's own errors."""
        async with self.runner.speak(
            [segment],
            max_rows=1,
            deadline=flight.deadline,
            tenant=call.tenant,
            priority=Priority(call.priority),
            stream=True,
            heard_from=flight.heard_from,
        ) as speaking:
            flight.begin(speaking)
            try:
                yield Admitted()
                while True:
                    event = await speaking.get()
                    if isinstance(event, RequestFailed):
                        raise event.error
                    yield event
                    if isinstance(event, RequestEnded):
                        return
            finally:
                flight.speaking = None


def _replayed(kept: memoryview, rate: int) -> Iterator[FlightEvent]:
    """What was kept, as it was heard when it was made."""
    samples, step = len(kept) // SAMPLE_BYTES, int(CHUNK_SECONDS * rate)
    yield Admitted()
    for sample in range(0, samples, step):
        yield Audio(bytes(kept[sample * SAMPLE_BYTES : (sample + step) * SAMPLE_BYTES]), sample)
    yield SegmentEnded(0, 0, samples)
    yield RequestEnded(EndReason.COMPLETE, samples, 0.0)


def _is_whole(tape: Tape[FlightEvent]) -> bool:
    """Whether it came to its end by itself: what met a cap is shared, and not kept."""
    end = tape.messages[-1]
    return isinstance(end, RequestEnded) and end.reason is EndReason.COMPLETE


def _size(event: FlightEvent) -> int:
    return len(event.data) if isinstance(event, Audio) else 0
