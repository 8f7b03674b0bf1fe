"""What was made and may be asked for again, kept in the cache's store for whoever asks, until it is purged.

Whatever is wrong with the stores, nothing is found there, and nobody hears of an error. There are generations, of
everything, of a voice and of a revision, which are a part of all names: a purge raises one, and nothing of before is
found any more. What was found before lies in memory elsewhere, so whoever has a shelf looks for purges.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

from common import metrics
from common.generations import Generations, read_generations
from common.logs import logger
from common.objects import Objects
from common.settings import CacheSettings
from common.store import Store, StoreUnavailable

T = TypeVar("T")

JITTER = 0.1
"""The share by which times to live differ, so that not all that was made together goes together."""
MAX_PUT_BYTES = 64 * 1024 * 1024
"""What may be on its way to the store at once; of more, it is not told."""

_INLINE, _POINTER = b"i", b"p"
_CHECKSUM_BYTES = 4

Parts = Sequence[bytes | memoryview]
"""What is kept as one value."""

MEMORY = "memory"
"""The generation that is raised when a single speech is purged: for what lies in memory, and for what has no key that
anybody could name."""


class Tags(NamedTuple):
    """By what speech is purged."""

    voice: str
    revision: str


class Shelf:
    """Values of one kind under keys of 32 bytes."""

    def __init__(
        self, kind: str, store: Store, settings: CacheSettings, objects: Objects | None, *, follow: Sequence[str] = ()
    ) -> None:
        """Knows nothing until `refresh`.

        Args:
            kind: of the values; a part of their names.
            store: the cache's.
            settings: how long they are kept, and how large they may be in the store.
            objects: for those that are larger; None: these are not kept.
            follow: generations that they belong to besides those of everything, their voice and their revision.
        """
        self._kind = kind
        self._store = store
        self._settings = settings
        self._objects = objects
        self._follow = follow
        self._puts: set[asyncio.Task[None]] = set()
        self._put_bytes = 0
        self.generations: Generations = {}
        """As far as is known; another object whenever something was purged."""

    @property
    def worth_asking(self) -> bool:
        """Something may be found, as far as is known."""
        return self._settings.enabled and bool(self.generations) and self._store.worth_asking

    async def refresh(self) -> bool:
        """Looks whether something was purged, and tells whether what lies in memory is to be forgotten."""
        if not self._store.worth_asking:
            return False
        with suppress(StoreUnavailable):
            generations = await read_generations(self._store)
            if generations != self.generations:
                if self.generations:
                    logger().info("the cache was purged")
                self.generations = generations
                return True
        return False

    async def get(self, key: bytes, tags: Tags, read: Callable[[memoryview], T | None]) -> T | None:
        """A value, if it is there and whole. `read`: makes it of what was kept, which it may hold on to, if it can."""
        if not self.worth_asking:
            return None
        asked = self.generations
        name = self._name(key, tags, asked)
        try:
            value = await self._store.command("GET", name)
            if value is None:
                return None
            kept = await self._fetch(value)
        except StoreUnavailable:
            return None
        whole = None if kept is None else unsealed(key, kept)
        found = None if whole is None else read(whole)
        if found is None:
            metrics.CACHE_DAMAGED.inc()
            with suppress(StoreUnavailable):
                await self._store.command("DEL", name)
            return None
        return found if asked is self.generations else None  # it may have been purged meanwhile

    async def _fetch(self, value: bytes) -> bytes | memoryview | None:
        """What the store's value stands for; None: for nothing."""
        if value[:1] != _POINTER:
            return memoryview(value)[1:]
        if self._objects is None:
            return None
        # Where it leads nowhere, whatever it is, there is no object.
        return await self._objects.get(value[1:].decode(errors="replace"))

    def put(self, key: bytes, tags: Tags, parts: Parts, asked: Generations) -> None:
        """Keeps a value. The store hears of it later, if it can.

        `asked`: the generations when it was asked for.
        """
        size = sum(map(len, parts))
        if not self.worth_asking or (self._objects is None and size > self._settings.inline_bytes):
            return
        if self._put_bytes + size > MAX_PUT_BYTES:
            metrics.CACHE_PUTS_DROPPED.inc()
            return
        self._put_bytes += size
        task = asyncio.create_task(self._put(key, self._name(key, tags, asked), parts, size))
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)

    async def settle(self) -> None:
        """Waits until the store has heard of all that was kept."""
        await asyncio.gather(*self._puts, return_exceptions=True)

    async def _put(self, key: bytes, name: str, parts: Parts, size: int) -> None:
        try:
            if size <= self._settings.inline_bytes:
                value = sealed(key, parts, _INLINE)
            else:
                assert self._objects is not None
                place = self._objects.name(self._kind, key.hex())
                await self._objects.put(place, sealed(key, parts))
                value = _POINTER + place.encode()
            await self._store.command("SET", name, value, "EX", round(self._seconds()))
        except StoreUnavailable:
            metrics.CACHE_PUTS_DROPPED.inc()
        finally:
            self._put_bytes -= size

    def _name(self, key: bytes, tags: Tags, generations: Generations) -> str:
        return name_of(self._kind, key, tags, generations, self._follow)

    def _seconds(self) -> float:
        return self._settings.seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (no secret)


def name_of(kind: str, key: bytes, tags: Tags, generations: Generations, follow: Sequence[str] = ()) -> str:
    """Of a value, in the store."""
    parts = ("all", f"voice:{tags.voice}", f"revision:{tags.revision}", *follow)
    generation = ".".join(generations.get(part.encode(), b"0").decode() for part in parts)
    return f"{kind}:{generation}:{key.hex()}"


def sealed(key: bytes, parts: Parts, before: bytes = b"") -> bytes:
    """What is kept under a key, with its checksum."""
    return b"".join((before, _checksum(key, parts), *parts))


def unsealed(key: bytes, kept: bytes | memoryview) -> memoryview | None:
    """What was kept, which holds on to `kept`; None if it is damaged, or was not kept under this key."""
    found = memoryview(kept)[_CHECKSUM_BYTES:]
    return found if kept[:_CHECKSUM_BYTES] == _checksum(key, [found]) else None


def _checksum(key: bytes, parts: Parts) -> bytes:
    """Against damage, not against malice: who can write to the store can make any checksum.

    A cryptographic digest of the audio took six times as long, which was a quarter of a large hit from the store.
    """
    checksum = zlib.crc32(key)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum.to_bytes(_CHECKSUM_BYTES, "big")
