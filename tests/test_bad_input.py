"""Whatever a caller sends, the answer says what is wrong with it, and nothing of what is inside."""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from structlog.testing import capture_logs

from common import calls
from common.calls import Context
from common.errors import DEBUG_BYTES
from common.server import Server as FrameServer
from common.settings import Settings
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from tests.calls import Door, as_stream, drain, failure, logged, metrics_text
from tests.stack import Server, Stack, free_port, stream_request, text_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEECH = "/chorus.v1.TextToSpeechService"
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["gateway", "service"])
async def door(pair: tuple[Server, Server], request: pytest.FixtureRequest) -> Door:
    """Callers come through the gateway, and round it."""
    service, gateway = pair
    return Door(gateway if request.param == "gateway" else service)


def asking(text: str = "hello", **fields: Any) -> tts_pb2.SynthesizeRequest:
    """A request with `group__leaf=value`."""
    request = tts_pb2.SynthesizeRequest(text=text)
    for path, value in fields.items():
        group, _, leaf = path.rpartition("__")
        setattr(getattr(request, group) if group else request, leaf, value)
    return request


# --- fields

SINGLE_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"text": ""}, "text"),
    "blanks": ({"text": " \t\n\u3000"}, "text"),
    "symbols": ({"text": "。！？… --- 🙂"}, "text"),
    "too many characters": ({"text": "好" * 5001}, "text"),
    "far too many characters": ({"text": "a" * 1_000_000}, "text"),
    "unknown voice": ({"voice": "nobody"}, "voice"),
    "a voice in capitals": ({"voice": "FEMALE1"}, "voice"),
    "unknown language": ({"language": "tlh"}, "language"),
    "no language": ({"language": "!"}, "language"),
    "unknown container": ({"format__container": 99}, "format.container"),
    "negative container": ({"format__container": -1}, "format.container"),
    "unknown codec": ({"format__codec": 99}, "format.codec"),
    **{
        f"{rate} Hz": ({"format__sample_rate_hertz": rate}, "format.sample_rate_hertz")
        for rate in (-1, 1, 7999, 48_001, 2**31 - 1)
    },
}

FLOATS: dict[str, tuple[float | None, float]] = {
    "controls__speed": (0.5, 2.0),
    "sampling__temperature": (0.00001, 2.0),
    "sampling__top_p": (None, 1.0),
    "sampling__repetition_penalty": (1.0, 2.0),
}
INTEGERS: dict[str, tuple[float, float]] = {
    "controls__oral": (0, 9),
    "controls__laugh": (0, 2),
    "controls__pause": (0, 7),
    "sampling__top_k": (1, 625),
}


def out_of_range() -> dict[str, tuple[dict[str, Any], str]]:
    """Values just outside of each range, and those outside of all."""
    cases: dict[str, list[float]] = {}
    for path, (lowest, highest) in FLOATS.items():
        below = [0.0] if lowest is None else [lowest * 0.999]
        cases[path] = [*below, highest * 1.001, -1.0, math.nan, math.inf, -math.inf]
    for path, ends in INTEGERS.items():
        cases[path] = [ends[0] - 1, ends[1] + 1, -(2**31), 2**31 - 1]
    return {
        f"{path}={value}": ({path: value}, path.replace("__", "."))
        for path, values in cases.items()
        for value in values
    }


@pytest.mark.parametrize(("fields", "faulty"), (cases := SINGLE_FAULTS | out_of_range()).values(), ids=cases.keys())
async def test_a_faulty_field_is_named(door: Door, fields: dict[str, Any], faulty: str) -> None:
    for failed in await door.both(asking(**fields)):
        assert failed.code is INVALID
        assert failed.reason == "INVALID_FIELDS"
        assert set(failed.fields) == {faulty}
        assert faulty in failed.message


async def test_the_ends_of_each_range_are_inside(door: Door) -> None:
    for path, (lowest, highest) in {**FLOATS, **INTEGERS}.items():
        for value in (1e-30 if lowest is None else lowest, highest):
            assert (await door.speech.Synthesize(asking("hello", **{path: value}))).audio


