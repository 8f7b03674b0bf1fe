"""The scheduling policy, under a virtual clock: first what must hold whatever happens, then one thing at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batcher.engine import (
    Controls,
    EndReason,
    EngineOutOfMemoryError,
    Pcm,
    Plan,
    Report,
    RowRef,
    RowReport,
    Sampling,
    Segment,
)
from batcher.errors import (
    DeadlinePassedError,
    DeadlineUnreachableError,
    EngineFailedError,
    FirstAudioUnreachableError,
    QueueFullError,
    RowFailedError,
    StoppedError,
)
from batcher.grouping import MAX_PADDING, group_by_length
from batcher.policy import Mode, Policy
from batcher.request import Audio, Event, Priority, Request, RequestFailed, Row
from batcher.scheduler import Scheduler
from batcher.waiting import Entry
from common.settings import ToneSettings
from service.engines.tone import ToneEngine
from service.engines.tone_code import Identity, verify
from service.voices import VOICES
from tests.virtual_engine import (
    SAMPLES_PER_STEP,
    STEPS_PER_SECOND,
    EngineBrokenError,
    Listener,
    Script,
    VirtualEngine,
    World,
)

LONGEST = 10
"""Steps of the longest row in the random tests."""
BLOCK = 4
"""Steps of the longest block in the random tests."""


def joined(plan: Plan | None) -> list[int]:
    """The segments that join, in the order of the plan."""
    return [join.segment.seed for group in (plan.joins if plan else ()) for join in group]


def numbers_of(request: Request) -> set[int]:
    assert isinstance(request.reader, Listener)
    return numbers(request.reader)


def numbers(listener: Listener) -> set[int]:
    return {segment.seed for segment in listener.segments}


# ----------------------------------------------------------------------------------------------- whatever happens

scripts = st.builds(
    Script,
    steps=st.integers(0, LONGEST + 1),
    prompt_tokens=st.integers(1, 20),
    predicted=st.none() | st.integers(0, 12),
    fails_at=st.sampled_from([None] * 12 + [0, 1, 3]),
    short=st.integers(0, SAMPLES_PER_STEP - 1),
)


class Before:
    """What a request was before a tick."""

    def __init__(self, request: Request) -> None:
        self.heard = any(row.samples for row in request.current)
        self.attempts = max((row.attempts for row in request.current), default=0)


class AnythingHappens(RuleBasedStateMachine):
    """Requests come, go, read, and the engine fails, in any order. The listeners and the engine check what they see."""

    @initialize(
        slots=st.integers(1, 4),
        spare=st.integers(0, 2),
        max_vocode=st.integers(1, 4),
        lookahead=st.integers(0, 4),
        behind=st.booleans(),
        whole=st.booleans(),
        steps=st.integers(1, 3),
        limits=st.fixed_dictionaries(
            {
                "mode": st.sampled_from([Mode.CONTINUOUS, Mode.CONTINUOUS, Mode.STATIC]),
                "max_waiting": st.integers(1, 4),
                "max_parked": st.sampled_from([1, 1000]),
                "max_delay": st.sampled_from([0.3, 1e9]),
                "first_audio_limit": st.sampled_from([0.1, 1e9]),
                "prefill_tokens": st.sampled_from([1, 25, 1000]),
                "first_block_steps": st.integers(1, 2),
                "block_steps": st.integers(2, BLOCK),
                "recovery_seconds": st.sampled_from([0.01, 1.0]),
            }
        ),
    )
    def start(
        self,
        slots: int,
        spare: int,
        max_vocode: int,
        lookahead: int,
        behind: bool,
        whole: bool,
        steps: int,
        limits: dict[str, Any],
    ) -> None:
        self.engine = VirtualEngine(
            slots=slots + spare,
            max_rows=slots,
            max_vocode=max_vocode,
            max_steps=LONGEST,
            lookahead=lookahead,
            behind=behind,
            whole=whole,
            step_seconds=lambda rows: 0.01 + 0.001 * rows,
        )
        policy = Policy(tick_seconds=0.016 * steps, max_steps_per_tick=steps, static_wait=0.02, **limits)
        self.world = World(self.engine, policy)
        self.scheduler = self.world.scheduler
        self.cancelled: list[tuple[Listener, int]] = []

    # -- what can happen ----------------------------------------------------------------------------------------------

    @rule(
        parts=st.lists(scripts, min_size=1, max_size=4),
        max_rows=st.integers(1, 3),
        seconds=st.none() | st.floats(0.01, 1),
        window=st.integers(BLOCK * SAMPLES_PER_STEP, 5 * BLOCK * SAMPLES_PER_STEP) | st.just(10_000),
        options=st.fixed_dictionaries(
            {
                "tenant": st.sampled_from(["", "a", "b"]),
                "priority": st.sampled_from(Priority),
                "stream": st.booleans(),
                "closed": st.booleans(),
            }
        ),
    )
    def submit(
        self, parts: list[Script], max_rows: int, seconds: float | None, window: int, options: dict[str, Any]
    ) -> None:
        segments = [self.engine.segment(part) for part in parts]
        deadline = None if seconds is None else self.world.clock.now + seconds
        work, requests = self.scheduler.work_seconds, self.scheduler.requests
        try:
            self.world.submit(segments, max_rows=max_rows, deadline=deadline, window=window, **options)
        except (QueueFullError, DeadlineUnreachableError):
            assert (self.scheduler.work_seconds, self.scheduler.requests) == (work, requests)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), parts=st.lists(scripts, max_size=3), meanwhile=st.booleans())
    def extend(self, which: int, parts: list[Script], meanwhile: bool) -> None:
        """Without parts: it is closed."""
        if meanwhile:
            self.watch_tick(meanwhile=lambda: self.add(which, parts))
        else:
            self.add(which, parts)

    @precondition(lambda self: self.world.requests)
    @rule(which=st.integers(0, 9), meanwhile=st.booleans())
    def cancel(self, which: int, meanwhile: bool) -> None:
        """Perhaps while the engine computes."""
        if meanwhile:
            self.watch_tick(meanwhile=lambda: self.leave(which))
        else:
            self.leave(which)

    @precondition(lambda self: self.world.requests)
    @rule(which=st.integers(0, 9), pieces=st.integers(1, 4))
    def read(self, which: int, pieces: int) -> None:
        for _ in range(pieces):
            self.choose(which).take()

    @rule()
    def all_read(self) -> None:
        for listener in self.world.requests:
            listener.take_all()

    @rule(seconds=st.floats(0.001, 0.5))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.now += seconds

    @rule(count=st.integers(1, 10))
    def tick(self, count: int) -> None:
        for _ in range(count):
            self.watch_tick()

    @rule(part=scripts)
    def submit_while_the_engine_runs(self, part: Script) -> None:
        self.watch_tick(meanwhile=lambda: self.submit([part], 1, None, 10_000, {}))

    @precondition(lambda self: self.world.requests)
    @rule(
        fault=st.sampled_from([None, None, EngineOutOfMemoryError(), EngineBrokenError()]),
        leaves=st.none() | st.integers(0, 9),
    )
    def engine_fails(self, fault: Exception | None, leaves: int | None) -> None:
        """Perhaps while somebody leaves."""
        self.watch_tick(fault, lambda: None if leaves is None else self.leave(leaves))

    # -- what must hold -----------------------------------------------------------------------------------------------

    def watch_tick(self, fault: Exception | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.engine.faults.append(fault)
        before = {listener: Before(request) for listener, request in self.world.requests.items()}
        waiting = dict(self.scheduler._waiting._entries)
        plan = self.world.tick(lambda: self.watch_run(fault, meanwhile))
        self.engine.faults.clear()
        if plan is None:
            return
        self.check_joins(plan)
        self.check_blocks(plan)
        if self.scheduler.policy.mode is Mode.CONTINUOUS and fault is None:
            self.check_order(waiting, set(joined(plan)))
        for listener, was in before.items():
            if isinstance(listener.error, EngineFailedError):
                assert fault is not None
                assert was.heard or was.attempts + 1 >= self.scheduler.policy.max_attempts

    def watch_run(self, fault: Exception | None, meanwhile: Callable[[], None]) -> None:
        """Right after the engine ran: what had left before the plan is gone from it."""
        if fault is None:
            assert set(self.engine.kept) <= self.alive
        assert self.scheduler.rows + self.scheduler.slots_free == self.engine.caps.slots
        meanwhile()

    def check_joins(self, plan: Plan) -> None:
        """They keep to the prompt tokens of a tick, and a group's padding is bounded."""
        predict = self.engine.caps.predict
        groups = [[predict(join.segment).prompt_tokens for join in group] for group in plan.joins]
        if self.scheduler.policy.mode is Mode.CONTINUOUS:
            assert len(joined(plan)) == 1 or sum(map(sum, groups)) <= self.scheduler.policy.prefill_tokens
        assert all(min(group) >= (1 - MAX_PADDING) * max(group) for group in groups)

    def check_blocks(self, plan: Plan) -> None:
        """Rows are vocoded up to block ends, which depend on the step alone, or up to their own end."""
        blocks = self.scheduler._vocoding._blocks
        for ask in plan.vocode:
            script = self.engine.scripts[self.engine.numbers[ask.ref.row]]
            assert ask.to_step in (blocks.last(ask.to_step), min(script.steps, LONGEST))

    def check_order(self, waiting: dict[Request, Entry], joining: set[int]) -> None:
        """Of those who waited, nobody joins before one of its class who is due earlier: so nobody starves."""
        still = self.scheduler._waiting._entries
        seated = {request for request in waiting if not joining.isdisjoint(numbers_of(request))}
        for priority in Priority:
            mine = {request: entry for request, entry in waiting.items() if request.priority is priority}
            left = [entry for request, entry in mine.items() if still.get(request) is entry]
            joined = [entry for request, entry in mine.items() if request in seated]
            assert not joined or not left or max(joined) <= min(left)

    @invariant()
    def what_always_holds(self) -> None:
        self.check_counts()
        self.check_seats()
        self.check_shares()
        self.check_who_left()

    def check_counts(self) -> None:
        scheduler = self.scheduler
        assert scheduler.requests == len(self.world.requests)
        rows = [row for request in self.world.requests.values() for row in request.current]
        assert scheduler._work.steps == sum(row.work_steps for row in rows)
        assert scheduler._work.running == sum(row.work_steps for row in rows if row.ref is not None)
        assert scheduler.counters.cancel_ticks_max == 0
        fresh = [request for request in self.world.requests.values() if request.first_join is None]
        assert len(fresh) <= scheduler.policy.max_waiting

    def check_seats(self) -> None:
        """A row holds a slot until its end is known, and no longer, whoever reads or does not."""
        leaving = {ref.row for ref, _ in self.scheduler._roster._leaving}
        holding = [row for row, number in self.engine.open.items() if number in self.alive and row not in leaving]
        assert self.scheduler.rows == len(holding)
        assert self.scheduler.rows <= self.engine.caps.max_rows
        assert self.scheduler.rows + self.scheduler.slots_free <= self.engine.caps.slots

    def check_shares(self) -> None:
        """No request has more rows than it may, nor samples beyond what its reader lets."""
        kept = set(self.engine.kept)
        for listener, request in self.world.requests.items():
            assert len(numbers(listener) & kept) <= request.max_rows
            made = sum(self.engine.vocoded.get(number, 0) for number in numbers(listener))
            assert made <= listener.taken + listener.window

    def check_who_left(self) -> None:
        for listener, received in self.cancelled:
            assert listener.received == received
            assert not listener.over

    @property
    def alive(self) -> set[int]:
        """The segments of the requests that are not over."""
        return set().union(*map(numbers, self.world.requests))

    @property
    def open(self) -> list[Listener]:
        return [listener for listener, request in self.world.requests.items() if not request.closed]

    def add(self, which: int, parts: list[Script]) -> None:
        if not self.open:
            return
        listener = self.open[which % len(self.open)]
        if parts:
            self.world.extend(listener, [self.engine.segment(part) for part in parts])
        else:
            self.world.close(listener)

    def leave(self, which: int) -> None:
        if self.world.requests:
            listener = self.choose(which)
            self.cancelled.append((listener, listener.received))
            self.world.cancel(listener)

    def choose(self, which: int) -> Listener:
        return list(self.world.requests)[which % len(self.world.requests)]

    def teardown(self) -> None:
        """All that is left ends once everybody reads, and leaves nothing behind."""
        if not hasattr(self, "world"):
            return
        self.world.drain()
        for listener in self.open:
            self.world.close(listener)
        self.world.drain()
        assert not self.world.requests
        check_nothing_is_left(self.world)
        assert not self.engine.violations


