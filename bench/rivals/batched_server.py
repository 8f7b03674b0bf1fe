"""`batched`: dynamic batches of whole utterances, in process, behind the least of a server.

It drops who has hung up before the batch begins.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from batched import aio

from bench.rivals.engines import WholeUtteranceEngine
from bench.rivals.in_process import serve
from bench.rivals.options import options
from common.settings import load_settings


class Speaker:
    """The engine behind a processor of `batched`."""

    def __init__(self, rows: int, wait_seconds: float) -> None:
        engine = WholeUtteranceEngine(load_settings().tone)

        def speak(texts: list[str]) -> list[bytes]:
            return engine.speak(texts) if texts else []

        self._processor = aio.dynamically(speak, batch_size=rows, timeout_ms=wait_seconds * 1000)

    async def speak(self, text: str, stream: bool, seconds: float | None) -> AsyncGenerator[bytes, None]:
        """Waits for its batch."""
        yield await self._processor(text)


def main() -> None:
    """Serves until it is killed."""
    told = options()
    serve(told.address, Speaker(told.rows, told.wait_seconds))


if __name__ == "__main__":
    main()
