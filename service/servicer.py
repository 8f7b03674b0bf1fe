"""The calls that a service answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from importlib.metadata import version

from audio.formats import SERVED, Format, resolve
from audio.headers import with_known_length
from batcher.engine import Segment
from batcher.runner import Runner
from common.calls import Context, current_call
from common.errors import InvalidArgument, NotFound, OutOfRange, Unimplemented, Violation, quoted
from common.metadata import ORCA_LOAD, REQUEST_ID
from common.settings import Settings
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from service.engines.base import SpeechEngine
from service.load import LoadReporter
from service.speaking import SpeechMessage, speak, wire_format
from service.speech import Speech, SpeechRequest, parse
from service.text import FRONT_END_REVISION
from service.voices import VOICES

ESTIMATE_MARGIN = 1.25
"""A text is refused as too long for a reply only if its estimate is so much above the limit: estimates err."""

REPLY_OVERHEAD_BYTES = 64 * 1024
"""Room in a unary reply for all that is not audio."""

DEFAULT_PAGE = 100


class Servicer(
    tts_pb2_grpc.TextToSpeechServiceServicer,
    tts_pb2_grpc.VoiceServiceServicer,
    tts_pb2_grpc.ServerInfoServiceServicer,
):
    """TextToSpeechService, VoiceService and ServerInfoService on one engine."""

    def __init__(self, settings: Settings, engine: SpeechEngine, runner: Runner) -> None:
        self._settings = settings
        self._engine = engine
        self._runner = runner
        self._load = LoadReporter(runner)

    async def Synthesize(self, request: tts_pb2.SynthesizeRequest, context: Context) -> tts_pb2.SynthesizeResponse:
        """Collects the stream of the same speech."""
        speech = parse(request, self._engine, self._settings.limits)
        self._check_fits_reply(speech)
        response = tts_pb2.SynthesizeResponse()
        audio = bytearray()
        async with aclosing(self._speak(request, speech, context, self._settings.batcher.unary_rows)) as messages:
            async for message in messages:
                match message:
                    case tts_pb2.AudioChunk():
                        audio += message.data
                        self._check_still_fits(len(audio), message.start_sample, speech.format)
                    case tts_pb2.StreamStart():
                        response.start.CopyFrom(message)
                    case tts_pb2.SegmentMark():
                        response.marks.append(message)
                    case tts_pb2.StreamEnd():
                        self._check_still_fits(len(audio), message.sample_count, speech.format)
                        response.end.CopyFrom(message)
        response.audio = with_known_length(bytes(audio), speech.format, response.end.sample_count)
        return response

    async def StreamSynthesize(
        self, request: tts_pb2.StreamSynthesizeRequest, context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        """Sends the speech as it is made."""
        speech = parse(request, self._engine, self._settings.limits)
        async with aclosing(self._speak(request, speech, context, self._settings.batcher.stream_rows)) as messages:
            async for message in messages:
                match message:
                    case tts_pb2.AudioChunk():
                        yield tts_pb2.StreamSynthesizeResponse(chunk=message)
                    case tts_pb2.StreamStart():
                        yield tts_pb2.StreamSynthesizeResponse(start=message)
                    case tts_pb2.SegmentMark():
                        yield tts_pb2.StreamSynthesizeResponse(mark=message)
                    case tts_pb2.StreamEnd():
                        yield tts_pb2.StreamSynthesizeResponse(end=message)

    async def StreamSynthesizeText(
        self, request: AsyncIterator[tts_pb2.StreamSynthesizeTextRequest], context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
        """Not served yet."""
        raise _not_yet("StreamSynthesizeText", "StreamSynthesize")
        yield

    async def NormalizeText(
        self, request: tts_pb2.NormalizeTextRequest, context: Context
    ) -> tts_pb2.NormalizeTextResponse:
        """Not served yet."""
        raise _not_yet("NormalizeText", "the marks of Synthesize, which tell the spoken text")

    async def ListVoices(self, request: tts_pb2.ListVoicesRequest, context: Context) -> tts_pb2.ListVoicesResponse:
        """A page of voices; the token is the last name of the page before."""
        faults = []
        if not 0 <= request.page_size <= 1000:
            faults.append(Violation("page_size", f"is {request.page_size}; it goes from 0 to 1000"))
        if request.page_token and request.page_token not in VOICES:
            faults.append(Violation("page_token", "is none that a reply gave"))
        if faults:
            raise InvalidArgument.of(faults)
        names = [name for name in self._engine.voices if name > request.page_token]
        page = names[: request.page_size or DEFAULT_PAGE]
        return tts_pb2.ListVoicesResponse(
            voices=[self._voice(name) for name in page],
            next_page_token=page[-1] if len(page) < len(names) else "",
        )

    async def GetVoice(self, request: tts_pb2.GetVoiceRequest, context: Context) -> tts_pb2.GetVoiceResponse:
        """One voice by its name."""
        if request.name not in self._engine.voices:
            known = ", ".join(self._engine.voices)
            raise NotFound(f"there is no voice {quoted(request.name)}; there are {known}", "VOICE_NOT_FOUND")
        return tts_pb2.GetVoiceResponse(voice=self._voice(request.name))

    async def GetServerInfo(
        self, request: tts_pb2.GetServerInfoRequest, context: Context
    ) -> tts_pb2.GetServerInfoResponse:
        """What runs here."""
        limits, engine = self._settings.limits, self._engine
        rate = engine.caps.sample_rate_hertz
        return tts_pb2.GetServerInfoResponse(
            version=version("chorus-tts"),
            engine=engine.name,
            model_revision=engine.model_revision,
            front_end_revision=FRONT_END_REVISION,
            sample_rate_hertz=rate,
            limits=tts_pb2.Limits(
                max_text_characters=limits.text_characters,
                max_unary_audio_seconds=self._max_reply_seconds(resolve(None, None, 0, rate)),
                max_deadline_seconds=limits.deadline_max,
                default_deadline_seconds=limits.deadline_default,
            ),
            languages=engine.languages,
            formats=[wire_format(resolve(container, codec, 0, rate)) for container, codec in SERVED],
        )

    async def _speak(
        self, request: SpeechRequest, speech: Speech, context: Context, max_rows: int
    ) -> AsyncGenerator[SpeechMessage, None]:
        call = current_call()
        call.facts["characters"] = len(request.text)
        self._load.count_call()
        limits = self._settings.limits
        remaining = context.time_remaining()
        seconds = limits.deadline_default if remaining is None else min(remaining, limits.deadline_max)
        deadline = time.monotonic() + seconds
        speaking = speak(self._runner, self._engine, speech, call, max_rows=max_rows, deadline=deadline)
        async with aclosing(speaking) as messages:
            async for message in messages:
                if isinstance(message, tts_pb2.StreamEnd):
                    context.set_trailing_metadata(((REQUEST_ID, call.request_id), (ORCA_LOAD, self._load.report())))
                yield message

    def _check_fits_reply(self, speech: Speech) -> None:
        seconds = _estimate(speech.segments, self._engine)
        limit = self._max_reply_seconds(speech.format)
        if seconds > limit * ESTIMATE_MARGIN:
            description = (
                f"would be about {seconds:.0f} s of audio; a unary reply holds {limit:.0f} s: "
                "use StreamSynthesize or JobService.CreateJob"
            )
            raise InvalidArgument.of([Violation("text", description)], "AUDIO_TOO_LONG")

    def _check_still_fits(self, audio_bytes: int, samples: int, format: Format) -> None:
        limit = self._max_reply_seconds(format)
        too_long = samples > self._settings.limits.unary_audio_seconds * format.sample_rate_hertz
        if too_long or audio_bytes > self._max_reply_bytes:
            raise OutOfRange(
                f"the audio became longer than the {limit:.0f} s that a unary reply holds; "
                "use StreamSynthesize or JobService.CreateJob",
                "AUDIO_TOO_LONG",
            )

    def _max_reply_seconds(self, format: Format) -> float:
        return min(self._settings.limits.unary_audio_seconds, self._max_reply_bytes / format.bytes_per_second)

    @property
    def _max_reply_bytes(self) -> int:
        return self._settings.limits.message_bytes - REPLY_OVERHEAD_BYTES

    def _voice(self, name: str) -> tts_pb2.Voice:
        return tts_pb2.Voice(name=name, description=VOICES[name], languages=self._engine.languages)


def _estimate(segments: tuple[Segment, ...], engine: SpeechEngine) -> float:
    steps = sum(engine.caps.predict(segment).steps_p50 for segment in segments)
    return steps / engine.caps.steps_per_second


def _not_yet(method: str, instead: str) -> Unimplemented:
    return Unimplemented(f"{method} is not served by this version; use {instead}", "NOT_YET_SERVED")
