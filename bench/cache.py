"""What a hit costs, in memory and from the store; what is made once for many; what of an engine's time is saved.

    python -m bench.cache [--quick] [--json]

Real Valkey, gateways as processes, 50 callers, the tone engine; a bare gRPC echo answers the same sizes in the same
run, in alternating rounds (medians). `l1_hit_rps` is a gateway with the texts in memory, `redis_hit_rps` one that keeps
nothing in memory; `hit_p99_ms` is at half of the rate of `l1_hit_rps`, from the moment at which a call was due.

`segments`: texts that are spoken while they are written, to a service that has to make them, has made them, or finds
in the store what another service has made.

`zipf`: the article's traffic (60 % repeats), open loop, through two gateways; beside it, on the same trace and
simulated, no cache, a cache without flights, and the article's design (a Bloom filter, then GET: a text is kept when it
comes the second time). `reachable`: each different text is made once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import grpc.aio

from bench.limiter import Store
from bench.load import RAW, LoadGenerator, Window
from bench.path import BYTES_PER_STEP, CALLERS, Sample
from bench.processes import Server, Servers, free_address
from bench.report import metadata, quantile
from common.settings import load_settings
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

SIZES = {"30KB": 30, "300KB": 300}
"""Steps, which are KiB and characters."""
POOL = 20
"""Hot texts of each size."""
REPEATS = 0.6
ZIPF = 1.1
SPEECH_CHARACTERS = 60
STEP_MS = 5.0
"""Of the engine that is shared: a speech takes about 0.3 s."""
JOINERS = 200
GREETING = "Good morning, and thank you for calling us today. "

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Size:
    """How long to measure. Times are in seconds."""

    rounds: int
    window: float
    calls: int
    """Of the traffic with repeats."""
    rate: float
    joiners: int = JOINERS
    dialogues: int = 20


TINY = Size(1, 0.3, 60, 60.0, 20, 2)
QUICK = Size(3, 1.5, 2000, 150.0)
FULL = Size(6, 3.0, 6000, 150.0)


class Fleet:
    """All servers."""

    def __init__(self, servers: Servers, store: Store) -> None:
        self._servers, self._store = servers, store
        self.free = self._service(0.0)
        self.memory, self.other = self._gateway(self.free, []), self._gateway(self.free, [])
        self.redis = self._gateway(self.free, ["cache.memory_bytes=1"])
        self.without = self._gateway(self.free, ["cache.enabled=false"])
        self.busy = self._service(STEP_MS)
        self.pair = [self._gateway(self.busy, []) for _ in range(2)]
        self.second = self._service(STEP_MS)
        self.before_second = self._gateway(self.second, [])
        self.echoes = {
            name: servers.echo([f"--unary-bytes={kib * BYTES_PER_STEP}", "--stream-bytes=1024", "--chunk-bytes=1024"])
            for name, kib in SIZES.items()
        }
        gateways = (self.memory, self.other, self.redis, self.without, *self.pair, self.before_second)
        for server in (*self.echoes.values(), *gateways):
            server.wait_until_it_answers()

    def made(self, service: Server | None = None) -> float:
        """Speeches that a service has made, or segments; without one the busy service."""
        return _metrics(self._metrics[(service or self.busy).address])["chorus_batcher_submitted_total"]

    def _service(self, step_ms: float) -> Server:
        address, metrics = free_address(), free_address()
        self._metrics = getattr(self, "_metrics", {}) | {address: metrics}
        return self._start(
            "service",
            [
                f"service.listen={address}",
                f"service.metrics_listen={metrics}",
                "tone.steps_per_character=1",
                f"tone.step_base_ms={step_ms}",
                "tone.slots=256",
                "batcher.max_delay=3600",
                "batcher.first_audio_limit=3600",
            ],
        )

    def _gateway(self, service: Server, more: list[str]) -> Server:
        return self._start(
            "gateway",
            [
                f"gateway.listen={free_address()}",
                f"gateway.metrics_listen={free_address()}",
                f"gateway.backends={service.address}",
                "limiter.requests_per_second=1000000",
                *more,
            ],
        )

    def _start(self, package: str, settings: list[str]) -> Server:
        store = [f"store.ledger={self._store.url}"]
        return self._servers.product(package, load_settings(["engine=tone", *store, *settings]))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about two minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--logs", action="store_true", help="show the servers' logs")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    size = TINY if args.tiny else QUICK if args.quick else FULL
    with ExitStack() as stack:
        loads = [LoadGenerator(stack, 1) for _ in range(2)]
        fleet = Fleet(Servers(stack, logs=args.logs), Store(stack))
        figures = measure(fleet, loads, size)
        figures |= asyncio.run(coalesce(fleet, size.joiners))
        figures |= asyncio.run(segments(fleet, size.dialogues))
        figures |= asyncio.run(traffic(fleet, size))
    report = metadata() | {"rounds": size.rounds} | {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps(report) if args.json else "\n".join(f"{name:<32} {value}" for name, value in report.items()))


# --- hits


def measure(fleet: Fleet, loads: list[LoadGenerator], size: Size) -> Figures:
    """Rates of hits beside the echo: medians over rounds, after one that fills what is to be hit."""
    _round(fleet, loads, size.window)
    rounds = [_round(fleet, loads, size.window) for _ in range(size.rounds)]
    figures = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return figures | {"errors": sum(each["errors"] for each in rounds)}


def _round(fleet: Fleet, loads: list[LoadGenerator], seconds: float) -> Figures:
    figures: Figures = {"errors": 0.0}
    load = loads[0]
    for name, kib in SIZES.items():
        echo = _hits(fleet.echoes[name], load, kib, seconds)
        memory = _hits(fleet.memory, load, kib, seconds)
        redis = _hits(fleet.redis, load, kib, seconds)
        calm = _hits(fleet.memory, load, kib, seconds, rate=memory.calls_per_second / 2)
        both = _both_hit([fleet.memory, fleet.other], loads, kib, seconds)
        figures |= {
            f"echo_rps.{name}": echo.calls_per_second,
            f"l1_hit_rps.{name}": memory.calls_per_second,
            f"l1_hit_rps_2_gateways.{name}": sum(sample.calls_per_second for sample in both),
            f"redis_hit_rps.{name}": redis.calls_per_second,
            f"l1_share_of_echo.{name}": memory.calls_per_second / echo.calls_per_second,
            f"redis_share_of_echo.{name}": redis.calls_per_second / echo.calls_per_second,
            f"hit_p99_ms.{name}": calm.ms(0.99),
            f"l1_hit_cpu_us.{name}": memory.cpu_us(0),
        }
        figures["errors"] += sum(sample.errors for sample in (echo, memory, redis, calm, *both))
    with_cache = _hits(fleet.memory, load, 4, seconds, pool=0)
    without = _hits(fleet.without, load, 4, seconds, pool=0)
    return figures | {"miss_overhead_us": with_cache.cpu_us(0) - without.cpu_us(0)}


def _hits(
    server: Server,
    load: LoadGenerator,
    kib: int,
    seconds: float,
    *,
    callers: int = CALLERS,
    pool: int = POOL,
    rate: float = 0.0,
) -> Sample:
    window = Window(server.address, False, callers, seconds, kib, kib * BYTES_PER_STEP, pool=pool, rate=rate)
    before = server.cpu_seconds()
    tallies = load.run(window)
    return Sample(tallies, [server.cpu_seconds() - before])


def _both_hit(servers: list[Server], loads: list[LoadGenerator], kib: int, seconds: float) -> list[Sample]:
    """At two gateways at once, half of the callers at each."""
    with ThreadPoolExecutor(len(servers)) as pool:
        pairs = zip(servers, loads, strict=True)
        return list(pool.map(lambda pair: _hits(pair[0], pair[1], kib, seconds, callers=CALLERS // 2), pairs))


# --- flights


async def coalesce(fleet: Fleet, joiners: int) -> Figures:
    """Many callers of one text over two gateways, and one who comes late."""
    speeches = fleet.made()
    text = "好" * (4 * SPEECH_CHARACTERS)
    async with (
        grpc.aio.insecure_channel(fleet.pair[0].address) as one,
        grpc.aio.insecure_channel(fleet.pair[1].address) as other,
    ):
        stubs = [tts_pb2_grpc.TextToSpeechServiceStub(channel) for channel in (one, other)]
        calls = [asyncio.create_task(_first_audio(stubs[number % 2], text)) for number in range(joiners)]
        await asyncio.sleep(0.5)
        late = await _first_audio(stubs[0], text)
        times = await asyncio.gather(*calls)
    return {
        "coalesce.callers": joiners,
        "coalesce.engine_runs": fleet.made() - speeches,
        "coalesce.first_audio_ms_p50": quantile(times, 0.5) * 1000,
        "coalesce.first_audio_spread_ms": (quantile(times, 0.95) - quantile(times, 0.05)) * 1000,
        "late_join_first_audio_ms": late * 1000,
    }


async def _first_audio(stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub, text: str) -> float:
    """Seconds until its first audio; it hears all."""
    began, first = time.perf_counter(), 0.0
    async for reply in stub.StreamSynthesize(tts_pb2.StreamSynthesizeRequest(text=text, format=RAW), timeout=120):
        if reply.chunk.data and not first:
            first = time.perf_counter() - began
    return first


# --- texts that are spoken while they are written


async def segments(fleet: Fleet, dialogues: int) -> Figures:
    """The first audio of dialogues, one after the other: made, in the service's memory, and in the store."""
    times: dict[str, list[float]] = {"made": [], "memory": [], "store": []}
    runs = fleet.made(fleet.second)
    async with (
        grpc.aio.insecure_channel(fleet.pair[0].address) as one,
        grpc.aio.insecure_channel(fleet.before_second.address) as other,
    ):
        here, there = (tts_pb2_grpc.TextToSpeechServiceStub(channel) for channel in (one, other))
        for seed in range(dialogues):
            for name, stub in (("made", here), ("memory", here), ("store", there)):
                times[name].append(await _first_of_dialogue(stub, seed))
    figures = {f"segments.{name}_first_audio_ms": statistics.median(each) * 1000 for name, each in times.items()}
    return figures | {"segments.engine_runs_elsewhere": fleet.made(fleet.second) - runs}


