"""Blocks of tokens that a gateway holds ready, so that most calls need no round trip to the ledger."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from common import metrics
from common.store import StoreUnavailable
from gateway.buckets import Granted, LocalBuckets, Scope, SharedBuckets, Short

BLOCK_SECONDS = 0.2
"""A block should last so long at the present demand …"""
IDLE_SECONDS = 1.0
"""… and what of it has not been spent after this goes back."""
MAX_QUEUED = 2000
"""Calls that wait for the same block; more are refused."""


@dataclass
class _Demand:
    """Units that were wanted lately, and how many that makes for a block."""

    began: float
    units: float = 0.0
    per_second: float = 0.0

    def add(self, cost: int, now: float) -> None:
        if now - self.began >= BLOCK_SECONDS:
            self.per_second = self.units / (now - self.began)
            self.began, self.units = now, 0.0
        self.units += cost

    @property
    def block(self) -> int:
        return int(self.per_second * BLOCK_SECONDS)


@dataclass
class Pool:
    """The tokens at hand for calls that draw on the same buckets, in the buckets' units."""

    scopes: tuple[Scope, ...]
    shared: SharedBuckets
    local: LocalBuckets
    clock: Callable[[], float]
    leasing: bool
    """Off: each call asks the ledger."""
    parts: int
    """Gateways that there are."""
    at_hand: int = 0
    _borrowed: bool = False
    """What is at hand came from the ledger."""
    _queue: deque[tuple[int, asyncio.Future[Short | None]]] = field(default_factory=deque)
    _asking: asyncio.Task[None] | None = None
    _denied: Short | None = None
    _denied_until: float = 0.0
    _promised: float = 0.0
    """Until then, what comes in is promised to calls that were refused."""
    _spent_at: float = 0.0
    _demand: _Demand = field(init=False)

    def __post_init__(self) -> None:
        self._demand = _Demand(self.clock())

    async def take(self, cost: int) -> Short | None:
        """Spends, or says what is short and when to come again. A cancel while it waits spends nothing."""
        now = self.clock()
        self._demand.add(cost, now)
        if not self._queue and cost <= self.at_hand:
            self.at_hand -= cost
            self._spent_at = now
            return None
        if self._denied is not None and now < self._denied_until:
            return self._refuse(self._denied.scope, self._denied_until - now, cost)
        if len(self._queue) >= MAX_QUEUED:
            return self._refuse(self.scopes[0], 1.0, cost)
        answer: asyncio.Future[Short | None] = asyncio.get_running_loop().create_future()
        self._queue.append((cost, answer))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.result() is None:
                self.at_hand += cost  # it was served in the moment in which it left
            raise

    async def give(self, amount: int) -> None:
        """Puts back what was taken too much, or takes what was too little."""
        if amount >= 0 and self.leasing and self._borrowed:
            self.at_hand += amount
            self._spent_at = self.clock()
        elif amount:
            await self._return(amount)

    async def return_idle(self, *, all_of_it: bool = False) -> None:
        """Puts back what nobody has spent lately. Between times it may be spent at most twice as late."""
        if self.at_hand and (all_of_it or self.clock() - self._spent_at >= IDLE_SECONDS):
            amount, self.at_hand = self.at_hand, 0
            await self._return(amount)

    async def _return(self, amount: int) -> None:
        try:
            await self.shared.give(self.scopes, amount)
        except StoreUnavailable:
            # Not tried again: it may have arrived. What is lost was charged and not spent: the limit still holds.
            self.local.give(self.scopes, amount)

    async def _ask(self) -> None:
        """Asks until nobody waits. One round trip serves all who wait by then."""
        try:
            while self._queue:
                if self._queue[0][1].done():
                    self._queue.popleft()
                    continue
                cost = self._queue[0][0]
                if cost > self.at_hand:
                    got = await self._more(cost)
                    if isinstance(got, Short):
                        self._deny(got)
                        continue
                    self.at_hand += got.amount
                    self._denied = None
                self._serve()
        finally:
            self._asking = None
            while self._queue:  # only if this was cancelled
                self._queue.popleft()[1].cancel()

    async def _more(self, cost: int) -> Granted | Short:
        waiting = sum(cost for cost, answer in self._queue if not answer.done())
        want = max(cost, waiting - self.at_hand) + (self._demand.block if self.leasing else 0)
        try:
            got = await self.shared.take(self.scopes, cost, want if self.leasing else cost)
        except StoreUnavailable:
            metrics.LIMITER_DEGRADED.inc()
            return self.local.take(self.scopes, cost)
        self._borrowed = True
        return got

    def _serve(self) -> None:
        while self._queue and self._queue[0][0] <= self.at_hand:
            cost, answer = self._queue.popleft()
            if not answer.done():
                self.at_hand -= cost
                self._spent_at = self.clock()
                answer.set_result(None)

    def _deny(self, short: Short) -> None:
        """Refuses all who wait, each with a time of its own."""
        self._denied, self._denied_until = short, self.clock() + short.seconds
        while self._queue:
            cost, answer = self._queue.popleft()
            if not answer.done():
                answer.set_result(self._refuse(short.scope, short.seconds, cost))

    def _refuse(self, scope: Scope, seconds: float, cost: int) -> Short:
        """Who is refused later comes again later, as fast as the bucket fills: not all at once."""
        now = self.clock()
        due = max(now + seconds, self._promised)
        self._promised = due + cost / 1000 / scope.bucket.rate * self.parts
        return Short(scope, due - now)
