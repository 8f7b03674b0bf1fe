"""The cache from the command line: filled ahead, looked into, forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from protos.chorus.v1 import tts_pb2
from tests.calls import Door, until
from tests.stack import Stack, text_request
from tests.test_cli import chorus
from tests.valkey import Valkey

TEXTS = "# greetings\nHello there.\nGood morning.\n\nHello there.\n好的。\n"


async def run(*arguments: str, folder: Path, url: str = "", code: int = 0) -> str:
    env = {"CHORUS_STORE_CACHE": url} if url else {}
    done = await asyncio.to_thread(lambda: chorus(*arguments, cwd=folder, env=env))
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


async def test_warm_look_purge(stack: Stack, valkey: Valkey, tmp_path: Path) -> None:
    service, gateway = await stack.pair(store_cache=valkey.url)
    file = tmp_path / "texts.txt"
    file.write_text(TEXTS)
    address = ("--address", gateway.address)
    said = await run("warm", "-f", str(file), *address, folder=tmp_path)
    assert "3 made, 0 were there, 0 failed" in said
    assert "0 made, 3 were there" in await run("warm", "-f", str(file), *address, folder=tmp_path)
    (line, *_) = [line for line in service.log() if line["event"] == "call" and line.get("audio_s")]
    assert line["priority"] == "batch"
    assert "entries" in await run("cache", "stats", folder=tmp_path, url=valkey.url)
    door = Door(gateway)

    async def status() -> int:
        return (await door.speech.Synthesize(text_request("Hello there."))).start.cache_status

    assert await status() == tts_pb2.CACHE_STATUS_HIT
    await run("cache", "purge", "--voice", "female1", folder=tmp_path, url=valkey.url)
    await until(lambda: any(line["event"] == "the cache was purged" for line in gateway.log()))
    assert await status() in (tts_pb2.CACHE_STATUS_MISS, tts_pb2.CACHE_STATUS_COALESCED)


@pytest.mark.parametrize(
    "arguments", [(), ("--all", "--voice", "a"), ("--key", "00"), ("--key", "zz", "--voice", "a", "--revision", "b")]
)
async def test_what_cannot_be_purged(tmp_path: Path, valkey: Valkey, arguments: tuple[str, ...]) -> None:
    code = 78 if len(arguments) == 6 else 2
    await run("cache", "purge", *arguments, folder=tmp_path, url=valkey.url, code=code)


async def test_without_a_cache(tmp_path: Path) -> None:
    assert "chorus up" in await run("cache", "stats", folder=tmp_path, code=78)
