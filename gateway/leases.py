"""Blocks of tokens that a gateway holds ready, so that most calls need no round trip to the ledger."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from common import metrics
from common.store import StoreUnavailable
from gateway.buckets import UNITS, Granted, LocalBuckets, Scope, SharedBuckets, Short

BLOCK_SECONDS = 0.2
"""A block should last so long at the present demand …"""
IDLE_SECONDS = 1.0
"""… and what of it has not been spent after this goes back."""
LOW_SHARE = 4
"""When this part of a block is left, the next one is asked for: so nobody waits for it."""
PROMISED_AHEAD = 8
"""Calls that are refused without asking the ledger, once it has refused one."""
MAX_QUEUED = 2000
"""Calls that wait for the same block; more are refused."""


@dataclass
class _Demand:
    """Units that were wanted lately, and how many that makes for a block."""

    began: float
    units: int = 0
    before: int = 0
    """What would have been wanted in a block's time, in the time before."""
    block: int = 0

    def add(self, cost: int, now: float) -> None:
        if now - self.began >= BLOCK_SECONDS:
            self.before = int(self.units / (now - self.began) * BLOCK_SECONDS)
            self.began, self.units = now, 0
        # After a pause blocks double from one to the next.
        self.block = max(self.before, self.units)
        self.units += cost


@dataclass(frozen=True, slots=True)
class Taken:
    """Spent."""

    alone: bool
    """From what this gateway may spend without the ledger: so a refund goes there too."""


FROM_LEDGER = Taken(alone=False)


