"""Has backends send plain samples, and encodes them as their callers want them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import lru_cache
from typing import TypeVar

from audio.background import BackgroundEncoder
from audio.budget import Budget
from audio.formats import Codec, Container, Wish
from common.encoding import Messages, encoded, encoded_whole, reserve
from common.settings import LimitSettings
from common.speech import as_field, read_wish
from gateway.masters import Whole
from protos.chorus.v1 import tts_pb2

PLAIN_FORMAT = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW, codec=tts_pb2.CODEC_PCM_S16LE)
"""What backends are asked for: samples at the engine's own rate."""
PLAIN = Wish(Container.RAW, Codec.PCM_S16LE)
"""The same as a wish."""

EXPECTED_RATE = 24_000
"""Hertz: an engine's, until it has spoken. Room is reserved for what a caller's wish would come to with it."""

Written = tts_pb2.StreamSynthesizeTextRequest
Request = TypeVar("Request", tts_pb2.SynthesizeRequest, tts_pb2.StreamSynthesizeRequest)
Reply = TypeVar("Reply", tts_pb2.StreamSynthesizeResponse, tts_pb2.StreamSynthesizeTextResponse)


class Transcoder:
    """Stands between callers and backends. What is to be forwarded as it is goes by untouched.

    That is what is plain already, and what is faulty: the service names all faults of a request at once.
    """

    def __init__(self, encoders: Budget, limits: LimitSettings) -> None:
        self._encoders = encoders
        self._limits = limits

    async def whole(
        self,
        request: tts_pb2.SynthesizeRequest,
        ask: Callable[[tts_pb2.SynthesizeRequest], Awaitable[Whole]],
    ) -> Whole:
        """A whole speech. `ask`: forwards a request."""
        wish = _wish(request.format)
        if wish is None:
            return await ask(request)
        with BackgroundEncoder(self._encoders) as encoder:
            reserve(encoder, wish.at(EXPECTED_RATE), EXPECTED_RATE)
            plain = await ask(_plain(request))
            return Whole.of(await encoded_whole(plain.message(), wish.at, encoder, self._limits))

    def stream(
        self,
        request: tts_pb2.StreamSynthesizeRequest,
        ask: Callable[[tts_pb2.StreamSynthesizeRequest], AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]],
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        """A speech as it is made."""
        wish = _wish(request.format)
        return ask(request) if wish is None else self._stream(_plain(request), wish, ask)

    async def dialogue(
        self,
        requests: AsyncIterator[Written],
        ask: Callable[[AsyncIterator[Written]], AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]],
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeTextResponse, None]:
        """A speech whose text is being written. What its caller wishes is known once the config has passed."""
        wish = PLAIN
        with BackgroundEncoder(self._encoders) as encoder:

            async def passed_on() -> AsyncIterator[Written]:
                nonlocal wish
                first = True
                async for request in requests:
                    asked = _wish(request.config.format) if first and request.HasField("config") else None
                    if asked is not None:
                        reserve(encoder, asked.at(EXPECTED_RATE), EXPECTED_RATE)
                        wish = asked
                        request.config.format.CopyFrom(PLAIN_FORMAT)
                    first = False
                    yield request

            messages = encoded(_opened(ask(passed_on())), lambda rate: wish.at(rate), encoder)
            async with aclosing(messages):
                async for message in messages:
                    yield tts_pb2.StreamSynthesizeTextResponse(**as_field(message))

    async def _stream(
        self,
        request: tts_pb2.StreamSynthesizeRequest,
        wish: Wish,
        ask: Callable[[tts_pb2.StreamSynthesizeRequest], AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]],
    ) -> AsyncGenerator[tts_pb2.StreamSynthesizeResponse, None]:
        with BackgroundEncoder(self._encoders) as encoder:
            reserve(encoder, wish.at(EXPECTED_RATE), EXPECTED_RATE)
            messages = encoded(_opened(ask(request)), wish.at, encoder)
            async with aclosing(messages):
                async for message in messages:
                    yield tts_pb2.StreamSynthesizeResponse(**as_field(message))


def _wish(asked: tts_pb2.AudioFormat) -> Wish | None:
    """What is to be encoded here; `None`: nothing."""
    wish, _ = read_wish(asked)
    return None if is_plain(asked) else wish


def is_plain(asked: tts_pb2.AudioFormat) -> bool:
    """Whether a format is the one that backends speak."""
    # Asked several times in each call: comparing dataclasses costs more than the rest of it.
    return _is_plain(asked.container, asked.codec, asked.sample_rate_hertz)


@lru_cache(maxsize=1024)
def _is_plain(container: int, codec: int, rate: int) -> bool:
    wish, _ = read_wish(tts_pb2.AudioFormat(container=container, codec=codec, sample_rate_hertz=rate))  # type: ignore[arg-type]
    return wish in (PLAIN, Wish(Container.RAW))


def _plain(request: Request) -> Request:
    """The same request for plain samples."""
    plain = type(request)()
    plain.CopyFrom(request)
    plain.format.CopyFrom(PLAIN_FORMAT)
    return plain


async def _opened(replies: AsyncGenerator[Reply, None]) -> Messages:
    """What a stream's replies say."""
    async with aclosing(replies):
        async for reply in replies:
            if (kind := reply.WhichOneof("message")) is not None:
                yield getattr(reply, kind)
