"""A speech in plain samples becomes one in another format, message by message."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.background import BackgroundEncoder
from audio.budget import Budget
from audio.encode import Encoder
from audio.formats import SERVED, Codec, Container, Format, resolve
from common.encoding import Messages, bounded, collected, encoded, encoded_whole, reserve
from common.errors import OutOfRange, ResourceExhausted
from common.settings import LimitSettings
from common.speech import SpeechMessage, wire_format
from protos.chorus.v1 import tts_pb2
from tests.spoken import RATE, speech

FORMATS = [resolve(container, codec, 0, RATE) for container, codec in SERVED]
MP3 = Format(Container.MP3, Codec.MP3, RATE)
PLAIN = Format(Container.RAW, Codec.PCM_S16LE, RATE)
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)

COMPLETE, CANCELLED = tts_pb2.FINISH_REASON_COMPLETE, tts_pb2.FINISH_REASON_CANCELLED


def plain_messages(pcm: bytes, sizes: list[int], reason: tts_pb2.FinishReason.ValueType) -> list[SpeechMessage]:
    """A speech whose chunks have so many samples, each a segment of its own."""
    messages: list[SpeechMessage] = [tts_pb2.StreamStart(format=wire_format(PLAIN), seed=7)]
    start = 0
    for sequence, size in enumerate(sizes):
        end = min(start + size, len(pcm) // 2)
        messages.append(tts_pb2.AudioChunk(data=pcm[2 * start : 2 * end], sequence=sequence, start_sample=start))
        messages.append(tts_pb2.SegmentMark(start_sample=start, end_sample=end, spoken_text=str(sequence)))
        start = end
    messages.append(tts_pb2.StreamEnd(finish_reason=reason, sample_count=start))
    return messages


class Source:
    """Gives messages, and counts how many were taken."""

    def __init__(self, messages: list[SpeechMessage]) -> None:
        self.taken = 0
        self.closed = False
        self._messages = messages

    async def __call__(self) -> AsyncGenerator[SpeechMessage, None]:
        try:
            for message in self._messages:
                self.taken += 1
                yield message
        finally:
            self.closed = True


async def converted(plain: Messages, format: Format) -> list[SpeechMessage]:
    """All messages of a speech in another format."""
    with BackgroundEncoder(Budget(1.0, cores=1)) as encoder:
        return [message async for message in encoded(plain, lambda rate: format, encoder)]


def kinds(messages: list[SpeechMessage]) -> list[str]:
    return [type(message).__name__ for message in messages]


def audio(messages: list[SpeechMessage]) -> bytes:
    return b"".join(message.data for message in messages if isinstance(message, tts_pb2.AudioChunk))


@every_format
@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(0, 20_000), min_size=1, max_size=6).filter(any))
async def test_whatever_the_pieces_it_is_one_file_with_its_marks(format: Format, sizes: list[int]) -> None:
    pcm = speech("en-US")[: 2 * sum(sizes)]
    told = await converted(Source(plain_messages(pcm, sizes, COMPLETE))(), format)
    with Encoder(format, RATE) as encoder:
        assert audio(told) == encoder.encode(pcm) + encoder.finish()
    start, *rest, end = told
    assert isinstance(start, tts_pb2.StreamStart)
    assert (start.format, start.seed) == (wire_format(format), 7)
    assert kinds(rest).count("StreamStart") == 0
    assert isinstance(end, tts_pb2.StreamEnd)
    assert end.sample_count == format.at_rate(len(pcm) // 2, RATE)
    chunks = [message for message in rest if isinstance(message, tts_pb2.AudioChunk)]
    assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
    marks = [message for message in rest if isinstance(message, tts_pb2.SegmentMark)]
    assert [mark.spoken_text for mark in marks] == [str(number) for number in range(len(sizes))]
    assert marks[0].start_sample == 0
    assert all(one.end_sample == other.start_sample for one, other in pairwise(marks))
    assert marks[-1].end_sample == end.sample_count


@every_format
async def test_a_mark_follows_the_chunk_that_completes_its_segment(format: Format) -> None:
    told = await converted(Source(plain_messages(speech("en-US"), [9_000] * 8, COMPLETE))(), format)
    starts = [message.start_sample for message in told if isinstance(message, tts_pb2.AudioChunk)]
    heard = 0
    for message in told:
        if isinstance(message, tts_pb2.AudioChunk):
            heard += 1
        if isinstance(message, tts_pb2.SegmentMark) and heard < len(starts):
            assert message.end_sample <= starts[heard]


@every_format
async def test_nothing_is_taken_ahead_of_a_slow_reader(format: Format) -> None:
    source = Source(plain_messages(speech("en-US"), [20_000] * 5, COMPLETE))
    with BackgroundEncoder(Budget(1.0, cores=1)) as encoder:
        async with aclosing(encoded(source(), lambda rate: format, encoder)) as messages:
            async for message in messages:
                if isinstance(message, tts_pb2.AudioChunk):
                    plain_chunks = source.taken // 2  # of start, chunk, mark, chunk, mark …
                    assert message.start_sample >= format.at_rate((plain_chunks - 1) * 20_000, RATE) - RATE // 5


@every_format
async def test_leaving_closes_all_at_once(format: Format) -> None:
    source, budget = Source(plain_messages(speech("en-US"), [20_000] * 5, COMPLETE)), Budget(1.0, cores=1)
    with BackgroundEncoder(budget) as encoder:
        async with aclosing(encoded(source(), lambda rate: format, encoder)) as messages:
            assert isinstance(await anext(messages), tts_pb2.StreamStart)
            assert not source.closed
        assert source.closed
    assert budget.open == 0


@every_format
async def test_a_speech_cut_short_counts_what_was_sent(format: Format) -> None:
    told = await converted(Source(plain_messages(speech("en-US"), [20_000, 20_000], CANCELLED))(), format)
    end = told[-1]
    assert isinstance(end, tts_pb2.StreamEnd)
    with Encoder(format, RATE) as encoder:
        assert audio(told) == encoder.encode(speech("en-US")[:80_000])
        assert end.sample_count == encoder.samples


@every_format
async def test_a_speech_that_ended_before_its_first_audio_stays_as_it_is(format: Format) -> None:
    end = tts_pb2.StreamEnd(finish_reason=CANCELLED)
    assert await converted(Source([end])(), format) == [end]
    assert await converted(Source([])(), format) == []


@every_format
async def test_a_whole_reply_is_its_stream(format: Format) -> None:
    limits = LimitSettings()
    whole = await collected(Source(plain_messages(speech("en-US"), [30_000] * 4, COMPLETE))(), limits)
    with BackgroundEncoder(Budget(1.0, cores=1)) as encoder:
        again = await encoded_whole(whole, lambda rate: format, encoder, limits)
    told = await converted(Source(plain_messages(speech("en-US"), [30_000] * 4, COMPLETE))(), format)
    assert list(again.marks) == [message for message in told if isinstance(message, tts_pb2.SegmentMark)]
    assert again.end == told[-1]
    assert again.start == told[0]
    assert len(again.audio) - len(audio(told)) in (0, 1)  # WAV pads an odd length


@pytest.mark.parametrize("limit", [1.0, 0.999])
async def test_what_is_too_long_for_a_reply_is_refused_when_that_is_known(limit: float) -> None:
    second = speech("en-US")[: 2 * RATE]
    source = Source([*plain_messages(second, [RATE], COMPLETE), *plain_messages(b"", [], COMPLETE)])
    messages = bounded(source(), LimitSettings(unary_audio_seconds=limit))
    if limit < 1:
        with pytest.raises(OutOfRange, match="AUDIO_TOO_LONG"):
            await collected(messages, LimitSettings())
        assert source.closed
    else:
        assert (await collected(messages, LimitSettings())).audio == second


@pytest.mark.parametrize("message_bytes", [400_000, 2**16 + 400_043])
async def test_what_is_too_large_for_a_reply_is_refused(message_bytes: int) -> None:
    limits, wav = LimitSettings(message_bytes=message_bytes), Format(Container.WAV, Codec.PCM_S16LE, RATE)
    source = Source(plain_messages(bytes(400_000), [200_000], COMPLETE))
    whole = await collected(source(), LimitSettings())
    with BackgroundEncoder(Budget(1.0, cores=1)) as encoder:
        with pytest.raises(OutOfRange, match="AUDIO_TOO_LONG"):
            await collected(encoded(source(), lambda rate: wav, encoder), limits)
        with pytest.raises(OutOfRange, match="AUDIO_TOO_LONG"):
            await encoded_whole(whole, lambda rate: wav, encoder, limits)


async def test_no_room_is_told_before_anything_is_asked_for() -> None:
    budget, source = Budget(0.001, cores=1), Source(plain_messages(b"", [], COMPLETE))
    with BackgroundEncoder(budget) as first, BackgroundEncoder(budget) as second:
        reserve(first, MP3, RATE)
        with pytest.raises(ResourceExhausted) as caught:
            reserve(second, MP3, RATE)
    assert (caught.value.reason, caught.value.quota) == ("ENCODERS_BUSY", "encoders")
    assert caught.value.retry_after
    assert source.taken == 0
