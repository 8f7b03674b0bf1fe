"""What the path costs: one gateway and one service before an engine that costs nothing, beside a bare gRPC echo.

    python -m bench.path [--quick] [--json]

Servers and load are processes of their own; the servers log as in production (info), to /dev/null. Ours and the echo
take turns in the same run, and each figure is the median over the rounds. A call asks for 4 KiB of RAW audio, a stream
is 300 KiB in chunks of 32 KiB; every text is a new one, and every reply is checked. Where nothing else is said, 50
callers have one call each at a time.

Names of fields end in their unit. `overhead` is ours less the echo's, with one caller; `cpu` is that of a server's
process, all threads; `load_cpu_share` is how busy each process of the load generator was, gRPC's own threads included:
near 1 or above, the rate may be its own and not the server's (CPU per call is right all the same).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import grpc

from bench.load import LoadGenerator, Tally, Window
from bench.processes import Server, Servers, free_address
from bench.report import metadata, quantile
from common.settings import Settings, load_settings

BYTES_PER_STEP = 1024
"""Of the tone engine."""
CHARACTERS = 20
UNARY_STEPS = 4
STREAM_STEPS = 300
UNARY_BYTES = UNARY_STEPS * BYTES_PER_STEP
STREAM_BYTES = STREAM_STEPS * BYTES_PER_STEP
CALLERS = 50
BUSY_SHARE = 0.9
"""A load generator that is busier may be what limits the rate."""

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Size:
    """How long to measure. Times are in seconds."""

    rounds: int
    alone: float
    """Of a window with one caller."""
    crowded: float
    """Of a window with many."""


TINY = Size(rounds=1, alone=0.1, crowded=0.2)
QUICK = Size(rounds=4, alone=1.0, crowded=2.0)
FULL = Size(rounds=8, alone=2.0, crowded=4.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one window showed."""

    tallies: Sequence[Tally]
    cpu_seconds: Sequence[float]
    """Of each server of the path."""

    @property
    def calls(self) -> int:
        """Calls without error."""
        return sum(tally.calls for tally in self.tallies)

    @property
    def errors(self) -> int:
        """Calls that failed or brought something else than was asked for."""
        return sum(tally.errors for tally in self.tallies)

    @property
    def calls_per_second(self) -> float:
        """Over all load processes."""
        return self.calls / max(tally.seconds for tally in self.tallies)

    @property
    def load_cpu_share(self) -> float:
        """1: each process that makes the load used as much as one core."""
        return sum(t.cpu_seconds for t in self.tallies) / sum(t.seconds for t in self.tallies)

    def cpu_us(self, server: int) -> float:
        """Microseconds a call that a server of the path used."""
        return self.cpu_seconds[server] / max(self.calls, 1) * 1e6

    def ms(self, share: float) -> float:
        """Milliseconds within which this share of the calls were over."""
        return quantile([time for tally in self.tallies for time in tally.totals], share) * 1000

    def first_audio_ms(self, share: float) -> float:
        """Milliseconds within which this share of the calls had audio."""
        return quantile([time for tally in self.tallies for time in tally.first_audio], share) * 1000


@dataclass(frozen=True, slots=True)
class Path:
    """Servers that a call passes, the outermost first."""

    servers: Sequence[Server]
    stream: bool

    def measure(self, load: LoadGenerator, callers: int, seconds: float) -> Sample:
        """Calls for a while."""
        window = Window(
            address=self.servers[0].address,
            stream=self.stream,
            callers=callers,
            seconds=seconds,
            characters=CHARACTERS,
            audio_bytes=STREAM_BYTES if self.stream else UNARY_BYTES,
        )
        before = [server.cpu_seconds() for server in self.servers]
        tallies = load.run(window)
        after = [server.cpu_seconds() for server in self.servers]
        return Sample(tallies, [b - a for a, b in zip(before, after, strict=True)])


