"""Listening by program: whose audio is it, and is it whole?"""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field

from protos.chorus.v1 import tts_pb2
from service.engines.tone_code import Identity, verify

VOICE = "female1"
LANGUAGE = "en-US"


@dataclass
class Heard:
    """What a caller got of a stream of raw samples."""

    audio: bytearray = field(default_factory=bytearray)
    starts: list[tts_pb2.StreamStart] = field(default_factory=list)
    marks: list[tts_pb2.SegmentMark] = field(default_factory=list)
    ends: list[tts_pb2.StreamEnd] = field(default_factory=list)

    def take(self, response: tts_pb2.StreamSynthesizeResponse) -> None:
        """Adds the next message."""
        match response.WhichOneof("message"):
            case "start":
                self.starts.append(response.start)
            case "chunk":
                assert response.chunk.start_sample * 2 == len(self.audio)
                self.audio += response.chunk.data
            case "mark":
                self.marks.append(response.mark)
            case "end":
                self.ends.append(response.end)

    def check_whole(self) -> None:
        """The stream is complete and all of it is this request's own."""
        assert len(self.starts) == len(self.ends) == 1
        assert self.ends[0].sample_count * 2 == len(self.audio)
        spoken = [mark.spoken_text for mark in self.marks]
        verify(bytes(self.audio), identities(spoken, self.starts[0].seed))

    def check_part(self, spoken: Sequence[str], seed: int) -> None:
        """What came is this request's own, from its start on, without a gap."""
        if self.audio:
            verify(bytes(self.audio), identities(spoken, seed), whole=False)


async def hear(responses: AsyncIterable[tts_pb2.StreamSynthesizeResponse], heard: Heard) -> None:
    """Reads a stream to its end."""
    async for response in responses:
        heard.take(response)


def identities(spoken: Sequence[str], seed: int) -> list[Identity]:
    """Who speaks in the audio of segments of one request."""
    return [Identity.of(text, VOICE, LANGUAGE, seed, index) for index, text in enumerate(spoken)]
