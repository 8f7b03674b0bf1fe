"""The service process: load an engine, serve it once it has spoken, drain."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from functools import partial

from audio.background import CORES
from audio.budget import Budget
from batcher.engine import Segment
from batcher.errors import BatcherError
from batcher.policy import Mode, Policy
from batcher.request import RequestEnded, RequestFailed
from batcher.runner import Runner
from common.errors import StartupError
from common.logs import logger, set_up_logs
from common.metadata import Metadata
from common.metrics import ENGINE_ERRORS, BatcherObserver, serve_metrics, watch_batcher, watch_encoders
from common.server import Server, run
from common.settings import BatcherSettings, Settings
from common.store import Store
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from service import text
from service.directory import Directory, advertised
from service.engines import load_engine
from service.engines.base import SpeechEngine
from service.flights import Flights
from service.segments import Segments
from service.servicer import Servicer
from service.speech import revision
from service.trust import check_listen, tenant_of
from service.voices import DEFAULT_VOICE

SERVICES = ("TextToSpeechService", "VoiceService", "ServerInfoService")

WARM_UP_TEXT = "你好"
WARM_UP_SECONDS = 120.0


def main(settings: Settings) -> None:
    """Runs a service until it is told to stop.

    Raises:
        StartupError: it cannot start, or its engine died.
    """
    set_up_logs(settings.log, "service")
    run(serve(settings))


async def serve(settings: Settings) -> None:
    """Serves until a signal. Health is SERVING only after the engine has spoken."""
    check_listen(settings)
    serve_metrics(settings.service.metrics_listen)
    names = [tts_pb2.DESCRIPTOR.services_by_name[name].full_name for name in SERVICES]
    server = Server(settings, names, identify=partial(_identify, settings))
    engine, _ = await asyncio.gather(_load(settings), asyncio.to_thread(text.warm_up))
    runner = Runner(
        engine,
        _policy(settings.batcher),
        outbox_seconds=settings.batcher.outbox_seconds,
        observer=BatcherObserver(),
        on_error=_log_engine_error,
        on_death=server.stop_soon,
    )
    watch_batcher(runner)
    encoders = Budget(settings.limits.encoder_load, CORES)
    watch_encoders(encoders)
    store = Store("cache", _cache_url(settings), settings.store)
    directory = Directory(store, advertised(settings.service), settings.flights.kept_seconds)
    flights = Flights(settings.flights, directory)
    segments = Segments(settings, runner, revision(engine), store)
    _register(Servicer(settings, engine, runner, encoders, flights, segments), server)
    await server.start(settings.service.listen)
    runner.start()
    engine.watch(runner.lose)
    await _warm_up(runner, engine)
    await segments.refresh()
    await server.set_serving(True)
    purges = asyncio.create_task(segments.follow_purges())
    rarely_needed = asyncio.create_task(asyncio.to_thread(text.warm_up_rare))
    await server.wait_for_drain(settings.service.drain_seconds, settings.service.grace_seconds)
    await rarely_needed
    purges.cancel()
    died = runner.dead
    await runner.stop()
    await segments.settle()
    await store.close()
    if died:
        raise StartupError("the engine died; the log says why")


async def _load(settings: Settings) -> SpeechEngine:
    """The engine. Whoever ends this process meanwhile need not wait until it is loaded: it may have to be fetched."""
    loaded: Future[SpeechEngine] = Future()
    loaded.set_running_or_notify_cancel()

    def load() -> None:
        try:
            loaded.set_result(load_engine(settings))
        except BaseException as error:
            loaded.set_exception(error)

    threading.Thread(target=load, name="load", daemon=True).start()
    return await asyncio.wrap_future(loaded)


async def _warm_up(runner: Runner, engine: SpeechEngine) -> None:
    """Speaks a word, so that the first caller waits for nothing that is done only once."""
    began = time.monotonic()
    segment = Segment(WARM_UP_TEXT, DEFAULT_VOICE, engine.languages[0])
    try:
        async with asyncio.timeout(WARM_UP_SECONDS), runner.speak([segment], max_rows=1) as outbox:
            while not isinstance(event := await outbox.get(), RequestEnded):
                if isinstance(event, RequestFailed):
                    raise event.error
    except (BatcherError, TimeoutError) as error:
        raise StartupError(f"the engine did not speak when it was warmed up: {error!r}") from None
    seconds = round(time.monotonic() - began, 3)
    logger().info("warm", engine=engine.name, model_revision=engine.model_revision, seconds=seconds)
    if engine.notice:
        logger().warning("engine notice", engine=engine.name, notice=engine.notice)


def _register(servicer: Servicer, server: Server) -> None:
    tts_pb2_grpc.add_TextToSpeechServiceServicer_to_server(servicer, server.methods)
    tts_pb2_grpc.add_VoiceServiceServicer_to_server(servicer, server.methods)
    tts_pb2_grpc.add_ServerInfoServiceServicer_to_server(servicer, server.methods)


def _cache_url(settings: Settings) -> str | None:
    url = settings.store.cache or settings.store.ledger
    return None if url is None else url.get_secret_value()


def _identify(settings: Settings, metadata: Metadata, peer: Callable[[], str]) -> str:
    return tenant_of(metadata, peer(), settings.secret, settings.service.allow_direct)


def _policy(settings: BatcherSettings) -> Policy:
    """The settings that are the scheduler's own, which have the same names there."""
    values = {field.name: getattr(settings, field.name) for field in fields(Policy)}
    return Policy(**values | {"mode": Mode(settings.mode)})


def _log_engine_error(error: BaseException) -> None:
    ENGINE_ERRORS.inc()
    logger().error("engine error", exc_info=error)