AnythingHappens.TestCase.settings = settings(
    deadline=None, max_examples=250, stateful_step_count=50, report_multiple_bugs=False
)
test_anything_happens = AnythingHappens.TestCase


def check_nothing_is_left(world: World) -> None:
    assert world.scheduler.requests == 0
    assert world.scheduler.next_expiry is None
    check_idle(world)


def check_idle(world: World) -> None:
    """The engine has nothing of anybody."""
    scheduler = world.scheduler
    assert (scheduler.waiting, scheduler.rows) == (0, 0)
    assert scheduler.slots_free == world.engine.caps.slots
    assert scheduler.work_seconds == 0
    assert not scheduler.waits_for_report
    assert (world.engine.held, world.engine.kept) == (0, [])
    assert not world.engine.violations


# ------------------------------------------------------------------------------------------------- nobody starves


@pytest.mark.parametrize("max_vocode", [1, 2, 4])
def test_the_vocoder_goes_round(max_vocode: int) -> None:
    """Of `n` streams each hears something in n / max_vocode ticks, not only those that joined first."""
    world = World(VirtualEngine(slots=8, max_vocode=max_vocode))
    listeners = [world.say(100) for _ in range(8)]
    world.ticks(2)
    for _ in range(5):
        before = [listener.received for listener in listeners]
        world.ticks(8 // max_vocode)
        assert all(listener.received > heard for listener, heard in zip(listeners, before, strict=True))


# ------------------------------------------------------------------------------------------------- joining


def test_a_short_request_that_comes_later_ends_before_a_long_one() -> None:
    world = World(VirtualEngine(slots=2))
    long = world.say(30)
    world.ticks(10)
    short = world.say(3)
    world.ticks(5)
    assert short.ended
    assert not long.over
    assert long.received == 14 * SAMPLES_PER_STEP  # it lost no tick
    world.drain()
    assert long.ended


def test_whoever_waits_joins_in_the_tick_after_an_end() -> None:
    world = World(VirtualEngine(slots=2))
    short = world.say(2)
    world.say(5)
    waiting = world.say(1)
    plans = [world.tick() for _ in range(3)]
    assert [joined(plan) for plan in plans] == [[0, 1], [], [2]]
    assert waiting.marks == []
    world.drain()
    assert waiting.ended
    assert waiting.ended.queue_seconds == pytest.approx(2 * 0.008)
    assert short.ended
    assert (short.ended.batch_rows, waiting.ended.batch_rows) == (2, 2)


def test_who_runs_alone_is_told_so() -> None:
    world = World(VirtualEngine(slots=8))
    alone = world.say(2)
    world.drain()
    assert alone.ended
    assert alone.ended.batch_rows == 1


def test_no_more_rows_join_than_one_forward_pass_takes() -> None:
    world = World(VirtualEngine(slots=8, max_rows=3))
    for _ in range(8):
        world.say(4)
    assert len(joined(world.tick())) == 3
    world.drain()
    check_nothing_is_left(world)


def make_row(tokens: int, world: World) -> Row:
    segment = world.engine.segment(Script(prompt_tokens=tokens))
    return Row(Request([segment], Listener(world.engine, [segment]), 1), segment, world.engine.caps.predict(segment))


@given(tokens=st.lists(st.integers(1, 500), max_size=40))
def test_groups_hold_every_row_once_and_little_padding(tokens: list[int]) -> None:
    world = World(VirtualEngine())
    rows = [make_row(count, world) for count in tokens]
    groups = group_by_length(rows)
    assert {id(row) for group in groups for row in group} == {id(row) for row in rows}
    assert sum(map(len, groups)) == len(rows)
    lengths = [[row.prediction.prompt_tokens for row in group] for group in groups]
    assert all(min(group) >= (1 - MAX_PADDING) * max(group) for group in lengths)
    for group, longer in itertools.pairwise(lengths):
        assert min(group) < (1 - MAX_PADDING) * min(longer), "they would fit one group"


def test_rows_join_in_groups_of_similar_length() -> None:
    world = World(VirtualEngine(slots=8))
    for tokens in (20, 100, 22, 75, 21, 74):
        world.submit([world.engine.segment(Script(prompt_tokens=tokens))])
    plan = world.tick()
    assert plan is not None
    assert [[join.segment.seed for join in group] for group in plan.joins] == [[0, 4, 2], [5, 3], [1]]


def test_the_prompts_of_a_tick_keep_to_their_tokens_but_one_always_joins() -> None:
    world = World(VirtualEngine(slots=8), Policy(max_delay=1e9, prefill_tokens=20))
    for tokens in (8, 12, 1, 50, 15):
        world.submit([world.engine.segment(Script(steps=9, prompt_tokens=tokens))])
    assert [sorted(joined(world.tick())) for _ in range(5)] == [[0, 1], [2], [3], [4], []]


# ------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("step_seconds", "steps"), [(0.001, 8), (0.003, 2), (0.008, 1), (0.02, 1), (0.0001, 32), (0.0, 32)]
)
def test_a_tick_has_as_many_steps_as_fit_its_time(step_seconds: float, steps: int) -> None:
    world = World(VirtualEngine(step_seconds=lambda rows: step_seconds))
    world.say(100)
    plan = world.tick()
    assert plan is not None
    assert plan.steps == steps


