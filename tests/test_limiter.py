"""Limits hold whatever many gateways do, and whoever waits as long as told is let in. Real server, virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ResourceExhausted
from common.settings import LimiterSettings, StoreSettings
from common.store import Store
from gateway.buckets import UNITS, LocalBuckets, Scope
from gateway.leases import Pool
from gateway.limiter import Admission, Limiter
from gateway.tenants import Bucket, Tenant
from tests.calls import until
from tests.valkey import Valkey, running_valkey

PATIENT = StoreSettings(budget=5.0)
BUSY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.ms = 1_000_000

    def seconds(self) -> float:
        return self.ms / 1000

    def now(self) -> int:
        return self.ms


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Valkey]:
    async with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


class Fleet:
    """Gateways that share a server and a clock."""

    def __init__(self, stores: list[Store], limits: LimiterSettings, tenants: dict[str, Tenant]) -> None:
        self.clock = Clock()
        self.tenants = tenants
        self._limits = limits
        self._stores = stores
        self.limiters = [self._limiter(store) for store in stores]

    def _limiter(self, store: Store) -> Limiter:
        return Limiter(store, self._limits, self.tenant, self.clock.seconds, self.clock.now)

    def tenant(self, name: str) -> Tenant:
        return self.tenants.get(name, Tenant(name))

    def crash(self, gateway: int) -> None:
        """Forgets all that a gateway had in memory."""
        self.limiters[gateway] = self._limiter(self._stores[gateway])

    async def tick(self) -> None:
        """What each gateway does once a second."""
        for limiter in self.limiters:
            await limiter._places.renew()
            await limiter._return_idle(all_of_it=False)
            await asyncio.gather(*limiter._settling)


@asynccontextmanager
async def fleet(
    url: str | None, count: int = 1, tenants: dict[str, Tenant] | None = None, **limits: Any
) -> AsyncIterator[Fleet]:
    stores = [Store("ledger", url, PATIENT) for _ in range(count)]
    if url is not None:
        await stores[0].command("FLUSHALL")
    try:
        yield Fleet(stores, LimiterSettings(**limits), tenants or {})
    finally:
        for store in stores:
            await store.close()


async def refusal(limiter: Limiter, tenant: str = "anyone", priority: Any = "interactive") -> ResourceExhausted | None:
    """Calls, and leaves at once."""
    try:
        async with limiter.admitted(tenant, priority):
            return None
    except ResourceExhausted as error:
        return error


async def held(limiter: Limiter, seconds: float, tenant: str = "anyone") -> ResourceExhausted | None:
    """Calls, holds an estimate, and never settles."""
    try:
        async with limiter.admitted(tenant, "interactive") as admission:
            await admission.hold(seconds)
            return None
    except ResourceExhausted as error:
        return error


# --- the bound

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(1, 900)),
        st.tuples(st.just("calls"), st.integers(0, 1), st.integers(1, 30)),
        st.tuples(st.just("crash"), st.integers(0, 1)),
        st.tuples(st.just("tick")),
    ),
    max_size=40,
)


@BUSY
@given(
    steps=STEPS, rate=st.sampled_from([1.0, 7.0, 50.0]), burst=st.sampled_from([1.0, 5.0, 40.0]), leasing=st.booleans()
)
def test_no_more_than_rate_and_burst_whatever_gateways_do(
    server: Valkey, steps: list[Any], rate: float, burst: float, leasing: bool
) -> None:
    async def play() -> None:
        limits: dict[str, Any] = {"requests_per_second": rate, "requests_burst": burst, "leasing": leasing}
        async with fleet(server.url, 2, **limits) as gateways:
            began, admitted = gateways.clock.ms, 0
            for step, *args in steps:
                if step == "wait":
                    gateways.clock.ms += args[0]
                elif step == "calls":
                    limiter = gateways.limiters[args[0]]
                    answers = await asyncio.gather(*(refusal(limiter) for _ in range(args[1])))
                    admitted += answers.count(None)
                elif step == "crash":
                    gateways.crash(args[0])
                else:
                    await gateways.tick()
                assert admitted <= burst + rate * (gateways.clock.ms - began) / 1000 + 1e-6

    asyncio.run(play())


AUDIO_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(1, 3000)),
        st.tuples(st.just("hold"), st.integers(0, 1), st.floats(0.1, 30.0)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.floats(0.0, 1.0)),
        st.tuples(st.just("crash"), st.integers(0, 1)),
        st.tuples(st.just("tick")),
    ),
    max_size=40,
)


@BUSY
@given(steps=AUDIO_STEPS)
def test_charged_audio_is_bounded_crashes_and_settlements_included(server: Valkey, steps: list[Any]) -> None:
    rate, burst = 10.0, 40.0

    async def play() -> None:
        tenants = {"a": Tenant("a", audio=Bucket(rate, burst))}
        async with fleet(server.url, 2, tenants, requests_per_second=None) as gateways, AsyncExitStack() as open_calls:
            began, charged = gateways.clock.ms, 0.0
            running: list[tuple[Admission, float]] = []
            for step, *args in steps:
                if step == "wait":
                    gateways.clock.ms += args[0]
                elif step == "hold":
                    admission = await open_calls.enter_async_context(
                        gateways.limiters[args[0]].admitted("a", "interactive")
                    )
                    with contextlib.suppress(ResourceExhausted):
                        await admission.hold(args[1])
                        running.append((admission, args[1]))
                        charged += args[1]
                elif step == "settle" and running:
                    admission, estimate = running.pop(args[0] % len(running))
                    admission.settle(estimate * args[1])
                    charged -= estimate * (1 - args[1])
                elif step == "crash":
                    gateways.crash(args[0])
                else:
                    await gateways.tick()
                bound = burst + rate * (gateways.clock.ms - began) / 1000
                assert charged <= bound + 0.001 * len(steps)

    asyncio.run(play())


async def test_settlement_balances_to_zero(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", audio=Bucket(10.0, 100.0))}
    async with fleet(valkey.url, 2, tenants, requests_per_second=None) as gateways:
        for number in range(50):
            async with gateways.limiters[number % 2].admitted("a", "interactive") as admission:
                await admission.hold(3.0)
                admission.settle(0.0)
                admission.settle(0.0)  # counts once
        await gateways.tick()
        for limiter in gateways.limiters:
            await limiter._return_idle(all_of_it=True)
        (left,) = await gateways.limiters[0].left(tenants.values())
        assert left.left == 100.0


async def test_more_than_was_estimated_is_charged_too(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", audio=Bucket(10.0, 100.0))}
    async with fleet(valkey.url, 1, tenants, requests_per_second=None, leasing=False) as gateways:
        async with gateways.limiters[0].admitted("a", "interactive") as admission:
            await admission.hold(3.0)
            admission.settle(130.0)
        await gateways.tick()
        (left,) = await gateways.limiters[0].left(tenants.values())
        assert left.left == -30.0
        error = await held(gateways.limiters[0], 5.0, "a")
        assert error is not None
        assert error.retry_after_ms == 3500


# --- the delay


@pytest.mark.parametrize("leasing", [False, True])
async def test_the_delay_is_right_to_the_millisecond(valkey: Valkey, leasing: bool) -> None:
    async with fleet(valkey.url, requests_per_second=3.0, requests_burst=2.0, leasing=leasing) as gateways:
        (limiter,) = gateways.limiters
        assert [await refusal(limiter) for _ in range(2)] == [None, None]
        error = await refusal(limiter)
        assert error is not None
        assert error.retry_after_ms == 334
        assert error.quota == "all requests"
        gateways.clock.ms += 333
        assert await refusal(limiter) is not None
        gateways.clock.ms += 1
        assert await refusal(limiter) is None


async def test_what_is_dearer_than_the_burst_passes_a_full_bucket_only(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", audio=Bucket(10.0, 20.0))}
    async with fleet(valkey.url, 1, tenants, requests_per_second=None) as gateways:
        (limiter,) = gateways.limiters
        assert await held(limiter, 60.0, "a") is None
        error = await held(limiter, 60.0, "a")
        assert error is not None
        assert error.retry_after_ms == 6000  # from -40 to 20
        gateways.clock.ms += 6000
        assert await held(limiter, 60.0, "a") is None


async def test_those_refused_together_come_back_one_by_one_and_all_get_in(valkey: Valkey) -> None:
    rate, callers = 20.0, 100
    async with fleet(valkey.url, 2, requests_per_second=rate, requests_burst=4.0, gateways=2) as gateways:
        due = [(gateways.clock.ms, number) for number in range(callers)]
        attempts = 0
        while due:
            due.sort()
            at, number = due.pop(0)
            gateways.clock.ms = max(at, gateways.clock.ms)
            attempts += 1
            error = await refusal(gateways.limiters[number % 2])
            if error is not None:
                due.append((gateways.clock.ms + error.retry_after_ms, number))
        assert attempts <= 2.5 * callers
        assert gateways.clock.ms - 1_000_000 <= 1.2 * 1000 * callers / rate


# --- fairness, priorities, modes


async def test_a_tenants_own_limit_does_not_touch_others(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", requests=Bucket(1.0, 3.0))}
    async with fleet(valkey.url, 1, tenants, requests_per_second=100.0) as gateways:
        (limiter,) = gateways.limiters
        answers = [await refusal(limiter, "a") for _ in range(5)]
        assert answers[:3] == [None] * 3
        assert answers[4] is not None
        assert answers[4].quota == "tenant:a requests"
        assert [await refusal(limiter, "b") for _ in range(20)] == [None] * 20


async def test_a_refusal_by_one_bucket_takes_nothing_from_the_other(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", requests=Bucket(1.0, 1.0))}
    async with fleet(valkey.url, 1, tenants, requests_per_second=10.0, requests_burst=10.0, leasing=False) as gateways:
        (limiter,) = gateways.limiters
        answers = []
        for _ in range(6):
            answers.append(await refusal(limiter, "a"))
            limiter._pools.clear()  # not from what is remembered
        assert answers.count(None) == 1
        left = {(entry.tenant, entry.limit): entry.left for entry in await limiter.left(tenants.values())}
        assert left == {("", "requests"): 9.0, ("a", "requests"): 0.0}


async def test_batch_work_leaves_a_share_to_interactive_calls(valkey: Valkey) -> None:
    limits: dict[str, Any] = {"requests_per_second": 1.0, "requests_burst": 40.0, "interactive_share": 0.25}
    async with fleet(valkey.url, 1, **limits) as gateways:
        (limiter,) = gateways.limiters
        batch = [await refusal(limiter, "a", "batch") for _ in range(40)]
        assert batch.count(None) == 30
        await limiter._return_idle(all_of_it=True)
        interactive = [await refusal(limiter, "a") for _ in range(40)]
        assert interactive.count(None) == 10


async def test_in_the_shadow_nobody_is_refused(valkey: Valkey) -> None:
    async with fleet(valkey.url, requests_per_second=1.0, requests_burst=1.0, mode="shadow") as gateways:
        assert [await refusal(gateways.limiters[0]) for _ in range(10)] == [None] * 10


async def test_close_to_the_limit_a_block_leaves_something_to_others(valkey: Valkey) -> None:
    async with fleet(valkey.url, 2, requests_per_second=100.0, requests_burst=100.0) as gateways:
        greedy, modest = gateways.limiters
        for _ in range(3):  # so much demand that a block could be all there is
            await asyncio.gather(*(refusal(greedy) for _ in range(60)))
            gateways.clock.ms += 250
        await asyncio.gather(*(refusal(greedy) for _ in range(5)))
        assert await refusal(modest) is None


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was taken by calls that had to wait for the ledger."""
    costs: list[int] = []
    take = Pool.take

    async def counted(self: Pool, cost: int) -> Any:
        costs.append(cost)
        return await take(self, cost)

    monkeypatch.setattr(Pool, "take", counted)
    return costs


