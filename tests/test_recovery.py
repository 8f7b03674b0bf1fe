"""What the scheduler makes of an engine that fails or has no memory left, under a virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batcher.ceiling import Ceiling
from batcher.engine import EngineOutOfMemoryError
from batcher.errors import EngineFailedError
from batcher.policy import Policy
from tests.test_scheduler import check_nothing_is_left
from tests.virtual_engine import SAMPLES_PER_STEP, EngineBrokenError, Script, VirtualEngine, World

WHOLE = Policy(max_delay=1e9, first_block_steps=100, block_steps=100, recovery_seconds=1.0)
"""Nothing is heard of a row before it ends."""


def fail(world: World, error: Exception | None = None) -> None:
    world.engine.faults.append(error or EngineBrokenError())
    world.tick()


# ------------------------------------------------------------------------------------------------- the engine fails


@pytest.mark.parametrize("behind", [False, True])
def test_what_nobody_has_heard_yet_begins_anew_after_a_failure(behind: bool) -> None:
    world = World(VirtualEngine(slots=3, behind=behind), WHOLE)
    listeners = [world.say(5, 5), world.say(5), world.say(5)]
    world.ticks(3)
    fail(world)
    assert world.scheduler.counters.engine_failures == 1
    assert world.scheduler.counters.put_back >= 3
    assert not any(listener.over for listener in listeners)
    world.drain()
    assert all(listener.ended for listener in listeners)
    check_nothing_is_left(world)


def test_what_was_half_heard_fails_and_waits_for_nobody() -> None:
    world = World(VirtualEngine(slots=1))
    half, waiting = world.say(5, 5), world.say(3)
    world.ticks(3)
    assert half.received == 2 * SAMPLES_PER_STEP
    fail(world)
    assert isinstance(half.error, EngineFailedError)
    world.drain()
    assert waiting.ended
    check_nothing_is_left(world)


def test_later_rows_of_a_request_begin_anew_when_the_earlier_ones_were_heard_to_their_end() -> None:
    world = World(VirtualEngine(slots=2), WHOLE)
    listener = world.say(2, 9)
    world.ticks(5)
    assert len(listener.marks) == 1
    fail(world)
    world.drain()
    assert listener.ended
    assert listener.ended.samples == 11 * SAMPLES_PER_STEP


def test_a_row_that_brings_the_engine_down_fails_alone_after_so_many_tries() -> None:
    world = World(VirtualEngine(slots=4), WHOLE)
    others = [world.say(20), world.say(20)]
    world.tick()
    bad = world.say(20)
    world.engine.poison.add(2)
    world.drain()
    assert isinstance(bad.error, EngineFailedError)
    assert world.scheduler.counters.engine_failures == WHOLE.max_attempts
    assert all(listener.ended for listener in others)
    check_nothing_is_left(world)


def test_an_engine_that_always_fails_ends_everything_in_bounded_time() -> None:
    world = World(VirtualEngine(slots=4), WHOLE)
    listeners = [world.say(5, 5) for _ in range(6)]
    world.engine.faults.extend(EngineBrokenError() for _ in range(1000))
    ticks = 0
    while world.requests:
        ticks += 1
        world.tick()
    assert ticks <= WHOLE.max_attempts * 12
    assert all(isinstance(listener.error, EngineFailedError) for listener in listeners)
    world.engine.faults.clear()
    assert (fresh := world.say(3))
    world.drain()
    assert fresh.ended
    check_nothing_is_left(world)


def test_a_cancel_while_the_engine_fails_loses_no_slot() -> None:
    world = World(VirtualEngine(slots=1))
    leaver = world.say(5)
    world.tick()
    world.engine.faults.append(EngineBrokenError())
    world.tick(meanwhile=lambda: world.cancel(leaver))
    assert world.scheduler.slots_free == 1
    assert world.say(5)
    world.drain()
    check_nothing_is_left(world)


# ------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("ticks", range(8))
@pytest.mark.parametrize("behind", [False, True])
def test_out_of_memory_puts_back_what_joined_and_the_others_go_on(behind: bool, ticks: int) -> None:
    world = World(VirtualEngine(slots=8, behind=behind, lookahead=1))
    others = [world.say(3, 2), world.say(4)]
    world.tick()
    world.ticks(ticks)
    running = world.scheduler.rows
    joining = world.say(5)
    fail(world, EngineOutOfMemoryError())
    assert world.scheduler.max_rows == max(1, running)
    assert world.scheduler.counters.out_of_memory == 1
    world.drain()
    assert joining.ended
    assert all(listener.ended for listener in others)
    check_nothing_is_left(world)


def test_fewer_rows_run_after_it_and_more_again_later() -> None:
    world = World(VirtualEngine(slots=16), WHOLE)
    for _ in range(16):
        world.say(1000)
    fail(world, EngineOutOfMemoryError())
    assert world.scheduler.max_rows == 1
    seen = []
    for _ in range(8):
        world.tick()
        seen.append(world.scheduler.rows)
        world.clock.now += WHOLE.recovery_seconds
    assert seen == [1, 3, 5, 7, 9, 11, 13, 15]
    world.clock.now += WHOLE.recovery_seconds
    world.tick()
    assert world.scheduler.rows == 16


def test_out_of_memory_once_without_a_joining_row_changes_nothing() -> None:
    world = World(VirtualEngine(), WHOLE)
    listeners = [world.say(9), world.say(9)]
    world.ticks(3)
    fail(world, EngineOutOfMemoryError())
    assert world.scheduler.max_rows == world.scheduler.caps.max_rows
    world.drain()
    assert all(listener.ended for listener in listeners)
    assert world.scheduler.counters.put_back == 0


def test_out_of_memory_again_lets_the_newest_wait_of_whom_nothing_was_heard() -> None:
    world = World(VirtualEngine(slots=3), replace(WHOLE, first_block_steps=5))
    older, newer, heard = world.say(9), world.say(9), world.say(9)
    world.ticks(3)
    world.scheduler._roster.rows[2].samples = 1  # the newest was heard
    for _ in range(2):
        fail(world, EngineOutOfMemoryError())
    assert world.scheduler.max_rows == 2
    assert [row.segment.seed for row in world.scheduler._roster.running.values()] == [0, 2]
    world.scheduler._roster.rows[2].samples = 0
    world.drain()
    assert all(listener.ended for listener in (older, newer, heard))


def test_out_of_memory_again_without_a_joining_row_lets_the_newest_wait() -> None:
    world = World(VirtualEngine(), WHOLE)
    older, newer = world.say(9), world.say(9)
    world.ticks(3)
    for _ in range(2):
        fail(world, EngineOutOfMemoryError())
    assert world.scheduler.max_rows == 1
    assert world.scheduler.rows == 1
    plan = world.tick()
    assert plan is not None
    assert len(plan.leaves) == 1
    assert world.engine.kept == [0]
    world.drain()
    assert older.ended
    assert newer.ended


def test_out_of_memory_while_many_are_vocoded_vocodes_fewer() -> None:
    world = World(VirtualEngine(slots=8))
    listeners = [world.say(30) for _ in range(8)]
    world.ticks(3)
    fail(world, EngineOutOfMemoryError())
    plan = world.tick()
    assert plan is not None
    assert len(plan.vocode) == 4
    assert world.scheduler.rows == 8
    world.drain()
    assert all(listener.ended for listener in listeners)


def test_a_row_that_does_not_fit_by_itself_fails_after_so_many_tries() -> None:
    world = World(VirtualEngine(), WHOLE)
    listener = world.say(9)
    for _ in range(WHOLE.max_attempts):
        assert not listener.over
        fail(world, EngineOutOfMemoryError())
    assert isinstance(listener.error, EngineFailedError)
    check_nothing_is_left(world)


def test_out_of_memory_ends_nobody_if_who_joined_has_left() -> None:
    world = World(VirtualEngine())
    other = world.say(9)
    world.ticks(3)
    joining = world.say(9)
    world.engine.faults.append(EngineOutOfMemoryError())
    world.tick(meanwhile=lambda: world.cancel(joining))
    world.drain()
    assert other.ended
    check_nothing_is_left(world)


def test_out_of_memory_forgets_no_leave() -> None:
    world = World(VirtualEngine(slots=1))
    leaver = world.say(9)
    world.ticks(3)
    world.cancel(leaver)
    joining = world.say(9)
    fail(world, EngineOutOfMemoryError())
    assert world.engine.kept == [0]
    world.drain()
    assert joining.ended
    check_nothing_is_left(world)


def test_a_bad_row_among_rows_that_were_put_back_fails_alone() -> None:
    world = World(VirtualEngine(slots=4), WHOLE)
    good, bad = world.say(6), world.submit([world.engine.segment(Script(6, fails_at=4))])
    fail(world)
    world.drain()
    assert good.ended
    assert bad.error is not None


def test_a_ceiling_comes_back_to_full_width_and_then_rests() -> None:
    engine = VirtualEngine(slots=20, max_vocode=16)
    ceiling = Ceiling(engine.caps, Policy(prefill_tokens=100, recovery_seconds=1.0))
    ceiling.lower_rows(7, now=0.0)
    ceiling.lower_vocode(now=0.0)
    assert (ceiling.rows, ceiling.prefill_tokens, ceiling.vocode) == (7, 50, 8)
    ceiling.recover(0.9)
    assert ceiling.rows == 7
    ceiling.recover(1.0)
    assert (ceiling.rows, ceiling.prefill_tokens, ceiling.vocode) == (9, 100, 16)
    for second in range(2, 20):
        ceiling.recover(float(second))
    assert ceiling.rows == 20
