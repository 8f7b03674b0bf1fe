"""Real processes for tests: services and gateways on free ports, that can be signalled, killed and looked into."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self

import grpc.aio
from grpc_health.v1 import health_pb2

from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

ROOT = Path(__file__).parents[1]
START_SECONDS = 30.0
PORTS = 1_000
POLL_SECONDS = 0.02


def free_port() -> int:
    """A port that nobody uses, and that no socket is given which asks for any."""
    with socket.socket() as listener:
        while True:
            port = next(_ports)
            with suppress(OSError):
                listener.bind(("127.0.0.1", port))
                return port


def _own_ports() -> Iterator[int]:
    """Every fourth of this worker of the tests, below what Linux gives to sockets that ask for any.

    Those between are for further cards of the same machine, which take the next ports.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    first = 12_000 + worker % 16 * PORTS
    # Two runs of the tests at once begin at different ones.
    return (first + 4 * number % PORTS for number in count(os.getpid()))


_ports = _own_ports()


@dataclass
class Server:
    """A service or gateway that runs."""

    role: str
    address: str
    metrics_address: str
    log_path: Path
    process: asyncio.subprocess.Process
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    def channel(self, **options: int) -> grpc.aio.Channel:
        """A channel of its own, closed with the server."""
        pairs = [(f"grpc.{name}", value) for name, value in options.items()]
        channel = grpc.aio.insecure_channel(self.address, options=[*pairs, ("grpc.use_local_subchannel_pool", 1)])
        self.channels.append(channel)
        return channel

    def stub(self, **options: int) -> tts_pb2_grpc.TextToSpeechServiceAsyncStub:
        """The main service on a channel of its own."""
        stub: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(self.channel(**options))
        return stub

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    async def wait(self, seconds: float = 30.0) -> int:
        """Its exit code, once it has ended."""
        return await asyncio.wait_for(self.process.wait(), seconds)

    async def health(self, service: str = "") -> int:
        """What its health check says now."""
        check = self.channel().unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        reply: health_pb2.HealthCheckResponse = await check(health_pb2.HealthCheckRequest(service=service), timeout=2)
        return reply.status

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, from its metrics endpoint."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert found, f"{name} is not shown"
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def log(self) -> list[dict[str, Any]]:
        """What it has logged."""
        lines = self.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def until_metric(self, name: str, value: float) -> None:
        """Waits until a metric has a value."""
        async with asyncio.timeout(START_SECONDS):
            while await asyncio.to_thread(self.metric, name) != value:
                await asyncio.sleep(POLL_SECONDS)

    async def until_healthy(self, seconds: float = START_SECONDS) -> Self:
        """Waits until it serves."""
        async with asyncio.timeout(seconds):
            while True:
                assert self.process.returncode is None, f"{self.role} ended:\n{self.log_path.read_text()}"
                try:
                    if await self.health() == health_pb2.HealthCheckResponse.SERVING:
                        return self
                except grpc.aio.AioRpcError:
                    pass
                await asyncio.sleep(POLL_SECONDS)


class Stack:
    """Starts processes, and kills them all in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: list[Server] = []

    async def service(self, *, wait: bool = True, **settings: object) -> Server:
        """A service, with the tone engine if not told otherwise. Settings as `section_name=value`."""
        return await self._start("service", {"engine": "tone"} | settings, wait)

    async def gateway(self, *backends: Server, wait: bool = True, **settings: object) -> Server:
        """A gateway in front of services."""
        addresses = ",".join(backend.address for backend in backends)
        return await self._start("gateway", {"gateway_backends": addresses} | settings, wait)

    async def pair(self, **settings: object) -> tuple[Server, Server]:
        """A service, and a gateway in front of it."""
        service = await self._start("service", {"engine": "tone"} | settings, wait=True)
        return service, await self._start("gateway", {"gateway_backends": service.address} | settings, wait=True)

    async def _start(self, role: str, settings: Mapping[str, object], wait: bool) -> Server:
        address, metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        fast = {f"{role}_listen": address, f"{role}_metrics_listen": metrics, f"{role}_drain_seconds": 0.3}
        environment = {f"CHORUS_{name.upper()}": str(value) for name, value in (fast | dict(settings)).items()}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CHORUS_")}
        log_path = self.folder / f"{role}-{len(self._servers)}.log"
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "client.cli", role, "--exit-with-parent", str(os.getpid())),
                cwd=ROOT,
                env=clean | environment | {"TMPDIR": str(self.folder), "XDG_STATE_HOME": str(self.folder)},
                stdout=log,
                stderr=log,
            )
        listening = str(settings.get(f"{role}_listen", address))
        server = Server(role, listening, metrics, log_path, process)
        self._servers.append(server)
        return await server.until_healthy() if wait else server

    async def close(self) -> None:
        """Kills what still runs."""
        for server in self._servers:
            for channel in server.channels:
                await channel.close()
            if server.process.returncode is None:
                server.process.kill()
                await server.process.wait()


@asynccontextmanager
async def running_stack(folder: Path) -> AsyncIterator[Stack]:
    """A stack that is killed in the end."""
    stack = Stack(folder)
    try:
        yield stack
    finally:
        await stack.close()


def text_request(text: str, **fields: Any) -> tts_pb2.SynthesizeRequest:
    """A request for raw samples."""
    raw = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)
    return tts_pb2.SynthesizeRequest(text=text, format=raw, **fields)


def stream_request(text: str, **fields: Any) -> tts_pb2.StreamSynthesizeRequest:
    """A request for a stream of raw samples."""
    raw = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)
    return tts_pb2.StreamSynthesizeRequest(text=text, format=raw, **fields)
