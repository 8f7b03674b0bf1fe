"""Objects in a folder, as they are without a bucket."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.errors import StartupError
from common.objects import Objects
from common.store import StoreUnavailable


async def test_what_was_put_is_there_until_it_is_old(tmp_path: Path) -> None:
    day = datetime(2026, 3, 1, tzinfo=UTC)
    objects = Objects(f"file://{tmp_path}/objects", lambda: day)
    name = objects.name("claims", "abc")
    assert name == "claims/2026-03-01/abc"
    assert await objects.get(name) is None
    await objects.put(name, b"x" * 1_000_000)
    assert await objects.get(name) == b"x" * 1_000_000
    day = datetime(2026, 3, 3, tzinfo=UTC)
    assert await objects.sweep("claims", 2) == 0
    day = datetime(2026, 3, 4, tzinfo=UTC)
    assert await objects.sweep("claims", 2) == 1
    assert await objects.get(name) is None
    await objects.delete(name)


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    objects = Objects(f"file://{tmp_path}/objects")
    (tmp_path / "objects" / "claims").write_text("in the way")
    with pytest.raises(StoreUnavailable):
        await objects.put(objects.name("claims", "abc"), b"x")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StartupError, match=f"cannot make the folder {tmp_path}/file/objects"):
        Objects(f"file://{tmp_path}/file/objects")


@pytest.mark.parametrize("url", ["nothing", "ftp://somewhere"])
def test_a_url_that_means_nothing(url: str) -> None:
    with pytest.raises(StartupError, match=r"store\.objects"):
        Objects(url)
