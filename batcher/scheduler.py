"""Decides what the engine does next. Pure: no clock, no thread, no model; time is an argument.

Rows join free slots in the order in which they are due (`due.py`), all rows advance together by as many steps as fit a
tick, and a request's rows are vocoded in their order as far as its reader has credit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batcher.admission import Admission
from batcher.ceiling import Ceiling
from batcher.counters import Counters, Deaf, Observer
from batcher.due import DueDates
from batcher.engine import Caps, EndReason, Join, Pcm, Plan, Report, RowReport, Segment
from batcher.errors import (
    BatcherError,
    DeadlinePassedError,
    DeadlineUnreachableError,
    EngineFailedError,
    FirstAudioUnreachableError,
    QueueFullError,
    RowFailedError,
)
from batcher.estimate import Estimator
from batcher.expiry import Expiry
from batcher.grouping import group_by_length, padding
from batcher.pace import Pace
from batcher.playback import Playback
from batcher.policy import Mode, Policy
from batcher.request import (
    Audio,
    Event,
    Priority,
    Request,
    RequestEnded,
    RequestFailed,
    Row,
    SegmentEnded,
)
from batcher.roster import Roster
from batcher.static import StaticBatches
from batcher.vocoding import Vocoding
from batcher.waiting import Waiting
from batcher.work import Work

BYTES_PER_SAMPLE = 2


INTERACTIVE_ONLY = (Priority.INTERACTIVE,)
EVERYBODY = (Priority.INTERACTIVE, Priority.BATCH)

Delivery = tuple[Request, Event]


class Scheduler:
    """The rows, the slots and the queue. Not thread-safe: its owner serialises the calls. Times are in seconds."""

    def __init__(self, caps: Caps, policy: Policy, observer: Observer | None = None) -> None:
        self.caps = caps
        self.policy = policy
        self.counters = Counters()
        self._estimator = Estimator(caps)
        self._ceiling = Ceiling(caps, policy)
        self._work = Work()
        self._due = DueDates(caps, policy, self._work)
        self._pace = Pace()
        self._admission = Admission(caps, policy, self._work, self._pace)
        self._waiting = Waiting()
        self._static = StaticBatches(policy) if policy.mode is Mode.STATIC else None
        self._roster = Roster(caps.slots)
        self._vocoding = Vocoding(caps, policy, self._due)
        self._playback = Playback(caps.sample_rate_hertz, self.counters, observer or Deaf())
        self._expiry = Expiry()
        self._requests: set[Request] = set()
        self._closed: list[Request] = []
        self._failures_in_a_row = 0
        self._rows_ran = self._steps_made = 0
        """In the last tick: rows that held a slot, and the steps that they did, all together."""
        self._speed = self._admission.speed(self._ceiling.rows)

    # -- what a tick is made of ---------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """The next tick: who leaves, who joins, whose samples are made, how far all step."""
        self._follow(now)
        leaves = self._roster.leave()
        joins = self._join(now)
        vocode = self._vocoding.choose(self._ceiling.vocode)
        steps = self._steps()
        self._count_tick(steps)
        return Plan(leaves, joins, steps, vocode)

    def apply(self, report: Report, now: float) -> list[Delivery]:
        """Takes in what a tick did, and says what to deliver."""
        self._failures_in_a_row = 0
        deliveries: list[Delivery] = []
        for row_report in report.rows:
            if (row := self._roster.find(row_report.ref)) is None:
                self.counters.stale_reports += 1
            else:
                deliveries += self._apply_row(row, row_report, now)
        return deliveries

    def complete(self) -> list[Delivery]:
        """Ends the requests that were closed when all of their audio had been delivered."""
        ended = [request for request in self._closed if request.delivered and not request.over]
        self._closed.clear()
        return [(request, self._finish(request)) for request in ended]

    def expire(self, now: float) -> list[Delivery]:
        """Ends the requests whose deadline has passed, and those that wait and can no more be in time."""
        deliveries: list[Delivery] = []
        for request in self._expiry.due(now):
            if request.deadline is not None and request.deadline <= now:
                self._count_expired(request)
                deliveries += self._fail(request, DeadlinePassedError("the deadline passed"))
            elif request.first_join is None:
                last_chance = self._last_chance(request)
                if last_chance is not None and last_chance > now:  # its deadline was extended
                    self._expiry.add(request, last_chance)
                else:
                    deliveries += self._fail(request, self._hopeless(request, now))
            elif request.deadline is not None:
                self._expiry.add(request, request.deadline)
        return deliveries

    # -- requests come and go -----------------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> list[Delivery]:
        """Admits a request. Says what to deliver to those who are refused in its stead.

        One that goes on from audio that is heard already was admitted with that, and comes in.

        Raises:
            QueueFullError: too much work lies before the engine.
            DeadlineUnreachableError: the work would be done too late.
        """
        request.arrived = now
        request.later.extend(self._make_rows(request, request.segments))
        request.segments = ()
        rows = self._release(request)
        if request.heard_from is None:
            deliveries = self._admit(request, now)
        else:
            deliveries = []
            request.first_join, request.playback_started = now, request.heard_from
        self.counters.submitted += 1
        self._requests.add(request)
        for row in rows:
            self._work.wait(row)
        self._queue(request)
        if (last_chance := self._last_chance(request)) is not None:
            self._expiry.add(request, last_chance)
        return deliveries

    def has_room(self, request: Request) -> bool:
        """Whether a request would find room now. It is not admitted."""
        request.later.extend(self._make_rows(request, request.segments))
        self._release(request)
        try:
            self._make_room(request)
        except QueueFullError:
            return False
        return True

    def need(self, request: Request, heard_from: float) -> None:
        """Somebody needs what goes on from what is heard, perhaps sooner than was said when it came."""
        if request.playback_started is not None and not request.samples and heard_from < request.playback_started:
            request.playback_started = heard_from
            self._queue_anew(request)

    def predict(self, segment: Segment) -> float:
        """The audio that a segment will come to, in seconds."""
        return self._estimator.predict(segment).steps_p50 / self.caps.steps_per_second

    def extend(self, request: Request, segments: Sequence[Segment]) -> None:
        """Adds segments to an open request."""
        if not request.over:
            request.later.extend(self._make_rows(request, segments))
            self._release_more(request)

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

    # -- the engine fails ---------------------------------------------------------------------------------------------

    def fail_all(self, error: BatcherError) -> list[Delivery]:
        """Ends every request. The engine has no rows any more, so nobody need leave it."""
        deliveries = [delivery for request in list(self._requests) for delivery in self._fail(request, error)]
        self._roster.empty_leaving()
        return deliveries

    def engine_failed(self, plan: Plan) -> list[Delivery]:
        """The engine has failed and forgotten all rows. Those of which nothing was heard yet begin anew.

        To blame are those that had just joined, or all if nobody had.
        """
        self.counters.engine_failures += 1
        joined = [row for group in plan.joins for join in group if (row := self._roster.find(join.ref)) is not None]
        lost = list(self._roster.rows.values())
        for row in lost:
            self._roster.forget(row)
        self._roster.empty_leaving()
        error = EngineFailedError("the engine failed")
        blamed = joined or lost
        return [delivery for row in lost for delivery in self._try_again(row, row in blamed, error)]

    def out_of_memory(self, plan: Plan, now: float) -> list[Delivery]:
        """Takes back a plan of which nothing was done, and asks for less from now on.

        Who joined is put back. If nobody did, fewer rows are vocoded at once; if it was not that, the same is tried
        again, since the engine has given back what it could; and if that fails too, the newest row leaves.
        """
        self.counters.out_of_memory += 1
        self._failures_in_a_row += 1
        self._roster.leave_again(plan.leaves)
        for vocode in plan.vocode:
            if row := self._roster.find(vocode.ref):
                self._vocoding.take_back(row)
        if plan.joins:
            joined = [row for group in plan.joins for join in group if (row := self._roster.find(join.ref)) is not None]
            for row in joined:
                self._roster.forget(row)
            return self._shrink(joined, now)
        if len(plan.vocode) > 1:
            self._ceiling.lower_vocode(now)
            return []
        if self._failures_in_a_row == 1:
            return []
        newest = sorted(self._roster.rows.values(), key=lambda row: not row.samples)[-1:]
        for row in newest:
            self._roster.leave_soon(row)
        return self._shrink(newest, now)

    # -- what is seen from outside ------------------------------------------------------------------------------------

    @property
    def waits_for_report(self) -> bool:
        """The engine owes samples that an earlier plan asked for."""
        return any(row.vocode_asked > row.vocoded for row in self._roster.rows.values())

    @property
    def requests(self) -> int:
        """Requests admitted and not yet over."""
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """Rows that hold a slot."""
        return len(self._roster.running)

    @property
    def parked(self) -> int:
        """Rows that have ended and of which samples are yet to be made."""
        return self._roster.parked

    @property
    def max_rows(self) -> int:
        """Rows that a forward pass may have now: fewer than the engine's own after it ran out of memory."""
        return self._ceiling.rows

    @property
    def slots_free(self) -> int:
        """Slots that a row could join now."""
        return self._roster.slots_free

    @property
    def next_expiry(self) -> float | None:
        """When `expire` next has something to look at."""
        return self._expiry.next

    @property
    def wakes_at(self) -> float | None:
        """When a plan should be made although nothing has changed."""
        return self._static.complete_at if self._static and self._waiting else None

    @property
    def work_seconds(self) -> float:
        """Predicted seconds of audio that rows in flight and rows ready to join still need."""
        return self._work.steps / self.caps.steps_per_second

    @property
    def speed(self) -> float:
        """Seconds of audio a second that a full batch makes."""
        return self._speed

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _follow(self, now: float) -> None:
        """Follows what the engine can do now."""
        rows = max(1, self._rows_ran)
        foretold = self.caps.step_seconds(rows) * self._steps_made / rows
        self._pace.tick(now, self._rows_ran / self.caps.max_rows, foretold)
        self._ceiling.recover(now)
        self._speed = self._admission.speed(self._ceiling.rows)

    def _join(self, now: float) -> tuple[tuple[Join, ...], ...]:
        chosen = self._choose(now)
        for row in chosen:
            row.request.batch_rows = max(row.request.batch_rows, len(self._roster.running))
        groups = group_by_length(chosen)
        self.counters.prefill_padding += sum(map(padding, groups))
        return tuple(tuple(Join(row.ref, row.segment) for row in group if row.ref) for group in groups)

    def _choose(self, now: float) -> list[Row]:
        """Seats the rows that are due first, as far as there are slots and prompt tokens; at least one if any fits."""
        if self._static is not None:
            return self._choose_static(self._static, now)
        rows: list[Row] = []
        tokens, most = 0, self._prefill_tokens()
        while self._room() > 0 and (first := self._waiting.first(self._admitted())) is not None:
            due, request = first
            row = request.next_row
            assert row is not None
            tokens += row.prediction.prompt_tokens
            # What may have brought the engine down before is tried by itself.
            if rows and (tokens > most or row.attempts or rows[-1].attempts):
                break
            self._seat(row, due, now)
            rows.append(row)
        return rows

    def _prefill_tokens(self) -> int:
        """Prompt tokens that may join now. While rows run, their audio goes on only after the prefill."""
        tokens = self._ceiling.prefill_tokens
        seconds = self.caps.prefill_seconds(tokens)
        if not self._roster.running or seconds <= self.policy.prefill_seconds:
            return tokens
        return int(tokens * self.policy.prefill_seconds / seconds)

    def _choose_static(self, batches: StaticBatches, now: float) -> list[Row]:
        """Seats a batch of similar rows, once it is complete and nobody runs."""
        if self._roster.running:
            return []
        chosen = batches.choose(self._waiting, self._room(), now)
        return [self._seat(row, due, now) for due, row in chosen]

    def _room(self) -> int:
        return min(self._roster.slots_free, self._ceiling.rows - len(self._roster.running))

    def _admitted(self) -> Sequence[Priority]:
        """The classes that may take a slot: batch work leaves some to interactive work."""
        kept = int(self.policy.interactive_share * self._ceiling.rows)
        return EVERYBODY if self._roster.batch_running < max(1, self._ceiling.rows - kept) else INTERACTIVE_ONLY

    def _seat(self, row: Row, due: float, now: float) -> Row:
        request = row.request
        self._count_dispatch(request, row, due, now)
        self._work.start(row)
        self._roster.seat(row)
        self._vocoding.note(row)
        if request.first_join is None:
            request.first_join = now
        self._waiting.discard(request)
        self._queue(request)
        return row

    def _steps(self) -> int:
        """As many as fit a tick, but none beyond those that a stream's first samples wait for."""
        if not self._roster.running:
            return 0
        seconds = self.caps.step_seconds(len(self._roster.running))
        most = self.policy.max_steps_per_tick
        steps = min(most, int(self.policy.tick_seconds / seconds)) if seconds > 0 else most
        opening = (row.vocode_at - row.steps_done for row in self._roster.opening if not row.vocode_asked)
        return max(1, min((steps, *opening)))

    # -- apply --------------------------------------------------------------------------------------------------------

    def _apply_row(self, row: Row, report: RowReport, now: float) -> list[Delivery]:
        if report.error is not None:
            self._roster.forget(row)
            return self._fail(row.request, RowFailedError(report.error))
        if report.steps_done > row.steps_done:
            self._work.progress(row, report.steps_done - row.steps_done)
            self._steps_made += report.steps_done - row.steps_done
            row.steps_done = report.steps_done
            self._vocoding.advanced(row)
        if report.ended is None and report.pcm is None:
            return _NOTHING
        if report.ended is not None:
            self._end_row(row, report.ended)
        deliveries = self._deliver(row, report.pcm, now) if report.pcm is not None else []
        if row.finished and not row.request.over:
            deliveries += self._advance(row.request)
        return deliveries

    def _end_row(self, row: Row, reason: EndReason) -> None:
        row.ended = reason
        row.request.cut |= reason is EndReason.LENGTH
        if reason is EndReason.COMPLETE:
            self._estimator.learn(row.segment, row.steps_done)
        self._work.drop(row)
        self._roster.end(row)
        self._vocoding.note(row)

    def _deliver(self, row: Row, pcm: Pcm, now: float) -> list[Delivery]:
        """A row's samples become the request's next ones. With a gap they would be wrong: then the request fails."""
        request = row.request
        if row is not request.head or pcm.start_sample != row.samples:
            return self._fail(request, RowFailedError("the engine's samples have a gap"))
        audio = Audio(pcm.data, request.samples)
        samples = len(pcm.data) // BYTES_PER_SAMPLE
        self._playback.more_comes(request, now)
        if not request.samples and request.stream:
            self._queue_anew(request)
        self._roster.opening.pop(row, None)
        row.samples += samples
        request.samples += samples
        self.counters.samples += samples
        row.vocoded = pcm.to_step
        return [(request, audio)]

    def _advance(self, request: Request) -> list[Delivery]:
        """Moves past the rows at the head of which nothing more will come."""
        deliveries: list[Delivery] = []
        while (row := request.head) is not None and row.finished:
            request.current.popleft()
            deliveries.append((request, SegmentEnded(request.index, request.segment_start, request.samples)))
            request.index += 1
            request.segment_start = request.samples
            if row.ref is not None:
                del self._roster.rows[row.ref.row]
        if request.delivered:
            deliveries.append((request, self._finish(request)))
            return deliveries
        if request.head is not None and request.head.ref is not None:
            self._vocoding.note(request.head)
        self._release_more(request)
        return deliveries

    def _finish(self, request: Request) -> RequestEnded:
        self.counters.completed += 1
        self._forget(request)
        reason = EndReason.LENGTH if request.cut else EndReason.COMPLETE
        queue_seconds = (request.first_join or request.arrived) - request.arrived
        return RequestEnded(reason, request.samples, queue_seconds, request.batch_rows)

    # -- admission ----------------------------------------------------------------------------------------------------

    def _admit(self, request: Request, now: float) -> list[Delivery]:
        """Checks the bounds. Who has less than its share comes in, in the stead of the greediest tenant's newest."""
        try:
            delay, victims = self._make_room(request)
            self._admission.check_in_time(request, now, self._wait(request), len(self._roster.running))
        except BatcherError as refusal:
            self.counters.refused[_REFUSALS[type(refusal)]] += 1
            raise
        self.counters.refused["displaced"] += len(victims)
        return [delivery for victim in victims for delivery in self._fail(victim, QueueFullError(delay))]

    def _make_room(self, request: Request) -> tuple[float, list[Request]]:
        """When there would be room for a request, and who must go so that there is now.

        Raises:
            QueueFullError: there is none.
        """
        if len(self._waiting) >= self.policy.max_waiting or self._roster.parked >= self.policy.max_parked:
            raise QueueFullError(max(self.work_seconds / self._speed, self.policy.tick_seconds))
        delay = self._admission.delay(request, self._speed)
        return delay, self._victims(request, delay) if delay else []

    def _victims(self, request: Request, delay: float) -> list[Request]:
        """Who must go to make room for a request.

        Raises:
            QueueFullError: nobody need, and so the request must.
        """
        victims: list[Request] = []
        freed = 0
        greedy = self._admission.greediest(request.tenant)
        for victim in self._waiting.newest_fresh(greedy) if greedy is not None else ():
            victims.append(victim)
            freed += sum(row.work_steps for row in victim.current)
            if not self._admission.delay(request, self._speed, freed):
                return victims
        raise QueueFullError(delay)

    def _wait(self, request: Request) -> float:
        """Seconds until a newcomer's first row joins."""
        if len(self._waiting) < self._room():
            return 0.0
        return self._admission.wait(request, len(self._roster.running), self._speed)

    def _last_chance(self, request: Request) -> float | None:
        """When a request that still waits is given up."""
        chances = []
        if request.deadline is not None:
            chances.append(request.deadline - self._admission.own_seconds(request, len(self._roster.running)))
        if request.stream:
            chances.append(request.arrived + self.policy.first_audio_limit)
        return min(chances, default=None)

    def _hopeless(self, request: Request, now: float) -> BatcherError:
        if request.stream and request.arrived + self.policy.first_audio_limit <= now:
            self.counters.refused["first_audio"] += 1
            return FirstAudioUnreachableError(self._wait(request))
        self._count_expired(request)
        return DeadlineUnreachableError("the deadline can no more be met")

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _make_rows(self, request: Request, segments: Sequence[Segment]) -> list[Row]:
        return [Row(request, segment, self._estimator.predict(segment)) for segment in segments]

    def _release(self, request: Request) -> list[Row]:
        """Lets the rows wait that the request may have in flight now."""
        rows = []
        while request.later and len(request.current) < request.max_rows:
            rows.append(request.later.popleft())
            request.current.append(rows[-1])
        return rows

    def _release_more(self, request: Request) -> None:
        for row in self._release(request):
            self._work.wait(row)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        """Puts a request among those who wait, if it has a row that could join and is not there already."""
        row = request.next_row
        if row is not None and request not in self._waiting:
            self._waiting.add(request, self._due.join(request, row, self._speed))

    def _shrink(self, rows: Sequence[Row], now: float) -> list[Delivery]:
        """Puts rows back that found no memory, and lets no more run than still do. To blame is who was alone."""
        blamed = not self._roster.running and len(rows) == 1
        self._ceiling.lower_rows(len(self._roster.running), now)
        error = EngineFailedError("out of memory")
        return [delivery for row in rows for delivery in self._try_again(row, blamed, error)]

    def _try_again(self, row: Row, blamed: bool, error: EngineFailedError) -> list[Delivery]:
        """Lets a row that the engine has lost begin anew, unless some of it was heard or it was tried too often."""
        request = row.request
        if request.over:
            return []
        row.attempts += blamed
        if row.samples or row.attempts >= self.policy.max_attempts:
            return self._fail(request, error)
        self.counters.put_back += 1
        self._work.drop(row)
        self._vocoding.drop(row)
        row.reset()
        self._work.wait(row)
        self._waiting.discard(request)
        self._queue(request)
        return []

    def _queue_anew(self, request: Request) -> None:
        """Finds a waiting request its place again, since its rows are due at another moment."""
        if request in self._waiting:
            self._waiting.discard(request)
            self._queue(request)

    # -- endings ------------------------------------------------------------------------------------------------------

    def _fail(self, request: Request, error: BatcherError) -> list[Delivery]:
        self.counters.failed += 1
        self._forget(request)
        return [(request, RequestFailed(error))]

    def _forget(self, request: Request) -> None:
        """Takes a request out of everything. What the engine holds of it leaves with the next plan."""
        request.over = True
        self._requests.discard(request)
        self._waiting.discard(request)
        for row in request.current:
            self._work.drop(row)
            self._vocoding.drop(row)
            if row.ref is not None and row.ref.row in self._roster.rows:
                self.counters.dropped_steps += row.steps_done
                self._roster.leave_soon(row)
        request.current.clear()
        request.later.clear()
        self._expiry.is_over()

    # -- counts -------------------------------------------------------------------------------------------------------

    def _count_tick(self, steps: int) -> None:
        self.counters.ticks += 1
        self.counters.steps += steps
        self.counters.row_steps += steps * len(self._roster.running)
        self._rows_ran, self._steps_made = len(self._roster.running), 0
        self.counters.cancel_ticks_max = self._roster.longest_leave

    def _count_dispatch(self, request: Request, row: Row, due: float, now: float) -> None:
        self.counters.joins += 1
        self.counters.prefill_tokens += row.prediction.prompt_tokens
        if request.priority is Priority.BATCH:
            reason = "batch"
        elif request.stream and request.first_join is None:
            reason = "first_audio"
        elif due <= now:
            reason = "underrun" if request.stream else "overdue"
        else:
            reason = "turn"
        self.counters.dispatched[reason] += 1

    def _count_expired(self, request: Request) -> None:
        if request.first_join is None:
            self.counters.expired_waiting += 1
        else:
            self.counters.expired_running += 1


_NOTHING: list[Delivery] = []
"""To deliver, as in most ticks of a row."""

_REFUSALS: Mapping[type[BatcherError], str] = {
    QueueFullError: "full",
    FirstAudioUnreachableError: "first_audio",
    DeadlineUnreachableError: "late",
}
"""What counters call a refusal."""
