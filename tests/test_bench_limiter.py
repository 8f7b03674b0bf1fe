"""The benchmark of limits runs, and its report has all its fields."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.stack import ROOT

FIELDS = {
    "rps_off",
    "rps_exact",
    "rps_leased",
    "echo_rps",
    "limiter_us_cpu",
    "limiter_us_wall",
    "claim_us_wall",
    "redis_hung_added_ms",
    "redis_killed_added_ms",
    "fairness_jain",
}


@pytest.mark.timeout(180)
def test_the_report() -> None:
    command = [sys.executable, "-m", "bench.limiter", "--tiny", "--json"]
    report = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert report.keys() >= FIELDS
    assert report["errors"] == 0
    assert report["rps_leased"] > 0
    assert 0.2 <= report["fairness_jain"] <= 1.0
