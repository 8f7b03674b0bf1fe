"""A scripted engine under a virtual clock that checks the protocol while it is used, and what tests need around it.

A segment's audio says whose it is: each step's four samples are the segment's number and the step's, 32 bits each. So
whatever is missing, doubled, mixed or out of order shows.
"""

from __future__ import annotations

import asyncio
import math
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from batcher.engine import (
    Caps,
    EndReason,
    EngineOutOfMemoryError,
    Join,
    Pcm,
    Plan,
    Prediction,
    Report,
    RowRef,
    RowReport,
    Segment,
    Vocode,
)
from batcher.policy import Policy
from batcher.request import Audio, Event, Request, RequestEnded, RequestFailed, SegmentEnded
from batcher.scheduler import Delivery, Scheduler

SAMPLES_PER_STEP = 4
STEPS_PER_SECOND = 25
PATIENCE = 20.0
"""Seconds after which a test that waits for another thread has failed."""


UNHURRIED = Policy(max_delay=1e9, first_block_steps=1, block_steps=1)
"""Admits all, and makes each step's samples as soon as they are final."""


class ProtocolError(Exception):
    """The scheduler asked for something that the protocol forbids."""


class EngineBrokenError(Exception):
    """A scripted failure of the whole engine."""


@dataclass(slots=True)
class Clock:
    """Moves when it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """Holds the engine's thread inside `run`, but for as many runs as it lets pass."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passes = math.inf
        self._held = False

    def close(self) -> None:
        self._set(0)

    def open(self) -> None:
        self._set(math.inf)

    def let(self, runs: int) -> None:
        self._set(self._passes + runs)

    def enter(self) -> None:
        """What the engine's thread does."""
        with self._changed:
            self._held = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._passes > 0, PATIENCE), "nobody opened the gate"
            self._held = False
            self._passes -= 1

    async def holds(self) -> None:
        """Waits until the engine is held."""
        assert await asyncio.to_thread(self._wait), "the engine did not come"

    def _set(self, passes: float) -> None:
        with self._changed:
            self._passes = passes
            self._changed.notify_all()

    def _wait(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._held and self._passes == 0, PATIENCE)


@dataclass(frozen=True, slots=True)
class Script:
    """What becomes of a segment."""

    steps: int = 3
    """More than the engine's `max_steps` end as LENGTH there."""
    prompt_tokens: int = 8
    predicted: int | None = None
    """Steps foretold; None: what they will be."""
    fails_at: int | None = None
    """The step that fails; 0: its prefill."""
    short: int = 0
    """Samples that the last step lacks."""


@dataclass(slots=True)
class _Row:
    ref: RowRef
    number: int
    script: Script
    cap: int
    done: int = 0
    vocoded: int = 0
    told: bool = False
    """Its end was reported."""
    error: str | None = None

    @property
    def steps(self) -> int:
        return min(self.script.steps, self.cap)

    @property
    def ended(self) -> bool:
        return self.error is None and self.done == self.steps

    @property
    def reason(self) -> EndReason:
        return EndReason.LENGTH if self.script.steps > self.cap else EndReason.COMPLETE

    def advance(self, passes: int) -> None:
        for _ in range(passes):
            if not self.ended and self.error is None:
                self.done += 1
                self.check_fault()

    def check_fault(self) -> None:
        if self.script.fails_at == self.done:
            self.error = f"scripted: step {self.done}"

    def samples(self, start: int, end: int) -> bytes:
        blocks = b"".join(struct.pack(">II", self.number, step) for step in range(start, end))
        lacking = 2 * self.script.short if start < end == self.steps else 0
        return blocks[: len(blocks) - lacking]


