"""The limiter against the specification's formulas: settlement, shadow mode, mixed costs, healing, key expiry."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from common import metrics
from common.errors import ResourceExhausted
from common.store import StoreUnavailable
from gateway.tenants import Bucket, Tenant
from tests.test_limiter import fleet, held
from tests.valkey import Valkey


async def _settle(gateways: Any) -> None:
    for limiter in gateways.limiters:
        await asyncio.gather(*limiter._settling)


async def test_refunds_do_not_lift_a_bucket_above_its_burst(valkey: Valkey) -> None:
    """level <- min(burst, level + estimate - actual): a full bucket takes no refund."""
    tenants = {"a": Tenant("a", audio=Bucket(10.0, 40.0))}
    async with fleet(valkey.url, 1, tenants, requests_per_second=None) as gateways:
        (limiter,) = gateways.limiters
        async with limiter.admitted("a", "interactive") as admission:
            await admission.hold(40.0)
            gateways.clock.ms += 4000  # full again
            admission.settle(0.0)
        await _settle(gateways)
        spent = 0.0
        while spent < 200 and await held(limiter, 4.0, "a") is None:
            spent += 4.0
        assert spent <= 40.0, spent


async def test_shadow_refunds_only_what_was_charged(valkey: Valkey) -> None:
    tenants = {"shade": Tenant("shade", audio=Bucket(1.0, 10.0))}
    async with fleet(valkey.url, 1, tenants, requests_per_second=None, mode="shadow") as gateways:
        (limiter,) = gateways.limiters
        assert await held(limiter, 10.0, "shade") is None  # empties the bucket
        refused = ("audio", "would refuse", "shade")
        before = metrics.LIMITER_DECISIONS.value(*refused)
        for _ in range(5):
            async with limiter.admitted("shade", "interactive") as admission:
                await admission.hold(10.0)
                admission.settle(0.0)
            await _settle(gateways)
        assert metrics.LIMITER_DECISIONS.value(*refused) - before == 5


async def test_a_dear_refusal_does_not_refuse_what_fits(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", audio=Bucket(1.0, 20.0))}
    async with fleet(valkey.url, 1, tenants, requests_per_second=None) as gateways:
        (limiter,) = gateways.limiters
        assert await held(limiter, 5.0, "a") is None  # level 15
        assert await held(limiter, 20.0, "a") is not None
        error = await held(limiter, 1.0, "a")
        assert error is None, error.retry_after_ms


class _Down:
    def __init__(self, shared: Any) -> None:
        self.shared, self.down = shared, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shared, name)

    async def take(self, *words: Any) -> Any:
        if self.down:
            raise StoreUnavailable
        return await self.shared.take(*words)


async def test_what_was_held_without_the_ledger_is_not_refunded_to_it(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", audio=Bucket(1.0, 40.0))}
    async with fleet(valkey.url, 1, tenants, requests_per_second=None) as gateways, AsyncExitStack() as calls:
        (limiter,) = gateways.limiters
        down = limiter._shared = _Down(limiter._shared)  # type: ignore[assignment]
        assert await held(limiter, 40.0, "a") is None  # the ledger's bucket is empty
        down.down = True
        admission = await calls.enter_async_context(limiter.admitted("a", "interactive"))
        await admission.hold(40.0)  # the local one
        down.down = False
        admission.settle(0.0)
        await _settle(gateways)
        await limiter._return_idle(all_of_it=True)
        (left,) = await limiter.left(tenants.values())
        assert left.left <= 0.0, left.left


async def test_a_slow_bucket_is_remembered_until_it_is_full(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", requests=Bucket(0.001, 1000.0))}  # fills in 11.6 days
    async with fleet(valkey.url, 1, tenants, requests_per_second=None, leasing=False) as gateways:
        (limiter,) = gateways.limiters
        try:
            for _ in range(3):
                async with limiter.admitted("a", "interactive"):
                    pass
        except ResourceExhausted:
            raise AssertionError from None
        ttl = await limiter._shared._ledger.command("PTTL", "{limits}:tenant:a:requests")
        assert ttl >= 1_000_000_000, ttl  # at least its fill time, in ms
