"""A Redis or Valkey server behind a door that never hangs: an answer within the budget, or `StoreUnavailable`."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import redis.asyncio as redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from common.settings import StoreSettings

Word: TypeAlias = str | bytes | int | float
"""What a command is made of."""


class StoreUnavailable(Exception):
    """The store gave no answer: it is not configured, gone, slow, full, read-only, or refuses us."""


class Script:
    """A Lua script, which servers remember by its hash."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Store:
    """One server."""

    def __init__(self, name: str, url: str | None, settings: StoreSettings) -> None:
        """`name`: for metrics and the log. `url`: None where there is none: then nothing is ever available."""
        self.name = name
        self._budget = settings.budget
        self._redis: Any = None  # its commands have no types
        if url is not None:
            self._redis = redis.Redis.from_url(
                url,
                retry=Retry(NoBackoff(), 0),
                socket_connect_timeout=settings.budget,
                socket_timeout=settings.budget,
                protocol=3,
            )

    @property
    def configured(self) -> bool:
        """There is a server at all."""
        return self._redis is not None

    async def command(self, *words: Word) -> Any:
        """Asks the server, and returns its reply; strings in it are bytes.

        Raises:
            StoreUnavailable: there is no reply.
        """
        if self._redis is None:
            raise StoreUnavailable(f"no {self.name} store is configured")
        try:
            async with asyncio.timeout(self._budget):
                return await self._redis.execute_command(*words)
        except NoScriptError:
            raise
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"the {self.name} store does not answer") from error

    async def run(self, script: Script, keys: Sequence[Word], args: Sequence[Word] = ()) -> Any:
        """Runs a script on the server, and returns what it returns.

        Raises:
            StoreUnavailable: there is no reply.
        """
        try:
            return await self.command("EVALSHA", script.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await self.command("EVAL", script.source, len(keys), *keys, *args)

    async def close(self) -> None:
        """Lets its connections go."""
        if self._redis is not None:
            await self._redis.aclose()
