"""A typed asynchronous client.

async with Client("127.0.0.1:50051") as chorus:
    speech = await chorus.synthesize("你好")
    async for message in chorus.stream("A longer text …", voice="male1"):
        ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

DEFAULT_SECONDS = 600.0
MESSAGE_BYTES = 4 * 1024 * 1024

StreamMessage = tts_pb2.StreamStart | tts_pb2.AudioChunk | tts_pb2.SegmentMark | tts_pb2.StreamEnd
StreamCall: TypeAlias = "grpc.aio.UnaryStreamCall[Any, Any] | grpc.aio.StreamStreamCall[Any, Any]"


class CallError(Exception):
    """A call that failed, in the server's words."""

    def __init__(self, code: grpc.StatusCode, message: str, reason: str, fields: dict[str, str]) -> None:
        """`reason`: ErrorInfo's. `fields`: the faulty fields and what is wrong with each."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.fields = fields


class Client:
    """Calls a gateway, or a service directly. Use it as an asynchronous context manager."""

    def __init__(self, address: str, *, timeout: float = DEFAULT_SECONDS) -> None:
        """`address`: HOST:PORT or any target that gRPC resolves. `timeout`: seconds that a call may take."""
        self._channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ],
        )
        self._timeout = timeout
        self._speech: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(self._channel)
        self._voices: tts_pb2_grpc.VoiceServiceAsyncStub = tts_pb2_grpc.VoiceServiceStub(self._channel)
        self._info: tts_pb2_grpc.ServerInfoServiceAsyncStub = tts_pb2_grpc.ServerInfoServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def synthesize(
        self, text: str, *, voice: str = "", language: str = "", format: tts_pb2.AudioFormat | None = None
    ) -> tts_pb2.SynthesizeResponse:
        """A text as one file; WAV if no format is given.

        Raises:
            CallError: the call failed.
        """
        request = tts_pb2.SynthesizeRequest(text=text, voice=voice, language=language, format=format)
        try:
            return await self._speech.Synthesize(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            raise call_error(error) from None

    async def stream(
        self, text: str, *, voice: str = "", language: str = "", format: tts_pb2.AudioFormat | None = None
    ) -> AsyncGenerator[StreamMessage, None]:
        """A text as a stream of a file: one start, then chunks and marks, then one end. Closing it cancels.

        Raises:
            CallError: the call failed, perhaps after some of the audio.
        """
        request = tts_pb2.StreamSynthesizeRequest(text=text, voice=voice, language=language, format=format)
        async with aclosing(_messages(self._speech.StreamSynthesize(request, timeout=self._timeout))) as messages:
            async for message in messages:
                yield message

    async def stream_text(
        self,
        pieces: AsyncIterable[str],
        *,
        voice: str = "",
        language: str = "",
        format: tts_pb2.AudioFormat | None = None,
    ) -> AsyncGenerator[StreamMessage, None]:
        """A text that is still being written, as a stream of a file. Closing it cancels.

        Raises:
            CallError: the call failed, perhaps after some of the audio.
        """
        config = tts_pb2.StreamConfig(voice=voice, language=language, format=format)

        async def requests() -> AsyncGenerator[tts_pb2.StreamSynthesizeTextRequest, None]:
            yield tts_pb2.StreamSynthesizeTextRequest(config=config)
            async for piece in pieces:
                yield tts_pb2.StreamSynthesizeTextRequest(text=piece)

        async with aclosing(
            _messages(self._speech.StreamSynthesizeText(requests(), timeout=self._timeout))
        ) as messages:
            async for message in messages:
                yield message

    async def normalize(self, text: str, *, voice: str = "", language: str = "") -> tts_pb2.NormalizeTextResponse:
        """How a text would be read.

        Raises:
            CallError: the call failed.
        """
        request = tts_pb2.NormalizeTextRequest(text=text, voice=voice, language=language)
        try:
            return await self._speech.NormalizeText(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            raise call_error(error) from None

    async def voices(self) -> list[tts_pb2.Voice]:
        """All voices.

        Raises:
            CallError: the call failed.
        """
        voices: list[tts_pb2.Voice] = []
        request = tts_pb2.ListVoicesRequest()
        try:
            while True:
                page = await self._voices.ListVoices(request, timeout=self._timeout)
                voices += page.voices
                if not page.next_page_token:
                    return voices
                request.page_token = page.next_page_token
        except grpc.aio.AioRpcError as error:
            raise call_error(error) from None

    async def server_info(self) -> tts_pb2.GetServerInfoResponse:
        """What is running.

        Raises:
            CallError: the call failed.
        """
        try:
            return await self._info.GetServerInfo(tts_pb2.GetServerInfoRequest(), timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            raise call_error(error) from None


async def _messages(call: StreamCall) -> AsyncGenerator[StreamMessage, None]:
    try:
        async for response in call:
            yield getattr(response, response.WhichOneof("message") or "")
    except grpc.aio.AioRpcError as error:
        raise call_error(error) from None
    finally:
        call.cancel()


def call_error(error: grpc.aio.AioRpcError) -> CallError:
    """A failed call, with its details unpacked."""
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    try:
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:  # a deadline that passes as the trailers arrive says something else than they do
        status = None
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(bad)
    fields = {violation.field: violation.description for violation in bad.field_violations}
    return CallError(error.code(), error.details() or error.code().name, info.reason, fields)
