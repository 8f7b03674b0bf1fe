"""The main path: a speech goes into the batcher, and comes out as the messages of its stream."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from audio.formats import Codec, Container, Format
from audio.frames import SAMPLE_BYTES
from batcher.engine import EndReason, Segment
from batcher.errors import (
    BatcherError,
    DeadlinePassedError,
    DeadlineUnreachableError,
    EngineFailedError,
    QueueFullError,
    RowFailedError,
    StoppedError,
)
from batcher.request import Audio, Event, Priority, RequestEnded, RequestFailed, SegmentEnded
from batcher.runner import Runner, Speaking
from common import metrics
from common.calls import Call
from common.errors import (
    ChorusError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Violation,
)
from common.speech import SpeechMessage, wire_format
from protos.chorus.v1 import tts_pb2
from service.engines.base import SpeechEngine
from service.flights import Deadline
from service.script import BargeIn, Script
from service.speech import Manner
from service.text import TextSegment

JITTER = 0.2
"""The share by which a refused caller's delay is made longer at random, so that not all come back at once."""

MAX_AHEAD = 64
"""Segments that may wait behind the one that is heard. Beyond it a caller who writes is read no further."""

FINISH_REASONS = {
    EndReason.COMPLETE: tts_pb2.FINISH_REASON_COMPLETE,
    EndReason.LENGTH: tts_pb2.FINISH_REASON_LENGTH,
}


class Spoken(Protocol):
    """Rows that are being spoken, one after the other: a request of the batcher's, or what takes the place of one."""

    async def get(self) -> Event:
        """Takes the next event, waiting for it."""
        ...

    def extend(self, segments: Sequence[Segment]) -> None:
        """Adds segments."""
        ...

    def close(self) -> None:
        """Says that no segments will be added."""
        ...

    def fail(self, error: Exception) -> None:
        """Ends the events with RequestFailed, at once."""
        ...

    async def room(self, segments: int) -> None:
        """Waits until fewer segments than that are yet to be heard."""
        ...


Begin: TypeAlias = Callable[[Sequence[Segment], bool], AbstractAsyncContextManager[Spoken]]
"""Begins to speak rows. The flag: these are all. Leaving it cancels."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a call allows its speech."""

    max_rows: int
    stream: bool
    """It is listened to while it is spoken."""
    expected_steps: int = 0


async def speak(
    begin: Begin, engine: SpeechEngine, manner: Manner, script: Script, call: Call
) -> AsyncGenerator[SpeechMessage, None]:
    """Speaks in RAW PCM_S16LE: one start, then chunks and marks in order, then one end. Closing it cancels.

    Raises:
        ChorusError: what the caller is told instead of the rest.
    """
    teller = _Teller(manner, engine, call)
    try:
        rows = teller.cast(await script.more())
        if not rows:
            raise _silent()
        async with begin(rows, script.done) as speaking, _fed(speaking, script, teller):
            async for message in _messages(speaking, teller):
                yield message
    except BargeIn:
        yield teller.cancelled()
    except BatcherError as error:
        raise told(error) from error


@asynccontextmanager
async def in_one_request(
    runner: Runner, call: Call, terms: Terms, deadline: Deadline, rows: Sequence[Segment], closed: bool
) -> AsyncIterator[Speaking]:
    """Begins to speak rows as one request of the batcher's."""
    async with runner.speak(
        rows,
        max_rows=terms.max_rows,
        deadline=deadline.admission,
        tenant=call.tenant,
        priority=Priority(call.priority),
        stream=terms.stream,
        closed=closed,
        expected_steps=terms.expected_steps,
    ) as speaking:
        deadline.told = speaking.allow
        speaking.allow(deadline.at)
        yield speaking


async def _messages(speaking: Spoken, teller: _Teller) -> AsyncGenerator[SpeechMessage, None]:
    """The batcher's events as messages of the stream."""
    while True:
        event = await speaking.get()
        match event:
            case Audio():
                for message in teller.audio(event):
                    yield message
            case SegmentEnded():
                for message in teller.segment(event):
                    yield message
            case RequestEnded():
                if not event.samples:
                    raise _silent()
                for message in teller.end(event):
                    yield message
                return
            case RequestFailed():
                raise event.error


@asynccontextmanager
async def _fed(speaking: Spoken, script: Script, teller: _Teller) -> AsyncIterator[None]:
    """Adds the rest of the script while the first of it is heard."""
    feeding = None if script.done else asyncio.create_task(_feed(speaking, script, teller))
    try:
        yield
    finally:
        if feeding is not None:
            feeding.cancel()


async def _feed(speaking: Spoken, script: Script, teller: _Teller) -> None:
    try:
        while not script.done:
            await speaking.room(MAX_AHEAD)
            if rows := teller.cast(await script.more()):
                speaking.extend(rows)
            await asyncio.sleep(0)
        speaking.close()
    except Exception as error:
        speaking.fail(error)