async def calls(limiter: Limiter, count: int, clock: Clock | None = None) -> None:
    """Calls one after the other, a millisecond apart, while the ledger is quicker than that."""
    for _ in range(count):
        if clock is not None:
            clock.ms += 1
        assert await refusal(limiter) is None
        await asked(limiter)


async def asked(limiter: Limiter) -> int:
    """Waits until the ledger has answered; what is at hand then."""
    pools = [pool for _, pool in limiter._pools.values() if pool is not None]
    await until(lambda: all(pool._asking is None for pool in pools))
    return sum(pool.at_hand for pool in pools)


async def test_while_demand_is_steady_nobody_waits_for_the_ledger(valkey: Valkey, waits: list[int]) -> None:
    async with fleet(valkey.url, requests_per_second=100_000) as gateways:
        limiter = gateways.limiters[0]
        await calls(limiter, 400, gateways.clock)
        waits.clear()
        await calls(limiter, 1000, gateways.clock)
        assert waits == []
        # What lies ready is a block and a quarter at most, and what was not needed goes back.
        (left,) = await limiter.left([])
        assert 100_000 - 260 <= left.left <= 100_000
        gateways.clock.ms += 2000
        await gateways.tick()
        (left,) = await limiter.left([])
        assert left.left == 100_000


async def test_after_a_pause_blocks_double(valkey: Valkey, waits: list[int]) -> None:
    async with fleet(valkey.url, requests_per_second=100_000) as gateways:
        limiter = gateways.limiters[0]
        await calls(limiter, 50, gateways.clock)
        gateways.clock.ms += 60_000
        await gateways.tick()
        waits.clear()
        await calls(limiter, 1000)  # all at once
        assert len(waits) <= 10


