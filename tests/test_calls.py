"""What a caller gets: the audio and its facts, ids, deadlines, and a clear word when there is no room."""

from __future__ import annotations

import asyncio
import io
import struct
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2

from common import server as server_module
from common.calls import Context
from common.metadata import Metadata, as_metadata
from common.server import Server as FrameServer
from common.settings import Settings
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from tests.calls import Door, as_stream, check_exhausted, failure, logged, metrics_text, spoken
from tests.stack import Server, Stack, free_port, stream_request, text_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "  大家好，欢迎收听。Now for something in English: it costs 3.5 dollars! \n\n" + "これは日本語の文です。🙂 " * 6
TIMEOUT = grpc.StatusCode.DEADLINE_EXCEEDED
HOLD: dict[str, Any] = {"tone_faults": "long:hold", "tone_step_base_ms": 1, "tone_max_steps": 60_000}
"""A text that says `hold` takes a minute, which nobody foresees."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["gateway", "service"])
async def door(pair: tuple[Server, Server], request: pytest.FixtureRequest) -> Door:
    """Callers come through the gateway, and round it."""
    service, gateway = pair
    return Door(gateway if request.param == "gateway" else service)


def wav_request(text: str, **fields: Any) -> tts_pb2.SynthesizeRequest:
    return tts_pb2.SynthesizeRequest(text=text, **fields)


# --- the audio and its facts


@pytest.mark.parametrize("make", [text_request, wav_request], ids=["raw", "wav"])
async def test_a_stream_says_the_same_as_a_whole(door: Door, make: Any) -> None:
    whole = await door.speech.Synthesize(make(TEXT))
    stream = await spoken(door.speech.StreamSynthesize(as_stream(make(TEXT))))
    header = 44 if make is wav_request else 0
    assert stream.audio[header:] == whole.audio[header:]
    assert stream.marks == list(whole.marks)
    for start in (stream.start, whole.start):
        assert start.request_id
        start.ClearField("request_id")
        start.ClearField("cache_status")
    assert stream.start == whole.start
    for end in (stream.end, whole.end):
        assert 0 <= end.timings.queue_ms <= end.timings.first_audio_ms <= end.timings.total_ms
        end.ClearField("timings")
    assert stream.end == whole.end
    assert whole.end.finish_reason == tts_pb2.FINISH_REASON_COMPLETE
    assert whole.end.sample_count * 2 == len(whole.audio) - header


async def test_a_stream_is_in_order(door: Door) -> None:
    stream = await spoken(door.speech.StreamSynthesize(stream_request(TEXT)))
    assert stream.kinds[0] == "start"
    assert stream.kinds[-1] == "end"
    assert (stream.kinds.count("start"), stream.kinds.count("end")) == (1, 1)
    assert len(stream.marks) > 1
    assert [chunk.sequence for chunk in stream.chunks] == list(range(len(stream.chunks)))
    sample = 0
    for chunk in stream.chunks:
        assert chunk.start_sample == sample
        sample += len(chunk.data) // 2
    assert stream.end.sample_count == sample


@pytest.mark.parametrize("text", [TEXT, "a", "\n\n1\n\n", "é" * 300, "🙂好🙂" * 40])
async def test_marks_cover_the_text_and_the_samples(door: Door, text: str) -> None:
    response = await door.speech.Synthesize(text_request(text))
    byte = sample = 0
    for mark in response.marks:
        assert (mark.start_byte, mark.start_sample) == (byte, sample)
        text.encode()[byte : mark.end_byte].decode()  # no character is cut
        assert mark.spoken_text
        byte, sample = mark.end_byte, mark.end_sample
    assert (byte, sample) == (len(text.encode()), response.end.sample_count)


async def test_a_whole_wav_tells_its_length(door: Door) -> None:
    response = await door.speech.Synthesize(wav_request("hello"))
    with wave.open(io.BytesIO(response.audio)) as file:
        assert file.getparams()[:4] == (1, 2, response.start.format.sample_rate_hertz, response.end.sample_count)
        assert len(file.readframes(file.getnframes())) == 2 * response.end.sample_count
    assert response.start.format == tts_pb2.AudioFormat(
        container=tts_pb2.CONTAINER_WAV, codec=tts_pb2.CODEC_PCM_S16LE, sample_rate_hertz=24_000
    )


async def test_a_streamed_wav_is_of_unknown_length(door: Door) -> None:
    audio = (await spoken(door.speech.StreamSynthesize(as_stream(wav_request("hello"))))).audio
    riff, riff_size, kind = struct.unpack_from("<4sI4s", audio)
    data, data_size = struct.unpack_from("<4sI", audio, 36)
    assert (riff, kind, data) == (b"RIFF", b"WAVE", b"data")
    assert riff_size == data_size == 0xFFFF_FFFF


# --- seeds


async def seed_of(door: Door, request: tts_pb2.SynthesizeRequest) -> int:
    return (await door.speech.Synthesize(request)).start.seed


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
async def test_a_seed_that_is_given_is_used(door: Door, seed: int) -> None:
    assert await seed_of(door, text_request("hi", sampling=tts_pb2.Sampling(seed=seed))) == seed


async def test_a_seed_is_derived_from_what_is_asked_for(door: Door) -> None:
    seed = await seed_of(door, text_request("hi"))
    same = [text_request("hi"), wav_request("hi"), text_request("hi", voice="female1"), text_request(" hi\n")]
    other = [
        text_request("hi!"),
        text_request("hi", voice="male1"),
        text_request("hi", language="en-US"),
        text_request("hi", controls=tts_pb2.Controls(oral=0)),
        text_request("hi", sampling=tts_pb2.Sampling(top_k=5)),
        text_request("hi", refine_text=True),
    ]
    assert {await seed_of(door, request) for request in same} == {seed}
    assert len({await seed_of(door, request) for request in other} | {seed}) == len(other) + 1


async def test_equal_requests_sound_equal_and_another_seed_sounds_other(door: Door) -> None:
    first, again, other = [
        (await door.speech.Synthesize(text_request("hi", sampling=sampling))).audio
        for sampling in (None, None, tts_pb2.Sampling(seed=5))
    ]
    assert first == again
    assert first != other


# --- ids, logs, metrics, health


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123", True),
        ("~" * 128, True),
        ("a" * 129, False),
        ("with blank", False),
        ("", False),
        (None, False),
    ],
)
async def test_request_ids(pair: tuple[Server, Server], door: Door, given: str | None, kept: bool) -> None:
    metadata = () if given is None else (("x-request-id", given),)
    call = door.speech.Synthesize(text_request("hi"), metadata=metadata)
    response = await call
    request_id = response.start.request_id
    assert dict(await call.trailing_metadata())["x-request-id"] == request_id
    assert (request_id == given) == kept
    assert request_id.isprintable()
    assert len(request_id) in range(7, 129)
    if not kept:
        assert (await logged(door.server, request_id))["code"] == "OK"


async def test_a_refused_call_has_an_id_too(door: Door) -> None:
    failed = await failure(door.speech.Synthesize(text_request(""), metadata=(("x-request-id", "refused"),)))
    assert failed.trailers["x-request-id"] == "refused"
    made = await failure(door.channel.unary_unary("/no.Service/Method")(b""))
    assert len(made.trailers["x-request-id"]) == 32


async def test_one_log_line_a_call_without_its_text(pair: tuple[Server, Server]) -> None:
    service, gateway = pair
    door = Door(gateway)
    metadata = [("x-api-key", "tell-nobody"), ("authorization", "Bearer tell-nobody")]
    for number, text in enumerate(("Zanzibar is far.", "Zanzibar" * 1000)):
        call = door.speech.Synthesize(text_request(text), metadata=[*metadata, ("x-request-id", f"line-{number}")])
        code = await call.code()
        for server, tenant in ((gateway, "anyone"), (service, "anyone")):
            line = await logged(server, f"line-{number}")
            assert (line["code"], line["tenant"]) == (code.name, tenant)
            assert line["method"] == "chorus.v1.TextToSpeechService/Synthesize"
            assert ("reason" in line) == (code is not grpc.StatusCode.OK)
    assert (await logged(service, "line-0"))["characters"] == 16
    for server in pair:
        log = server.log_path.read_text()
        assert "Zanzibar" not in log
        assert "tell-nobody" not in log


async def test_metrics_show_calls(pair: tuple[Server, Server]) -> None:
    service, gateway = pair
    door = Door(gateway)
    method = "chorus.v1.VoiceService/GetVoice"
    await door.voices.GetVoice(tts_pb2.GetVoiceRequest(name="male1"))
    await failure(door.voices.GetVoice(tts_pb2.GetVoiceRequest(name="nobody")))
    audio = service.metric("chorus_audio_seconds_total")
    response = await door.speech.Synthesize(text_request("never asked for before"))
    for server in pair:
        await server.until_metric("chorus_calls_active", 0)
        text = metrics_text(server)
        assert f'chorus_calls_total{{code="OK",method="{method}"}} 1.0' in text
        assert f'chorus_calls_total{{code="NOT_FOUND",method="{method}"}} 1.0' in text
        assert f'chorus_call_seconds_count{{method="{method}"}} 2.0' in text
    gained = service.metric("chorus_audio_seconds_total") - audio
    assert gained == pytest.approx(response.end.sample_count / 24_000)


async def test_health_of_each_service(pair: tuple[Server, Server]) -> None:
    service, gateway = pair
    own = ["TextToSpeechService", "VoiceService", "ServerInfoService"]
    for server, names in ((service, own), (gateway, [*own, "JobService"])):
        for name in ("", *(f"chorus.v1.{name}" for name in names)):
            assert await server.health(name) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await server.health("chorus.v1.Nothing")


# --- deadlines


@pytest.mark.asyncio(loop_scope="function")
async def test_a_deadline_that_cannot_be_met_is_refused_at_once(stack: Stack) -> None:
    service, gateway = await stack.pair(tone_step_base_ms=20, limits_deadline_default=8)
    for server in (service, gateway):
        door = Door(server)
        for timeout in (None, 6.0):
            failed = await failure(door.speech.Synthesize(text_request("a" * 300), timeout=timeout))
            assert (failed.code, failed.reason) == (TIMEOUT, "DEADLINE_UNREACHABLE")
    assert 'chorus_batcher_refused_total{reason="late"} 4.0' in metrics_text(service)
    assert service.metric("chorus_batcher_submitted_total") == 1  # the warm-up


async def test_a_priority_is_one_of_two(pair: tuple[Server, Server]) -> None:
    service, gateway = pair
    for server in pair:
        speech = Door(server).speech
        failed = await failure(speech.Synthesize(text_request("hi"), metadata=[("x-chorus-priority", "high")]))
        assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["x-chorus-priority"])
    before = service.metric("chorus_batcher_dispatched_total")
    batch = 'chorus_batcher_dispatched_total{reason="batch"} '
    assert batch + "0.0" in metrics_text(service)
    await Door(gateway).speech.Synthesize(text_request("batch"), metadata=[("x-chorus-priority", "batch")])
    assert batch + "1.0" in metrics_text(service)
    assert service.metric("chorus_batcher_dispatched_total") == before + 1


@pytest.mark.asyncio(loop_scope="function")
async def test_a_call_without_a_deadline_gets_the_default(stack: Stack) -> None:
    service, gateway = await stack.pair(limits_deadline_default=0.5, **HOLD)
    for server in (service, gateway):
        failed = await failure(Door(server).speech.Synthesize(text_request("hold")))
        assert (failed.code, failed.reason) == (TIMEOUT, "DEADLINE_EXCEEDED")
    await service.until_metric("chorus_batcher_requests", 0)


class Recorder(tts_pb2_grpc.VoiceServiceServicer):
    """A backend that notes what it is told."""

    def __init__(self) -> None:
        self.remaining: float | None = None
        self.metadata: Metadata = ()

    async def GetVoice(self, request: tts_pb2.GetVoiceRequest, context: Context) -> tts_pb2.GetVoiceResponse:
        self.remaining = context.time_remaining()
        self.metadata = as_metadata(context.invocation_metadata())
        return tts_pb2.GetVoiceResponse()

    async def ListVoices(self, request: tts_pb2.ListVoicesRequest, context: Context) -> tts_pb2.ListVoicesResponse:
        raise NotImplementedError


@asynccontextmanager
async def recording_backend() -> AsyncIterator[tuple[Recorder, str]]:
    """A backend in this process, and its address."""
    recorder, address = Recorder(), f"127.0.0.1:{free_port()}"
    names = ["chorus.v1.TextToSpeechService", "chorus.v1.VoiceService"]
    server = FrameServer(Settings(), names, identify=lambda metadata, peer: "gateway")
    tts_pb2_grpc.add_VoiceServiceServicer_to_server(recorder, server.methods)
    await server.start(address)
    await server.set_serving(True)
    try:
        yield recorder, address
    finally:
        await server.grpc.stop(None)


@pytest.mark.asyncio(loop_scope="function")
async def test_who_pings_as_often_as_is_permitted_stays_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC's default, 5 minutes, would close the connection at the third ping."""
    monkeypatch.setattr(server_module, "KEEPALIVE_PERMITTED_MS", 1)
    options = [("grpc.keepalive_time_ms", 50), ("grpc.http2.max_pings_without_data", 0)]  # gRPC makes it each second
    async with recording_backend() as (_, address), grpc.aio.insecure_channel(address, options) as channel:
        watch: Any = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=bytes,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(b"")
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(TimeoutError):  # for the time of five pings nothing comes, not even an end
            await asyncio.wait_for(watch.read(), 5.0)


