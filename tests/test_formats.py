"""Every format, through a gateway and round it: the same facts as for plain samples, at the format's own rate.

Gateways encode what they forward, services what they are asked directly: nobody can tell who did.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import pytest_asyncio

from audio.formats import SERVED, Codec, Container, Format, resolve
from audio.headers import with_known_length
from common.speech import wire_format
from protos.chorus.v1 import tts_pb2
from tests.calls import Door, as_stream, spoken
from tests.decoders import by_ffmpeg
from tests.stack import Server

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGINE_RATE = 24_000
TEXT = "The first sentence is about as long as this. The second one is not. And here comes the third of them."
FORMATS = [resolve(container, codec, 0, ENGINE_RATE) for container, codec in SERVED]
FORMATS += [Format(Container.WAV, Codec.PCM_S16LE, rate) for rate in (8_000, 44_100)]

every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(pair: tuple[Server, Server]) -> Door:
    return Door(pair[1])


def asking(format: Format) -> tts_pb2.SynthesizeRequest:
    return tts_pb2.SynthesizeRequest(text=TEXT, format=wire_format(format))


@every_format
async def test_marks_and_counts_are_told_at_the_rate_in_effect(door: Door, format: Format) -> None:
    plain = Format(Container.RAW, Codec.PCM_S16LE, ENGINE_RATE)
    reference = await door.speech.Synthesize(asking(plain))
    response = await door.speech.Synthesize(asking(format))
    assert response.start.format == wire_format(format)
    assert response.end.sample_count == format.at_rate(reference.end.sample_count, ENGINE_RATE)
    assert len(response.marks) > 1
    for mark, at_engine_rate in zip(response.marks, reference.marks, strict=True):
        assert mark.start_sample == format.at_rate(at_engine_rate.start_sample, ENGINE_RATE)
        assert mark.end_sample == format.at_rate(at_engine_rate.end_sample, ENGINE_RATE)
    decoded = len(by_ffmpeg(response.audio, format)) * (0.5 if format.codec is Codec.OPUS else 1)
    assert decoded >= response.end.sample_count + format.delay_samples


@every_format
async def test_a_stream_is_the_same_file_in_order(door: Door, format: Format) -> None:
    whole = await door.speech.Synthesize(asking(format))
    stream = await spoken(door.speech.StreamSynthesize(as_stream(asking(format))))
    assert with_known_length(stream.audio, format, stream.end.sample_count) == whole.audio
    assert stream.marks == list(whole.marks)
    starts = [chunk.start_sample for chunk in stream.chunks]
    assert starts[0] == 0
    assert all(first < second for first, second in pairwise(starts))


@every_format
async def test_a_mark_comes_after_the_last_audio_of_its_segment(door: Door, format: Format) -> None:
    stream = await spoken(door.speech.StreamSynthesize(as_stream(asking(format))))
    starts = [*(chunk.start_sample for chunk in stream.chunks), stream.end.sample_count]
    chunks, marks = 0, iter(stream.marks)
    for kind in stream.kinds:
        chunks += kind == "chunk"
        if kind == "mark":
            assert next(marks).end_sample <= starts[chunks]


async def test_the_server_tells_each_format_with_its_default_rate(door: Door) -> None:
    info = await door.info.GetServerInfo(tts_pb2.GetServerInfoRequest())
    assert list(info.formats) == [wire_format(resolve(*served, 0, ENGINE_RATE)) for served in SERVED]
