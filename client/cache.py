"""`chorus cache`: what the result cache holds, and forgetting it. `chorus warm`: filling it ahead."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from client.client import CallError, Client, Options
from client.embedded import url_of
from common.errors import StartupError
from common.settings import Settings
from common.shelf import Tags
from common.store import Store, StoreUnavailable
from gateway.cache import purge, purge_key
from protos.chorus.v1 import tts_pb2

PATIENCE_SECONDS = 2.0
KEY_DIGITS = 64
AT_ONCE = 8


async def purge_cache(settings: Settings, what: str, voice: str, revision: str) -> None:
    """Forgets speeches. `what`: as `gateway.cache.purge` takes it, or a key's digits.

    Raises:
        StartupError: there is no store, it does not answer, or it is no key.
    """
    store = _open(settings)
    try:
        if what.startswith("key:"):
            if not await purge_key(store, _key(what.removeprefix("key:")), Tags(voice, revision)):
                raise StartupError("the store has no such speech of that voice and revision; memory was forgotten")
        else:
            await purge(store, what)
    except StoreUnavailable:
        raise StartupError("the cache's store does not answer: is it running, and is its URL right?") from None
    finally:
        await store.close()


async def show_cache(settings: Settings, out: Console) -> None:
    """Prints what the store of the cache holds.

    Raises:
        StartupError: there is no store, or it does not answer.
    """
    store = _open(settings)
    try:
        memory: dict[str, Any] = await store.command("INFO", "memory")
        stats: dict[str, Any] = await store.command("INFO", "stats")
        entries = await store.command("DBSIZE")
    except StoreUnavailable:
        raise StartupError("the cache's store does not answer: is it running, and is its URL right?") from None
    finally:
        await store.close()
    table = Table(box=None, show_header=False)
    table.add_row("entries (speeches and what is noted of them)", f"{entries:,}")
    table.add_row("memory", f"{memory['used_memory'] / 2**20:,.1f} MiB of {memory['maxmemory'] / 2**20:,.0f}")
    table.add_row("evicted", f"{stats['evicted_keys']:,}")
    out.print(table)


@dataclass
class Warmed:
    """What became of the texts."""

    made: int = 0
    there: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    """Texts and why."""


async def warm(client: Client, texts: list[str], voice: str, language: str, console: Console) -> Warmed:
    """Has each text made that is not in the cache yet, behind all who wait for something."""
    warmed, pending = Warmed(), iter(texts)
    columns = (TextColumn("warming"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(texts))

        async def worker() -> None:
            for text in pending:
                await _warm_one(client, text, voice, language, warmed)
                progress.advance(bar)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return warmed


def read_texts(path: Path) -> list[str]:
    """A text on each line, each once; blank lines and those that begin with # are none.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


async def _warm_one(client: Client, text: str, voice: str, language: str, warmed: Warmed) -> None:
    status = tts_pb2.CACHE_STATUS_UNSPECIFIED
    raw = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)
    try:
        async for message in client.stream(
            text, voice=voice, language=language, format=raw, options=Options(priority="batch")
        ):
            if isinstance(message, tts_pb2.StreamStart):
                status = message.cache_status
    except CallError as error:
        warmed.failed.append((text, error.message))
        return
    if status == tts_pb2.CACHE_STATUS_HIT:
        warmed.there += 1
    else:
        warmed.made += 1


def _open(settings: Settings) -> Store:
    url = url_of(settings, "cache")
    if url is None:
        raise StartupError("no cache runs here: use `chorus up`, or name its store with --set store.cache=URL")
    return Store("cache", url, settings.store.model_copy(update={"budget": PATIENCE_SECONDS}))


def _key(digits: str) -> bytes:
    try:
        key = bytes.fromhex(digits)
    except ValueError:
        key = b""
    if len(key) * 2 != KEY_DIGITS:
        raise StartupError(f"a key has {KEY_DIGITS} hexadecimal digits; the gateway's log has them (cache_key)")
    return key
