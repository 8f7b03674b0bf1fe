"""Things kept in memory as long as they are used, within a number of bytes and a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """Beyond its bytes, what was not used for longest goes."""

    def __init__(self, most_bytes: int, seconds: float, clock: Callable[[], float]) -> None:
        """`seconds`: after which a thing is forgotten, however much it is used."""
        self._most = most_bytes
        self._seconds = seconds
        self._clock = clock
        self._things: OrderedDict[K, tuple[V, int, float]] = OrderedDict()
        self.bytes = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._things)

    def get(self, key: K) -> V | None:
        """A thing, if it is there."""
        found = self._things.get(key)
        if found is None:
            return None
        if found[2] <= self._clock():
            self.drop(key)
            return None
        self._things.move_to_end(key)
        return found[0]

    def put(self, key: K, thing: V, size: int) -> None:
        """Keeps a thing of so many bytes; not one that is larger than all there is."""
        self.drop(key)
        if size > self._most:
            return
        self._things[key] = (thing, size, self._clock() + self._seconds)
        self.bytes += size
        while self.bytes > self._most:
            _, (_, gone, _) = self._things.popitem(last=False)
            self.bytes -= gone
            self.evicted += 1

    def drop(self, key: K) -> None:
        """Forgets a thing, if it is there."""
        found = self._things.pop(key, None)
        if found is not None:
            self.bytes -= found[1]

    def clear(self) -> None:
        """Forgets everything."""
        self._things.clear()
        self.bytes = 0
