"""The thread that owns the engine: plan, run, deliver.

All state is the scheduler's, behind one lock that is held while it thinks and never while the engine works. Events
cross to the event loop once a tick. Deadlines are kept by the event loop, so that none waits for the engine.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

from batcher.counters import Counters, Deaf, Observer
from batcher.engine import Engine, EngineLostError, EngineOutOfMemoryError, Plan, Segment
from batcher.errors import StoppedError
from batcher.outbox import Outbox
from batcher.policy import Policy
from batcher.request import Event, Priority, Request, RequestFailed, SegmentEnded
from batcher.scheduler import Delivery, Scheduler

STOP_SECONDS = 10.0
"""Until an engine that is in the middle of a plan is closed all the same."""

Clock = Callable[[], float]
"""Seconds, never falling."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What the batcher is doing now."""

    requests: int
    waiting: int
    rows: int
    max_rows: int
    """Rows that a forward pass may have now."""
    parked: int
    """Rows that have ended and of which samples are yet to be made."""
    slots_free: int
    work_seconds: float
    speed: float
    """Seconds of audio a second that a full batch makes."""
    counters: Counters

    @property
    def utilization(self) -> float:
        """Work that lies before the engine, in seconds of its time; above 1 callers wait noticeably."""
        return self.work_seconds / self.speed


class Speaking:
    """A request that is being spoken, for the event loop that reads it and may still add to it."""

    def __init__(self, runner: Runner, request: Request, outbox: Outbox) -> None:
        self._runner = runner
        self._request = request
        self._outbox = outbox
        self._room = asyncio.Event()
        self._added = len(request.segments)
        self._ended = 0

    async def get(self) -> Event:
        """Takes the next event, waiting for it. One reader only."""
        event = await self._outbox.get()
        if isinstance(event, SegmentEnded):
            self._ended += 1
            self._room.set()
        return event

    def extend(self, segments: Sequence[Segment]) -> None:
        """Adds segments."""
        self._added += len(segments)
        self._runner.extend(self._request, segments)

    def close(self) -> None:
        """Says that no segments will be added."""
        self._runner.close(self._request)

    def release(self) -> None:
        """What goes on from other audio comes next: from now on its samples are made."""
        self._outbox.release()

    def need(self, heard_from: float) -> None:
        """Somebody needs what goes on from other audio, perhaps sooner than was said when it began."""
        self._runner.need(self._request, heard_from)

    def allow(self, deadline: float) -> None:
        """Gives it more time. It may have been refused more of it by the time that the batcher had to begin."""
        self._runner.allow(self._request, deadline)

    def fail(self, error: Exception) -> None:
        """Ends the events with RequestFailed, at once, on behalf of the one who adds segments."""
        self._outbox.fail(RequestFailed(error))

    async def room(self, segments: int) -> None:
        """Waits until fewer segments than that are yet to be heard."""
        while self._added - self._ended >= segments:
            self._room.clear()
            await self._room.wait()


