"""Decides what the engine does next. Pure: no clock, no thread, no model; time is an argument.

The first policy: rows join free slots in the order of their requests, each tick advances all rows by as many steps as
fit its time, and a request's rows are vocoded in their order as far as its reader has credit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from batcher.engine import Caps, EndReason, Join, Pcm, Plan, Report, RowRef, RowReport, Segment, Vocode
from batcher.errors import (
    BatcherError,
    DeadlinePassedError,
    DeadlineUnreachableError,
    EngineFailedError,
    QueueFullError,
    RowFailedError,
)
from batcher.grouping import group_by_length
from batcher.queue import WaitingQueue
from batcher.request import Audio, Event, Request, RequestEnded, RequestFailed, Row, SegmentEnded

BYTES_PER_SAMPLE = 2

Delivery = tuple[Request, Event]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the scheduler is allowed. Times are in seconds."""

    max_waiting: int = 1000
    """Requests that wait for a slot."""
    max_delay: float = 2.0
    """Work that may lie before the engine."""
    tick_seconds: float = 0.008
    """What the steps of one tick should take."""
    max_steps_per_tick: int = 32
    prefill_tokens: int = 4096
    """Prompt tokens that may join in one tick."""


@dataclass(slots=True)
class Counters:
    """What has happened since the start. Only ever grows, but for `cancel_ticks_max`, which is a maximum."""

    ticks: int = 0
    steps: int = 0
    row_steps: int = 0
    joins: int = 0
    samples: int = 0
    """Samples made for readers."""
    submitted: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    expired: int = 0
    engine_failures: int = 0
    stale_reports: int = 0
    """Reports of rows that had left: dropped."""
    cancel_ticks_max: int = 0
    """Ticks that began between a cancel and the plan that freed its slots."""
    refused: dict[str, int] = field(default_factory=lambda: {"full": 0, "late": 0})


