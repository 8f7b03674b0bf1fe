"""Idempotency keys in the ledger: who runs a keyed call, and what came of it.

A claim is a hash: the fingerprint of its request, and either the token of the one who runs it, until a lease ends that
is renewed while it runs, or what came of it. Whoever comes back too late, after its lease, finds that the claim is no
longer its own: nothing of it is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from common.store import Script, Store, StoreUnavailable, Word

LEASE_SECONDS = 30.0
KEPT_SECONDS = 86_400.0

# ARGV: fingerprint, token, lease in ms
CLAIM = Script("""
local claim = redis.call('HMGET', KEYS[1], 'print', 'record')
if not claim[1] then
  redis.call('HSET', KEYS[1], 'print', ARGV[1], 'token', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return {'claimed', ''}
end
if claim[1] ~= ARGV[1] then return {'reused', ''} end
if claim[2] then return {'done', claim[2]} end
return {'running', ''}
""")

# ARGV: token, lease in ms
RENEW = Script("""
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""")

# ARGV: token, record, ms that it is kept
FINISH = Script("""
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'record', ARGV[2])
redis.call('HDEL', KEYS[1], 'token')
return redis.call('PEXPIRE', KEYS[1], ARGV[3])
""")

# ARGV: token
FREE = Script("""
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""")

# ARGV: record. Forgets one whose audio is gone.
FORGET = Script("""
if redis.call('HGET', KEYS[1], 'record') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""")


@dataclass(frozen=True, slots=True)
class Keyed:
    """A call with an idempotency key."""

    tenant: str
    method: str
    key: str
    fingerprint: bytes
    deadline: float
    """On the monotonic clock, in seconds."""

    @property
    def name(self) -> str:
        """Of its claim in the ledger."""
        scope = "\0".join((self.tenant, self.method, self.key))
        return f"claim:{hashlib.sha256(scope.encode()).hexdigest()}"


class State(Enum):
    """What a claim says."""

    CLAIMED = b"claimed"
    """It is ours now."""
    RUNNING = b"running"
    """Somebody else runs it."""
    DONE = b"done"
    """It has a record."""
    REUSED = b"reused"
    """The key belongs to another request."""


@dataclass(slots=True)
class Claim:
    """A keyed call in the ledger, with a token of ours.

    Each method raises StoreUnavailable where the ledger does not answer.
    """

    ledger: Store
    keyed: Keyed
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def unique(self) -> str:
        """A name that no other claim has, not even one of the same call."""
        return f"{self.keyed.name.partition(':')[2]}-{self.token}"

    async def take(self) -> tuple[State, bytes]:
        """Claims it, if nobody has; and the record, if there is one. Whoever is cancelled meanwhile has no claim."""
        words: list[Word] = [self.keyed.fingerprint, self.token, _ms(LEASE_SECONDS)]
        taking = asyncio.ensure_future(self.ledger.run(CLAIM, [self.keyed.name], words))
        try:
            state, record = await asyncio.shield(taking)
        except asyncio.CancelledError:
            # To free it before it is known to be taken could come first.
            with suppress(StoreUnavailable):
                await taking
                await self.free()
            raise
        return State(state), record

    async def renew(self) -> bool:
        """Keeps it; False: it is no longer ours."""
        return bool(await self.ledger.run(RENEW, [self.keyed.name], [self.token, _ms(LEASE_SECONDS)]))

    async def finish(self, record: bytes) -> bool:
        """Keeps what came of it; False: it is no longer ours, and nothing is kept."""
        return bool(await self.ledger.run(FINISH, [self.keyed.name], [self.token, record, _ms(KEPT_SECONDS)]))

    async def free(self) -> None:
        """Lets the next one claim it."""
        await self.ledger.run(FREE, [self.keyed.name], [self.token])

    async def forget(self, record: bytes) -> None:
        """Lets the next one claim it, though there was a record."""
        await self.ledger.run(FORGET, [self.keyed.name], [record])


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
