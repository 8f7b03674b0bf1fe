"""Masters: whole speeches, lossless, as their backend made them. All formats of a speech are made from its master."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError

from audio.frames import SAMPLE_BYTES
from common.speech import SpeechMessage
from protos.chorus.v1 import tts_pb2

CHUNK_SECONDS = 0.5
"""Of a replay's chunks. The reader sets the pace, so they are as large as is handy."""

_LENGTH = struct.Struct(">I")


class Whole:
    """A whole speech as one reply: its audio as bytes of the reply, ready to leave, and all the rest as a message.

    The bytes of a message's fields, one after the other, are those of the message: so the audio, which is nearly all of
    it and the same for all callers, is neither copied into messages nor out of them, and each caller has the rest as
    its own. To gRPC and to idempotency keys it looks like the message.
    """

    __slots__ = ("audio_bytes", "rest", "sound")

    def __init__(self, rest: tts_pb2.SynthesizeResponse, sound: bytes | memoryview, audio_bytes: int) -> None:
        """`rest`: a reply without audio. `sound`: the bytes of a reply with so much audio and nothing else."""
        self.rest = rest
        self.sound = sound
        self.audio_bytes = audio_bytes

    @classmethod
    def of(cls, reply: tts_pb2.SynthesizeResponse) -> Whole:
        """A reply's, which becomes its rest."""
        audio = reply.audio
        reply.ClearField("audio")
        return cls(reply, tts_pb2.SynthesizeResponse(audio=audio).SerializeToString(), len(audio))

    @property
    def audio(self) -> memoryview:
        """What is heard. A field that stands alone ends with what it holds."""
        return memoryview(self.sound)[len(self.sound) - self.audio_bytes :]

    def for_caller(self, request_id: str) -> Whole:
        """The same for a call: what is not audio is its own, and may be changed."""
        rest = tts_pb2.SynthesizeResponse()
        rest.CopyFrom(self.rest)
        rest.start.request_id = request_id
        return Whole(rest, self.sound, self.audio_bytes)

    def message(self) -> tts_pb2.SynthesizeResponse:
        """All of it as a message."""
        return tts_pb2.SynthesizeResponse.FromString(self.SerializeToString())

    def ByteSize(self) -> int:  # noqa: N802 (as messages call it)
        """As messages have it."""
        return len(self.sound) + self.rest.ByteSize()

    def SerializeToString(self) -> bytes:  # noqa: N802 (as messages call it)
        """As messages have it."""
        return b"".join((self.sound, self.rest.SerializeToString()))


class Form:
    """A complete speech in some format, as it is kept. Never changed."""

    def __init__(self, reply: Whole) -> None:
        """`reply`: not changed by anybody from now on."""
        self.reply = reply
        """To be read only."""
        rest = reply.rest
        self.size = reply.audio_bytes + 64 * len(rest.marks) + 512
        """Bytes, about."""
        self.seconds = rest.end.sample_count / rest.start.format.sample_rate_hertz


class Master(Form):
    """One in RAW PCM_S16LE at its engine's rate."""

    def __init__(self, reply: Whole) -> None:
        """`reply`: not changed by anybody from now on."""
        super().__init__(reply)
        self.made_as = reply.rest.start.cache_status
        """How its backend made it: MISS, or BYPASS if not under the key that it was asked for."""

    @classmethod
    def of(cls, whole: Whole) -> Master | None:
        """A reply's; None if it is not complete."""
        end = whole.rest.end
        complete = end.finish_reason == tts_pb2.FINISH_REASON_COMPLETE and end.sample_count > 0
        complete = complete and whole.audio_bytes == end.sample_count * SAMPLE_BYTES
        if not complete or whole.rest.start.format.container != tts_pb2.CONTAINER_RAW:
            return None
        kept = whole.for_caller("").rest
        kept.end.ClearField("timings")
        master = cls(Whole(kept, whole.sound, whole.audio_bytes))
        kept.start.cache_status = tts_pb2.CACHE_STATUS_HIT
        return master

    @classmethod
    def of_messages(cls, messages: Iterable[SpeechMessage]) -> Master | None:
        """A stream's; None if it is not complete."""
        return cls.of(Whole.of(gathered(messages)))

    @property
    def rate(self) -> int:
        """Of its samples, in hertz."""
        return self.reply.rest.start.format.sample_rate_hertz

    def whole(self, request_id: str) -> Whole:
        """The speech as one reply to a call."""
        return self.reply.for_caller(request_id)

    def messages(self, request_id: str) -> Iterator[SpeechMessage]:
        """The speech as a stream, whose messages may be changed."""
        reply, audio, at = self.reply.rest, self.reply.audio, 0
        start, end = tts_pb2.StreamStart(), tts_pb2.StreamEnd()
        start.CopyFrom(reply.start)
        start.request_id = request_id
        marks = reply.marks
        step = int(CHUNK_SECONDS * start.format.sample_rate_hertz)
        yield start
        for sequence, sample in enumerate(range(0, reply.end.sample_count, step)):
            data = bytes(audio[sample * SAMPLE_BYTES : (sample + step) * SAMPLE_BYTES])
            yield tts_pb2.AudioChunk(data=data, sequence=sequence, start_sample=sample)
            while at < len(marks) and marks[at].end_sample <= sample + step:
                mark = tts_pb2.SegmentMark()
                mark.CopyFrom(marks[at])
                yield mark
                at += 1
        end.CopyFrom(reply.end)
        yield end

    def parts(self) -> tuple[bytes, bytes, bytes | memoryview]:
        """As it is kept: how long all but the audio is, that, and the audio."""
        rest = self.reply.rest.SerializeToString()
        return (_LENGTH.pack(len(rest)), rest, self.reply.sound)

    @classmethod
    def from_bytes(cls, kept: memoryview) -> Master | None:
        """As it was kept; None if it was not. It holds on to `kept`."""
        try:
            (length,) = _LENGTH.unpack_from(kept)
            told = tts_pb2.SynthesizeResponse.FromString(bytes(kept[_LENGTH.size : _LENGTH.size + length]))
            sound = kept[_LENGTH.size + length :]
            return cls(Whole(told, sound, told.end.sample_count * SAMPLE_BYTES))
        except (struct.error, DecodeError, ZeroDivisionError):
            return None


def gathered(messages: Iterable[SpeechMessage]) -> tts_pb2.SynthesizeResponse:
    """The messages of a stream as one reply."""
    reply, audio = tts_pb2.SynthesizeResponse(), bytearray()
    for message in messages:
        match message:
            case tts_pb2.AudioChunk():
                audio += message.data
            case tts_pb2.StreamStart():
                reply.start.CopyFrom(message)
            case tts_pb2.SegmentMark():
                reply.marks.append(message)
            case tts_pb2.StreamEnd():
                reply.end.CopyFrom(message)
    reply.audio = bytes(audio)
    return reply
