"""Calls as tests make them: a server's services on one channel, speeches, and errors with their details unpacked."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from common.errors import DOMAIN, PUSHBACK
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from tests.stack import POLL_SECONDS, START_SECONDS, Server

M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Door:
    """A server's services on one channel."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.channel: Any = server.channel()
        """For calls of plain bytes; its own types know messages only."""
        self.speech: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(self.channel)
        self.voices: tts_pb2_grpc.VoiceServiceAsyncStub = tts_pb2_grpc.VoiceServiceStub(self.channel)
        self.info: tts_pb2_grpc.ServerInfoServiceAsyncStub = tts_pb2_grpc.ServerInfoServiceStub(self.channel)
        self.jobs: tts_pb2_grpc.JobServiceAsyncStub = tts_pb2_grpc.JobServiceStub(self.channel)

    async def both(self, request: tts_pb2.SynthesizeRequest) -> list[Failure]:
        """How a request fails, as a whole and as a stream."""
        return [
            await failure(self.speech.Synthesize(request)),
            await failure(drain(self.speech.StreamSynthesize(as_stream(request)))),
        ]


# --- speeches


@dataclass
class Spoken:
    """A speech as a caller hears it."""

    kinds: list[str] = field(default_factory=list)
    """Of the stream's messages, in order."""
    start: tts_pb2.StreamStart = field(default_factory=tts_pb2.StreamStart)
    chunks: list[tts_pb2.AudioChunk] = field(default_factory=list)
    marks: list[tts_pb2.SegmentMark] = field(default_factory=list)
    end: tts_pb2.StreamEnd = field(default_factory=tts_pb2.StreamEnd)

    @property
    def audio(self) -> bytes:
        """The whole file."""
        return b"".join(chunk.data for chunk in self.chunks)


async def spoken(
    call: AsyncIterable[tts_pb2.StreamSynthesizeResponse] | AsyncIterable[tts_pb2.StreamSynthesizeTextResponse],
) -> Spoken:
    """A stream, taken apart."""
    speech = Spoken()
    async for response in call:
        speech.kinds.append(response.WhichOneof("message") or "nothing")
        match speech.kinds[-1]:
            case "start":
                speech.start = response.start
            case "chunk":
                speech.chunks.append(response.chunk)
            case "mark":
                speech.marks.append(response.mark)
            case "end":
                speech.end = response.end
    return speech


def as_stream(request: tts_pb2.SynthesizeRequest) -> tts_pb2.StreamSynthesizeRequest:
    """The same request for a stream: the two messages have the same fields."""
    return tts_pb2.StreamSynthesizeRequest.FromString(request.SerializeToString())


async def drain(call: AsyncIterable[T]) -> list[T]:
    """All messages of a stream."""
    return [message async for message in call]


# --- failures


@dataclass(frozen=True)
class Failure:
    """How a call failed."""

    code: grpc.StatusCode
    message: str
    trailers: dict[str, str | bytes]
    status: status_pb2.Status | None

    def all(self, kind: type[M]) -> list[M]:
        """The details of a type."""
        found = []
        for packed in self.status.details if self.status is not None else ():
            detail = kind()
            if packed.Unpack(detail):
                found.append(detail)
        return found

    def one(self, kind: type[M]) -> M:
        """The detail of a type, which must be there exactly once."""
        (detail,) = self.all(kind)
        return detail

    @property
    def reason(self) -> str:
        """Of the one ErrorInfo, which must be ours."""
        info = self.one(error_details_pb2.ErrorInfo)
        assert info.domain == DOMAIN
        return str(info.reason)

    @property
    def info(self) -> dict[str, str]:
        """The one ErrorInfo's metadata."""
        return dict(self.one(error_details_pb2.ErrorInfo).metadata)

    @property
    def fields(self) -> list[str]:
        """The faulty ones, of the one BadRequest."""
        return [violation.field for violation in self.one(error_details_pb2.BadRequest).field_violations]

    @property
    def quota(self) -> str:
        """Of the one QuotaFailure."""
        (violation,) = self.one(error_details_pb2.QuotaFailure).violations
        return str(violation.subject)

    @property
    def retry_after_ms(self) -> int:
        """Of the one RetryInfo."""
        return int(self.one(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds())


async def failure(call: Awaitable[Any]) -> Failure:
    """How a call fails, which it must."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return failure_of(caught.value)


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    """A failure, with its details unpacked."""
    trailers = dict(error.trailing_metadata())
    return Failure(error.code(), error.details() or "", trailers, rpc_status.from_call(cast("grpc.Call", error)))


def check_exhausted(failed: Failure, reason: str, quota: str) -> None:
    """A caller is refused for want of room, and told how long to wait."""
    assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
    assert failed.retry_after_ms > 0
    assert failed.trailers[PUSHBACK] == str(failed.retry_after_ms)
    (violation,) = failed.one(error_details_pb2.QuotaFailure).violations
    assert violation.subject == quota


# --- what a server tells of it


async def logged(server: Server, request_id: str) -> dict[str, Any]:
    """The one line of a call in a server's log, once it is there."""

    def lines() -> list[dict[str, Any]]:
        return [line for line in server.log() if line["event"] == "call" and line["request_id"] == request_id]

    await until(lambda: bool(lines()))
    (line,) = lines()
    return line


def metrics_text(server: Server) -> str:
    """What a server's metrics endpoint shows."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as response:
        text: str = response.read().decode()
        return text


async def until(condition: Callable[[], bool]) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(START_SECONDS):
        while not condition():
            await asyncio.sleep(POLL_SECONDS)
