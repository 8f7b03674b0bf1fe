"""Which backend speaks what: a directory in the cache's store, so that callers on any gateway meet.

An entry is a lease: it is renewed while its speech is made, and ends by itself when its backend dies. A backend that
was paused may find that another has taken over; then both speak, each for its own callers, and neither loses anything.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress

from common.errors import Aborted
from common.settings import ServiceSettings
from common.speech import SpeechMessage
from common.store import Script, Store, StoreUnavailable

LEASE_SECONDS = 3.0

# ARGV: "token address", lease in ms → who has it
ENTER = Script("""
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return ARGV[1] end
return redis.call('GET', KEYS[1])
""")

# ARGV: "token address", lease in ms. Says for how much longer it is ours.
KEEP = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""")

# ARGV: "token address"
LEAVE = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""")

Messages = AsyncGenerator[SpeechMessage, None]


class Directory:
    """The directory, for one backend."""

    def __init__(self, store: Store, address: str, kept_seconds: float) -> None:
        """`address`: where gateways reach this backend. `kept_seconds`: how long an entry outlives its speech."""
        self._store = store
        self._address = address
        self._kept_seconds = kept_seconds
        self._endings: set[asyncio.Task[None]] = set()

    async def listed(self, key: str, messages: Messages, *, here: bool) -> Messages:
        """A speech that is in the directory while it is made; without a store it is just made.

        `here`: make it even if another backend does.

        Raises:
            Aborted: another backend makes it.
        """
        async with aclosing(messages), self._entry(f"flight:{key}", here=here):
            async for message in messages:
                yield message

    @asynccontextmanager
    async def _entry(self, name: str, *, here: bool) -> AsyncGenerator[None, None]:
        mine = f"{uuid.uuid4().hex} {self._address}"
        if not self._store.configured:
            yield
            return
        try:
            holder = (await self._store.run(ENTER, [name], [mine, _ms(LEASE_SECONDS)])).decode()
        except StoreUnavailable:
            holder = mine
        address = holder.partition(" ")[2]
        if holder != mine and address != self._address and not here:
            raise Aborted(
                "another backend speaks this already",
                "FLIGHT_ELSEWHERE",
                metadata={"backend": address},
                retry_after=0.0,
            )
        keeping = asyncio.create_task(self._keep(name, mine))
        whole = False
        try:
            yield
            whole = True
        finally:
            keeping.cancel()
            # Nobody waits for it: a lease that is not ended ends by itself.
            ending = asyncio.create_task(self._end(name, mine, whole=whole))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def _end(self, name: str, mine: str, *, whole: bool) -> None:
        """Keeps the entry for a while where there is something to hear, and else takes it out."""
        with suppress(StoreUnavailable):
            if whole and self._kept_seconds:
                await self._store.run(KEEP, [name], [mine, _ms(self._kept_seconds)])
            else:
                await self._store.run(LEAVE, [name], [mine])

    async def _keep(self, name: str, mine: str) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            with suppress(StoreUnavailable):
                if not await self._store.run(KEEP, [name], [mine, _ms(LEASE_SECONDS)]):
                    # The store was emptied, or this process was paused and another has it now.
                    await self._store.run(ENTER, [name], [mine, _ms(LEASE_SECONDS)])


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def advertised(service: ServiceSettings) -> str:
    """Where gateways reach this service: by its host's name, where it listens on every address."""
    host, _, port = service.listen.rpartition(":")
    everywhere = host.strip("[]") in ("0.0.0.0", "::")  # noqa: S104 (it is only compared)
    return service.advertise or (f"{socket.gethostname()}:{port}" if everywhere else service.listen)
