"""The benchmark of batchers runs, and judges as it says."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.batcher import in_time
from bench.offered import (
    COMPRESSION,
    FIRST_CHUNK_SECONDS,
    LONGEST_SECONDS,
    MEAN_SECONDS,
    ROWS,
    SIGMA,
    SLOWDOWN,
    TABLE_KV,
    UNDERRUN_SECONDS,
    Arrival,
    costs,
    row_kv,
    trace,
)
from bench.open_loop import End, Outcome
from bench.processes import ROOT
from bench.rivals.engines import StepEngine, WholeUtteranceEngine
from common.settings import ToneSettings
from service.engines.tone_code import BYTES_PER_STEP
from service.engines.tone_cost import CostModel
from service.text import split

PROMISED = {
    "goodput_audio_s_per_s",
    "p50_s",
    "p99_s",
    "first_chunk_p95_s",
    "rejected",
    "errors",
}


def test_it_runs_and_nothing_fails() -> None:
    command = [sys.executable, "-m", "bench.batcher", "--tiny", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["systems"].keys() == {"chorus", "triton_like"}
    for of in report["systems"].values():
        assert of.keys() == {"0.5", "1.0", "2.0"}
        for figures in of.values():
            assert figures.keys() >= PROMISED
            assert figures["errors"] == 0, figures
            assert figures["calls"] > 0
    assert report["capacity_audio_s_per_s"] > 0
    assert report["echo"]["grpc_ms_p50"] > 0
    assert report.keys() >= {"ratio_whole_1_0", "ratio_continuous_1_0", "ratio_continuous_2_0", "overload_keep"}


def test_the_trace_is_what_was_asked_for_and_always_the_same() -> None:
    arrivals = trace(7, rate=200.0, seconds=30.0)
    assert arrivals == trace(7, rate=200.0, seconds=30.0)
    lengths = [arrival.audio_seconds * COMPRESSION for arrival in arrivals]
    assert len(arrivals) == pytest.approx(6000, rel=0.05)
    assert statistics.mean(lengths) == pytest.approx(MEAN_SECONDS, rel=0.03)
    assert statistics.stdev(map(math.log, lengths)) == pytest.approx(SIGMA, rel=0.05)
    assert max(lengths) <= LONGEST_SECONDS
    assert statistics.mean(arrival.stream for arrival in arrivals) == pytest.approx(0.5, abs=0.03)
    others = trace(8, rate=200.0, seconds=30.0)
    assert len({arrival.text for arrival in arrivals + others}) == len(arrivals) + len(others)


def test_texts_are_spoken_as_they_are_written() -> None:
    for arrival in trace(7, rate=20.0, seconds=10.0):
        assert [segment.spoken_text for segment in split(arrival.text, None)] == [arrival.text]


def test_costs_fit_the_table_of_the_physical_limit() -> None:
    model = CostModel(costs())
    for rows, table_ms in ((1, 0.092), (ROWS, 0.317)):
        assert model.step_ms(rows, rows * row_kv()) == pytest.approx(SLOWDOWN * table_ms, rel=0.01)
    assert model.step_ms(1, row_kv()) >= 2.0
    assert COMPRESSION * row_kv() == pytest.approx(TABLE_KV, rel=0.15)


def test_lateness_is_judged_by_kind() -> None:
    whole = Arrival(0.0, "x", stream=False, audio_seconds=2.0)
    outcome = Outcome(0.0, End.COMPLETE, first=whole.deadline, total=whole.deadline)
    assert whole.deadline == 1.0 / COMPRESSION + 1.0
    assert in_time(whole, outcome)
    assert not in_time(whole, replace(outcome, total=whole.deadline * 1.01))
    assert not in_time(whole, replace(outcome, end=End.REFUSED))
    stream = replace(whole, stream=True)
    outcome = Outcome(0.0, End.COMPLETE, first=FIRST_CHUNK_SECONDS / COMPRESSION, total=99.0, underrun=0.0)
    assert in_time(stream, outcome)
    assert not in_time(stream, replace(outcome, first=FIRST_CHUNK_SECONDS / COMPRESSION * 1.01))
    assert not in_time(stream, replace(outcome, underrun=UNDERRUN_SECONDS / COMPRESSION * 1.01))


def test_rivals_have_the_same_lengths_and_sound_in_both_forms() -> None:
    settings = ToneSettings(slots=4, steps_per_character=3.0, length_sigma=0.3)
    texts = ["one", "two and", "three", "four"]
    whole = WholeUtteranceEngine(settings).speak(texts)
    engine, heard = StepEngine(settings), dict.fromkeys(texts, b"")
    for text in texts:
        engine.join(text, text, stream=text != "three")
    while engine.rows:
        for piece in engine.step():
            heard[str(piece.key)] += piece.pcm
    assert [heard[text] for text in texts] == whole
    assert [len(pcm) // BYTES_PER_STEP for pcm in whole] == [CostModel(settings).steps(text) for text in texts]
