"""A typed asynchronous client.

async with Client("127.0.0.1:50051") as chorus:
    speech = await chorus.synthesize("你好")
    async for message in chorus.stream("A longer text …", voice="male1"):
        ...

It does what a careful caller does: a call that is refused for a while is made again when the server said, one that
found nobody is made again soon; both only while the deadline lets it, and never after audio was heard. All attempts of
one call have the same idempotency key, so that the server speaks it once.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar, cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from common.mended import mended
from common.metadata import API_KEY, IDEMPOTENCY_KEY, PRIORITY, REQUEST_ID
from common.tls import channel_credentials
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

DEFAULT_SECONDS = 600.0
MESSAGE_BYTES = 4 * 1024 * 1024
ATTEMPTS = 5
FIRST_PAUSE = 0.1
"""Seconds before the second attempt where the server names no delay; twice as long before each further one."""
LONGEST_PAUSE = 5.0
JITTER = 0.1

StreamMessage = tts_pb2.StreamStart | tts_pb2.AudioChunk | tts_pb2.SegmentMark | tts_pb2.StreamEnd
StreamCall: TypeAlias = "grpc.aio.UnaryStreamCall[Any, Any] | grpc.aio.StreamStreamCall[Any, Any]"
Reply = TypeVar("Reply")

RETRIED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED})
"""Codes with which a call may be made again; all but UNAVAILABLE only where the server names a delay."""


class CallError(Exception):
    """A call that failed, in the server's words."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str,
        fields: dict[str, str],
        retry_after: float | None = None,
        quota: str = "",
    ) -> None:
        """Says what the server said.

        Args:
            code: gRPC's.
            message: for people.
            reason: ErrorInfo's; empty where the error is not the server's own.
            fields: the faulty fields and what is wrong with each.
            retry_after: seconds after which the call may be made again.
            quota: the limit that was met.
        """
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.fields = fields
        self.retry_after = retry_after
        self.quota = quota


@dataclass(frozen=True)
class Tls:
    """Whom a client believes, and what it shows."""

    ca: Path | None = None
    """Who signs the server's certificate. Default: the system's authorities."""
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class Options:
    """What may be said of any call for speech."""

    timeout: float | None = None
    """Seconds that it may take, with all attempts. Default: the client's."""
    idempotency_key: str | None = None
    """Default: a new one for each call."""
    request_id: str | None = None
    priority: Literal["interactive", "batch"] = "interactive"
    cache_control: str | None = None
    """`no-cache`, `no-store`."""
    metadata: tuple[tuple[str, str], ...] = ()
    """More of it."""

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """As metadata, without the key."""
        named = {REQUEST_ID: self.request_id, "cache-control": self.cache_control}
        pairs = [(name, value) for name, value in named.items() if value is not None]
        if self.priority != "interactive":
            pairs.append((PRIORITY, self.priority))
        return (*pairs, *self.metadata)


