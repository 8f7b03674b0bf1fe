"""Continuous batching, strictly first come, first served, without a bound: what many engines do, in its simplest form.

Who hangs up while waiting is dropped; who runs goes on to the end.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator

from bench.rivals.engines import Piece, StepEngine
from bench.rivals.in_process import serve
from bench.rivals.options import options
from common.settings import load_settings


class Call:
    """Somebody who waits for pieces."""

    def __init__(self, text: str, stream: bool) -> None:
        self.text = text
        self.stream = stream
        self.gone = False
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()


class Fifo:
    """A queue before the engine, which steps on a thread of its own."""

    def __init__(self, engine: StepEngine, rows: int) -> None:
        self._engine = engine
        self._rows = rows
        self._queue: deque[Call] = deque()
        self._came = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def speak(self, text: str, stream: bool, seconds: float | None) -> AsyncGenerator[bytes, None]:
        """Samples as they are made."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._run, daemon=True).start()
        call = Call(text, stream)
        self._queue.append(call)
        self._came.set()
        try:
            while not (piece := await call.pieces.get()).last:
                yield piece.pcm
            yield piece.pcm
        finally:
            call.gone = True

    def _run(self) -> None:
        assert self._loop is not None
        while True:
            self._admit()
            if not self._engine.rows:
                self._came.wait()
                self._came.clear()
            elif pieces := self._engine.step():
                self._loop.call_soon_threadsafe(_deliver, pieces)

    def _admit(self) -> None:
        while self._queue and self._engine.rows < self._rows:
            call = self._queue.popleft()
            if not call.gone:
                self._engine.join(call, call.text, call.stream)


def _deliver(pieces: list[Piece]) -> None:
    for piece in pieces:
        assert isinstance(piece.key, Call)
        piece.key.pieces.put_nowait(piece)


def main() -> None:
    """Serves until it is killed."""
    told = options()
    serve(told.address, Fifo(StepEngine(load_settings().tone), told.rows))


if __name__ == "__main__":
    main()
