"""A gateway that encodes: what it asks for, whom it has room for, what it holds for those who leave or wait."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from audio.formats import SERVED, Codec, Container, Format, resolve
from common.calls import Context
from common.server import Server as FrameServer
from common.settings import Settings
from common.speech import wire_format
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from tests.calls import Door, as_stream, check_exhausted, failure, spoken
from tests.hearing import LANGUAGE
from tests.stack import Server, Stack, free_port

RATE = 22_050
PLAIN = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW, codec=tts_pb2.CODEC_PCM_S16LE)
FAULTY = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_OGG, codec=tts_pb2.CODEC_MP3, sample_rate_hertz=7)
MP3 = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_MP3)
WAV = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_WAV)
LARGE = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW, sample_rate_hertz=48_000)
"""Encoded, and larger than what the service sends."""
LONG_TEXT = "This sentence is one of many that are spoken one after another. " * 40
SLOW: dict[str, Any] = {"tone_step_base_ms": 4}
HOLD: dict[str, Any] = {"tone_faults": "long:hold", "tone_step_base_ms": 1, "tone_max_steps": 60_000}
"""A text that says `hold` takes a minute."""

Written = tts_pb2.StreamSynthesizeTextRequest


def asking(text: str, format: tts_pb2.AudioFormat) -> tts_pb2.SynthesizeRequest:
    return tts_pb2.SynthesizeRequest(text=text, format=format, language=LANGUAGE)


async def writing(text: str, format: tts_pb2.AudioFormat) -> AsyncIterator[Written]:
    yield Written(config=tts_pb2.StreamConfig(format=format, language=LANGUAGE))
    yield Written(text=text)


async def replies(
    call: grpc.aio.StreamStreamCall[Written, tts_pb2.StreamSynthesizeTextResponse],
) -> AsyncIterator[tts_pb2.StreamSynthesizeTextResponse]:
    """The rest of a call that was read and written by hand."""
    while isinstance(reply := await call.read(), tts_pb2.StreamSynthesizeTextResponse):
        yield reply


# --- what a backend is asked for


class Recorder(tts_pb2_grpc.TextToSpeechServiceServicer):
    """A backend that notes which formats it is asked for, and says 10 ms of silence in plain samples."""

    def __init__(self) -> None:
        self.asked: list[tts_pb2.AudioFormat] = []

    async def Synthesize(self, request: tts_pb2.SynthesizeRequest, context: Context) -> tts_pb2.SynthesizeResponse:
        self.asked.append(request.format)
        return tts_pb2.SynthesizeResponse(audio=bytes(882), start=self._start(), end=self._end())

    async def StreamSynthesize(
        self, request: tts_pb2.StreamSynthesizeRequest, context: Context
    ) -> AsyncIterator[tts_pb2.StreamSynthesizeResponse]:
        self.asked.append(request.format)
        yield tts_pb2.StreamSynthesizeResponse(start=self._start())
        yield tts_pb2.StreamSynthesizeResponse(chunk=tts_pb2.AudioChunk(data=bytes(882)))
        yield tts_pb2.StreamSynthesizeResponse(end=self._end())

    async def StreamSynthesizeText(
        self, request: AsyncIterator[Written], context: Context
    ) -> AsyncIterator[tts_pb2.StreamSynthesizeTextResponse]:
        messages = [message async for message in request]
        assert [message.WhichOneof("message") for message in messages] == ["config", "text"]
        self.asked.append(messages[0].config.format)
        yield tts_pb2.StreamSynthesizeTextResponse(start=self._start())
        yield tts_pb2.StreamSynthesizeTextResponse(chunk=tts_pb2.AudioChunk(data=bytes(882)))
        yield tts_pb2.StreamSynthesizeTextResponse(end=self._end())

    async def NormalizeText(
        self, request: tts_pb2.NormalizeTextRequest, context: Context
    ) -> tts_pb2.NormalizeTextResponse:
        raise NotImplementedError

    def _start(self) -> tts_pb2.StreamStart:
        return tts_pb2.StreamStart(format=wire_format(Format(Container.RAW, Codec.PCM_S16LE, RATE)))

    def _end(self) -> tts_pb2.StreamEnd:
        return tts_pb2.StreamEnd(sample_count=441, finish_reason=tts_pb2.FINISH_REASON_COMPLETE)


@asynccontextmanager
async def recording_backend() -> AsyncIterator[tuple[Recorder, str]]:
    """A backend in this process, and its address."""
    recorder, address = Recorder(), f"127.0.0.1:{free_port()}"
    server = FrameServer(Settings(), ["chorus.v1.TextToSpeechService"], identify=lambda metadata, peer: "gateway")
    tts_pb2_grpc.add_TextToSpeechServiceServicer_to_server(recorder, server.methods)
    await server.start(address)
    await server.set_serving(True)
    try:
        yield recorder, address
    finally:
        await server.grpc.stop(None)


async def test_a_backend_is_asked_for_plain_samples_at_its_own_rate(stack: Stack) -> None:
    async with recording_backend() as (recorder, address):
        door = Door(await stack.gateway(gateway_backends=address))
        for container, codec in SERVED:
            for rate in (0, 8_000):
                format = resolve(container, codec, rate, RATE)
                asked = tts_pb2.AudioFormat(
                    container=wire_format(format).container, codec=wire_format(format).codec, sample_rate_hertz=rate
                )
                request = asking("hi", asked)
                whole = await door.speech.Synthesize(request)
                stream = await spoken(door.speech.StreamSynthesize(as_stream(request)))
                dialogue = await spoken(door.speech.StreamSynthesizeText(writing("hi", asked), timeout=10))
                for start, end in (
                    (whole.start, whole.end),
                    (stream.start, stream.end),
                    (dialogue.start, dialogue.end),
                ):
                    assert start.format == wire_format(format)
                    assert end.sample_count == format.at_rate(441, RATE)
                assert recorder.asked == [PLAIN] * 3
                recorder.asked.clear()


async def test_a_faulty_format_is_forwarded_as_it_is(stack: Stack) -> None:
    async with recording_backend() as (recorder, address):
        door = Door(await stack.gateway(gateway_backends=address))
        await door.speech.Synthesize(asking("hi", FAULTY))
        await spoken(door.speech.StreamSynthesize(as_stream(asking("hi", FAULTY))))
        await spoken(door.speech.StreamSynthesizeText(writing("hi", FAULTY), timeout=10))
        assert recorder.asked == [FAULTY] * 3


# --- room


async def test_no_more_are_let_in_than_can_be_encoded(stack: Stack) -> None:
    service, gateway = await stack.pair(limits_encoder_load=0.0001, **HOLD)
    for server in (gateway, service):
        door = Door(server)
        held = door.speech.StreamSynthesize(as_stream(asking("hold", MP3)))
        await anext(aiter(held))
        assert server.metric("chorus_encoders_open") == 1
        submitted = service.metric("chorus_batcher_submitted_total")
        for call in (
            door.speech.Synthesize(asking("hi", MP3)),
            spoken(door.speech.StreamSynthesize(as_stream(asking("hi", MP3)))),
            spoken(door.speech.StreamSynthesizeText(writing("hi", MP3), timeout=30)),
        ):
            check_exhausted(await failure(call), "ENCODERS_BUSY", "encoders")
        assert service.metric("chorus_batcher_submitted_total") == submitted  # no engine worked for nothing
        assert server.metric("chorus_encoders_refused_total") == 3
        for format in (PLAIN, WAV):
            assert (await door.speech.Synthesize(asking("hi", format))).audio
            assert (await spoken(door.speech.StreamSynthesizeText(writing("hi", format), timeout=30))).audio
        held.cancel()
        await server.until_metric("chorus_encoders_open", 0)
        assert server.metric("chorus_encoders_load") == 0
        assert (await door.speech.Synthesize(asking("hi", MP3))).audio
        assert server.metric("chorus_encoders_cpu_seconds_total") > 0


# --- those who leave, and those who wait


async def check_nothing_is_left(service: Server, gateway: Server) -> None:
    await gateway.until_metric("chorus_encoders_open", 0)
    await gateway.until_metric("chorus_calls_active", 0)
    await service.until_metric("chorus_batcher_requests", 0)
    await service.until_metric("chorus_calls_active", 0)
    assert service.metric("chorus_batcher_slots_free") == 64


async def test_whoever_cancels_leaves_nothing_behind(stack: Stack) -> None:
    service, gateway = await stack.pair(**SLOW)
    door = Door(gateway)
    for _ in range(5):
        stream = door.speech.StreamSynthesize(as_stream(asking(LONG_TEXT, MP3)))
        dialogue = door.speech.StreamSynthesizeText(timeout=30)
        async for message in writing(LONG_TEXT, MP3):
            await dialogue.write(message)
        await anext(aiter(stream))
        await dialogue.read()
        stream.cancel()
        dialogue.cancel()
    whole = door.speech.Synthesize(asking("hello " * 20, MP3))
    await gateway.until_metric("chorus_encoders_open", 1)
    whole.cancel()
    await check_nothing_is_left(service, gateway)
    assert service.metric("chorus_batcher_cancel_ticks_max") <= 1


async def test_a_deadline_leaves_nothing_behind(stack: Stack) -> None:
    service, gateway = await stack.pair(**HOLD)
    door = Door(gateway)
    for call in (
        spoken(door.speech.StreamSynthesize(as_stream(asking("hold", MP3)), timeout=1)),
        spoken(door.speech.StreamSynthesizeText(writing("hold", MP3), timeout=1)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await check_nothing_is_left(service, gateway)


@pytest.mark.parametrize("format", [MP3, LARGE], ids=["mp3", "large"])
async def test_barge_in_ends_with_what_was_sent(stack: Stack, format: tts_pb2.AudioFormat) -> None:
    service, gateway = await stack.pair(**SLOW)
    for server in (gateway, service):
        dialogue = Door(server).speech.StreamSynthesizeText(timeout=30)
        async for message in writing(LONG_TEXT, format):
            await dialogue.write(message)
        chunk = await dialogue.read()
        while not (isinstance(chunk, tts_pb2.StreamSynthesizeTextResponse) and chunk.chunk.data):
            chunk = await dialogue.read()
        await dialogue.write(Written(cancel=tts_pb2.Cancel()))
        heard = await spoken(replies(dialogue))
        assert heard.kinds[-1] == "end"
        assert heard.end.finish_reason == tts_pb2.FINISH_REASON_CANCELLED
        last = [chunk.chunk, *heard.chunks][-1]
        assert heard.end.sample_count > last.start_sample
        if format is LARGE:
            assert heard.end.sample_count == last.start_sample + len(last.data) // 2
        await server.until_metric("chorus_encoders_open", 0)
    await check_nothing_is_left(service, gateway)


async def test_a_writer_who_never_says_how_holds_no_encoder(stack: Stack) -> None:
    service, gateway = await stack.pair()
    dialogue = Door(gateway).speech.StreamSynthesizeText(timeout=1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await spoken(dialogue)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await check_nothing_is_left(service, gateway)


async def test_nothing_piles_up_for_a_slow_reader(stack: Stack) -> None:
    service, gateway = await stack.pair(batcher_outbox_seconds=1.0)
    stub = gateway.stub(**{"http2.lookahead_bytes": 65_536, "http2.bdp_probe": 0})
    request = asking("A reader who does not read. " * 170, LARGE)
    call = stub.StreamSynthesize(as_stream(request), timeout=60)
    await anext(aiter(call))
    # While it does not read, others are served, so that there was time to run ahead.
    for number in range(20):
        assert (await gateway.stub().Synthesize(asking(f"Number {number}.", MP3), timeout=10)).audio
    made = service.metric("chorus_batcher_samples_total") - 20 * 20_000
    encoded = gateway.metric("chorus_encoders_audio_seconds_total")
    assert made / 24_000 < 60
    assert encoded < 60
    await service.until_metric("chorus_batcher_rows", 0)
    heard = await spoken(call)
    assert heard.kinds[-1] == "end"
    assert heard.end.sample_count > 48_000 * 600
