"""Whatever the stores do, calls go on, within local limits, and health stays SERVING; and all heals by itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from protos.chorus.v1 import tts_pb2
from tests.calls import Door
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.stack import Server, Stack, free_port, text_request
from tests.valkey import Valkey, running_valkey

SERVING = 1
TRAILER = "x-chorus-idempotency"


class World:
    """A gateway, its store, and a door between them."""

    def __init__(self, gateway: Server, valkey: Valkey, proxy: FaultyProxy) -> None:
        self.gateway = gateway
        self.valkey = valkey
        self.proxy = proxy
        self.door = Door(gateway)
        self._calls = 0

    async def call(self) -> str:
        """A keyed call, which must succeed; how it was answered."""
        self._calls += 1
        call = self.door.speech.Synthesize(
            text_request(f"hello {self._calls}"), metadata=(("idempotency-key", f"k{self._calls}"),), timeout=20
        )
        assert (await call).audio
        return str(dict(await call.trailing_metadata())[TRAILER])

    async def until(self, outcome: str) -> None:
        """Calls until a call is answered so."""
        async with asyncio.timeout(30):
            while await self.call() != outcome:
                await asyncio.sleep(0.02)


async def hang(world: World) -> None:
    world.valkey.signal(signal.SIGSTOP)


async def wake(world: World) -> None:
    world.valkey.signal(signal.SIGCONT)


async def kill(world: World) -> None:
    await world.valkey.kill()


async def start_empty(world: World) -> None:
    await world.valkey.start()


async def slow(world: World) -> None:
    world.proxy.delay = 1.0


async def trickle(world: World) -> None:
    world.proxy.delay, world.proxy.trickle = 0.02, True


async def swallow(world: World) -> None:
    world.proxy.swallow = True


async def pass_on(world: World) -> None:
    world.proxy.delay, world.proxy.trickle, world.proxy.swallow = 0.0, False, False


async def fill(world: World) -> None:
    async with world.valkey.client() as client:
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "1mb")


async def empty(world: World) -> None:
    async with world.valkey.client() as client:
        await client.config_set("maxmemory", "0")


async def make_read_only(world: World) -> None:
    async with world.valkey.client() as client:
        await client.replicaof("127.0.0.1", str(free_port()))


async def make_writable(world: World) -> None:
    async with world.valkey.client() as client:
        await client.replicaof("NO", "ONE")


async def lock(world: World) -> None:
    async with world.valkey.client() as client:
        await client.config_set("requirepass", "another")
    world.valkey.password = "another"
    world.proxy.cut()


async def unlock(world: World) -> None:
    async with world.valkey.client() as client:
        await client.config_set("requirepass", "")
    world.valkey.password = None


Fault = Callable[[World], Awaitable[None]]
FAULTS: dict[str, tuple[Fault, Fault]] = {
    "hung": (hang, wake),
    "killed and started empty": (kill, start_empty),
    "slow": (slow, pass_on),
    "trickling": (trickle, pass_on),
    "silent": (swallow, pass_on),
    "full": (fill, empty),
    "read-only": (make_read_only, make_writable),
    "wrong password": (lock, unlock),
}


@asynccontextmanager
async def world(stack: Stack, folder: Path, **limits: Any) -> AsyncIterator[World]:
    """The ledger can be broken, and with it the cache, if that is not said to be elsewhere."""
    async with running_valkey(folder) as valkey, faulty_proxy(valkey.port) as proxy:
        # On a busy machine a healthy store may need longer than in production.
        url = f"redis://127.0.0.1:{proxy.port}/0"
        _, gateway = await stack.pair(store_ledger=url, store_budget=0.25, **limits)
        yield World(gateway, valkey, proxy)


@pytest.mark.parametrize("name", FAULTS)
async def test_calls_go_on_and_all_heals(stack: Stack, tmp_path: Path, name: str) -> None:
    break_it, mend_it = FAULTS[name]
    async with world(stack, tmp_path) as there:
        await there.until("claimed")
        for _ in range(2):  # a second time is like the first
            await break_it(there)
            await there.until("unavailable")
            outcomes = await asyncio.gather(*(there.call() for _ in range(20)))
            assert set(outcomes) <= {"unavailable", "claimed"}
            assert await there.gateway.health() == SERVING
            await mend_it(there)
            await there.until("claimed")
        await there.gateway.until_metric("chorus_store_available", 1)
        assert there.gateway.metric("chorus_store_failures_total") > 0
        told = [line for line in there.gateway.log() if line.get("store") == "ledger" and line["level"] == "warning"]
        assert len(told) == 1  # once a minute
        assert not [line for line in there.gateway.log() if line["level"] == "error"]


async def test_the_ledger_alone_is_away(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    async with running_valkey(tmp_path / "cache") as cache, world(stack, tmp_path, store_cache=cache.url) as there:
        await there.until("claimed")
        await hang(there)
        await there.until("unavailable")
        text = text_request("asked for twice")
        statuses = [(await there.door.speech.Synthesize(text, timeout=20)).start.cache_status for _ in range(2)]
        assert statuses == [tts_pb2.CACHE_STATUS_MISS, tts_pb2.CACHE_STATUS_HIT]
        async with cache.client() as client:
            assert [name for name in await client.keys("cache:*") if name != b"cache:generations"]
        await wake(there)
        await there.until("claimed")


async def test_limits_hold_without_the_ledger(stack: Stack, tmp_path: Path) -> None:
    limits = {"limiter_requests_per_second": 0.001, "limiter_requests_burst": 30, "limiter_gateways": 2}
    async with world(stack, tmp_path, **limits) as there:
        await there.valkey.kill()
        codes = []
        for number in range(40):
            try:
                await there.door.speech.Synthesize(text_request(f"{number}"), timeout=20)
                codes.append(grpc.StatusCode.OK)
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
        assert codes.count(grpc.StatusCode.OK) == 15  # its share
        assert set(codes[15:]) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert there.gateway.metric("chorus_limiter_degraded_total") > 0


async def test_without_any_store_all_is_as_before(stack: Stack) -> None:
    _, gateway = await stack.pair()
    door = Door(gateway)
    assert (await door.speech.Synthesize(text_request("hello"))).audio
    assert await gateway.health() == SERVING
