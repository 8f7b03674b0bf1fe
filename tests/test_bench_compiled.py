"""The benchmark of a compiled step runs, and says so where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench.compiled import has_compiler
from bench.processes import ROOT

TINY = [sys.executable, "-m", "bench.compiled", "--tiny", "--json", "--dtypes", "fp32", "--rows", "1"]


@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
@pytest.mark.timeout(300)  # it compiles
def test_it_compares_with_the_eager_step() -> None:
    done = subprocess.run(TINY, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= {"commit", "date", "python", "torch", "cores", "threads", "weights"}
    figures = report["fp32"]["1"]
    assert all(value > 0 for value in (*figures["ms"], figures["ratio"], figures["compile_s"]))
    assert figures["error"] < 1e-5
    assert report["fp32"]["same_alone"] == {"eager": True, "compiled": True}


def test_without_a_compiler_it_says_so() -> None:
    environment = {**os.environ, "CXX": "/nowhere/g++"}
    done = subprocess.run(TINY, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no C++ compiler" in done.stderr
