"""The benchmark of the cache runs, its report has all its fields, and many callers make one speech."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.stack import ROOT

FIELDS = {
    *(
        f"{name}.{size}"
        for name in ("l1_hit_rps", "l1_hit_rps_2_gateways", "redis_hit_rps", "echo_rps", "hit_p99_ms")
        for size in ("30KB", "300KB")
    ),
    *("miss_overhead_us", "coalesce.engine_runs", "coalesce.first_audio_spread_ms", "late_join_first_audio_ms"),
    *("segments.made_first_audio_ms", "segments.memory_first_audio_ms", "segments.store_first_audio_ms"),
    *("segments.engine_runs_elsewhere", "zipf.hit_rate", "zipf.gpu_seconds_saved", "zipf.reachable"),
}


@pytest.mark.timeout(180)
def test_the_report() -> None:
    command = [sys.executable, "-m", "bench.cache", "--tiny", "--json"]
    report = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert report.keys() >= FIELDS
    assert report["errors"] == report["zipf.errors"] == 0
    assert report["coalesce.engine_runs"] == 1
    assert report["zipf.gpu_seconds_saved"] <= report["zipf.reachable"] + 0.001
