"""Plain speech for the calls of a gateway: charged, spoken by a backend, and settled by what was spoken."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio

from audio.frames import SAMPLE_BYTES
from common.errors import ChorusError
from gateway.estimate import Estimator, Spoken
from gateway.limiter import Admission
from gateway.pipeline import Turn, forward, forward_stream
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

Written = tts_pb2.StreamSynthesizeTextRequest
StreamReply: TypeAlias = "tts_pb2.StreamSynthesizeResponse | tts_pb2.StreamSynthesizeTextResponse"

OUR_FAILURES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED})
"""Nobody pays for what ends so."""


class Speech:
    """All speech of a gateway, in RAW PCM_S16LE at the engine's rate."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._estimator = Estimator()
        self._backend: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)

    async def whole(self, request: tts_pb2.SynthesizeRequest, turn: Turn) -> tts_pb2.SynthesizeResponse:
        """A text as one piece."""
        await turn.admission.hold(self._estimator.seconds(request))
        with _settled(turn.admission) as meter:
            reply: tts_pb2.SynthesizeResponse = await forward(self._backend.Synthesize, request, turn)
            meter.hear_whole(reply)
        self._learn(request, meter)
        return reply

    async def stream(
        self, request: tts_pb2.StreamSynthesizeRequest, turn: Turn
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        """A text as it is spoken."""
        await turn.admission.hold(self._estimator.seconds(request))
        with _settled(turn.admission) as meter:
            async with aclosing(forward_stream(self._backend.StreamSynthesize, request, turn)) as replies:
                async for reply in replies:
                    meter.hear(reply)
                    yield reply
        self._learn(request, meter)

    async def dialogue(
        self, requests: AsyncIterator[Written], turn: Turn
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
        """A text as it is written. Each piece of it is charged as it comes."""
        config = tts_pb2.StreamConfig()

        async def charged() -> AsyncGenerator[Written, None]:
            async for request in requests:
                if request.HasField("config"):
                    config.CopyFrom(request.config)
                elif request.text:
                    piece = tts_pb2.StreamSynthesizeRequest(
                        text=request.text, voice=config.voice, language=config.language, controls=config.controls
                    )
                    await turn.admission.hold(self._estimator.seconds(piece))
                yield request

        with _settled(turn.admission) as meter:
            replies = forward_stream(self._backend.StreamSynthesizeText, charged(), turn)
            async with aclosing(replies):
                async for reply in replies:
                    meter.hear(reply)
                    yield reply

    def _learn(self, request: Spoken, meter: _Meter) -> None:
        if meter.complete:
            self._estimator.learn(request, meter.seconds)


class _Meter:
    """Hears how much was spoken."""

    def __init__(self) -> None:
        self.complete = False
        self._rate = 0
        self._samples = 0

    @property
    def seconds(self) -> float:
        return self._samples / self._rate if self._rate else 0.0

    def hear(self, reply: Any) -> None:
        match reply.WhichOneof("message"):
            case "start":
                self._rate = reply.start.format.sample_rate_hertz
            case "chunk":
                self._samples = reply.chunk.start_sample + len(reply.chunk.data) // SAMPLE_BYTES
            case "end":
                self.complete = reply.end.finish_reason == tts_pb2.FINISH_REASON_COMPLETE

    def hear_whole(self, reply: tts_pb2.SynthesizeResponse) -> None:
        self._rate = reply.start.format.sample_rate_hertz
        self._samples = reply.end.sample_count
        self.complete = reply.end.finish_reason == tts_pb2.FINISH_REASON_COMPLETE


@contextmanager
def _settled(admission: Admission) -> Any:
    """Charges in the end what was heard; nothing where the failure is ours."""
    meter = _Meter()
    try:
        yield meter
    except ChorusError as error:
        admission.settle(0.0 if error.code in OUR_FAILURES else meter.seconds)
        raise
    except BaseException:
        admission.settle(meter.seconds)
        raise
    admission.settle(meter.seconds)
