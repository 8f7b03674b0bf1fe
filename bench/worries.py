"""The article's three worries, each as a picture: GPU memory, latency, and texts that are computed again.

    python -m bench.worries FOLDER [--quick] [--json]

Both designs have the same card: the modelled one of `bench.simulate` (one H200 at half of its limit), under a virtual
clock. Nothing of a real card is measured here. Memory is what the article says of a model process (3 GB), and for ours
one model and the keys and values of the rows that ran at once (61 KB a token of ChatTTS's 20 layers in 16 bits).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from batcher.policy import Policy
from bench.cache import repeats, simulated
from bench.report import metadata, quantile
from bench.simulate import ARTICLE_PROCESSES, BAR_SECONDS, REPEATS, arrivals, article_design, card
from bench.virtual import Caller, ModelledCard, Replay

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOADS = (20, 50, 100, 200, 400, 600, 800)
"""Requests a second, repeats included."""
MODEL_GB = 3.0
KV_GB_PER_TOKEN = 20 * 2 * 768 * 2 / 1e9
TOKENS = 400
"""Of a row: its prompt and 7 s of speech."""
SPEECH_SECONDS = 0.3
"""How long a speech is on its way to the cache, in the third picture."""
CHORUS, ARTICLE, OTHER = "tab:blue", "tab:orange", "tab:grey"

Series = dict[str, list[float]]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    series = measure(4.0 if args.quick else 15.0)
    draw(args.folder, series)
    report = metadata() | {"requests_per_s": list(LOADS)} | series
    print(json.dumps(report) if args.json else "\n".join(f"{name:<32} {value}" for name, value in report.items()))


def measure(seconds: float) -> Series:
    """All lines of the pictures, a point for each load."""
    series: Series = {}
    for load in LOADS:
        speeches = arrivals(lambda at, load=load: float(load), seconds)  # type: ignore[misc]
        replay = Replay(ModelledCard(card(), speeches), Policy()).run()
        theirs = article_design(card(), speeches)
        rows = max((count for _, count in replay.slots), default=0)
        for name, value in {
            "chorus_rows": rows,
            "chorus_memory_gb": MODEL_GB + rows * TOKENS * KV_GB_PER_TOKEN,
            "article_rows": ARTICLE_PROCESSES,
            "article_memory_gb": ARTICLE_PROCESSES * MODEL_GB,
            **_latencies("chorus", replay.callers),
            **_latencies("article", theirs),
            **_made(load, seconds),
        }.items():
            series.setdefault(name, []).append(round(value, 3))
    return series


def _latencies(name: str, callers: Sequence[Caller]) -> dict[str, float]:
    served = [caller.latency for caller in callers if caller.ended is not None]
    return {f"{name}_p50_s": quantile(served, 0.5), f"{name}_p99_s": quantile(served, 0.99)}


def _made(load: int, seconds: float) -> dict[str, float]:
    """Speeches a second that have to be made, by what is done about repeats."""
    trace = repeats(max(50, round(load * seconds)), random.Random(9))
    flights = len(set(trace)) / len(trace)
    return {
        "made_without_a_cache": float(load),
        "made_with_a_cache": load * (1 - simulated(trace, load, SPEECH_SECONDS, sights=1)),
        "made_by_the_article": load * (1 - simulated(trace, load, SPEECH_SECONDS, sights=2)),
        "made_by_chorus": load * flights,
    }


def draw(folder: Path, series: Mapping[str, Sequence[float]]) -> None:
    """The three pictures."""
    figure, (memory, rows) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    for name, color in (("chorus", CHORUS), ("article", ARTICLE)):
        memory.plot(LOADS, series[f"{name}_memory_gb"], "o-", color=color, label=_title(name))
        rows.plot(LOADS, series[f"{name}_rows"], "o-", color=color)
    memory.set_ylabel("GPU memory, GB")
    memory.set_ylim(bottom=0)
    memory.legend()
    rows.set_ylabel("speeches at once")
    rows.set_xlabel(f"requests/s, {REPEATS:.0%} of them repeats")
    _save(figure, folder / "worry-memory.png", "One model and many rows, or many models (modelled card)")

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, color in (("chorus", CHORUS), ("article", ARTICLE)):
        for share, style in (("p50", "o-"), ("p99", "o--")):
            label = f"{_title(name)}, {share.upper()}"
            axes.plot(LOADS, series[f"{name}_{share}_s"], style, color=color, label=label)
    axes.axhline(BAR_SECONDS, color=OTHER, linestyle=":", label="the bar: 1 s")
    axes.set_yscale("log")
    axes.set_ylabel("last byte, s")
    axes.set_xlabel(f"requests/s, {REPEATS:.0%} of them repeats and taken off")
    axes.legend(fontsize="small")
    _save(figure, folder / "worry-latency.png", "P50 and P99 on the same card (modelled)")

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, color in (
        ("without_a_cache", OTHER),
        ("by_the_article", ARTICLE),
        ("with_a_cache", "tab:green"),
        ("by_chorus", CHORUS),
    ):
        axes.plot(LOADS, series[f"made_{name}"], "o-", color=color, label=name.replace("_", " "))
    axes.set_ylabel("speeches/s that the GPU makes")
    axes.set_xlabel(f"requests/s, {REPEATS:.0%} of them repeats")
    axes.legend(fontsize="small")
    _save(figure, folder / "worry-repeats.png", "What is computed again (same traffic, simulated)")


def _title(name: str) -> str:
    return "Chorus" if name == "chorus" else "the article's design"


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
