"""The runner: a real thread beside a real event loop, held and let go by the virtual engine. Nothing sleeps."""

from __future__ import annotations

import asyncio
import math
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from batcher.engine import EngineOutOfMemoryError, Segment
from batcher.errors import DeadlinePassedError, EngineFailedError, QueueFullError, RowFailedError, StoppedError
from batcher.policy import Mode, Policy
from batcher.request import Audio, RequestEnded, RequestFailed, SegmentEnded
from batcher.runner import Runner
from batcher.scheduler import Delivery
from tests.virtual_engine import (
    PATIENCE,
    SAMPLES_PER_STEP,
    STEPS_PER_SECOND,
    EngineBrokenError,
    Gate,
    Listener,
    Script,
    VirtualEngine,
)

UNLIMITED = Policy(max_delay=math.inf, max_waiting=10_000, max_steps_per_tick=1, first_block_steps=1, block_steps=1)
ONE_STEP = 1 / STEPS_PER_SECOND


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """The threads change turns as often as Python lets them, so that what can go wrong between two lines does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@asynccontextmanager
async def running(engine: VirtualEngine, policy: Policy = UNLIMITED, **options: Any) -> AsyncIterator[Runner]:
    options.setdefault("outbox_seconds", 1e6)
    runner = Runner(engine, policy, **options)
    runner.start()
    try:
        async with asyncio.timeout(PATIENCE):
            yield runner
    finally:
        engine.gate.open()
        await stop(runner)
    assert not engine.violations


async def stop(runner: Runner) -> None:
    stopping = asyncio.create_task(runner.stop())
    try:
        await asyncio.wait_for(asyncio.shield(stopping), PATIENCE)
    except TimeoutError:
        runner._wake()  # or the thread would outlive the test
        await stopping
        raise


async def hear(runner: Runner, engine: VirtualEngine, segments: Sequence[Segment], **options: Any) -> Listener:
    """Speaks, reads all of it and checks it."""
    listener = Listener(engine, segments)
    options.setdefault("max_rows", 2)
    async with runner.speak(segments, **options) as outbox:
        while not listener.over:
            listener.put(await outbox.get())
    return listener


async def begin(runner: Runner, engine: VirtualEngine, requests: int) -> list[asyncio.Task[Listener]]:
    """Requests of which some are being spoken and the others wait. The engine is held in its third run."""
    engine.gate.close()
    tasks = [asyncio.create_task(hear(runner, engine, engine.segments(100))) for _ in range(requests)]
    await until(lambda: runner.stats().requests == requests)
    engine.gate.let(2)
    await engine.gate.holds()
    return tasks


async def until(condition: Callable[[], bool]) -> None:
    """Waits for another thread. The test's own timeout ends it."""
    while not condition():
        await asyncio.sleep(0)


def check_nothing_is_left(runner: Runner, engine: VirtualEngine) -> None:
    stats = runner.stats()
    assert (stats.requests, stats.waiting, stats.rows, stats.work_seconds) == (0, 0, 0, 0)
    assert stats.slots_free == engine.caps.slots
    assert stats.counters.cancel_ticks_max == 0
    assert (engine.held, engine.kept) == (0, [])


