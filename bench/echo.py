"""A bare grpc.aio server on uvloop, the yardstick: it answers Chorus's two calls with bytes made beforehand.

It reads no request and has neither interceptors nor protobuf messages: nothing in Python could answer cheaper.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import uvloop

from protos.chorus.v1 import tts_pb2

SERVICE = tts_pb2.DESCRIPTOR.services_by_name["TextToSpeechService"].full_name


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--unary-bytes", type=int, required=True, help="audio in a unary reply")
    parser.add_argument("--stream-bytes", type=int, required=True, help="audio in a stream")
    parser.add_argument("--chunk-bytes", type=int, required=True, help="audio in a message of a stream")
    args = parser.parse_args()
    uvloop.run(serve(args.address, args.unary_bytes, args.stream_bytes, args.chunk_bytes))


async def serve(address: str, unary_bytes: int, stream_bytes: int, chunk_bytes: int) -> None:
    """Serves for ever."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_handlers(unary_bytes, stream_bytes, chunk_bytes),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


def _handlers(unary_bytes: int, stream_bytes: int, chunk_bytes: int) -> grpc.GenericRpcHandler:
    reply = tts_pb2.SynthesizeResponse(audio=bytes(unary_bytes)).SerializeToString()
    sizes = [min(chunk_bytes, stream_bytes - start) for start in range(0, stream_bytes, chunk_bytes)]
    messages = [_message(size) for size in sizes]

    async def unary(request: bytes, context: object) -> bytes:
        return reply

    async def stream(request: bytes, context: object) -> AsyncGenerator[bytes, None]:
        for message in messages:
            yield message

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Synthesize": grpc.unary_unary_rpc_method_handler(unary),
        "StreamSynthesize": grpc.unary_stream_rpc_method_handler(stream),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def _message(size: int) -> bytes:
    return tts_pb2.StreamSynthesizeResponse(chunk=tts_pb2.AudioChunk(data=bytes(size))).SerializeToString()


if __name__ == "__main__":
    main()
