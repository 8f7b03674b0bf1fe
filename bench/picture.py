"""Pictures of simulated traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.report import quantile
from bench.virtual import Caller, ModelledCard, Replay

CHORUS, ARTICLE = "tab:blue", "tab:orange"
BAR_SECONDS = 1.0
WINDOW_SECONDS = 1.0


def draw_night(
    path: Path, replay: Replay[ModelledCard], article: Sequence[Caller], rate: Callable[[float], float], seconds: float
) -> None:
    """Four panels over time: offered load, latency (P50, P99), goodput, slots used."""
    figure, (load, latency, goodput, slots) = plt.subplots(4, 1, figsize=(9, 11), sharex=True)
    moments = [second * WINDOW_SECONDS for second in range(int(seconds / WINDOW_SECONDS))]
    load.plot(moments, [rate(at) for at in moments], color="black")
    load.set_ylabel("requests/s, repeats included")
    for name, color, callers in (("Chorus", CHORUS, replay.callers), ("the article's design", ARTICLE, article)):
        _draw_latency(latency, moments, callers, name, color)
        goodput.plot(moments, _goodput(moments, callers), color=color, label=name)
    latency.axhline(BAR_SECONDS, color="grey", linestyle=":", label="the bar: 1 s")
    latency.set_yscale("log")
    latency.set_ylabel("last byte, s, by arrival")
    latency.legend(loc="upper left", fontsize="small")
    goodput.set_ylabel("audio s/s in time")
    goodput.legend(loc="upper left", fontsize="small")
    slots.plot([at for at, _ in replay.slots], [rows for _, rows in replay.slots], color=CHORUS, linewidth=0.7)
    slots.axhline(replay.card.caps.slots, color="grey", linestyle=":")
    slots.set_ylabel("slots used")
    slots.set_xlabel("seconds")
    figure.suptitle("20 → 800 requests/s, 60 % repeats taken off, one card at half of an H200's limit (modelled)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw_latency(axes: Any, moments: Sequence[float], callers: Sequence[Caller], name: str, color: str) -> None:
    windows = [[c.latency for c in _window(at, callers) if c.ended is not None] for at in moments]
    for share, style in ((0.5, "-"), (0.99, "--")):
        values = [quantile(window, share) if window else float("nan") for window in windows]
        axes.plot(moments, values, style, color=color, label=f"{name}, P{share * 100:.0f}")


def _goodput(moments: Sequence[float], callers: Sequence[Caller]) -> list[float]:
    return [sum(c.speech.audio_seconds for c in _window(at, callers) if c.in_time) / WINDOW_SECONDS for at in moments]


def _window(at: float, callers: Sequence[Caller]) -> list[Caller]:
    return [caller for caller in callers if at <= caller.speech.at < at + WINDOW_SECONDS]
