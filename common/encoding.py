"""A speech in plain samples becomes one in its caller's format, message by message, in gateway and service alike."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing

from audio.background import BackgroundEncoder, Piece
from audio.budget import EncodersBusyError
from audio.encode import costs_nothing
from audio.formats import Container, Format
from audio.frames import SAMPLE_BYTES
from audio.headers import wav_header, with_known_length
from common.errors import OutOfRange, ResourceExhausted
from common.settings import LimitSettings
from common.speech import SpeechMessage, read_wish, wire_format
from protos.chorus.v1 import tts_pb2

Messages = AsyncGenerator[SpeechMessage, None]

REPLY_OVERHEAD_BYTES = 64 * 1024
"""Room in a unary reply for all that is not audio."""


def reserve(encoder: BackgroundEncoder, format: Format, engine_rate: int) -> None:
    """Takes room for a format's encoder. Whoever has room already keeps it. `engine_rate`: in hertz.

    Raises:
        ResourceExhausted: there is no room.
    """
    try:
        encoder.reserve(format, engine_rate)
    except EncodersBusyError:
        raise ResourceExhausted(
            "the encoders have no room for one more; try again in a second, or ask for WAV or RAW at the engine's rate",
            "ENCODERS_BUSY",
            retry_after=1.0,
            quota="encoders",
        ) from None


async def encoded(plain: Messages, format_at: Callable[[int], Format], encoder: BackgroundEncoder) -> Messages:
    """A speech in another format. Takes no message before all that came of the one before is taken.

    Args:
        plain: the speech in RAW PCM_S16LE at its engine's rate; closed with this.
        format_at: the format for an engine's rate in hertz, asked once that is known.
        encoder: where it is encoded, if that costs anything.

    Raises:
        ResourceExhausted: the encoder has reserved nothing, needs room after all, and there is none.
    """
    async with aclosing(plain):
        start = await anext(plain, None)
        if not isinstance(start, tts_pb2.StreamStart):
            if start is not None:  # it has ended before its first audio
                yield start
            return
        engine_rate = start.format.sample_rate_hertz
        format = format_at(engine_rate)
        start.format.CopyFrom(wire_format(format))
        reserve(encoder, format, engine_rate)
        if costs_nothing(format, engine_rate):
            messages = _wrapped(plain, start, format)
        else:
            messages = _coded(plain, _Tape(start, format, engine_rate), encoder)
        async with aclosing(messages):
            async for message in messages:
                yield message


async def bounded(plain: Messages, limits: LimitSettings) -> Messages:
    """A speech in RAW PCM_S16LE, no longer than a unary reply may be, in whatever format it will be.

    Raises:
        OutOfRange: it is longer.
    """
    most = 0.0
    async with aclosing(plain):
        async for message in plain:
            match message:
                case tts_pb2.StreamStart():
                    rate = message.format.sample_rate_hertz
                    most = rate * max_reply_seconds(rate, limits)
                case tts_pb2.AudioChunk() if message.start_sample + len(message.data) // SAMPLE_BYTES > most:
                    raise too_long()
            yield message


async def collected(messages: Messages, limits: LimitSettings) -> tts_pb2.SynthesizeResponse:
    """A speech as one reply, its length in its header where the format has a place for it.

    Raises:
        OutOfRange: it is more than a reply holds.
    """
    response, audio = tts_pb2.SynthesizeResponse(), bytearray()
    async with aclosing(messages):
        async for message in messages:
            match message:
                case tts_pb2.AudioChunk():
                    audio += message.data
                    if len(audio) > max_reply_bytes(limits):
                        raise too_long()
                case tts_pb2.StreamStart():
                    response.start.CopyFrom(message)
                case tts_pb2.SegmentMark():
                    response.marks.append(message)
                case tts_pb2.StreamEnd():
                    response.end.CopyFrom(message)
    wish, _ = read_wish(response.start.format)
    assert wish is not None
    format = wish.at(wish.sample_rate_hertz)
    response.audio = with_known_length(bytes(audio), format, response.end.sample_count)
    return response


async def encoded_whole(
    plain: tts_pb2.SynthesizeResponse,
    format_at: Callable[[int], Format],
    encoder: BackgroundEncoder,
    limits: LimitSettings,
) -> tts_pb2.SynthesizeResponse:
    """A whole speech in another format, as a stream of it would be. The reply itself may come back, changed.

    Raises:
        OutOfRange: it is more than a reply holds.
        ResourceExhausted: as `encoded`.
    """
    engine_rate = plain.start.format.sample_rate_hertz
    format = format_at(engine_rate)
    if not costs_nothing(format, engine_rate):
        return await collected(encoded(_taken_apart(plain), format_at, encoder), limits)
    plain.start.format.CopyFrom(wire_format(format))
    if format.container is Container.WAV:
        plain.audio = wav_header(format, plain.end.sample_count) + plain.audio
    if len(plain.audio) > max_reply_bytes(limits):
        raise too_long()
    return plain


def max_reply_seconds(engine_rate: int, limits: LimitSettings) -> float:
    """Audio that a unary reply may hold at most, in whatever format: between gateway and service it is plain samples.

    `engine_rate`: in hertz.
    """
    return min(limits.unary_audio_seconds, max_reply_bytes(limits) / (SAMPLE_BYTES * engine_rate))


async def _taken_apart(response: tts_pb2.SynthesizeResponse) -> Messages:
    """A reply as the stream that it was collected from."""
    yield response.start
    yield tts_pb2.AudioChunk(data=response.audio)
    for mark in response.marks:
        yield mark
    yield response.end


async def _wrapped(plain: Messages, start: tts_pb2.StreamStart, format: Format) -> Messages:
    """The samples as they are, in their container."""
    head = wav_header(format) if format.container is Container.WAV else b""
    yield start
    async for message in plain:
        if head and isinstance(message, tts_pb2.AudioChunk):
            message.data, head = head + message.data, b""
        yield message


async def _coded(plain: Messages, tape: _Tape, encoder: BackgroundEncoder) -> Messages:
    async for message in plain:
        match message:
            case tts_pb2.AudioChunk():
                for part in encoder.parts(message.data):
                    for told in tape.piece(await encoder.encode(part), encoder.samples):
                        yield told
            case tts_pb2.SegmentMark():
                for told in tape.mark(message, encoder.samples):
                    yield told
            case tts_pb2.StreamEnd():
                if message.finish_reason != tts_pb2.FINISH_REASON_CANCELLED:
                    for told in tape.piece(await encoder.finish(), encoder.samples):
                        yield told
                message.sample_count = encoder.samples
                yield message


class _Tape:
    """Puts encoded pieces into chunks, and each mark behind the chunk that completes its segment."""

    def __init__(self, start: tts_pb2.StreamStart, format: Format, engine_rate: int) -> None:
        self._start: tts_pb2.StreamStart | None = start
        """Until it is sent, together with the first audio."""
        self._format = format
        self._engine_rate = engine_rate
        self._sequence = 0
        self._marks: deque[tts_pb2.SegmentMark] = deque()
        """Of segments whose last audio the encoder still holds."""

    def piece(self, piece: Piece | None, samples: int) -> Iterator[SpeechMessage]:
        """The next bytes, if there are any. `samples`: those that can be heard with them, at the format's rate."""
        if piece is not None:
            if self._start is not None:
                yield self._start
                self._start = None
            yield tts_pb2.AudioChunk(data=piece.data, sequence=self._sequence, start_sample=piece.start_sample)
            self._sequence += 1
        yield from self._due(samples)

    def mark(self, mark: tts_pb2.SegmentMark, samples: int) -> Iterator[SpeechMessage]:
        """The mark of a segment, whose samples count at the engine's rate, once its last audio has left."""
        mark.start_sample = self._format.at_rate(mark.start_sample, self._engine_rate)
        mark.end_sample = self._format.at_rate(mark.end_sample, self._engine_rate)
        self._marks.append(mark)
        yield from self._due(samples)

    def _due(self, samples: int) -> Iterator[SpeechMessage]:
        while self._start is None and self._marks and self._marks[0].end_sample <= samples:
            yield self._marks.popleft()


def max_reply_bytes(limits: LimitSettings) -> int:
    """Audio that a unary reply may hold at most, in bytes of its format."""
    return limits.message_bytes - REPLY_OVERHEAD_BYTES


def too_long() -> OutOfRange:
    """What is more than a reply holds."""
    # Without figures: which limit is met first depends on who encodes, and nobody else is to see that.
    return OutOfRange(
        "the audio became longer than a unary reply holds; use StreamSynthesize or JobService.CreateJob",
        "AUDIO_TOO_LONG",
    )