async def test_where_tokens_are_scarce_nothing_is_taken_ahead(valkey: Valkey) -> None:
    async with fleet(valkey.url, 2, requests_per_second=100, requests_burst=100) as gateways:
        await calls(gateways.limiters[0], 60)
        for number in range(40):  # none of what is left lies where it is not needed
            late = await refusal(gateways.limiters[1])
            assert late is None or number > 20, number


@pytest.mark.parametrize("gateway", [0, 1])
async def test_who_comes_when_told_gets_in_at_any_gateway(valkey: Valkey, gateway: int) -> None:
    limits: dict[str, Any] = {
        "audio_seconds_per_second": 1.0,
        "audio_seconds_burst": 100.0,
        "requests_per_second": None,
    }
    async with fleet(valkey.url, 2, **limits) as gateways:
        busy, at_hand = gateways.limiters[0], 0
        for _ in range(12):
            assert await held(busy, 1.0) is None
            at_hand = await asked(busy)
        assert at_hand > 0
        (left,) = await busy.left([])
        dear = left.left + at_hand / 1000 + 0.4
        error = await held(busy, dear)
        assert error is not None
        gateways.clock.ms += error.retry_after_ms
        assert await held(gateways.limiters[gateway], dear) is None


async def test_at_the_end_what_was_asked_for_ahead_goes_back_too(valkey: Valkey) -> None:
    async with fleet(valkey.url, requests_per_second=1000) as gateways:
        (limiter,) = gateways.limiters
        await calls(limiter, 30, gateways.clock)
        (pool,) = [pool for _, pool in limiter._pools.values() if pool is not None]
        while pool._asking is None:
            assert await refusal(limiter) is None
        await limiter._return_idle(all_of_it=True)
        assert await asked(limiter) == 0


