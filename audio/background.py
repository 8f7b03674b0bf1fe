"""Encodes off the event loop, so that one listener's codec holds up nobody else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from audio.encode import Encoder, costs_nothing
from audio.formats import Format
from audio.frames import SAMPLE_BYTES

PIECE_SECONDS = 0.25
"""Audio that a thread encodes at a time: what is done of a long piece need not wait for the rest."""

_THREADS = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="encode")
"""Of all encoders of the process. Codecs hold no lock of Python's while they work."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next bytes of a file, and where the samples begin that they let one hear, at the format's rate."""

    data: bytes
    start_sample: int


class BackgroundEncoder:
    """Encodes one speech for an event loop. What costs nothing is done at once, all else on a thread.

    One call at a time. It may be closed while a call runs, as happens when a task is cancelled: the codec is then
    released as soon as its thread is done with it.
    """

    def __init__(self, format: Format, engine_rate: int) -> None:
        """`format`: as `resolve` gives it. `engine_rate`: in hertz."""
        self._encoder = Encoder(format, engine_rate)
        self._inline = costs_nothing(format, engine_rate)
        self._piece_bytes = round(PIECE_SECONDS * engine_rate) * SAMPLE_BYTES
        self._last: Future[bytes] = Future()
        self._last.set_result(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last.add_done_callback(lambda last: self._encoder.close())

    @property
    def samples(self) -> int:
        """Samples of the speech, at the format's rate, that can be heard with the pieces given so far."""
        return self._encoder.samples

    def parts(self, pcm: bytes) -> Iterator[bytes]:
        """Samples in the amounts in which they should be given to `encode`."""
        step = len(pcm) if self._inline else self._piece_bytes
        return (pcm[start : start + step] for start in range(0, len(pcm), step or 1))

    async def encode(self, pcm: bytes) -> Piece | None:
        """Takes samples, and gives what can be sent now."""
        return await self._run(lambda: self._encoder.encode(pcm))

    async def finish(self) -> Piece | None:
        """The end of the file."""
        return await self._run(self._encoder.finish)

    async def _run(self, work: Callable[[], bytes]) -> Piece | None:
        start = self._encoder.samples
        if self._inline:
            data = work()
        else:
            self._last = _THREADS.submit(work)
            data = await asyncio.wrap_future(self._last)
        return Piece(data, start) if data else None
