"""The gateway process: callers on one side, backends on the other, and the stores that gateways share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from pydantic import SecretStr

from audio.background import CORES
from audio.budget import Budget
from common.errors import StartupError
from common.logs import logger, set_up_logs
from common.metrics import BACKENDS_READY, serve_metrics, watch_encoders
from common.objects import Objects
from common.server import Server, run
from common.settings import GatewaySettings, Settings, is_loopback
from common.store import Store
from gateway.backends import open_channel, watch
from gateway.cache import Cache
from gateway.flights import Flights
from gateway.idempotency import Idempotency
from gateway.limiter import Limiter
from gateway.pipeline import Pipeline, internal_metadata
from gateway.revision import Revision
from gateway.servicer import JobServicer, Servicer
from gateway.speech import Speech
from gateway.tenants import Tenants
from gateway.transcoder import Transcoder
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc


def main(settings: Settings) -> None:
    """Runs a gateway until it is told to stop.

    Raises:
        StartupError: it cannot start.
    """
    set_up_logs(settings.log, "gateway")
    run(serve(settings))


async def serve(settings: Settings) -> None:
    """Serves until a signal. Health is SERVING while a backend is, whatever the stores do."""
    _check_listen(settings)
    tenants = Tenants(settings.gateway.tenants)
    serve_metrics(settings.gateway.metrics_listen)
    names = [service.full_name for service in tts_pb2.DESCRIPTOR.services_by_name.values()]
    server = Server(
        settings,
        names,
        tenants.identify,
        reflection=settings.gateway.reflection,
        keyed=tuple(_keyed(settings.gateway)),
    )
    encoders = Budget(settings.limits.encoder_load, CORES)
    watch_encoders(encoders)
    async with (
        open_stores(settings) as (ledger, cache_store),
        open_channel(settings.gateway.backends, settings) as channel,
    ):
        objects = Objects(settings.store.objects_url)
        limiter = Limiter(ledger, settings.limiter, tenants.get)
        idempotency = Idempotency(ledger, objects)
        pipeline = Pipeline(settings, tenants, limiter, idempotency)
        cache, flights = Cache(cache_store, objects, settings.cache), Flights(settings, channel)
        revision = _revision(settings, channel)
        speech = Speech(channel, flights, cache, revision, settings)
        _register(Servicer(pipeline, speech, Transcoder(encoders, settings.limits), channel), server)
        await server.start(settings.gateway.listen)

        async def follow(ready: bool) -> None:
            BACKENDS_READY.set(ready)
            logger().info("backend ready" if ready else "no backend ready", backends=settings.gateway.backends)
            if ready:
                # So that already the first speech has its key, and nothing is found that was purged.
                await asyncio.gather(revision.learn(), cache.refresh())
            await server.set_serving(ready)

        loops = (tenants.follow(), limiter.run(), idempotency.run(), cache.run(), revision.follow())
        async with _running(watch(channel, follow), *loops):
            await server.wait_for_drain(settings.gateway.drain_seconds, settings.gateway.grace_seconds)
        await cache.settle()
        await flights.close()


@asynccontextmanager
async def open_stores(settings: Settings) -> AsyncIterator[tuple[Store, Store]]:
    """The ledger and the cache's store, closed in the end."""
    store = settings.store
    ledger = Store("ledger", _plain(store.ledger), store)
    apart = store.cache is not None and store.cache != store.ledger
    # One server has one breaker: who has waited for it in vain once does not wait again.
    cache = Store("cache", _plain(store.cache), store) if apart else ledger
    try:
        yield ledger, cache
    finally:
        await ledger.close()
        if apart:
            await cache.close()


def _revision(settings: Settings, channel: grpc.aio.Channel) -> Revision:
    """What the backends announce."""
    info: tts_pb2_grpc.ServerInfoServiceAsyncStub = tts_pb2_grpc.ServerInfoServiceStub(channel)
    metadata = internal_metadata(settings.secret, "gateway")
    return Revision(lambda: info.GetServerInfo(tts_pb2.GetServerInfoRequest(), metadata=metadata))


@asynccontextmanager
async def _running(*loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Tasks that run beside; an end of one that nobody asked for is in the log."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    for task in tasks:
        task.add_done_callback(_report)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger().error("a background task failed", exc_info=error)


def _keyed(gateway: GatewaySettings) -> Iterator[str]:
    """Whose methods need a key, of those that usually need none."""
    if gateway.health_needs_key:
        yield "/grpc.health."
    if gateway.reflection_needs_key:
        yield "/grpc.reflection."


def _check_listen(settings: Settings) -> None:
    """Refuses to be open to other machines by mistake.

    Raises:
        StartupError: it would be.
    """
    gateway = settings.gateway
    if gateway.tenants is None and not gateway.allow_anonymous and not is_loopback(gateway.listen):
        raise StartupError(
            f"a gateway on {gateway.listen} is open to other machines, and nobody needs a key: name a file of tenants "
            "(gateway.tenants, see docs/tenants.md), or set gateway.allow_anonymous=true to let everybody in"
        )


def _plain(url: SecretStr | None) -> str | None:
    return None if url is None else url.get_secret_value()


def _register(servicer: Servicer, server: Server) -> None:
    tts_pb2_grpc.add_TextToSpeechServiceServicer_to_server(servicer, server.methods)
    tts_pb2_grpc.add_VoiceServiceServicer_to_server(servicer, server.methods)
    tts_pb2_grpc.add_ServerInfoServiceServicer_to_server(servicer, server.methods)
    tts_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(), server.methods)
