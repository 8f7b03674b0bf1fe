"""Several services behind one gateway: gRPC's own balancing follows load and health."""

from __future__ import annotations

import asyncio
import signal
import struct

from protos.chorus.v1 import tts_pb2
from service.load import orca_report
from tests.hearing import Heard, hear
from tests.stack import Server, Stack, stream_request, text_request

CALLS = "chorus_batcher_submitted_total"


async def call_many(gateway: Server, number: int) -> None:
    """Short calls, a few at a time."""
    stub = gateway.stub()
    for turn in range(number // 4):
        await asyncio.gather(*(stub.Synthesize(text_request(f"call {turn} {i}"), timeout=10) for i in range(4)))


def test_the_report_has_the_schemas_fields() -> None:
    report = orca_report(10.5, 0.3)
    assert report[0:1] + report[9:10] == b"\x31\x49"
    assert struct.unpack("<xdxd", report) == (10.5, 0.3)


async def test_calls_follow_the_load(stack: Stack) -> None:
    busy, idle = [
        await stack.service(tone_slots=8, tone_step_base_ms=1, tone_card=card, batcher_max_delay=60) for card in "ab"
    ]
    gateway = await stack.gateway(busy, idle, cache_enabled=False)  # each call is to reach a service
    # Long streams, past the gateway, fill most of one service's slots.
    request = stream_request("This goes on for quite some time. " * 140)
    filling = [busy.stub().StreamSynthesize(request, timeout=120) for _ in range(6)]
    reading = [asyncio.create_task(hear(call, Heard())) for call in filling]
    await busy.until_metric("chorus_batcher_requests", 6)
    await call_many(gateway, 100)  # the balancer learns from these
    before = {server.address: server.metric(CALLS) for server in (busy, idle)}
    await asyncio.sleep(1.1)  # weightUpdatePeriod: gRPC's clock, which no test can turn
    await call_many(gateway, 200)
    calls = {server.address: server.metric(CALLS) - before[server.address] for server in (busy, idle)}
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    assert sum(calls.values()) == 200
    assert calls[idle.address] > 2 * calls[busy.address]


async def test_a_service_that_is_not_serving_gets_no_calls_and_no_errors(stack: Stack) -> None:
    leaving, staying = [await stack.service(service_drain_seconds=30, tone_card=card) for card in "ab"]
    gateway = await stack.gateway(leaving, staying, cache_enabled=False)
    await call_many(gateway, 40)
    assert leaving.metric(CALLS) > 1
    leaving.signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        while await leaving.health() != 2:
            await asyncio.sleep(0.01)
    await call_many(gateway, 8)  # until the gateway's health watch has heard it
    before = leaving.metric(CALLS)
    await call_many(gateway, 100)
    assert leaving.metric(CALLS) == before
    assert await gateway.health() == 1


async def test_a_service_that_comes_back_is_used_again(stack: Stack) -> None:
    service, gateway = await stack.pair()
    service.signal(signal.SIGKILL)
    await service.wait()
    again = await stack.service(service_listen=service.address)
    async with asyncio.timeout(30):
        while await gateway.health() != 1:
            await asyncio.sleep(0.02)
    response: tts_pb2.SynthesizeResponse = await gateway.stub().Synthesize(text_request("back"), timeout=10)
    assert response.end.sample_count > 0
    assert again.metric(CALLS) == 2  # the warm-up, and this
