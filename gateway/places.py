"""Places for calls at once, shared by all gateways. A gateway that dies gives its places back within the lease."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from common import metrics
from common.store import Script, Store, StoreUnavailable

LEASE_SECONDS = 10.0
SPARE_SHARE = 16
"""A gateway keeps at most this part of a tenant's places ready while they are not used."""

# KEYS: a hash of gateway → "places lease". ARGV: time or "", gateway, how many it wants to have, how many there are,
# lease in ms. → how many it has now.
HOLD = Script("""
local time = tonumber(ARGV[1])
if not time then local t = redis.call('TIME'); time = t[1] * 1000 + math.floor(t[2] / 1000) end
local others, mine = 0, 0
local saved = redis.call('HGETALL', KEYS[1])
for i = 1, #saved, 2 do
  local count, lease = saved[i + 1]:match('(%S+) (%S+)')
  if tonumber(lease) <= time then redis.call('HDEL', KEYS[1], saved[i])
  elseif saved[i] ~= ARGV[2] then others = others + tonumber(count) end
end
mine = math.max(0, math.min(tonumber(ARGV[3]), tonumber(ARGV[4]) - others))
if mine == 0 then redis.call('HDEL', KEYS[1], ARGV[2])
else redis.call('HSET', KEYS[1], ARGV[2], mine .. ' ' .. string.format('%.0f', time + ARGV[5])) end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return mine
""")

USED = Script("""
local time = tonumber(ARGV[1])
if not time then local t = redis.call('TIME'); time = t[1] * 1000 + math.floor(t[2] / 1000) end
local used, saved = 0, redis.call('HGETALL', KEYS[1])
for i = 1, #saved, 2 do
  local count, lease = saved[i + 1]:match('(%S+) (%S+)')
  if tonumber(lease) > time then used = used + tonumber(count) end
end
return used
""")


@dataclass
class _Mine:
    """A tenant's places in this gateway."""

    limit: int
    used: int = 0
    held: int = 0


class Places:
    """The places that this gateway uses and holds, by tenant."""

    def __init__(self, ledger: Store, parts: int, now: Callable[[], int] | None = None) -> None:
        """`parts`: gateways that there are. `now`: milliseconds, instead of the server's own time, for tests."""
        self._ledger = ledger
        self._parts = parts
        self._now = now
        self._gateway = uuid.uuid4().hex
        self._mine: dict[str, _Mine] = {}

    async def enter(self, tenant: str, limit: int) -> bool:
        """Takes a place, if there is one."""
        mine = self._mine.setdefault(tenant, _Mine(limit))
        mine.limit = limit
        mine.used += 1  # at once: two who enter together want two places
        try:
            if mine.used <= mine.held or await self._hold(tenant, mine):
                return True
        except BaseException:
            mine.used -= 1
            raise
        mine.used -= 1
        return False

    def leave(self, tenant: str) -> None:
        """Gives a place back. The other gateways see it within a second."""
        mine = self._mine[tenant]
        mine.used -= 1

    async def renew(self) -> None:
        """Tells the ledger what is used; to be called every second. Does nothing while it does not answer."""
        for tenant, mine in list(self._mine.items()):
            if not mine.used and not mine.held:
                del self._mine[tenant]
                continue
            try:
                mine.held = await self._ask(tenant, mine, mine.used)
            except StoreUnavailable:
                mine.held = 0

    async def give_back(self) -> None:
        """All of them: this gateway ends."""
        for tenant, mine in self._mine.items():
            try:
                await self._ask(tenant, mine, 0)
            except StoreUnavailable:
                return  # the lease ends by itself

    async def used(self, tenant: str) -> int:
        """Places that are taken, on all gateways.

        Raises:
            StoreUnavailable: the ledger does not answer.
        """
        count: int = await self._ledger.run(USED, [_key(tenant)], [self._time()])
        return count

    async def _hold(self, tenant: str, mine: _Mine) -> bool:
        spare = max(1, mine.limit // SPARE_SHARE) - 1
        try:
            mine.held = await self._ask(tenant, mine, mine.used + spare)
        except StoreUnavailable:
            metrics.LIMITER_DEGRADED.inc()
            return mine.used <= max(1, mine.limit // self._parts)
        return mine.used <= mine.held

    async def _ask(self, tenant: str, mine: _Mine, want: int) -> int:
        words = [self._time(), self._gateway, want, mine.limit, int(LEASE_SECONDS * 1000)]
        held: int = await self._ledger.run(HOLD, [_key(tenant)], words)
        return held

    def _time(self) -> str | int:
        return "" if self._now is None else self._now()


def _key(tenant: str) -> str:
    return f"{{limits}}:places:{tenant}"
