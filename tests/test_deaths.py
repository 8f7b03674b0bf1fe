"""Callers leave, processes die, deploys roll: nothing hangs, nothing is mixed, nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import random
import signal
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest

from client.client import call_error
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from service.text import split
from tests.hearing import LANGUAGE, Heard, hear
from tests.stack import Server, Stack, stream_request, text_request

LONG_TEXT = "This sentence is one of many that are spoken one after another. " * 40
SLOW: dict[str, Any] = {"tone_step_base_ms": 4}
"""About five times as fast as real time: slow enough to meet a stream in the middle."""


Call: TypeAlias = "grpc.aio.UnaryStreamCall[tts_pb2.StreamSynthesizeRequest, tts_pb2.StreamSynthesizeResponse]"


def speak(server: Server, seed: int, text: str = LONG_TEXT) -> Call:
    request = stream_request(text, language=LANGUAGE, sampling=tts_pb2.Sampling(seed=seed))
    return server.stub().StreamSynthesize(request, timeout=60)


async def first_audio(call: Call, heard: Heard) -> None:
    async for response in call:
        heard.take(response)
        if heard.audio:
            return


async def check_empty(service: Server) -> None:
    """Nothing of any request is left."""
    await service.until_metric("chorus_batcher_requests", 0)
    await service.until_metric("chorus_batcher_rows", 0)
    await service.until_metric("chorus_calls_active", 0)
    assert service.metric("chorus_batcher_work_audio_seconds") == 0
    assert service.metric("chorus_batcher_slots_free") == 64


async def test_a_cancelled_stream_frees_its_place_within_one_tick(stack: Stack) -> None:
    service, gateway = await stack.pair(**SLOW)
    for seed in range(5):
        heard = Heard()
        call = speak(gateway, seed)
        await first_audio(call, heard)
        call.cancel()
        heard.check_part([part.spoken_text for part in split(LONG_TEXT, LANGUAGE)], seed)
    await check_empty(service)
    assert service.metric("chorus_batcher_cancelled_total") == 5
    assert service.metric("chorus_batcher_cancel_ticks_max") <= 1


async def test_a_service_killed_in_the_middle_of_a_stream(stack: Stack) -> None:
    service, gateway = await stack.pair(**SLOW)
    heard = Heard()
    call = speak(gateway, seed=1)
    await first_audio(call, heard)
    service.signal(signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hear(call, heard)
    error = call_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_LOST")
    heard.check_part([part.spoken_text for part in split(LONG_TEXT, LANGUAGE)], seed=1)


async def test_calls_not_begun_are_tried_elsewhere_when_their_service_dies(stack: Stack) -> None:
    # Rows wait long before their first audio, so that the kill meets every call before its first byte.
    slow_start: dict[str, Any] = {"tone_step_base_ms": 2, "tone_lookahead_steps": 200}
    first, second = [await stack.service(**slow_start, tone_card=card) for card in "ab"]
    gateway = await stack.gateway(first, second)
    heards = [Heard() for _ in range(8)]
    listening = [
        asyncio.create_task(hear(speak(gateway, seed, LONG_TEXT[:200]), heard)) for seed, heard in enumerate(heards)
    ]
    async with asyncio.timeout(30):
        while first.metric("chorus_batcher_rows") + second.metric("chorus_batcher_rows") < len(heards):
            await asyncio.sleep(0.005)
    assert first.metric("chorus_batcher_rows") > 0, "the balancer sent everything to one service"
    begun = [bool(heard.audio) for heard in heards]
    first.signal(signal.SIGKILL)
    results = await asyncio.gather(*listening, return_exceptions=True)
    assert not any(begun)
    assert results == [None] * len(heards)
    for heard in heards:
        heard.check_whole()


async def test_sigterm_under_load_loses_nothing(stack: Stack) -> None:
    services = [await stack.service(tone_step_base_ms=1.5, tone_card=card) for card in "ab"]
    gateway = await stack.gateway(*services)
    stub = gateway.stub()
    outcomes: list[Heard] = []

    async def caller(number: int) -> None:
        for turn in range(6):
            heard = Heard()
            request = stream_request(
                f"Caller {number} says this for the time number {turn}.",
                language=LANGUAGE,
                sampling=tts_pb2.Sampling(seed=100 * number + turn),
            )
            await hear(stub.StreamSynthesize(request, timeout=60), heard)
            outcomes.append(heard)

    calling = asyncio.gather(*(caller(number) for number in range(12)))
    async with asyncio.timeout(30):
        while len(outcomes) < 10:
            await asyncio.sleep(0.005)
    services[0].signal(signal.SIGTERM)
    assert await services[0].wait() == 0
    await calling
    assert len(outcomes) == 72
    for heard in outcomes:
        heard.check_whole()


async def test_a_gateway_drains_too(stack: Stack) -> None:
    service, gateway = await stack.pair(**SLOW)
    heard = Heard()
    call = speak(gateway, seed=3, text="A short text that ends soon enough. " * 4)
    await first_audio(call, heard)
    gateway.signal(signal.SIGTERM)
    await hear(call, heard)
    heard.check_whole()
    assert await gateway.wait() == 0
    await check_empty(service)


async def test_calls_are_accepted_while_balancers_notice_a_drain(stack: Stack) -> None:
    service = await stack.service(service_drain_seconds=30)
    stub = service.stub()
    service.signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        while await service.health() != 2:  # NOT_SERVING
            await asyncio.sleep(0.01)
    response = await stub.Synthesize(text_request("still here"), timeout=10)
    assert response.end.finish_reason == tts_pb2.FINISH_REASON_COMPLETE
    service.signal(signal.SIGTERM)  # a second signal ends the wait
    assert await service.wait() == 0


async def test_a_health_watch_does_not_hold_up_a_drain(stack: Stack) -> None:
    service = await stack.service()
    watch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = service.channel().unary_stream(
        "/grpc.health.v1.Health/Watch", request_serializer=bytes, response_deserializer=bytes
    )
    assert await watch(b"", timeout=60).read()
    service.signal(signal.SIGTERM)
    assert await service.wait(20) == 0


async def test_a_stopped_backend_is_left_out_in_bounded_time(stack: Stack) -> None:
    stopped, going = [await stack.service(tone_card=card) for card in "ab"]
    gateway = await stack.gateway(stopped, going)
    stub = gateway.stub()
    stopped.signal(signal.SIGSTOP)
    calls = [stub.Synthesize(text_request(f"call {number}"), timeout=30) for number in range(8)]
    replies = await asyncio.gather(*calls)  # those that met the stopped one are tried again
    assert all(reply.end.sample_count for reply in replies)


async def test_a_gateway_without_backends(stack: Stack) -> None:
    service, gateway = await stack.pair()
    service.signal(signal.SIGKILL)
    await service.wait()
    async with asyncio.timeout(30):
        while await gateway.health() != 2:
            await asyncio.sleep(0.01)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub().Synthesize(text_request("anyone?"), timeout=10)
    assert call_error(caught.value).reason == "BACKEND_UNAVAILABLE"


async def test_nobody_hears_anybody_else(stack: Stack) -> None:
    """Many callers, random lengths, random leaves: every sample that arrives is its caller's own."""
    service, gateway = await stack.pair(tone_step_base_ms=0.5, tone_slots=16, batcher_max_delay=60)
    stubs = [gateway.stub() for _ in range(4)]
    chance = random.Random(7)

    async def caller(number: int, stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub) -> None:
        text = ("I am caller {number}. " * chance.randint(1, 12)).format(number=number).strip()
        heard = Heard()
        request = stream_request(text, language=LANGUAGE, sampling=tts_pb2.Sampling(seed=number))
        call = stub.StreamSynthesize(request, timeout=60)
        patience = chance.choice([None, 1, 2, 3])
        async for response in call:
            heard.take(response)
            if patience is not None and len(heard.audio) > 8192 * patience:
                call.cancel()
                heard.check_part([part.spoken_text for part in split(text, LANGUAGE)], number)
                return
        heard.check_whole()

    await asyncio.gather(*(caller(number, stubs[number % 4]) for number in range(150)))
    await service.until_metric("chorus_batcher_requests", 0)
    await service.until_metric("chorus_batcher_slots_free", 16)