async def _first_of_dialogue(stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub, seed: int) -> float:
    """Seconds until its first audio; it hears all."""

    async def written() -> AsyncGenerator[tts_pb2.StreamSynthesizeTextRequest, None]:
        sampling = tts_pb2.Sampling(seed=seed)
        config = tts_pb2.StreamConfig(language="en-US", format=RAW, sampling=sampling)
        yield tts_pb2.StreamSynthesizeTextRequest(config=config)
        yield tts_pb2.StreamSynthesizeTextRequest(text=GREETING)

    began, first = time.perf_counter(), 0.0
    async for reply in stub.StreamSynthesizeText(written(), timeout=120):
        if reply.chunk.data and not first:
            first = time.perf_counter() - began
    return first


# --- traffic


async def traffic(fleet: Fleet, size: Size) -> Figures:
    """The article's repeats, open loop."""
    trace = repeats(size.calls, random.Random(9))
    made = fleet.made()
    errors = 0
    statuses: list[int] = []

    async def call(stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub, text: int) -> None:
        nonlocal errors
        request = tts_pb2.SynthesizeRequest(text=_text(text), format=RAW)
        try:
            statuses.append((await stub.Synthesize(request, timeout=120)).start.cache_status)
        except grpc.aio.AioRpcError:
            errors += 1

    async with (
        grpc.aio.insecure_channel(fleet.pair[0].address) as one,
        grpc.aio.insecure_channel(fleet.pair[1].address) as other,
        asyncio.TaskGroup() as group,
    ):
        stubs = [tts_pb2_grpc.TextToSpeechServiceStub(channel) for channel in (one, other)]
        for number, text in enumerate(trace):
            group.create_task(call(stubs[number % 2], text))
            await asyncio.sleep(1 / size.rate)
    reachable = 1 - len(set(trace)) / len(trace)
    saved = 1 - (fleet.made() - made) / len(trace)  # all speeches are equally long
    speech_seconds = SPEECH_CHARACTERS * STEP_MS / 1000
    return {
        "zipf.errors": errors,
        "zipf.hit_rate": statuses.count(tts_pb2.CACHE_STATUS_HIT) / max(1, len(statuses)),
        "zipf.coalesced_rate": statuses.count(tts_pb2.CACHE_STATUS_COALESCED) / max(1, len(statuses)),
        "zipf.gpu_seconds_saved": saved,
        "zipf.reachable": reachable,
        "zipf.share_of_reachable": saved / reachable,
        "zipf.no_cache_saved": 0.0,
        "zipf.cache_without_flights_saved": simulated(trace, size.rate, speech_seconds, sights=1),
        "zipf.bloom_and_get_saved": simulated(trace, size.rate, speech_seconds, sights=2),
    }


def repeats(count: int, chance: random.Random) -> list[int]:
    """Texts by number: 40 % are new, the others come again, the popular ones more often (Zipf)."""
    trace: list[int] = []
    fresh = 0
    for _ in range(count):
        if not fresh or chance.random() >= REPEATS:
            trace.append(fresh)
            fresh += 1
        else:
            rank = min(fresh - 1, int(chance.paretovariate(ZIPF - 0.1)) - 1)
            trace.append(rank)
    return trace


def simulated(trace: Sequence[int], rate: float, speech_seconds: float, *, sights: int) -> float:
    """The share of speeches that a cache without flights saves, which keeps a text that was made so many times."""
    made: dict[int, int] = {}
    kept_at: dict[int, float] = {}
    runs = 0
    for number, text in enumerate(trace):
        now = number / rate
        if text in kept_at and kept_at[text] <= now:
            continue
        runs += 1
        made[text] = made.get(text, 0) + 1
        if made[text] == sights:
            kept_at[text] = now + speech_seconds
    return 1 - runs / len(trace)


def _text(number: int) -> str:
    return f"{number:06d} ".ljust(SPEECH_CHARACTERS, "x")


def _metrics(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


if __name__ == "__main__":
    main()
