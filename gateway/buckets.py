"""Token buckets in the ledger, shared by all gateways, and the same in one process.

A bucket's level rises by `rate` a second up to `burst`, where it begins. Something that costs more than the bucket
holds is let through a full one, whose level then is negative: all that is let through in t seconds is at most
rate · t + max(burst, the dearest). What is let through is always charged to several buckets at once (all tenants' and
the tenant's own), or to none.

Amounts are counted in thousandths, so that the server's replies, which are whole numbers, lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.store import Script, Store, Word
from gateway.tenants import Bucket

UNITS = 1000
SHRINK = 4
"""A block is at most this part of what is left, so that close to the limit everybody still gets something."""

# Each bucket: level in units, the time in ms at which it had that level. ARGV: the time ("": the server's own), then
# what the script wants, then rate (units a ms), burst and reserve (units) of each bucket.
_FILL = """
local function now()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function filled(key, rate, burst, time)
  local saved = redis.call('HMGET', key, 'level', 'at')
  local level, at = tonumber(saved[1]) or burst, tonumber(saved[2]) or time
  return math.min(burst, level + rate * math.max(0, time - at)), math.max(at, time)
end
local function save(key, level, at, rate, burst)
  redis.call('HSET', key, 'level', string.format('%.17g', level), 'at', string.format('%.0f', at))
  redis.call('PEXPIRE', key, math.min(3.2e10, math.ceil(2 * (burst + math.max(0, -level)) / rate) + 1000))
end
local function bucket(first, i)
  local at = first + 3 * (i - 1)
  return tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
end
"""

# cost, want, promise → {granted, 0, 0, 0} or {0, which bucket is short, ms until it is not, ms until what it will have
# then is not promised yet}. In the latter case the next `promise` units are promised to whoever asked.
TAKE = Script(
    _FILL
    + f"""
local time, cost, want, promise = now(), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local levels, ats, grant, short, wait = {{}}, {{}}, want, 0, 0
for i, key in ipairs(KEYS) do
  local rate, burst, reserve = bucket(5, i)
  local level, at = filled(key, rate, burst, time)
  levels[i], ats[i] = level, at
  local missing = math.min(cost, burst - reserve) + reserve - level
  if missing > 0 then
    local ms = math.ceil(missing / rate)
    if ms > wait then short, wait = i, ms end
  end
  grant = math.min(grant, math.max(cost, math.floor((level - reserve) / {SHRINK})))
end
if wait > 0 then
  local rate, burst = bucket(5, short)
  local first = math.max(wait, (tonumber(redis.call('HGET', KEYS[short], 'promised')) or 0) - time)
  save(KEYS[short], levels[short], ats[short], rate, burst)
  local promised = time + first + promise / rate
  redis.call('HSET', KEYS[short], 'promised', string.format('%.0f', promised))
  redis.call('PEXPIREAT', KEYS[short], math.ceil(math.max(promised, redis.call('PEXPIRETIME', KEYS[short]))))
  return {{0, short, wait, math.ceil(first)}}
end
for i, key in ipairs(KEYS) do
  local rate, burst = bucket(5, i)
  save(key, levels[i] - grant, ats[i], rate, burst)
end
return {{grant, 0, 0, 0}}
"""
)

# amount: put back, or if negative taken after all
GIVE = Script(
    _FILL
    + """
local time, amount = now(), tonumber(ARGV[2])
for i, key in ipairs(KEYS) do
  local rate, burst = bucket(3, i)
  local level, at = filled(key, rate, burst, time)
  save(key, math.min(burst, level + amount), at, rate, burst)
end
return 1
"""
)

# → the level of each bucket, rounded down
LEVELS = Script(
    _FILL
    + """
local time, levels = now(), {}
for i, key in ipairs(KEYS) do
  local rate, burst = bucket(2, i)
  levels[i] = math.floor((filled(key, rate, burst, time)))
