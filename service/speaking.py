"""The main path: a speech goes into the batcher, and comes out as the messages of its stream."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator

from audio.background import BackgroundEncoder, Piece
from audio.formats import Format
from batcher.engine import EndReason
from batcher.errors import (
    BatcherError,
    DeadlinePassedError,
    DeadlineUnreachableError,
    EngineFailedError,
    QueueFullError,
    RowFailedError,
    StoppedError,
)
from batcher.request import Audio, RequestEnded, RequestFailed, SegmentEnded
from batcher.runner import Runner
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
from protos.chorus.v1 import tts_pb2
from service.engines.base import SpeechEngine
from service.speech import Speech

SpeechMessage = tts_pb2.StreamStart | tts_pb2.AudioChunk | tts_pb2.SegmentMark | tts_pb2.StreamEnd

JITTER = 0.2
"""The share by which a refused caller's delay is made longer at random, so that not all come back at once."""


FINISH_REASONS = {
    EndReason.COMPLETE: tts_pb2.FINISH_REASON_COMPLETE,
    EndReason.LENGTH: tts_pb2.FINISH_REASON_LENGTH,
}


async def speak(
    runner: Runner, engine: SpeechEngine, speech: Speech, call: Call, *, max_rows: int, deadline: float
) -> AsyncGenerator[SpeechMessage, None]:
    """Speaks: one start, then chunks and marks in order, then one end. Closing it cancels.

    `deadline`: on the runner's clock, in seconds.

    Raises:
        ChorusError: what the caller is told instead of the rest.
    """
    teller = _Teller(speech, engine, call)
    try:
        async with runner.speak(speech.segments, max_rows=max_rows, deadline=deadline, tenant=call.tenant) as outbox:
            with BackgroundEncoder(speech.format, engine.caps.sample_rate_hertz) as encoder:
                while True:
                    event = await outbox.get()
                    match event:
                        case Audio():
                            for part in encoder.parts(event.data):
                                for message in teller.piece(await encoder.encode(part), encoder.samples):
                                    yield message
                        case SegmentEnded():
                            for message in teller.segment(event, encoder.samples):
                                yield message
                        case RequestEnded():
                            if not event.samples:
                                raise _silent()
                            for message in teller.piece(await encoder.finish(), encoder.samples):
                                yield message
                            yield teller.end(event)
                            return
                        case RequestFailed():
                            raise event.error
    except BatcherError as error:
        raise told(error) from error


class _Teller:
    """Puts what became of a speech into the messages of its stream, in their order."""

    def __init__(self, speech: Speech, engine: SpeechEngine, call: Call) -> None:
        self._speech = speech
        self._engine = engine
        self._call = call
        self._first_audio: float | None = None
        self._sequence = 0
        self._marks: deque[tts_pb2.SegmentMark] = deque()
        """Of segments whose last audio the encoder still holds."""

    def piece(self, piece: Piece | None, samples: int) -> Iterator[SpeechMessage]:
        """The next bytes, if there are any. `samples`: those that can be heard with them."""
        if piece is not None:
            if self._first_audio is None:
                self._first_audio = time.monotonic() - self._call.arrived
                metrics.FIRST_AUDIO_SECONDS.observe(self._first_audio)
                yield self._start()
            yield tts_pb2.AudioChunk(data=piece.data, sequence=self._sequence, start_sample=piece.start_sample)
            self._sequence += 1
        yield from self._due(samples)

    def segment(self, event: SegmentEnded, samples: int) -> Iterator[SpeechMessage]:
        """The mark of a segment, once its last audio has left."""
        part = self._speech.parts[event.index]
        mark = tts_pb2.SegmentMark(
            start_byte=part.start_byte,
            end_byte=part.end_byte,
            spoken_text=part.spoken_text,
            start_sample=self._at_rate(event.start_sample),
            end_sample=self._at_rate(event.end_sample),
        )
        self._marks.append(mark)
        yield from self._due(samples)

    def end(self, event: RequestEnded) -> tts_pb2.StreamEnd:
        """The facts of the whole, told to metrics and log as well."""
        first_audio = self._first_audio or 0.0
        seconds = event.samples / self._engine.caps.sample_rate_hertz
        metrics.AUDIO_SECONDS.inc(seconds)
        self._call.facts |= {
            "voice": self._speech.voice,
            "segments": len(self._speech.parts),
            "audio_s": round(seconds, 3),
            "queue_ms": round(event.queue_seconds * 1000, 1),
            "first_audio_ms": round(first_audio * 1000, 1),
        }
        timings = tts_pb2.Timings(
            queue_ms=event.queue_seconds * 1000,
            first_audio_ms=first_audio * 1000,
            total_ms=(time.monotonic() - self._call.arrived) * 1000,
        )
        return tts_pb2.StreamEnd(
            finish_reason=FINISH_REASONS[event.reason], sample_count=self._at_rate(event.samples), timings=timings
        )

    def _start(self) -> tts_pb2.StreamStart:
        return tts_pb2.StreamStart(
            format=wire_format(self._speech.format),
            voice=self._speech.voice,
            seed=self._speech.seed,
            cache_status=tts_pb2.CACHE_STATUS_BYPASS,
            engine=self._engine.name,
            model_revision=self._engine.model_revision,
            request_id=self._call.request_id,
        )

    def _due(self, samples: int) -> Iterator[SpeechMessage]:
        while self._first_audio is not None and self._marks and self._marks[0].end_sample <= samples:
            yield self._marks.popleft()

    def _at_rate(self, sample: int) -> int:
        return self._speech.format.at_rate(sample, self._engine.caps.sample_rate_hertz)


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


def wire_format(format: Format) -> tts_pb2.AudioFormat:
    """A format as the contract writes it, every field set."""
    return tts_pb2.AudioFormat(
        container=tts_pb2.Container.Value(f"CONTAINER_{format.container.name}"),
        codec=tts_pb2.Codec.Value(f"CODEC_{format.codec.name}"),
        sample_rate_hertz=format.sample_rate_hertz,
    )


def _silent() -> InvalidArgument:
    return InvalidArgument.of([Violation("text", "has nothing in it that this engine can speak")], "NOTHING_SPOKEN")
