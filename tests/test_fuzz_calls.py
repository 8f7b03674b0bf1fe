"""Some of the calls that `python -m tests.fuzz_calls` throws at a gateway."""

from __future__ import annotations

import time

from tests.fuzz_calls import check_calm, limits, throw
from tests.stack import Stack
from tests.valkey import Valkey


async def test_whatever_comes_is_answered(stack: Stack, valkey: Valkey) -> None:
    service, gateway = await stack.pair(**limits(valkey.url))
    outcomes = await throw(gateway, 3000, seed=time.time_ns())
    assert len({code for code, _ in outcomes}) > 5
    for server in (service, gateway):
        await server.until_metric("chorus_calls_active", 0)
    check_calm([service, gateway])
