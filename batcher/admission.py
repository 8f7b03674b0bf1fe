"""Who may come in: the work before the engine is bounded in seconds of its time, and what can't be in time is refused.

With S the audio seconds a second that a full batch makes (foretold by the time of its steps, corrected by what ticks
have taken in fact), and W the audio seconds that lie before the engine (those
predicted for rows that wait, and the rest of those that run):

- full: W + estimate > S · `max_delay`, refused with the delay (W + estimate - S · `max_delay`) / S;
- late: now + what must be done before + the request's own time > deadline.
"""

from __future__ import annotations

import math

from batcher.engine import Caps
from batcher.errors import DeadlineUnreachableError, FirstAudioUnreachableError
from batcher.pace import Pace
from batcher.policy import Policy
from batcher.request import Request
from batcher.work import Work, rank


class Admission:
    """Checks requests against the work that lies before the engine."""

    def __init__(self, caps: Caps, policy: Policy, work: Work, pace: Pace) -> None:
        self._caps = caps
        self._policy = policy
        self._work = work
        self._pace = pace

    def speed(self, rows: int) -> float:
        """Seconds of audio a second that so many rows make, at the pace that ticks have shown."""
        step = self._caps.step_seconds(rows) * self._pace.factor
        return rows / (step * self._caps.steps_per_second) if step > 0 else math.inf

    def delay(self, request: Request, speed: float, freed_steps: int = 0) -> float:
        """How long until there is room for a request, in seconds; 0 if there is now.

        An idle engine takes anything, or a request larger than the room would never be served. `freed_steps`: of the
        work there is, those that would be gone.
        """
        steps = self._work.steps - freed_steps + sum(row.prediction.steps_p90 for row in request.current)
        excess = steps / self._caps.steps_per_second - speed * self._policy.max_delay
        if not self._work.steps or excess <= 0 or not math.isfinite(speed):
            return 0.0
        return max(excess / speed, self._policy.tick_seconds)

    def check_in_time(self, request: Request, now: float, wait: float, running: int) -> None:
        """Checks that a request can be done before its deadline. `wait`: seconds until its first row can join.

        Raises:
            DeadlineUnreachableError: it cannot.
            FirstAudioUnreachableError: its first audio would come too late.
        """
        if request.stream and wait > self._policy.first_audio_limit:
            raise FirstAudioUnreachableError(wait - self._policy.first_audio_limit)
        if request.deadline is not None and now + wait + self.own_seconds(request, running) > request.deadline:
            raise DeadlineUnreachableError("the deadline cannot be met")

    def own_seconds(self, request: Request, running: int) -> float:
        """What a request takes from its first join to its last step, beside so many running rows."""
        steps = [row.prediction.steps_p50 for row in (*request.current, *request.later)]
        longest = max(max(steps), max(sum(steps), request.expected_steps) / request.max_rows)
        tokens = max(row.prediction.prompt_tokens for row in request.current)
        rows = min(running + len(request.current), self._caps.max_rows)
        return self._caps.prefill_seconds(tokens) + longest * self._caps.step_seconds(rows) * self._pace.factor

    def wait(self, request: Request, running: int, speed: float) -> float:
        """Seconds until a newcomer's first row joins when all slots are taken by so many rows.

        The waiting rows of its rank or a higher one come first. A slot is free when the first of the running rows ends:
        of n with an even spread of what they have left, after 2 / (n + 1) of the mean.
        """
        waiting = sum(self._work.waiting[: rank(request) + 1])
        steps = waiting + self._work.running * 2 / (running + 1)
        return steps / self._caps.steps_per_second / speed

    def greediest(self, than: str) -> str | None:
        """The tenant with the most work, if that is more than its share, one that may come to the others included."""
        work = self._work.by_tenant
        tenants = len(work.keys() | {than})
        tenant = max(work, key=lambda name: work[name], default=than)
        return tenant if tenant != than and work[tenant] * tenants > self._work.steps else None