class Client:
    """Calls a gateway, or a service directly. Use it as an asynchronous context manager."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout: float = DEFAULT_SECONDS,
        attempts: int = ATTEMPTS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Connects with its first call.

        Args:
            address: HOST:PORT or any target that gRPC resolves.
            api_key: the tenant's.
            tls: None: no encryption.
            timeout: seconds that a call may take.
            attempts: how often it is made at most.
            clock: seconds, for tests.
            sleep: for tests.
        """
        options = [("grpc.keepalive_time_ms", 30_000), ("grpc.max_receive_message_length", MESSAGE_BYTES)]
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            credentials = channel_credentials(tls.ca, tls.certificate, tls.key)
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._key = ((API_KEY, api_key),) if api_key is not None else ()
        self._timeout = timeout
        self._attempts = attempts
        self._clock = clock
        self._sleep = sleep
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
        self,
        text: str,
        *,
        voice: str = "",
        language: str = "",
        format: tts_pb2.AudioFormat | None = None,
        controls: tts_pb2.Controls | None = None,
        sampling: tts_pb2.Sampling | None = None,
        refine_text: bool = False,
        options: Options = Options(),
    ) -> tts_pb2.SynthesizeResponse:
        """A text as one file; WAV if no format is given.

        Raises:
            CallError: the call failed.
        """
        request = tts_pb2.SynthesizeRequest(
            text=text,
            voice=voice,
            language=language,
            format=format,
            controls=controls,
            sampling=sampling,
            refine_text=refine_text,
        )
        return await self._unary(self._speech.Synthesize, request, options, keyed=True)

    async def stream(
        self,
        text: str,
        *,
        voice: str = "",
        language: str = "",
        format: tts_pb2.AudioFormat | None = None,
        controls: tts_pb2.Controls | None = None,
        sampling: tts_pb2.Sampling | None = None,
        refine_text: bool = False,
        options: Options = Options(),
    ) -> AsyncGenerator[StreamMessage, None]:
        """A text as a stream of a file: one start, then chunks and marks, then one end. Closing it cancels.

        Raises:
            CallError: the call failed, perhaps after some of the audio.
        """
        request = tts_pb2.StreamSynthesizeRequest(
            text=text,
            voice=voice,
            language=language,
            format=format,
            controls=controls,
            sampling=sampling,
            refine_text=refine_text,
        )
        attempt = self._attempt(options, keyed=True)
        while True:
            heard = False
            try:
                call = mended(
                    self._speech.StreamSynthesize(request, timeout=attempt.timeout(), metadata=attempt.metadata)
                )
                async with aclosing(_messages(call)) as messages:
                    async for message in messages:
                        heard = True
                        yield message
                return
            except CallError as error:
                if heard:
                    raise
                await attempt.again(error)

    async def stream_text(
        self,
        pieces: AsyncIterable[str],
        *,
        voice: str = "",
        language: str = "",
        format: tts_pb2.AudioFormat | None = None,
        controls: tts_pb2.Controls | None = None,
        sampling: tts_pb2.Sampling | None = None,
        options: Options = Options(),
    ) -> AsyncGenerator[StreamMessage, None]:
        """A text that is still being written, as a stream of a file. Closing it cancels. It is tried once.

        Raises:
            CallError: the call failed, perhaps after some of the audio.
        """
        config = tts_pb2.StreamConfig(
            voice=voice, language=language, format=format, controls=controls, sampling=sampling
        )

        async def requests() -> AsyncGenerator[tts_pb2.StreamSynthesizeTextRequest, None]:
            yield tts_pb2.StreamSynthesizeTextRequest(config=config)
            async for piece in pieces:
                yield tts_pb2.StreamSynthesizeTextRequest(text=piece)

        attempt = self._attempt(options, keyed=False)
        call = self._speech.StreamSynthesizeText(requests(), timeout=attempt.timeout(), metadata=attempt.metadata)
        async with aclosing(_messages(mended(call))) as messages:
            async for message in messages:
                yield message

    async def normalize(self, text: str, *, voice: str = "", language: str = "") -> tts_pb2.NormalizeTextResponse:
        """How a text would be read.

        Raises:
            CallError: the call failed.
        """
        request = tts_pb2.NormalizeTextRequest(text=text, voice=voice, language=language)
        return await self._unary(self._speech.NormalizeText, request)

    async def voices(self) -> list[tts_pb2.Voice]:
        """All voices.

        Raises:
            CallError: the call failed.
        """
        voices: list[tts_pb2.Voice] = []
        request = tts_pb2.ListVoicesRequest()
        while True:
            page = await self._unary(self._voices.ListVoices, request)
            voices += page.voices
            if not page.next_page_token:
                return voices
            request.page_token = page.next_page_token

    async def server_info(self) -> tts_pb2.GetServerInfoResponse:
        """What is running.

        Raises:
            CallError: the call failed.
        """
        return await self._unary(self._info.GetServerInfo, tts_pb2.GetServerInfoRequest())

    async def _unary(
        self,
        method: Callable[..., Awaitable[Reply]],
        request: Any,
        options: Options = Options(),
        *,
        keyed: bool = False,
    ) -> Reply:
        attempt = self._attempt(options, keyed=keyed)
        while True:
            try:
                return await method(request, timeout=attempt.timeout(), metadata=attempt.metadata)
            except grpc.aio.AioRpcError as error:
                await attempt.again(call_error(error))

    def _attempt(self, options: Options, *, keyed: bool) -> _Attempt:
        metadata = (*self._key, *options.pairs())
        if keyed or options.idempotency_key is not None:
            metadata += ((IDEMPOTENCY_KEY, options.idempotency_key or uuid.uuid4().hex),)
        seconds = self._timeout if options.timeout is None else options.timeout
        return _Attempt(metadata, self._clock() + seconds, self._attempts, self._clock, self._sleep)


@dataclass
class _Attempt:
    """A call that may be made again."""

    metadata: tuple[tuple[str, str], ...]
    deadline: float
    left: int
    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]
    pause: float = FIRST_PAUSE

    def timeout(self) -> float:
        """Seconds that are left for it."""
        return max(0.001, self.deadline - self.clock())

    async def again(self, error: CallError) -> None:
        """Waits as long as it should, where it makes sense to try again.

        Raises:
            CallError: it makes none.
        """
        self.left -= 1
        named = error.retry_after is not None
        if self.left <= 0 or error.code not in RETRIED or not (named or error.code is grpc.StatusCode.UNAVAILABLE):
            raise error
        pause = error.retry_after if error.retry_after is not None else self.pause
        pause *= random.uniform(1.0, 1.0 + JITTER)  # noqa: S311 (no secret)
        if self.clock() + pause >= self.deadline:
            raise error
        self.pause = min(LONGEST_PAUSE, self.pause * 2)
        await self.sleep(pause)


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
    retry, quota = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    retry_after = None
    try:
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:  # a deadline that passes as the trailers arrive says something else than they do
        status = None
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(bad)
        detail.Unpack(quota)
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    fields = {violation.field: violation.description for violation in bad.field_violations}
    subject = quota.violations[0].subject if quota.violations else ""
    return CallError(error.code(), error.details() or error.code().name, info.reason, fields, retry_after, subject)