def test_more_rows_make_steps_longer_and_ticks_have_fewer() -> None:
    world = World(VirtualEngine(step_seconds=lambda rows: 0.001 * rows))
    world.say(100)
    assert (plan := world.tick()) is not None
    assert plan.steps == 8
    world.say(100)
    world.say(100)
    assert (plan := world.tick()) is not None
    assert plan.steps == 2


# ------------------------------------------------------------------------------------------------- admission


def slow_world(**policy: Any) -> World:
    """Two seats, 25 steps a second each: 2 s of audio a second."""
    engine = VirtualEngine(slots=2, step_seconds=lambda rows: 0.04)
    return World(engine, Policy(tick_seconds=0.04, **policy))


def test_a_full_queue_refuses_and_tells_when_there_will_be_room() -> None:
    """Room for 2 s of its time, which are 4 s of audio. 2.4 s lie before it, 2.4 s come: 0.8 s too much, in 0.4 s."""
    world = slow_world(max_delay=2.0)
    assert world.scheduler.speed == pytest.approx(2.0)
    world.say(60)
    with pytest.raises(QueueFullError) as refusal:
        world.say(60)
    assert refusal.value.retry_after == pytest.approx(0.4)
    assert world.scheduler.counters.refused["full"] == 1
    assert world.scheduler.requests == 1
    world.ticks(20)
    assert world.say(60)


