"""The benchmark for a GPU goes through all of its stages, as far as a CPU can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import STAGES
from bench.gpu_report import STAGES as REPORTED
from bench.processes import ROOT


@pytest.mark.timeout(300)
def test_a_dry_run_leaves_every_stage_s_figures(tmp_path: Path) -> None:
    command = ["bash", "bench/gpu.sh", "--dry", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert tuple(STAGES) == REPORTED
    assert {name for name in STAGES if report[name] == "not measured"} == {"upstream_compiled"}, "it is for a GPU alone"
    assert report["correct"]["replayed_as_called"]
    assert report["correct"]["waits_between_plans"] is None
    assert report["correct"]["tie_rate"] <= 0.1
    assert report["correct"]["vocoder_error"] < 1e-4
    assert len(report["burst"]["rounds"]) == 3
    assert report["streams"]["1"]["failed"] == 0
    assert report["night"]["refused_share"] == 0
    assert report["ratio_upstream"] > 0


def test_a_stage_that_fails_costs_only_itself(tmp_path: Path) -> None:
    stage = ["burst", "--folder", str(tmp_path), "--device", "cpu", "--checkpoint", str(tmp_path / "none")]
    assert subprocess.run(
        [sys.executable, "-m", "bench.gpu", *stage], cwd=ROOT, capture_output=True, check=False
    ).returncode
    command = [sys.executable, "-m", "bench.gpu_report", str(tmp_path)]
    report = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert report.pop("burst")["error"].startswith("StartupError")
    assert set(report.values()) == {"not measured"}