async def test_formats_that_do_not_go_together(door: Door) -> None:
    info = await door.info.GetServerInfo(tts_pb2.GetServerInfoRequest())
    served = {(format.container, format.codec) for format in info.formats}
    holders = {container for container, _ in served}
    taken = served | {(container, tts_pb2.CODEC_UNSPECIFIED) for container in holders}
    taken |= {
        (tts_pb2.CONTAINER_UNSPECIFIED, codec) for container, codec in taken if container == tts_pb2.CONTAINER_WAV
    }
    for container in tts_pb2.Container.values():
        for codec in tts_pb2.Codec.values():
            request = asking(format__container=container, format__codec=codec)
            if (container, codec) in taken:
                format = (await door.speech.Synthesize(request)).start.format
                assert (format.container, format.codec) in served
            else:
                known = container in holders or container == tts_pb2.CONTAINER_UNSPECIFIED
                failed = await failure(door.speech.Synthesize(request))
                assert failed.code is INVALID
                assert failed.fields == ["format.codec" if known else "format.container"]


EVERY_FAULT = {
    "voice": "?",
    "language": "?",
    "format__container": 98,
    "format__codec": 99,
    "format__sample_rate_hertz": 7,
    "controls__speed": math.nan,
    "controls__oral": -1,
    "controls__laugh": 3,
    "controls__pause": 8,
    "sampling__temperature": math.inf,
    "sampling__top_p": 0.0,
    "sampling__top_k": 0,
    "sampling__repetition_penalty": -math.inf,
}


@pytest.mark.parametrize("text", ["", "." * 6000])
async def test_all_faults_are_named_at_once(door: Door, text: str) -> None:
    for failed in await door.both(asking(text, **EVERY_FAULT)):
        assert failed.code is INVALID
        assert set(failed.fields) == {"text", *(path.replace("__", ".") for path in EVERY_FAULT)}
        assert len(failed.all(error_details_pb2.ErrorInfo)) == 1


async def test_odd_texts_are_spoken(door: Door) -> None:
    for text in ("a\0b", "\u202eabc\u202c", "\ufeff1", "e\u0301", "👩‍👩‍👧‍👦 hi", "x" * 100):
        response = await door.speech.Synthesize(asking(text))
        assert (response.marks[0].start_byte, response.marks[-1].end_byte) == (0, len(text.encode()))


# --- voices


@pytest.mark.parametrize(
    ("fields", "faulty"),
    [
        ({"page_size": -1}, ["page_size"]),
        ({"page_size": 1001}, ["page_size"]),
        ({"page_token": "nobody"}, ["page_token"]),
        ({"page_size": -5, "page_token": "nobody"}, ["page_size", "page_token"]),
    ],
)
async def test_bad_pages(door: Door, fields: dict[str, Any], faulty: list[str]) -> None:
    failed = await failure(door.voices.ListVoices(tts_pb2.ListVoicesRequest(**fields)))
    assert (failed.code, failed.reason, failed.fields) == (INVALID, "INVALID_FIELDS", faulty)


async def test_pages_join_to_the_whole_list(door: Door) -> None:
    whole = await door.voices.ListVoices(tts_pb2.ListVoicesRequest(page_size=1000))
    names: list[str] = []
    token = ""
    while token or not names:
        page = await door.voices.ListVoices(tts_pb2.ListVoicesRequest(page_size=3, page_token=token))
        names += [voice.name for voice in page.voices]
        token = page.next_page_token
    assert names == [voice.name for voice in whole.voices] == sorted(names)


@pytest.mark.parametrize("name", ["", "nobody", "n\0\n\x7f", "n" * 100_000, "没" * 20_000])
async def test_an_unknown_voice_is_not_found(door: Door, name: str) -> None:
    failed = await failure(door.voices.GetVoice(tts_pb2.GetVoiceRequest(name=name)))
    assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "VOICE_NOT_FOUND")
    assert "female1" in failed.message


# --- audio that does not fit a reply

LONG_TEXT = "And so it goes, on and on. " * 20


async def test_text_that_is_bound_to_be_too_long_for_a_reply(door: Door) -> None:
    failed = await failure(door.speech.Synthesize(text_request(LONG_TEXT)))
    assert (failed.code, failed.reason, failed.fields) == (INVALID, "AUDIO_TOO_LONG", ["text"])
    assert "StreamSynthesize" in failed.message
    assert "CreateJob" in failed.message
    call = door.speech.StreamSynthesize(stream_request(LONG_TEXT))
    assert (await anext(aiter(call))).WhichOneof("message") == "start"
    call.cancel()


