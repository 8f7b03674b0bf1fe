"""The text of a speech, segment by segment: a whole one, read as it is needed, or one that is still being written."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

from common.errors import InvalidArgument, Violation
from common.settings import LimitSettings
from protos.chorus.v1 import tts_pb2
from service.text import Segmenter, TextSegment, split

PAUSE_SECONDS = 0.5
"""When no text has come for so long, what has come is spoken."""


READ_AT_ONCE = 100
"""Characters of a message that are read before others have their turn."""


class BargeIn(Exception):
    """The caller has said `cancel`."""


class Script(Protocol):
    """Where segments come from."""

    done: bool
    """No more will come."""

    async def more(self) -> list[TextSegment]:
        """The next segments, in order; none only at the end."""
        ...


class WholeText:
    """A text that is all there. What is read first is spoken before the rest is looked at."""

    AT_ONCE = 2
    """Segments at a time: the current and the next row of a stream."""

    def __init__(self, text: str, language: str | None) -> None:
        """`text`: with something to speak in it. `language`: BCP 47; None: detected."""
        self.done = False
        self._segments = split(text, language)

    async def more(self) -> list[TextSegment]:
        """The next two. Costs well under a millisecond."""
        segments = []
        for segment in self._segments:
            segments.append(segment)
            if len(segments) == self.AT_ONCE:
                return segments
        self.done = True
        return segments


class WrittenText:
    """A text that is still being written. Its segments end with its sentences, at a flush, and when it pauses."""

    def __init__(
        self, messages: AsyncIterator[tts_pb2.StreamSynthesizeTextRequest], language: str | None, limits: LimitSettings
    ) -> None:
        """`messages`: after the config."""
        self.done = False
        self._messages = messages
        self._limits = limits
        self._segmenter = Segmenter(language)
        self._next: asyncio.Future[tts_pb2.StreamSynthesizeTextRequest | None] | None = None
        self._silent = 0
        """Characters since the last segment."""
        self._unread: deque[str] = deque()
        """Of the last message of text."""
        self._unspoken = False
        """There is text since the last flush."""

    async def more(self) -> list[TextSegment]:
        """The segments that the next messages close.

        Raises:
            BargeIn: the caller cancels.
            InvalidArgument: a message that has no place here.
        """
        while True:
            while self._unread:
                piece = self._unread.popleft()
                if segments := self._segmenter.feed(piece):
                    self._silent = 0
                    return segments
                self._check_silence(len(piece))
                await asyncio.sleep(0)  # a long message holds up nobody else
            message = await self._read()
            if message is None:
                self.done = True
                return self._segmenter.flush(end=True)
            if segments := self._take(message):
                return segments

    async def aclose(self) -> None:
        """Stops reading."""
        if self._next is not None:
            self._next.cancel()

    async def _read(self) -> tts_pb2.StreamSynthesizeTextRequest | None:
        """The next message; a flush of our own where none comes for a while; None at the end."""
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._messages, None))
        # Not `wait_for`: it would cancel the read, and with it the call.
        await asyncio.wait({self._next}, timeout=PAUSE_SECONDS if self._unspoken else None)
        if not self._next.done():
            return tts_pb2.StreamSynthesizeTextRequest(flush=tts_pb2.Flush())
        message, self._next = self._next.result(), None
        return message

    def _take(self, message: tts_pb2.StreamSynthesizeTextRequest) -> list[TextSegment]:
        match message.WhichOneof("message"):
            case "text":
                self._check_length(message.text)
                self._unspoken = True
                starts = range(0, len(message.text), READ_AT_ONCE)
                self._unread.extend(message.text[start : start + READ_AT_ONCE] for start in starts)
                return []
            case "flush":
                self._unspoken = False
                if segments := self._segmenter.flush():
                    self._silent = 0
                return segments
            case "cancel":
                raise BargeIn
            case "config":
                raise InvalidArgument.of([Violation("config", "may only be said first")])
            case _:
                raise InvalidArgument.of([Violation("message", "says nothing: set text, flush or cancel")])

    def _check_silence(self, characters: int) -> None:
        """Text without an end of a segment is kept: it must not grow for ever."""
        self._silent += characters
        if self._silent > self._limits.text_characters:
            raise InvalidArgument.of([Violation("text", f"has had nothing to speak for {self._silent} characters")])

    def _check_length(self, text: str) -> None:
        if len(text) > self._limits.text_characters:
            limit = self._limits.text_characters
            raise InvalidArgument.of([Violation("text", f"has {len(text)} characters; send at most {limit} at a time")])


async def read_config(messages: AsyncIterator[tts_pb2.StreamSynthesizeTextRequest]) -> tts_pb2.StreamConfig:
    """The first message of a text that is being written.

    Raises:
        InvalidArgument: it is no config, or there is none.
    """
    message = await anext(messages, None)
    if message is None or message.WhichOneof("message") != "config":
        raise InvalidArgument.of([Violation("config", "must be said first")])
    return message.config
