"""Who comes first, and that everybody comes: the order of those who wait, under a virtual clock."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.errors import QueueFullError
from batcher.policy import Mode, Policy
from batcher.request import Priority
from tests.test_scheduler import check_nothing_is_left, joined
from tests.virtual_engine import SAMPLES_PER_STEP, STEPS_PER_SECOND, UNHURRIED, Listener, Script, VirtualEngine, World

STEP = 1 / STEPS_PER_SECOND
"""Seconds of audio in a step; the engines here need as long for one."""


def one_seat(**limits: Any) -> World:
    """A step takes a step's time: one row is spoken as fast as it is heard."""
    engine = VirtualEngine(slots=1, step_seconds=lambda rows: STEP)
    return World(engine, replace(UNHURRIED, tick_seconds=STEP, **limits))


def order(world: World, first: int = 0) -> list[int]:
    """The segments that have joined, in order, from a number on."""
    return [number for plan in world.engine.plans for number in joined(plan) if number >= first]


# ---------------------------------------------------------------------------------------------- the order of classes


def test_streams_come_before_calls_and_batch_work_comes_last() -> None:
    world = one_seat()
    world.say(5)
    world.tick()
    world.say(1, priority=Priority.BATCH)
    world.say(1)
    world.say(1, stream=True)
    world.drain()
    assert order(world, 1) == [3, 2, 1]


def test_a_stream_about_to_run_dry_comes_before_new_ones() -> None:
    world = one_seat(reserve=0.5)
    world.say(20, 20, stream=True)
    world.ticks(10)
    new = world.say(5, stream=True)
    world.drain()
    assert order(world) == [0, 1, 2]
    assert new.ended


def test_a_stream_with_audio_to_spare_lets_new_ones_pass() -> None:
    engine = VirtualEngine(slots=1, step_seconds=lambda rows: STEP / 10)  # ten times as fast as it is heard
    world = World(engine, replace(UNHURRIED, reserve=0.1, max_steps_per_tick=1))
    world.say(50, 20, stream=True, max_rows=1)
    world.ticks(20)
    world.say(5, stream=True)
    world.drain()
    assert order(world) == [0, 2, 1]


@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.9])
def test_what_goes_on_from_audio_comes_when_a_later_row_of_the_same_stream_would(seconds: float) -> None:
    """A row that begins `seconds` before the audio before it ends, as a row and as a request of its own."""

    def come(apart: bool) -> list[int]:
        world = one_seat(reserve=0.5)
        speaking = world.say(30, stream=True, closed=apart)
        until_end = 30 - round(seconds / STEP)
        world.ticks(until_end)
        (row,) = world.engine.segments(5)
        if apart:
            world.submit([row], stream=True, heard_from=world.clock.now + seconds)
        else:
            world.extend(speaking, [row])
            world.close(speaking)
        for _ in range(2):
            world.say(5, stream=True)
        world.drain()
        return order(world, 1)

    assert come(apart=True) == come(apart=False)


def test_what_is_needed_sooner_than_was_said_comes_sooner() -> None:
    world = one_seat(reserve=0.5)
    world.say(10)
    world.tick()
    later = world.say(5, stream=True, heard_from=world.clock.now + 9.0)
    world.say(5, stream=True)
    request = world.requests[later]
    world.scheduler.need(request, world.clock.now + 9.5)
    assert request.playback_started == world.clock.now + 9.0
    world.scheduler.need(request, world.clock.now)
    world.drain()
    assert order(world, 1) == [1, 2]
    world.scheduler.need(request, 0.0)  # it is over, and nothing happens
    check_nothing_is_left(world)


def test_the_nearest_deadline_comes_first() -> None:
    world = one_seat()
    world.say(5)
    world.tick()
    for deadline in (None, 2.0, 1.0, 1.5):
        world.submit(world.engine.segments(3), deadline=deadline)
    world.drain()
    assert order(world, 1) == [3, 4, 2, 1]


def test_a_long_row_with_the_same_deadline_starts_earlier() -> None:
    world = one_seat()
    world.say(5)
    world.tick()
    for steps in (3, 15):
        world.submit(world.engine.segments(steps), deadline=2.0)
    world.drain()
    assert order(world, 1) == [2, 1]


def test_without_deadlines_calls_take_turns_in_the_order_in_which_they_came() -> None:
    world = one_seat()
    listeners = [world.say(1, 1, 1, max_rows=3), world.say(1), world.say(1, 1)]
    owner = {s.seed: index for index, listener in enumerate(listeners) for s in listener.segments}
    world.drain()
    assert [owner[number] for number in order(world)] == [0, 1, 2, 0, 2, 0]


