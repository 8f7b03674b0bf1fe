"""The calls that a service answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from functools import partial
from importlib.metadata import version
from typing import get_args

from audio.background import BackgroundEncoder
from audio.budget import Budget
from audio.formats import SERVED, resolve
from batcher.runner import Runner
from common.calls import Context, current_call
from common.encoding import Messages, bounded, collected, encoded, max_reply_seconds, reserve
from common.errors import DeadlineExceeded, InvalidArgument, NotFound, Violation, quoted
from common.metadata import (
    INTERNAL_DEADLINE,
    INTERNAL_MADE,
    INTERNAL_REVISION,
    INTERNAL_RUN_HERE,
    INTERNAL_SHARING,
    INTERNAL_SPEECH_KEY,
    ORCA_LOAD,
    Metadata,
    Sharing,
    as_metadata,
    text_value,
)
from common.settings import Settings
from common.speech import as_field, wire_format
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc
from service.dialogue import Account, in_parts
from service.directory import advertised
from service.engines.base import SpeechEngine
from service.flights import Deadline, Flights
from service.load import LoadReporter
from service.script import Script, WholeText, WrittenText, read_config
from service.segments import Listener, Origin, Segments
from service.speaking import Terms, in_one_request, rejected_characters, speak
from service.speech import (
    Manner,
    estimate_steps,
    front_end_revision,
    language_faults,
    match_language,
    parse,
    parse_config,
    revision,
    text_faults,
    voice_faults,
)
from service.text import split
from service.voices import VOICES

ESTIMATE_MARGIN = 1.25
"""A text is refused as too long for a reply only if its estimate is so much above the limit: estimates err."""

DEFAULT_PAGE = 100

STATUSES: Mapping[Origin, tts_pb2.CacheStatus.ValueType] = {
    Origin.MADE: tts_pb2.CACHE_STATUS_MISS,
    Origin.JOINED: tts_pb2.CACHE_STATUS_COALESCED,
    Origin.KEPT: tts_pb2.CACHE_STATUS_HIT,
}
"""What a caller is told of where its first audio came from."""


class Servicer(
    tts_pb2_grpc.TextToSpeechServiceServicer,
    tts_pb2_grpc.VoiceServiceServicer,
    tts_pb2_grpc.ServerInfoServiceServicer,
):
    """TextToSpeechService, VoiceService and ServerInfoService on one engine."""

    def __init__(
        self,
        settings: Settings,
        engine: SpeechEngine,
        runner: Runner,
        encoders: Budget,
        flights: Flights,
        segments: Segments,
    ) -> None:
        self._settings = settings
        self._name = advertised(settings.service)
        self._flights = flights
        self._segments = segments
        self._revision = revision(engine)
        self._engine = engine
        self._runner = runner
        self._encoders = encoders
        self._load = LoadReporter(runner)

    async def Synthesize(self, request: tts_pb2.SynthesizeRequest, context: Context) -> tts_pb2.SynthesizeResponse:
        """Collects the stream of the same speech."""
        manner = parse(request, self._engine, self._settings.limits)
        steps = estimate_steps(request.text, manner, self._engine)
        self._check_fits_reply(steps)
        rows = self._settings.batcher.unary_rows
        plain = self._flown(request.text, manner, context, Terms(rows, stream=False, expected_steps=steps))
        bounded_plain = bounded(plain, self._settings.limits)
        return await collected(self._encoded(bounded_plain, manner), self._settings.limits)

    async def StreamSynthesize(
        self, request: tts_pb2.StreamSynthesizeRequest, context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        """Sends the speech as it is made."""
        manner = parse(request, self._engine, self._settings.limits)
        steps = estimate_steps(request.text, manner, self._engine)
        rows = self._settings.batcher.stream_rows
        plain = self._flown(request.text, manner, context, Terms(rows, stream=True, expected_steps=steps))
        async with aclosing(self._encoded(plain, manner)) as messages:
            async for message in messages:
                yield tts_pb2.StreamSynthesizeResponse(**as_field(message))

    async def StreamSynthesizeText(
        self, request: AsyncIterator[tts_pb2.StreamSynthesizeTextRequest], context: Context
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
        """Sends the speech while its text is written."""
        deadline = self._deadline(context)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                manner = parse_config(await read_config(request), self._engine)
                script = WrittenText(request, manner.language, self._settings.limits)
                plain = self._written(manner, script, context, deadline)
                async with aclosing(script), aclosing(self._encoded(plain, manner)) as messages:
                    async for message in messages:
                        yield tts_pb2.StreamSynthesizeTextResponse(**as_field(message))
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED") from None

    async def NormalizeText(
        self, request: tts_pb2.NormalizeTextRequest, context: Context
    ) -> tts_pb2.NormalizeTextResponse:
        """Splits and reads the text, and stops there."""
        faults = [
            *text_faults(request.text, self._settings.limits),
            *voice_faults(request.voice, self._engine),
            *language_faults(request.language, self._engine),
        ]
        if faults:
            raise InvalidArgument.of(faults)
        response = tts_pb2.NormalizeTextResponse()
        for part in split(request.text, match_language(request.language, self._engine.languages)):
            response.segments.add(
                start_byte=part.start_byte,
                end_byte=part.end_byte,
                spoken_text=part.spoken_text,
                language=part.language,
            )
            response.rejected_characters.extend(rejected_characters(part))
            await asyncio.sleep(0)  # others' calls go on between two segments
        return response

    async def ListVoices(self, request: tts_pb2.ListVoicesRequest, context: Context) -> tts_pb2.ListVoicesResponse:
        """A page of voices; the token is the last name of the page before."""
        faults = []
        if not 0 <= request.page_size <= 1000:
            faults.append(Violation("page_size", f"is {request.page_size}; it goes from 0 to 1000"))
        if request.page_token and request.page_token not in self._engine.voices:
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
            front_end_revision=front_end_revision(engine),
            sample_rate_hertz=rate,
            limits=tts_pb2.Limits(
                max_text_characters=limits.text_characters,
                max_unary_audio_seconds=max_reply_seconds(rate, limits),
                max_deadline_seconds=limits.deadline_max,
                default_deadline_seconds=limits.deadline_default,
            ),
            languages=engine.languages,
            formats=[wire_format(resolve(container, codec, 0, rate)) for container, codec in SERVED],
        )

    async def _encoded(self, plain: Messages, manner: Manner) -> Messages:
        """A speech in its caller's format. It does not begin before there is room to encode it."""
        call = current_call()
        self._load.count_call()
        with BackgroundEncoder(self._encoders) as encoder:
            reserve(encoder, manner.format, self._engine.caps.sample_rate_hertz)
            async with aclosing(encoded(plain, lambda rate: manner.format, encoder)) as messages:
                async for message in messages:
                    if isinstance(message, tts_pb2.StreamEnd):
                        message.timings.backend = self._name
                        call.trail(ORCA_LOAD, self._load.report())
                    yield message

    async def _flown(self, text: str, manner: Manner, context: Context, terms: Terms) -> Messages:
        """A whole text, spoken for this caller, or heard with others who ask for the same speech."""
        call, deadline = current_call(), self._deadline(context)
        call.facts["characters"] = len(text)
        metadata = as_metadata(context.invocation_metadata())
        key = text_value(metadata, INTERNAL_SPEECH_KEY)
        admission = _admission_deadline(metadata, deadline)

        def start(deadline: Deadline) -> Messages:
            return self._speak(manner, WholeText(text, manner.language), terms, deadline)

        known = key is not None and text_value(metadata, INTERNAL_REVISION) == self._revision
        if key is None or not known or not self._flights.room(key, call.priority):
            async with aclosing(start(Deadline(admission, deadline))) as alone:
                async for message in alone:
                    yield message
            return
        here = text_value(metadata, INTERNAL_RUN_HERE) is not None
        try:
            async with (
                asyncio.timeout(deadline - time.monotonic()),
                aclosing(
                    self._flights.follow(key, Deadline(admission, deadline), start, priority=call.priority, here=here)
                ) as flown,
            ):
                async for message, joined in flown:
                    if isinstance(message, tts_pb2.StreamStart):
                        message.request_id = call.request_id
                        message.cache_status = tts_pb2.CACHE_STATUS_COALESCED if joined else tts_pb2.CACHE_STATUS_MISS
                        if joined:
                            call.facts["coalesced"] = True
                    yield message
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED") from None

    async def _written(self, manner: Manner, script: Script, context: Context, deadline: float) -> Messages:
        """A text that is being written, spoken for this caller, or in parts that others may hear too."""
        call, terms = current_call(), Terms(self._settings.batcher.stream_rows, stream=True)
        sharing = text_value(as_metadata(context.invocation_metadata()), INTERNAL_SHARING)
        if sharing not in get_args(Sharing) or not self._segments.room:
            async with aclosing(self._speak(manner, script, terms, Deadline(deadline, deadline))) as alone:
                async for message in alone:
                    yield message
            return
        account = Account()
        listener = Listener(call, call.tenant if sharing == "tenant" else "", deadline)
        begin = partial(in_parts, self._segments, listener, account)
        try:
            async with aclosing(speak(begin, self._engine, manner, script, call)) as messages:
                async for message in messages:
                    if isinstance(message, tts_pb2.StreamStart) and account.first is not None:
                        message.cache_status = STATUSES[account.first]
                    yield message
        finally:
            call.facts["shared_segments"] = account.shared
            call.trail(INTERNAL_MADE, f"{account.made_seconds:.3f}")

    async def _speak(self, manner: Manner, script: Script, terms: Terms, deadline: Deadline) -> Messages:
        call = current_call()
        begin = partial(in_one_request, self._runner, call, terms, deadline)
        async with aclosing(speak(begin, self._engine, manner, script, call)) as messages:
            async for message in messages:
                yield message

    def _deadline(self, context: Context) -> float:
        limits = self._settings.limits
        remaining = context.time_remaining()
        seconds = limits.deadline_default if remaining is None else min(remaining, limits.deadline_max)
        return time.monotonic() + seconds

    def _check_fits_reply(self, steps: int) -> None:
        seconds = steps / self._engine.caps.steps_per_second
        limit = max_reply_seconds(self._engine.caps.sample_rate_hertz, self._settings.limits)
        if seconds > limit * ESTIMATE_MARGIN:
            description = (
                f"would be about {seconds:.0f} s of audio; a unary reply holds {limit:.0f} s: "
                "use StreamSynthesize or JobService.CreateJob"
            )
            raise InvalidArgument.of([Violation("text", description)], "AUDIO_TOO_LONG")

    def _voice(self, name: str) -> tts_pb2.Voice:
        return tts_pb2.Voice(name=name, description=VOICES.get(name, ""), languages=self._engine.languages)


def _admission_deadline(metadata: Metadata, deadline: float) -> float:
    """Until when the one waits for whom a gateway asks; others may wait longer."""
    patience = text_value(metadata, INTERNAL_DEADLINE) or ""
    return min(deadline, time.monotonic() + int(patience) / 1000) if patience.isdecimal() else deadline
