"""The benchmark of audio runs, and tells all that it promises."""

from __future__ import annotations

import json
import subprocess
import sys

from audio.formats import SERVED, resolve
from bench.audio import RATE, name
from bench.processes import ROOT

PROMISED = {
    "audio_s_per_cpu_s",
    "ffmpeg_audio_s_per_cpu_s",
    "ratio_to_ffmpeg",
    "first_bytes_ms",
    "first_bytes_audio_ms",
}


def test_it_runs_for_every_format() -> None:
    command = [sys.executable, "-m", "bench.audio", "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= {"commit", "date", "python", "av", "ffmpeg", "cores", "rounds"}
    assert report["formats"].keys() >= {name(resolve(*served, 0, RATE)) for served in SERVED}
    for figures in report["formats"].values():
        assert figures.keys() == PROMISED
        assert all(value > 0 for value in figures.values())
