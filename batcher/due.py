"""Who comes first: one number orders all who wait, the moment at which a row is due.

    a stream that is heard      `reserve` before its listener would hear a gap; also one that goes on from another
    a new stream                `first_audio_patience` after it came
    anything else               `patience` after it came, or when it must start to meet its deadline
    a request's further rows    later by the audio that comes before them
    batch work                  later by `batch_patience`
    a greedy tenant's           later by the time that its share of the engine needs for what it has too much

So streams about to run dry come first, then new streams, then the nearest deadlines, then fair shares. And nobody
starves: whoever comes after the moment at which a row is due can no more come before it.
"""

from __future__ import annotations

from batcher.engine import Caps
from batcher.policy import Policy
from batcher.request import Priority, Request, Row
from batcher.work import Work


class DueDates:
    """Dates rows. All times are in seconds, on the runner's clock."""

    def __init__(self, caps: Caps, policy: Policy, work: Work) -> None:
        self._caps = caps
        self._policy = policy
        self._work = work

    def join(self, request: Request, row: Row, speed: float) -> float:
        """When a request's next row should join. `speed`: audio seconds a second that a full batch makes."""
        due = self._base(request) + self._audio_before(request)
        if request.deadline is not None:
            due = min(due, request.deadline - self.seconds_alone(row))
        if request.priority is Priority.BATCH:
            due += self._policy.batch_patience
        return due + self.lag(request.tenant, speed)

    def audio(self, request: Request) -> float:
        """When a request's next samples should be made."""
        return self._base(request) + request.samples / self._caps.sample_rate_hertz

    def lag(self, tenant: str, speed: float) -> float:
        """How much later a tenant's work is due for being more than its share; 0 for who has its share or less.

        Of n tenants each has an nth of the engine: at that pace its work would be done so much later than all work is.
        """
        work = self._work
        excess = work.by_tenant.get(tenant, 0) * len(work.by_tenant) - work.steps
        return max(0.0, excess / self._caps.steps_per_second / speed)

    def seconds_alone(self, row: Row) -> float:
        """What a row takes from its join to its last step in a full batch."""
        caps, prediction = self._caps, row.prediction
        steps = caps.step_seconds(caps.max_rows) * prediction.steps_p50
        return caps.prefill_seconds(prediction.prompt_tokens) + steps

    def _base(self, request: Request) -> float:
        policy = self._policy
        if not request.stream:
            return request.arrived + policy.patience
        if request.playback_started is None:
            return request.arrived + policy.first_audio_patience
        return request.playback_started - policy.reserve

    def _audio_before(self, request: Request) -> float:
        """Seconds of audio that come before the request's next row."""
        steps = sum(max(0, row.prediction.steps_p50 - row.vocoded) for row in request.current if row.ref is not None)
        return request.samples / self._caps.sample_rate_hertz + steps / self._caps.steps_per_second
