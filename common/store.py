"""A Redis or Valkey server behind a door that never hangs: an answer within the budget, or `StoreUnavailable`.

Commands of the same turn of the event loop go together, in one round trip. A round trip belongs to nobody: a caller who
leaves, or is out of time, breaks none.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeAlias

from redis.exceptions import AuthenticationError, NoScriptError, RedisError, ResponseError

from common import metrics
from common.breaker import Breaker
from common.logs import logger
from common.settings import StoreSettings
from common.store_url import connect, disconnect

Word: TypeAlias = str | bytes | int | float
"""What a command is made of."""

MAX_WAITING = 2000
"""Commands without an answer yet; more are refused."""
MAX_TRIPS = 6
"""Round trips at once."""
MAX_BATCH = 256
"""Commands in a round trip."""
LAST_LOOKS = 5
"""Turns of the event loop in which a reply that has arrived is read."""
COMPLAIN_SECONDS = 60.0

_Waiting: TypeAlias = "tuple[tuple[Word, ...], asyncio.Future[Any]]"


class StoreUnavailable(Exception):
    """The store gave no answer: it is not configured, gone, slow, full, read-only, or refuses us."""


class Script:
    """A Lua script, which servers remember by its hash."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Store:
    """One server, or a cluster of them."""

    def __init__(self, name: str, url: str | None, settings: StoreSettings) -> None:
        """`name`: for metrics and the log. `url`: None where there is none: then nothing is ever available.

        Raises:
            StartupError: the URL means nothing.
        """
        self.name = name
        self._budget = settings.budget
        self._client = None if url is None else connect(name, url, settings)
        self._breaker = Breaker(time.monotonic)
        self._pending: list[_Waiting] = []
        self._trips: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._complained = -COMPLAIN_SECONDS
        self._healthy: bool | None = None
        """None: it was not asked yet."""

    @property
    def configured(self) -> bool:
        """There is a server at all."""
        return self._client is not None

    @property
    def available(self) -> bool:
        """As far as is known, it answers."""
        return self._client is not None and not self._breaker.open

    @property
    def worth_asking(self) -> bool:
        """It may answer: False saves the asking."""
        return self._client is not None and self._breaker.due

    async def command(self, *words: Word) -> Any:
        """Asks the server, and returns its reply; strings in it are bytes.

        Raises:
            StoreUnavailable: there is no reply.
        """
        reply = await self._ask(words)
        if isinstance(reply, ResponseError):
            raise self._refused(reply)
        return reply

    async def run(self, script: Script, keys: Sequence[Word], args: Sequence[Word] = ()) -> Any:
        """Runs a script on the server, and returns what it returns.

        Raises:
            StoreUnavailable: there is no reply.
        """
        reply = await self._ask(("EVALSHA", script.sha, len(keys), *keys, *args))
        if isinstance(reply, NoScriptError):
            return await self.command("EVAL", script.source, len(keys), *keys, *args)
        if isinstance(reply, ResponseError):
            raise self._refused(reply)
        return reply

    async def close(self) -> None:
        """Lets its connections go. What waits for an answer gets none."""
        for trip in self._trips:
            trip.cancel()
        await asyncio.gather(*self._trips, return_exceptions=True)
        if self._client is not None:
            await disconnect(self._client)

    async def _ask(self, words: tuple[Word, ...]) -> Any:
        if self._client is None:
            raise StoreUnavailable(f"no {self.name} is configured")
        if self._waiting >= MAX_WAITING or not self._breaker.allows():
            metrics.STORE_FAILURES.labels(self.name, "refused here").inc()
            raise StoreUnavailable(f"the {self.name} does not answer")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting += 1
        self._pending.append((words, answer))
        if len(self._pending) == 1:
            loop.call_soon(self._leave)
        # A round trip is bounded too; this is for what waits until another comes back.
        late = loop.call_later(2 * self._budget, self._give_up, answer)
        try:
            return await answer
        finally:
            late.cancel()
            self._waiting -= 1
            if answer.done() and not answer.cancelled():
                answer.exception()  # whoever waited for it may leave in the moment in which it fails

    def _give_up(self, answer: asyncio.Future[Any]) -> None:
        if not answer.done():
            answer.set_exception(StoreUnavailable(f"the {self.name} does not answer"))

    def _leave(self) -> None:
        """Sends all that is pending, if there is room for a round trip."""
        while self._pending and len(self._trips) < MAX_TRIPS:
            batch, self._pending = self._pending[:MAX_BATCH], self._pending[MAX_BATCH:]
            batch = [(words, answer) for words, answer in batch if not answer.done()]
            if batch:
                trip = asyncio.create_task(self._trip(batch))
                self._trips.add(trip)
                trip.add_done_callback(self._back)

    def _back(self, trip: asyncio.Task[None]) -> None:
        self._trips.discard(trip)
        self._leave()

    async def _trip(self, batch: list[_Waiting]) -> None:
        """One round trip: each command gets its reply, an error among them, or all of them get nothing."""
        began = time.monotonic()
        try:
            replies = await self._in_time(self._execute([words for words, _ in batch]))
        except AuthenticationError as error:
            self._failed(batch, "authentication", error)
        except TimeoutError as error:
            self._failed(batch, "timeout", error)
        except (RedisError, OSError) as error:
            self._failed(batch, "connection", error)
        except asyncio.CancelledError:
            self._failed(batch, "closed", None)
            raise
        else:
            metrics.store_seconds(self.name).observe(time.monotonic() - began)
            for (_, answer), reply in zip(batch, replies, strict=True):
                if not answer.done():
                    answer.set_result(reply)
            self._check(replies)

    async def _in_time(self, execution: Coroutine[Any, Any, list[Any]]) -> list[Any]:
        """Replies within the budget.

        Raises:
            TimeoutError: there are none.
        """
        executing = asyncio.create_task(execution)
        try:
            await asyncio.wait({executing}, timeout=self._budget)
            # Where this process itself was too busy to look, they may lie there already.
            for _ in range(LAST_LOOKS):
                if executing.done():
                    return executing.result()
                await asyncio.sleep(0)
            raise TimeoutError
        finally:
            if not executing.done():
                executing.cancel()
                await asyncio.wait({executing})
            if not executing.cancelled():
                executing.exception()

    async def _execute(self, commands: list[tuple[Word, ...]]) -> list[Any]:
        client = self._client
        assert client is not None
        async with client.pipeline(transaction=False) as pipeline:
            for words in commands:
                pipeline.execute_command(*words)
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    def _check(self, replies: list[Any]) -> None:
        """A server that answers every command with an error is as good as gone."""
        errors = [reply for reply in replies if isinstance(reply, ResponseError)]
        wrong = [error for error in errors if not isinstance(error, NoScriptError)]
        if wrong and len(wrong) == len(replies):
            self._breaker_failed("refused", wrong[0])
            return
        self._breaker.succeeded()
        if self._healthy:
            return
        metrics.STORE_AVAILABLE.labels(self.name).set(1)
        if self._healthy is False:
            logger().info("store answers again", store=self.name)
        self._healthy = True

    def _failed(self, batch: list[_Waiting], kind: str, error: Exception | None) -> None:
        for _, answer in batch:
            self._give_up(answer)
        if error is not None:
            self._breaker_failed(kind, error)

    def _breaker_failed(self, kind: str, error: Exception) -> None:
        self._breaker.failed(costly=kind == "timeout")
        self._healthy = False
        metrics.STORE_FAILURES.labels(self.name, kind).inc()
        metrics.STORE_AVAILABLE.labels(self.name).set(0)
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            logger().warning(
                "store does not answer: calls go on without it, within local limits",
                store=self.name,
                kind=kind,
                error=_first_word(error),
            )

    def _refused(self, error: ResponseError) -> StoreUnavailable:
        return StoreUnavailable(f"the {self.name} refused: {_first_word(error)}")


def _first_word(error: Exception) -> str:
    """What kind of error it is. The rest of its text may hold what a caller sent."""
    word = str(error).split(" ")[0]
    return word if word.isupper() else type(error).__name__
