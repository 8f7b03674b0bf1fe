"""`chorus up`: stores, services and a gateway, as processes of their own, started and stopped together."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from rich.console import Console

from client.embedded import Embedded, embedded
from common.errors import StartupError
from common.settings import Settings, environment

READY_SECONDS = 180.0
POLL_SECONDS = 0.05
STOP_SECONDS = 90.0
FIRST_BACKOFF = 0.5
CALM_SECONDS = 60.0
"""Who has lived so long starts again as at the first time."""
LONGEST_BACKOFF = 10.0


@dataclass(slots=True)
class Child:
    """One of our processes."""

    role: str
    address: str
    variables: Mapping[str, str]
    embedded: Embedded | None = None
    """A store, and no process of ours."""
    tls: bool = False
    """It tells its health to those only whom it believes: that it listens must do."""
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0

    async def start(self) -> None:
        """Starts it, in a session of its own, so that Ctrl-C reaches us alone."""
        ours = (sys.executable, "-m", "client.cli", self.role, "--exit-with-parent", str(os.getpid()))
        self.process = await asyncio.create_subprocess_exec(
            *(ours if self.embedded is None else self.embedded.command()),
            env={**os.environ, **self.variables},
            start_new_session=True,
        )

    async def stop(self) -> None:
        """Asks it to finish and, if it does not in time, ends it."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    def kill(self) -> None:
        """Ends it at once."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()


async def up(settings: Settings, cards: int, console: Console, then: Callable[[], Awaitable[None]]) -> None:
    """Starts everything, does `then` once it serves, and runs until a signal. What dies is started again.

    Raises:
        StartupError: a process did not come up.
    """
    with embedded(settings) as stores:
        await _run(plan(settings, cards, stores), console, then)


async def _run(children: Children, console: Console, then: Callable[[], Awaitable[None]]) -> None:
    for child in children.all:
        _check_free(child)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop_or_kill, stop, children.all)
    try:
        for child in children.all:
            await child.start()
        await _until_stopped(_wait_until_ready(children.all), stop)
        if not stop.is_set():
            await _until_stopped(then(), stop)
        watchers = [asyncio.create_task(_keep_alive(child, stop, console)) for child in children.all]
        await stop.wait()
        for watcher in watchers:
            watcher.cancel()
    finally:
        # Callers first see the gateway finish their calls; only then do the services go, and what it wrote last.
        await children.gateway.stop()
        await asyncio.gather(*(service.stop() for service in children.services))
        await asyncio.gather(*(store.stop() for store in children.stores))


@dataclass(frozen=True)
class Children:
    """All of them."""

    stores: list[Child]
    services: list[Child]
    gateway: Child

    @property
    def all(self) -> list[Child]:
        """In the order in which they start."""
        return [*self.stores, *self.services, self.gateway]


def plan(settings: Settings, cards: int, stores: Sequence[Embedded]) -> Children:
    """The processes for so many cards: services on consecutive ports, and the gateway in front of them."""
    known = environment(settings) | {f"CHORUS_STORE_{store.name.upper()}": store.url for store in stores}
    services = []
    for card in range(cards):
        address = _shifted(settings.service.listen, card)
        variables = known | {
            "CHORUS_SERVICE_LISTEN": address,
            "CHORUS_SERVICE_METRICS_LISTEN": _shifted(settings.service.metrics_listen, card),
        }
        if cards > 1:
            variables |= {"CHORUS_TONE_CARD": str(card), "CUDA_VISIBLE_DEVICES": str(card)}
        services.append(Child("service", address, variables, tls=settings.tls.certificate is not None))
    backends = ",".join(service.address for service in services)
    gateway = Child(
        "gateway",
        settings.gateway.listen,
        known | {"CHORUS_GATEWAY_BACKENDS": backends},
        tls=settings.tls.certificate is not None,
    )
    return Children([Child(store.name, f"unix:{store.socket}", {}, store) for store in stores], services, gateway)


def _check_free(child: Child) -> None:
    """Whoever is there already would answer in the child's place.

    Raises:
        StartupError: the child's address is taken.
    """
    if child.address.startswith("unix:"):
        return
    host, _, port = child.address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            pass
    except OSError:
        return
    raise StartupError(f"cannot start the {child.role} on {child.address}: is another process there?")


def _shifted(address: str, by: int) -> str:
    if address.startswith("unix:"):
        return address if by == 0 else f"{address}.{by}"
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + by}"


def _stop_or_kill(stop: asyncio.Event, children: list[Child]) -> None:
    """The first signal asks, the second insists."""
    if stop.is_set():
        for child in children:
            child.kill()
    stop.set()


async def _until_stopped(work: Awaitable[None], stop: asyncio.Event) -> None:
    """Does some work, unless it is stopped first."""
    working = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not working.done():
        working.cancel()
        return
    await working


async def _wait_until_ready(children: list[Child]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    for child in children:
        if child.embedded is not None:
            while not await asyncio.to_thread(_answers, child.embedded):
                _check_in_time(child, children, deadline)
                await asyncio.sleep(POLL_SECONDS)
            continue
        if child.tls:
            while not await asyncio.to_thread(_is_there, child.address):
                _check_in_time(child, children, deadline)
                await asyncio.sleep(POLL_SECONDS)
            continue
        async with grpc.aio.insecure_channel(
            child.address, options=[("grpc.max_reconnect_backoff_ms", 200)]
        ) as channel:
            while not await _is_serving(channel):
                _check_in_time(child, children, deadline)
                await asyncio.sleep(POLL_SECONDS)


def _check_in_time(child: Child, children: list[Child], deadline: float) -> None:
    _check_alive(children)
    if time.monotonic() > deadline:
        raise StartupError(f"the {child.role} on {child.address} did not come up in {READY_SECONDS:.0f} s")


def _is_there(address: str) -> bool:
    if address.startswith("unix:"):
        return Path(address.removeprefix("unix:")).exists()
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
        return True
    return False


def _answers(store: Embedded) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(str(store.socket))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")  # not while it still reads what it wrote down
    except OSError:
        return False


async def _is_serving(channel: grpc.aio.Channel) -> bool:
    # By name: the typed stub of the health package has no methods.
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        reply = await check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAUTHENTICATED  # it answers, and tells strangers no more
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _check_alive(children: list[Child]) -> None:
    for child in children:
        if child.process is not None and child.process.returncode is not None:
            raise StartupError(f"the {child.role} on {child.address} ended at its start; what it said is above")


async def _keep_alive(child: Child, stop: asyncio.Event, console: Console) -> None:
    """Starts a process again whenever it ends by itself, more slowly each time that it did not live long."""
    while not stop.is_set():
        assert child.process is not None
        since = time.monotonic()
        code = await child.process.wait()
        if stop.is_set():
            return
        if time.monotonic() - since > CALM_SECONDS:
            child.restarts = 0
        delay = min(FIRST_BACKOFF * 2**child.restarts, LONGEST_BACKOFF)
        console.print(f"[red]the {child.role} on {child.address} ended ({code}); it starts again in {delay:g} s[/red]")
        await asyncio.sleep(delay)
        child.restarts += 1
        await child.start()
