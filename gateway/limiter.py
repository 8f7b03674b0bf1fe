"""Who may call now: requests, audio seconds and calls at once, for each tenant and for all together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from common import metrics
from common.errors import ResourceExhausted
from common.logs import logger
from common.metadata import Priority
from common.settings import LimiterSettings
from common.store import Store
from gateway.buckets import UNITS, LocalBuckets, Scope, SharedBuckets
from gateway.leases import FROM_LEDGER, Pool, Taken
from gateway.places import Places
from gateway.tenants import Bucket, Tenant

Kind = Literal["requests", "audio"]
KINDS: tuple[Kind, ...] = ("requests", "audio")

RENEW_SECONDS = 1.0
GIVE_BACK_SECONDS = 2.0
"""How long what is left may take to go back when a gateway ends."""
NO_PLACE_SECONDS = 1.0
"""When to come again where all places are taken: nobody knows better."""
MAX_SETTLING = 10_000
"""Settlements on their way; of more the estimates stay charged."""


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of a limit."""

    tenant: str
    """Empty: all tenants together."""
    limit: str
    left: float
    most: float


class Admission:
    """A call that is let in, and has its place until it ends. A context; entering raises what `Limiter.admitted` says.

    A class, since each call enters one: what `asynccontextmanager` makes costs three times as much.
    """

    def __init__(self, limiter: Limiter, tenant: Tenant, priority: Priority) -> None:
        self._limiter = limiter
        self._tenant = tenant
        self._priority = priority
        self._entered = False
        self._held: int | None = None
        self._taken = FROM_LEDGER
        self._closed = False

    async def __aenter__(self) -> Self:
        if self._tenant.concurrent is not None:
            self._entered = await self._limiter._enter(self._tenant, self._tenant.concurrent)
        try:
            if not self._limiter._spend_at_hand(self._tenant, "requests", self._priority, UNITS):
                await self._limiter._spend(self._tenant, "requests", self._priority, UNITS)
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *reason: object) -> None:
        self._close()

    async def hold(self, seconds: float) -> None:
        """Charges an estimate in seconds of audio, beside what is charged already.

        Raises:
            ResourceExhausted: it is too much now.
        """
        cost = max(1, round(seconds * UNITS))
        taken = await self._limiter._spend(self._tenant, "audio", self._priority, cost)
        if taken is None:
            return  # nothing limits it, or the limit is a shadow
        if self._closed:
            return  # its call ended meanwhile: what it took stays charged
        self._taken = taken
        if self._held is None:
            metrics.HOLDS.inc()
        self._held = (self._held or 0) + cost

    def settle(self, seconds: float) -> None:
        """The truth in the place of the estimate; once. What is never settled stays charged as it was estimated."""
        if self._held is None:
            return
        held, self._held = self._held, None
        metrics.HOLDS.dec()
        self._limiter._settle(self._tenant, self._priority, held - round(seconds * UNITS), self._taken)

    def _close(self) -> None:
        """Gives its place back. Nothing will be settled any more."""
        self._closed = True
        if self._held is not None:
            self._held = None
            metrics.HOLDS.dec()
        if self._entered:
            self._limiter._places.leave(self._tenant.name)