class _Teller:
    """Puts what became of a speech into the messages of its stream, in their order."""

    def __init__(self, manner: Manner, engine: SpeechEngine, call: Call) -> None:
        self._manner = manner
        self._engine = engine
        self._call = call
        self._first_audio: float | None = None
        self._sequence = 0
        self._sent = 0
        """Samples."""
        self._cast = 0
        """Parts that became rows."""
        self._parts: dict[int, TextSegment] = {}
        """Of these, those whose mark was not made yet, by the index of the row."""
        self._rest: TextSegment | None = None
        """What was left at the end, and has nothing to speak."""
        self._early: list[tts_pb2.SegmentMark] = []
        """Of segments without sound that ended before the first audio."""

    def cast(self, parts: Sequence[TextSegment]) -> list[Segment]:
        """Parts of the text as rows, and remembers them until they are heard."""
        spoken = [part for part in parts if part.spoken_text]
        self._rest = next((part for part in parts if not part.spoken_text), None)
        rows = [self._manner.segment(part, index) for index, part in enumerate(spoken, self._cast)]
        self._parts |= {row.index: part for row, part in zip(rows, spoken, strict=True)}
        self._cast += len(rows)
        return rows

    def audio(self, event: Audio) -> Iterator[SpeechMessage]:
        """The next samples."""
        if self._first_audio is None:
            self._first_audio = time.monotonic() - self._call.arrived
            metrics.FIRST_AUDIO_SECONDS.observe(self._first_audio)
            yield self._start()
        yield tts_pb2.AudioChunk(data=event.data, sequence=self._sequence, start_sample=event.start_sample)
        self._sequence += 1
        self._sent = event.start_sample + len(event.data) // SAMPLE_BYTES
        yield from self._early
        self._early = []

    def segment(self, event: SegmentEnded) -> Iterator[SpeechMessage]:
        """The mark of a segment, whose last audio has left."""
        mark = self._mark(self._parts.pop(event.index), event.start_sample, event.end_sample)
        if self._first_audio is None:
            self._early.append(mark)
        else:
            yield mark

    def end(self, event: RequestEnded) -> Iterator[SpeechMessage]:
        """The facts of the whole, told to metrics and log as well."""
        if self._rest is not None:
            yield self._mark(self._rest, event.samples, event.samples)
        first_audio = self._first_audio or 0.0
        seconds = event.samples / self._engine.caps.sample_rate_hertz
        metrics.AUDIO_SECONDS.inc(seconds)
        self._call.facts |= {
            "voice": self._manner.voice,
            "segments": self._cast,
            "audio_s": round(seconds, 3),
            "queue_ms": round(event.queue_seconds * 1000, 1),
            "batch_rows": event.batch_rows,
            "first_audio_ms": round(first_audio * 1000, 1),
        }
        yield tts_pb2.StreamEnd(
            finish_reason=FINISH_REASONS[event.reason],
            sample_count=event.samples,
            timings=self._timings(event.queue_seconds, event.batch_rows),
        )

    def cancelled(self) -> tts_pb2.StreamEnd:
        """The end of a speech that its caller has cut short. Counts what was sent."""
        return tts_pb2.StreamEnd(
            finish_reason=tts_pb2.FINISH_REASON_CANCELLED,
            sample_count=self._sent,
            timings=self._timings(0.0),
        )

    def _timings(self, queue_seconds: float, batch_rows: int = 0) -> tts_pb2.Timings:
        return tts_pb2.Timings(
            queue_ms=queue_seconds * 1000,
            first_audio_ms=(self._first_audio or 0.0) * 1000,
            total_ms=(time.monotonic() - self._call.arrived) * 1000,
            batch_rows=batch_rows,
        )

    def _mark(self, part: TextSegment, start: int, end: int) -> tts_pb2.SegmentMark:
        return tts_pb2.SegmentMark(
            start_byte=part.start_byte,
            end_byte=part.end_byte,
            spoken_text=part.spoken_text,
            start_sample=start,
            end_sample=end,
            rejected_characters=rejected_characters(part),
        )

    def _start(self) -> tts_pb2.StreamStart:
        return tts_pb2.StreamStart(
            format=wire_format(Format(Container.RAW, Codec.PCM_S16LE, self._engine.caps.sample_rate_hertz)),
            voice=self._manner.voice,
            seed=self._manner.seed,
            cache_status=tts_pb2.CACHE_STATUS_BYPASS,
            engine=self._engine.name,
            model_revision=self._engine.model_revision,
            request_id=self._call.request_id,
        )


def told(error: BatcherError) -> ChorusError:
    """What a caller is told of an error of the batcher."""
    match error:
        case QueueFullError():
            delay = error.retry_after * random.uniform(1.0, 1.0 + JITTER)  # noqa: S311 (no secret)
            return ResourceExhausted(
                f"the queue is full; try again in {delay:.2f} s", "QUEUE_FULL", retry_after=delay, quota="queue"
            )
        case DeadlineUnreachableError():
            return DeadlineExceeded("the deadline is too near for this text; allow more time", "DEADLINE_UNREACHABLE")
        case DeadlinePassedError():
            return DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED")
        case RowFailedError():
            return Internal("the engine could not speak a part of this text", "SEGMENT_FAILED")
        case EngineFailedError():
            return Unavailable("the engine failed; try again", "ENGINE_FAILED", retry_after=1.0)
        case StoppedError():
            return Unavailable("this server is stopping; try again", "STOPPING", retry_after=1.0)
    raise error


def rejected_characters(part: TextSegment) -> list[tts_pb2.RejectedCharacter]:
    """What of a part no engine can speak, as the contract writes it."""
    return [tts_pb2.RejectedCharacter(character=r.character, start_byte=r.start_byte) for r in part.rejected]


def _silent() -> InvalidArgument:
    return InvalidArgument.of([Violation("text", "has nothing in it that this engine can speak")], "NOTHING_SPOKEN")
