"""The benchmark for a GPU goes through all of its stages, as far as a CPU can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu_report import STAGES, report
from bench.processes import ROOT


def test_a_dry_run_leaves_every_stages_figures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    setting = gpu.Setting("cpu", tiny_checkpoint, gpu.DRY)
    assert tuple(gpu.STAGES) == STAGES
    with torch.inference_mode():
        for name, stage in gpu.STAGES.items():
            if name not in ("machine", "upstream_compiled"):
                stage(setting, gpu.Saved(tmp_path / f"{name}.json"))
    found = report(tmp_path)
    assert found["correct"]["replayed_as_called"]
    assert found["correct"]["waits_between_plans"] is None
    assert found["correct"]["tie_rate"] <= 0.1
    assert found["correct"]["vocoder_error"] < 1e-4
    assert found["steps"]["ms_per_step_served"].keys() == found["steps"]["limit_ms_per_step"].keys() == {"1", "8"}
    assert len(found["burst"]["rounds"]) == 3
    assert found["streams"]["1"]["failed"] == 0
    assert found["night"]["refused_share"] == 0
    assert found["ratio_upstream"] > 0


def test_the_script_runs_stages_by_themselves(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "STAGES": "machine night"}
    command = ["bash", "bench/gpu.sh", "--dry", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name for name in STAGES if found[name] != "not measured"} == {"machine", "night"}
    assert found["machine"]["copied_bytes_per_s"] > 0
    assert found["night"]["last_byte_ms_p99"] > 0


def test_what_a_stage_had_found_when_it_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(setting: gpu.Setting, figures: gpu.Figures) -> None:
        figures["found"] = 1
        raise ArithmeticError("a gap")

    monkeypatch.setitem(gpu.STAGES, "steps", fails)
    monkeypatch.setattr(sys, "argv", ["gpu", "steps", "--folder", str(tmp_path), "--device", "cpu"])
    with pytest.raises(ArithmeticError):
        gpu.main()
    steps = report(tmp_path)["steps"]
    assert (steps["found"], steps["error"]) == (1, "ArithmeticError: a gap")
