"""A text that is spoken while it is written, put together from segments that are found, joined or made.

To its listener it is one speech: its parts come in order and without gaps, at samples counted through. So the current
part and the next are in flight at once, as in a request of the batcher's, and each tells the batcher when its audio
will be needed: a part that goes on from audio which is heard is no newcomer, and no more urgent than that makes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

from audio.frames import SAMPLE_BYTES
from batcher.engine import EndReason, Segment
from batcher.request import Audio, Event, Priority, RequestEnded, RequestFailed, SegmentEnded
from common import metrics
from common.errors import ChorusError, Unavailable
from common.tape import Abandoned, Follower, is_anothers
from service.segments import Admitted, Flight, FlightEvent, Listener, Origin, Segments


@dataclass(slots=True)
class Account:
    """Where a dialogue's audio came from, as far as it has come."""

    first: Origin | None = None
    """Of the first audio."""
    shared: int = 0
    """Segments that were not made for it."""
    made_seconds: float = 0.0
    """Audio that was made for it. Complete when it has ended."""


@asynccontextmanager
async def in_parts(
    segments: Segments, listener: Listener, account: Account, rows: Sequence[Segment], closed: bool
) -> AsyncIterator[Dialogue]:
    """Begins to speak rows, each of them shared with all who say the same in the same scope."""
    dialogue = Dialogue(segments, listener, account)
    try:
        dialogue.extend(rows)
        if closed:
            dialogue.close()
        yield dialogue
    finally:
        dialogue.leave()


@dataclass(eq=False, slots=True)
class _Part:
    """A segment on its way to this listener."""

    row: Segment
    flight: Flight
    begun_as: Origin
    seconds: float
    """What it is expected to come to."""
    rate: int
    follower: Follower[FlightEvent] = field(init=False)
    heard: bool = False
    """Something of it was taken."""
    taken: int = 0
    """Samples."""
    settled: bool = False
    """It is known where it comes from."""

    def __post_init__(self) -> None:
        self.follower = Follower(self.flight.tape)

    @property
    def origin(self) -> Origin:
        """Where its audio comes from. That the store has it turns out when it was begun."""
        return Origin.KEPT if self.flight.found and self.begun_as is Origin.MADE else self.begun_as

    @property
    def admitted(self) -> bool:
        """The batcher takes it, or has taken it, or the store has it."""
        return bool(self.flight.tape.messages)

    @property
    def over(self) -> bool:
        """No more will come of it than there is."""
        return self.flight.tape.over

    @property
    def ready(self) -> float:
        """Seconds that are there and were not taken."""
        return (self.flight.samples - self.taken) / self.rate

    @property
    def left(self) -> float:
        """Seconds that were not taken, as far as one can tell."""
        return self.ready if self.over else max(self.ready, self.seconds - self.taken / self.rate)

    @property
    def owed(self) -> float:
        """Seconds that were made for this listener, if it leaves now.

        What others go on hearing, or can find again, is paid by whom it was begun for.
        """
        if self.origin is not Origin.MADE:
            return 0.0
        tape = self.flight.tape
        if tape.complete:
            return self.flight.samples / self.rate
        if tape.followers > 1 and not tape.over:
            return max(self.seconds, self.flight.samples / self.rate)
        return self.taken / self.rate


