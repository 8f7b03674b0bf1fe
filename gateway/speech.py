"""Plain speech for the calls of a gateway: from the cache, with others who ask for the same, or from a backend.

What is made is charged before and settled after, by what was made; what is found or shared costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import grpc
import grpc.aio

from audio.frames import SAMPLE_BYTES
from common import metrics
from common.calls import Call
from common.encoding import max_reply_bytes, max_reply_seconds, too_long
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
from common.shelf import Tags
from common.spans import restorer
from common.speech import SpeechMessage, as_field, read_wish
from gateway.cache import Cache, FormName
from gateway.estimate import Estimator, Spoken
from gateway.flights import Flights, Wanted
from gateway.limiter import Admission
from gateway.masters import Form, Master, Whole
from gateway.pipeline import Turn, forward, forward_stream
from gateway.revision import Revision
from gateway.tenants import Tenant
from gateway.transcoder import is_plain
from protos.chorus.v1 import tts_pb2, tts_pb2_grpc

Written = tts_pb2.StreamSynthesizeTextRequest
Request = TypeVar("Request", tts_pb2.SynthesizeRequest, tts_pb2.StreamSynthesizeRequest)

TIMING_TRAILER = "server-timing"
"""Where the audio came from, and why a call was fast or slow, in the form of the W3C's Server Timing."""

REMEMBERED = 1024
"""Requests whose names are remembered …"""
REMEMBERED_BYTES = 4096
"""… if they are no longer than this."""
STATUS_NAMES = {number: name.removeprefix("CACHE_STATUS_") for name, number in tts_pb2.CacheStatus.items()}

OUR_FAILURES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED})
"""Nobody pays for what ends so."""


class Named(NamedTuple):
    """Under what a speech is found."""

    key: bytes | None
    """None: nothing that could be found or shared."""
    tags: Tags
    """By what it is purged."""
    form: FormName | None
    """Under what it is kept as its caller wants it; None: it is not."""
    canonical: bool
    """Its text is the key's own, and so are its marks."""


class Control(NamedTuple):
    """What a caller says of the cache."""

    look: bool
    """Answer from it."""
    keep: bool
    """Put the answer into it, and share it while it is made."""
    only: bool
    """Answer from it or not at all."""


class Asked(NamedTuple):
    """What a call for a whole text asks for, read once."""

    named: Named
    control: Control


