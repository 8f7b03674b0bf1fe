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
from typing import NamedTuple, TypeAlias

from common import metrics
from common.generations import GENERATION_SECONDS, GENERATIONS, Generations, read_generations
from common.logs import logger
from common.lru import Lru
from common.objects import Objects
from common.settings import CacheSettings
from common.store import Store, StoreUnavailable
from gateway.masters import Form, Master

JITTER = 0.1
"""The share by which times to live differ, so that not all that was made together goes together."""
MAX_PUT_BYTES = 64 * 1024 * 1024
"""Speeches on their way to the store; of more, it is not told."""
FORMS_SHARE = 5
"""The part of the memory that is for encoded forms."""
SWEEP_SECONDS = 3600.0

_INLINE, _POINTER = b"i", b"p"


FormName: TypeAlias = tuple[bytes, bytes | None]
"""A speech's key, and a format as it was asked for; None: the master's own."""


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
        forms = settings.memory_bytes // FORMS_SHARE
        self._masters: Lru[bytes, Master] = Lru(settings.memory_bytes - forms, settings.seconds, clock)
        self._forms: Lru[FormName, Form] = Lru(forms, settings.seconds, clock)
        self.generations: Generations = {}
        """As far as is known; another object whenever the cache was purged."""
        self._found_here = metrics.CACHE_LOOKUPS.of("memory")
        self._lookups: dict[bytes, asyncio.Task[Master | None]] = {}
        self._puts: set[asyncio.Task[None]] = set()
        self._put_bytes = 0
        metrics.CACHE_BYTES.set_function(lambda: self._masters.bytes + self._forms.bytes)
        metrics.CACHE_EVICTED.set_function(lambda: self._masters.evicted + self._forms.evicted)

    def here(self, key: bytes) -> Master | None:
        """A speech that is in memory."""
        master = self._masters.get(key)
        if master is not None:
            self._found_here.value += 1
        return master

    async def get(self, key: bytes, tags: Tags) -> Master | None:
        """A speech, wherever it is. Callers who ask at the same time share one lookup."""
        master = self.here(key)
        if master is not None or not self._store.worth_asking:
            if master is None:
                metrics.CACHE_LOOKUPS.inc("miss")
            return master
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = asyncio.create_task(self._look_up(key, tags))
            lookup.add_done_callback(lambda _: self._lookups.pop(key, None))
        master = await asyncio.shield(lookup)
        metrics.CACHE_LOOKUPS.inc("miss" if master is None else "store")
        return master

    def put(self, key: bytes, tags: Tags, master: Master, asked: Generations) -> None:
        """Keeps a speech. The store hears of it later, if it can.

        `asked`: the generations when it was asked for: what was purged since is not kept.
        """
        if asked is not self.generations:
            return
        self._masters.put(key, master, master.size)
        if not self._store.worth_asking:
            return
        if self._put_bytes + master.size > MAX_PUT_BYTES:
            metrics.CACHE_PUTS_DROPPED.inc()
            return
        self._put_bytes += master.size
        task = asyncio.create_task(self._put(key, _name(key, tags, asked), master))
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)

    def form(self, name: FormName) -> Form | None:
        """A speech in memory in a format."""
        key, format = name
        return self.here(key) if format is None else self._forms.get(name)

    def put_form(self, name: FormName, form: Form) -> None:
        """Keeps a speech in another format in memory, for as long as it is asked for."""
        self._forms.put(name, form, form.size)

    async def run(self) -> None:
        """Sees when the cache is purged, and sweeps, until cancelled."""
        swept = -SWEEP_SECONDS
        while True:
            await self.refresh()
            await asyncio.sleep(GENERATION_SECONDS)
            if time.monotonic() - swept > SWEEP_SECONDS:
                swept = time.monotonic()
                with suppress(StoreUnavailable):
                    await self._objects.sweep("cache", days=2)

    async def refresh(self) -> None:
        """Looks whether the cache was purged."""
        if not self._store.worth_asking:
            return
        with suppress(StoreUnavailable):
            generations = await read_generations(self._store)
            if generations != self.generations:
                if self.generations:
                    logger().info("the cache was purged")
                self.generations = generations
                self._masters.clear()
                self._forms.clear()

    async def settle(self) -> None:
        """Waits until the store has heard of all that was kept."""
        await asyncio.gather(*self._puts, return_exceptions=True)

    async def _look_up(self, key: bytes, tags: Tags) -> Master | None:
        asked = self.generations
        name = _name(key, tags, asked)
        try:
            value = await self._store.command("GET", name)
            if value is None:
                return None
            data: bytes | memoryview | None = memoryview(value)[1:]
            if value[:1] == _POINTER:
                data = await self._objects.get(value[1:].decode())
        except StoreUnavailable:
            return None
        master = None if data is None else Master.from_bytes(key, data)
        if master is None:
            metrics.CACHE_DAMAGED.inc()
            with suppress(StoreUnavailable):
                await self._store.command("DEL", name)
            return None
        if asked is not self.generations:
            return None  # it was purged meanwhile
        self._masters.put(key, master, master.size)
        return master

    async def _put(self, key: bytes, name: str, master: Master) -> None:
        data = master.to_bytes(key)
        value = _INLINE + data
        try:
            if len(data) > self._settings.inline_bytes:
                place = self._objects.name("cache", key.hex())
                await self._objects.put(place, data)
                value = _POINTER + place.encode()
            await self._store.command("SET", name, value, "EX", round(self._seconds()))
        except StoreUnavailable:
            metrics.CACHE_PUTS_DROPPED.inc()
        finally:
            self._put_bytes -= master.size

    def _seconds(self) -> float:
        return self._settings.seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (no secret)


async def purge(store: Store, what: str = "all") -> None:
    """Forgets speeches on all gateways. `what`: `all`, `voice:NAME` or `revision:REVISION`.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    await store.command("HINCRBY", GENERATIONS, what, 1)


async def purge_key(store: Store, key: bytes, tags: Tags) -> bool:
    """Forgets one speech, on all gateways, and tells whether it was in the store.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    generations = await read_generations(store)
    was_there = bool(await store.command("DEL", _name(key, tags, generations)))
    await store.command("HINCRBY", GENERATIONS, "memory", 1)  # of no name, but seen
    return was_there


def _name(key: bytes, tags: Tags, generations: Generations) -> str:
    parts = (b"all", b"voice:" + tags.voice.encode(), b"revision:" + tags.revision.encode())
    generation = ".".join(generations.get(part, b"0").decode() for part in parts)
    return f"cache:{generation}:{key.hex()}"