def test_what_goes_on_from_audio_comes_into_a_full_queue_and_is_neither_displaced_nor_given_up() -> None:
    world = slow_world(max_delay=2.0, max_waiting=3, first_audio_limit=1.0)
    running = [world.say(60, tenant="greedy"), world.say(40, tenant="greedy")]
    world.tick()
    later = [world.say(5, stream=True, heard_from=world.clock.now + n, tenant="greedy") for n in (3.0, 4.0)]
    with pytest.raises(QueueFullError):
        world.say(60, stream=True, tenant="greedy")
    with pytest.raises(QueueFullError):
        world.say(60, stream=True, tenant="modest")  # nobody fresh is waiting who could go instead
    world.drain()
    assert all(listener.ended for listener in (*running, *later))
    assert [listener.ended.queue_seconds for listener in later if listener.ended] == [0.0, 0.0]
    assert world.scheduler.counters.underruns == 0
    check_nothing_is_left(world)


def test_room_can_be_asked_for_without_taking_it() -> None:
    world = slow_world(max_delay=2.0)

    def has_room(steps: int) -> bool:
        segments = world.engine.segments(steps)
        listener = Listener(world.engine, segments)
        return world.scheduler.has_room(Request(segments, listener, 1, stream=True))

    assert has_room(60)
    world.say(60)
    assert [has_room(60), has_room(60), has_room(20)] == [False, False, True]
    assert world.scheduler.counters.refused["full"] == 0
    assert (world.scheduler.requests, world.scheduler.counters.submitted) == (1, 1)
    world.drain()
    check_nothing_is_left(world)


