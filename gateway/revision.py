"""What the backends announce that their samples come from. Speech of different revisions is never mixed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc.aio

from common.keys import revision_of
from common.logs import logger
from protos.chorus.v1 import tts_pb2

POLL_SECONDS = 5.0
ANSWER_SECONDS = 2.0

GetServerInfo = Callable[[], Awaitable[tts_pb2.GetServerInfoResponse]]


class Revision:
    """The backends' revision, as far as is known.

    While backends are being replaced it is that of the one asked last. One that speaks with another says so with its
    speech (BYPASS), which then is neither kept nor shared.
    """

    def __init__(self, ask: GetServerInfo) -> None:
        """`ask`: a backend, whichever."""
        self._ask = ask
        self._doubted = asyncio.Event()
        self.current: str | None = None
        """None: not known yet."""

    def doubt(self) -> None:
        """A backend spoke with another revision: ask again soon."""
        self._doubted.set()

    async def follow(self) -> None:
        """Asks now and then, until cancelled."""
        while True:
            await self.learn()
            self._doubted.clear()
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._doubted.wait()
            except TimeoutError:
                continue

    async def learn(self) -> None:
        """Asks now."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                info = await self._ask()
        except (grpc.aio.AioRpcError, TimeoutError):
            return  # what was true is true until somebody says otherwise
        revision = revision_of(info)
        if revision != self.current:
            logger().info("backends' revision", revision=revision, before=self.current)
        self.current = revision
