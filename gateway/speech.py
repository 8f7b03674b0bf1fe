"""Plain speech for the calls of a gateway: from the cache, with others who ask for the same, or from a backend.

What is made is charged before and settled after, by what was made; what is found or shared costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from audio.frames import SAMPLE_BYTES
from common import metrics
from common.encoding import max_reply_seconds, too_long
from common.errors import ChorusError, NotFound
from common.generations import Generations
from common.keys import DEFAULT_VOICE, canonical_text, speech_key
from common.metadata import (
    CACHE_CONTROL,
    INTERNAL_MADE,
    INTERNAL_SHARING,
    ONLY_CACHED,
    Metadata,
    Sharing,
    text_value,
)
from common.settings import Settings
from common.spans import restorer
from common.speech import SpeechMessage, as_field, read_wish
from gateway.cache import Cache, Tags
from gateway.estimate import Estimator, Spoken
from gateway.flights import Flights, Wanted
from gateway.limiter import Admission
from gateway.masters import Master
from gateway.pipeline import Turn, forward, forward_stream
from gateway.revision import Revision
from gateway.tenants import Tenants
from gateway.transcoder import is_plain
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

Written = tts_pb2.StreamSynthesizeTextRequest
Request = TypeVar("Request", tts_pb2.SynthesizeRequest, tts_pb2.StreamSynthesizeRequest)

CACHE_TRAILER = "x-chorus-cache"
TIMING_TRAILER = "server-timing"
"""Why a call was fast or slow, in the form of the W3C's Server Timing."""

OUR_FAILURES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED})
"""Nobody pays for what ends so."""


@dataclass(frozen=True, slots=True)
class Control:
    """What a caller says of the cache."""

    look: bool
    """Answer from it."""
    keep: bool
    """Put the answer into it, and share it while it is made."""
    only: bool
    """Answer from it or not at all."""


