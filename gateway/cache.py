"""The result cache: speeches that were made, in memory, behind it in a store, and what is large in an object store.

Whatever is wrong with the stores, a lookup is a miss and never an error. There are generations, of everything, of a
voice and of a revision, which are a part of all names in the store: a purge raises one, and nothing of before is found
any more. Gateways forget what they hold in memory when they see it, within GENERATION_SECONDS.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from common import metrics
from common.logs import logger
from common.objects import Objects
from common.settings import CacheSettings
from common.store import Store, StoreUnavailable
from gateway.lru import Lru
from gateway.masters import Master

GENERATIONS = "cache:generations"
GENERATION_SECONDS = 1.0
JITTER = 0.1
"""The share by which times to live differ, so that not all that was made together goes together."""
MAX_PUTS = 64
"""Speeches on their way to the store; of more, it is not told."""
SWEEP_SECONDS = 3600.0

_INLINE, _POINTER = b"i", b"p"


class Tags(NamedTuple):
    """By what speeches are purged."""

    voice: str
    revision: str


class Cache:
    """The cache of one gateway."""

    def __init__(
        self, store: Store, objects: Objects, settings: CacheSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._objects = objects
        self._settings = settings
        self._masters: Lru[bytes, Master] = Lru(settings.memory_bytes, settings.seconds, clock)
        self._forms: Lru[tuple[bytes, Any], Any] = Lru(settings.memory_bytes // 4, settings.seconds, clock)
        self._generations: dict[bytes, bytes] = {}
        self._lookups: dict[bytes, asyncio.Task[Master | None]] = {}
        self._puts: set[asyncio.Task[None]] = set()
        metrics.CACHE_BYTES.set_function(lambda: self._masters.bytes + self._forms.bytes)
        metrics.CACHE_EVICTED.set_function(lambda: self._masters.evicted + self._forms.evicted)

    def here(self, key: bytes) -> Master | None:
        """A speech that is in memory."""
        master = self._masters.get(key)
        if master is not None:
            metrics.cache_counter("memory").inc()
        return master

    async def get(self, key: bytes, tags: Tags) -> Master | None:
        """A speech, wherever it is. Callers who ask at the same time share one lookup."""
        master = self.here(key)
        if master is not None or not self._store.worth_asking:
            if master is None:
                metrics.cache_counter("miss").inc()
            return master
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = asyncio.create_task(self._look_up(key, tags))
            lookup.add_done_callback(lambda _: self._lookups.pop(key, None))
        master = await asyncio.shield(lookup)
        metrics.cache_counter("miss" if master is None else "store").inc()
        return master

    def put(self, key: bytes, tags: Tags, master: Master) -> None:
        """Keeps a speech. The store hears of it later, if it can."""
        self._masters.put(key, master, master.size)
        if not self._store.worth_asking:
            return
        if len(self._puts) >= MAX_PUTS:
            metrics.CACHE_PUTS_DROPPED.inc()
            return
        task = asyncio.create_task(self._put(key, tags, master))
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)

    def form(self, key: bytes, name: Any) -> Any | None:
        """A form of a speech in memory, such as a reply in some format."""
        return self._forms.get((key, name))

    def put_form(self, key: bytes, name: Any, form: Any, size: int) -> None:
        """Keeps a form of a speech in memory, for as long as it is asked for."""
        self._forms.put((key, name), form, size)

    async def forget(self, key: bytes, tags: Tags) -> None:
        """Forgets one speech here and in the store. Other gateways may have it in memory for GENERATION_SECONDS."""
        self._masters.drop(key)
        with suppress(StoreUnavailable):
            await self._store.command("DEL", _name(key, tags, self._generations))

    async def run(self) -> None:
        """Sees when the cache is purged, and sweeps, until cancelled."""
        swept = -SWEEP_SECONDS
        while True:
            await asyncio.sleep(GENERATION_SECONDS)
            await self.refresh()
            if time.monotonic() - swept > SWEEP_SECONDS:
                swept = time.monotonic()
                with suppress(StoreUnavailable):
                    await self._objects.sweep("cache", days=2)

    async def refresh(self) -> None:
        """Looks whether the cache was purged."""
        if not self._store.worth_asking:
            return
        with suppress(StoreUnavailable):
            generations = await self._store.command("HGETALL", GENERATIONS)
            if generations != self._generations:
                self._generations = generations
                self._masters.clear()
                self._forms.clear()
                logger().info("the cache was purged")

    async def settle(self) -> None:
        """Waits until the store has heard of all that was kept."""
        await asyncio.gather(*self._puts, return_exceptions=True)

    async def _look_up(self, key: bytes, tags: Tags) -> Master | None:
        try:
            value = await self._store.command("GET", _name(key, tags, self._generations))
            if value is None:
                return None
            data: bytes | None = value[1:]
            if value[:1] == _POINTER:
                data = await self._objects.get(value[1:].decode())
        except StoreUnavailable:
            return None
        master = None if data is None else Master.from_bytes(key, data)
        if master is None:
            metrics.CACHE_DAMAGED.inc()
            await self.forget(key, tags)
            return None
        self._masters.put(key, master, master.size)
        return master

    async def _put(self, key: bytes, tags: Tags, master: Master) -> None:
        data = master.to_bytes(key)
        value = _INLINE + data
        try:
            if len(data) > self._settings.inline_bytes:
                place = self._objects.name("cache", key.hex())
                await self._objects.put(place, data)
                value = _POINTER + place.encode()
            name = _name(key, tags, self._generations)
            await self._store.command("SET", name, value, "EX", round(self._seconds()))
        except StoreUnavailable:
            metrics.CACHE_PUTS_DROPPED.inc()

    def _seconds(self) -> float:
        return self._settings.seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (no secret)


async def purge(store: Store, what: str = "all") -> None:
    """Forgets speeches on all gateways. `what`: `all`, `voice:NAME` or `revision:REVISION`.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    await store.command("HINCRBY", GENERATIONS, what, 1)


async def purge_key(store: Store, key: bytes, tags: Tags) -> None:
    """Forgets one speech, on all gateways.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    generations = await store.command("HGETALL", GENERATIONS)
    await store.command("DEL", _name(key, tags, generations))
    await store.command("HINCRBY", GENERATIONS, "memory", 1)  # of no name, but seen


def _name(key: bytes, tags: Tags, generations: dict[bytes, bytes]) -> str:
    parts = (b"all", b"voice:" + tags.voice.encode(), b"revision:" + tags.revision.encode())
    generation = ".".join(generations.get(part, b"0").decode() for part in parts)
    return f"cache:{generation}:{key.hex()}"
