"""The batcher beside others: how much speech is in time, at half, at full and at twice what the engine can make.

    python -m bench.batcher [--quick] [--json]

Every system is a server process of its own before an engine of the same costs (the tone engine's: an H200 at its limit,
slowed down 22 times, so that a step of one row takes 2 ms; at most 64 rows), with the same lengths for the same texts.
They take turns in getting the same trace from the same open-loop load generator; the others are stopped meanwhile. Time
is compressed 4 times, and all figures are multiplied back.

    chorus               the service itself, continuous, over gRPC
    mosec                whole utterances, over HTTP
    litserve             whole utterances, over HTTP
    litserve_continuous  LitServe's own loop of continuous batching, over HTTP
    batched              whole utterances: the library behind the least of a gRPC server, in a process of its own
    triton_like          whole utterances: the policy of Triton's dynamic batcher, likewise

Two references are nobody's product, are in no ratio, and left out with --quick:

    fifo_continuous              continuous, strictly first come, first served, in process as above
    litserve_continuous_bounded  LitServe's loop with a bound that it does not have: the 73rd call at once is refused

Whole utterances run to the longest of their batch. Half of the calls want a whole reply, which is in time within 1 s
and half of its audio; half want a stream, which is in time when its first chunk comes within 0.5 s and no gap is longer
than 100 ms. A system of whole utterances sends the whole as the first chunk. Who wants a whole reply hangs up when it
is late, and over gRPC the server hears when that will be; who wants a stream hangs up after 2 s without a sound. Chorus
is told to refuse streams that it can't begin within 0.5 s; rivals are told to bound their queues as far as they can.

Load 1.0 is what Chorus makes when it is saturated, measured in the run. Calls count that are due within a window, after
a warm-up and with the load going on behind it. Rows in a batch and waiting time of each rival are those with the best
goodput at load 1.0: found in the run, with --quick in an earlier one (`TUNED`).

`p50_s`, `p99_s`: whole replies; `first_chunk_p95_s`: streams. Who hung up counts with the time that had passed; who was
refused does not. `rejected`: refused before the deadline; `expired`: hung up; `late`: came, but not in time.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bench.offered import (
    COMPRESSION,
    FIRST_CHUNK_SECONDS,
    MEAN_SECONDS,
    ROWS,
    SLOWDOWN,
    UNDERRUN_SECONDS,
    Arrival,
    trace,
)
from bench.open_loop import BYTES_PER_SECOND, End, Outcome, Tally
from bench.report import metadata, quantile
from bench.systems import REFERENCES, SYSTEMS, Arena, Knobs, Running, System

LOADS = ("0.5", "1.0", "2.0")
ROW_CHOICES = (4, 8, 16, 32, 64)
WAIT_CHOICES_MS = (0.0, 2.0, 5.0, 10.0, 20.0)
TUNED = {
    "mosec": Knobs(4, 10.0),
    "litserve": Knobs(16, 20.0),
    "batched": Knobs(32, 5.0),
    "triton_like": Knobs(16, 0.0),
}
"""The best of a full run; see bench/RESULTS.md."""
SWEEP_SEED, ECHO_SEED = 903, 904
BUSY_SHARE = 0.9
"""A load generator that is busier may be what limits the rate."""

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure. Times are in seconds, compressed."""

    rounds: int
    warm_up: float
    window: float
    tail: float
    """The load goes on for so long behind the window."""
    patience: float
    """Then calls are waited for, at most for so long."""
    sweep: bool = False
    loads: Sequence[str] = LOADS
    systems: Sequence[System] = SYSTEMS

    @property
    def judged_until(self) -> float:
        """The end of the window."""
        return self.warm_up + self.window

    @property
    def seconds(self) -> float:
        """Of a trace."""
        return self.judged_until + self.tail


TINY = Size(
    rounds=1,
    warm_up=0.2,
    window=0.4,
    tail=0.1,
    patience=0.4,
    systems=[system for system in SYSTEMS if system.name in ("chorus", "triton_like")],
)
QUICK = Size(rounds=2, warm_up=0.6, window=1.8, tail=0.4, patience=1.2)
FULL = Size(rounds=5, warm_up=1.2, window=4.0, tail=0.8, patience=3.0, sweep=True, systems=(*SYSTEMS, *REFERENCES))


