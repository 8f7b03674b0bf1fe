"""The benchmark of the engine runs, and tells all that it promises."""

from __future__ import annotations

import json
import subprocess
import sys

from bench.processes import ROOT
from service.engines.chattts.linear import has_bf16

BY_ROWS = (
    *(f"{name}_ms_per_step" for name in ("upstream", "fp32", "int8")),
    "step_ratio_fp32",
    "step_ratio_best",
)


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
    for field in ("ratio_best", "ratio_fp32", "scheduling_factor"):
        assert report[field] > 0
    dtypes = {"fp32", "int8"} | ({"bf16"} if has_bf16() else set())
    assert report["best_dtype"] in dtypes
    for field in ("rpc_load_slowdown", "rtf_single_wall", "chorus_audio_s_per_s"):
        assert report[field].keys() == dtypes
    for field in ("first_audio_ms_p50", "first_audio_ms_p95"):
        assert report[field].keys() == {*dtypes, "upstream"}
    assert report["int8_logit_error"] < 0.1
    assert report["peak_rss_mb"] > 0
    assert bool(report["not_measured"]) is not has_bf16()
