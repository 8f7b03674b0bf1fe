"""The least that a batcher which is a library needs to be a server: grpc.aio on uvloop, Chorus's two calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

import grpc
import grpc.aio
import uvloop

from bench.echo import SERVICE
from protos.chorus.v1 import tts_pb2


class RefusedError(Exception):
    """The queue is full."""


class TooLateError(Exception):
    """It waited for too long."""


class Batcher(Protocol):
    """A library."""

    def speak(self, text: str, stream: bool, seconds: float | None) -> AsyncGenerator[bytes, None]:
        """The samples, in one piece or several. `seconds`: what the caller's deadline leaves.

        Raises:
            RefusedError: the queue is full.
            TooLateError: it waited for too long.
        """
        ...


def serve(address: str, batcher: Batcher) -> None:
    """Serves until it is killed."""
    uvloop.run(_serve(address, batcher))


async def _serve(address: str, batcher: Batcher) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_handlers(batcher),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


def _handlers(batcher: Batcher) -> grpc.GenericRpcHandler:
    async def speak(text: str, stream: bool, context: Any) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(batcher.speak(text, stream, context.time_remaining())) as pieces:
                async for piece in pieces:
                    yield piece
        except RefusedError:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED)
        except TooLateError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED)

    async def unary(request: tts_pb2.SynthesizeRequest, context: Any) -> tts_pb2.SynthesizeResponse:
        return tts_pb2.SynthesizeResponse(
            audio=b"".join([piece async for piece in speak(request.text, False, context)])
        )

    async def stream(
        request: tts_pb2.StreamSynthesizeRequest, context: Any
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        async for piece in speak(request.text, True, context):
            yield tts_pb2.StreamSynthesizeResponse(chunk=tts_pb2.AudioChunk(data=piece))

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Synthesize": grpc.unary_unary_rpc_method_handler(
            unary, tts_pb2.SynthesizeRequest.FromString, tts_pb2.SynthesizeResponse.SerializeToString
        ),
        "StreamSynthesize": grpc.unary_stream_rpc_method_handler(
            stream, tts_pb2.StreamSynthesizeRequest.FromString, tts_pb2.StreamSynthesizeResponse.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)