def alive(name: str = "engine") -> bool:
    return any(thread.name == name for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------------------- speaking


@pytest.mark.parametrize("behind", [False, True])
async def test_many_requests_are_spoken_at_once_each_with_its_own_audio(behind: bool) -> None:
    engine = VirtualEngine(slots=4, behind=behind)
    async with running(engine) as runner:
        asked = [engine.segments(n % 7, 3, n % 4) for n in range(30)]
        heard = await asyncio.gather(*(hear(runner, engine, segments) for segments in asked))
        assert all(listener.ended for listener in heard)
        await until(lambda: runner.stats().rows == 0)
        check_nothing_is_left(runner, engine)
    assert runner.stats().counters.completed == 30


async def test_a_tick_crosses_to_the_event_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    hand_offs = 0
    call = loop.call_soon_threadsafe

    def count(*args: Any, **options: Any) -> asyncio.Handle:
        nonlocal hand_offs
        hand_offs += threading.current_thread().name == "engine"
        return call(*args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    engine = VirtualEngine(slots=8)
    async with running(engine) as runner:
        engine.gate.close()
        hearing = [asyncio.create_task(hear(runner, engine, engine.segments(20))) for _ in range(8)]
        await until(lambda: runner.stats().requests == 8)
        engine.gate.open()
        await asyncio.gather(*hearing)
        # 20 steps, and the plan before the last had joined; each tick hands over the audio of all.
        assert 20 <= hand_offs <= len(engine.plans) <= 24


async def test_a_listener_of_full_credit_hears_each_step_in_the_tick_after_it() -> None:
    engine = VirtualEngine()
    async with running(engine) as runner, runner.speak(engine.segments(5), max_rows=1) as outbox:
        events = [await outbox.get() for _ in range(7)]
    assert isinstance(events[-1], RequestEnded)
    assert len(engine.plans) == 6


async def test_what_is_refused_leaves_nothing() -> None:
    engine = VirtualEngine(slots=1, step_seconds=lambda rows: 0.04)
    async with running(engine, Policy(max_delay=1.0)) as runner:
        engine.gate.close()
        async with runner.speak(engine.segments(20), max_rows=1):
            with pytest.raises(QueueFullError):
                await hear(runner, engine, engine.segments(20))
            assert runner.stats().requests == 1
            assert runner.stats().utilization == pytest.approx(0.8)


# ------------------------------------------------------------------------------------------------------- leaving


async def test_a_cancel_while_the_engine_computes_frees_the_slot_at_the_next_plan() -> None:
    engine = VirtualEngine(slots=1)
    async with running(engine) as runner:
        engine.gate.close()
        async with runner.speak(engine.segments(1000), max_rows=1):
            engine.gate.let(3)
            await engine.gate.holds()
        before = len(engine.plans)
        assert runner.stats().requests == 0
        waiting = asyncio.create_task(hear(runner, engine, engine.segments(1)))
        await until(lambda: runner.stats().waiting == 1)
        engine.gate.open()
        assert (await waiting).ended
        # The plan that was held is done first; the next one lets go of the slot and gives it on.
        plan = engine.plans[before + 1]
        assert len(plan.leaves) == 1
        assert [join.segment.seed for group in plan.joins for join in group] == [1]
        check_nothing_is_left(runner, engine)


async def test_who_has_left_is_sent_nothing_more() -> None:
    engine = VirtualEngine(slots=1)
    segments = engine.segments(1000)
    listener = Listener(engine, segments)
    async with running(engine) as runner:
        engine.gate.close()
        async with runner.speak(segments, max_rows=1) as outbox:
            engine.gate.let(3)
            await engine.gate.holds()
            while listener.received < engine.vocoded[0]:
                listener.put(await outbox.get())
        engine.gate.open()
        await hear(runner, engine, engine.segments(2))
        assert engine.vocoded[0] > listener.received
        assert runner.stats().counters.stale_reports == 1
        reading = asyncio.create_task(outbox.get())
        await asyncio.sleep(0)
        assert not reading.done()
        reading.cancel()


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("behind", [False, True])
async def test_a_thousand_random_cancels_leave_nothing_behind(behind: bool) -> None:
    chance = random.Random(7)
    engine = VirtualEngine(slots=8, max_vocode=5, lookahead=1, behind=behind)
    seats = asyncio.Semaphore(20)
    async with running(engine, outbox_seconds=3 * ONE_STEP) as runner:

        async def leave_some_time() -> None:
            segments = engine.segments(*(chance.randint(0, 9) for _ in range(chance.randint(1, 3))))
            patience = chance.randint(0, 12)
            listener = Listener(engine, segments)
            async with seats, runner.speak(segments, max_rows=chance.randint(1, 3)) as outbox:
                while patience and not listener.over:
                    listener.put(await outbox.get())
                    patience -= 1
            assert listener.error is None

        await asyncio.gather(*(leave_some_time() for _ in range(1000)))
        assert (await hear(runner, engine, engine.segments(3, 3))).ended
        await until(lambda: not engine.kept)
        check_nothing_is_left(runner, engine)
        counters = runner.stats().counters
        assert counters.cancelled + counters.completed == 1001
        assert counters.cancelled > 300


async def test_a_cancel_wakes_a_thread_that_rests() -> None:
    engine = VirtualEngine()
    async with running(engine, outbox_seconds=ONE_STEP) as runner:
        async with runner.speak(engine.segments(3), max_rows=1):
            await until(lambda: runner.stats().counters.joins == 1 and runner.stats().rows == 0)
            assert engine.kept == [0]  # its hidden states, until it reads
        await until(lambda: not engine.kept)
        check_nothing_is_left(runner, engine)


async def test_a_caller_whose_task_is_cancelled_leaves_too() -> None:
    engine = VirtualEngine()
    async with running(engine) as runner:
        tasks = await begin(runner, engine, 6)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine.gate.open()
        await until(lambda: not engine.kept)
        check_nothing_is_left(runner, engine)


# ------------------------------------------------------------------------------------------------------- readers


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("behind", [False, True])
async def test_no_wake_up_is_lost(behind: bool) -> None:
    """With room for one step the thread rests until its reader reads, at each of many steps. One lost: it hangs."""
    engine = VirtualEngine(behind=behind)
    async with running(engine, outbox_seconds=ONE_STEP) as runner:
        heard = await asyncio.gather(*(hear(runner, engine, engine.segments(1000, 1000)) for _ in range(3)))
        assert [listener.received for listener in heard] == [2000 * SAMPLES_PER_STEP] * 3


async def test_a_wake_up_between_the_plan_and_the_rest_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine()
    async with running(engine) as runner:
        before_rest = Gate()
        rest = runner._rest

        def held_rest() -> None:
            before_rest.enter()
            rest()

        monkeypatch.setattr(runner, "_rest", held_rest)
        before_rest.close()
        await hear(runner, engine, engine.segments(1))
        await before_rest.holds()
        hearing = asyncio.create_task(hear(runner, engine, engine.segments(1)))
        await until(lambda: runner.stats().waiting == 1)
        before_rest.open()
        assert (await hearing).ended


async def test_one_slow_reader_does_not_hold_up_the_others() -> None:
    engine = VirtualEngine(slots=1)
    async with running(engine, outbox_seconds=2 * ONE_STEP) as runner:
        segments = engine.segments(10)
        slow = Listener(engine, segments)
        async with runner.speak(segments, max_rows=1) as outbox:
            for _ in range(5):
                assert (await hear(runner, engine, engine.segments(10))).ended
            assert runner.stats().requests == 1
            assert engine.vocoded[0] == 2 * SAMPLES_PER_STEP
            while not slow.over:
                slow.put(await outbox.get())
        assert slow.ended


async def test_a_deadline_passes_while_the_thread_rests() -> None:
    engine = VirtualEngine(step_seconds=lambda rows: 0.0)
    async with running(engine, outbox_seconds=ONE_STEP) as runner:
        deadline = time.monotonic() + 0.2
        async with runner.speak(engine.segments(3), max_rows=1, deadline=deadline) as outbox:
            await until(lambda: runner.stats().requests == 0)
            assert time.monotonic() >= deadline
            await outbox.get()
            failure = await outbox.get()
        assert isinstance(getattr(failure, "error", None), DeadlinePassedError)
        await until(lambda: not engine.kept)
        check_nothing_is_left(runner, engine)


# ------------------------------------------------------------------------------------------------- open requests


async def test_an_open_request_takes_segments_until_it_is_closed() -> None:
    engine = VirtualEngine()
    segments = engine.segments(3)
    listener = Listener(engine, segments)
    async with running(engine) as runner, runner.speak(segments, max_rows=2, closed=False) as speaking:
        for _ in range(5):
            while len(listener.marks) < len(listener.segments):
                listener.put(await speaking.get())
            more = engine.segments(2, 0)
            listener.extend(more)
            speaking.extend(more)
        speaking.close()
        while not listener.over:
            listener.put(await speaking.get())
    assert listener.ended
    assert listener.ended.samples == 13 * SAMPLES_PER_STEP
    check_nothing_is_left(runner, engine)


async def test_what_goes_on_from_other_audio_is_made_when_it_is_released() -> None:
    engine = VirtualEngine()
    segments = engine.segments(3)
    listener = Listener(engine, segments)
    async with (
        running(engine) as runner,
        runner.speak(segments, max_rows=1, stream=True, heard_from=runner.now() + 9.0) as speaking,
    ):
        await until(lambda: runner.stats().parked == 1)
        reading = asyncio.create_task(speaking.get())
        await asyncio.sleep(0)
        assert not reading.done()
        speaking.release()
        listener.put(await reading)
        while not listener.over:
            listener.put(await speaking.get())
    check_nothing_is_left(runner, engine)


async def test_closing_does_not_overtake_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine()
    async with running(engine) as runner:
        before_delivery = Gate()
        deliver = runner._deliver

        def held_deliver(deliveries: list[Delivery]) -> None:
            if deliveries:
                before_delivery.enter()
            deliver(deliveries)

        monkeypatch.setattr(runner, "_deliver", held_deliver)
        before_delivery.close()
        segments = engine.segments(0)
        listener = Listener(engine, segments)
        async with runner.speak(segments, max_rows=1, closed=False) as speaking:
            await before_delivery.holds()
            speaking.close()
            before_delivery.open()
            while not listener.over:
                listener.put(await speaking.get())
        assert listener.ended


async def test_closing_wakes_a_thread_that_rests() -> None:
    engine = VirtualEngine()
    segments = engine.segments(1)
    async with running(engine) as runner, runner.speak(segments, max_rows=1, closed=False) as speaking:
        events = [await speaking.get() for _ in range(2)]
        speaking.close()
        events.append(await speaking.get())
    assert [type(event) for event in events] == [Audio, SegmentEnded, RequestEnded]


async def test_a_deadline_passes_while_the_engine_computes() -> None:
    """It is told by a timer of the event loop: nobody waits for the engine to come back."""
    engine = VirtualEngine(slots=1, step_seconds=lambda rows: 0.0)
    async with running(engine) as runner:
        engine.gate.close()
        deadline = time.monotonic() + 0.2
        async with (
            runner.speak(engine.segments(100), max_rows=1, deadline=deadline) as first,
            runner.speak(engine.segments(100), max_rows=1, deadline=deadline + 0.1) as second,
        ):
            for outbox in (second, first):
                failure = await outbox.get()
                assert isinstance(getattr(failure, "error", None), DeadlinePassedError)
        assert time.monotonic() >= deadline + 0.1
        assert runner.stats().requests == 0
        engine.gate.open()
        await until(lambda: runner.stats().slots_free == 1)
        check_nothing_is_left(runner, engine)


async def test_what_was_on_its_way_when_a_deadline_passed_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine(step_seconds=lambda rows: 0.0)
    async with running(engine) as runner:
        before_delivery = Gate()
        deliver = runner._deliver

        def held_deliver(deliveries: list[Delivery]) -> None:
            if deliveries:
                before_delivery.enter()
            deliver(deliveries)

        monkeypatch.setattr(runner, "_deliver", held_deliver)
        before_delivery.close()
        async with runner.speak(engine.segments(9), max_rows=1, deadline=time.monotonic() + 0.2) as outbox:
            await before_delivery.holds()
            assert isinstance(getattr(await outbox.get(), "error", None), DeadlinePassedError)
            before_delivery.open()
            await hear(runner, engine, engine.segments(1))
            reading = asyncio.create_task(outbox.get())
            await asyncio.sleep(0)
            assert not reading.done()
            reading.cancel()


async def test_a_static_batch_that_stays_incomplete_starts_after_its_wait() -> None:
    engine = VirtualEngine(slots=4, step_seconds=lambda rows: 0.0)
    policy = Policy(max_delay=math.inf, mode=Mode.STATIC, static_wait=0.05)
    async with running(engine, policy) as runner:
        heard = await asyncio.gather(*(hear(runner, engine, engine.segments(5)) for _ in range(3)))
        assert all(listener.ended for listener in heard)
        assert [len(group) for plan in engine.plans for group in plan.joins] == [3]
        heard = await asyncio.gather(*(hear(runner, engine, engine.segments(5)) for _ in range(4)))
        assert all(listener.ended for listener in heard)


# ------------------------------------------------------------------------------------------------------- failures


async def test_errors_of_the_engine_are_told_and_it_goes_on() -> None:
    engine = VirtualEngine()
    errors: list[BaseException] = []
    async with running(engine, on_error=errors.append) as runner:
        bad = await hear(runner, engine, [engine.segment(Script(3, fails_at=2))])
        assert isinstance(bad.error, RowFailedError)
        for error in (EngineBrokenError(), EngineOutOfMemoryError()):
            engine.faults.append(error)
            assert (await hear(runner, engine, engine.segments(3))).ended  # it was tried again
            assert errors.pop() is error
        engine.faults.extend([None, None, EngineBrokenError()])
        assert isinstance((await hear(runner, engine, engine.segments(30))).error, EngineFailedError)  # half heard
        assert (await hear(runner, engine, engine.segments(3))).ended
        assert not runner.dead
        check_nothing_is_left(runner, engine)


async def test_a_stop_ends_every_request_the_thread_and_the_engine() -> None:
    engine = VirtualEngine(slots=2)
    async with running(engine) as runner:
        hearing = await begin(runner, engine, 5)
        assert runner.stats().rows == 2
        stopping = asyncio.create_task(runner.stop())
        await asyncio.sleep(0)
        with pytest.raises(StoppedError):
            await hear(runner, engine, engine.segments(1))
        assert not engine.closed
        engine.gate.open()
        await stopping
        heard = await asyncio.gather(*hearing)
        assert [type(listener.error) for listener in heard] == [StoppedError] * 5
        assert not alive()
        assert engine.closed
        assert not runner.dead
        assert runner.stats().counters.engine_failures == 0


async def test_a_stop_wakes_a_thread_that_rests() -> None:
    engine = VirtualEngine()
    async with running(engine) as runner:
        await hear(runner, engine, engine.segments(1))
    assert not alive()
    assert engine.closed


@pytest.mark.parametrize("method", ["plan", "apply"])
async def test_a_crash_of_the_scheduler_is_told_and_fails_all(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine(slots=1)
    errors: list[BaseException] = []
    died = asyncio.Event()
    async with running(engine, on_error=errors.append, on_death=died.set) as runner:
        hearing = await begin(runner, engine, 3)
        crash = ZeroDivisionError("a bug")

        def fail(*args: object) -> None:
            raise crash

        monkeypatch.setattr(runner.scheduler, method, fail)
        engine.gate.open()
        await died.wait()
        heard = await asyncio.gather(*hearing)
        assert [type(listener.error) for listener in heard] == [StoppedError] * 3
        assert errors == [crash]
        assert runner.dead
        with pytest.raises(StoppedError):
            await hear(runner, engine, engine.segments(1))


async def test_a_crash_while_deadlines_are_looked_at_is_told_and_fails_all(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine(slots=1, step_seconds=lambda rows: 0.0)
    errors: list[BaseException] = []
    died = asyncio.Event()
    async with running(engine, on_error=errors.append, on_death=died.set) as runner:
        engine.gate.close()
        crash = ZeroDivisionError("a bug")

        def fail(*args: object) -> None:
            raise crash

        monkeypatch.setattr(runner.scheduler, "expire", fail)
        async with runner.speak(engine.segments(9), max_rows=1, deadline=time.monotonic() + 0.05) as outbox:
            await died.wait()
            engine.gate.open()
            while not isinstance(event := await outbox.get(), RequestFailed):
                pass
        assert isinstance(event.error, StoppedError)
        assert errors == [crash]
        assert runner.dead


async def test_who_had_ended_is_told_so_by_a_thread_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine(slots=2)
    died = asyncio.Event()
    async with running(engine, on_death=died.set) as runner:
        other = asyncio.create_task(hear(runner, engine, engine.segments(*[1000] * 500)))
        async with runner.speak(engine.segments(1), max_rows=1, closed=False) as speaking:
            assert [type(await speaking.get()) for _ in range(2)] == [Audio, SegmentEnded]
            engine.gate.close()
            await engine.gate.holds()
            speaking.close()
            apply, calls = runner.scheduler.apply, iter((False, True))

            def fail_next(*args: Any) -> list[Delivery]:
                if next(calls):
                    raise ZeroDivisionError("a bug")
                return apply(*args)

            monkeypatch.setattr(runner.scheduler, "apply", fail_next)
            engine.gate.open()
            await died.wait()
            assert isinstance(await speaking.get(), RequestEnded)
        assert isinstance((await other).error, StoppedError)