@pytest.mark.asyncio(loop_scope="function")
async def test_audio_that_turns_out_too_long_ends_when_that_is_known(stack: Stack, tmp_path: Path) -> None:
    trace = tmp_path / "rows"
    trace.write_text("1\n100000\n")  # the first is spoken when the service warms up
    costs = {"tone_trace": trace, "tone_max_steps": 100_000, "tone_step_base_ms": 1}
    service, gateway = await stack.pair(limits_unary_audio_seconds=10, **costs)
    door = Door(gateway)
    failed = await failure(door.speech.Synthesize(text_request("short")))
    assert (failed.code, failed.reason) == (grpc.StatusCode.OUT_OF_RANGE, "AUDIO_TOO_LONG")
    assert "StreamSynthesize" in failed.message
    await service.until_metric("chorus_batcher_requests", 0)
    await service.until_metric("chorus_batcher_slots_free", 64)
    assert service.metric("chorus_batcher_row_steps_total") < 50_000
    assert (await door.speech.Synthesize(text_request("short"))).end.sample_count == 512


# --- what is no call of ours


async def test_a_message_above_the_limit_is_refused_by_grpc_itself(door: Door) -> None:
    failed = await failure(door.speech.Synthesize(asking("a" * 4 * 1024 * 1024)))
    assert (failed.code, failed.status) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)


@pytest.mark.parametrize("path", [f"{SPEECH}/Sing", "/chorus.v9.Nothing/Nothing", "/a/b/c", f"/x.Y/{'Z' * 5000}"])
async def test_unknown_methods(door: Door, path: str) -> None:
    for call in (door.channel.unary_unary(path)(b"?"), drain(door.channel.unary_stream(path)(b""))):
        failed = await failure(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNIMPLEMENTED, "METHOD_NOT_FOUND")
    assert path not in metrics_text(door.server), "each name that callers invent would stay in memory"


async def test_calls_that_are_not_served_yet(door: Door) -> None:
    jobs = door.jobs
    for call in (
        jobs.CreateJob(tts_pb2.CreateJobRequest(text="hi")),
        jobs.GetJob(tts_pb2.GetJobRequest()),
        jobs.ListJobs(tts_pb2.ListJobsRequest()),
        jobs.CancelJob(tts_pb2.CancelJobRequest()),
        drain(jobs.WatchJob(tts_pb2.WatchJobRequest())),
        drain(jobs.ReadJobAudio(tts_pb2.ReadJobAudioRequest())),
    ):
        failed = await failure(call)
        assert failed.code is grpc.StatusCode.UNIMPLEMENTED
        assert failed.reason in ("NOT_YET_SERVED", "METHOD_NOT_FOUND")


GARBAGE = [b"\xff\xff\xff", b"\x0a\x05abc", b"\x0a\x02\xff\xfe", struct.pack("<Q", 2**63 + 7)]


@pytest.mark.parametrize("data", GARBAGE)
async def test_bytes_that_are_no_message(door: Door, data: bytes) -> None:
    unary = door.channel.unary_unary(f"{SPEECH}/Synthesize")(data)
    stream = drain(door.channel.unary_stream(f"{SPEECH}/StreamSynthesize")(data))
    for call in (unary, stream):
        failed = await failure(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "MALFORMED_MESSAGE")


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_bytes_that_are_no_message_for_the_health_service(door: Door, method: str) -> None:
    full_name = f"/grpc.health.v1.Health/{method}"
    call = door.channel.unary_unary(full_name)(GARBAGE[0], timeout=10)
    failed = await failure(call)
    assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "MALFORMED_MESSAGE")


@pytest.mark.parametrize(
    "method", [f"{SPEECH}/Synthesize", f"{SPEECH}/StreamSynthesize", "/grpc.health.v1.Health/Check"]
)
async def test_a_unary_call_without_a_message(door: Door, method: str) -> None:
    call = door.channel.stream_unary(method)(timeout=10)
    await call.done_writing()
    failed = await failure(call)
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNIMPLEMENTED, "MESSAGE_MISSING")


# --- what only gateways may say

SECRET = "a secret of this test"
TENANT = "x-chorus-internal-tenant"


