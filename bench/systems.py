"""The batchers that are compared: what they need, how they start, and the machine that they have one at a time."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from bench.offered import COMPRESSION, FIRST_CHUNK_SECONDS, ROWS, Arrival, costs, trace
from bench.open_loop import End, Load, OpenLoop, Tally, Target
from bench.processes import START_SECONDS, Server, Servers, free_address
from common.settings import BatcherSettings, Settings, load_settings

PROBE_SEED, SATURATION_SEED = 901, 902
SATURATING_CALLERS = ROWS + 8


@dataclass(frozen=True, slots=True)
class Knobs:
    """What every batcher of whole utterances has to be told."""

    rows: int = ROWS
    """In a batch, at most."""
    wait_ms: float = 5.0
    """How long a batch that isn't full waits for more."""

    @property
    def options(self) -> list[str]:
        """For its command line."""
        return [f"--rows={self.rows}", f"--wait-ms={self.wait_ms}"]


@dataclass(frozen=True, slots=True)
class System:
    """A batcher."""

    name: str
    kind: Literal["ours", "whole", "continuous", "reference"]
    """A `reference` is continuous too, and nobody's product."""
    packages: Sequence[str] = ()
    """That it needs."""
    path: str | None = None
    """If it speaks HTTP."""
    options: Sequence[str] = ()

    @property
    def module(self) -> str:
        """Its server."""
        return f"bench.rivals.{self.name.removesuffix('_bounded')}_server"

    @property
    def missing(self) -> list[str]:
        """Packages that aren't installed."""
        needed = [*self.packages, *(["aiohttp"] if self.path else [])]
        return [name for name in needed if importlib.util.find_spec(name) is None]


SYSTEMS = (
    System("chorus", "ours"),
    System("mosec", "whole", ["mosec"], path="/inference"),
    System("litserve", "whole", ["litserve"], path="/predict"),
    System("litserve_continuous", "continuous", ["litserve"], path="/predict"),
    System("batched", "whole", ["batched"]),
    System("triton_like", "whole"),
)
REFERENCES = (
    System("fifo_continuous", "reference"),
    System(
        "litserve_continuous_bounded",
        "reference",
        ["litserve"],
        path="/predict",
        options=[f"--calls={SATURATING_CALLERS}"],
    ),
)


class Running:
    """A server that runs, or is stopped to leave the machine to another."""

    def __init__(self, server: Server, load: OpenLoop, path: str | None) -> None:
        self._server = server
        self._load = load
        self._target = Target(server.address, path)

    def measure(self, arrivals: Sequence[Arrival], judged_until: float, patience: float) -> tuple[Tally, float]:
        """Lets it run for a trace. Also returns the cores that it used, on average."""
        self._go_on()
        before = self._server.cpu_seconds()
        tally = self._load.run(Load(self._target, arrivals, judged_until=judged_until, patience=patience))
        used = self._server.cpu_seconds() - before
        self.stop()
        return tally, used / tally.seconds

    def saturate(self, seconds: float) -> float:
        """Audio seconds a second while there are always more callers than rows; the first third is to warm up."""
        self._go_on()
        arrivals = trace(SATURATION_SEED, rate=1000.0, seconds=seconds)
        load = Load(self._target, arrivals, callers=SATURATING_CALLERS, seconds=seconds)
        outcomes = self._load.run(load).outcomes
        self.stop()
        made = [o.heard for o in outcomes if o.end is End.COMPLETE and seconds / 3 <= o.due + o.total < seconds]
        return sum(made) / (seconds * 2 / 3)

    def wait_until_ready(self) -> None:
        """Asks it to speak until it does; then it has also done what it was asked for before.

        Raises:
            RuntimeError: it died, or did not speak in time.
        """
        (probe,) = trace(PROBE_SEED, rate=1.0, seconds=100.0, streams=0.0)[:1]
        deadline = time.monotonic() + START_SECONDS
        while self._server.process.poll() is None and time.monotonic() < deadline:
            tally = self._load.run(Load(self._target, [probe], callers=1, seconds=START_SECONDS))
            if tally.outcomes and tally.outcomes[0].heard:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self._server.name} does not answer; run again with --logs to see why")

    def stop(self) -> None:
        """It gets no time from here on."""
        os.killpg(self._server.process.pid, signal.SIGSTOP)

    def _go_on(self) -> None:
        os.killpg(self._server.process.pid, signal.SIGCONT)
        self.wait_until_ready()


class Arena:
    """Starts servers, and makes the load."""

    def __init__(self, stack: ExitStack, logs: bool) -> None:
        """`stack`: ends all processes when it closes. `logs`: show what servers write."""
        self._stack = stack
        self._logs = logs
        self._load = OpenLoop(stack)

    def start(self, system: System, knobs: Knobs, stack: ExitStack | None = None) -> Running:
        """A system that is not ready yet. `stack`: ends it earlier than the arena."""
        servers, settings = Servers(stack or self._stack, self._logs), _settings()
        if system.kind == "ours":
            server = servers.product("service", settings)
        else:
            server = servers.rival(system.module, [*knobs.options, *system.options], settings)
        return Running(server, self._load, system.path)

    def start_echo(self, http: bool, audio_bytes: int) -> Running:
        """A bare server of a transport that answers any call with so many bytes."""
        servers = Servers(self._stack, self._logs)
        if http:
            server = servers.rival("bench.rivals.http_echo", [f"--bytes={audio_bytes}"], _settings())
            return Running(server, self._load, "/")
        sizes = [f"--{name}-bytes={audio_bytes}" for name in ("unary", "stream", "chunk")]
        return Running(servers.echo(sizes), self._load, None)


def _settings() -> Settings:
    """Chorus's, of which rivals have those of the engine. What is a time in them is compressed as all times are."""
    settings = load_settings(
        [
            "engine=tone",
            f"service.listen={free_address()}",
            f"service.metrics_listen={free_address()}",
            "log.level=info",
            "log.format=json",
        ]
    )
    return settings.model_copy(update={"tone": costs(), "batcher": _compressed(settings.batcher)})


def _compressed(batcher: BatcherSettings) -> BatcherSettings:
    """The defaults, but for the limit to the wait for first audio, which is what is promised here."""
    seconds = (
        "max_delay",
        "outbox_seconds",
        "patience",
        "first_audio_patience",
        "batch_patience",
        "reserve",
        "prefill_seconds",
    )
    changed: dict[str, float] = {name: getattr(batcher, name) / COMPRESSION for name in seconds}
    steps = ("first_block_steps", "block_steps")
    changed |= {name: round(getattr(batcher, name) / COMPRESSION) for name in steps}
    return batcher.model_copy(update=changed | {"first_audio_limit": FIRST_CHUNK_SECONDS / COMPRESSION})