class Speech:
    """All speech of a gateway, in RAW PCM_S16LE at the engine's rate."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        flights: Flights,
        cache: Cache,
        revision: Revision,
        tenants: Tenants,
        settings: Settings,
    ) -> None:
        self._flights = flights
        self._cache = cache
        self._revision = revision
        self._tenants = tenants
        self._settings = settings
        self._estimator = Estimator()
        self._backend: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)

    async def whole(self, request: tts_pb2.SynthesizeRequest, turn: Turn) -> tts_pb2.SynthesizeResponse:
        """A text as one piece. The reply is the caller's own."""
        control = self._control(turn)
        wanted, tags = self._wanted(request, turn, control)
        restore = restorer(request.text)
        if (master := await self._found(wanted, tags, control)) is not None:
            if master.seconds > max_reply_seconds(master.start.format.sample_rate_hertz, self._settings.limits):
                raise too_long()
            reply = master.whole(turn.call.request_id)
        elif wanted is None or not self._shareable(wanted):
            restore = None  # its own text was spoken
            reply = await self._alone(request, turn)
        else:
            reply = await self._together(wanted, _canonical(request), turn)
        if restore is not None:
            for mark in reply.marks:
                restore(mark)
        _tell(turn, reply.start.cache_status, reply.end, _ms_since(turn.call.arrived))
        return reply

    def form(self, request: tts_pb2.SynthesizeRequest, turn: Turn) -> tts_pb2.SynthesizeResponse | None:
        """A text as one piece in its caller's format, if it was encoded before and is in memory."""
        key = self._form_key(request, turn)
        form = None if key is None else self._cache.form(key, request.format.SerializeToString(deterministic=True))
        if form is None:
            return None
        reply = tts_pb2.SynthesizeResponse()
        reply.CopyFrom(form)
        reply.start.request_id = turn.call.request_id
        metrics.AUDIO_SECONDS_SAVED.inc(reply.end.sample_count / reply.start.format.sample_rate_hertz)
        _tell(turn, reply.start.cache_status, reply.end, _ms_since(turn.call.arrived))
        return reply

    def keep_form(
        self, request: tts_pb2.SynthesizeRequest, turn: Turn, reply: tts_pb2.SynthesizeResponse
    ) -> tts_pb2.SynthesizeResponse:
        """Keeps what was encoded, if it is asked for again and again: it was a hit. Returns it."""
        key = self._form_key(request, turn)
        if key is not None and reply.start.cache_status == tts_pb2.CACHE_STATUS_HIT:
            form = tts_pb2.SynthesizeResponse()
            form.CopyFrom(reply)
            form.end.ClearField("timings")
            self._cache.put_form(key, request.format.SerializeToString(deterministic=True), form)
        return reply

    def _form_key(self, request: tts_pb2.SynthesizeRequest, turn: Turn) -> bytes | None:
        """Under what its forms are kept; None: none are. Marks are the caller's own, so its text must be the key's."""
        if is_plain(request.format) or not self._control(turn).look or restorer(request.text) is not None:
            return None
        key = self._key(request, turn)
        return None if read_wish(request.format)[0] is None else key

    async def stream(
        self, request: tts_pb2.StreamSynthesizeRequest, turn: Turn
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        """A text as it is spoken. The replies are the caller's own."""
        control = self._control(turn)
        wanted, tags = self._wanted(request, turn, control)
        restore = restorer(request.text)
        if (master := await self._found(wanted, tags, control)) is not None:
            messages = _replayed(master, turn)
        elif wanted is None or not self._shareable(wanted):
            restore = None  # its own text is spoken
            messages = self._stream_alone(request, turn)
        else:
            messages = self._stream_together(wanted, _canonical(request), turn)
        status, first_ms = tts_pb2.CACHE_STATUS_UNSPECIFIED, 0.0
        async with aclosing(messages):
            async for message in messages:
                if isinstance(message, tts_pb2.StreamStart):
                    status, first_ms = message.cache_status, _ms_since(turn.call.arrived)
                elif restore is not None and isinstance(message, tts_pb2.SegmentMark):
                    restore(message)
                elif isinstance(message, tts_pb2.StreamEnd):
                    _tell(turn, status, message, first_ms)
                yield tts_pb2.StreamSynthesizeResponse(**as_field(message))

    async def dialogue(
        self, requests: AsyncIterator[Written], turn: Turn
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
        """A text as it is written. Each piece of it is charged as it comes: nobody knows yet what will be found."""
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

        with _settled(turn.admission, in_parts=True) as meter:
            forwarded = forward_stream(
                self._backend.StreamSynthesizeText, charged(), self._sharing(turn), meter.hear_trailers
            )
            async with aclosing(forwarded) as replies:
                async for reply in replies:
                    meter.hear(getattr(reply, reply.WhichOneof("message")))
                    yield reply

    # -- where it comes from ------------------------------------------------------------------------------------------

    async def _found(self, wanted: Wanted | None, tags: Tags, control: Control) -> Master | None:
        """The speech from the cache, if it is there and may be heard.

        Raises:
            NotFound: it is not there, and the caller wants nothing else.
        """
        if wanted is not None and control.look:
            master = await self._cache.get(wanted.key, tags)
            if master is not None:
                metrics.AUDIO_SECONDS_SAVED.inc(master.seconds)
                return master
        if control.only:
            raise NotFound("this speech is not in the cache", "NOT_CACHED")
        return None

    async def _together(
        self, wanted: Wanted, request: tts_pb2.SynthesizeRequest, turn: Turn
    ) -> tts_pb2.SynthesizeResponse:
        """Made for this caller and all who ask for the same meanwhile."""
        pay = partial(turn.admission.hold, self._estimator.seconds(request))
        with _settled(turn.admission, lambda: self._flights.goes_on(wanted)) as meter:
            shared, joined = await self._flights.whole(wanted, request, turn, pay)
            reply = tts_pb2.SynthesizeResponse()
            reply.CopyFrom(shared)
            if joined:
                reply.start.cache_status = tts_pb2.CACHE_STATUS_COALESCED
            reply.start.request_id = turn.call.request_id
            meter.hear_whole(reply)
        self._learn(request, meter)
        return reply

    async def _stream_together(
        self, wanted: Wanted, request: tts_pb2.StreamSynthesizeRequest, turn: Turn
    ) -> AsyncGenerator[SpeechMessage, None]:
        pay = partial(turn.admission.hold, self._estimator.seconds(request))
        with _settled(turn.admission, lambda: self._flights.goes_on(wanted)) as meter:
            async with aclosing(self._flights.stream(wanted, request, turn, pay)) as messages:
                async for shared, joined in messages:
                    message: Any = type(shared)()
                    message.CopyFrom(shared)
                    if isinstance(message, tts_pb2.StreamStart):
                        message.request_id = turn.call.request_id
                        if joined:
                            message.cache_status = tts_pb2.CACHE_STATUS_COALESCED
                    meter.hear(message)
                    yield message
        self._learn(request, meter)

    async def _alone(self, request: tts_pb2.SynthesizeRequest, turn: Turn) -> tts_pb2.SynthesizeResponse:
        await turn.admission.hold(self._estimator.seconds(request))
        with _settled(turn.admission) as meter:
            reply: tts_pb2.SynthesizeResponse = await forward(self._backend.Synthesize, request, turn)
            meter.hear_whole(reply)
        self._learn(request, meter)
        return reply

    async def _stream_alone(
        self, request: tts_pb2.StreamSynthesizeRequest, turn: Turn
    ) -> AsyncGenerator[SpeechMessage, None]:
        await turn.admission.hold(self._estimator.seconds(request))
        with _settled(turn.admission) as meter:
            async with aclosing(forward_stream(self._backend.StreamSynthesize, request, turn)) as replies:
                async for reply in replies:
                    message = getattr(reply, reply.WhichOneof("message"))
                    meter.hear(message)
                    yield message
        self._learn(request, meter)

    # -- how it is asked for ------------------------------------------------------------------------------------------

    def _control(self, turn: Turn) -> Control:
        words = (text_value(turn.asked, CACHE_CONTROL) or "").lower()
        said = {word.strip() for word in words.split(",")}
        keep = self._settings.cache.enabled and "no-store" not in said
        look = keep and "no-cache" not in said
        only = text_value(turn.asked, ONLY_CACHED) not in (None, "", "0", "false") or "only-if-cached" in said
        return Control(look, keep, only)

    def _sharing(self, turn: Turn) -> Turn:
        """The turn of a text that is being written, which says with whom its segments are shared."""
        if not self._control(turn).look:
            return turn
        sharing: Sharing = "tenant" if self._scope(turn) else "all"
        return turn.saying((INTERNAL_SHARING, sharing))

    def _scope(self, turn: Turn) -> str:
        """The tenant, if it shares with nobody."""
        tenant = self._tenants.get(turn.call.tenant)
        return tenant.name if tenant.cache_scope == "tenant" else ""

    def _wanted(self, request: Spoken, turn: Turn, control: Control) -> tuple[Wanted | None, Tags]:
        """What is asked for, None: nothing that could be found or shared; and by what it is purged."""
        revision = self._revision.current
        tags = Tags(request.voice or DEFAULT_VOICE, revision or "")
        # What is faulty goes on as it is: the service tells all that is wrong with it.
        if revision is None or not control.keep or not is_plain(request.format):
            return None, tags
        key = self._key(request, turn)
        assert key is not None
        turn.call.facts["cache_key"] = key.hex()
        return Wanted(
            key, revision, turn.call.priority, partial(self._landed, key, tags, self._cache.generations)
        ), tags

    def _key(self, request: Spoken, turn: Turn) -> bytes | None:
        if self._revision.current is None:
            return None
        return speech_key(request, self._revision.current, self._scope(turn))

    def _shareable(self, wanted: Wanted) -> bool:
        return self._flights.running(wanted) or not self._flights.full

    def _landed(self, key: bytes, tags: Tags, asked: Generations, master: Master) -> None:
        """A speech is whole. One of another revision than its key's is not kept."""
        if master.made_as == tts_pb2.CACHE_STATUS_BYPASS:
            self._revision.doubt()
        else:
            self._cache.put(key, tags, master, asked)

    def _learn(self, request: Spoken, meter: _Meter) -> None:
        if meter.complete:
            self._estimator.learn(request, meter.seconds)


class _Meter:
    """Hears how much was spoken, and whether for this caller."""

    def __init__(self, *, in_parts: bool) -> None:
        """`in_parts`: parts of it may be shared; its backend tells in the end how much was made."""
        self.complete = False
        self._in_parts = in_parts
        self._shared = False
        self._made: float | None = None
        self._first_end = 0
        """The sample after its first part, once that has ended."""
        self._rate = 0
        self._samples = 0

    @property
    def seconds(self) -> float:
        return self._samples / self._rate if self._rate else 0.0

    @property
    def charged(self) -> float:
        """Seconds that this caller pays for."""
        if self._made is not None:
            return self._made
        if not self._shared:
            return self.seconds
        # Of what comes in parts it is told of the first only.
        return (self._samples - self._first_end) / self._rate if self._in_parts and self._first_end else 0.0

    def hear(self, message: SpeechMessage) -> None:
        match message:
            case tts_pb2.StreamStart():
                self._start(message)
            case tts_pb2.AudioChunk():
                self._samples = message.start_sample + len(message.data) // SAMPLE_BYTES
            case tts_pb2.SegmentMark() if not self._first_end:
                self._first_end = message.end_sample
            case tts_pb2.StreamEnd():
                self.complete = message.finish_reason == tts_pb2.FINISH_REASON_COMPLETE

    def hear_whole(self, reply: tts_pb2.SynthesizeResponse) -> None:
        self._start(reply.start)
        self._samples = reply.end.sample_count
        self.complete = reply.end.finish_reason == tts_pb2.FINISH_REASON_COMPLETE
        if self._shared:
            metrics.AUDIO_SECONDS_SAVED.inc(self.seconds)

    def hear_trailers(self, trailers: Metadata) -> None:
        """What the backend says in the end."""
        made = text_value(trailers, INTERNAL_MADE)
        if made is not None:
            self._made = float(made)
            metrics.AUDIO_SECONDS_SAVED.inc(max(0.0, self.seconds - self._made))

    def _start(self, start: tts_pb2.StreamStart) -> None:
        self._rate = start.format.sample_rate_hertz
        self._shared = start.cache_status in (tts_pb2.CACHE_STATUS_COALESCED, tts_pb2.CACHE_STATUS_HIT)


@contextmanager
def _settled(
    admission: Admission, goes_on: Callable[[], bool] = lambda: False, *, in_parts: bool = False
) -> Iterator[_Meter]:
    """Charges in the end what was made; nothing where the failure is ours.

    `goes_on`: others hear on when its first caller leaves. It stays charged as it was estimated: nobody else pays.
    `in_parts`: see `_Meter`.
    """
    meter = _Meter(in_parts=in_parts)
    try:
        yield meter
    except BaseException as error:
        if isinstance(error, ChorusError) and error.code in OUR_FAILURES:
            admission.settle(0.0)
        elif not goes_on():
            admission.settle(meter.charged)
        raise
    admission.settle(meter.charged)


async def _replayed(master: Master, turn: Turn) -> AsyncGenerator[SpeechMessage, None]:
    for message in master.messages(turn.call.request_id):
        yield message


def _canonical(request: Request) -> Request:
    """The request with its key's own text: whoever shares it asks for the same."""
    text = canonical_text(request.text)
    if text == request.text:
        return request
    canonical = type(request)()
    canonical.CopyFrom(request)
    canonical.text = text
    return canonical


def _tell(turn: Turn, status: Any, end: tts_pb2.StreamEnd, first_ms: float) -> None:
    """Says where the audio came from, and what took how long."""
    name = tts_pb2.CacheStatus.Name(status).removeprefix("CACHE_STATUS_")
    total_ms = _ms_since(turn.call.arrived)
    metrics.cache_status(name).inc()
    turn.call.facts["cache"] = name
    turn.call.trail(CACHE_TRAILER, name)
    parts = [f"cache;desc={name}"]
    # Who joined did not wait in the row's queue, and came when some of it was there already.
    if end.HasField("timings") and status != tts_pb2.CACHE_STATUS_COALESCED:
        timings = end.timings
        parts += [f"queue;dur={timings.queue_ms:.1f}", f"batch-rows;desc={timings.batch_rows}"]
        parts.append(f"backend;dur={timings.total_ms:.1f}")
    else:
        end.timings.CopyFrom(tts_pb2.Timings(first_audio_ms=first_ms, total_ms=total_ms))
    turn.call.trail(TIMING_TRAILER, ", ".join([*parts, f"total;dur={total_ms:.1f}"]))


def _ms_since(moment: float) -> float:
    return (time.monotonic() - moment) * 1000