@dataclass
class _Promise:
    """When those who are refused may come again: one by one, as fast as the bucket fills."""

    scope: Scope
    refused_until: float
    """Before that, nobody needs to ask."""
    due: float
    """When the next of them may come."""
    end: float
    """From then on, what the bucket gets is not promised to this gateway."""
    step: float
    """Seconds in which the bucket gets a unit, for this gateway."""
    cost: int
    """What was refused. For less there may be enough."""

    def holds(self, now: float) -> bool:
        """Whether one more can be refused within it."""
        return now < self.refused_until and self.due < self.end - self.step

    def refuse(self, cost: int, now: float) -> Short:
        """Tells one more when to come."""
        due = max(self.due, now)
        self.due = due + cost * self.step
        return Short(self.scope, due - now)


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
    admitted: metrics.Counted
    """Calls that got what they asked for."""
    at_hand: int = 0
    _queue: deque[tuple[int, asyncio.Future[Short | Taken]]] = field(default_factory=deque)
    _asking: asyncio.Task[None] | None = None
    _promise: _Promise | None = None
    _plenty: bool = False
    """The ledger gave all that was wanted: otherwise nothing is asked for ahead."""
    _spent_at: float = 0.0
    _demand: _Demand = field(init=False)

    def __post_init__(self) -> None:
        self._demand = _Demand(self.clock())

    def take_at_hand(self, cost: int) -> bool:
        """Spends, if that needs no waiting; so most calls do. Otherwise `take` is to be asked."""
        if self._queue or cost > self.at_hand:
            return False
        now = self.clock()
        self._demand.add(cost, now)
        self.at_hand -= cost
        self._spent_at = now
        low = self._demand.block // LOW_SHARE
        if self.at_hand < low and cost <= low and self._may_ask_ahead():
            self._asking = asyncio.create_task(self._ask(ahead=True))
        return True

    async def take(self, cost: int) -> Short | Taken:
        """Spends, or says what is short and when to come again. A cancel while it waits spends nothing."""
        if self.take_at_hand(cost):
            return FROM_LEDGER
        now = self.clock()
        self._demand.add(cost, now)
        if self._promise is not None and cost >= self._promise.cost and self._promise.holds(now):
            return self._promise.refuse(cost, now)
        if len(self._queue) >= MAX_QUEUED:
            return Short(self.scopes[0], 1.0)
        if not self._queue and not self.shared.worth_asking:
            got = self._alone(cost)
            if isinstance(got, _Promise):
                self._promise = got
                return got.refuse(cost, now)
            return Taken(alone=True)
        answer: asyncio.Future[Short | Taken] = asyncio.get_running_loop().create_future()
        self._queue.append((cost, answer))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and isinstance(answer.result(), Taken):
                self.at_hand += cost  # it was served in the moment in which it left
            raise

    async def give(self, amount: int, taken: Taken) -> None:
        """Puts back what was taken too much, or takes what was too little: where it came from, within the burst."""
        if taken.alone:
            self.local.give(self.scopes, amount)
        elif amount:
            await self._return(amount)

    async def return_idle(self, *, all_of_it: bool = False) -> None:
        """Puts back what nobody has spent lately. Between times it may be spent at most twice as late."""
        if all_of_it and self._asking is not None:
            await asyncio.wait({self._asking})  # what it gets goes back too
        if self.at_hand and (all_of_it or self.clock() - self._spent_at >= IDLE_SECONDS):
            amount, self.at_hand = self.at_hand, 0
            await self._return(amount)

    async def _return(self, amount: int) -> None:
        try:
            await self.shared.give(self.scopes, amount)
        except StoreUnavailable:
            # Not tried again: it may have arrived. What is lost was charged and not spent: the limit still holds.
            self.local.give(self.scopes, amount)

    def _may_ask_ahead(self) -> bool:
        return self._plenty and self.leasing and self._asking is None and self.shared.worth_asking

    async def _ask(self, *, ahead: bool = False) -> None:
        """Asks until nobody waits. One round trip serves all who wait by then. `ahead`: and before, for a block."""
        try:
            if ahead:
                await self._ask_ahead()
            while self._queue:
                if self._queue[0][1].done():
                    self._queue.popleft()
                    continue
                cost = self._queue[0][0]
                if cost > self.at_hand:
                    got = await self._more(cost)
                    if isinstance(got, _Promise):
                        self._deny(got)
                        continue
                    self.at_hand += got.amount
                    self._promise = None
                    self._serve(Taken(alone=got.alone))
                    continue
                self._serve(FROM_LEDGER)
        finally:
            self._asking = None
            while self._queue:  # only if this was cancelled
                self._queue.popleft()[1].cancel()

    async def _ask_ahead(self) -> None:
        """Gets the next block, if there is plenty. Nobody waits for it."""
        want = self._demand.block
        self._plenty = False
        with suppress(StoreUnavailable):
            got = await self.shared.take(self.scopes, 1, want, 0)
            if isinstance(got, Granted):
                self.at_hand += got.amount
                self._plenty = got.amount >= want

    async def _more(self, cost: int) -> Granted | _Promise:
        """More tokens from the ledger, or from what this gateway may spend without it."""
        waiting, missing = self._waiting(), cost - self.at_hand
        want = max(missing, waiting - self.at_hand) + self._demand.block if self.leasing else missing
        # What is at hand may be spent by others before who is refused comes again, and it may come to another gateway.
        at_hand, promise = self.at_hand, waiting + PROMISED_AHEAD * cost
        try:
            got = await self.shared.take(self.scopes, missing, want, promise + at_hand)
        except StoreUnavailable:
            return self._alone(cost)
        self._plenty = isinstance(got, Granted) and got.amount >= want
        if isinstance(got, Granted):
            return got
        more = at_hand / (got.scope.bucket.rate * UNITS)
        return self._promised(Short(got.scope, got.seconds + more, got.free_seconds + more), promise, 1, cost)

    def _alone(self, cost: int) -> Granted | _Promise:
        """From what this gateway may spend without the ledger."""
        metrics.LIMITER_DEGRADED.inc()
        local = self.local.take(self.scopes, cost)
        return self._promised(local, math.inf, self.parts, cost) if isinstance(local, Short) else local

    def _promised(self, short: Short, units: float, parts: int, cost: int) -> _Promise:
        now, step = self.clock(), parts / (short.scope.bucket.rate * UNITS)
        due = now + max(short.seconds, short.free_seconds)
        return _Promise(short.scope, now + short.seconds, due, due + units * step, step, cost)

    def _waiting(self) -> int:
        return sum(cost for cost, answer in self._queue if not answer.done())

    def _serve(self, taken: Taken) -> None:
        while self._queue and self._queue[0][0] <= self.at_hand:
            cost, answer = self._queue.popleft()
            if not answer.done():
                self.at_hand -= cost
                self._spent_at = self.clock()
                answer.set_result(taken)

    def _deny(self, promise: _Promise) -> None:
        """Refuses all who wait, each with a time of its own."""
        self._promise, now = promise, self.clock()
        while self._queue:
            cost, answer = self._queue.popleft()
            if not answer.done():
                answer.set_result(promise.refuse(cost, now))
