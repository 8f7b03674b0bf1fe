"""Bytes too large for a store's memory, in an object store: a folder, S3, GCS, Azure, by URL."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from common.errors import StartupError
from common.store import StoreUnavailable

SECONDS = 10.0
"""How long a transfer may take."""
AT_ONCE = 32
"""Transfers; others wait for their turn, within the same time."""


class Objects:
    """Objects under names that begin with a kind and the day on which they were made. None is ever changed."""

    def __init__(self, url: str, today: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """`url`: `file:///folder`, `s3://bucket/prefix` or what else obstore knows.

        Raises:
            StartupError: there is no such store.
        """
        self._today = today
        self._turns = asyncio.Semaphore(AT_ONCE)
        try:
            if urlsplit(url).scheme == "file":
                self._store: Any = LocalStore(_folder(url))
            else:
                self._store = from_url(url)
        except (BaseError, ValueError, OSError):
            raise StartupError(
                "store.objects is no URL of an object store; write it as file:///folder or s3://bucket/prefix"
            ) from None

    def name(self, kind: str, leaf: str) -> str:
        """A name for an object made today."""
        return f"{kind}/{self._today():%Y-%m-%d}/{leaf}"

    async def put(self, name: str, data: bytes) -> None:
        """Keeps an object. Nobody ever sees a part of it.

        Raises:
            StoreUnavailable: it is not kept.
        """
        await self._bounded(lambda: obstore.put_async(self._store, name, data))

    async def get(self, name: str) -> bytes | None:
        """An object, if it is there.

        Raises:
            StoreUnavailable: nobody knows.
        """

        async def fetch() -> bytes | None:
            try:
                found = await obstore.get_async(self._store, name)
                return bytes(await found.bytes_async())
            except FileNotFoundError:
                return None

        found: bytes | None = await self._bounded(fetch)
        return found

    async def delete(self, name: str) -> None:
        """Forgets an object, whether it is there or not.

        Raises:
            StoreUnavailable: it may still be there.
        """
        with suppress(FileNotFoundError):
            await self._bounded(lambda: obstore.delete_async(self._store, name))

    async def sweep(self, kind: str, days: int) -> int:
        """Forgets what was made more than so many days ago. In a bucket, a lifecycle rule does the same.

        Raises:
            StoreUnavailable: not all of it was forgotten.
        """
        oldest = f"{self._today() - timedelta(days=days):%Y-%m-%d}"

        async def old() -> list[str]:
            names = []
            async for batch in obstore.list(self._store, prefix=f"{kind}/"):
                names += [entry["path"] for entry in batch if entry["path"].split("/")[1] < oldest]
            return names

        names: list[str] = await self._bounded(old)
        for name in names:
            await self.delete(name)
        return len(names)

    async def _bounded(self, transfer: Callable[[], Any]) -> Any:
        try:
            async with asyncio.timeout(SECONDS), self._turns:
                return await transfer()
        except FileNotFoundError:
            raise
        except (BaseError, OSError, TimeoutError) as error:
            raise StoreUnavailable("the object store does not answer") from error


def _folder(url: str) -> Path:
    folder = Path(url2pathname(urlsplit(url).path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"cannot make the folder {folder} of store.objects: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StartupError(f"cannot write to the folder {folder} of store.objects")
    return folder