async def test_a_cancel_spends_nothing(valkey: Valkey) -> None:
    async with fleet(valkey.url, requests_per_second=1.0, requests_burst=10.0) as gateways:
        (limiter,) = gateways.limiters
        for _ in range(30):
            leaving = asyncio.create_task(refusal(limiter))
            await asyncio.sleep(0)
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
        await asyncio.sleep(0.05)
        answers = [await refusal(limiter) for _ in range(10)]
        # One that was served in the moment in which it left may have been counted already.
        assert answers.count(None) >= 9


# --- places


async def test_calls_at_once_are_counted_over_all_gateways(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", concurrent=5)}
    async with fleet(valkey.url, 2, tenants, requests_per_second=None) as gateways, AsyncExitStack() as calls:
        answers = []
        for number in range(8):
            try:
                await calls.enter_async_context(gateways.limiters[number % 2].admitted("a", "interactive"))
                answers.append("in")
            except ResourceExhausted as error:
                answers.append(error.reason)
        assert answers == ["in"] * 5 + ["TOO_MANY_CONCURRENT"] * 3
        await calls.aclose()
        await gateways.tick()
        (left,) = await gateways.limiters[0].left(tenants.values())
        assert left.left == 5


async def test_the_places_of_a_gateway_that_died_are_free_after_its_lease(valkey: Valkey) -> None:
    tenants = {"a": Tenant("a", concurrent=3)}
    async with fleet(valkey.url, 2, tenants, requests_per_second=None) as gateways:
        dead = [gateways.limiters[0].admitted("a", "interactive") for _ in range(3)]
        for call in dead:
            await call.__aenter__()
        gateways.crash(0)
        assert await refusal(gateways.limiters[1], "a") is not None
        gateways.clock.ms += 10_001
        assert await refusal(gateways.limiters[1], "a") is None
        for call in dead:
            await call.__aexit__(None, None, None)


PLACE_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(0, 2)),
        st.tuples(st.just("leave"), st.integers(0, 20)),
        st.tuples(st.just("tick")),
        st.tuples(st.just("wait"), st.integers(1, 2000)),
    ),
    max_size=60,
)


