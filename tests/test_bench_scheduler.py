"""The benchmarks under a virtual clock run, tell all that they promise, and notice what they are there for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from batcher.errors import QueueFullError
from batcher.policy import Policy
from batcher.scheduler import Scheduler
from bench.processes import ROOT
from bench.scheduler import jain_index, max_min
from bench.simulate import TINY, article_design, card, figures, night
from bench.virtual import ModelledCard, Replay, Speech
from service.engines.tone import h200


def run(module: str, *options: str) -> dict[str, object]:
    command = [sys.executable, "-m", module, "--tiny", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_the_scheduler_is_measured() -> None:
    report = run("bench.scheduler")
    promised = {"plan_us_per_row", "plan_growth_10x", "cancel_to_free_ticks", "padding_waste", "jain_index"}
    assert report.keys() >= promised | {"commit", "date", "cores"}
    assert report["cancel_to_free_ticks"] == 1


def test_a_night_is_simulated(tmp_path: Path) -> None:
    picture = tmp_path / "night.png"
    report = run("bench.simulate", "--picture", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert report.keys() >= {"chorus", "article", "cards_for", "requests_per_s_per_card", "commit", "date"}


def test_in_the_night_chorus_holds_and_the_articles_design_does_not() -> None:
    speeches = night(TINY)
    ours = figures(Replay(ModelledCard(card(), speeches), Policy()).run().callers, TINY)
    theirs = figures(article_design(card(), speeches), TINY)
    assert ours["in_time_share"] == 1
    assert ours["p99_s"] < 1
    assert theirs["in_time_share"] < 0.5


def test_a_replay_is_the_same_each_time() -> None:
    speeches = night(TINY)
    first, second = (Replay(ModelledCard(card(), speeches), Policy()).run() for _ in range(2))
    assert [caller.ended for caller in first.callers] == [caller.ended for caller in second.callers]


def test_a_modelled_card_costs_what_its_steps_cost() -> None:
    settings = h200(2.0).model_copy(update={"prefill_base_ms": 0, "prefill_token_ms": 0, "vocode_step_ms": 0})
    settings = settings.model_copy(update={"step_kv_ms": 0})
    replay = Replay(ModelledCard(settings, [Speech(0.5, steps=100, likely_steps=100)]), Policy()).run()
    assert replay.card.busy == pytest.approx(100 * settings.step_base_ms / 1000)
    assert replay.callers[0].latency == pytest.approx(replay.card.busy)


def test_the_index_of_fairness_falls_where_nobody_is_displaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Scheduler, request: object, delay: float) -> None:
        raise QueueFullError(delay)

    assert jain_index(6) > 0.98
    monkeypatch.setattr(Scheduler, "_victims", refuse)
    assert jain_index(6) < 0.7


def test_max_min_shares() -> None:
    assert max_min({"a": 10, "b": 1, "c": 3}, 9) == {"b": 1, "c": 3, "a": 5}
    assert max_min({"a": 10, "b": 10}, 9) == {"a": 4.5, "b": 4.5}
    assert max_min({"a": 1, "b": 2}, 9) == {"a": 1, "b": 2}


def test_a_replay_refuses_what_is_beyond_the_bound() -> None:
    speeches = [Speech(0.0, steps=500, likely_steps=500) for _ in range(4000)]
    replay = Replay(ModelledCard(card(), speeches), replace(Policy(), max_waiting=10_000)).run()
    refused = [caller for caller in replay.callers if isinstance(caller.error, QueueFullError)]
    served = [caller for caller in replay.callers if caller.ended is not None]
    assert len(refused) + len(served) == 4000
    bound = 2 * Scheduler(replay.card.caps, Policy()).speed  # audio seconds; nothing had run when they came
    assert len(served) * 500 * 1.25 / 46.875 <= bound < (len(served) + 1) * 500 * 1.25 / 46.875
