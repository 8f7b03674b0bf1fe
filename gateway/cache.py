"""The result cache: speeches that were made, in memory, behind it in a store, and what is large in an object store.

Whatever is wrong with the stores, a lookup is a miss and never an error. When speeches are purged, gateways forget what
they hold in memory within GENERATION_SECONDS.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from common import metrics
from common.generations import GENERATION_SECONDS, GENERATIONS, Generations, read_generations
from common.lru import Lru
from common.objects import Objects
from common.settings import CacheSettings
from common.shelf import MEMORY, Shelf, Tags, name_of
from common.store import Store, StoreUnavailable
from gateway.masters import Form, Master

KIND = "cache"
"""What speeches are called in the stores."""
FORMS_SHARE = 5
"""The part of the memory that is for encoded forms."""
SWEEP_SECONDS = 3600.0


FormName: TypeAlias = tuple[bytes, bytes | None]
"""A speech's key, and a format as it was asked for; None: the master's own."""


class Cache:
    """The cache of one gateway."""

    def __init__(
        self, store: Store, objects: Objects, settings: CacheSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shelf = Shelf(KIND, store, settings, objects)
        self._objects = objects
        forms = settings.memory_bytes // FORMS_SHARE
        self._masters: Lru[bytes, Master] = Lru(settings.memory_bytes - forms, settings.seconds, clock)
        self._forms: Lru[FormName, Form] = Lru(forms, settings.seconds, clock)
        self._found_here = metrics.CACHE_LOOKUPS.of("memory")
        self._lookups: dict[bytes, asyncio.Task[Master | None]] = {}
        metrics.CACHE_BYTES.set_function(lambda: self._masters.bytes + self._forms.bytes)
        metrics.CACHE_EVICTED.set_function(lambda: self._masters.evicted + self._forms.evicted)

    @property
    def generations(self) -> Generations:
        """As far as is known; another object whenever the cache was purged."""
        return self._shelf.generations

    def here(self, key: bytes) -> Master | None:
        """A speech that is in memory."""
        master = self._masters.get(key)
        if master is not None:
            self._found_here.value += 1
        return master

    async def get(self, key: bytes, tags: Tags) -> Master | None:
        """A speech, wherever it is. Callers who ask at the same time share one lookup."""
        master = self.here(key)
        if master is not None or not self._shelf.worth_asking:
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
        self._shelf.put(key, tags, master.parts(), asked)

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
                    await self._objects.sweep(KIND, days=2)

    async def refresh(self) -> None:
        """Looks whether the cache was purged."""
        if await self._shelf.refresh():
            self._masters.clear()
            self._forms.clear()

    async def settle(self) -> None:
        """Waits until the store has heard of all that was kept."""
        await self._shelf.settle()

    async def _look_up(self, key: bytes, tags: Tags) -> Master | None:
        master = await self._shelf.get(key, tags, Master.from_bytes)
        if master is not None:
            self._masters.put(key, master, master.size)
        return master


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
    was_there = bool(await store.command("DEL", name_of(KIND, key, tags, generations)))
    await store.command("HINCRBY", GENERATIONS, MEMORY, 1)
    return was_there