@dataclass(slots=True)
class Cell:
    """What one system did at one load, in all rounds."""

    size: Size
    judged: list[tuple[Arrival, Outcome]] = field(default_factory=list)
    goodputs: list[float] = field(default_factory=list)
    """Audio seconds a second, of each round."""
    server_cpu: list[float] = field(default_factory=list)
    load_cpu: list[float] = field(default_factory=list)
    lag: float = 0.0

    def add(self, arrivals: Sequence[Arrival], tally: Tally, server_cpu: float) -> None:
        """A round. `server_cpu`: cores."""
        begin, end = self.size.warm_up, self.size.judged_until
        judged = [(a, o) for a, o in zip(arrivals, tally.outcomes, strict=True) if begin <= a.at < end]
        self.judged += judged
        self.goodputs.append(_audio_in_time(judged) / self.size.window)
        self.server_cpu.append(server_cpu)
        self.load_cpu.append(tally.cpu_seconds / tally.seconds)
        self.lag = max(self.lag, tally.lag)

    @property
    def goodput(self) -> float:
        """Audio seconds a second."""
        return statistics.mean(self.goodputs)

    def figures(self) -> Figures:
        """What is reported; times as they would be uncompressed."""
        return self._goodput() | self._times() | self._ends() | self._efforts()

    def _goodput(self) -> Figures:
        seconds = self.size.window * len(self.goodputs)
        parts = [[(a, o) for a, o in self.judged if a.stream is stream] for stream in (False, True)]
        whole, streams = (round(_audio_in_time(part) / seconds, 2) for part in parts)
        return {
            "goodput_audio_s_per_s": round(self.goodput, 2),
            "goodput_whole_replies": whole,
            "goodput_streams": streams,
            "goodput_rounds": [round(each, 2) for each in self.goodputs],
            "offered_audio_s_per_s": round(sum(a.audio_seconds for a, _ in self.judged) / seconds, 2),
        }

    def _times(self) -> Figures:
        tried = [(a, o) for a, o in self.judged if o.end not in (End.REFUSED, End.ERROR)]
        whole = [o.total * COMPRESSION for a, o in tried if not a.stream]
        first = [(o.total if o.first is None else o.first) * COMPRESSION for a, o in tried if a.stream]
        return {
            "p50_s": round(quantile(whole, 0.5), 3),
            "p99_s": round(quantile(whole, 0.99), 3),
            "first_chunk_p50_s": round(quantile(first, 0.5), 3),
            "first_chunk_p95_s": round(quantile(first, 0.95), 3),
        }

    def _ends(self) -> Figures:
        ends = Counter(outcome.end for _, outcome in self.judged)
        whys = Counter(outcome.why for _, outcome in self.judged if outcome.end is End.ERROR)
        return {
            "calls": len(self.judged),
            "rejected": ends[End.REFUSED],
            "expired": ends[End.EXPIRED] + ends[End.CUT],
            "late": sum(o.end is End.COMPLETE and not in_time(a, o) for a, o in self.judged),
            "errors": ends[End.ERROR],
            "error_kinds": dict(whys.most_common(3)),
        }

    def _efforts(self) -> Figures:
        return {
            "server_cpu_share": round(statistics.mean(self.server_cpu), 3),
            "load_cpu_share": round(statistics.mean(self.load_cpu), 3),
            "load_lag_ms": round(self.lag * 1000, 1),
        }


def in_time(arrival: Arrival, outcome: Outcome) -> bool:
    """Whether a call got what it wanted when it wanted it."""
    if outcome.end is not End.COMPLETE or outcome.first is None:
        return False
    if not arrival.stream:
        return outcome.total <= arrival.deadline
    early = outcome.first <= FIRST_CHUNK_SECONDS / COMPRESSION
    return early and outcome.underrun <= UNDERRUN_SECONDS / COMPRESSION


