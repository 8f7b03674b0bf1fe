"""The article's night under a virtual clock: the product's scheduler on a modelled card, and the article's own design.

    python -m bench.simulate [--quick] [--json] [--picture FILE]

Traffic rises from 20 to 800 requests/s within seconds. 60 % of the texts repeat and are taken off, as a result cache
answers them; lengths are log-normal with mean 6 s and sigma 0.4, at most 12 s. Each design has one H200 at half of its
physical limit (`service.engines.tone.h200`, slowdown 2; nothing of a real card is measured here).

- chorus: the scheduler of `batcher/`, 256 slots, every call with the deadline 1 s + half of its audio.
- article: four processes that share the card, each with one utterance at a time, first come, first served, unbounded.

`goodput` is audio seconds a second of the requests that met their deadline. `cards_for` tells how many cards carry so
many requests/s with the last byte within 1 s at P99 and no more than 1 % refused.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batcher.policy import Policy
from bench.report import metadata, quantile
from bench.virtual import STEPS_PER_SECOND, Caller, ModelledCard, Replay, Speech, lengths
from common.settings import ToneSettings
from service.engines.tone import h200
from service.engines.tone_cost import CostModel

CALM, STORM = 20.0, 800.0
"""Requests a second."""
REPEATS = 0.6
MEAN_SECONDS, LONGEST_SECONDS = 6.0, 12.0
SLOWDOWN = 2.0
LOOKAHEAD_STEPS = 52
ARTICLE_PROCESSES = 4
BAR_SECONDS, BAR_REFUSED = 1.0, 0.01
TARGETS = (100, 200, 400, 800, 1600, 3200)
SEED = 11


@dataclass(frozen=True, slots=True)
class Size:
    """How long the parts of the night are, in seconds."""

    calm: float
    rise: float
    storm: float
    probe: float
    """Of each run that looks for a card's capacity."""
    probes: int


TINY = Size(calm=1, rise=0.5, storm=1, probe=0.5, probes=2)
QUICK = Size(calm=5, rise=3, storm=20, probe=8, probes=5)
FULL = Size(calm=10, rise=3, storm=60, probe=30, probes=8)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--picture", type=Path, help="draw the night into this file (PNG or SVG)")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = TINY if args.tiny else QUICK if args.quick else FULL
    speeches = night(size)
    replay = Replay(ModelledCard(card(), speeches), Policy()).run()
    article = article_design(card(), speeches)
    report = metadata() | {
        "offered_requests_per_s": STORM,
        "unique_requests_per_s": STORM * (1 - REPEATS),
        "chorus": figures(replay.callers, size) | {"slots_used_most": max(rows for _, rows in replay.slots)},
        "article": figures(article, size),
        **_cards(size),
    }
    if args.picture:
        from bench.picture import draw_night  # matplotlib is only needed here

        draw_night(args.picture, replay, article, lambda at: rate(at, size), end(size))
    print(json.dumps(report) if args.json else _table(report))


# -- traffic ----------------------------------------------------------------------------------------------------------


def rate(at: float, size: Size) -> float:
    """Requests a second that come then, repeats included."""
    into_rise = (at - size.calm) / size.rise
    into_fall = (at - size.calm - size.rise - size.storm) / size.rise
    return CALM + (STORM - CALM) * (min(1.0, max(0.0, into_rise)) - min(1.0, max(0.0, into_fall)))


def end(size: Size) -> float:
    """When the night is over, in seconds."""
    return 2 * (size.calm + size.rise) + size.storm


def night(size: Size) -> list[Speech]:
    """What is left of the night's requests without the repeats."""
    return arrivals(lambda at: rate(at, size), end(size))


def arrivals(rate: Callable[[float], float], seconds: float) -> list[Speech]:
    """Random arrivals, by thinning: Lewis and Shedler, "Simulation of Nonhomogeneous Poisson Processes" (1979)."""
    chance = random.Random(SEED)
    most = max(rate(seconds * part / 100) for part in range(101)) * (1 - REPEATS)
    speeches, at = [], 0.0
    while (at := at + chance.expovariate(most)) < seconds:
        if chance.random() * most < rate(at) * (1 - REPEATS):
            speeches.append(_speech(chance, at))
    return speeches


