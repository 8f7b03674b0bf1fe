"""A real service whose engine fails, lacks memory or speaks one row badly, on demand."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from protos.chorus.v1 import tts_pb2
from tests.calls import Door, Failure, failure
from tests.hearing import LANGUAGE, Heard, hear
from tests.stack import Server, Stack, stream_request, text_request

SERVING = health_pb2.HealthCheckResponse.SERVING
STEPS: dict[str, Any] = {"tone_step_base_ms": 1, "tone_steps_per_character": 2}


async def speak(server: Server, calls: int, text: str = "A sentence of some length, number {}.") -> list[Heard]:
    """So many streams at once, each checked to be whole and its own."""
    stub = server.stub()

    async def call(number: int) -> Heard:
        heard = Heard()
        request = stream_request(
            text.format(number), language=LANGUAGE, sampling=tts_pb2.Sampling(seed=number, temperature=0.3)
        )
        await hear(stub.StreamSynthesize(request, timeout=60), heard)
        heard.check_whole()
        return heard

    return await asyncio.gather(*(call(number) for number in range(calls)))


async def test_out_of_memory_is_an_event_that_nobody_notices_but_the_metrics(stack: Stack) -> None:
    """Forty rows want in where eight fit: all are spoken, eight at a time, and health says SERVING throughout."""
    service, gateway = await stack.pair(
        tone_faults="oom>8", tone_slots=40, batcher_recovery_seconds=0.2, batcher_max_delay=1000, **STEPS
    )
    speaking = asyncio.create_task(speak(gateway, 40))
    while not speaking.done():
        assert await service.health() == SERVING
        assert await gateway.health() == SERVING
        await asyncio.wait({speaking}, timeout=0.05)
    await speaking
    assert service.metric("chorus_batcher_out_of_memory_total") >= 1
    assert service.metric("chorus_batcher_put_back_total") >= 1
    assert service.metric("chorus_batcher_failed_total") == 0
    await service.until_metric("chorus_batcher_rows", 0)
    assert service.metric("chorus_batcher_slots_free") == 40


async def test_it_comes_back_to_full_width(stack: Stack) -> None:
    service = await stack.service(tone_faults="oom@200", tone_slots=16, batcher_recovery_seconds=0.05, **STEPS)
    # So long that none has ended when the step comes.
    await speak(service, 16, "A sentence of some length, number {0}. " * 4)
    assert service.metric("chorus_batcher_out_of_memory_total") == 1
    async with asyncio.timeout(30):
        while service.metric("chorus_batcher_max_rows") < 16:
            await speak(service, 1)


async def test_an_engine_that_fails_once_costs_nobody_who_has_heard_nothing(stack: Stack) -> None:
    # Unary callers, whose first samples are made only once their rows have ended.
    service, gateway = await stack.pair(
        tone_faults="step@30",
        batcher_first_block_steps=2000,
        batcher_block_steps=2000,
        batcher_outbox_seconds=60,
        **STEPS,
    )
    door = Door(gateway)
    asked = [
        door.speech.Synthesize(text_request(f"Number {number} is said here.", language=LANGUAGE), timeout=60)
        for number in range(20)
    ]
    for reply in await asyncio.gather(*asked):
        Heard(bytearray(reply.audio), [reply.start], list(reply.marks), [reply.end]).check_whole()
    assert service.metric("chorus_batcher_engine_failures_total") == 1
    assert service.metric("chorus_batcher_put_back_total") > 0
    assert service.metric("chorus_batcher_failed_total") == 0


async def test_an_engine_that_always_fails_answers_all_with_one_clear_error(stack: Stack) -> None:
    service = await stack.service(tone_faults=";".join(f"step@{step}" for step in range(100, 2000)), **STEPS)
    stub = Door(service).speech
    failures: list[Failure] = await asyncio.gather(
        *(failure(stub.Synthesize(text_request(f"Number {number}. " * 10), timeout=60)) for number in range(8))
    )
    for failed in failures:
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED")
        assert failed.retry_after_ms == 1000
    await service.until_metric("chorus_batcher_requests", 0)
    assert await service.health() == SERVING


@pytest.mark.parametrize("fault", ["row:poison", "row@0:poison", "row@7:poison"])
async def test_one_bad_row_fails_alone(stack: Stack, fault: str) -> None:
    service, gateway = await stack.pair(tone_faults=fault, **STEPS)
    bad = failure(Door(gateway).speech.Synthesize(text_request("This one is poison."), timeout=60))
    failed, _ = await asyncio.gather(bad, speak(gateway, 12))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "SEGMENT_FAILED")
    await service.until_metric("chorus_batcher_rows", 0)