@pytest.mark.asyncio(loop_scope="function")
async def test_what_a_backend_is_told(stack: Stack) -> None:
    async with recording_backend() as (recorder, address):
        limits: dict[str, Any] = {
            "limits_deadline_default": 400,
            "limits_deadline_max": 600,
            "gateway_deadline_margin": 100,
        }
        gateway = await stack.gateway(gateway_backends=address, secret="between-us", **limits)
        door = Door(gateway)
        mine = [("x-request-id", "mine-1"), ("x-api-key", "k"), ("x-chorus-internal-tenant", "me"), ("x-other", "o")]
        mine.append(("x-chorus-priority", "batch"))
        for timeout, passed in ((None, 300), (300, 200), (9000, 500)):
            await door.voices.GetVoice(tts_pb2.GetVoiceRequest(), metadata=mine, timeout=timeout)
            assert recorder.remaining is not None
            # gRPC rounds long deadlines up to three digits, on each way.
            assert passed - 60 < recorder.remaining < passed + 10
        told = {key: value for key, value in recorder.metadata if key.startswith("x-")}
        assert told == {
            "x-request-id": "mine-1",
            "x-chorus-priority": "batch",
            "x-chorus-internal-tenant": "anyone",
            "x-chorus-internal-secret": "between-us",
        }
        failed = await failure(door.voices.GetVoice(tts_pb2.GetVoiceRequest(), timeout=90))
        assert (failed.code, failed.reason) == (TIMEOUT, "DEADLINE_UNREACHABLE")