def test_what_is_held_makes_its_steps_and_no_samples() -> None:
    world = World(VirtualEngine())
    held = world.say(5, stream=True, heard_from=1.0, window=0)
    heard = world.say(50, stream=True)
    world.ticks(8)
    assert (held.received, world.scheduler.rows, world.scheduler.parked) == (0, 1, 1)
    world.engine.faults.append(EngineBrokenError())
    world.ticks(8)  # nothing of it was heard: it begins anew
    assert heard.error
    assert (held.error, held.received, world.scheduler.parked) == (None, 0, 1)
    held.window = 1_000_000
    held.wake()
    world.drain()
    assert held.ended
    check_nothing_is_left(world)


def test_an_idle_engine_takes_a_request_larger_than_its_room() -> None:
    assert slow_world(max_delay=0.1).say(500)


def test_only_so_many_requests_wait() -> None:
    world = slow_world(max_delay=1e9, max_waiting=2)
    for _ in range(2):
        world.say(5)
    world.tick()
    for _ in range(2):
        world.say(5)
    with pytest.raises(QueueFullError) as refusal:
        world.say(5)
    assert refusal.value.retry_after == pytest.approx(0.36)  # until all that lies before is done: 18 steps at two seats
    world.ticks(5)
    assert world.say(5)


def test_work_is_what_rows_that_may_join_still_need() -> None:
    world = World(VirtualEngine(slots=2))
    script = partial(Script, predicted=4)
    steps = [script(steps=6), script(steps=2), script(steps=4)]
    world.submit([world.engine.segment(part) for part in steps])
    works = [world.scheduler.work_seconds * STEPS_PER_SECOND]
    for _ in range(8):
        world.tick()
        works.append(world.scheduler.work_seconds * STEPS_PER_SECOND)
    # Two rows of 4, one ends after 2; the other needs 6 and counts none after 4; then the third comes.
    assert works == pytest.approx([8, 6, 2, 1, 0, 0, 0, 4, 3])


@pytest.mark.parametrize(
    ("steps", "max_rows", "seconds"),
    [((50,), 1, 2.0), ((25, 25), 2, 1.0), ((25, 25), 1, 2.0), ((10, 40), 2, 1.6)],
)
def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    steps: tuple[int, ...], max_rows: int, seconds: float
) -> None:
    world = slow_world()
    segments = world.engine.segments(*steps)
    with pytest.raises(DeadlineUnreachableError):
        world.submit(segments, max_rows=max_rows, deadline=seconds - 0.01)
    assert world.scheduler.counters.refused["late"] == 1
    assert world.scheduler.requests == 0
    listener = world.submit(segments, max_rows=max_rows, deadline=seconds + 0.1)
    world.drain()
    assert listener.ended


def test_work_that_lies_before_counts_against_a_deadline() -> None:
    world = slow_world(max_delay=1e9)
    world.say(50, 50)  # 2 s each, side by side: with an even spread of what is left the first ends after 4 s / 3
    world.tick()
    world.say(50, 50)  # 2 s of its time
    segments = world.engine.segments(10)  # 0.4 s
    before = (4 - 0.08) / 3 + 2
    with pytest.raises(DeadlineUnreachableError):
        world.submit(segments, deadline=world.clock.now + before + 0.39)
    assert world.scheduler.counters.refused["late"] == 1
    assert world.submit(segments, deadline=world.clock.now + before + 0.41)


def test_work_of_a_lower_class_does_not_lie_before() -> None:
    world = slow_world(max_delay=1e9)
    world.say(50, 50)
    world.tick()
    world.say(50, 50, priority=Priority.BATCH)
    segments = world.engine.segments(10)
    before = (4 - 0.08) / 3
    deadline = world.clock.now + before + 0.41
    with pytest.raises(DeadlineUnreachableError):
        world.submit(segments, deadline=deadline, priority=Priority.BATCH)
    assert world.submit(segments, deadline=deadline)