class Limiter:
    """All limits of one gateway."""

    def __init__(
        self,
        ledger: Store,
        settings: LimiterSettings,
        tenant: Callable[[str], Tenant],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], int] | None = None,
    ) -> None:
        """`clock`: seconds, of this process. `now`: milliseconds, instead of the ledger's own time, for tests."""
        self._settings = settings
        self._tenant = tenant
        self._clock = clock
        self._shared = SharedBuckets(ledger, now)
        self._local = LocalBuckets(settings.gateways, clock)
        self._places = Places(ledger, settings.gateways, now)
        self._pools: dict[tuple[str, Kind, Priority], tuple[Tenant, Pool | None]] = {}
        self._settling: set[asyncio.Task[None]] = set()

    def admitted(self, name: str, priority: Priority) -> Admission:
        """Lets a call in: it costs one request, and has a place until it ends.

        Raises:
            ResourceExhausted: not now.
        """
        return Admission(self, self._tenant(name), priority)

    async def run(self) -> None:
        """Renews what is held and gives back what lies idle, until cancelled; then all of it."""
        try:
            while True:
                await asyncio.sleep(RENEW_SECONDS)
                await self._places.renew()
                await self._return_idle(all_of_it=False)
        finally:
            try:
                async with asyncio.timeout(GIVE_BACK_SECONDS):
                    await asyncio.gather(*self._settling, return_exceptions=True)
                    await self._return_idle(all_of_it=True)
                    await self._places.give_back()
            except TimeoutError:
                logger().warning("not all tokens went back to the ledger; they count as spent")

    async def left(self, tenants: Iterable[Tenant]) -> list[Left]:
        """What is left of all limits that there are.

        Raises:
            StoreUnavailable: the ledger does not answer.
        """
        found = []
        for kind in KINDS:
            scope = self._global(kind, "interactive")
            if scope is not None:
                found += [await self._left("", kind, scope)]
        for tenant in tenants:
            for kind in KINDS:
                own = _own(tenant, kind)
                if own is not None:
                    found.append(await self._left(tenant.name, kind, own))
            if tenant.concurrent is not None:
                used = await self._places.used(tenant.name)
                found.append(Left(tenant.name, "calls at once", tenant.concurrent - used, tenant.concurrent))
        return found

    async def _left(self, tenant: str, kind: Kind, scope: Scope) -> Left:
        (level,) = await self._shared.levels([scope])
        return Left(tenant, "requests" if kind == "requests" else "audio seconds", level, scope.bucket.burst)

    async def _enter(self, tenant: Tenant, most: int) -> bool:
        if self._settings.mode == "off":
            return False
        if await self._places.enter(tenant.name, most):
            self._count(tenant, "places", "admitted")
            return True
        self._refuse(
            tenant,
            "TOO_MANY_CONCURRENT",
            "places",
            f"{most} calls of {tenant.name} run already; try again in a second, or end one",
            NO_PLACE_SECONDS,
            f"tenant:{tenant.name} concurrent calls",
        )
        return False

    def _spend_at_hand(self, tenant: Tenant, kind: Kind, priority: Priority, cost: int) -> bool:
        """Spends, if that needs no waiting. So it is for most calls, which are spared two coroutines."""
        pool = self._pool(tenant, kind, priority)
        if pool is None or not pool.take_at_hand(cost):
            return False
        pool.admitted.value += 1
        return True

    async def _spend(self, tenant: Tenant, kind: Kind, priority: Priority, cost: int) -> Taken | None:
        """Spends; None: nothing was spent, since nothing limits it."""
        pool = self._pool(tenant, kind, priority)
        if pool is None:
            return None
        short = await pool.take(cost)
        if isinstance(short, Taken):
            pool.admitted.value += 1
            return short
        self._refuse(
            tenant,
            "RATE_LIMITED",
            kind,
            f"the limit of {_words(short.scope, kind)} is reached; try again in {short.seconds:.2f} s",
            short.seconds,
            short.scope.quota,
        )
        return None

    def _refuse(self, tenant: Tenant, reason: str, limit: str, message: str, seconds: float, quota: str) -> None:
        if self._settings.mode == "shadow":
            self._count(tenant, limit, "would refuse")
            return
        self._count(tenant, limit, "refused")
        raise ResourceExhausted(message, reason, retry_after=seconds, quota=quota)

    def _settle(self, tenant: Tenant, priority: Priority, amount: int, taken: Taken) -> None:
        pool = self._pool(tenant, "audio", priority)
        if pool is None or not amount or len(self._settling) >= MAX_SETTLING:
            return
        task = asyncio.create_task(pool.give(amount, taken))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    def _pool(self, tenant: Tenant, kind: Kind, priority: Priority) -> Pool | None:
        """The tokens that such a call draws on; None: it has no limit."""
        if self._settings.mode == "off":
            return None
        key = (tenant.name, kind, priority)
        known, pool = self._pools.get(key, (None, None))
        if known is tenant:  # a tenant is never changed, only replaced: its limits are what they were
            return pool
        scopes = tuple(_scopes(self._global(kind, priority), _own(tenant, kind)))
        if not scopes:
            pool = None
        elif pool is None or pool.scopes != scopes:
            pool = Pool(
                scopes,
                self._shared,
                self._local,
                self._clock,
                leasing=self._settings.leasing,
                parts=self._settings.gateways,
                admitted=metrics.LIMITER_DECISIONS.of(kind, "admitted", metrics.tenant_label(tenant.name)),
            )
        self._pools[key] = tenant, pool
        return pool

    def _global(self, kind: Kind, priority: Priority) -> Scope | None:
        settings = self._settings
        if kind == "requests":
            rate, burst = settings.requests_per_second, settings.requests_burst
        else:
            rate, burst = settings.audio_seconds_per_second, settings.audio_seconds_burst
        if rate is None:
            return None
        reserve = settings.interactive_share if priority == "batch" else 0.0
        return Scope(f"{{limits}}:all:{kind}", f"all {_UNIT[kind]}", Bucket(rate, burst or rate), reserve)

    async def _return_idle(self, *, all_of_it: bool) -> None:
        pools = [pool for _, pool in self._pools.values() if pool is not None]
        await asyncio.gather(*(pool.return_idle(all_of_it=all_of_it) for pool in pools))

    def _count(self, tenant: Tenant, limit: str, outcome: str) -> None:
        metrics.LIMITER_DECISIONS.inc(limit, outcome, metrics.tenant_label(tenant.name))


_UNIT: Mapping[Kind, str] = {"requests": "requests", "audio": "audio seconds"}


def _own(tenant: Tenant, kind: Kind) -> Scope | None:
    bucket = tenant.requests if kind == "requests" else tenant.audio
    if bucket is None:
        return None
    return Scope(f"{{limits}}:tenant:{tenant.name}:{kind}", f"tenant:{tenant.name} {_UNIT[kind]}", bucket)


def _scopes(*scopes: Scope | None) -> Iterator[Scope]:
    yield from (scope for scope in scopes if scope is not None)


def _words(scope: Scope, kind: Kind) -> str:
    return f"{scope.bucket.rate:g} {_UNIT[kind]} a second ({scope.quota})"
