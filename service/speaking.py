"""The main path: a speech goes into the batcher, and comes out as the messages of its stream."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator

from audio.encode import Encoder
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


async def speak(
    runner: Runner, engine: SpeechEngine, speech: Speech, call: Call, *, max_rows: int, deadline: float
) -> AsyncGenerator[SpeechMessage, None]:
    """Speaks: one start, then chunks and marks in order, then one end. Closing it cancels.

    `deadline`: on the runner's clock, in seconds.

    Raises:
        ChorusError: what the caller is told instead of the rest.
    """
    encoder = Encoder(speech.format)
    first_audio: float | None = None
    sequence = 0
    early_marks: list[tts_pb2.SegmentMark] = []
    try:
        async with runner.speak(speech.segments, max_rows=max_rows, deadline=deadline, tenant=call.tenant) as outbox:
            while True:
                event = await outbox.get()
                match event:
                    case Audio():
                        if first_audio is None:
                            first_audio = time.monotonic() - call.arrived
                            metrics.FIRST_AUDIO_SECONDS.observe(first_audio)
                            yield _start(speech, engine, call.request_id)
                            for mark in early_marks:
                                yield mark
                        data = encoder.encode(event.data)
                        yield tts_pb2.AudioChunk(data=data, sequence=sequence, start_sample=event.start_sample)
                        sequence += 1
                    case SegmentEnded() if first_audio is None:
                        early_marks.append(_mark(speech, event))
                    case SegmentEnded():
                        yield _mark(speech, event)
                    case RequestEnded():
                        if first_audio is None:
                            raise _silent()
                        _note(call, speech, event, first_audio)
                        yield _end(call, event, first_audio)
                        return
                    case RequestFailed():
                        raise event.error
    except BatcherError as error:
        raise told(error) from error


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


def _start(speech: Speech, engine: SpeechEngine, request_id: str) -> tts_pb2.StreamStart:
    return tts_pb2.StreamStart(
        format=wire_format(speech.format),
        voice=speech.voice,
        seed=speech.seed,
        cache_status=tts_pb2.CACHE_STATUS_BYPASS,
        engine=engine.name,
        model_revision=engine.model_revision,
        request_id=request_id,
    )


def _mark(speech: Speech, event: SegmentEnded) -> tts_pb2.SegmentMark:
    part = speech.parts[event.index]
    return tts_pb2.SegmentMark(
        start_byte=part.start_byte,
        end_byte=part.end_byte,
        spoken_text=part.spoken_text,
        start_sample=event.start_sample,
        end_sample=event.end_sample,
    )


def _end(call: Call, event: RequestEnded, first_audio: float) -> tts_pb2.StreamEnd:
    reasons = {
        EndReason.COMPLETE: tts_pb2.FINISH_REASON_COMPLETE,
        EndReason.LENGTH: tts_pb2.FINISH_REASON_LENGTH,
    }
    timings = tts_pb2.Timings(
        queue_ms=event.queue_seconds * 1000,
        first_audio_ms=first_audio * 1000,
        total_ms=(time.monotonic() - call.arrived) * 1000,
    )
    return tts_pb2.StreamEnd(finish_reason=reasons[event.reason], sample_count=event.samples, timings=timings)


def _note(call: Call, speech: Speech, event: RequestEnded, first_audio: float) -> None:
    seconds = event.samples / speech.format.sample_rate_hertz
    metrics.AUDIO_SECONDS.inc(seconds)
    call.facts |= {
        "voice": speech.voice,
        "segments": len(speech.parts),
        "audio_s": round(seconds, 3),
        "queue_ms": round(event.queue_seconds * 1000, 1),
        "first_audio_ms": round(first_audio * 1000, 1),
    }


def _silent() -> InvalidArgument:
    return InvalidArgument.of([Violation("text", "has nothing in it that this engine can speak")], "NOTHING_SPOKEN")