end
return levels
"""
)


@dataclass(frozen=True, slots=True)
class Scope:
    """A bucket, and whose it is."""

    key: str
    """In the ledger."""
    quota: str
    """What a caller is told of it."""
    bucket: Bucket
    reserve: float = 0.0
    """The share of `burst` that stays for others."""

    def words(self) -> tuple[Word, Word, Word]:
        """Rate, burst and reserve as the scripts take them."""
        burst = self.bucket.burst * UNITS
        return repr(self.bucket.rate * UNITS / 1000), repr(burst), repr(burst * self.reserve)


@dataclass(frozen=True, slots=True)
class Granted:
    """So much may be spent, in units."""

    amount: int
    alone: bool = False
    """Without the ledger."""


@dataclass(frozen=True, slots=True)
class Short:
    """A bucket has too little now, and will have enough after so many seconds."""

    scope: Scope
    seconds: float
    free_seconds: float = 0.0
    """After so many, what it has is not promised to anybody who was refused before."""


class SharedBuckets:
    """The buckets in the ledger."""

    def __init__(self, ledger: Store, now: Callable[[], int] | None = None) -> None:
        """`now`: milliseconds, instead of the server's own time, for tests."""
        self._ledger = ledger
        self._now = now

    @property
    def worth_asking(self) -> bool:
        """The ledger may answer."""
        return self._ledger.worth_asking

    async def take(self, scopes: Sequence[Scope], cost: int, want: int, promise: int) -> Granted | Short:
        """Takes from all or from none: `want` units where they are plenty, fewer where not, `cost` at least.

        Where there is too little, the next `promise` units of the bucket are promised to those who are refused now.

        Raises:
            StoreUnavailable: the ledger does not answer. It may have taken all the same.
        """
        granted, short, ms, free_ms = await self._run(TAKE, scopes, cost, max(cost, want), promise)
        return Granted(granted) if granted else Short(scopes[short - 1], ms / 1000, free_ms / 1000)

    async def give(self, scopes: Sequence[Scope], amount: int) -> None:
        """Puts back, or takes after all if it is negative. Never tried twice.

        Raises:
            StoreUnavailable: the ledger does not answer.
        """
        await self._run(GIVE, scopes, amount)

    async def levels(self, scopes: Sequence[Scope]) -> list[float]:
        """What is left in each, in the bucket's own measure.

        Raises:
            StoreUnavailable: the ledger does not answer.
        """
        return [level / UNITS for level in await self._run(LEVELS, scopes)]

    async def _run(self, script: Script, scopes: Sequence[Scope], *amounts: int) -> list[int]:
        time: Word = "" if self._now is None else self._now()
        words = [word for scope in scopes for word in scope.words()]
        reply = await self._ledger.run(script, [scope.key for scope in scopes], [time, *amounts, *words])
        return reply if isinstance(reply, list) else [reply]


class LocalBuckets:
    """The same in one process, for when the ledger is away: each bucket a part of what all gateways may spend."""

    def __init__(self, parts: int, clock: Callable[[], float]) -> None:
        """`parts`: gateways that there are."""
        self._parts = parts
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, scopes: Sequence[Scope], cost: int) -> Granted | Short:
        """Takes `cost` units from all or from none."""
        levels = [self._level(scope) for scope in scopes]
        for scope, level in zip(scopes, levels, strict=True):
            burst, rate = self._burst(scope), self._rate(scope)
            reserve = burst * scope.reserve
            missing = min(cost, burst - reserve) + reserve - level
            if missing > 0:
                return Short(scope, math.ceil(missing / rate * 1000) / 1000)
        for scope, level in zip(scopes, levels, strict=True):
            self._levels[scope.key] = (level - cost, self._clock())
        return Granted(cost, alone=True)

    def give(self, scopes: Sequence[Scope], amount: int) -> None:
        """Puts back, or takes after all if it is negative."""
        for scope in scopes:
            level = min(self._burst(scope), self._level(scope) + amount)
            self._levels[scope.key] = (level, self._clock())

    def _level(self, scope: Scope) -> float:
        burst = self._burst(scope)
        level, at = self._levels.get(scope.key, (burst, self._clock()))
        return min(burst, level + self._rate(scope) * max(0.0, self._clock() - at))

    def _burst(self, scope: Scope) -> float:
        # A caller at a time gets through, however many gateways share a small bucket.
        return max(1.0 * UNITS, scope.bucket.burst * UNITS / self._parts)

    def _rate(self, scope: Scope) -> float:
        return scope.bucket.rate * UNITS / self._parts
