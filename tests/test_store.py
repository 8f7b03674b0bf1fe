"""The store's door, against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.settings import StoreSettings
from common.store import Script, Store, StoreUnavailable
from tests.valkey import running_valkey


async def test_a_script_runs_although_the_server_has_never_seen_it(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as server:
        store = Store("ledger", server.url, StoreSettings(budget=5.0))
        assert await store.run(Script("return redis.call('INCRBY', KEYS[1], ARGV[1])"), ["n"], [3]) == 3
        assert await store.command("GET", "n") == b"3"
        await store.close()


async def test_without_a_url_nothing_is_available() -> None:
    store = Store("ledger", None, StoreSettings())
    assert not store.configured
    with pytest.raises(StoreUnavailable):
        await store.command("PING")
