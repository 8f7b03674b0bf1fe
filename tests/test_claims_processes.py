"""Idempotency keys over real gateways, of which one sleeps longer than its lease."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from tests.calls import Door, metrics_text
from tests.stack import Server, Stack, text_request
from tests.valkey import Valkey

TEXT = "This takes a while to be said. " * 20
KEYED: dict[str, Any] = {"metadata": (("idempotency-key", "k"), ("cache-control", "no-store")), "timeout": 100}


def claims(gateway: Server, outcome: str) -> float:
    """How many keyed calls of a gateway became of that."""
    name = f'chorus_claims_total{{outcome="{outcome}"}} '
    return sum(float(line.removeprefix(name)) for line in metrics_text(gateway).splitlines() if line.startswith(name))


async def speak(gateway: Server) -> tuple[bytes, str]:
    """A keyed call, and how it was answered."""
    call: Any = Door(gateway).speech.Synthesize(text_request(TEXT), **KEYED)
    return (await call).audio, dict(await call.trailing_metadata())["x-chorus-idempotency"]


@pytest.mark.timeout(200)
async def test_an_owner_that_sleeps_longer_than_its_lease_is_fenced(stack: Stack, valkey: Valkey) -> None:
    service = await stack.service(tone_step_base_ms=2, tone_steps_per_character=2)
    sleeper, heir = [await stack.gateway(service, store_ledger=valkey.url) for _ in range(2)]
    asleep = asyncio.create_task(speak(sleeper))
    await service.until_metric("chorus_batcher_requests", 1)
    sleeper.signal(signal.SIGSTOP)
    audio, outcome = await speak(heir)
    assert (outcome, claims(heir, "taken over")) == ("claimed", 1)
    sleeper.signal(signal.SIGCONT)
    assert (await asleep)[0] == audio  # its own caller gets what it asked for
    # Its ledger may count as away: it was silent for longer than the budget.
    assert claims(sleeper, "fenced") + claims(sleeper, "unavailable") >= 1
    await sleeper.until_metric("chorus_store_available", 1)
    for gateway in (sleeper, heir):
        assert await speak(gateway) == (audio, "replayed")
