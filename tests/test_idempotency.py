"""A keyed call runs once, whoever makes it again, wherever, and whoever dies meanwhile. Real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.calls import _CALL, Call
from common.errors import (
    Aborted,
    ChorusError,
    DeadlineExceeded,
    InvalidArgument,
    OutOfRange,
    Relayed,
    ResourceExhausted,
    Unavailable,
)
from common.objects import Objects
from common.settings import StoreSettings
from common.store import Store
from gateway.claims import Claim, Keyed, State
from gateway.idempotency import Idempotency, fingerprint, job_id, read_key
from gateway.records import INLINE_BYTES
from protos.chorus.v1 import tts_pb2
from tests.stack import free_port
from tests.valkey import Valkey

PATIENT = StoreSettings(budget=5.0)
Reply = tts_pb2.SynthesizeResponse


@pytest.fixture(autouse=True)
def _a_call() -> None:
    _CALL.set(Call("method", "request"))


def keyed(key: str = "k", text: str = "hello", tenant: str = "a", seconds: float = 30.0) -> Keyed:
    print_ = fingerprint(tts_pb2.SynthesizeRequest(text=text))
    return Keyed(tenant, "Synthesize", key, print_, time.monotonic() + seconds)


class Work:
    """Something that takes as long as it is told to, and counts how often it runs."""

    def __init__(self, audio: bytes = b"audio", error: ChorusError | None = None) -> None:
        self.runs = 0
        self.at_once = 0
        self.most_at_once = 0
        self.gate = asyncio.Event()
        self._audio = audio
        self._error = error

    async def __call__(self) -> Reply:
        self.runs += 1
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            await self.gate.wait()
            if self._error is not None:
                raise self._error
            return Reply(audio=self._audio + str(self.runs).encode())
        finally:
            self.at_once -= 1


@asynccontextmanager
async def gateways(url: str | None, folder: Path, count: int = 1) -> AsyncIterator[list[Idempotency]]:
    stores = [Store("ledger", url, PATIENT) for _ in range(count)]
    try:
        yield [Idempotency(store, Objects(f"file://{folder}/objects")) for store in stores]
    finally:
        for store in stores:
            await store.close()


def ask(gateway: Idempotency, work: Work, of: Keyed | None = None) -> asyncio.Task[Reply]:
    return asyncio.create_task(gateway.unary(of or keyed(), Reply, work))


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("size", [10, INLINE_BYTES * 4])
async def test_a_retry_gets_the_same_bytes(valkey: Valkey, tmp_path: Path, size: int) -> None:
    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        work = Work(b"x" * size)
        work.gate.set()
        first = await ask(one, work)
        assert await ask(one, work) == first
        assert await ask(other, work) == first
        assert work.runs == 1


async def test_in_one_gateway_a_retry_joins(valkey: Valkey, tmp_path: Path) -> None:
    async with gateways(valkey.url, tmp_path) as (gateway,):
        work = Work()
        first, second = ask(gateway, work), ask(gateway, work)
        await until(lambda: work.runs)
        first.cancel()  # it goes on
        third = ask(gateway, work)
        await asyncio.sleep(0.01)
        work.gate.set()
        assert await second == await third
        assert work.runs == 1


async def test_on_another_gateway_a_retry_waits_and_gets_the_same(valkey: Valkey, tmp_path: Path) -> None:
    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        work = Work()
        first = ask(one, work)
        await until(lambda: work.runs)
        second = ask(other, work)
        await asyncio.sleep(0.1)
        work.gate.set()
        assert await first == await second
        assert work.runs == 1


async def test_a_retry_that_cannot_wait_is_told_to_come_again(valkey: Valkey, tmp_path: Path) -> None:
    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        work = Work()
        first = ask(one, work)
        await until(lambda: work.runs)
        with pytest.raises(Aborted) as caught:
            await ask(other, work, keyed(seconds=0.3))
        assert caught.value.reason == "IDEMPOTENCY_IN_PROGRESS"
        assert caught.value.retry_after
        work.gate.set()
        await first


async def test_the_last_one_leaves_and_the_claim_is_free_at_once(valkey: Valkey, tmp_path: Path) -> None:
    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        work = Work()
        first = ask(one, work)
        await until(lambda: work.runs)
        first.cancel()
        await until(lambda: not work.at_once and not one._runs)
        work.gate.set()
        assert (await ask(other, work)).audio == b"audio2"


async def test_a_key_is_for_one_request_of_one_tenant(valkey: Valkey, tmp_path: Path) -> None:
    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        work = Work()
        running = ask(one, work)
        await until(lambda: work.runs)
        for gateway in (one, other):
            with pytest.raises(InvalidArgument) as caught:
                await ask(gateway, work, keyed(text="goodbye"))
            assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"
        work.gate.set()
        await running
        with pytest.raises(InvalidArgument):
            await ask(other, work, keyed(text="goodbye"))
        assert (await ask(other, work, keyed(tenant="b"))).audio == b"audio2"


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (OutOfRange("too long", "AUDIO_TOO_LONG"), True),
        (InvalidArgument("nothing", "NOTHING_SPOKEN"), True),
        (InvalidArgument("wrong", "INVALID_FIELDS"), False),
        (ResourceExhausted("busy", "QUEUE_FULL", retry_after=1.0, quota="queue"), False),
        (Unavailable("gone", "BACKEND_UNAVAILABLE", retry_after=1.0), False),
        (DeadlineExceeded("late", "DEADLINE_EXCEEDED"), False),
    ],
)
async def test_only_failures_that_would_come_again_are_kept(
    valkey: Valkey, tmp_path: Path, error: ChorusError, kept: bool
) -> None:
    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        work = Work(error=error)
        work.gate.set()
        for gateway in (one, other):
            with pytest.raises(ChorusError) as caught:
                await ask(gateway, work)
            assert (caught.value.code, caught.value.reason) == (error.code, error.reason)
            assert caught.value.status().details == error.status().details
        assert work.runs == (1 if kept else 2)


async def test_a_dead_owners_claim_is_taken_over_and_it_is_fenced_when_it_wakes_up(
    valkey: Valkey, tmp_path: Path
) -> None:
    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        late, work = Work(b"late"), Work(b"new")
        work.gate.set()
        asleep = ask(one, late)
        await until(lambda: late.runs)
        async with valkey.client() as client:
            await client.delete(keyed().name)  # as its lease's end does
        assert (await ask(other, work)).audio == b"new1"
        late.gate.set()
        assert (await asleep).audio == b"late1"  # its own caller gets its own audio
        assert (await ask(one, work)).audio == b"new1"  # and everybody else what was kept


async def test_who_is_fenced_changes_nothing_of_what_is_kept(valkey: Valkey, tmp_path: Path) -> None:
    def objects() -> int:
        return sum(path.is_file() for path in (tmp_path / "objects").rglob("*"))

    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        late, work = Work(b"late" * INLINE_BYTES), Work(b"new" * INLINE_BYTES)  # kept as objects
        work.gate.set()
        asleep = ask(one, late)
        await until(lambda: late.runs)
        async with valkey.client() as client:
            await client.delete(keyed().name)  # as its lease's end does
        kept = await ask(other, work)
        late.gate.set()
        assert await asleep != kept
        for gateway in (one, other):
            assert await ask(gateway, work) == kept
        assert objects() == 1


async def test_who_leaves_while_claiming_leaves_no_claim(valkey: Valkey, tmp_path: Path) -> None:
    async with gateways(valkey.url, tmp_path) as (gateway,), valkey.client() as client:
        for turns in range(40):  # of the event loop: before, while and after the ledger is asked
            work, of = Work(), keyed(f"left after {turns}")
            caller = ask(gateway, work, of)
            for _ in range(turns):
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.wait({caller})
        await until(lambda: not gateway._runs)
        await gateway._ledger.command("PING")  # whatever was sent before has arrived
        assert not [key async for key in client.scan_iter("claim:*")]


async def test_a_lease_ends_by_itself(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.claims.LEASE_SECONDS", 0.05)
    store = Store("ledger", valkey.url, PATIENT)
    dead, heir = Claim(store, keyed()), Claim(store, keyed())
    assert (await dead.take())[0] is State.CLAIMED
    async with asyncio.timeout(20):
        while (await heir.take())[0] is not State.CLAIMED:
            await asyncio.sleep(0.01)
    assert not await dead.renew()
    assert not await dead.finish(b"i")
    await dead.free()
    assert await heir.finish(b"i")
    await store.close()


async def test_when_its_audio_is_gone_a_call_runs_again(valkey: Valkey, tmp_path: Path) -> None:
    async with gateways(valkey.url, tmp_path) as (gateway,):
        work = Work(b"x" * INLINE_BYTES * 2)
        work.gate.set()
        await ask(gateway, work)
        for path in (tmp_path / "objects").rglob("*"):
            if path.is_file():
                path.unlink()
        await ask(gateway, work)
        assert work.runs == 2


async def test_what_keyed_calls_hold_is_bounded(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.idempotency.MOST_RUNNING_BYTES", 25_000)
    go_on = asyncio.Event()

    async def make() -> AsyncGenerator[Reply, None]:
        for number in range(5):
            yield Reply(audio=bytes([number]) * 10_000)
        await go_on.wait()

    async def hear(gateway: Idempotency, key: str) -> int:
        async with aclosing(gateway.stream(keyed(key), Reply, make)) as replies:
            return sum([len(reply.audio) async for reply in replies])

    async with gateways(valkey.url, tmp_path) as (gateway,):
        first = asyncio.create_task(hear(gateway, "first"))
        await until(lambda: gateway._runs and next(iter(gateway._runs.values())).tape.bytes >= 25_000)
        with pytest.raises(ResourceExhausted) as caught:
            await hear(gateway, "second")
        assert caught.value.retry_after
        joined = asyncio.create_task(hear(gateway, "first"))  # this needs no more room
        go_on.set()
        assert await first == await joined == 50_000
        assert await hear(gateway, "second") == 50_000


async def test_without_a_ledger_calls_run_unclaimed(tmp_path: Path) -> None:
    async with gateways(f"redis://127.0.0.1:{free_port()}", tmp_path) as (gateway,):
        work = Work()
        work.gate.set()
        await ask(gateway, work)
        await ask(gateway, work)
        assert work.runs == 2


async def test_a_streams_retry_hears_all_of_it_and_its_failure(valkey: Valkey, tmp_path: Path) -> None:
    runs = 0

    async def make() -> AsyncGenerator[Reply, None]:
        nonlocal runs
        runs += 1
        for number in range(5):
            yield Reply(audio=bytes([number]) * 10_000)
        raise OutOfRange("too long", "AUDIO_TOO_LONG")

    async def hear(gateway: Idempotency) -> list[bytes]:
        heard: list[bytes] = []

        async def listen() -> None:
            async with aclosing(gateway.stream(keyed(), Reply, make)) as replies:
                async for reply in replies:
                    heard.append(reply.audio)  # noqa: PERF401 (what came before the failure counts)

        with pytest.raises(ChorusError) as caught:
            await listen()
        assert caught.value.reason == "AUDIO_TOO_LONG"
        return heard

    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        first = await hear(one)
        assert first == [bytes([number]) * 10_000 for number in range(5)]
        assert await hear(other) == first
        assert runs == 1


async def test_what_is_too_large_is_not_kept_in_part(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.idempotency.MOST_BYTES", 25_000)

    async def make() -> AsyncGenerator[Reply, None]:
        for number in range(5):
            yield Reply(audio=bytes([number]) * 10_000)
        raise OutOfRange("too long", "AUDIO_TOO_LONG")

    async def hear(gateway: Idempotency) -> int:
        heard = 0
        with suppress(OutOfRange, Relayed):
            async with aclosing(gateway.stream(keyed(), Reply, make)) as replies:
                async for _ in replies:
                    heard += 1
        return heard

    async with gateways(valkey.url, tmp_path, 2) as (one, other):
        assert [await hear(one), await hear(other)] == [5, 5]


async def test_many_gateways_many_callers_who_come_and_go(valkey: Valkey, tmp_path: Path) -> None:
    """Never two runs at once, never two answers."""
    async with gateways(valkey.url, tmp_path, 4) as many:
        for round_ in range(8):
            work = Work()
            of = keyed(f"round {round_}")
            callers = [ask(many[number % 4], work, of) for number in range(24)]
            for number, caller in enumerate(callers):
                if number % 3 == round_ % 3:
                    await asyncio.sleep(0.003)
                    caller.cancel()
            work.gate.set()
            answers = set()
            for caller in callers:
                with suppress(asyncio.CancelledError):
                    answers.add((await caller).audio)
            assert len(answers) == 1
            assert work.most_at_once == 1
        await until(lambda: not any(gateway._runs for gateway in many))


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "täst", "a\nb"])
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_key({"idempotency-key": key})
    assert [violation.field for violation in caught.value.violations] == ["idempotency-key"]


def test_keys() -> None:
    assert read_key({}) is None
    assert read_key({"idempotency-key": "a b"}) == "a b"
    assert job_id("a", "k") == job_id("a", "k")
    assert len({job_id("a", "k"), job_id("b", "k"), job_id("a", "l")}) == 3
    assert grpc.StatusCode.ABORTED is Aborted.code
