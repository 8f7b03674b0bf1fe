"""The night on which traffic rose fortyfold, in small: real processes, four times what is allowed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from tests.calls import Door, Failure, check_exhausted, failure_of
from tests.stack import Stack, text_request
from tests.valkey import Valkey

RATE = 40
"""Requests a second that are allowed."""
CALLERS = 4 * RATE
DEADLINE = 5.0
PATIENCE = 60.0


@dataclass
class Night:
    """What became of all calls."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refused: list[Failure] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)


async def call(door: Door, number: int, night: Night) -> None:
    """Calls until it is answered, and waits as long as it is told to."""
    attempts = 0
    while True:
        attempts += 1
        try:
            await door.speech.Synthesize(text_request(f"Caller {number}."), timeout=DEADLINE)
        except grpc.aio.AioRpcError as error:
            failed = failure_of(error)
            night.outcomes[failed.code.name] += 1
            if failed.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                return
            night.refused.append(failed)
            await asyncio.sleep(failed.retry_after_ms / 1000)
        else:
            night.outcomes["OK"] += 1
            night.attempts.append(attempts)
            return


async def test_at_four_times_the_limit_the_admitted_are_served_and_the_patient_all_succeed(
    stack: Stack, valkey: Valkey
) -> None:
    limits: dict[str, Any] = {
        "limiter_requests_per_second": RATE,
        "limiter_requests_burst": RATE // 4,
        "store_ledger": valkey.url,
    }
    service = await stack.service(tone_step_base_ms=0.2, tone_steps_per_character=1)
    gateways = [await stack.gateway(service, **limits) for _ in range(2)]
    doors = [Door(gateway) for gateway in gateways]
    night, began = Night(), time.monotonic()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for number in range(CALLERS):
            group.create_task(call(doors[number % 2], number, night))
            await asyncio.sleep(1 / CALLERS)
    # Nobody who was admitted missed the deadline, and everybody was served in the end.
    assert set(night.outcomes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert night.outcomes["OK"] == CALLERS
    # Nobody came in sooner than the limit lets them, on both gateways together.
    assert time.monotonic() - began >= (CALLERS - RATE // 4) / RATE - 0.05
    # The delays are right: whoever obeys them calls not many times more.
    assert sum(night.attempts) <= 4 * CALLERS
    for failed in night.refused:
        check_exhausted(failed, "RATE_LIMITED", failed.quota)
    # The refused cost the service nothing.
    assert service.metric("chorus_calls_total") <= CALLERS + 10
