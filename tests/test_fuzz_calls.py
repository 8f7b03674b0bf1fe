"""Some of the calls that `python -m tests.fuzz_calls` throws at a gateway."""

from __future__ import annotations

import time

from tests.fuzz_calls import check_calm, throw
from tests.stack import Stack


async def test_whatever_comes_is_answered(stack: Stack) -> None:
    service, gateway = await stack.pair()
    outcomes = await throw(gateway, 3000, seed=time.time_ns())
    assert len({code for code, _ in outcomes}) > 5
    for server in (service, gateway):
        await server.until_metric("chorus_calls_active", 0)
    check_calm([service, gateway])