class Dialogue:
    """The parts of one text, for the one who hears it."""

    def __init__(self, segments: Segments, listener: Listener, account: Account) -> None:
        """`account`: is kept up to date."""
        self._segments = segments
        self._listener = listener
        self._account = account
        self._runner, self._settings = segments.runner, segments.batching
        self._rate = self._runner.engine.caps.sample_rate_hertz
        self._later: deque[Segment] = deque()
        """Not begun."""
        self._parts: deque[_Part] = deque()
        """Those begun and not taken to their end, in order."""
        self._closed = False
        self._failure: Exception | None = None
        self._samples = 0
        """Of the parts that were taken to their end."""
        self._heard_until: float | None = None
        """When the listener has heard all that was taken; None: nothing was yet."""
        self._end = RequestEnded(EndReason.COMPLETE, 0, 0.0)
        """So far."""
        # The scheduler takes a new stream to be heard so late, when it dates its rows.
        patience = self._settings.first_audio_patience + self._settings.reserve
        self._heard_first = self._runner.now() + patience
        self._changed: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._let_in = False
        """The batcher has let in what was made for it, or had room when it came: all that follows comes in."""

    async def get(self) -> Event:
        """Takes the next event, waiting for it.

        Raises:
            ChorusError: what became of a part.
        """
        while self._failure is None:
            self._begin_more()
            if self._parts:
                event = self._take(self._parts[0])
            elif self._closed:
                return self._end
            else:
                event = None
            if event is None:
                await self._change()
            elif (told := self._told(self._parts[0], event)) is not None:
                return told
        return RequestFailed(self._failure)

    def extend(self, segments: Sequence[Segment]) -> None:
        """Adds segments."""
        self._later.extend(segments)
        self._begin_more()
        self._wake()

    def close(self) -> None:
        """Says that no segments will be added."""
        self._closed = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends the events with RequestFailed, at once."""
        self._failure = error
        self._wake()

    async def room(self, segments: int) -> None:
        """Waits until fewer segments than that are yet to be heard."""
        while len(self._later) + len(self._parts) >= segments:
            self._room.clear()
            await self._room.wait()

    def leave(self) -> None:
        """Hears no more: what nobody else hears is made no further."""
        self._account.made_seconds += sum(part.owed for part in self._parts)
        for part in self._parts:
            self._settle(part)
            part.follower.leave()
        self._parts.clear()

    # -- parts begin --------------------------------------------------------------------------------------------------

    def _begin_more(self) -> None:
        """Keeps as many rows in flight as a stream may have, and what comes next of them in the making."""
        self._look()
        while self._later and self._may_begin():
            self._parts.append(self._begin(self._later.popleft(), self._parts))
            self._look()
        for part in self._parts:
            part.flight.release()
            if not part.over:
                break

    def _look(self) -> None:
        """Sees where the parts come from that have begun."""
        for part in self._parts:
            if part.admitted or part.begun_as is not Origin.MADE:
                self._settle(part)
        self._let_in |= any(part.admitted and part.origin is Origin.MADE for part in self._parts)

    def _settle(self, part: _Part) -> None:
        """It is known where a part comes from: counts it, and sees whether the text is let in with it. Once."""
        if part.settled:
            return
        part.settled = True
        shared = part.origin is not Origin.MADE
        metrics.segment_counter(part.origin.value).inc()
        self._account.shared += shared
        if shared and not part.row.index:
            # Nothing is asked of the batcher yet. Who comes while it is full waits for room with the first part that
            # must be made: what others have said costs nothing, and is no way round the bounds.
            call = self._listener.call
            self._let_in = self._runner.has_room([part.row], call.tenant, Priority(call.priority))

    def _may_begin(self) -> bool:
        if not self._let_in and any(not part.admitted for part in self._parts):
            return False  # that may be refused, and then nothing goes on from it
        open_parts = sum(not part.over for part in self._parts)
        ahead = sum(part.ready for part in self._parts)
        return open_parts < self._settings.stream_rows and ahead < self._settings.outbox_seconds

    def _begin(self, row: Segment, before: Iterable[_Part]) -> _Part:
        heard_from = self._heard_from(before) if self._let_in else None
        flight, origin = self._segments.find(row, self._listener, heard_from)
        return _Part(row, flight, origin, self._runner.predict(row), self._rate)

    def _heard_from(self, before: Iterable[_Part]) -> float:
        """When what comes after some parts will be heard."""
        begun = self._heard_first if self._heard_until is None else max(self._heard_until, self._runner.now())
        return begun + sum(part.left for part in before)

    # -- parts are heard ----------------------------------------------------------------------------------------------

    def _take(self, part: _Part) -> FlightEvent | None:
        """The next event of the first part, if it is there."""
        try:
            return part.follower.take()
        except (Abandoned, ChorusError) as error:
            if part.origin is Origin.JOINED and not part.heard and is_anothers(error):
                part.follower.leave()
                self._parts[0] = self._begin(part.row, ())
                return self._take(self._parts[0])  # it may be there already, and then nothing would wake us
            if isinstance(error, ChorusError):
                raise
            raise Unavailable("this server is stopping; try again", "STOPPING", retry_after=1.0) from None

    def _told(self, part: _Part, event: FlightEvent) -> Event | None:
        """An event of the first part as one of the whole; None: the whole goes on."""
        match event:
            case Admitted():
                return None
            case RequestEnded():
                self._pass(part, event)
                return None
        part.heard = True
        if isinstance(event, Audio):
            return self._audio(part, event)
        return SegmentEnded(part.row.index, self._samples, self._samples + part.taken)

    def _audio(self, part: _Part, event: Audio) -> Audio:
        samples = len(event.data) // SAMPLE_BYTES
        part.taken += samples
        now = self._runner.now()
        if self._heard_until is None:
            self._account.first = part.origin
            self._heard_until = now + samples / self._rate
            self._need_next()
        else:
            self._heard_until = max(self._heard_until, now) + samples / self._rate
        return Audio(event.data, self._samples + event.start_sample)

    def _need_next(self) -> None:
        """Playback has begun: now it is known when what was begun before will be heard."""
        parts = list(self._parts)
        for number, part in enumerate(parts):
            if number and self._let_in:
                part.flight.need(self._heard_from(parts[:number]))

    def _pass(self, part: _Part, end: RequestEnded) -> None:
        """The first part was taken to its end."""
        self._account.made_seconds += part.owed
        self._samples += end.samples
        cut = EndReason.LENGTH in (self._end.reason, end.reason)
        made = part.origin is Origin.MADE
        self._end = RequestEnded(
            EndReason.LENGTH if cut else EndReason.COMPLETE,
            self._samples,
            end.queue_seconds if made and not part.row.index else self._end.queue_seconds,
            max(end.batch_rows, self._end.batch_rows) if made else self._end.batch_rows,
        )
        part.follower.leave()
        self._parts.popleft()
        self._room.set()

    # -- waiting ------------------------------------------------------------------------------------------------------

    async def _change(self) -> None:
        """Waits until there is more of the first part, or somebody adds a part, closes or fails."""
        self._changed = asyncio.get_running_loop().create_future()
        with ExitStack() as stack:
            if self._parts:
                stack.enter_context(self._parts[0].flight.tape.waking(self._changed))
            await self._changed

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
