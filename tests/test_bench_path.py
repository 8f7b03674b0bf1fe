"""The benchmark of the path runs, and tells all that it promises."""

from __future__ import annotations

import json
import subprocess
import sys

from bench.load import Tally
from bench.path import Sample
from bench.processes import ROOT

PROMISED = {
    "unary_overhead_ms_p50",
    "unary_overhead_ms_p99",
    "first_audio_overhead_ms_p50",
    "calls_per_s",
    "stream_mb_per_s",
    "gateway_cpu_us_per_call",
    "service_cpu_us_per_call",
    "gateway_cpu_ratio",
    "load_cpu_share",
    "echo_calls_per_s",
    "echo_cpu_us_per_call",
    "echo_stream_mb_per_s",
    "echo_load_cpu_share",
    "commit",
    "date",
    "python",
    "grpcio",
    "cores",
    "errors",
}


def test_it_runs_and_nothing_fails() -> None:
    command = [sys.executable, "-m", "bench.path", "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= PROMISED
    assert report["errors"] == 0
    assert report["calls_per_s"] > 0
    assert report["stream_mb_per_s"] > 0


def test_a_sample_counts_over_all_processes() -> None:
    first = Tally(seconds=2.0, cpu_seconds=1.0, errors=1, first_audio=[0.1, 0.2], totals=[0.3, 0.1])
    second = Tally(seconds=1.5, cpu_seconds=0.5, first_audio=[0.3, 0.4], totals=[0.2, 0.4])
    sample = Sample([first, second], cpu_seconds=[0.004, 0.002])
    assert (sample.calls, sample.errors, sample.calls_per_second) == (4, 1, 2.0)
    assert sample.load_cpu_share == 1.5 / 3.5
    assert (sample.cpu_us(0), sample.cpu_us(1)) == (1000.0, 500.0)
    assert (sample.ms(0.5), sample.first_audio_ms(0.99)) == (300.0, 400.0)
    assert Sample([Tally(seconds=1.0)], cpu_seconds=[0.0]).ms(0.5) == 0.0