class Runner:
    """Runs an engine for the requests of one event loop."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        *,
        outbox_seconds: float = 4.0,
        clock: Clock = time.monotonic,
        observer: Observer | None = None,
        on_error: Callable[[BaseException], None] = lambda error: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes the engine over.

        `on_error` hears of engine failures, on the thread that notices. `on_death` is called on the event loop if the
        thread itself fails or the engine is gone: nothing will be spoken any more.
        """
        self.engine = engine
        self._observer = observer or Deaf()
        self.scheduler = Scheduler(engine.caps, policy, self._observer)
        # A block that does not fit would never be made.
        block = policy.block_steps * engine.caps.samples_per_step
        self._window = max(int(outbox_seconds * engine.caps.sample_rate_hertz), block)
        self._clock = clock
        self._on_error = on_error
        self._on_death = on_death
        self._changed = threading.Condition(threading.Lock())
        self._woken = False
        self._stopping = False
        self._dead = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._expires_at = math.inf
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- the event loop's side ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread. Called on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends every request with StoppedError, then the thread, then the engine. A thread that hangs in it is left."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        if self._expiry is not None:
            self._expiry.cancel()
        await asyncio.to_thread(self.engine.close)

    @asynccontextmanager
    async def speak(
        self,
        segments: Sequence[Segment],
        *,
        max_rows: int,
        deadline: float | None = None,
        tenant: str = "",
        priority: Priority = Priority.INTERACTIVE,
        stream: bool = False,
        closed: bool = True,
        expected_steps: int = 0,
        heard_from: float | None = None,
    ) -> AsyncIterator[Speaking]:
        """Speaks segments. Read its events until RequestEnded or RequestFailed; leaving earlier cancels.

        `deadline`: on the runner's clock, in seconds. `stream`: it is listened to while it is spoken. `closed`: these
        are all; otherwise more can be added, until it is closed. `expected_steps`: of all its segments, also those
        still to come, as far as that is known. `heard_from`: it goes on from audio that lasts until then, on the same
        clock. So it is always let in, and no samples of it are made before it is released.

        Raises:
            QueueFullError: too much work lies before the engine.
            DeadlineUnreachableError: the work would be done too late.
            StoppedError: the batcher has stopped.
        """
        outbox = Outbox(self._window, self._wake, held=heard_from is not None)
        request = Request(
            segments, outbox, max_rows, deadline, tenant, priority, stream, closed, expected_steps, heard_from
        )
        with self._changed:
            if self._stopping:
                raise StoppedError("stopping")
            displaced = self.scheduler.submit(request, self._clock())
        _put(displaced)
        self._set_expiry()
        self._wake()
        try:
            yield Speaking(self, request, outbox)
        finally:
            outbox.close()
            if not request.over:
                with self._changed:
                    self.scheduler.cancel(request)
                self._wake()

    def extend(self, request: Request, segments: Sequence[Segment]) -> None:
        """Adds segments to an open request."""
        with self._changed:
            self.scheduler.extend(request, segments)
        self._wake()

    def has_room(self, segments: Sequence[Segment], tenant: str, priority: Priority) -> bool:
        """Whether a stream would find room now."""
        outbox = Outbox(self._window, self._wake)
        request = Request(segments, outbox, len(segments), tenant=tenant, priority=priority, stream=True)
        with self._changed:
            return self.scheduler.has_room(request)

    def need(self, request: Request, heard_from: float) -> None:
        """Makes what goes on from other audio more urgent, if it is needed sooner."""
        with self._changed:
            self.scheduler.need(request, heard_from)

    def predict(self, segment: Segment) -> float:
        """The audio that a segment will come to, in seconds."""
        with self._changed:
            return self.scheduler.predict(segment)

    def now(self) -> float:
        """On the runner's clock, in seconds."""
        return self._clock()

    def close(self, request: Request) -> None:
        """Says that an open request is complete. Its end comes from the engine's thread, behind all else that does."""
        with self._changed:
            self.scheduler.close(request)
        self._wake()

    def allow(self, request: Request, deadline: float) -> None:
        """Moves a request's deadline, later only."""
        with self._changed:
            if request.deadline is not None:
                request.deadline = max(request.deadline, deadline)

    @property
    def dead(self) -> bool:
        """The thread has failed, or the engine is gone: nothing will be spoken any more."""
        return self._dead

    def lose(self, error: Exception) -> None:
        """The engine is gone: all requests fail. May be called on any thread, once the runner was started."""
        self._die(error)

    def stats(self) -> Stats:
        """What the batcher is doing now."""
        with self._changed:
            s = self.scheduler
            return Stats(
                s.requests,
                s.waiting,
                s.rows,
                s.max_rows,
                s.parked,
                s.slots_free,
                s.work_seconds,
                s.speed,
                deepcopy(s.counters),
            )

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def _set_expiry(self) -> None:
        """Sees to it that deadlines are looked at when the next one is due, whatever the engine is doing."""
        with self._changed:
            expires_at = self.scheduler.next_expiry
        if expires_at is None or expires_at >= self._expires_at:
            return
        if self._expiry is not None:
            self._expiry.cancel()
        assert self._loop is not None
        self._expires_at = expires_at
        self._expiry = self._loop.call_later(max(0.0, expires_at - self._clock()), self._expire)

    def _expire(self) -> None:
        self._expires_at = math.inf
        try:
            with self._changed:
                expired = self.scheduler.expire(self._clock())
        except Exception as error:
            self._die(error)
            return
        _put(expired)
        if expired:
            self._wake()
        self._set_expiry()

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._step()
        except BaseException as error:
            self._die(error)
        finally:
            with self._changed:
                self._stopping = True
                deliveries = self.scheduler.fail_all(StoppedError("stopping"))
            self._deliver(deliveries)

    def _step(self) -> None:
        """One tick: plan, run, deliver. With nothing to do, a rest."""
        with self._changed:
            self._woken = False
            ends = self.scheduler.complete()
            plan = self.scheduler.plan(self._clock())
            idle = plan.empty and not self.scheduler.waits_for_report
        if idle:
            self._deliver(ends)
            self._rest()
            return
        deliveries = ends
        try:
            outcome = self._run_engine(plan)
            with self._changed:
                deliveries = ends + outcome(self._clock())
        finally:  # who has ended is told so, also by a thread that dies
            self._deliver(deliveries)

    def _run_engine(self, plan: Plan) -> Callable[[float], list[Delivery]]:
        """Lets the engine do the plan, and answers how the scheduler is to take what came of it, at what time."""
        began = self._clock()
        try:
            report = self.engine.run(plan)
        except EngineOutOfMemoryError as error:
            self._on_error(error)
            return partial(self.scheduler.out_of_memory, plan)
        except EngineLostError:
            raise
        except Exception as error:
            self._on_error(error)
            return lambda now: self.scheduler.engine_failed(plan)
        self._observer.tick(self._clock() - began, self.scheduler.rows)
        return partial(self.scheduler.apply, report)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """Hands a tick's events to the event loop, all at once."""
        if deliveries:
            self._call_loop(partial(_put, deliveries))

    def _rest(self) -> None:
        """Waits until something changes, or a plan is due all the same."""
        with self._changed:
            wakes_at = self.scheduler.wakes_at
            timeout = None if wakes_at is None else max(0.0, wakes_at - self._clock())
            self._changed.wait_for(lambda: self._woken or self._stopping, timeout)

    def _die(self, error: BaseException) -> None:
        """Something of ours has failed, or the engine is gone: nothing will be spoken any more."""
        with self._changed:
            dead, self._dead, self._stopping = self._dead, True, True
            self._changed.notify()
        if not dead:
            self._on_error(error)
            self._call_loop(self._on_death)

    def _call_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)


def _put(deliveries: list[Delivery]) -> None:
    for request, event in deliveries:
        request.reader.put(event)
