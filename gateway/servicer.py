"""The calls that a gateway answers: those of the service, forwarded, and those that only a gateway has."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import grpc.aio

from common.calls import Context
from common.errors import Unimplemented
from gateway.pipeline import Pipeline
from gateway.transcoder import Transcoder
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc


class Servicer(
    tts_pb2_grpc.TextToSpeechServiceServicer,
    tts_pb2_grpc.VoiceServiceServicer,
    tts_pb2_grpc.ServerInfoServiceServicer,
):
    """The same services as a backend's, so that a caller can go round the gateway."""

    def __init__(self, pipeline: Pipeline, transcoder: Transcoder, channel: grpc.aio.Channel) -> None:
        self._pipeline = pipeline
        self._transcoder = transcoder
        self._speech: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)
        self._voices: tts_pb2_grpc.VoiceServiceAsyncStub = tts_pb2_grpc.VoiceServiceStub(channel)
        self._info: tts_pb2_grpc.ServerInfoServiceAsyncStub = tts_pb2_grpc.ServerInfoServiceStub(channel)

    async def Synthesize(self, request: tts_pb2.SynthesizeRequest, context: Context) -> tts_pb2.SynthesizeResponse:
        """Forwarded for plain samples, and encoded."""
        return await self._transcoder.whole(
            request, lambda plain: self._pipeline.unary(self._speech.Synthesize, plain, context)
        )

    def StreamSynthesize(
        self, request: tts_pb2.StreamSynthesizeRequest, context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        """Forwarded for plain samples, and encoded."""
        return self._transcoder.stream(
            request, lambda plain: self._pipeline.stream(self._speech.StreamSynthesize, plain, context)
        )

    def StreamSynthesizeText(
        self, request: AsyncIterator[tts_pb2.StreamSynthesizeTextRequest], context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
        """Forwarded for plain samples, both ways as it comes, and encoded."""
        return self._transcoder.dialogue(
            request, lambda plain: self._pipeline.stream(self._speech.StreamSynthesizeText, plain, context)
        )

    async def NormalizeText(
        self, request: tts_pb2.NormalizeTextRequest, context: Context
    ) -> tts_pb2.NormalizeTextResponse:
        """Forwarded."""
        response: tts_pb2.NormalizeTextResponse = await self._pipeline.unary(
            self._speech.NormalizeText, request, context
        )
        return response

    async def ListVoices(self, request: tts_pb2.ListVoicesRequest, context: Context) -> tts_pb2.ListVoicesResponse:
        """Forwarded."""
        response: tts_pb2.ListVoicesResponse = await self._pipeline.unary(self._voices.ListVoices, request, context)
        return response

    async def GetVoice(self, request: tts_pb2.GetVoiceRequest, context: Context) -> tts_pb2.GetVoiceResponse:
        """Forwarded."""
        response: tts_pb2.GetVoiceResponse = await self._pipeline.unary(self._voices.GetVoice, request, context)
        return response

    async def GetServerInfo(
        self, request: tts_pb2.GetServerInfoRequest, context: Context
    ) -> tts_pb2.GetServerInfoResponse:
        """Forwarded."""
        response: tts_pb2.GetServerInfoResponse = await self._pipeline.unary(self._info.GetServerInfo, request, context)
        return response


class JobServicer(tts_pb2_grpc.JobServiceServicer):
    """JobService. Its calls are in the contract already, and none is served yet."""

    async def _refuse(self, request: object, context: Context) -> None:
        raise Unimplemented("jobs are not served by this version; use StreamSynthesize", "NOT_YET_SERVED")

    async def _refuse_stream(self, request: object, context: Context) -> AsyncGenerator[None, None]:
        raise Unimplemented("jobs are not served by this version; use StreamSynthesize", "NOT_YET_SERVED")
        yield

    CreateJob = GetJob = ListJobs = CancelJob = _refuse  # type: ignore[assignment]
    WatchJob = ReadJobAudio = _refuse_stream  # type: ignore[assignment]