@BUSY
@given(steps=PLACE_STEPS)
def test_never_more_calls_at_once_than_allowed(server: Valkey, steps: list[Any]) -> None:
    async def play() -> None:
        tenants = {"a": Tenant("a", concurrent=4)}
        async with fleet(server.url, 3, tenants, requests_per_second=None) as gateways:
            running: list[Any] = []
            try:
                for step, *args in steps:
                    if step == "enter":
                        call = gateways.limiters[args[0]].admitted("a", "interactive")
                        with contextlib.suppress(ResourceExhausted):
                            await call.__aenter__()
                            running.append(call)
                    elif step == "leave" and running:
                        await running.pop(args[0] % len(running)).__aexit__(None, None, None)
                    elif step == "wait":
                        gateways.clock.ms += args[0]
                        await gateways.tick()
                    else:
                        await gateways.tick()
                    assert len(running) <= 4
            finally:
                for call in running:
                    await call.__aexit__(None, None, None)
            await gateways.tick()
            answers = [await refusal(limiter, "a") for limiter in gateways.limiters]
            assert answers == [None] * 3

    asyncio.run(play())


# --- without the ledger


async def test_without_a_ledger_each_gateway_lets_its_share_through() -> None:
    async with fleet(None, 2, requests_per_second=10.0, requests_burst=20.0, gateways=2) as gateways:
        answers = [await refusal(limiter) for limiter in gateways.limiters for _ in range(30)]
        assert answers.count(None) == 20
        gateways.clock.ms += 1000
        answers = [await refusal(limiter) for limiter in gateways.limiters for _ in range(30)]
        assert answers.count(None) == 10


@given(
    steps=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 5000)), max_size=40),
    rate=st.floats(0.5, 50.0),
    burst=st.floats(1.0, 50.0),
)
def test_a_local_bucket_keeps_to_rate_and_burst(steps: list[tuple[int, int]], rate: float, burst: float) -> None:
    clock = Clock()
    buckets = LocalBuckets(1, clock.seconds)
    scope = Scope("key", "all", Bucket(rate, burst))
    spent, began = 0, clock.ms
    for wait, cost in steps:
        clock.ms += wait
        if not hasattr(buckets.take([scope], cost), "seconds"):
            spent += cost
        assert spent <= burst * UNITS + rate * (clock.ms - began) + max([0, *(cost for _, cost in steps)]) + 1
