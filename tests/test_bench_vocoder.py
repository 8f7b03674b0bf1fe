"""The benchmark of the vocoder runs, and tells all that it promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.processes import ROOT

WAYS = ("stream", "upstream_windows", "upstream_full", "whole", "short", "limit")
PROMISED = {f"{way}_cpu_ms_per_audio_s" for way in WAYS} | {"ratio_to_windows", "ratio_to_full"}


@pytest.mark.timeout(300)  # importing upstream alone takes a while on a busy machine
def test_it_measures_one_row_and_eight() -> None:
    command = [sys.executable, "-m", "bench.vocoder", "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= {"commit", "date", "python", "torch", "cores", "threads", "weights", "rounds"}
    assert report["stream_error_db"] < -100
    assert report["batches"].keys() == {"1", "8"}
    for figures in report["batches"].values():
        assert figures.keys() == PROMISED
        assert all(value > 0 for value in figures.values())