class Scheduler:
    """The rows, the slots and the queue. Not thread-safe: its owner serialises the calls."""

    def __init__(self, caps: Caps, policy: Policy) -> None:
        self.caps = caps
        self.policy = policy
        self.counters = Counters()
        self._queue = WaitingQueue()
        self._requests: set[Request] = set()
        self._rows: dict[int, Row] = {}
        self._running: dict[int, Row] = {}
        self._leaving: list[tuple[RowRef, int]] = []
        self._closed: list[Request] = []
        self._row_ids = itertools.count()
        self._free_slots = list(range(caps.slots - 1, -1, -1))
        self._seated: dict[int, RowRef] = {}
        self._generations = [0] * caps.slots
        self._work_steps = 0

    # -- what a tick is made of ---------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """The next tick: who leaves, who joins, how far to step, what to vocode."""
        leaves = self._leave()
        joins = self._join(now)
        vocode = self._vocode()
        steps = self._steps() if self._running else 0
        self.counters.ticks += 1
        self.counters.steps += steps
        self.counters.row_steps += steps * len(self._running)
        return Plan(leaves, joins, steps, vocode)

    def apply(self, report: Report) -> list[Delivery]:
        """Takes in what a tick did, and says what to deliver."""
        deliveries: list[Delivery] = []
        for row_report in report.rows:
            row = self._rows.get(row_report.ref.row)
            if row is None or row.ref != row_report.ref:
                self.counters.stale_reports += 1
                continue
            deliveries += self._apply_row(row, row_report)
        return deliveries

    def complete(self) -> list[Delivery]:
        """Ends the requests that were closed when all of their audio had been delivered."""
        ended = [request for request in self._closed if request.delivered and not request.over]
        self._closed.clear()
        return [(request, self._finish(request)) for request in ended]

    def expire(self, now: float) -> list[Delivery]:
        """Ends the requests whose deadline has passed."""
        late = [r for r in self._requests if r.deadline is not None and r.deadline <= now]
        self.counters.expired += len(late)
        return self._fail(late, DeadlinePassedError("the deadline passed"))

    # -- requests come and go -----------------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> None:
        """Admits a request.

        Raises:
            QueueFullError: too much work lies before the engine.
            DeadlineUnreachableError: the work would be done too late.
        """
        request.rows = [Row(request, segment, self.caps.predict(segment)) for segment in request.segments]
        request.arrived = now
        self._check_room(request)
        self._check_deadline(request, now)
        self.counters.submitted += 1
        self._requests.add(request)
        self._release_rows(request)

    def extend(self, request: Request, segments: Sequence[Segment]) -> None:
        """Adds segments to an open request."""
        if not request.over:
            request.rows += [Row(request, segment, self.caps.predict(segment)) for segment in segments]
            self._release_rows(request)

    def close(self, request: Request) -> None:
        """Says that an open request is complete."""
        if not request.closed:
            request.closed = True
            self._closed.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request whose reader has gone: its slots are free at the next tick."""
        if not request.over:
            self.counters.cancelled += 1
            self._forget(request)

    def fail_all(self, error: BatcherError) -> list[Delivery]:
        """Ends every request. The engine has no rows any more, so nobody need leave it."""
        deliveries = self._fail(list(self._requests), error)
        for ref, _ in self._leaving:
            self._free_slot(ref)
        self._leaving.clear()
        return deliveries

    def engine_failed(self) -> list[Delivery]:
        """Ends every request, for the engine has failed and forgotten all rows."""
        self.counters.engine_failures += 1
        return self.fail_all(EngineFailedError("the engine failed"))

    def out_of_memory(self, plan: Plan) -> list[Delivery]:
        """Takes back a plan of which nothing was done.

        What asked for the memory ends: the requests that joined, else the newest.
        """
        self.counters.engine_failures += 1
        self._leaving += [(ref, self.counters.ticks) for ref in plan.leaves]
        for vocode in plan.vocode:
            if row := self._rows.get(vocode.ref.row):
                row.vocode_asked = row.vocoded
        joined = [join.ref.row for group in plan.joins for join in group]
        asked = joined or sorted(self._rows)[-1:]
        requests = {self._rows[row].request for row in asked if row in self._rows}
        return self._fail(requests, EngineFailedError("out of memory"))

    # -- what is seen from outside ------------------------------------------------------------------------------------

    @property
    def waits_for_report(self) -> bool:
        """The engine owes samples that an earlier plan asked for."""
        return any(row.vocode_asked > row.vocoded for row in self._rows.values())

    @property
    def requests(self) -> int:
        """Requests admitted and not yet over."""
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def rows(self) -> int:
        """Rows that hold a slot."""
        return len(self._running)

    @property
    def slots_free(self) -> int:
        """Slots that a row could join now."""
        return len(self._free_slots)

    @property
    def next_deadline(self) -> float | None:
        """When `expire` next has something to do."""
        return min((r.deadline for r in self._requests if r.deadline is not None), default=None)

    @property
    def work_seconds(self) -> float:
        """Predicted seconds of audio that rows in flight and rows ready to join still need."""
        return self._work_steps / self.caps.steps_per_second

    @property
    def speed(self) -> float:
        """Seconds of audio a second that a full batch makes."""
        step = self.caps.step_seconds(self.caps.max_rows)
        return self.caps.max_rows / (step * self.caps.steps_per_second) if step > 0 else math.inf

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _leave(self) -> tuple[RowRef, ...]:
        for ref, asked_at in self._leaving:
            self.counters.cancel_ticks_max = max(self.counters.cancel_ticks_max, self.counters.ticks - asked_at)
            self._free_slot(ref)
        leaves = tuple(ref for ref, _ in self._leaving)
        self._leaving.clear()
        return leaves

    def _join(self, now: float) -> tuple[tuple[Join, ...], ...]:
        room = min(len(self._free_slots), self.caps.max_rows - len(self._running))
        groups = group_by_length(self._queue.take(room, self.policy.prefill_tokens))
        return tuple(tuple(self._seat(row, now) for row in group) for group in groups)

    def _seat(self, row: Row, now: float) -> Join:
        slot = self._free_slots.pop()
        self._generations[slot] += 1
        row.ref = self._seated[slot] = RowRef(next(self._row_ids), slot, self._generations[slot])
        self._rows[row.ref.row] = self._running[row.ref.row] = row
        self.counters.joins += 1
        if row.request.first_join is None:
            row.request.first_join = now
        return Join(row.ref, row.segment)

    def _vocode(self) -> tuple[Vocode, ...]:
        heads = (row for row in self._rows.values() if row is row.request.rows[row.request.head])
        ready = ((row, self._vocode_to(row)) for row in heads)
        asks = list(itertools.islice(((row, to) for row, to in ready if to > row.vocode_asked), self.caps.max_vocode))
        return tuple(self._ask(row, to_step) for row, to_step in asks)

    def _ask(self, row: Row, to_step: int) -> Vocode:
        assert row.ref is not None
        row.vocode_asked = to_step
        # To the back: where not all can be vocoded in one tick, all have their turn.
        self._rows[row.ref.row] = self._rows.pop(row.ref.row)
        return Vocode(row.ref, to_step)

    def _vocode_to(self, row: Row) -> int:
        """As far as the row's samples are final and its reader has credit."""
        wanted = row.vocodable_to(self.caps.lookahead_steps)
        if wanted <= row.vocode_asked:
            return row.vocode_asked
        request = row.request
        # Set before the credit is read: a reader that takes audio after this reading sees it and wakes us.
        request.reader.starved = True
        allowed = (request.reader.samples - request.samples) // self.caps.samples_per_step
        if wanted <= allowed:
            request.reader.starved = False
        return min(wanted, allowed)

    def _steps(self) -> int:
        seconds = self.caps.step_seconds(len(self._running))
        affordable = int(self.policy.tick_seconds / seconds) if seconds > 0 else self.policy.max_steps_per_tick
        return max(1, min(affordable, self.policy.max_steps_per_tick))

    # -- apply --------------------------------------------------------------------------------------------------------

    def _apply_row(self, row: Row, report: RowReport) -> list[Delivery]:
        if report.error is not None:
            assert row.ref is not None
            self._drop_row(row.ref)
            self._free_slot(row.ref)
            return self._fail([row.request], RowFailedError(report.error))
        if report.steps_done > row.steps_done:
            self._set_work(row, max(row.work_steps - (report.steps_done - row.steps_done), 0))
            row.steps_done = report.steps_done
        if report.ended is not None:
            self._end_row(row, report.ended)
        deliveries = self._deliver(row, report.pcm) if report.pcm is not None else []
        if row.finished and not row.request.over:
            deliveries += self._advance(row.request)
        return deliveries

    def _end_row(self, row: Row, reason: EndReason) -> None:
        assert row.ref is not None
        row.ended = reason
        row.request.cut |= reason is EndReason.LENGTH
        self._set_work(row, 0)
        del self._running[row.ref.row]
        self._free_slot(row.ref)

    def _deliver(self, row: Row, pcm: Pcm) -> list[Delivery]:
        """A row's samples become the request's next ones. With a gap they would be wrong: then the request fails."""
        request = row.request
        if row is not request.rows[request.head] or pcm.start_sample != row.samples:
            return self._fail([request], RowFailedError("the engine's samples have a gap"))
        audio = Audio(pcm.data, request.samples + row.samples)
        samples = len(pcm.data) // BYTES_PER_SAMPLE
        row.samples += samples
        self.counters.samples += samples
        row.vocoded = pcm.to_step
        return [(request, audio)]

    def _advance(self, request: Request) -> list[Delivery]:
        """Moves past the rows at the head of which nothing more will come."""
        deliveries: list[Delivery] = []
        while request.head < len(request.rows) and request.rows[request.head].finished:
            row = request.rows[request.head]
            end = request.samples + row.samples
            deliveries.append((request, SegmentEnded(request.head, request.samples, end)))
            request.samples = end
            request.head += 1
            if row.ref is not None:
                del self._rows[row.ref.row]
        if request.delivered:
            deliveries.append((request, self._finish(request)))
        else:
            self._release_rows(request)
        return deliveries

    def _finish(self, request: Request) -> RequestEnded:
        self.counters.completed += 1
        self._forget(request)
        reason = EndReason.LENGTH if request.cut else EndReason.COMPLETE
        return RequestEnded(reason, request.samples, (request.first_join or request.arrived) - request.arrived)

    # -- admission ----------------------------------------------------------------------------------------------------

    def _check_room(self, request: Request) -> None:
        work, speed = self.work_seconds, self.speed
        steps = sum(row.prediction.steps_p50 for row in request.rows[: request.max_rows])
        estimate = steps / self.caps.steps_per_second
        room = speed * self.policy.max_delay
        # An idle engine takes anything, or a request larger than the room would never be served.
        if (work > 0 and work + estimate > room) or self.waiting >= self.policy.max_waiting:
            self.counters.refused["full"] += 1
            delay = (work + estimate - room) / speed if math.isfinite(speed) else 0.0
            raise QueueFullError(max(delay, self.policy.tick_seconds))

    def _check_deadline(self, request: Request, now: float) -> None:
        if request.deadline is None:
            return
        steps = [row.prediction.steps_p50 for row in request.rows]
        own_steps = max(max(steps), max(sum(steps), request.expected_steps) / request.max_rows)
        own = own_steps * self.caps.step_seconds(min(len(self._running) + len(steps), self.caps.max_rows))
        if now + self.work_seconds / self.speed + own > request.deadline:
            self.counters.refused["late"] += 1
            raise DeadlineUnreachableError("the deadline cannot be met")

    def _release_rows(self, request: Request) -> None:
        """Lets the rows join that the request may have in flight now, and counts their work."""
        limit = min(len(request.rows), request.head + request.max_rows)
        for row in request.rows[request.released : limit]:
            self._set_work(row, row.prediction.steps_p50)
        request.released = limit
        self._queue.add(request)

    # -- endings ------------------------------------------------------------------------------------------------------

    def _fail(self, requests: Iterable[Request], error: BatcherError) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for request in requests:
            self.counters.failed += 1
            self._forget(request)
            deliveries.append((request, RequestFailed(error)))
        return deliveries

    def _forget(self, request: Request) -> None:
        """Takes a request out of everything. What the engine holds of it leaves with the next plan."""
        request.over = True
        self._requests.discard(request)
        self._queue.discard(request)
        for row in request.rows[: request.released]:
            self._set_work(row, 0)
            if row.ref is not None and row.ref.row in self._rows:
                self._drop_row(row.ref)
                self._leaving.append((row.ref, self.counters.ticks))

    def _drop_row(self, ref: RowRef) -> None:
        self._rows.pop(ref.row, None)
        self._running.pop(ref.row, None)

    def _free_slot(self, ref: RowRef) -> None:
        """Gives a slot back, unless its occupant did so before."""
        if self._seated.get(ref.slot) == ref:
            del self._seated[ref.slot]
            self._free_slots.append(ref.slot)

    def _set_work(self, row: Row, steps: int) -> None:
        self._work_steps += steps - row.work_steps
        row.work_steps = steps