class VirtualEngine:
    """An `Engine` whose rows do what their scripts say.

    `behind`: reports arrive one tick late. `whole`: a row is computed at once, as espeak does it.
    """

    def __init__(
        self,
        *,
        slots: int = 4,
        max_rows: int | None = None,
        max_vocode: int | None = None,
        max_steps: int = 1000,
        lookahead: int = 0,
        behind: bool = False,
        whole: bool = False,
        step_seconds: Callable[[int], float] = lambda rows: 0.008,
    ) -> None:
        self.caps = Caps(
            sample_rate_hertz=STEPS_PER_SECOND * SAMPLES_PER_STEP,
            samples_per_step=SAMPLES_PER_STEP,
            slots=slots,
            max_rows=max_rows or slots,
            max_vocode=max_vocode or slots,
            max_steps=max_steps,
            lookahead_steps=lookahead,
            predict=self._predict,
            step_seconds=step_seconds,
            prefill_seconds=lambda tokens: 0.0,
        )
        self.clock = Clock()
        self.gate = Gate()
        self.scripts: list[Script] = []
        self.faults: deque[Exception | None] = deque()
        """What the next runs raise."""
        self.poison: set[int] = set()
        """Segments whose joining breaks the engine."""
        self.plans: list[Plan] = []
        self.violations: list[str] = []
        self.vocoded: dict[int, int] = {}
        """Segment → samples made of it."""
        self.open: dict[int, int] = {}
        """Rows of which no end was reported yet → their segments."""
        self.numbers: dict[int, int] = {}
        """Rows → their segments, also those that are over."""
        self.closed = False
        self._behind = behind
        self._whole = whole
        self._rows: dict[int, _Row] = {}
        self._holders: dict[int, _Row] = {}
        self._generations: dict[int, int] = {}
        self._seen: set[int] = set()
        self._late = Report()

    # -- what tests say and see ---------------------------------------------------------------------------------------

    def segment(self, script: Script) -> Segment:
        """A segment that goes as scripted. Its seed is its number."""
        self.scripts.append(script)
        number = len(self.scripts) - 1
        return Segment(f"segment {number}", "female1", "en-US", seed=number)

    def segments(self, *steps: int) -> list[Segment]:
        return [self.segment(Script(count)) for count in steps]

    def expected(self, segment: Segment) -> tuple[bytes, EndReason]:
        """All audio of a segment, and how it ends."""
        row = self._make_row(RowRef(-1, -1, -1), segment)
        return row.samples(0, row.steps), row.reason

    @property
    def held(self) -> int:
        """Slots that are held."""
        return len(self._holders)

    @property
    def kept(self) -> list[int]:
        """Segments of which it holds anything. Read from any thread, so of a copy."""
        return [row.number for row in list(self._rows.values())]

    # -- the protocol -------------------------------------------------------------------------------------------------

    def run(self, plan: Plan) -> Report:
        self.gate.enter()
        self._check_fault(plan)
        self.plans.append(plan)
        touched: dict[int, _Row] = {}
        pcm: dict[int, Pcm] = {}
        self._leave(plan.leaves)
        self._join(plan.joins, touched)
        self._step(plan.steps, touched)
        self._vocode(plan.vocode, touched, pcm)
        report = Report(tuple(self._report(row, pcm.get(number)) for number, row in touched.items()))
        if self._behind:
            report, self._late = self._late, report
        self._note(report)
        return report

    def close(self) -> None:
        self.closed = True

    def _check_fault(self, plan: Plan) -> None:
        fault = self.faults.popleft() if self.faults else None
        if not self.poison.isdisjoint(join.segment.seed for group in plan.joins for join in group):
            fault = EngineBrokenError()
        if fault is None:
            return
        if not isinstance(fault, EngineOutOfMemoryError):
            self._rows.clear()
            self._holders.clear()
            self.open.clear()
        raise fault

    def _predict(self, segment: Segment) -> Prediction:
        script = self.scripts[segment.seed]
        steps = script.steps if script.predicted is None else script.predicted
        return Prediction(script.prompt_tokens, steps, steps)

    def _make_row(self, ref: RowRef, segment: Segment) -> _Row:
        return _Row(ref, segment.seed, self.scripts[segment.seed], self.caps.max_steps)

    def _leave(self, leaves: Iterable[RowRef]) -> None:
        for ref in leaves:
            self.open.pop(ref.row, None)
            if row := self._rows.get(ref.row):
                self._free_slot(row)
                del self._rows[ref.row]

    def _join(self, groups: Sequence[Sequence[Join]], touched: dict[int, _Row]) -> None:
        for join in (join for group in groups for join in group):
            self._check_join(join.ref)
            row = self._make_row(join.ref, join.segment)
            self._rows[join.ref.row] = self._holders[join.ref.slot] = touched[join.ref.row] = row
            self.open[join.ref.row] = self.numbers[join.ref.row] = row.number
            self.vocoded.pop(row.number, None)  # a row that begins anew
            self._generations[join.ref.slot] = join.ref.generation
            row.check_fault()
            self._settle(row)
        self._require(all(groups), "a group is empty")
        self._require(len(self._holders) <= self.caps.max_rows, "more rows than one forward pass takes")

    def _check_join(self, ref: RowRef) -> None:
        self._require(0 <= ref.slot < self.caps.slots, f"{ref}: no such slot")
        self._require(ref.slot not in self._holders, f"{ref}: the slot is held")
        self._require(ref.generation > self._generations.get(ref.slot, -1), f"{ref}: the generation is not newer")
        self._require(ref.row not in self._seen, f"{ref}: the row's name was used before")
        self._seen.add(ref.row)

    def _step(self, steps: int, touched: dict[int, _Row]) -> None:
        self._require(steps == 0 or bool(self.open), "steps, but every row is known to have ended")
        self.clock.now += steps * self.caps.step_seconds(len(self._holders)) if self._holders else 0.0
        for row in list(self._holders.values()) if steps else ():
            row.advance(self.caps.max_steps if self._whole else steps)
            touched[row.ref.row] = row
            self._settle(row)

    def _settle(self, row: _Row) -> None:
        """A row that is over gives its slot back, and is forgotten unless there is something to vocode."""
        if row.ended or row.error is not None:
            self._free_slot(row)
        if row.error is not None or (row.ended and row.vocoded == row.steps):
            self._rows.pop(row.ref.row, None)

    def _free_slot(self, row: _Row) -> None:
        """Its slot may have another occupant by now."""
        if self._holders.get(row.ref.slot) is row:
            del self._holders[row.ref.slot]

    def _vocode(self, wishes: Sequence[Vocode], touched: dict[int, _Row], pcm: dict[int, Pcm]) -> None:
        self._require(len(wishes) <= self.caps.max_vocode, "more rows to vocode than max_vocode")
        for wish in wishes:
            number = wish.ref.row
            row = self._rows.get(number)
            if row is None:  # it failed, and that was not reported yet
                self._require(number in self.open, f"{wish.ref} is vocoded, but it is over")
                continue
            self._require(number not in pcm, f"{wish.ref} is vocoded twice")
            self._require(wish.to_step > row.vocoded, f"{wish.ref} is vocoded to {wish.to_step} again")
            self._require(wish.to_step <= self._final(row), f"{wish.ref} is vocoded further than it is final")
            pcm[number] = Pcm(
                row.samples(row.vocoded, wish.to_step), row.vocoded * SAMPLES_PER_STEP, to_step=wish.to_step
            )
            self.vocoded[row.number] = self.vocoded.get(row.number, 0) + len(pcm[number].data) // 2
            row.vocoded = wish.to_step
            touched[number] = row
            self._settle(row)

    def _final(self, row: _Row) -> int:
        return row.steps if row.ended else row.done - self.caps.lookahead_steps

    def _report(self, row: _Row, pcm: Pcm | None) -> RowReport:
        ended = row.reason if row.ended and not row.told else None
        row.told = row.ended
        return RowReport(row.ref, row.done, ended, pcm, row.error)

    def _note(self, report: Report) -> None:
        for row in report.rows:
            if row.ended or row.error is not None:
                self.open.pop(row.ref.row, None)

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            self.violations.append(message)
            raise ProtocolError(message)


