"""Something that is made once, for all who ask for it while it is being made.

A source of messages runs in a task of its own, at the pace of its fastest follower. Whoever comes late gets all
messages from the first one on. When the last follower has left, it may linger for a while and is then cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from copy import copy
from typing import Any, Generic, TypeVar

import grpc

from common.errors import ChorusError

M = TypeVar("M")

UNHEARD_SECONDS = 1.0
"""How long a source may wait for its first follower."""
AHEAD = 8
"""Messages that the source may be ahead of its fastest follower."""


class Tape(Generic[M]):
    """A running source, and all that came of it so far."""

    def __init__(
        self,
        source: AsyncGenerator[M, None],
        *,
        size: Callable[[M], int] = lambda message: 0,
        linger: float = 0.0,
        done: Callable[[Tape[M]], None] = lambda tape: None,
    ) -> None:
        """Starts.

        Args:
            source: closed with this.
            size: of a message, in bytes.
            linger: seconds that the source goes on without followers.
            done: called once, when no more messages will come, and before followers hear of it.
        """
        self.messages: list[M] = []
        self.bytes = 0
        self.failure: BaseException | None = None
        """Why there is no more."""
        self.complete = False
        """The source has come to its end."""
        self.closing = False
        """It has been cancelled: who comes now needs another."""
        self.followers = 0
        self.most_followers = 0
        self._size = size
        self._linger = linger
        self._done = done
        self._fastest = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._room: asyncio.Future[None] | None = None
        self._task = asyncio.create_task(self._run(source))
        self._task.add_done_callback(self._closed)
        # Whoever started it may be cancelled before it follows.
        loop = asyncio.get_running_loop()
        self._lingering: asyncio.TimerHandle | None = loop.call_later(max(linger, UNHEARD_SECONDS), self.cancel)

    @property
    def over(self) -> bool:
        """No more messages will come."""
        return self.complete or self.failure is not None

    @property
    def joinable(self) -> bool:
        """Whoever follows it now gets all of it, if it does not fail."""
        return not self.closing and self.failure is None

    async def follow(self) -> AsyncGenerator[M, None]:
        """All messages, from the first. To be closed by whoever has heard enough.

        Raises:
            BaseException: what the source raised; asyncio.CancelledError never, but for the follower's own.
        """
        follower = Follower(self)
        try:
            while True:
                message = follower.take()
                if message is not None:
                    yield message
                elif self.complete:
                    return
                else:
                    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    with self.waking(waiter):
                        await waiter
        finally:
            follower.leave()

    @contextmanager
    def waking(self, waiter: asyncio.Future[None]) -> Iterator[None]:
        """A future that is set when there is more to take, or there will be no more."""
        self._waiting.add(waiter)
        try:
            yield
        finally:
            self._waiting.discard(waiter)

    def cancel(self) -> None:
        """Ends the source now. Followers hear that it was abandoned."""
        self.closing = True
        self._task.cancel()

    async def wait_closed(self) -> None:
        """Until the source has been closed."""
        await asyncio.wait({self._task})

    def _join(self) -> None:
        self.followers += 1
        self.most_followers = max(self.most_followers, self.followers)
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        self._wake_source()

    def _heard(self, messages: int) -> None:
        if messages > self._fastest:
            self._fastest = messages
            self._wake_source()

    def _leave(self) -> None:
        self.followers -= 1
        if not self.followers and not self.over:
            if self._linger > 0:
                self._lingering = asyncio.get_running_loop().call_later(self._linger, self.cancel)
            else:
                self.cancel()

    def _wake_followers(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _wake_source(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def _run(self, source: AsyncGenerator[M, None]) -> None:
        try:
            async with aclosing(source):
                async for message in source:
                    self.messages.append(message)
                    self.bytes += self._size(message)
                    self._wake_followers()
                    await self._wait_for_room()
        except asyncio.CancelledError:
            self._end(Abandoned())
        except BaseException as error:
            self._end(error)
        else:
            self._end(None)

    async def _wait_for_room(self) -> None:
        # Only its followers' pace holds it back: while it lingers, it waits for one.
        while len(self.messages) - self._fastest >= AHEAD:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _closed(self, task: asyncio.Task[None]) -> None:
        if not self.over:  # it was cancelled before its first step
            self._end(Abandoned())

    def _end(self, failure: BaseException | None) -> None:
        if failure is None:
            self.complete = True
        else:
            self.failure = _own(failure)
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        # Whoever is told holds on to this tape: a circle, which would lie around until the garbage collector comes by,
        # and with it the call that began it, and all of gRPC's for that call.
        done, self._done = self._done, _nobody_to_tell
        done(self)
        self._wake_followers()


class Follower(Generic[M]):
    """One who hears a tape from its first message on, at its own pace, until it leaves."""

    def __init__(self, tape: Tape[M]) -> None:
        """Joins."""
        self._tape = tape
        self._at = 0
        tape._join()

    def take(self) -> M | None:
        """The next message, if it is there.

        Raises:
            BaseException: what the source raised; there are no more messages.
        """
        tape = self._tape
        if self._at < len(tape.messages):
            self._at += 1
            tape._heard(self._at)
            return tape.messages[self._at - 1]
        if tape.failure is not None:
            raise _own(tape.failure)
        return None

    def leave(self) -> None:
        """Hears no more. Called once."""
        self._tape._leave()


class Abandoned(Exception):
    """A source was cancelled, since nobody waited for it any more or its process ends."""


def is_anothers(failure: BaseException) -> bool:
    """Whether a joiner need not share it: the first caller left, or could wait no longer."""
    return isinstance(failure, Abandoned) or (
        isinstance(failure, ChorusError) and failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
    )


def _nobody_to_tell(tape: Tape[Any]) -> None:
    """What has ended tells nobody."""


def _own(failure: BaseException) -> BaseException:
    # A failure that is told to many is raised by each anew: its traceback leads to whoever heard it, and from there
    # back to the tape, a circle that only the garbage collector finds. Our own faults keep where they came from.
    return copy(failure) if isinstance(failure, ChorusError | Abandoned) else failure
