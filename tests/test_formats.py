"""Every format, through a gateway and round it: the same facts as for plain samples, at the format's own rate.

Gateways encode what they forward, services what they are asked directly: nobody can tell who did.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from audio.formats import SERVED, Codec, Container, Format, resolve
from audio.headers import with_known_length
from common.speech import wire_format
from protos.chorus.v1 import tts_pb2
from tests.calls import Door, Spoken, as_stream, failure, spoken
from tests.decoders import by_ffmpeg
from tests.stack import Server, Stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGINE_RATE = 24_000
TEXT = "The first sentence is about as long as this. The second one is not. And here comes the third of them."
FORMATS = [resolve(container, codec, 0, ENGINE_RATE) for container, codec in SERVED]
FORMATS += [Format(Container.WAV, Codec.PCM_S16LE, rate) for rate in (8_000, 44_100)]

every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["gateway", "service"])
async def door(pair: tuple[Server, Server], request: pytest.FixtureRequest) -> Door:
    service, gateway = pair
    return Door(gateway if request.param == "gateway" else service)


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


# --- nobody can tell who encoded

ASKED = [wire_format(format) for format in FORMATS]
ASKED += [
    tts_pb2.AudioFormat(),
    *(tts_pb2.AudioFormat(container=format.container, codec=format.codec) for format in ASKED[: len(SERVED)]),
]


def dialogue(
    door: Door, format: tts_pb2.AudioFormat, text: str = TEXT
) -> AsyncIterable[tts_pb2.StreamSynthesizeTextResponse]:
    async def written() -> AsyncIterator[tts_pb2.StreamSynthesizeTextRequest]:
        yield tts_pb2.StreamSynthesizeTextRequest(config=tts_pb2.StreamConfig(format=format))
        for word in text.split():
            yield tts_pb2.StreamSynthesizeTextRequest(text=word + " ")

    return door.speech.StreamSynthesizeText(written(), timeout=30)


def without_its_call(speech: Spoken) -> Spoken:
    """A speech without what every call has its own of, its chunks joined."""
    speech.start.ClearField("request_id")
    speech.start.ClearField("cache_status")
    speech.end.ClearField("timings")
    speech.chunks = [tts_pb2.AudioChunk(data=speech.audio)]
    speech.kinds = []
    return speech


@pytest.mark.parametrize("format", ASKED, ids=lambda format: str(format).replace("\n", " "))
async def test_a_speech_is_the_same_through_a_gateway_and_round_it(
    pair: tuple[Server, Server], format: tts_pb2.AudioFormat
) -> None:
    request = tts_pb2.SynthesizeRequest(text=TEXT, format=format)
    wholes, streams, dialogues = [], [], []
    for server in pair:
        door = Door(server)
        whole = await door.speech.Synthesize(request)
        whole.start.ClearField("request_id")
        whole.start.ClearField("cache_status")
        whole.end.ClearField("timings")
        wholes.append(whole)
        streams.append(without_its_call(await spoken(door.speech.StreamSynthesize(as_stream(request)))))
        dialogues.append(without_its_call(await spoken(dialogue(door, format))))
    assert wholes[0] == wholes[1]
    assert streams[0] == streams[1]
    assert dialogues[0] == dialogues[1]
    assert len(wholes[0].audio) > 1000
    assert len(dialogues[0].marks) > 1


@pytest.mark.parametrize(
    "format",
    [
        tts_pb2.AudioFormat(container=9999, codec=9999, sample_rate_hertz=1),  # type: ignore[arg-type]
        tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_OGG, codec=tts_pb2.CODEC_MP3, sample_rate_hertz=9_999),
        tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_MP3, sample_rate_hertz=-1),
        tts_pb2.AudioFormat(codec=tts_pb2.CODEC_ALAW, sample_rate_hertz=16_000),
    ],
    ids=str,
)
async def test_a_faulty_format_is_told_with_all_other_faults(
    pair: tuple[Server, Server], format: tts_pb2.AudioFormat
) -> None:
    request = tts_pb2.SynthesizeRequest(text="", voice="nobody", format=format)
    told = [(failed.reason, failed.message) for server in pair for failed in await Door(server).both(request)]
    assert len(set(told)) == 1
    assert told[0][0] == "INVALID_FIELDS"
    assert all(field in told[0][1] for field in ("text", "voice", "format."))
    written = [await failure(spoken(dialogue(Door(server), format, text=""))) for server in pair]
    assert written[0].message == written[1].message
    assert all(field.startswith("config.format.") for field in written[0].fields)


LARGE = [Format(container, Codec.PCM_S16LE, 48_000) for container in (Container.WAV, Container.RAW)]


@pytest.mark.asyncio(loop_scope="function")
@pytest.mark.parametrize(
    ("audio_seconds", "limit_seconds", "formats"),
    [(21, 10, FORMATS), (21, 60, FORMATS[:8]), (11, 60, LARGE)],
    ids=["seconds", "plain samples larger than a message", "encoded larger than a message"],
)
async def test_audio_too_long_for_a_reply_is_refused_alike(
    stack: Stack, tmp_path: Path, audio_seconds: int, limit_seconds: int, formats: list[Format]
) -> None:
    trace = tmp_path / "rows"
    trace.write_text("1\n" + f"{audio_seconds * 47}\n" * 100)  # the first is spoken when the service warms up
    pair = await stack.pair(limits_unary_audio_seconds=limit_seconds, limits_message_bytes=1_000_000, tone_trace=trace)
    for format in formats:
        request = tts_pb2.SynthesizeRequest(text="short", format=wire_format(format))
        told = [await failure(Door(server).speech.Synthesize(request)) for server in pair]
        assert {failed.code for failed in told} == {grpc.StatusCode.OUT_OF_RANGE}
        assert {failed.reason for failed in told} == {"AUDIO_TOO_LONG"}
        assert told[0].message == told[1].message
    smaller = tts_pb2.SynthesizeRequest(text="short", format=wire_format(FORMATS[0]))
    for server in pair if formats is LARGE else ():
        assert (await Door(server).speech.Synthesize(smaller)).audio


@pytest.mark.asyncio(loop_scope="function")
async def test_a_hit_that_is_too_long_for_a_reply(stack: Stack, tmp_path: Path) -> None:
    trace = tmp_path / "rows"
    trace.write_text("1\n" + f"{21 * 47}\n" * 100)
    _, gateway = await stack.pair(limits_unary_audio_seconds=10, tone_trace=trace)
    door = Door(gateway)
    for status in (tts_pb2.CACHE_STATUS_MISS, tts_pb2.CACHE_STATUS_HIT):
        heard = await spoken(door.speech.StreamSynthesize(tts_pb2.StreamSynthesizeRequest(text="short")))
        assert heard.start.cache_status == status
    for format in (tts_pb2.AudioFormat(), tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)):
        failed = await failure(door.speech.Synthesize(tts_pb2.SynthesizeRequest(text="short", format=format)))
        assert (failed.code, failed.reason) == (grpc.StatusCode.OUT_OF_RANGE, "AUDIO_TOO_LONG")