def _speech(chance: random.Random, at: float) -> Speech:
    steps, likely = lengths(chance, MEAN_SECONDS, LONGEST_SECONDS)
    return Speech(at, steps, likely, deadline=1.0 + 0.5 * steps / STEPS_PER_SECOND)


# -- designs ----------------------------------------------------------------------------------------------------------


def card() -> ToneSettings:
    """One H200 at half of its limit."""
    return h200(SLOWDOWN).model_copy(update={"lookahead_steps": LOOKAHEAD_STEPS})


def article_design(settings: ToneSettings, speeches: Sequence[Speech]) -> list[Caller]:
    """First come, first served by four processes; those that are busy share the card's time evenly."""
    costs = CostModel(settings)
    alone = costs.step_ms(1, settings.typical_kv) / 1000
    callers = [Caller(speech) for speech in speeches]
    coming, waiting = deque(callers), deque[Caller]()
    running: dict[Caller, float] = {}
    """Seconds of the card that are left to do."""
    now = 0.0
    while coming or waiting or running:
        while waiting and len(running) < ARTICLE_PROCESSES:
            caller = waiting.popleft()
            running[caller] = caller.speech.steps * alone
        ends = now + min(running.values(), default=math.inf) * len(running) if running else math.inf
        until = min(ends, coming[0].speech.at if coming else math.inf)
        for caller in running:
            running[caller] -= (until - now) / len(running)
        now = until
        if now == ends:
            done = min(running, key=lambda caller: running[caller])
            done.ended = done.first_audio = now
            del running[done]
        else:
            waiting.append(coming.popleft())
    return callers


# -- figures ----------------------------------------------------------------------------------------------------------


def figures(callers: Sequence[Caller], size: Size) -> dict[str, float]:
    """Of the requests that came in the storm."""
    began = size.calm + size.rise
    stormy = [caller for caller in callers if began <= caller.speech.at < began + size.storm]
    served = [caller.latency for caller in stormy if caller.ended is not None]
    in_time = [caller for caller in stormy if caller.in_time]
    return {
        "p50_s": round(quantile(served, 0.5), 4),
        "p99_s": round(quantile(served, 0.99), 4),
        "served_share": round(len(served) / len(stormy), 4),
        "in_time_share": round(len(in_time) / len(stormy), 4),
        "goodput_audio_s_per_s": round(sum(c.speech.audio_seconds for c in in_time) / size.storm, 1),
        "offered_audio_s_per_s": round(sum(c.speech.audio_seconds for c in stormy) / size.storm, 1),
    }


def _cards(size: Size) -> dict[str, object]:
    most = capacity(size) / (1 - REPEATS)
    return {
        "requests_per_s_per_card": round(most, 1),
        "cards_for": {str(target): math.ceil(target / most) for target in TARGETS},
    }


def capacity(size: Size) -> float:
    """Unique requests a second that one card carries by the bar, by bisection."""
    low, high = 10.0, 1000.0
    for _ in range(size.probes):
        middle = (low + high) / 2
        low, high = (middle, high) if _carries(middle, size.probe) else (low, middle)
    return low


def _carries(unique: float, seconds: float) -> bool:
    speeches = arrivals(lambda at: unique / (1 - REPEATS), seconds)
    callers = Replay(ModelledCard(card(), speeches), Policy()).run().callers
    settled = [caller for caller in callers if caller.speech.at > seconds / 4]
    served = [caller.latency for caller in settled if caller.ended is not None]
    return len(served) >= (1 - BAR_REFUSED) * len(settled) and quantile(served, 0.99) <= BAR_SECONDS


def _table(report: Mapping[str, object]) -> str:
    lines = []
    for name, value in report.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        lines += [f"{name + ' ' + key if key else name:<40} {each}" for key, each in parts]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