def test_who_waits_and_can_no_more_be_in_time_is_given_up_before_it_costs_anything() -> None:
    world = slow_world(max_delay=1e9)
    world.submit([world.engine.segment(Script(steps=100, predicted=2))])  # longer than anybody thought
    world.submit([world.engine.segment(Script(steps=100, predicted=2))])
    world.tick()
    waiting = world.submit(world.engine.segments(10), deadline=1.0)
    while not waiting.over:
        assert world.clock.now <= 0.6 + 0.04
        world.tick()
    assert isinstance(waiting.error, DeadlineUnreachableError)
    assert world.scheduler.counters.expired_waiting == 1
    assert not any(2 in joined(plan) for plan in world.engine.plans)


def test_a_stream_whose_first_audio_would_come_too_late_is_refused_also_when_it_waits_already() -> None:
    world = slow_world(max_delay=1e9, first_audio_limit=1.0)
    world.say(100, 100)
    world.tick()
    with pytest.raises(FirstAudioUnreachableError):
        world.say(10, stream=True)  # the first seat is thought to be free in (8 - 0.08) / 3 s
    assert world.say(10)
    world.ticks(70)
    late = world.say(10, stream=True)  # 30 steps are left, 1.2 s
    came = world.clock.now
    while not late.over:
        assert world.clock.now <= came + 1.04
        world.tick()
    assert isinstance(late.error, FirstAudioUnreachableError)
    assert world.scheduler.counters.refused["first_audio"] == 2


def test_a_deadline_that_passes_ends_who_waits_and_who_runs() -> None:
    world = World(VirtualEngine(slots=1, step_seconds=lambda rows: 0.0))
    running = world.submit(world.engine.segments(100), deadline=5.0)
    waiting = world.submit(world.engine.segments(100), deadline=6.0)
    third = world.say(1)
    world.ticks(2)
    assert world.scheduler.next_expiry == 5.0
    world.clock.now = 5.0
    plan = world.tick()
    assert plan is not None
    assert len(plan.leaves) == 1
    assert len(joined(plan)) == 1  # its slot is free at once
    assert isinstance(running.error, DeadlinePassedError)
    assert running.received > 0
    assert not waiting.over
    world.clock.now = 6.0
    world.drain()
    assert isinstance(waiting.error, DeadlinePassedError)
    assert third.ended
    assert world.scheduler.counters.expired_running == 2
    check_nothing_is_left(world)


def test_a_deadline_passes_also_for_who_does_not_read() -> None:
    world = World(VirtualEngine(step_seconds=lambda rows: 0.0))
    listener = world.submit(world.engine.segments(5), deadline=5.0, window=SAMPLES_PER_STEP)
    world.ticks(5)
    assert world.resting
    world.clock.now = 5.0
    world.tick()
    assert isinstance(listener.error, DeadlinePassedError)


# ------------------------------------------------------------------------------------------------- leaving


def test_a_cancel_frees_its_slots_at_the_very_next_plan() -> None:
    world = World(VirtualEngine(slots=2))
    leaver = world.say(100, 100)
    world.tick()
    waiting = world.say(100)
    world.ticks(3)
    world.cancel(leaver)
    plan = world.tick()
    assert plan is not None
    assert len(plan.leaves) == 2
    assert joined(plan) == [2]
    assert world.engine.kept == [2]
    assert world.scheduler.counters.cancel_ticks_max == 0
    assert not waiting.over


def test_a_cancel_while_the_engine_computes_waits_for_no_further_tick() -> None:
    world = World(VirtualEngine(slots=1))
    leaver, waiting = world.say(100), world.say(1)
    world.ticks(3)
    world.tick(meanwhile=lambda: world.cancel(leaver))
    heard = leaver.received
    plan = world.tick()
    assert joined(plan) == [1]
    world.drain()
    assert waiting.ended
    assert leaver.received == heard
    assert world.scheduler.counters.stale_reports == 1
    check_nothing_is_left(world)


def test_who_waits_and_leaves_never_joins() -> None:
    world = World(VirtualEngine(slots=1))
    world.say(3)
    leaver = world.say(3)
    world.tick()
    world.cancel(leaver)
    world.drain()
    assert [number for plan in world.engine.plans for number in joined(plan)] == [0]
    check_nothing_is_left(world)


def test_who_has_left_is_not_kept_until_its_deadline() -> None:
    world = World(VirtualEngine(), Policy(max_delay=1e9, max_waiting=10**6))
    stays = world.submit(world.engine.segments(50), deadline=3600.0)
    for _ in range(1000):
        world.cancel(world.submit(world.engine.segments(5), deadline=3600.0, stream=True))
    assert len(world.scheduler._expiry) < 200
    assert sum(len(heap) for heap in world.scheduler._waiting._heaps.values()) < 200
    world.drain()
    assert stays.ended
    assert world.scheduler.next_expiry is None


def test_leaving_twice_or_after_the_end_changes_nothing() -> None:
    world = World(VirtualEngine())
    listener = world.say(1)
    request = world.requests[listener]
    world.drain()
    world.scheduler.cancel(request)
    assert world.scheduler.counters.cancelled == 0
    check_nothing_is_left(world)