class Listener:
    """A reader that checks what it is sent: its own audio, in order, complete, no further ahead than it lets."""

    def __init__(self, engine: VirtualEngine, segments: Sequence[Segment], window: int = 1_000_000) -> None:
        self.starved = False
        self.segments: list[Segment] = []
        self.marks: list[SegmentEnded] = []
        self.received = 0
        self.taken = 0
        self.ended: RequestEnded | None = None
        self.error: Exception | None = None
        self.wake: Callable[[], None] = lambda: None
        self.window = window
        self._engine = engine
        self._unread: deque[int] = deque()
        self._lengths: list[int] = []
        self._reason = EndReason.COMPLETE
        self._pcm = b""
        self.extend(segments)

    def extend(self, segments: Sequence[Segment]) -> None:
        """More is to be expected."""
        self.segments += segments
        for pcm, reason in map(self._engine.expected, segments):
            self._lengths.append(len(pcm) // 2)
            self._pcm += pcm
            self._reason = EndReason.LENGTH if reason is EndReason.LENGTH else self._reason

    @property
    def over(self) -> bool:
        return self.ended is not None or self.error is not None

    @property
    def samples(self) -> int:
        """The credit, as the scheduler reads it."""
        assert self.starved, "`starved` must be set before the credit is read, or a wake-up can be lost"
        return self.taken + self.window

    def put(self, event: Event) -> None:
        assert not self.over, f"{event} after the end"
        match event:
            case Audio():
                self._hear(event)
            case SegmentEnded():
                self._mark(event)
            case RequestEnded():
                assert len(self.marks) == len(self.segments), "a segment is missing"
                assert event.samples == self.received
                assert event.reason is self._reason
                self.ended = event
            case RequestFailed():
                self.error = event.error

    def take(self) -> None:
        """Reads one piece of audio, as an outbox lets its reader do."""
        if self._unread:
            self.taken += self._unread.popleft()
            if self.starved:
                self.starved = False
                self.wake()

    def take_all(self) -> None:
        while self._unread:
            self.take()

    def _hear(self, audio: Audio) -> None:
        start, end = 2 * self.received, 2 * self.received + len(audio.data)
        assert audio.start_sample == self.received
        assert audio.data == self._pcm[start:end], "audio that is not the next of this request"
        self.received = end // 2
        self._unread.append(len(audio.data) // 2)
        assert self.received <= self.taken + self.window, "further ahead than the reader lets"

    def _mark(self, mark: SegmentEnded) -> None:
        assert mark.index == len(self.marks)
        assert mark.start_sample == (self.marks[-1].end_sample if self.marks else 0)
        assert mark.end_sample == mark.start_sample + self._lengths[mark.index]
        assert mark.end_sample == self.received, "a segment ends when all its audio was sent"
        self.marks.append(mark)


class World:
    """The runner's step without its thread: a scheduler, the engine, the listeners and their clock."""

    def __init__(self, engine: VirtualEngine, policy: Policy | None = None) -> None:
        self.engine = engine
        self.clock = engine.clock
        self.scheduler = Scheduler(engine.caps, policy or UNHURRIED)
        self.requests: dict[Listener, Request] = {}
        self._woken = True

    @property
    def resting(self) -> bool:
        """The runner would wait here: nothing is to be done until something changes."""
        moments = (self.scheduler.next_expiry, self.scheduler.wakes_at)
        return not self._woken and all(moment is None or self.clock.now < moment for moment in moments)

    def submit(
        self,
        segments: Sequence[Segment],
        *,
        max_rows: int = 2,
        deadline: float | None = None,
        window: int = 1_000_000,
        **options: Any,
    ) -> Listener:
        listener = Listener(self.engine, segments, window)
        listener.wake = self._wake
        request = Request(segments, listener, max_rows, deadline, **options)
        self.deliver(self.scheduler.submit(request, self.clock.now))
        self.requests[listener] = request
        self._wake()
        return listener

    def say(self, *steps: int, **options: Any) -> Listener:
        return self.submit(self.engine.segments(*steps), **options)

    def extend(self, listener: Listener, segments: Sequence[Segment]) -> None:
        listener.extend(segments)
        self.scheduler.extend(self.requests[listener], segments)
        self._wake()

    def close(self, listener: Listener) -> None:
        self.scheduler.close(self.requests[listener])
        self._wake()

    def cancel(self, listener: Listener) -> None:
        self.scheduler.cancel(self.requests.pop(listener))
        self._wake()

    def tick(self, meanwhile: Callable[[], None] = lambda: None) -> Plan | None:
        """One step of the runner. `meanwhile` happens while the engine computes. None: it rests."""
        if self.resting:
            return None
        self._woken = False
        self.deliver(self.scheduler.complete() + self.scheduler.expire(self.clock.now))
        plan = self.scheduler.plan(self.clock.now)
        if plan.empty and not self.scheduler.waits_for_report:
            return None
        outcome = self._run_engine(plan)
        meanwhile()
        self.deliver(outcome())
        self._wake()
        return plan

    def ticks(self, count: int) -> None:
        for _ in range(count):
            self.tick()

    def drain(self, limit: int = 1000) -> int:
        """Ticks until nothing is left to do, with readers that read. Returns the number of ticks."""
        for count in range(limit):
            for listener in self.requests:
                listener.take_all()
            if self.tick() is not None or not self.resting:
                continue
            if (wakes_at := self.scheduler.wakes_at) is None:
                return count
            self.clock.now = wakes_at
        raise AssertionError("it never comes to rest")

    def _wake(self) -> None:
        self._woken = True

    def _run_engine(self, plan: Plan) -> Callable[[], list[Delivery]]:
        try:
            report = self.engine.run(plan)
        except EngineOutOfMemoryError:
            return lambda: self.scheduler.out_of_memory(plan, self.clock.now)
        except EngineBrokenError:
            return partial(self.scheduler.engine_failed, plan)
        return lambda: self.scheduler.apply(report, self.clock.now)

    def deliver(self, deliveries: Iterable[Delivery]) -> None:
        for request, event in deliveries:
            request.reader.put(event)
            if isinstance(event, RequestEnded | RequestFailed):
                assert isinstance(request.reader, Listener)
                del self.requests[request.reader]
