"""A door in front of a server that delays, trickles, swallows or cuts what passes, and can speak TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

PIECE = 65_536


@dataclass
class FaultyProxy:
    """Its faults may be changed while it runs. They hold for what the server answers."""

    port: int = 0
    delay: float = 0.0
    """Seconds before each piece of an answer."""
    trickle: bool = False
    """Answers come byte by byte, `delay` apart."""
    swallow: bool = False
    """Answers never come."""
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """Breaks all connections, in the middle of whatever passes."""
        for writer in self.writers:
            writer.transport.abort()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes the server's answers on, with all faults."""
        while piece := await reader.read(1 if self.trickle else PIECE):
            await asyncio.sleep(self.delay)
            if not self.swallow:
                writer.write(piece)
                await writer.drain()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(PIECE):
        writer.write(piece)
        await writer.drain()


@asynccontextmanager
async def faulty_proxy(port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[FaultyProxy]:
    """A proxy before a port of this machine, without faults at first."""
    proxy = FaultyProxy()
    running: set[asyncio.Task[None]] = set()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()
            return
        proxy.writers |= {writer, inner_writer}
        pumps = [
            asyncio.create_task(_ask(reader, inner_writer)),
            asyncio.create_task(proxy.answer(inner_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, inner_writer):
                end.transport.abort()
                with suppress(OSError):
                    await end.wait_closed()
            proxy.writers -= {writer, inner_writer}
            running.discard(task)

    server = await asyncio.start_server(connect, "127.0.0.1", 0, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
