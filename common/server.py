"""The frame of a gRPC server: options, health, reflection, and a drain that loses nothing."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, cast

import grpc
import grpc.aio
import uvloop
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc import error_details_pb2  # noqa: F401 (so that reflection can resolve the details of errors)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as aio_health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from common import metrics
from common.calls import CallFrame, Identify
from common.errors import StartupError
from common.logs import logger
from common.process import SWITCH_SECONDS, calm_garbage_collector
from common.settings import LimitSettings, Settings
from common.tls import server_credentials

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
KEEPALIVE_PERMITTED_MS = 5_000
"""Clients may ping this often; gRPC's default of 5 minutes would close the connection of one that pings each 30 s."""


class Server:
    """A gRPC server with what belongs to every one of ours. It is NOT_SERVING until `set_serving`."""

    def __init__(
        self,
        settings: Settings,
        services: Iterable[str],
        identify: Identify,
        *,
        reflection: bool = True,
        keyed: tuple[str, ...] = (),
    ) -> None:
        """Is ready to listen.

        Args:
            settings: its limits and certificates.
            services: full names of the services that will be registered with `methods`.
            identify: whose calls they are.
            reflection: whether it is served.
            keyed: prefixes of health's and reflection's methods that are for callers who can be identified.

        Raises:
            StartupError: the certificates cannot be read.
        """
        self._credentials = server_credentials(settings.tls)
        self._frame = CallFrame(identify, settings.limits.concurrent_calls, settings.debug, keyed)
        self.methods = cast("grpc.aio.Server", self._frame)
        """What services are registered with, as if it were the server."""
        self.grpc = grpc.aio.server(handlers=[self._frame], options=server_options(settings.limits))
        self._services = tuple(services)
        self._health = aio_health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.methods)
        if reflection:
            _add_reflection(self.methods, self._services)
        self._stop_signals: asyncio.Queue[signal.Signals] = asyncio.Queue()

    async def set_serving(self, serving: bool) -> None:
        """Tells health checks, overall and for each service. After a drain has begun it changes nothing."""
        for service in ("", *self._services):
            await self._health.set(service, SERVING if serving else NOT_SERVING)

    async def start(self, address: str) -> None:
        """Listens.

        Raises:
            StartupError: the address is taken or means nothing.
        """
        loop = asyncio.get_running_loop()
        metrics.TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
        await self.set_serving(False)
        try:
            if self._credentials is None:
                port = self.grpc.add_insecure_port(address)
            else:
                port = self.grpc.add_secure_port(address, self._credentials)
        except RuntimeError:
            raise StartupError(f"cannot listen on {address}: is another process there?") from None
        await self.grpc.start()
        logger().info("listening", address=address, port=port, tls=self._credentials is not None)

    def stop_soon(self) -> None:
        """Begins a drain as SIGINT does."""
        self._stop_signals.put_nowait(signal.SIGINT)

    async def wait_for_drain(self, drain_seconds: float, grace_seconds: float) -> None:
        """Waits for a signal, then drains.

        SIGTERM: NOT_SERVING, go on accepting for `drain_seconds` while balancers notice, then let running calls finish
        for at most `grace_seconds`. SIGINT comes from a person: no wait for balancers. A second signal ends each wait.
        """
        # Not earlier: until a process serves there is nothing to drain, and a signal may just end it.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_signals.put_nowait, number)
        number = await self._stop_signals.get()
        logger().info("draining", signal=number.name)
        await self._health.enter_graceful_shutdown()
        if number is signal.SIGTERM:
            await self._wait_for_signal(drain_seconds)
        stopping = asyncio.create_task(self.grpc.stop(grace_seconds))
        # Health watches and reflection have no end of their own: they need not be waited for.
        idle = asyncio.create_task(self._frame.idle())
        impatience = asyncio.create_task(self._stop_signals.get())
        await asyncio.wait({stopping, idle, impatience}, return_when=asyncio.FIRST_COMPLETED)
        impatience.cancel()
        idle.cancel()
        if not stopping.done():
            await self.grpc.stop(0)
        await stopping
        logger().info("stopped")

    async def _wait_for_signal(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop_signals.get(), seconds)
        except TimeoutError:
            return


def server_options(limits: LimitSettings) -> list[tuple[str, int]]:
    """The options of a server in gRPC's own names."""
    return [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", limits.message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_PERMITTED_MS),
        # A caller whose machine has vanished gives its place back.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A caller who sends faster than it is read waits in its own memory, not in ours.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 65_536),
        # A second process on the same port would silently take half of the connections.
        ("grpc.so_reuseport", 0),
    ]


def run(main: Coroutine[None, None, None]) -> None:
    """Runs a process's main coroutine on uvloop."""
    # An engine's thread shares the interpreter with the event loop: at the default of 5 ms each waits for the other.
    sys.setswitchinterval(SWITCH_SECONDS)
    calm_garbage_collector()
    uvloop.run(main)


def _describe_reflection_v1() -> None:
    """Makes v1 known to reflection itself. Its schema is v1alpha's under another name."""
    v1 = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1)
    v1.name, v1.package = "grpc/reflection/v1/reflection.proto", "grpc.reflection.v1"
    fields = (field for message in v1.message_type for field in message.field if field.type_name)
    methods = (method for service in v1.service for method in service.method)
    for field in fields:
        field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
    for method in methods:
        method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
        method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
    descriptor_pool.Default().Add(v1)


class _Symbols:
    """The descriptors of this process for reflection. Their own pool does not find a method by its name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(descriptor_pool.Default(), name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 (the pool's name)
        """The file that has a message, an enum, a service or a method."""
        pool = descriptor_pool.Default()
        with suppress(KeyError):
            return pool.FindMethodByName(symbol).containing_service.file
        return pool.FindFileContainingSymbol(symbol)


def _add_reflection(server: grpc.aio.Server, services: tuple[str, ...]) -> None:
    """Serves reflection under both names: newer clients ask for v1 first. The messages are the same."""
    _describe_reflection_v1()
    names = (*services, "grpc.health.v1.Health", reflection.SERVICE_NAME, REFLECTION_V1)
    symbols: Any = _Symbols()
    servicer = reflection.aio.ReflectionServicer(names, symbols)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": handler}
    for name in (reflection.SERVICE_NAME, REFLECTION_V1):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
