"""The gateway process: callers on one side, backends on the other."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from audio.background import CORES
from audio.budget import Budget
from common.logs import logger, set_up_logs
from common.metrics import BACKENDS_READY, serve_metrics, watch_encoders
from common.server import Server, run
from common.settings import Settings
from gateway.backends import open_channel, watch
from gateway.pipeline import Pipeline, identify
from gateway.servicer import JobServicer, Servicer
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
    """Serves until a signal. Health is SERVING while a backend is."""
    serve_metrics(settings.gateway.metrics_listen)
    names = [service.full_name for service in tts_pb2.DESCRIPTOR.services_by_name.values()]
    server = Server(settings, names, identify)
    encoders = Budget(settings.limits.encoder_load, CORES)
    watch_encoders(encoders)
    async with open_channel(settings.gateway.backends, settings.limits) as channel:
        _register(Servicer(Pipeline(settings), Transcoder(encoders, settings.limits), channel), server)
        await server.start(settings.gateway.listen)

        async def follow(ready: bool) -> None:
            BACKENDS_READY.set(ready)
            logger().info("backend ready" if ready else "no backend ready", backends=settings.gateway.backends)
            await server.set_serving(ready)

        watcher = asyncio.create_task(watch(channel, follow))
        await server.wait_for_drain(settings.gateway.drain_seconds, settings.gateway.grace_seconds)
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


def _register(servicer: Servicer, server: Server) -> None:
    tts_pb2_grpc.add_TextToSpeechServiceServicer_to_server(servicer, server.grpc)
    tts_pb2_grpc.add_VoiceServiceServicer_to_server(servicer, server.grpc)
    tts_pb2_grpc.add_ServerInfoServiceServicer_to_server(servicer, server.grpc)
    tts_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(), server.grpc)