# -------------------------------------------------------------------------------------------------------- starvation


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seats=st.integers(1, 3))
def test_nobody_starves(data: st.DataObject, seats: int) -> None:
    """A call is due `patience` after it came, or later by its tenant's lag; who comes after that comes behind it.

    So it joins once those before it have: W seconds of work with at most so much lag, at the pace of the engine.
    """
    engine = VirtualEngine(slots=seats, step_seconds=lambda rows: STEP)
    policy = replace(UNHURRIED, max_delay=1.0, patience=0.5, first_audio_limit=1e9, tick_seconds=STEP)
    world = World(engine, policy)
    waited: dict[Listener, float] = {}
    for _ in range(data.draw(st.integers(5, 60))):
        for steps in data.draw(st.lists(st.integers(1, 10), max_size=3)):
            options = {"stream": data.draw(st.booleans()), "tenant": data.draw(st.sampled_from("ab"))}
            try:
                waited[world.say(steps, **options)] = world.clock.now
            except QueueFullError:
                continue
        world.tick()
        for listener, request in world.requests.items():
            if request.first_join is None:
                # Patience, what lies before it, its tenant's lag (of two tenants: at most as much), and a row's end.
                assert world.clock.now - waited[listener] <= 0.5 + 2 * policy.max_delay + 2 * 10 * STEP
    world.drain()
    check_nothing_is_left(world)


def test_batch_work_comes_too_while_interactive_calls_never_end() -> None:
    world = one_seat(batch_patience=1.0, patience=0.1)
    patient = world.say(2, priority=Priority.BATCH)
    for _ in range(40):
        world.say(1, priority=Priority.INTERACTIVE)
        world.tick()
    assert patient.over
    assert world.scheduler.counters.dispatched["batch"] == 1


def test_batch_work_leaves_slots_to_interactive_calls() -> None:
    world = World(VirtualEngine(slots=8), replace(UNHURRIED, interactive_share=0.25))
    for _ in range(10):
        world.say(50, priority=Priority.BATCH)
    world.ticks(3)
    assert world.scheduler.rows == 6
    world.say(50)
    world.tick()
    assert world.scheduler.rows == 7
    world.drain()
    check_nothing_is_left(world)


# ------------------------------------------------------------------------------------------------------ fair shares


def served(world: World, tenants: dict[int, str]) -> dict[str, int]:
    return {
        name: sum(world.engine.scripts[n].steps for n in order(world) if tenants[n] == name)
        for name in set(tenants.values())
    }


def test_a_greedy_tenant_gets_no_more_than_what_the_modest_leave() -> None:
    """One asks for ten times as much as each of nine, all together for almost twice of what there is."""
    engine = VirtualEngine(slots=4, step_seconds=lambda rows: STEP)
    world = World(engine, replace(UNHURRIED, max_delay=2.0, tick_seconds=STEP))
    tenants: dict[int, str] = {}
    refused = dict.fromkeys("0123456789", 0)
    for tick in range(2000):
        for tenant in "0123456789":
            # A modest one asks for 10 steps each 30 ticks, a twelfth of four seats; the greedy one ten times as often.
            if tick % (3 if tenant == "0" else 30) == (0 if tenant == "0" else int(tenant) * 3):
                tenants[len(engine.scripts)] = tenant
                try:
                    world.say(10, tenant=tenant)
                except QueueFullError:
                    refused[tenant] += 1
        world.tick()
        for listener in list(world.requests):
            listener.take_all()
    steps = served(world, tenants)
    assert all(steps[tenant] >= 0.9 * 10 * 2000 / 30 for tenant in "123456789")
    assert steps["0"] >= 0.9 * (4 - 3) * 2000  # all that the nine leave
    assert refused["0"] + world.scheduler.counters.refused["displaced"] > 100


def test_a_tenant_alone_may_have_everything() -> None:
    world = one_seat(max_delay=1.0)
    for _ in range(12):
        world.say(2, tenant="only")
    with pytest.raises(QueueFullError):
        world.say(2, tenant="only")
    assert world.scheduler.counters.refused["displaced"] == 0


def test_who_has_less_than_its_share_displaces_the_newest_that_the_greediest_has_waiting() -> None:
    world = one_seat(max_delay=1.0)
    greedy = [world.say(5, tenant="greedy") for _ in range(5)]
    world.tick()
    with pytest.raises(QueueFullError):
        world.say(5, tenant="greedy")
    modest = world.say(5, tenant="modest")
    assert [listener.error is not None for listener in greedy] == [False] * 4 + [True]
    assert isinstance(greedy[-1].error, QueueFullError)
    assert world.scheduler.counters.refused == {"full": 1, "late": 0, "displaced": 1, "first_audio": 0}
    world.drain()
    assert modest.ended
    check_nothing_is_left(world)


# ---------------------------------------------------------------------------------------------------------- playback


def test_a_gap_that_a_listener_hears_is_counted_once_and_moves_its_playback() -> None:
    engine = VirtualEngine(slots=1, step_seconds=lambda rows: STEP / 2)
    heard: list[float] = []
    world = World(engine, replace(UNHURRIED, max_steps_per_tick=1))
    world.scheduler._playback._observer = Gaps(heard)
    world.say(10, 10, stream=True)
    world.ticks(6)
    world.clock.now += 1.0
    world.drain()
    assert world.scheduler.counters.underruns == 1
    assert heard[0] == pytest.approx(1.0 + 6 * STEP / 2 - 5 * STEP, abs=2 * STEP)


