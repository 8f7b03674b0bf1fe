"""Something made once for many: everybody gets all of it, whoever comes, goes or fails."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Unavailable
from common.tape import AHEAD, Abandoned, Tape


class Source:
    """Numbers that come when they are let out."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.taken = 0
        self.closed = False
        self._count = count
        self._error = error
        self._gate = asyncio.Semaphore(0)

    def let(self, count: int) -> None:
        for _ in range(count):
            self._gate.release()

    async def run(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self._count):
                await self._gate.acquire()
                self.taken += 1
                yield number
            await self._gate.acquire()
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


async def settle() -> None:
    """Lets all that can run, run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def heard(tape: Tape[int], most: int = 10**9) -> list[int]:
    numbers: list[int] = []
    async with aclosing(tape.follow()) as messages:
        async for number in messages:
            numbers.append(number)
            if len(numbers) == most:
                break
    return numbers


async def test_whoever_comes_late_hears_it_from_the_start() -> None:
    source = Source(5)
    tape = Tape(source.run())
    first = asyncio.create_task(heard(tape))
    source.let(3)
    await settle()
    late = asyncio.create_task(heard(tape))
    await settle()
    source.let(3)
    assert await first == await late == [0, 1, 2, 3, 4]
    assert await heard(tape) == [0, 1, 2, 3, 4]
    assert (tape.most_followers, source.taken) == (2, 5)


async def test_the_first_leaves_and_it_goes_on_the_last_leaves_and_it_ends() -> None:
    source = Source(5)
    tape = Tape(source.run())
    first, second = asyncio.create_task(heard(tape)), asyncio.create_task(heard(tape))
    source.let(1)
    await settle()
    first.cancel()
    await settle()
    assert not source.closed
    second.cancel()
    await settle()
    assert source.closed
    assert isinstance(tape.failure, Abandoned)


async def test_it_lingers_and_is_found_by_who_comes_in_time() -> None:
    source = Source(2)
    tape = Tape(source.run(), linger=30.0)
    assert_left = asyncio.create_task(heard(tape))
    await settle()
    assert_left.cancel()
    await settle()
    assert not source.closed
    source.let(3)
    assert await heard(tape) == [0, 1]


async def test_a_failure_reaches_everybody_after_what_came_before() -> None:
    source = Source(2, ValueError("no more"))
    tape = Tape(source.run())
    followers = [asyncio.create_task(heard(tape)) for _ in range(3)]
    source.let(3)
    for follower in followers:
        with pytest.raises(ValueError, match="no more"):
            await follower


async def test_what_failed_is_freed_without_the_garbage_collector() -> None:
    async def source() -> AsyncGenerator[int, None]:
        yield 1
        raise Unavailable("gone", "GONE")

    async def fail() -> weakref.ref[Tape[int]]:
        tape = Tape(source())
        with suppress(Unavailable):
            await heard(tape)
        assert isinstance(tape.failure, Unavailable)
        return weakref.ref(tape)

    gc.disable()
    try:
        tape = await fail()
        await settle()
        assert tape() is None
    finally:
        gc.enable()


async def test_the_fastest_sets_the_pace_and_the_slow_hold_nobody_up() -> None:
    source = Source(100)
    source.let(101)
    tape = Tape(source.run())
    slow = tape.follow()
    await anext(slow)
    await settle()
    assert source.taken <= AHEAD + 2
    assert await heard(tape) == list(range(100))
    assert [0] + [number async for number in slow] == list(range(100))


async def test_one_that_nobody_ever_hears_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.tape.UNHEARD_SECONDS", 0.0)
    source = Source(1)
    tape = Tape(source.run())
    await tape.wait_closed()
    assert isinstance(tape.failure, Abandoned)


async def test_one_that_is_cancelled_at_once_ends_too() -> None:
    told: list[Tape[int]] = []
    tape = Tape(Source(1).run(), done=told.append)
    tape.cancel()
    await tape.wait_closed()
    await settle()
    assert told == [tape]
    with pytest.raises(Abandoned):
        await heard(tape)


async def test_done_is_told_once_before_anybody_hears_of_the_end() -> None:
    order: list[str] = []
    source = Source(1)
    tape = Tape(source.run(), done=lambda tape: order.append("done"))
    follower = asyncio.create_task(heard(tape))
    follower.add_done_callback(lambda _: order.append("heard"))
    source.let(2)
    await follower
    await settle()
    assert order == ["done", "heard"]


STEPS = st.lists(
    st.one_of(
        st.just(("join",)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("let"), st.integers(1, 4)),
        st.just(("settle",)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, fails=st.booleans())
def test_random_joins_and_leaves(steps: list[Any], fails: bool) -> None:
    async def play() -> None:
        error = ValueError("failed") if fails else None
        source = Source(10, error)
        tape = Tape(source.run())
        followers = [asyncio.create_task(heard(tape))]
        await settle()
        left: list[asyncio.Task[list[int]]] = []
        for step, *args in steps:
            if step == "join" and not tape.over:
                followers.append(asyncio.create_task(heard(tape)))
                await asyncio.sleep(0)
            elif step == "leave" and followers:
                gone = followers.pop(args[0] % len(followers))
                gone.cancel()
                left.append(gone)
            elif step == "let":
                source.let(args[0])
            await settle()
        source.let(20)
        for follower in followers:
            with suppress(ValueError):
                assert await follower == list(range(10))
        for gone in left:
            with suppress(asyncio.CancelledError, ValueError):
                assert await gone == list(range(10))
        await settle()
        assert source.closed
        assert tape.followers == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(play())


@pytest.mark.parametrize("ends", ["by itself", "with a failure", "when it is left"])
async def test_what_has_ended_is_freed_without_the_garbage_collector(ends: str) -> None:
    class Flight:
        """What keeps a tape, and is told of its end by it."""

        tape: Tape[int]

    async def fly() -> weakref.ref[Flight]:
        flight, source = Flight(), Source(3, Unavailable("gone", "GONE") if ends == "with a failure" else None)
        told: list[Flight] = []
        flight.tape = Tape(source.run(), done=lambda tape: told.append(flight))
        source.let(4)
        with suppress(Unavailable):
            await heard(flight.tape, 2 if ends == "when it is left" else 10)
        await settle()
        assert told.pop() is flight
        return weakref.ref(flight)

    gc.disable()
    try:
        left = await fly()
        await settle()
        assert left() is None
    finally:
        gc.enable()