# ------------------------------------------------------------------------------------------------- slow readers


def test_a_slot_is_free_once_its_row_ended_however_slow_its_reader() -> None:
    world = World(VirtualEngine(slots=1))
    slow = world.say(10, window=SAMPLES_PER_STEP)
    quick = world.say(1)
    world.ticks(13)
    assert quick.ended
    assert slow.received == SAMPLES_PER_STEP
    assert world.scheduler.slots_free == 1
    assert world.engine.kept == [0]  # its hidden states
    world.drain()
    assert slow.ended


def test_a_slow_reader_holds_as_many_rows_as_it_may_and_wakes_when_it_reads() -> None:
    world = World(VirtualEngine(slots=8))
    slow = world.say(3, 3, 3, 3, 3, max_rows=2, window=2 * SAMPLES_PER_STEP)
    world.ticks(20)
    assert world.resting
    assert sorted(world.engine.kept) == [0, 1]
    assert slow.received == 2 * SAMPLES_PER_STEP
    slow.take()
    assert not world.resting
    world.drain()
    assert slow.ended


def test_a_reader_that_is_far_ahead_is_not_woken_for_nothing() -> None:
    world = World(VirtualEngine())
    quick = world.say(10)
    world.ticks(5)
    assert not quick.starved


def test_an_open_request_waits_for_more_and_ends_when_it_is_closed() -> None:
    world = World(VirtualEngine())
    listener = world.submit(world.engine.segments(2), closed=False)
    world.drain()
    assert len(listener.marks) == 1
    check_idle(world)
    world.extend(listener, world.engine.segments(3, 0))
    world.drain()
    assert len(listener.marks) == 3
    assert not listener.over
    world.close(listener)
    world.close(listener)
    world.drain()
    assert listener.ended
    check_nothing_is_left(world)


def test_an_open_request_that_is_over_takes_nothing_and_does_not_end_again() -> None:
    world = World(VirtualEngine())
    listener = world.submit(world.engine.segments(2), closed=False)
    request = world.requests[listener]
    world.drain()
    world.close(listener)
    world.cancel(listener)
    world.scheduler.extend(request, world.engine.segments(3))
    world.drain()
    assert not listener.over
    assert world.scheduler.counters.completed == 0
    check_nothing_is_left(world)


def test_later_rows_that_end_first_wait_for_their_turn() -> None:
    world = World(VirtualEngine())
    listener = world.say(10, 1, 0, 2, max_rows=4)
    world.ticks(5)
    assert not listener.marks
    assert world.engine.vocoded.keys() == {0}
    world.drain()
    spans = [(mark.start_sample, mark.end_sample) for mark in listener.marks]
    assert spans == [(0, 40), (40, 44), (44, 44), (44, 52)]


# ------------------------------------------------------------------------------------------------- ends


def test_a_request_of_rows_without_a_step_ends_without_a_sample() -> None:
    world = World(VirtualEngine())
    listener = world.say(0, 0, 0)
    world.drain()
    assert listener.ended
    assert listener.ended.samples == 0
    check_nothing_is_left(world)


def test_a_row_that_meets_the_cap_makes_its_request_end_as_length() -> None:
    world = World(VirtualEngine(max_steps=5))
    cut, whole = world.say(3, 6, 3), world.say(5)
    world.drain()
    assert cut.ended
    assert cut.ended.reason is EndReason.LENGTH
    assert whole.ended
    assert whole.ended.reason is EndReason.COMPLETE


def test_an_engine_of_whole_utterances_is_the_one_step_case() -> None:
    world = World(VirtualEngine(slots=2, whole=True))
    listeners = [world.say(3, 0, 50), world.say(7), world.say(2, 2)]
    world.drain()
    assert all(listener.ended for listener in listeners)
    check_nothing_is_left(world)


@pytest.mark.parametrize("lookahead", [0, 1, 5])
@pytest.mark.parametrize("behind", [False, True])
def test_all_is_vocoded_whatever_the_engine_needs_to_see_ahead(lookahead: int, behind: bool) -> None:
    world = World(VirtualEngine(lookahead=lookahead, behind=behind))
    listener = world.say(8, 3, 0, 6)
    world.drain()
    assert listener.ended
    assert listener.ended.samples == 17 * SAMPLES_PER_STEP


# ------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_bad_row_fails_only_its_request(fails_at: int) -> None:
    world = World(VirtualEngine())
    good = world.say(6, 6)
    bad = world.submit([*world.engine.segments(3), world.engine.segment(Script(6, fails_at=fails_at))])
    world.drain()
    assert isinstance(bad.error, RowFailedError)
    assert good.ended
    check_nothing_is_left(world)


# ------------------------------------------------------------------------------------------------- reports


