"""Encodes off the event loop, so that one listener's codec holds up nobody else."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from audio.budget import Budget, Kind
from audio.encode import Encoder, costs_nothing
from audio.formats import Format
from audio.frames import SAMPLE_BYTES

PIECE_SECONDS = 0.25
"""Audio that a thread encodes at a time: what is done of a long piece need not wait for the rest."""

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_THREADS = ThreadPoolExecutor(CORES, thread_name_prefix="encode")
"""Of all encoders of the process. Codecs hold no lock of Python's while they work."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next bytes of a file, and where the samples begin that they let one hear, at the format's rate."""

    data: bytes
    start_sample: int


class BackgroundEncoder:
    """Encodes one speech for an event loop, on threads. Its room is reserved before there is anything to encode.

    One call at a time. The codec is made with the first samples. It may be closed while a call runs, as happens when a
    task is cancelled: its room is free at once, and the codec is released as soon as its thread is done with it.
    """

    def __init__(self, budget: Budget) -> None:
        """`budget`: of the process."""
        self._budget = budget
        self._kind: Kind | None = None
        """What is reserved."""
        self._format: Format | None = None
        self._engine_rate = 0
        self._encoder: Encoder | None = None
        self._closed = False
        self._last: Future[tuple[bytes, float]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._release()
        if self._last is not None:
            self._last.add_done_callback(lambda last: self._encoder.close() if self._encoder else None)

    def reserve(self, format: Format, engine_rate: int) -> None:
        """Takes room for a format's encoder. Whoever has room already keeps it, for the new format.

        What costs nothing, and what is closed, needs none. `format`: as `resolve` gives it. `engine_rate`: in hertz.

        Raises:
            EncodersBusyError: there is no room.
        """
        self._format, self._engine_rate = format, engine_rate
        if self._closed or costs_nothing(format, engine_rate):
            self._release()
        elif self._kind is None:
            self._budget.take(kind := Kind.of(format))
            self._kind = kind
        else:
            self._budget.move(self._kind, kind := Kind.of(format))
            self._kind = kind

    @property
    def samples(self) -> int:
        """Samples of the speech, at the format's rate, that can be heard with the pieces given so far."""
        return self._encoder.samples if self._encoder else 0

    def parts(self, pcm: bytes) -> Iterator[bytes]:
        """Samples in the amounts in which they should be given to `encode`."""
        step = round(PIECE_SECONDS * self._engine_rate) * SAMPLE_BYTES
        return (pcm[start : start + step] for start in range(0, len(pcm), step))

    async def encode(self, pcm: bytes) -> Piece | None:
        """Takes samples, and gives what can be sent now."""
        return await self._run(lambda: self._opened().encode(pcm), len(pcm) // SAMPLE_BYTES)

    async def finish(self) -> Piece | None:
        """The end of the file."""
        return await self._run(lambda: self._opened().finish(), 0)

    async def _run(self, work: Callable[[], bytes], samples: int) -> Piece | None:
        kind, start = self._kind, self.samples
        assert kind is not None
        self._last = _THREADS.submit(_timed, work)
        data, cpu_seconds = await asyncio.wrap_future(self._last)
        self._budget.measured(kind, cpu_seconds, samples / self._engine_rate)
        return Piece(data, start) if data else None

    def _opened(self) -> Encoder:
        """The codec. Made on a thread, since that may take milliseconds."""
        if self._encoder is None:
            assert self._format is not None
            self._encoder = Encoder(self._format, self._engine_rate)
        return self._encoder

    def _release(self) -> None:
        if self._kind is not None:
            self._budget.give(self._kind)
            self._kind = None


def _timed(work: Callable[[], bytes]) -> tuple[bytes, float]:
    """What a thread has made, and the seconds of its own CPU that it took."""
    began = time.thread_time()
    data = work()
    return data, time.thread_time() - began
