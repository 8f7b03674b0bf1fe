"""The scheduler under a virtual clock: a card that only counts its time, callers that only listen, and their replay.

The scheduler is the product's own, unchanged; nothing sleeps, and a second of traffic takes what its decisions take.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, Protocol, Self, TypeVar

from batcher.engine import Caps, EndReason, Join, Pcm, Plan, Prediction, Report, RowRef, RowReport, Segment, Vocode
from batcher.errors import BatcherError
from batcher.policy import Policy
from batcher.request import Audio, Event, Priority, Request, RequestEnded
from batcher.scheduler import Delivery, Scheduler
from common.settings import ToneSettings
from service.engines.tone import SAMPLE_RATE_HERTZ
from service.engines.tone_code import SAMPLES_PER_STEP
from service.engines.tone_cost import PROMPT_TOKENS, CostModel

STEPS_PER_SECOND = SAMPLE_RATE_HERTZ / SAMPLES_PER_STEP
CHARACTERS_PER_SECOND = 4.5
"""Of Chinese, as it is spoken."""
SIGMA = 0.4
"""Of the logarithm of lengths."""
SCATTER = 0.174
"""The part of it that no text tells: with it the likely length is at most 1.25 times too short in 90 % of the cases."""
P90 = 1.25


@dataclass(frozen=True, slots=True)
class Speech:
    """A request of a trace."""

    at: float
    """Seconds after the start."""
    steps: int
    """What it will take."""
    likely_steps: int
    """What its text lets expect."""
    tenant: str = ""
    stream: bool = False
    priority: Priority = Priority.INTERACTIVE
    deadline: float | None = None
    """Seconds it may take."""

    @property
    def audio_seconds(self) -> float:
        """How long it is."""
        return self.steps / STEPS_PER_SECOND


@dataclass(eq=False, slots=True)
class Caller:
    """Whoever asked for a speech, and what became of it. Moments are in seconds."""

    speech: Speech
    ended: float | None = None
    first_audio: float | None = None
    worst_gap: float = 0.0
    error: Exception | None = None
    starved: bool = False
    samples: int = 1 << 60
    heard: float = 0.0
    """Seconds of audio."""

    def put(self, event: Event) -> None:
        """Not used: moments matter, so `take` is called instead."""

    def take(self, event: Event, now: float) -> None:
        """The next event, at a moment."""
        match event:
            case Audio():
                self._listen(len(event.data) / 2 / SAMPLE_RATE_HERTZ, now)
            case RequestEnded():
                self.ended = now
            case _:
                self.error = getattr(event, "error", None)

    @property
    def latency(self) -> float:
        """Seconds from its arrival to its last byte; infinite if that never came."""
        return math.inf if self.ended is None else self.ended - self.speech.at

    @property
    def in_time(self) -> bool:
        """Its last byte came before its deadline."""
        return self.latency <= (math.inf if self.speech.deadline is None else self.speech.deadline)

    def _listen(self, seconds: float, now: float) -> None:
        if self.first_audio is None:
            self.first_audio = now
        self.worst_gap = max(self.worst_gap, now - self.first_audio - self.heard - self.worst_gap)
        self.heard += seconds


@dataclass(slots=True)
class _Row:
    steps: int
    prompt_tokens: int
    ref: RowRef
    done: int = 0
    vocoded: int = 0


@dataclass(eq=False)
class ModelledCard:
    """An `Engine` whose ticks cost what the model says, on a clock that only it and the replay move."""

    settings: ToneSettings
    speeches: Sequence[Speech]
    """A segment's seed is its speech's place here."""
    now: float = 0.0
    busy: float = 0.0
    """Seconds that it computed."""
    caps: Caps = field(init=False)

    def __post_init__(self) -> None:
        self._costs = CostModel(self.settings)
        self._rows: dict[int, _Row] = {}
        self._running: dict[int, _Row] = {}
        slots, kv = self.settings.slots, self.settings.typical_kv
        self.caps = Caps(
            sample_rate_hertz=SAMPLE_RATE_HERTZ,
            samples_per_step=SAMPLES_PER_STEP,
            slots=slots,
            max_rows=slots,
            max_vocode=slots,
            max_steps=self.settings.max_steps,
            lookahead_steps=self.settings.lookahead_steps,
            predict=self._predict,
            step_seconds=lambda rows: self._costs.step_ms(rows, rows * kv) / 1000,
            prefill_seconds=lambda tokens: self._costs.prefill_ms(1, tokens) / 1000,
        )

    def run(self, plan: Plan) -> Report:
        """Does the plan, in no time but the clock's."""
        for ref in plan.leaves:
            self._rows.pop(ref.row, None)
            self._running.pop(ref.row, None)
        ms = sum(self._join(group) for group in plan.joins) + self._step(plan.steps)
        reports = self._settle()
        pcm = {wish.ref.row: self._vocode(wish) for wish in plan.vocode if wish.ref.row in self._rows}
        ms += self._costs.vocode_ms(sum(len(each.data) // 2 // SAMPLES_PER_STEP for each in pcm.values()))
        self.now += ms / 1000
        self.busy += ms / 1000
        vocoded = [RowReport(self._rows[number].ref, self._rows[number].done, pcm=each) for number, each in pcm.items()]
        self._forget()
        return Report((*reports, *vocoded))

    def close(self) -> None:
        """Nothing is held."""

    def _predict(self, segment: Segment) -> Prediction:
        likely = min(self.speeches[segment.seed].likely_steps, self.settings.max_steps)
        return Prediction(self._tokens(segment), likely, min(math.ceil(P90 * likely), self.settings.max_steps))

    def _tokens(self, segment: Segment) -> int:
        seconds = self.speeches[segment.seed].likely_steps / STEPS_PER_SECOND
        return PROMPT_TOKENS + round(seconds * CHARACTERS_PER_SECOND)

    def _join(self, group: Sequence[Join]) -> float:
        for join in group:
            row = _Row(self.speeches[join.segment.seed].steps, self._tokens(join.segment), join.ref)
            self._rows[join.ref.row] = self._running[join.ref.row] = row
        return self._costs.prefill_ms(len(group), max(self._tokens(join.segment) for join in group))

    def _step(self, steps: int) -> float:
        kv = most = passes = 0
        for row in self._running.values() if steps else ():
            taken = min(steps, row.steps - row.done)
            kv += taken * (row.prompt_tokens + row.done) + taken * (taken - 1) // 2
            row.done += taken
            passes += taken
            most = max(most, taken)
        costs = self.settings
        return costs.step_base_ms * most + costs.step_row_ms * passes + self._costs.kv_ms(kv)

    def _settle(self) -> list[RowReport]:
        ended = [number for number, row in self._running.items() if row.done == row.steps]
        reports = [
            RowReport(row.ref, row.done, EndReason.COMPLETE if row.done == row.steps else None)
            for row in self._running.values()
        ]
        for number in ended:
            del self._running[number]
        return reports

    def _vocode(self, wish: Vocode) -> Pcm:
        row = self._rows[wish.ref.row]
        start, row.vocoded = row.vocoded, min(wish.to_step, row.done)
        return Pcm(_silence(row.vocoded - start), start * SAMPLES_PER_STEP, row.vocoded)

    def _forget(self) -> None:
        for number in [number for number, row in self._rows.items() if row.vocoded == row.steps]:
            del self._rows[number]


class Card(Protocol):
    """An engine and its clock."""

    speeches: Sequence[Speech]
    """A segment's seed is its speech's place here."""
    caps: Caps
    now: float
    """To set it is to wait until then."""

    def run(self, plan: Plan) -> Report:
        """Does the plan."""
        ...


CardT = TypeVar("CardT", bound=Card)


@dataclass(eq=False)
class Replay(Generic[CardT]):
    """Callers in the order of a trace before a scheduler and its card."""

    card: CardT
    policy: Policy
    callers: list[Caller] = field(default_factory=list)
    slots: list[tuple[float, int]] = field(default_factory=list)
    """Moments, and the rows that held a slot."""

    def run(self) -> Self:
        """Until nobody is left."""
        self.scheduler = Scheduler(self.card.caps, self.policy)
        self._next = 0
        while True:
            self._admit()
            self._deliver(self.scheduler.complete() + self.scheduler.expire(self.card.now))
            plan = self.scheduler.plan(self.card.now)
            if not plan.empty or self.scheduler.waits_for_report:
                report = self.card.run(plan)
                self._deliver(self.scheduler.apply(report, self.card.now))
                self.slots.append((self.card.now, self.scheduler.rows))
            elif (moment := self._next_moment()) is not None:
                self.card.now = moment
            else:
                return self

    def _admit(self) -> None:
        """All who have come meanwhile, each at its own moment."""
        speeches = self.card.speeches
        while self._next < len(speeches) and speeches[self._next].at <= self.card.now:
            speech = speeches[self._next]
            caller = Caller(speech)
            self.callers.append(caller)
            deadline = None if speech.deadline is None else speech.at + speech.deadline
            request = Request(
                [Segment("", "", "", seed=self._next)],
                caller,
                max_rows=1,
                deadline=deadline,
                tenant=speech.tenant,
                priority=speech.priority,
                stream=speech.stream,
            )
            self._next += 1
            try:
                self._deliver(self.scheduler.submit(request, speech.at))
            except BatcherError as error:
                caller.error = error

    def _next_moment(self) -> float | None:
        arrivals = [self.card.speeches[self._next].at] if self._next < len(self.card.speeches) else []
        moments = [*arrivals, self.scheduler.next_expiry, self.scheduler.wakes_at]
        return min((moment for moment in moments if moment is not None), default=None)

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        for request, event in deliveries:
            assert isinstance(request.reader, Caller)
            request.reader.take(event, self.card.now)


def lengths(chance: random.Random, mean_seconds: float, longest_seconds: float) -> tuple[int, int]:
    """A log-normal length and what its text lets expect, both in steps."""
    mu = math.log(mean_seconds) - SIGMA**2 / 2
    likely = chance.lognormvariate(mu, math.sqrt(SIGMA**2 - SCATTER**2))
    actual = likely * chance.lognormvariate(0, SCATTER)
    return _steps(actual, longest_seconds), _steps(likely, longest_seconds)


def _steps(seconds: float, longest: float) -> int:
    return max(1, round(min(seconds, longest) * STEPS_PER_SECOND))


@lru_cache
def _silence(steps: int) -> bytes:
    return bytes(steps * SAMPLES_PER_STEP * 2)
