"""The policy of Triton's dynamic batcher, in process: whole utterances, first come, first served.

A batch leaves when it is full, or when the oldest in the queue has waited `max_queue_delay`. The queue is bounded, and
whose timeout has passed there is dropped. As in Triton, that is looked at only when the next batch is made.
Source: the Triton user guide, "Dynamic Batcher" and `ModelQueuePolicy`; triton-inference-server/server#7512.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from bench.offered import COMPRESSION, FIRST_CHUNK_SECONDS, QUEUE_SHARE
from bench.rivals.engines import WholeUtteranceEngine
from bench.rivals.in_process import RefusedError, TooLateError, serve
from bench.rivals.options import options
from common.settings import load_settings

MAX_QUEUE_SIZE = 1024
STREAM_SECONDS = FIRST_CHUNK_SECONDS / COMPRESSION
"""What is promised to who wants a stream."""


@dataclass(slots=True)
class _Waiting:
    text: str
    came: float
    expires: float
    audio: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class DynamicBatcher:
    """A bounded queue before a function that computes a batch."""

    def __init__(self, compute: Callable[[Sequence[str]], list[bytes]], max_batch: int, max_queue_delay: float) -> None:
        """`max_queue_delay`: seconds."""
        self._compute = compute
        self._max_batch = max_batch
        self._delay = max_queue_delay
        self._queue: deque[_Waiting] = deque()
        self._came = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def speak(self, text: str, stream: bool, seconds: float | None) -> AsyncGenerator[bytes, None]:
        """Waits for its batch.

        Raises:
            RefusedError: the queue is full.
            TooLateError: its timeout passed in the queue.
        """
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        if len(self._queue) >= MAX_QUEUE_SIZE:
            raise RefusedError
        now = time.monotonic()
        waiting = _Waiting(text, now, now + QUEUE_SHARE * (STREAM_SECONDS if stream or seconds is None else seconds))
        self._queue.append(waiting)
        self._came.set()
        yield await waiting.audio

    async def _run(self) -> None:
        while True:
            await self._batch_ready()
            self._drop_late()
            batch = [self._queue.popleft() for _ in range(min(self._max_batch, len(self._queue)))]
            if batch:
                audio = await asyncio.to_thread(self._compute, [each.text for each in batch])
                for waiting, samples in zip(batch, audio, strict=True):
                    if not waiting.audio.done():
                        waiting.audio.set_result(samples)

    async def _batch_ready(self) -> None:
        """Waits until a batch may leave."""
        while len(self._queue) < self._max_batch:
            self._came.clear()
            rest = self._queue[0].came + self._delay - time.monotonic() if self._queue else None
            if rest is not None and rest <= 0:
                return
            try:
                await asyncio.wait_for(self._came.wait(), rest)
            except TimeoutError:
                return

    def _drop_late(self) -> None:
        now = time.monotonic()
        kept = [waiting for waiting in self._queue if waiting.expires > now and not waiting.audio.done()]
        for waiting in self._queue:
            if waiting.expires <= now and not waiting.audio.done():
                waiting.audio.set_exception(TooLateError())
        self._queue = deque(kept)


def main() -> None:
    """Serves until it is killed."""
    told = options()
    engine = WholeUtteranceEngine(load_settings().tone)
    serve(told.address, DynamicBatcher(engine.speak, told.rows, told.wait_seconds))


if __name__ == "__main__":
    main()