async def test_a_slow_reader_pauses_only_itself(stack: Stack) -> None:
    service, gateway = await stack.pair(batcher_outbox_seconds=1.0)
    slow = gateway.stub(**{"http2.lookahead_bytes": 65536, "http2.bdp_probe": 0})
    text = "A reader who does not read. " * 170
    heard = Heard()
    call = slow.StreamSynthesize(stream_request(text, language=LANGUAGE, sampling=tts_pb2.Sampling(seed=9)), timeout=60)
    await first_audio(call, heard)
    # While it does not read, others are served.
    for number in range(20):
        response = await gateway.stub().Synthesize(text_request(f"Number {number}."), timeout=10)
        assert response.end.sample_count > 0
    # Of its 1,000 seconds and more of audio only its window and the buffers on the way were made, and no slot is held.
    made = service.metric("chorus_batcher_samples_total") - 20 * 20_000
    assert made / 24_000 < 60
    await service.until_metric("chorus_batcher_rows", 0)
    await hear(call, heard)
    heard.check_whole()


async def test_a_dead_gateway_frees_its_callers_places(stack: Stack) -> None:
    service, gateway = await stack.pair(**SLOW)
    heard = Heard()
    call = speak(gateway, seed=5)
    await first_audio(call, heard)
    gateway.signal(signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError):
        await hear(call, heard)
    await check_empty(service)