def test_a_slow_readers_own_pauses_are_no_gaps() -> None:
    world = one_seat()
    slow = world.say(30, stream=True, window=4 * SAMPLES_PER_STEP)
    world.ticks(10)
    for _ in range(20):
        world.clock.now += 1.0
        slow.take()
        world.ticks(5)
    world.drain()
    assert slow.ended
    assert world.scheduler.counters.underruns == 0


class Gaps:
    def __init__(self, heard: list[float]) -> None:
        self._heard = heard

    def tick(self, seconds: float, rows: int) -> None: ...

    def first_audio(self, seconds: float) -> None: ...

    def underrun(self, seconds: float) -> None:
        self._heard.append(seconds)


def test_a_tick_ends_where_a_streams_first_samples_are_ready() -> None:
    engine = VirtualEngine(slots=2, lookahead=5, step_seconds=lambda rows: 0.001)
    world = World(engine, Policy(max_delay=1e9, first_block_steps=6, block_steps=24))
    world.say(100)
    world.tick()
    stream = world.say(100, stream=True)
    steps = [plan.steps for _ in range(3) if (plan := world.tick())]
    assert steps == [8, 3, 8]  # 5 + 6 steps, then as many as fit the tick again
    assert stream.received == 6 * SAMPLES_PER_STEP


def test_a_prefill_does_not_hold_up_running_rows_for_long() -> None:
    engine = VirtualEngine(slots=20)
    engine.caps = replace(engine.caps, prefill_seconds=lambda tokens: tokens / 1000)
    world = World(engine, replace(UNHURRIED, prefill_seconds=0.1, prefill_tokens=1000))
    for _ in range(5):
        world.submit([engine.segment(Script(steps=50, prompt_tokens=30))])
    assert len(joined(world.tick())) == 5  # nobody runs yet who could be held up
    for _ in range(5):
        world.submit([engine.segment(Script(steps=50, prompt_tokens=30))])
    assert len(joined(world.tick())) == 3  # 90 of 100 ms
    world.submit([engine.segment(Script(steps=50, prompt_tokens=500))], stream=True)
    assert [len(joined(world.tick())) for _ in range(2)] == [1, 2]  # one always may


# -------------------------------------------------------------------------------------------------------------- pace


def test_admission_counts_with_the_pace_that_ticks_have_shown() -> None:
    """An engine that takes three times as long as it says carries a third; once it is quick again, all of it."""
    world = one_seat(max_delay=1.0)
    told = world.scheduler.speed
    assert told == pytest.approx(1.0)
    for tick in itertools.count():
        if not world.requests and tick > 300:
            break
        if not world.requests:
            world.say(20)
        world.tick()
        world.clock.now += 2 * STEP
    assert world.scheduler.speed == pytest.approx(told / 3, rel=0.1)
    world.say(6)
    with pytest.raises(QueueFullError) as refusal:
        world.say(6)  # 0.48 s of audio in all, 1.44 s of time
    assert refusal.value.retry_after == pytest.approx(0.44, rel=0.2)
    world.drain()
    for _ in range(600):
        if not world.requests:
            world.say(8)
        world.tick()
    assert world.scheduler.speed == pytest.approx(told, rel=0.1)


def test_a_rest_is_no_slow_tick() -> None:
    world = one_seat()
    for _ in range(50):
        world.say(5)
        world.drain()
        world.clock.now += 100.0
    assert world.scheduler.speed == pytest.approx(1.0, rel=0.1)


# ------------------------------------------------------------------------------------------------------------ static


def test_a_static_batch_is_of_similar_rows_and_nobody_joins_until_all_have_ended() -> None:
    world = World(VirtualEngine(slots=3), Policy(max_delay=1e9, mode=Mode.STATIC, static_wait=0.1))
    listeners = [world.say(steps) for steps in (10, 50, 11, 10, 51, 10)]
    world.drain()
    assert all(listener.ended for listener in listeners)
    batches = [sorted(joined(plan)) for plan in world.engine.plans if plan.joins]
    assert batches == [[0, 2, 3], [1, 4], [5]]


def test_a_static_batch_waits_for_more_but_not_for_ever() -> None:
    world = World(VirtualEngine(slots=3), Policy(max_delay=1e9, mode=Mode.STATIC, static_wait=0.1))
    world.say(10)
    assert world.tick() is None
    assert world.scheduler.wakes_at == pytest.approx(0.1)
    world.clock.now = 0.05
    world.say(10)
    assert world.tick() is None
    world.clock.now = 0.1
    assert joined(world.tick()) == [0, 1]
    world.drain()
    world.clock.now = 1.0
    for _ in range(3):
        world.say(10)
    assert len(joined(world.tick())) == 3  # a full one waits for nothing


def test_rows_that_are_longer_than_foretold_are_foretold_longer() -> None:
    world = World(VirtualEngine(slots=1))
    for _ in range(200):
        world.submit([world.engine.segment(Script(steps=20, predicted=10))])
        world.drain()
    assert 19 <= world.scheduler._estimator.predict(world.engine.segment(Script(20, predicted=10))).steps_p50 <= 21
