"""Every metric of every process, and the endpoint that shows them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector
from prometheus_client.utils import floatToGoString

from audio.budget import Budget
from common.errors import StartupError

if TYPE_CHECKING:
    from batcher.runner import Runner  # gateways have no batcher

LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds."""


class Count(Collector):
    """A counter that only the event loop counts: nothing is locked, and no labels are looked up before.

    Each call counts five times, which with the library's own counters took three times as long.
    """

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        """Is shown from now on."""
        self._name, self._text, self._labels = name, text, labels
        self._values: defaultdict[tuple[str, ...], Counted] = defaultdict(Counted)
        if not labels:
            self.inc(by=0.0)
        REGISTRY.register(self)

    def inc(self, *labels: str, by: float = 1.0) -> None:
        """Counts once, or an amount."""
        self._values[labels].value += by

    def of(self, *labels: str) -> Counted:
        """What is counted under labels, for who counts often: `.value` goes up by itself."""
        return self._values[labels]

    def value(self, *labels: str) -> float:
        """What was counted."""
        return self._values[labels].value

    def collect(self) -> Iterator[Metric]:
        """As the library's own."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, counted in list(self._values.items()):
            family.add_metric(labels, counted.value, created=counted.since)
        yield family


class Counted:
    """What was counted, and since when."""

    __slots__ = ("since", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.since = time.time()


class Spread(Collector):
    """A histogram that only the event loop fills, with one label: as `Count` is a counter, and for the same reason."""

    def __init__(self, name: str, text: str, label: str, buckets: Sequence[float]) -> None:
        """Is shown from now on."""
        self._name, self._text, self._label, self._bounds = name, text, label, buckets
        self._spreads: defaultdict[str, _Spread] = defaultdict(lambda: _Spread(len(buckets) + 1))
        REGISTRY.register(self)

    def observe(self, label: str, value: float) -> None:
        """Puts a value into its bucket."""
        spread = self._spreads[label]
        spread.counts[bisect_left(self._bounds, value)] += 1
        spread.sum += value

    def collect(self) -> Iterator[Metric]:
        """As the library's own."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        for label, spread in list(self._spreads.items()):
            family.add_metric([label], list(zip(bounds, accumulate(spread.counts), strict=True)), spread.sum)
            family.add_sample(f"{self._name}_created", {self._label: label}, spread.since)
        yield family