@dataclass(frozen=True, slots=True)
class Pair:
    """The same calls through Chorus and to the echo."""

    ours: Path
    echo: Path

    def measure(self, load: LoadGenerator, callers: int, seconds: float) -> tuple[Sample, Sample]:
        """Ours, and right before it the echo's."""
        echo = self.echo.measure(load, callers, seconds)
        return self.ours.measure(load, callers, seconds), echo


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--logs", action="store_true", help="show the servers' logs, which then costs them more")
    parser.add_argument("--load-processes", type=int, default=_default_load_processes(), help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no server is left behind
    size = TINY if args.tiny else QUICK if args.quick else FULL
    with ExitStack() as stack:
        load = LoadGenerator(stack, args.load_processes)
        calls, streams = _start(Servers(stack, logs=args.logs))
        figures = measure(load, calls, streams, size)
    report = _metadata(size, args.load_processes) | figures
    print(json.dumps(report) if args.json else _table(report))


def measure(load: LoadGenerator, calls: Pair, streams: Pair, size: Size) -> Figures:
    """The figures: medians over the rounds, after one short round that does not count, but for its errors."""
    warm_up = _round(load, calls, streams, Size(1, size.alone / 2, size.crowded / 2))
    rounds = [_round(load, calls, streams, size) for _ in range(size.rounds)]
    figures = {name: round(statistics.median(each[name] for each in rounds), 3) for name in warm_up}
    return figures | {"errors": sum(each["errors"] for each in (warm_up, *rounds))}


def _round(load: LoadGenerator, calls: Pair, streams: Pair, size: Size) -> Figures:
    one_call = calls.measure(load, 1, size.alone)
    one_stream = streams.measure(load, 1, size.alone)
    many_calls = calls.measure(load, CALLERS, size.crowded)
    many_streams = streams.measure(load, CALLERS, size.crowded)
    samples = (*one_call, *one_stream, *many_calls, *many_streams)
    return {
        **_overheads(one_call, one_stream),
        **_rates(many_calls, many_streams),
        **_costs(many_calls, many_streams),
        "errors": sum(sample.errors for sample in samples),
    }


def _overheads(calls: tuple[Sample, Sample], streams: tuple[Sample, Sample]) -> Figures:
    ours, echo = calls
    our_stream, echo_stream = streams
    return {
        "unary_overhead_ms_p50": ours.ms(0.5) - echo.ms(0.5),
        "unary_overhead_ms_p99": ours.ms(0.99) - echo.ms(0.99),
        "first_audio_overhead_ms_p50": our_stream.first_audio_ms(0.5) - echo_stream.first_audio_ms(0.5),
        "unary_ms_p50": ours.ms(0.5),
        "echo_unary_ms_p50": echo.ms(0.5),
        "first_audio_ms_p50": our_stream.first_audio_ms(0.5),
        "echo_first_audio_ms_p50": echo_stream.first_audio_ms(0.5),
    }


def _rates(calls: tuple[Sample, Sample], streams: tuple[Sample, Sample]) -> Figures:
    ours, echo = calls
    our_stream, echo_stream = streams
    megabytes = STREAM_BYTES / 1e6
    return {
        "calls_per_s": ours.calls_per_second,
        "echo_calls_per_s": echo.calls_per_second,
        "stream_mb_per_s": our_stream.calls_per_second * megabytes,
        "echo_stream_mb_per_s": echo_stream.calls_per_second * megabytes,
        "load_cpu_share": ours.load_cpu_share,
        "echo_load_cpu_share": echo.load_cpu_share,
        "stream_load_cpu_share": our_stream.load_cpu_share,
        "echo_stream_load_cpu_share": echo_stream.load_cpu_share,
    }


def _costs(calls: tuple[Sample, Sample], streams: tuple[Sample, Sample]) -> Figures:
    ours, echo = calls
    our_stream, echo_stream = streams
    figures = {
        "gateway_cpu_us_per_call": ours.cpu_us(0),
        "service_cpu_us_per_call": ours.cpu_us(1),
        "echo_cpu_us_per_call": echo.cpu_us(0),
        "gateway_cpu_us_per_stream": our_stream.cpu_us(0),
        "service_cpu_us_per_stream": our_stream.cpu_us(1),
        "echo_cpu_us_per_stream": echo_stream.cpu_us(0),
    }
    ratios = {}
    for server in ("gateway", "service"):
        for infix, kind in (("", "call"), ("_stream", "stream")):
            echo_us = max(figures[f"echo_cpu_us_per_{kind}"], 1e-3)
            ratios[f"{server}{infix}_cpu_ratio"] = figures[f"{server}_cpu_us_per_{kind}"] / echo_us
    return figures | ratios


def _start(servers: Servers) -> tuple[Pair, Pair]:
    """All servers, ready: those for calls and those for streams, which differ in how long their engine speaks."""
    unary, stream = _settings(UNARY_STEPS), _settings(STREAM_STEPS)
    chunk_bytes = stream.batcher.max_steps_per_tick * BYTES_PER_STEP
    sizes = {"--unary-bytes": UNARY_BYTES, "--stream-bytes": STREAM_BYTES, "--chunk-bytes": chunk_bytes}
    echo = servers.echo([f"{name}={size}" for name, size in sizes.items()])
    services = [servers.product("service", settings) for settings in (unary, stream)]
    gateways = [servers.product("gateway", settings) for settings in (unary, stream)]
    for server in (echo, *services, *gateways):
        server.wait_until_it_answers()
    calls, streams = (
        Pair(Path([gateway, service], is_stream), Path([echo], is_stream))
        for gateway, service, is_stream in zip(gateways, services, (False, True), strict=True)
    )
    return calls, streams


def _settings(steps: int) -> Settings:
    """A gateway and a service whose engine makes so many steps of a text, in no time."""
    service = free_address()
    return load_settings(
        [
            "engine=tone",
            f"tone.steps_per_character={steps / CHARACTERS}",
            f"service.listen={service}",
            f"service.metrics_listen={free_address()}",
            f"gateway.listen={free_address()}",
            f"gateway.metrics_listen={free_address()}",
            f"gateway.backends={service}",
            "limiter.requests_per_second=1000000",
            "log.level=info",
            "log.format=json",
        ]
    )


def _metadata(size: Size, load_processes: int) -> dict[str, str | float]:
    return metadata() | {"grpcio": grpc.__version__, "load_processes": load_processes, "rounds": size.rounds}


def _default_load_processes() -> int:
    return max(1, (os.cpu_count() or 1) // 2)


def _table(report: Mapping[str, str | float]) -> str:
    lines = [f"{name:<32} {value:>28}" for name, value in report.items()]
    busy = [name for name, value in report.items() if name.endswith("load_cpu_share") and float(value) > BUSY_SHARE]
    if busy:
        lines.append(f"the load generator had no rest ({', '.join(busy)}): these rates are no limits of the servers")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