class Speech:
    """All speech of a gateway, in RAW PCM_S16LE at the engine's rate."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        flights: Flights,
        cache: Cache,
        revision: Revision,
        settings: Settings,
    ) -> None:
        self._flights = flights
        self._cache = cache
        self._revision = revision
        self._settings = settings
        self._most_seconds = settings.limits.unary_audio_seconds
        self._most_bytes = max_reply_bytes(settings.limits)
        self._estimator = Estimator()
        self._backend: tts_pb2_grpc.TextToSpeechServiceAsyncStub = tts_pb2_grpc.TextToSpeechServiceStub(channel)

    async def whole(self, request: tts_pb2.SynthesizeRequest, asked: Asked, turn: Turn) -> Whole:
        """A text as one piece. The reply is the caller's own."""
        restore = None if asked.named.canonical else restorer(request.text)
        if (master := await self._found(asked)) is not None:
            if master.seconds > max_reply_seconds(master.rate, self._settings.limits):
                raise too_long()
            reply = master.whole(turn.call.request_id)
        elif (wanted := self._wanted(asked, turn)) is None:
            restore = None  # its own text was spoken
            reply = await self._alone(request, turn)
        else:
            reply = await self._together(wanted, _canonical(request), turn)
        if restore is not None:
            for mark in reply.rest.marks:
                restore(mark)
        _tell(turn, reply.rest.start.cache_status, reply.rest.end, _ms_since(turn.call.arrived))
        return reply

    def form(self, asked: Asked, turn: Turn) -> Whole | None:
        """A text as one piece, if it is in memory in its caller's format: what is hot goes no further than this."""
        name = asked.named.form
        form = self._cache.form(name) if name is not None and asked.control.look else None
        if form is None:
            return None
        if form.seconds > self._most_seconds or form.reply.audio_bytes > self._most_bytes:
            return None  # `whole` will say so
        call = turn.call
        metrics.AUDIO_SECONDS_SAVED.inc(by=form.seconds)
        reply = form.reply.for_caller(call.request_id)
        timings, ms = reply.rest.end.timings, _ms_since(call.arrived)
        timings.first_audio_ms = timings.total_ms = ms
        _trail(call, "HIT", f"cache;desc=HIT, total;dur={ms:.1f}")
        return reply

    def keep_form(self, asked: Asked, reply: Whole) -> Whole:
        """Keeps what was encoded, if it is asked for again and again: it was a hit. Returns it."""
        name = asked.named.form
        hit = reply.rest.start.cache_status == tts_pb2.CACHE_STATUS_HIT
        if hit and name is not None and name[1] is not None:
            kept = reply.for_caller("")
            kept.rest.end.ClearField("timings")
            self._cache.put_form(name, Form(kept))
        return reply

    async def stream(
        self, request: tts_pb2.StreamSynthesizeRequest, turn: Turn
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        """A text as it is spoken. The replies are the caller's own."""
        asked = self.asked(request, turn)
        restore = None if asked.named.canonical else restorer(request.text)
        if (master := await self._found(asked)) is not None:
            messages = _replayed(master, turn)
        elif (wanted := self._wanted(asked, turn)) is None:
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

    async def _found(self, asked: Asked) -> Master | None:
        """The speech from the cache, if it is there and may be heard.

        Raises:
            NotFound: it is not there, and the caller wants nothing else.
        """
        if asked.named.key is not None and asked.control.look:
            master = await self._cache.get(asked.named.key, asked.named.tags)
            if master is not None:
                metrics.AUDIO_SECONDS_SAVED.inc(by=master.seconds)
                return master
        if asked.control.only:
            raise NotFound("this speech is not in the cache", "NOT_CACHED")
        return None

    async def _together(self, wanted: Wanted, request: tts_pb2.SynthesizeRequest, turn: Turn) -> Whole:
        """Made for this caller and all who ask for the same meanwhile."""
        pay = partial(turn.admission.hold, self._estimator.seconds(request))
        with _settled(turn.admission, lambda: self._flights.goes_on(wanted)) as meter:
            shared, joined = await self._flights.whole(wanted, request, turn, pay)
            reply = shared.for_caller(turn.call.request_id)
            if joined:
                reply.rest.start.cache_status = tts_pb2.CACHE_STATUS_COALESCED
            meter.hear_whole(reply.rest)
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

    async def _alone(self, request: tts_pb2.SynthesizeRequest, turn: Turn) -> Whole:
        await turn.admission.hold(self._estimator.seconds(request))
        with _settled(turn.admission) as meter:
            reply: tts_pb2.SynthesizeResponse = await forward(self._backend.Synthesize, request, turn)
            meter.hear_whole(reply)
        self._learn(request, meter)
        return Whole.of(reply)

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

    def asked(self, request: Spoken, turn: Turn) -> Asked:
        """What a call asks for, in whatever format."""
        control = self._control(turn)
        words = request.SerializeToString(deterministic=True)
        name = _name if len(words) <= REMEMBERED_BYTES else _name.__wrapped__
        named = name(words, self._revision.current or "", _scope(turn.tenant))
        if not control.keep:
            named = named._replace(key=None)
        elif named.key is not None:
            turn.call.facts["cache_key"] = named.key.hex()
        return Asked(named, control)

    def _control(self, turn: Turn) -> Control:
        said = turn.call.said
        return _control(said.get(CACHE_CONTROL, ""), said.get(ONLY_CACHED, ""), self._settings.cache.enabled)

    def _sharing(self, turn: Turn) -> Turn:
        """The turn of a text that is being written, which says with whom its segments are shared."""
        if not self._control(turn).look:
            return turn
        sharing: Sharing = "tenant" if _scope(turn.tenant) else "all"
        return turn.saying((INTERNAL_SHARING, sharing))

    def _wanted(self, asked: Asked, turn: Turn) -> Wanted | None:
        """What others may ask for too; None: nobody shares it, or there is no room for what is shared."""
        key, tags, _, _ = asked.named
        if key is None:
            return None
        landed = partial(self._landed, key, tags, self._cache.generations)
        wanted = Wanted(key, tags.revision, turn.call.priority, landed)
        return wanted if self._flights.running(wanted) or not self._flights.full else None

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
            metrics.AUDIO_SECONDS_SAVED.inc(by=self.seconds)

    def hear_trailers(self, trailers: Metadata) -> None:
        """What the backend says in the end."""
        made = text_value(trailers, INTERNAL_MADE)
        if made is not None:
            self._made = float(made)
            metrics.AUDIO_SECONDS_SAVED.inc(by=max(0.0, self.seconds - self._made))

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


def _scope(tenant: Tenant) -> str:
    """The tenant, if it shares with nobody."""
    return tenant.name if tenant.cache_scope == "tenant" else ""


@lru_cache
def _control(words: str, only_cached: str, enabled: bool) -> Control:
    said = {word.strip() for word in words.lower().split(",")}
    keep = enabled and "no-store" not in said
    look = keep and "no-cache" not in said
    return Control(look, keep, only_cached not in ("", "0", "false") or "only-if-cached" in said)


@lru_cache(maxsize=REMEMBERED)
def _name(words: bytes, revision: str, scope: str) -> Named:
    """Under what a request is found. Remembered, since what is hot is asked for again in the same words.

    `words`: the request's, of whichever kind: on the wire they are the same. `revision`: empty where none is known yet.
    """
    request = tts_pb2.SynthesizeRequest.FromString(words)
    canonical = canonical_text(request.text) == request.text
    tags = Tags(request.voice or DEFAULT_VOICE, revision)
    # What is faulty goes on as it is: the service tells all that is wrong with it.
    if not revision or read_wish(request.format)[0] is None:
        return Named(None, tags, None, canonical)
    key = speech_key(request, revision, scope)
    form = None if is_plain(request.format) else request.format.SerializeToString(deterministic=True)
    # Marks are the caller's own, so a form's text must be the key's.
    return Named(key, tags, (key, form) if canonical else None, canonical)


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
    name = STATUS_NAMES[status]
    total_ms = _ms_since(turn.call.arrived)
    parts = [f"cache;desc={name}"]
    # Who joined did not wait in the row's queue, and came when some of it was there already.
    if end.HasField("timings") and status != tts_pb2.CACHE_STATUS_COALESCED:
        timings = end.timings
        parts += [f"queue;dur={timings.queue_ms:.1f}", f"batch-rows;desc={timings.batch_rows}"]
        parts.append(f'backend;desc="{timings.backend}";dur={timings.total_ms:.1f}')
    else:
        end.ClearField("timings")
        end.timings.first_audio_ms, end.timings.total_ms = first_ms, total_ms
    _trail(turn.call, name, ", ".join([*parts, f"total;dur={total_ms:.1f}"]))


def _trail(call: Call, name: str, timing: str) -> None:
    """The same in trailers, log and metrics."""
    metrics.CACHE_STATUS.inc(name)
    call.facts["cache"] = name
    call.trail(TIMING_TRAILER, timing)


def _ms_since(moment: float) -> float:
    return (time.monotonic() - moment) * 1000
