"""Masters: whole speeches, lossless, as their backend made them. All formats of a speech are made from its master."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError

from audio.frames import SAMPLE_BYTES
from common.speech import SpeechMessage
from protos.chorus.v1 import tts_pb2

CHUNK_SECONDS = 0.5
"""Of a replay's chunks. The reader sets the pace, so they are as large as is handy."""
DIGEST_BYTES = 16


class Master:
    """A complete speech in RAW PCM_S16LE at its engine's rate. Never changed."""

    def __init__(self, reply: tts_pb2.SynthesizeResponse) -> None:
        """`reply`: not changed by anybody from now on."""
        self._reply = reply
        self.made_as = reply.start.cache_status
        """How its backend made it: MISS, or BYPASS if not under the key that it was asked for."""
        self.size = len(reply.audio) + 64 * len(reply.marks) + 512
        """Bytes, about."""
        self.seconds = reply.end.sample_count / reply.start.format.sample_rate_hertz

    @classmethod
    def of(cls, reply: tts_pb2.SynthesizeResponse) -> Master | None:
        """A reply's; None if it is not complete."""
        end = reply.end
        whole = end.finish_reason == tts_pb2.FINISH_REASON_COMPLETE and end.sample_count > 0
        whole = whole and len(reply.audio) == end.sample_count * SAMPLE_BYTES
        if not whole or reply.start.format.container != tts_pb2.CONTAINER_RAW:
            return None
        kept = tts_pb2.SynthesizeResponse()
        kept.CopyFrom(reply)
        kept.start.ClearField("request_id")
        kept.end.ClearField("timings")
        master = cls(kept)
        kept.start.cache_status = tts_pb2.CACHE_STATUS_HIT
        return master

    @classmethod
    def of_messages(cls, messages: Iterable[SpeechMessage]) -> Master | None:
        """A stream's; None if it is not complete."""
        return cls.of(gathered(messages))

    @property
    def start(self) -> tts_pb2.StreamStart:
        """Its facts; to be read only."""
        return self._reply.start

    def whole(self, request_id: str) -> tts_pb2.SynthesizeResponse:
        """The speech as one reply, which may be changed."""
        reply = tts_pb2.SynthesizeResponse()
        reply.CopyFrom(self._reply)
        reply.start.request_id = request_id
        return reply

    def messages(self, request_id: str) -> Iterator[SpeechMessage]:
        """The speech as a stream, whose messages may be changed."""
        reply = self._reply
        start, end = tts_pb2.StreamStart(), tts_pb2.StreamEnd()
        start.CopyFrom(reply.start)
        start.request_id = request_id
        marks, audio, at = list(reply.marks), reply.audio, 0
        step = int(CHUNK_SECONDS * start.format.sample_rate_hertz)
        yield start
        for sequence, sample in enumerate(range(0, reply.end.sample_count, step)):
            data = audio[sample * SAMPLE_BYTES : (sample + step) * SAMPLE_BYTES]
            yield tts_pb2.AudioChunk(data=data, sequence=sequence, start_sample=sample)
            while at < len(marks) and marks[at].end_sample <= sample + step:
                mark = tts_pb2.SegmentMark()
                mark.CopyFrom(marks[at])
                yield mark
                at += 1
        end.CopyFrom(reply.end)
        yield end

    def to_bytes(self, key: bytes) -> bytes:
        """As it is kept under a key."""
        data = self._reply.SerializeToString()
        return _digest(key, data) + data

    @classmethod
    def from_bytes(cls, key: bytes, data: bytes) -> Master | None:
        """As it was kept under a key; None if it is damaged, or was not kept under this key."""
        digest, body = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        if digest != _digest(key, body):
            return None
        try:
            return cls(tts_pb2.SynthesizeResponse.FromString(body))
        except (DecodeError, ZeroDivisionError):
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


def _digest(key: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES, key=key[:64]).digest()