# --- no room


@pytest.mark.asyncio(loop_scope="function")
async def test_too_many_calls(stack: Stack) -> None:
    service = await stack.service(limits_concurrent_calls=1, **HOLD)
    gateway = await stack.gateway(service)
    narrow = await stack.gateway(service, limits_concurrent_calls=1)
    held = Door(narrow).speech.StreamSynthesize(stream_request("hold"))
    await anext(aiter(held))
    for server in (service, gateway, narrow):
        check_exhausted(
            await failure(Door(server).speech.Synthesize(text_request("hi"))), "TOO_MANY_CALLS", "concurrent_calls"
        )
        assert await server.health() == health_pb2.HealthCheckResponse.SERVING
    held.cancel()
    await service.until_metric("chorus_calls_active", 0)
    await narrow.until_metric("chorus_calls_active", 0)
    assert await Door(narrow).speech.Synthesize(text_request("hi"))


@pytest.mark.asyncio(loop_scope="function")
async def test_a_full_queue(stack: Stack, tmp_path: Path) -> None:
    service, gateway = await stack.pair(tone_slots=1, batcher_max_waiting=1, batcher_max_delay=1000, **HOLD)
    door = Door(gateway)
    held = door.speech.StreamSynthesize(stream_request("hold"))
    await anext(aiter(held))
    waiting = door.speech.StreamSynthesize(stream_request("hi"))
    await service.until_metric("chorus_batcher_waiting", 1)
    for server in (service, gateway):
        check_exhausted(await failure(Door(server).speech.Synthesize(text_request("ho"))), "QUEUE_FULL", "queue")
    held.cancel()
    assert (await spoken(waiting)).end.sample_count
    assert 'chorus_batcher_refused_total{reason="full"} 2.0' in metrics_text(service)
