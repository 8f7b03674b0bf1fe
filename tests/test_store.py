"""The store's door, against real servers that hang, die, fill up or refuse."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelManagedSSLConnection
from structlog.testing import capture_logs

from common.errors import StartupError
from common.settings import StoreSettings
from common.store import MAX_WAITING, Script, Store, StoreUnavailable
from common.store_url import connect
from tests.faulty_proxy import faulty_proxy
from tests.stack import free_port
from tests.valkey import Valkey, running_valkey

PATIENT = StoreSettings(budget=5.0)
"""For what should succeed, however busy the machine is."""
HASTY = StoreSettings(budget=0.05)
COUNT = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")


@asynccontextmanager
async def opened(url: str | None, settings: StoreSettings = PATIENT) -> AsyncIterator[Store]:
    store = Store("ledger", url, settings)
    try:
        yield store
    finally:
        await store.close()


async def until_answers(store: Store) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await store.command("PING")
                return
            except StoreUnavailable:
                await asyncio.sleep(0.05)


async def give_up(store: Store, times: int = 8) -> None:
    """Asks until the breaker has long been open."""
    for _ in range(times):
        with pytest.raises(StoreUnavailable):
            await store.command("SET", "a", 1)
    assert not store.available


async def test_a_script_runs_although_the_server_has_never_seen_it(valkey: Valkey) -> None:
    async with opened(valkey.url) as store:
        assert await asyncio.gather(*(store.run(COUNT, ["n"], [1]) for _ in range(3))) == [1, 2, 3]
        assert await store.command("GET", "n") == b"3"


async def test_commands_of_one_turn_go_together(valkey: Valkey) -> None:
    async with opened(valkey.url) as store, valkey.client() as client:
        await store.command("PING")
        before = (await client.info("stats"))["total_reads_processed"]
        replies = await asyncio.gather(*(store.command("INCR", "n") for _ in range(100)))
        assert replies == list(range(1, 101))
        reads = (await client.info("stats"))["total_reads_processed"] - before
        assert reads <= 3


async def test_an_error_reply_is_its_own_commands_alone(valkey: Valkey) -> None:
    async with opened(valkey.url) as store:
        await store.command("SET", "word", "x")
        replies = await asyncio.gather(
            store.command("GET", "word"), store.command("INCR", "word"), return_exceptions=True
        )
        assert replies[0] == b"x"
        assert isinstance(replies[1], StoreUnavailable)
        assert store.available


async def test_a_caller_who_leaves_breaks_nothing(valkey: Valkey) -> None:
    async with opened(valkey.url) as store:
        for _ in range(20):
            leaving = asyncio.create_task(store.command("INCR", "n"))
            staying = asyncio.create_task(store.command("ECHO", "mine"))
            await asyncio.sleep(0)
            leaving.cancel()
            assert await staying == b"mine"


async def test_a_server_that_hangs_is_left_alone_until_it_wakes(valkey: Valkey) -> None:
    async with opened(valkey.url, HASTY) as store:
        await until_answers(store)
        valkey.signal(signal.SIGSTOP)
        await give_up(store)
        valkey.signal(signal.SIGCONT)
        await until_answers(store)
        assert store.available


async def test_a_server_that_is_killed_is_found_again(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as server, opened(server.url, HASTY) as store:
        await until_answers(store)
        await store.run(COUNT, ["n"], [1])
        await server.kill()
        await give_up(store)
        await server.start()
        await until_answers(store)
        assert await store.run(COUNT, ["n"], [1]) == 1  # it came back empty, and has forgotten the script


async def test_a_full_server_is_unavailable_for_what_it_refuses(tmp_path: Path) -> None:
    options = ("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    async with running_valkey(tmp_path, *options) as server, opened(server.url) as store:
        await give_up(store)


async def test_a_replica_that_may_not_be_written_is_unavailable(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as server, opened(server.url) as store:
        async with server.client() as client:
            await client.replicaof("127.0.0.1", free_port())
        await give_up(store)


async def test_a_wrong_password_is_told_to_nobody(tmp_path: Path) -> None:
    async with running_valkey(tmp_path, "--requirepass", "right", password="right") as server:
        url = server.url.replace("//", "//:wrongpass@")
        with capture_logs() as logs:
            async with opened(url) as store:
                await give_up(store)
        assert len(logs) == 1  # one line a minute
        assert "wrongpass" not in str(logs)


async def test_nobody_there() -> None:
    async with opened(f"redis://127.0.0.1:{free_port()}") as store:
        await give_up(store)


async def test_what_waits_is_bounded(valkey: Valkey) -> None:
    async with opened(valkey.url, StoreSettings(budget=0.5)) as store:
        await until_answers(store)
        valkey.signal(signal.SIGSTOP)
        asked = [asyncio.create_task(store.command("PING")) for _ in range(MAX_WAITING + 50)]
        await asyncio.sleep(0)
        assert sum(task.done() for task in asked) == 50
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(answer, StoreUnavailable) for answer in done)
        valkey.signal(signal.SIGCONT)


async def test_tls_with_certificates_on_both_sides(tmp_path: Path) -> None:
    authority, ours = trustme.CA(), tmp_path / "ours.pem"
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("gateway").private_key_and_cert_chain_pem.write_to_path(str(ours))
    # The server in its wheel has no TLS: a door before it speaks it.
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    known = StoreSettings(budget=5.0, tls_ca=tmp_path / "ca.pem", tls_certificate=ours, tls_key=ours)
    async with (
        running_valkey(tmp_path, "--requirepass", "s3cret", password="s3cret") as server,
        faulty_proxy(server.port, context) as door,
    ):
        async with opened(f"rediss://:s3cret@127.0.0.1:{door.port}", known) as store:
            assert await store.run(COUNT, ["n"], [1]) == 1
        async with opened(f"rediss://:s3cret@127.0.0.1:{door.port}") as stranger:
            await give_up(stranger)


async def test_answers_that_come_slowly_or_never_or_are_cut(valkey: Valkey) -> None:
    async with faulty_proxy(valkey.port) as proxy, opened(f"redis://127.0.0.1:{proxy.port}", HASTY) as store:
        await until_answers(store)
        proxy.delay = 1.0
        await give_up(store)
        proxy.delay, proxy.trickle = 0.03, True
        await give_up(store)
        proxy.delay, proxy.trickle, proxy.swallow = 0.0, False, True
        await give_up(store)
        proxy.swallow = False
        await until_answers(store)
        for number in range(20):
            asked = asyncio.create_task(store.command("ECHO", number))
            await asyncio.sleep(0)
            proxy.cut()
            try:
                assert await asked == str(number).encode()
            except StoreUnavailable:
                await until_answers(store)


async def test_a_master_is_found_through_sentinels(valkey: Valkey, tmp_path: Path) -> None:
    (tmp_path / "sentinel.conf").write_text(f"sentinel monitor main 127.0.0.1 {valkey.port} 1\n")
    async with running_valkey(tmp_path, config=tmp_path / "sentinel.conf", sentinel=True) as sentinel:
        async with opened(f"redis+sentinel://127.0.0.1:{sentinel.port}/main/1") as store:
            await store.command("SET", "a", "through a sentinel")
        async with valkey.client() as client:
            await client.select(1)
            assert await client.get("a") == b"through a sentinel"


async def test_a_cluster_of_one(tmp_path: Path) -> None:
    options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    async with running_valkey(tmp_path, *options) as server, server.client() as client:
        run: Any = client.execute_command
        await run("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        async with asyncio.timeout(30):
            while "ok" not in str(await run("CLUSTER", "INFO")).split("cluster_state")[1][:8]:
                await asyncio.sleep(0.1)
        async with opened(f"redis+cluster://127.0.0.1:{server.port}") as store:
            replies = await asyncio.gather(*(store.command("INCR", f"key {number}") for number in range(20)))
            assert replies == [1] * 20
            assert await store.run(COUNT, ["n"], [1]) == 1


async def test_without_a_url_nothing_is_available() -> None:
    async with opened(None) as store:
        assert not store.configured
        with pytest.raises(StoreUnavailable):
            await store.command("PING")


async def test_sentinels_and_clusters_speak_tls_too(tmp_path: Path) -> None:
    # The server in its wheel has no TLS, and a door before it cannot change the addresses that it announces: what is
    # seen here is that the clients would speak it, and whom they would believe.
    settings = StoreSettings(tls_ca=tmp_path / "ca.pem")
    found = connect("cache", "rediss+sentinel://127.0.0.1:1/main", settings)
    sentinels = found.connection_pool.sentinel_manager.sentinels
    assert found.connection_pool.connection_class is SentinelManagedSSLConnection
    assert found.connection_pool.connection_kwargs["ssl_ca_certs"] == str(settings.tls_ca)
    assert {sentinel.connection_pool.connection_class for sentinel in sentinels} == {SSLConnection}
    cluster = connect("cache", "rediss+cluster://127.0.0.1:1", settings)
    assert cluster.connection_kwargs["ssl_ca_certs"] == str(settings.tls_ca)
    assert cluster.connection_kwargs["connection_class"] is SSLConnection


@pytest.mark.parametrize("url", ["http://s3cret", "redis+sentinel://host:1", "localhost", "redis://:s3cret@h:port"])
def test_a_url_that_means_nothing_is_named_without_its_password(url: str) -> None:
    with pytest.raises(StartupError, match=r"store\.ledger") as caught:
        Store("ledger", url, PATIENT)
    assert "s3cret" not in str(caught.value)
