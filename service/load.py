"""Tells balancers how loaded a service is: an ORCA report in the trailer of each call."""

from __future__ import annotations

import struct
import time
from collections import deque

from batcher.runner import Runner

WINDOW_SECONDS = 5.0
FRESH_SECONDS = 0.05
"""A report is used so long; balancers look at it once a second."""
LEAST_UTILIZATION = 0.01
"""A report of 0 would be no report, and the balancer would use this backend's average weight instead."""


class LoadReporter:
    """Counts calls, and reports their rate beside the batcher's load."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._calls: deque[float] = deque(maxlen=10_000)
        self._report = b""
        self._fresh_until = 0.0

    def count_call(self) -> None:
        """A call has arrived."""
        self._calls.append(time.monotonic())

    def report(self) -> bytes:
        """The load now, as a serialized xds.data.orca.v3.OrcaLoadReport."""
        now = time.monotonic()
        if now < self._fresh_until:
            return self._report
        self._fresh_until = now + FRESH_SECONDS
        while self._calls and self._calls[0] < now - WINDOW_SECONDS:
            self._calls.popleft()
        stats = self._runner.stats()
        used = stats.rows / (stats.rows + stats.slots_free)
        utilization = max(used, stats.utilization, LEAST_UTILIZATION)
        self._report = orca_report(len(self._calls) / WINDOW_SECONDS, utilization)
        return self._report


def orca_report(calls_per_second: float, utilization: float) -> bytes:
    """The two fields that weighted_round_robin reads: `rps_fractional` (6) and `application_utilization` (9), doubles.

    Written by hand, because the package that has the schema brings two thousand modules, some of which overwrite files
    of other packages. Source: cncf/xds, xds/data/orca/v3/orca_load_report.proto.
    """
    fixed64 = 1
    return struct.pack("<BdBd", 6 << 3 | fixed64, calls_per_second, 9 << 3 | fixed64, utilization)