def _audio_in_time(calls: Sequence[tuple[Arrival, Outcome]]) -> float:
    """Seconds."""
    return sum(arrival.audio_seconds for arrival, outcome in calls if in_time(arrival, outcome))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within three minutes; waiting times of an earlier run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--logs", action="store_true", help="show the servers' logs, which then costs them more")
    parser.add_argument(
        "--only", nargs="+", choices=[s.name for s in (*SYSTEMS, *REFERENCES)], help="Chorus and these, not all"
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no server is left behind
    size = TINY if args.tiny else QUICK if args.quick else FULL
    if args.only:
        size = replace(size, systems=[s for s in (*SYSTEMS, *REFERENCES) if s.kind == "ours" or s.name in args.only])
    missing = {system.name: system.missing for system in size.systems if system.missing}
    for name, packages in missing.items():
        print(f"{name} is left out: {', '.join(packages)} is not installed (pip install '.[bench]')", file=sys.stderr)
    with ExitStack() as stack:
        report = measure(Arena(stack, args.logs), size, [s for s in size.systems if s.name not in missing])
    report = _metadata(size) | {"missing": missing} | report
    print(json.dumps(report) if args.json else _table(report))


def measure(arena: Arena, size: Size, systems: Sequence[System]) -> Figures:
    """All figures."""
    ours, *rivals = systems
    running = {ours.name: _ready(arena.start(ours, Knobs()))}
    capacity = running[ours.name].saturate(size.seconds)
    knobs = {each.name: _sweep(arena, each, capacity, size) if size.sweep else _tuned(each) for each in rivals}
    starting = {each.name: arena.start(each, knobs[each.name]) for each in rivals}
    running |= {name: _ready(each) for name, each in starting.items()}
    cells = _rounds(running, capacity, size)
    return {
        "capacity_audio_s_per_s": round(capacity, 2),
        "echo": _echo(arena, capacity, size, http=any(each.path for each in rivals)),
        "knobs": {each.name: {"rows": knobs[each.name].rows, "wait_ms": knobs[each.name].wait_ms} for each in rivals},
        "systems": {name: {load: cell.figures() for load, cell in of.items()} for name, of in cells.items()},
        **_ratios({each.name: each.kind for each in systems}, cells),
    }


def _rounds(running: Mapping[str, Running], capacity: float, size: Size) -> dict[str, dict[str, Cell]]:
    """Each load after the other, in which the systems take turns; every round another one begins."""
    cells = {name: {load: Cell(size) for load in size.loads} for name in running}
    names = list(running)
    for number in range(size.rounds):
        turns = names[number % len(names) :] + names[: number % len(names)]
        for place, load in enumerate(size.loads):
            arrivals = _trace(10 * number + place, float(load), capacity, size)
            for name in turns:
                cells[name][load].add(arrivals, *running[name].measure(arrivals, size.judged_until, size.patience))
    return cells


def _sweep(arena: Arena, system: System, capacity: float, size: Size) -> Knobs:
    """The knobs with the best goodput at load 1.0: first the rows in a batch, then with these the waiting time."""
    if system.kind != "whole":
        return Knobs()
    arrivals = _trace(SWEEP_SEED, 1.0, capacity, size)

    def goodput(knobs: Knobs) -> float:
        with ExitStack() as stack:
            cell = Cell(size)
            cell.add(
                arrivals, *_ready(arena.start(system, knobs, stack)).measure(arrivals, size.judged_until, size.patience)
            )
        return cell.goodput

    rows = max(ROW_CHOICES, key=lambda rows: goodput(Knobs(rows)))
    return max((Knobs(rows, wait) for wait in WAIT_CHOICES_MS), key=goodput)


def _tuned(system: System) -> Knobs:
    return TUNED.get(system.name, Knobs())


def _ready(running: Running) -> Running:
    running.wait_until_ready()
    running.stop()
    return running


def _echo(arena: Arena, capacity: float, size: Size, http: bool) -> Figures:
    """What the transports alone take for the calls of load 1.0, in milliseconds that are not multiplied."""
    audio_seconds = MEAN_SECONDS / COMPRESSION
    arrivals = [Arrival(a.at, a.text, a.stream, audio_seconds) for a in _trace(ECHO_SEED, 1.0, capacity, size)]
    found: Figures = {}
    for name in ("grpc", "http") if http else ("grpc",):
        echo = arena.start_echo(name == "http", round(audio_seconds * BYTES_PER_SECOND))
        tally, _ = echo.measure(arrivals, size.judged_until, size.patience)
        times = [outcome.total for outcome in tally.outcomes if outcome.end is End.COMPLETE]
        found |= {f"{name}_ms_p{p}": round(quantile(times, p / 100) * 1000, 2) for p in (50, 99)}
    return found


def _trace(seed: int, load: float, capacity: float, size: Size) -> list[Arrival]:
    return trace(seed, load * capacity * COMPRESSION / MEAN_SECONDS, size.seconds)


def _ratios(kinds: Mapping[str, str], cells: Mapping[str, Mapping[str, Cell]]) -> Figures:
    """Ours beside the best of each kind."""

    def best(kind: str, load: str) -> float:
        return max((of[load].goodput for name, of in cells.items() if kinds[name] == kind and load in of), default=0.0)

    def ratio(kind: str, load: str) -> float | None:
        """None where there is nothing to compare with."""
        theirs = best(kind, load)
        return round(best("ours", load) / theirs, 3) if theirs else None

    peak = max(cell.goodput for cell in cells["chorus"].values())
    return {
        "ratio_whole_1_0": ratio("whole", "1.0"),
        "ratio_continuous_1_0": ratio("continuous", "1.0"),
        "ratio_continuous_2_0": ratio("continuous", "2.0"),
        "overload_keep": round(best("ours", "2.0") / peak, 3) if peak else None,
    }


def _metadata(size: Size) -> Figures:
    return metadata() | {
        "versions": {name: _version(name) for name in ("grpcio", "mosec", "litserve", "batched", "aiohttp")},
        "rounds": size.rounds,
        "window_s": size.window,
        "compression": COMPRESSION,
        "slowdown": SLOWDOWN,
        "rows": ROWS,
        "knobs_from": "a sweep in this run" if size.sweep else "an earlier run's sweep",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _table(report: Figures) -> str:
    systems: dict[str, dict[str, Figures]] = report["systems"]
    lines = [f"{name:<24} {value}" for name, value in report.items() if name not in ("systems", *RATIOS)]
    lines.append(f"\n{'system':<27} {'load':>4}" + "".join(f" {heading:>{width}}" for heading, _, width in COLUMNS))
    for name, of in systems.items():
        for load, figures in of.items():
            cells = "".join(f" {figures[field]:>{width},}" for _, field, width in COLUMNS)
            lines.append(f"{name:<27} {load:>4}{cells}")
    lines.append("")
    lines += [
        f"{name:<24} {'-' if report[name] is None else report[name]:>8}   aim: {aim}" for name, aim in RATIOS.items()
    ]
    shares = [figures["load_cpu_share"] for of in systems.values() for figures in of.values()]
    if max(shares) > BUSY_SHARE:
        lines.append("the load generator had no rest: what is late may be its own fault")
    return "\n".join(lines)


RATIOS = {
    "ratio_whole_1_0": "≥ 2",
    "ratio_continuous_1_0": "≥ 0.97",
    "ratio_continuous_2_0": "≥ 2",
    "overload_keep": "≥ 0.95",
}
COLUMNS = (
    ("goodput", "goodput_audio_s_per_s", 8),
    ("whole", "goodput_whole_replies", 7),
    ("streams", "goodput_streams", 7),
    ("offered", "offered_audio_s_per_s", 7),
    ("p50 s", "p50_s", 7),
    ("p99 s", "p99_s", 7),
    ("first p95 s", "first_chunk_p95_s", 11),
    ("calls", "calls", 6),
    ("rejected", "rejected", 8),
    ("expired", "expired", 7),
    ("late", "late", 5),
    ("errors", "errors", 6),
    ("cpu", "server_cpu_share", 6),
    ("load cpu", "load_cpu_share", 8),
)


if __name__ == "__main__":
    main()
