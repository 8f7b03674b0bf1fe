"""The calls that a gateway answers: those of the service, forwarded, and those that only a gateway has."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc.aio

from common.calls import Context
from common.errors import Unimplemented
from gateway.masters import Whole
from gateway.pipeline import Pipeline, Turn, forward
from gateway.speech import Speech
from gateway.transcoder import Transcoder
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc


class Servicer(
    tts_pb2_grpc.TextToSpeechServiceServicer,
    tts_pb2_grpc.VoiceServiceServicer,
    tts_pb2_grpc.ServerInfoServiceServicer,
):
    """The same services as a backend's, so that a caller can go round the gateway."""

    def __init__(self, pipeline: Pipeline, speech: Speech, transcoder: Transcoder, channel: grpc.aio.Channel) -> None:
        self._pipeline = pipeline
        self._speech = speech
        self._transcoder = transcoder
        self._backend: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)
        self._voices: tts_pb2_grpc.VoiceServiceAsyncStub = tts_pb2_grpc.VoiceServiceStub(channel)
        self._info: tts_pb2_grpc.ServerInfoServiceAsyncStub = tts_pb2_grpc.ServerInfoServiceStub(channel)

    async def Synthesize(self, request: tts_pb2.SynthesizeRequest, context: Context) -> Any:
        """Spoken in plain samples, and encoded. What it returns looks like a reply."""

        async def make(turn: Turn) -> Whole:
            asked = self._speech.asked(request, turn)
            if (form := self._speech.form(asked, turn)) is not None:
                return form
            reply = await self._transcoder.whole(request, lambda plain: self._speech.whole(plain, asked, turn))
            return self._speech.keep_form(asked, reply)

        return await self._pipeline.unary(request, context, tts_pb2.SynthesizeResponse, make)

    def StreamSynthesize(
        self, request: tts_pb2.StreamSynthesizeRequest, context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        """Spoken in plain samples, and encoded as it comes."""

        def make(turn: Turn) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
            return self._transcoder.stream(request, lambda plain: self._speech.stream(plain, turn))

        return self._pipeline.stream(request, context, tts_pb2.StreamSynthesizeResponse, make)

    def StreamSynthesizeText(
        self, request: AsyncIterator[tts_pb2.StreamSynthesizeTextRequest], context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
        """Spoken in plain samples while it is written, both ways as it comes, and encoded."""

        def make(turn: Turn) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
            return self._transcoder.dialogue(request, lambda plain: self._speech.dialogue(plain, turn))

        return self._pipeline.stream(None, context, tts_pb2.StreamSynthesizeTextResponse, make)

    async def NormalizeText(
        self, request: tts_pb2.NormalizeTextRequest, context: Context
    ) -> tts_pb2.NormalizeTextResponse:
        """Forwarded."""
        return await self._pipeline.unary(
            request,
            context,
            tts_pb2.NormalizeTextResponse,
            lambda turn: forward(self._backend.NormalizeText, request, turn),
        )

    async def ListVoices(self, request: tts_pb2.ListVoicesRequest, context: Context) -> tts_pb2.ListVoicesResponse:
        """Forwarded."""
        return await self._pipeline.unary(
            request, context, tts_pb2.ListVoicesResponse, lambda turn: forward(self._voices.ListVoices, request, turn)
        )

    async def GetVoice(self, request: tts_pb2.GetVoiceRequest, context: Context) -> tts_pb2.GetVoiceResponse:
        """Forwarded."""
        return await self._pipeline.unary(
            request, context, tts_pb2.GetVoiceResponse, lambda turn: forward(self._voices.GetVoice, request, turn)
        )

    async def GetServerInfo(
        self, request: tts_pb2.GetServerInfoRequest, context: Context
    ) -> tts_pb2.GetServerInfoResponse:
        """Forwarded."""
        return await self._pipeline.unary(
            request,
            context,
            tts_pb2.GetServerInfoResponse,
            lambda turn: forward(self._info.GetServerInfo, request, turn),
        )


class JobServicer(tts_pb2_grpc.JobServiceServicer):
    """JobService. Its calls are in the contract already, and none is served yet."""

    async def _refuse(self, request: object, context: Context) -> None:
        raise Unimplemented("jobs are not served by this version; use StreamSynthesize", "NOT_YET_SERVED")

    async def _refuse_stream(self, request: object, context: Context) -> AsyncGenerator[None, None]:
        raise Unimplemented("jobs are not served by this version; use StreamSynthesize", "NOT_YET_SERVED")
        yield

    CreateJob = GetJob = ListJobs = CancelJob = _refuse  # type: ignore[assignment]
    WatchJob = ReadJobAudio = _refuse_stream  # type: ignore[assignment]