def test_a_late_report_of_a_slots_past_occupant_is_dropped_and_counted() -> None:
    world = World(VirtualEngine(slots=1, behind=True))
    leaver = world.say(9)
    world.ticks(4)
    world.cancel(leaver)
    heard = leaver.received
    occupant = world.say(3)
    world.tick()  # the slot has its next occupant, and the report speaks of the last one
    assert world.scheduler.counters.stale_reports == 1
    world.drain()
    assert leaver.received == heard
    assert occupant.ended


def test_a_report_of_another_generation_is_dropped_though_all_else_fits() -> None:
    world = World(VirtualEngine(slots=1))
    listener = world.say(9)
    plan = world.tick()
    assert plan is not None
    ref = plan.joins[0][0].ref
    stale = RowRef(ref.row, ref.slot, ref.generation - 1)
    for report in (
        RowReport(stale, steps_done=9, ended=EndReason.COMPLETE),
        RowReport(stale, pcm=Pcm(b"\1\1", 0, 1)),
        RowReport(stale, error="too late"),
    ):
        assert world.scheduler.apply(Report((report,)), 0.0) == []
    assert world.scheduler.counters.stale_reports == 3
    world.drain()
    assert listener.ended


@pytest.mark.parametrize("start_sample", [0, 4, 12])
def test_audio_with_a_gap_or_twice_is_not_delivered(start_sample: int) -> None:
    world = World(VirtualEngine())
    listener = world.say(9)
    plan = world.tick()
    assert plan is not None
    world.ticks(2)
    assert listener.received == 8
    report = RowReport(plan.joins[0][0].ref, pcm=Pcm(bytes(8), start_sample, 3))
    [(_, event)] = world.scheduler.apply(Report((report,)), 0.0)
    assert isinstance(event, RequestFailed)
    assert isinstance(event.error, RowFailedError)


def test_stopping_ends_all_and_is_no_failure_of_the_engine() -> None:
    world = World(VirtualEngine(slots=1))
    world.say(5)
    world.say(5)
    world.tick()
    events = [event for _, event in world.scheduler.fail_all(StoppedError("stopping"))]
    assert [type(event.error) for event in events if isinstance(event, RequestFailed)] == [StoppedError] * 2
    assert world.scheduler.counters.engine_failures == 0
    assert world.scheduler.slots_free == 1


# ------------------------------------------------------------------------------------- one forward pass means one


@dataclass
class Collector:
    """A reader without end."""

    identity: Identity
    starved: bool = False
    samples: int = 1_000_000
    events: list[Event] = field(default_factory=list)

    def put(self, event: Event) -> None:
        self.events.append(event)


def mixed(count: int) -> list[Segment]:
    """Segments of which no two have the same voice, text, length and parameters."""
    return [
        Segment(
            text="x" * (3 + i % 5),
            voice=tuple(VOICES)[i % len(VOICES)],
            language=("en-US", "zh-CN")[i % 2],
            seed=i,
            controls=Controls(speed=1 + i % 3 / 10, oral=i % 9),
            sampling=Sampling(temperature=0.1 + i / 100, top_k=1 + i),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [2, 24, 64])
def test_rows_that_join_together_share_one_prefill(count: int) -> None:
    """Whatever their voices and parameters, if their prompts are about equally long."""
    engine = ToneEngine(ToneSettings(slots=64))
    scheduler = Scheduler(engine.caps, Policy(prefill_tokens=10_000))
    for segment in mixed(count):
        request = Request([replace(segment, text="x" * 80 + segment.text)], Collector(identity(segment)), 1)
        scheduler.submit(request, 0.0)
    plan = scheduler.plan(0.0)
    assert [len(group) for group in plan.joins] == [count]
    engine.run(plan)
    assert engine.prefill_calls == 1
    assert engine.held_slots == count


def identity(segment: Segment) -> Identity:
    return Identity.of(segment.text, segment.voice, segment.language, segment.seed, segment.index)


@pytest.mark.parametrize("count", [1, 2, 24, 64])
def test_rows_of_all_voices_and_parameters_share_each_forward_pass(count: int) -> None:
    engine = ToneEngine(ToneSettings(slots=64))
    scheduler = Scheduler(engine.caps, Policy(max_steps_per_tick=1, first_block_steps=1, block_steps=1))
    readers = []
    for segment in mixed(count):
        reader = Collector(identity(segment))
        scheduler.submit(Request([segment], reader, 1), 0.0)
        readers.append(reader)
    for tick in range(1, 11):
        for request, event in scheduler.apply(engine.run(scheduler.plan(0.0)), 0.0):
            request.reader.put(event)
        assert engine.step_calls == tick
        assert engine.rows_per_step == {count: tick}
        assert engine.vocode_calls == tick - 1
    while scheduler.requests:
        for request, event in scheduler.apply(engine.run(scheduler.plan(0.0)), 0.0):
            request.reader.put(event)
    for reader in readers:
        verify(b"".join(event.data for event in reader.events if isinstance(event, Audio)), [reader.identity])
    longest = max(engine.rows_per_step)
    assert longest == count
    assert engine.step_calls == max(engine.caps.predict(segment).steps_p50 for segment in mixed(count))