class _Spread:
    """How many values there were of each bucket, and since when."""

    __slots__ = ("counts", "since", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0
        self.since = time.time()


CALLS = Count("chorus_calls_total", "Calls that have ended.", ["method", "code"])
CALL_SECONDS = Spread("chorus_call_seconds", "How long calls took.", "method", LATENCY_BUCKETS)
CALLS_ACTIVE = Gauge("chorus_calls_active", "Calls that run now.")
FIRST_AUDIO_SECONDS = Histogram(
    "chorus_first_audio_seconds", "From a call's arrival until its first audio left.", buckets=LATENCY_BUCKETS
)
AUDIO_SECONDS = Counter("chorus_audio_seconds_total", "Seconds of audio delivered.")
ENGINE_ERRORS = Counter("chorus_engine_errors_total", "Failures of the engine as a whole.")
TICK_SECONDS = Histogram(
    "chorus_batcher_tick_seconds", "How long the engine took for a plan.", buckets=(0.001, *LATENCY_BUCKETS)
)
ROWS_PER_TICK = Histogram(
    "chorus_batcher_rows_per_tick",
    "Rows in the forward passes of a plan.",
    buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256),
)
FIRST_SAMPLES_SECONDS = Histogram(
    "chorus_batcher_first_samples_seconds", "From a stream's admission to its first samples.", buckets=LATENCY_BUCKETS
)
UNDERRUN_SECONDS = Histogram(
    "chorus_batcher_underrun_seconds", "Gaps that listeners of streams heard.", buckets=LATENCY_BUCKETS
)
TASKS = Gauge("chorus_tasks", "Tasks of the event loop.")
BACKENDS_READY = Gauge("chorus_gateway_backend_ready", "1 while a backend is ready to speak.")
STORE_SECONDS = Histogram(
    "chorus_store_seconds",
    "Round trips to a store.",
    ["store"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
)
STORE_FAILURES = Counter(
    "chorus_store_failures_total", "Round trips and commands without an answer.", ["store", "kind"]
)
STORE_AVAILABLE = Gauge("chorus_store_available", "1 while a store answers.", ["store"])
LIMITER_DECISIONS = Count("chorus_limiter_decisions_total", "What limits have decided.", ["limit", "outcome", "tenant"])
LIMITER_DEGRADED = Counter(
    "chorus_limiter_degraded_total", "Decisions within local limits, since the ledger did not answer."
)
CLAIMS = Counter("chorus_claims_total", "What became of calls with idempotency keys.", ["outcome"])
FLIGHTS_OPEN = Gauge("chorus_flights_open", "Speeches that can be joined.")
FLIGHT_BYTES = Gauge("chorus_flights_bytes", "Audio held for those who join.")
FLIGHT_FOLLOWERS = Histogram(
    "chorus_flight_followers", "Callers of a speech at once.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500)
)
SEGMENTS = Counter(
    "chorus_segments_total", "Segments of dialogues that share them, by origin: made, joined, kept.", ["origin"]
)
SEGMENTS_OPEN = Gauge("chorus_segments_open", "Segments of dialogues that are being made and can be joined.")
SEGMENT_BYTES = Gauge("chorus_segments_bytes", "Audio of segments of dialogues that are being made.")
SEGMENT_KEPT_BYTES = Gauge("chorus_segments_kept_bytes", "Segments of dialogues that are kept.")
COALESCED = Counter("chorus_coalesced_total", "Calls that joined a speech which was being made.")
CACHE_LOOKUPS = Count("chorus_cache_lookups_total", "Where speeches were found: memory, store, miss.", ["found"])
CACHE_BYTES = Gauge("chorus_cache_memory_bytes", "Speeches in memory.")
CACHE_EVICTED = Gauge("chorus_cache_evicted", "Speeches that have left memory for want of room.")
CACHE_DAMAGED = Counter("chorus_cache_damaged_total", "Values in the store that were not what they should be.")
CACHE_PUTS_DROPPED = Counter("chorus_cache_puts_dropped_total", "Speeches of which the store was not told.")
CACHE_STATUS = Count("chorus_cache_status_total", "Calls for whole texts, by where their audio came from.", ["status"])
AUDIO_SECONDS_SAVED = Count(
    "chorus_audio_seconds_saved_total", "Seconds of audio that were delivered and did not have to be made."
)
HOLDS = Gauge("chorus_limiter_holds", "Estimates of audio that are charged and not settled.")
MAX_TENANTS = 50
"""Tenants with metrics of their own; all others are one."""
_tenants: set[str] = set()


def tenant_label(tenant: str) -> str:
    """A tenant as metrics call it: there are never too many."""
    if tenant not in _tenants:
        if len(_tenants) >= MAX_TENANTS:
            return "others"
        _tenants.add(tenant)
    return tenant


@lru_cache
def segment_counter(origin: str) -> Counter:
    """`SEGMENTS` of an origin."""
    return SEGMENTS.labels(origin)


@lru_cache
def store_seconds(store: str) -> Histogram:
    """`STORE_SECONDS` of a store."""
    return STORE_SECONDS.labels(store)


class BatcherObserver:
    """Puts what a batcher tells into histograms."""

    def tick(self, seconds: float, rows: int) -> None:
        """Into both histograms of ticks."""
        TICK_SECONDS.observe(seconds)
        ROWS_PER_TICK.observe(rows)

    def first_audio(self, seconds: float) -> None:
        """Into its histogram."""
        FIRST_SAMPLES_SECONDS.observe(seconds)

    def underrun(self, seconds: float) -> None:
        """Into its histogram."""
        UNDERRUN_SECONDS.observe(seconds)


class BatcherCollector(Collector):
    """Shows a runner's state at the moment of a scrape."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def collect(self) -> Iterator[Metric]:
        """The batcher's gauges and counters."""
        stats = self._runner.stats()
        for name, text, value in (
            ("requests", "Requests admitted and not yet over.", stats.requests),
            ("waiting", "Requests that wait for a slot.", stats.waiting),
            ("rows", "Rows that hold a slot.", stats.rows),
            ("max_rows", "Rows that a forward pass may have now.", stats.max_rows),
            ("parked", "Rows that have ended and of which samples are yet to be made.", stats.parked),
            ("slots_free", "Slots that a row could join.", stats.slots_free),
            ("work_audio_seconds", "Predicted seconds of audio before the engine.", stats.work_seconds),
            ("cancel_ticks_max", "Most ticks from a cancel to its free slot.", stats.counters.cancel_ticks_max),
        ):
            yield GaugeMetricFamily(f"chorus_batcher_{name}", text, value)
        for field in fields(stats.counters):
            value = getattr(stats.counters, field.name)
            if isinstance(value, int) and field.name != "cancel_ticks_max":
                yield CounterMetricFamily(f"chorus_batcher_{field.name}", f"Batcher: {field.name}.", value)
        for name, text, counts in (
            ("refused", "Requests refused.", stats.counters.refused),
            ("dispatched", "Rows that joined, by why they came next.", stats.counters.dispatched),
        ):
            family = CounterMetricFamily(f"chorus_batcher_{name}", text, labels=["reason"])
            for reason, count in counts.items():
                family.add_metric([reason], count)
            yield family


def watch_batcher(runner: Runner) -> None:
    """Shows a runner's state from now on."""
    REGISTRY.register(BatcherCollector(runner))


class EncoderCollector(Collector):
    """Shows the state of a process's encoders at the moment of a scrape."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def collect(self) -> Iterator[Metric]:
        """The encoders' gauges and counters."""
        budget = self._budget
        yield GaugeMetricFamily("chorus_encoders_open", "Encoders that are open and cost anything.", budget.open)
        yield GaugeMetricFamily("chorus_encoders_load", "Cores they need at the pace of real time.", budget.load)
        yield GaugeMetricFamily("chorus_encoders_load_max", "Cores they may need.", budget.max_load)
        yield CounterMetricFamily("chorus_encoders_refused", "Speeches without room to encode them.", budget.refused)
        for name, text, values in (
            ("chorus_encoders_cpu_seconds", "CPU that encoding has used.", budget.cpu_seconds),
            ("chorus_encoders_audio_seconds", "Audio that was encoded.", budget.audio_seconds),
        ):
            counter = CounterMetricFamily(name, text, labels=["codec"])
            for codec, seconds in values.items():
                counter.add_metric([codec.value.lower()], seconds)
            yield counter


def watch_encoders(budget: Budget) -> None:
    """Shows the state of a process's encoders from now on."""
    REGISTRY.register(EncoderCollector(budget))


def serve_metrics(address: str) -> None:
    """Serves `/metrics` over HTTP on a thread of its own.

    Raises:
        StartupError: the address is taken.
    """
    host, _, port = address.rpartition(":")
    try:
        prometheus_client.start_http_server(int(port), host.strip("[]"))
    except OSError as error:
        raise StartupError(f"cannot serve metrics on {address}: {error.strerror}") from None
