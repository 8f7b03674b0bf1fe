"""The client does what a careful caller does. A real server that refuses as it is told to, and a virtual clock."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from client.client import CallError, Client, Options, StreamMessage
from common.calls import Context
from common.errors import Aborted, ChorusError, InvalidArgument, ResourceExhausted, Unavailable, Violation
from common.server import Server as FrameServer
from common.settings import Settings
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from tests.stack import Stack, free_port

BUSY = ResourceExhausted("busy", "RATE_LIMITED", retry_after=3.0, quota="all requests")
GONE = Unavailable("gone", "BACKEND_UNAVAILABLE", retry_after=0.5)
RUNNING = Aborted("runs", "IDEMPOTENCY_IN_PROGRESS", retry_after=1.0)
WRONG = InvalidArgument.of([Violation("text", "is empty")])


class Refusing(tts_pb2_grpc.TextToSpeechServiceServicer):
    """Fails as often as it is told to, and remembers what it was told."""

    def __init__(self, errors: list[ChorusError], heard_before: int = 0) -> None:
        self.errors = errors
        self.heard_before = heard_before
        self.metadata: list[dict[str, Any]] = []

    def _fail(self, context: Context) -> None:
        self.metadata.append(dict(context.invocation_metadata() or ()))
        if self.errors:
            raise self.errors.pop(0)

    async def Synthesize(self, request: tts_pb2.SynthesizeRequest, context: Context) -> tts_pb2.SynthesizeResponse:
        self._fail(context)
        return tts_pb2.SynthesizeResponse(audio=request.text.encode())

    async def StreamSynthesize(
        self, request: tts_pb2.StreamSynthesizeRequest, context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        for _ in range(self.heard_before):
            yield tts_pb2.StreamSynthesizeResponse(chunk=tts_pb2.AudioChunk(data=b"half"))
        self._fail(context)
        yield tts_pb2.StreamSynthesizeResponse(end=tts_pb2.StreamEnd())

    NormalizeText = StreamSynthesizeText = None  # type: ignore[assignment]


class Time:
    """A clock that a sleep moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@asynccontextmanager
async def calling(servicer: Refusing, **options: Any) -> AsyncIterator[tuple[Client, Time]]:
    server = FrameServer(Settings(), ["chorus.v1.TextToSpeechService"], identify=lambda metadata, peer: "anyone")
    tts_pb2_grpc.add_TextToSpeechServiceServicer_to_server(servicer, server.methods)
    address, time = f"127.0.0.1:{free_port()}", Time()
    await server.start(address)
    try:
        async with Client(address, clock=time.clock, sleep=time.sleep, **options) as client:
            yield client, time
    finally:
        await server.grpc.stop(0)


async def heard(messages: AsyncGenerator[StreamMessage, None]) -> list[StreamMessage]:
    return [message async for message in messages]


async def test_it_waits_as_long_as_it_is_told_and_keeps_its_key() -> None:
    servicer = Refusing([BUSY, GONE, RUNNING])
    async with calling(servicer) as (client, time):
        assert (await client.synthesize("hello")).audio == b"hello"
    assert all(slept >= wait for slept, wait in zip(time.slept, (3.0, 0.5, 1.0), strict=True))
    keys = {metadata["idempotency-key"] for metadata in servicer.metadata}
    assert len(keys) == 1
    assert len(servicer.metadata) == 4


async def test_two_calls_have_two_keys_unless_they_are_told_one() -> None:
    servicer = Refusing([])
    async with calling(servicer, api_key="k3y") as (client, _):
        await client.synthesize("a")
        await client.synthesize("a")
        options = Options(
            idempotency_key="mine", request_id="r", priority="batch", cache_control="no-store", metadata=(("x-a", "b"),)
        )
        await client.synthesize("a", options=options)
    first, second, third = servicer.metadata
    assert first["idempotency-key"] != second["idempotency-key"]
    wanted = {
        "idempotency-key": "mine",
        "x-request-id": "r",
        "x-chorus-priority": "batch",
        "cache-control": "no-store",
        "x-a": "b",
        "x-api-key": "k3y",
    }
    assert wanted.items() <= third.items()


async def test_it_does_not_wait_for_what_comes_after_its_deadline() -> None:
    async with calling(Refusing([BUSY]), timeout=2.0) as (client, time):
        with pytest.raises(CallError) as caught:
            await client.synthesize("hello")
    assert (caught.value.code, caught.value.retry_after, caught.value.quota) == (BUSY.code, 3.0, "all requests")
    assert time.slept == []


async def test_it_gives_up_after_so_many_attempts() -> None:
    async with calling(Refusing([GONE] * 10), attempts=4) as (client, time):
        with pytest.raises(CallError):
            await client.synthesize("hello")
    assert len(time.slept) == 3


async def test_what_would_fail_again_is_not_tried_again() -> None:
    async with calling(Refusing([WRONG])) as (client, time):
        with pytest.raises(CallError) as caught:
            await client.synthesize("")
    assert caught.value.fields == {"text": "is empty"}
    assert time.slept == []


async def test_a_stream_is_made_again_only_before_its_first_audio() -> None:
    servicer = Refusing([GONE, BUSY])
    async with calling(servicer) as (client, time):
        assert len(await heard(client.stream("hello"))) == 1
    assert len(time.slept) == 2
    async with calling(Refusing([GONE], heard_before=1)) as (client, time):
        with pytest.raises(CallError):
            await heard(client.stream("hello"))
    assert time.slept == []


async def test_nobody_there_is_found_after_all() -> None:
    async with Client(f"127.0.0.1:{free_port()}", attempts=3, timeout=5.0) as client:
        with pytest.raises(CallError) as caught:
            await client.synthesize("hello")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_the_whole_way(stack: Stack) -> None:
    _, gateway = await stack.pair()
    async with Client(gateway.address) as client:
        sampling = tts_pb2.Sampling(seed=7)
        controls = tts_pb2.Controls(speed=1.5)
        reply = await client.synthesize("hello", sampling=sampling, controls=controls)
        assert reply.start.seed == 7
        kinds = [type(message) for message in await heard(client.stream("hello", sampling=sampling))]
        assert kinds[0] is tts_pb2.StreamStart
        assert kinds[-1] is tts_pb2.StreamEnd
        assert [voice.name for voice in await client.voices()] == ["female1", "female2", "male1", "male2"]
        assert (await client.server_info()).engine == "tone"
