"""The benchmark of the engine runs, and tells all that it promises."""

from __future__ import annotations

import json
import subprocess
import sys

from bench.processes import ROOT

BY_ROWS = ("upstream_ms_per_step", "fp32_ms_per_step", "bf16_ms_per_step", "ratio_fp32", "ratio_best")


def test_it_compares_with_upstream() -> None:
    command = [sys.executable, "-m", "bench.engine", "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= {"commit", "date", "python", "torch", "cores", "threads", "weights", "rounds"}
    for field in BY_ROWS:
        assert report[field].keys() == {"1", "8", "32"}
        assert all(value > 0 for value in report[field].values())
    assert report["tie_rate"] <= 0.1
    assert all(0 < rate <= 1 for rate in report["match_rate_fast_mode"].values())
    assert report["rpc_load_slowdown"] > 0
    assert report["peak_rss_mb"] > 0
    assert report["not_measured"]
