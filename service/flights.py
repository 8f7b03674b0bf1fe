"""Single flight: a speech that is being made is heard, from its first sample, by everybody who asks for the same.

Equal speeches have equal keys, which gateways send; the row outlives its last caller for a while, so that the death of
a gateway loses nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from common import metrics
from common.errors import Aborted, ChorusError, Unavailable
from common.keys import flight_names
from common.settings import FlightSettings
from common.speech import SpeechMessage
from common.tape import Abandoned, Tape, is_anothers
from protos.chorus.v1 import tts_pb2
from service.directory import Directory

Messages = AsyncGenerator[SpeechMessage, None]


@dataclass
class Deadline:
    """When a speech must have ended, which may become later while it is spoken. On the monotonic clock, in seconds."""

    admission: float
    """What the one who asked first allows: if it cannot be met, the speech is not begun."""
    at: float
    told: Callable[[float], None] = lambda at: None
    """Called when it becomes later."""

    def extend(self, at: float) -> None:
        """Somebody waits longer."""
        if at > self.at:
            self.at = at
            self.told(at)


@dataclass
class Flight:
    """A speech that is being made, or was a moment ago."""

    deadline: Deadline
    tape: Tape[SpeechMessage] = field(init=False)


class Flights:
    """All flights of a service."""

    def __init__(self, settings: FlightSettings, directory: Directory) -> None:
        self._settings = settings
        self._directory = directory
        self._flights: dict[str, Flight] = {}
        metrics.FLIGHTS_OPEN.set_function(lambda: len(self._flights))
        metrics.FLIGHT_BYTES.set_function(lambda: self.bytes)

    @property
    def bytes(self) -> int:
        """Of all recordings."""
        # Metrics are read on another thread, while flights come and go.
        return sum(flight.tape.bytes for flight in tuple(self._flights.values()))

    def room(self, key: str, priority: str) -> bool:
        """Whether a speech can be joined, or begun so that others can join it."""
        return self._joinable(flight_names(key, priority)) is not None or self.bytes < self._settings.bytes

    async def follow(
        self,
        key: str,
        deadline: Deadline,
        start: Callable[[Deadline], Messages],
        *,
        priority: str,
        here: bool,
    ) -> AsyncGenerator[tuple[SpeechMessage, bool], None]:
        """A speech's messages, each a copy, and whether somebody else had asked for it before.

        Args:
            key: the same for the same speech.
            deadline: until when this caller waits.
            start: speaks it; called if nobody does yet.
            priority: of this caller; see `flight_names`.
            here: even if another backend speaks it.

        Raises:
            Aborted: another backend speaks it.
            ChorusError: what became of it instead; the same for all who hear it.
        """
        names = flight_names(key, priority)
        while True:
            flight = self._joinable(names)
            joined = flight is not None
            if flight is None:
                flight = self._start(names[-1], deadline, start, here=here)
            else:
                metrics.COALESCED.inc()
                flight.deadline.extend(deadline.at)
            heard = False
            try:
                async with aclosing(flight.tape.follow()) as messages:
                    async for message in messages:
                        heard = True
                        yield _copy(message), joined
                return
            except Aborted:
                if joined and here and not heard:
                    continue  # that one was not to be spoken here at any price: this one is
                raise
            except (Abandoned, ChorusError) as error:
                if joined and not heard and is_anothers(error):
                    continue  # it was about to end when this caller came
                if isinstance(error, ChorusError):
                    raise
                raise Unavailable("this server is stopping; try again", "STOPPING", retry_after=1.0) from None

    def _joinable(self, names: tuple[str, ...]) -> Flight | None:
        for name in names:
            flight = self._flights.get(name)
            if flight is not None and flight.tape.joinable:
                return flight
        return None

    def _start(self, key: str, deadline: Deadline, start: Callable[[Deadline], Messages], *, here: bool) -> Flight:
        flight = Flight(deadline)

        def done(tape: Tape[SpeechMessage]) -> None:
            metrics.FLIGHT_FOLLOWERS.observe(tape.most_followers)
            if tape.complete:
                asyncio.get_running_loop().call_later(self._settings.kept_seconds, self._forget, key, flight)
            else:
                self._forget(key, flight)

        flight.tape = Tape(
            self._directory.listed(key, start(deadline), here=here),
            size=_size,
            linger=self._settings.linger_seconds,
            done=done,
        )
        self._flights[key] = flight
        return flight

    def _forget(self, key: str, flight: Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


def _copy(message: SpeechMessage) -> SpeechMessage:
    """Each caller's encoder writes into what it gets."""
    copy: Any = type(message)()
    copy.CopyFrom(message)
    return cast("SpeechMessage", copy)


def _size(message: SpeechMessage) -> int:
    return len(message.data) if isinstance(message, tts_pb2.AudioChunk) else 0