@pytest.mark.asyncio(loop_scope="function")
async def test_internal_metadata_is_for_gateways(stack: Stack) -> None:
    service, gateway = await stack.pair(secret=SECRET)
    direct, through = Door(service), Door(gateway)
    shown = ("x-chorus-internal-secret", SECRET)
    no_cache = ("cache-control", "no-store")  # each call is to reach the service
    for metadata in (
        [(TENANT, "acme")],
        [(TENANT, "acme"), ("x-chorus-internal-secret", "a guess")],
        [(TENANT, "acme"), ("x-chorus-internal-secret", "")],
        [("x-chorus-internal-anything", "1")],
        [(f"x-chorus-internal-{'long' * 1000}", "1")],
    ):
        failed = await failure(direct.speech.Synthesize(text_request("hi"), metadata=metadata))
        assert (failed.code, failed.reason) == (grpc.StatusCode.PERMISSION_DENIED, "INTERNAL_METADATA")
        assert SECRET not in failed.message
        request_id = (
            await through.speech.Synthesize(text_request("hi"), metadata=[*metadata, no_cache])
        ).start.request_id
        assert (await logged(service, request_id))["tenant"] == "anyone"
    for said, heard in (([(TENANT, "acme"), shown], "acme"), ([shown], "direct"), ([], "direct")):
        response = await direct.speech.Synthesize(text_request("hi"), metadata=said)
        assert (await logged(service, response.start.request_id))["tenant"] == heard


# --- our own faults


class Broken(tts_pb2_grpc.TextToSpeechServiceServicer):
    """Fails in ways that nobody foresaw."""

    async def NormalizeText(
        self, request: tts_pb2.NormalizeTextRequest, context: Context
    ) -> tts_pb2.NormalizeTextResponse:
        raise NotImplementedError

    async def Synthesize(self, request: tts_pb2.SynthesizeRequest, context: Context) -> tts_pb2.SynthesizeResponse:
        raise ValueError("the plan of the vault " + request.text)

    async def StreamSynthesize(
        self, request: tts_pb2.StreamSynthesizeRequest, context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        yield tts_pb2.StreamSynthesizeResponse(start=tts_pb2.StreamStart(voice="female1"))
        raise LookupError("the plan of the vault " + request.text)

    async def StreamSynthesizeText(
        self, request: AsyncIterator[tts_pb2.StreamSynthesizeTextRequest], context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
        async for message in request:
            yield tts_pb2.StreamSynthesizeTextResponse(start=tts_pb2.StreamStart(voice=message.text))


@asynccontextmanager
async def broken_server(debug: bool) -> AsyncIterator[Any]:
    """A server of ours with a servicer that fails, and a channel to it."""
    address = f"127.0.0.1:{free_port()}"
    service = "chorus.v1.TextToSpeechService"
    server = FrameServer(Settings(debug=debug), [service], identify=lambda metadata, peer: "anyone")
    tts_pb2_grpc.add_TextToSpeechServiceServicer_to_server(Broken(), server.methods)
    await server.start(address)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel
    finally:
        await server.grpc.stop(None)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("text", ["", "door " * 5000, "门" * 5000])
async def test_an_exception_stays_inside(debug: bool, text: str) -> None:
    with capture_logs() as logs:
        async with broken_server(debug) as channel:
            stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)
            request = text_request(text)
            stream = stub.StreamSynthesize(as_stream(request))
            assert (await anext(aiter(stream))).start.voice == "female1"
            failures = [await failure(stub.Synthesize(request)), await failure(drain(stream))]
    for failed in failures:
        info = failed.one(error_details_pb2.ErrorInfo)
        assert (failed.code, info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "vault" not in failed.message
        (line,) = [line for line in logs if line.get("error_id") == info.metadata["error_id"]]
        assert "vault" in str(line["exc_info"])
        debug_info = failed.all(error_details_pb2.DebugInfo)
        assert len(debug_info) == debug
        for detail in debug_info:
            assert 0 < len(detail.detail.encode()) <= DEBUG_BYTES


async def test_bytes_that_are_no_message_in_the_middle_of_a_stream() -> None:
    async with broken_server(debug=False) as channel:
        good = tts_pb2.StreamSynthesizeTextRequest(text="female1").SerializeToString()
        call = channel.stream_stream(f"{SPEECH}/StreamSynthesizeText")()
        await call.write(good)
        assert await call.read()
        await call.write(b"\xff")
        failed = await failure(call.read())
        assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "MALFORMED_MESSAGE")


async def test_a_message_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "RECEIVE_SECONDS", 0.1)
    with capture_logs() as logs:
        async with broken_server(debug=False) as channel:
            failed = await failure(channel.stream_unary(f"{SPEECH}/Synthesize")())
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNIMPLEMENTED, "MESSAGE_MISSING")
    assert [line["code"] for line in logs if line["event"] == "call"] == ["UNIMPLEMENTED"]
