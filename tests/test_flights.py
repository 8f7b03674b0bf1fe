"""Equal speeches are made once, and heard whole by all who ask, whoever comes, goes or dies. Real processes."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from common.errors import DeadlineExceeded, Unavailable
from common.settings import StoreSettings
from common.speech import SpeechMessage
from common.store import Store
from gateway.speech import _settled
from protos.chorus.v1 import tts_pb2
from service.directory import Directory
from tests.calls import Door, failure, until
from tests.hearing import LANGUAGE, Heard
from tests.stack import Server, Stack, stream_request, text_request
from tests.valkey import Valkey, running_valkey

TEXT = "This is what everybody asks for. It has two sentences."
SLOW: dict[str, Any] = {"tone_step_base_ms": 2, "tone_steps_per_character": 2, "tone_slots": 8}
BATCH = (("x-chorus-priority", "batch"),)
RUNS = "chorus_batcher_submitted_total"
MISS, COALESCED, HIT, BYPASS = (
    tts_pb2.CACHE_STATUS_MISS,
    tts_pb2.CACHE_STATUS_COALESCED,
    tts_pb2.CACHE_STATUS_HIT,
    tts_pb2.CACHE_STATUS_BYPASS,
)


async def hear(door: Door, text: str = TEXT, **options: Any) -> Heard:
    """A stream, which must be whole and this text's own."""
    heard = Heard()
    async for response in door.speech.StreamSynthesize(stream_request(text, language=LANGUAGE), **options):
        heard.take(response)
    heard.check_whole()
    return heard


async def whole(door: Door, text: str = TEXT, **options: Any) -> Heard:
    """The same as one reply."""
    reply = await door.speech.Synthesize(text_request(text, language=LANGUAGE), **options)
    heard = Heard(bytearray(reply.audio), [reply.start], list(reply.marks), [reply.end])
    heard.check_whole()
    return heard


async def first_audio(door: Door, text: str = TEXT) -> Any:
    """A call that has heard its first audio, and waits."""
    call: Any = door.speech.StreamSynthesize(stream_request(text, language=LANGUAGE))
    while (await call.read()).WhichOneof("message") != "chunk":
        pass
    return call


async def two(stack: Stack, url: str, **settings: Any) -> tuple[Server, list[Server]]:
    """A service and two gateways before it, with a store."""
    service = await stack.service(store_cache=url, **SLOW, **settings)
    return service, [await stack.gateway(service, store_cache=url) for _ in range(2)]


def runs(*services: Server) -> int:
    """Speeches that engines have been given, the warm-ups left out."""
    return round(sum(service.metric(RUNS) for service in services)) - len(services)


async def test_two_hundred_callers_over_two_gateways_make_one_speech(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url)
    doors = [Door(gateway) for gateway in gateways]
    # Some hear it as a stream, some as a whole.
    calls = [(hear if number % 4 else whole)(doors[number % 2]) for number in range(200)]
    heard = await asyncio.gather(*calls)
    assert runs(service) == 1
    assert len({bytes(one.audio) for one in heard}) == 1
    assert len({tuple(mark.SerializeToString() for mark in one.marks) for one in heard}) == 1
    assert len({one.starts[0].request_id for one in heard}) == 200
    statuses = [one.starts[0].cache_status for one in heard]
    assert statuses.count(MISS) == 1
    assert COALESCED in statuses
    assert set(statuses) <= {MISS, COALESCED, HIT}  # on a busy machine some come when it is over
    # And afterwards it costs nothing.
    later = await hear(doors[0])
    assert (later.starts[0].cache_status, later.audio) == (HIT, heard[0].audio)
    assert later.starts[0].seed == heard[0].starts[0].seed
    assert [mark.SerializeToString() for mark in later.marks] == [m.SerializeToString() for m in heard[0].marks]
    assert runs(service) == 1


async def test_who_comes_late_hears_it_from_the_start(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url)
    call = await first_audio(Door(gateways[0]))
    came = time.monotonic()
    late = await hear(Door(gateways[1]))
    assert late.starts[0].cache_status == COALESCED
    # Its times are its own, not those of the row.
    timings = late.ends[0].timings
    assert timings.first_audio_ms <= timings.total_ms <= (time.monotonic() - came) * 1000
    assert timings.queue_ms == 0
    call.cancel()
    assert runs(service) == 1


async def test_the_first_leaves_and_it_goes_on(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url)
    door = Door(gateways[0])
    first = await first_audio(door)
    second = asyncio.create_task(hear(door))
    await asyncio.sleep(0.05)
    first.cancel()
    assert (await second).starts[0].cache_status == COALESCED
    assert runs(service) == 1


async def test_nobody_waits_with_batch_work_for_its_turn(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url)
    behind = [asyncio.create_task(hear(Door(gateway), metadata=BATCH)) for gateway in gateways]
    await until(lambda: runs(service) == 1)
    first = await hear(Door(gateways[0]))
    assert first.starts[0].cache_status == MISS
    assert runs(service) == 2
    for heard in await asyncio.gather(*behind):
        assert heard.audio == first.audio
    assert runs(service) == 2


async def test_batch_work_joins_what_runs(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url)
    call = await first_audio(Door(gateways[0]))
    joined = await asyncio.gather(*(hear(Door(gateway), metadata=BATCH) for gateway in gateways))
    assert {heard.starts[0].cache_status for heard in joined} == {COALESCED}
    call.cancel()
    assert runs(service) == 1


async def test_who_starts_it_and_leaves_pays_for_those_who_hear_on(stack: Stack, valkey: Valkey) -> None:
    # Room for one of these speeches, and for not nearly two.
    room: dict[str, Any] = {"limiter_audio_seconds_per_second": 0.001, "limiter_audio_seconds_burst": 10.0}
    service = await stack.service(store_cache=valkey.url, **SLOW)
    gateway = await stack.gateway(service, store_ledger=valkey.url, **room)
    door = Door(gateway)
    text = "a" * 100
    first = await first_audio(door, text)
    second = asyncio.create_task(hear(door, text))
    await asyncio.sleep(0.05)
    first.cancel()
    assert (await second).starts[0].cache_status == COALESCED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hear(door, "b" * 100)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("error", "goes_on", "settled"),
    [
        (asyncio.CancelledError(), True, []),
        (asyncio.CancelledError(), False, [0.0]),
        (DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED"), True, []),
        (DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED"), False, [0.0]),
        (Unavailable("gone", "GONE"), True, [0.0]),
    ],
)
def test_however_a_starter_leaves_its_estimate_stays_while_others_hear_on(
    error: BaseException, goes_on: bool, settled: list[float]
) -> None:
    admission: Any = SimpleNamespace(told=[])
    admission.settle = admission.told.append
    with pytest.raises(type(error)), _settled(admission, lambda: goes_on):
        raise error
    assert admission.told == settled


async def test_the_last_leaves_and_its_place_is_free(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url, flights_linger_seconds=0.2)
    call = await first_audio(Door(gateways[0]), TEXT * 20)
    call.cancel()
    await service.until_metric("chorus_batcher_requests", 0)
    await service.until_metric("chorus_flights_open", 0)
    await service.until_metric("chorus_batcher_slots_free", SLOW["tone_slots"])


async def test_a_failure_reaches_all_and_nothing_of_it_is_kept(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url, tone_faults="row@60:asks", batcher_max_attempts=1)
    doors = [Door(gateway) for gateway in gateways]
    failed = await asyncio.gather(*(failure(whole(doors[number % 2])) for number in range(10)))
    assert {one.reason for one in failed} == {"SEGMENT_FAILED"}
    assert runs(service) <= 2  # one that came when it had just failed tried again
    before = runs(service)
    await failure(whole(doors[0]))
    assert runs(service) == before + 1


async def test_the_deadline_of_the_first_is_not_that_of_the_others(stack: Stack, valkey: Valkey) -> None:
    # What nobody foresaw: it would have been in time.
    service, gateways = await two(stack, valkey.url, tone_faults="slow@60:4000")
    door = Door(gateways[0])
    first = asyncio.create_task(failure(hear(door, timeout=2.5)))
    await asyncio.sleep(0.2)
    patient = [asyncio.create_task(hear(Door(gateway), timeout=60)) for gateway in gateways]
    assert (await first).code is grpc.StatusCode.DEADLINE_EXCEEDED
    for one in await asyncio.gather(*patient):
        assert one.starts[0].cache_status == COALESCED
    assert runs(service) == 1


@pytest.mark.parametrize(
    ("control", "statuses", "made"),
    [
        ("no-store", [BYPASS, BYPASS, MISS], 3),
        ("no-cache", [MISS, MISS, HIT], 2),
        ("", [MISS, HIT, HIT], 1),
    ],
)
async def test_what_callers_say_of_the_cache(
    stack: Stack, valkey: Valkey, control: str, statuses: list[int], made: int
) -> None:
    service, gateways = await two(stack, valkey.url, flights_kept_seconds=0)
    door = Door(gateways[0])
    metadata = (("cache-control", control),)
    heard = [await hear(door, metadata=metadata), await whole(door, metadata=metadata), await hear(door)]
    assert [one.starts[0].cache_status for one in heard] == statuses
    assert len({bytes(one.audio) for one in heard}) == 1
    assert runs(service) == made


async def test_a_hot_text_is_encoded_once(stack: Stack, valkey: Valkey) -> None:
    _, gateways = await two(stack, valkey.url)
    door = Door(gateways[0])
    request = tts_pb2.SynthesizeRequest(text=TEXT, format=tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_MP3))
    replies = [await door.speech.Synthesize(request) for _ in range(4)]
    assert [reply.start.cache_status for reply in replies] == [MISS, HIT, HIT, HIT]
    assert len({reply.audio for reply in replies}) == 1
    assert len({reply.start.request_id for reply in replies}) == 4
    seconds = replies[0].end.sample_count / replies[0].start.format.sample_rate_hertz
    # For the one who asked first, and for the first hit.
    assert gateways[0].metric("chorus_encoders_audio_seconds_total") == pytest.approx(2 * seconds, rel=0.1)


@pytest.mark.parametrize("control", ["no-store", ""])
async def test_marks_are_of_the_callers_own_text(stack: Stack, valkey: Valkey, control: str) -> None:
    _, gateways = await two(stack, valkey.url)
    door, text = Door(gateways[0]), f"  {TEXT}\n And more e\u0301.  "
    for _ in range(2):
        for call in (whole, hear):
            heard = await call(door, text, metadata=(("cache-control", control),))
            pieces = [text.encode()[mark.start_byte : mark.end_byte].decode() for mark in heard.marks]
            assert "".join(pieces) == text
            assert len(pieces) == 2


async def test_trailers_say_why_it_was_fast_or_slow(stack: Stack, valkey: Valkey) -> None:
    _, (gateway, _) = await two(stack, valkey.url)
    said = []
    for _ in range(2):
        call = Door(gateway).speech.Synthesize(text_request(TEXT))
        reply = await call
        trailers = dict(await call.trailing_metadata())
        said.append([part.partition(";")[::2] for part in str(trailers["server-timing"]).split(", ")])
        status = tts_pb2.CacheStatus.Name(reply.start.cache_status).removeprefix("CACHE_STATUS_")
        assert dict(said[-1])["cache"] == f"desc={status}"
        assert reply.end.timings.total_ms > 0
    made, found = said
    assert [name for name, _ in made] == ["cache", "queue", "batch-rows", "backend", "total"]
    assert dict(made)["batch-rows"] == "desc=2"  # its two sentences
    assert re.fullmatch(r'desc="127\.0\.0\.1:\d+";dur=[\d.]+', dict(made)["backend"])
    assert [name for name, _ in found] == ["cache", "total"]


async def test_only_what_is_in_the_cache(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url)
    door, only = Door(gateways[0]), (("x-chorus-only-cached", "1"),)
    for call in (whole(door, metadata=only), hear(door, metadata=only)):
        failed = await failure(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_CACHED")
    await whole(door)
    assert (await whole(Door(gateways[1]), metadata=only)).starts[0].cache_status == HIT
    assert runs(service) == 1


async def test_what_is_there_is_heard_although_the_queue_is_full(stack: Stack, valkey: Valkey) -> None:
    service = await stack.service(tone_step_base_ms=5, tone_slots=1, batcher_max_waiting=1, batcher_max_delay=1000)
    gateway = await stack.gateway(service, store_cache=valkey.url)
    door = Door(gateway)
    await whole(door, "Asked for often.")
    held = await first_audio(door, "One that takes its time. " * 20)
    waiting = door.speech.StreamSynthesize(stream_request("One that waits."))
    await service.until_metric("chorus_batcher_waiting", 1)
    assert (await failure(whole(door, "One more."))).reason == "QUEUE_FULL"
    for call in (whole, hear):
        assert (await call(door, "Asked for often.")).starts[0].cache_status == HIT
    held.cancel()
    waiting.cancel()


async def test_two_services_and_one_speech(stack: Stack, valkey: Valkey) -> None:
    # A store that is slower than its budget is done without: then each service speaks it. A busy machine is slow.
    store: dict[str, Any] = {"store_cache": valkey.url, "store_budget": 5.0}
    services = [await stack.service(tone_card=card, **store, **SLOW) for card in (1, 2)]
    gateways = [await stack.gateway(service, **store) for service in services]
    heard = await asyncio.gather(*((hear if n % 3 else whole)(Door(gateways[n % 2])) for n in range(40)))
    assert len({bytes(one.audio) for one in heard}) == 1
    assert runs(*services) == 1


# --- deaths


async def test_a_gateway_dies_with_the_first_caller(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url)
    await first_audio(Door(gateways[0]))
    second = asyncio.create_task(hear(Door(gateways[1])))
    await asyncio.sleep(0.05)
    gateways[0].signal(signal.SIGKILL)
    assert (await second).starts[0].cache_status == COALESCED
    assert runs(service) == 1


async def test_a_service_dies_and_each_caller_is_told_what_is_right(stack: Stack, valkey: Valkey) -> None:
    services = [await stack.service(store_cache=valkey.url, tone_card=card, **SLOW) for card in (1, 2)]
    gateway = await stack.gateway(*services, store_cache=valkey.url)
    door, text = Door(gateway), TEXT * 10
    call: Any = door.speech.StreamSynthesize(stream_request(text, language=LANGUAGE))
    heard = Heard()
    while len(heard.audio) < 30_000:
        heard.take(await call.read())
    (busy,) = [service for service in services if service.metric("chorus_batcher_requests")]
    busy.signal(signal.SIGKILL)

    async def rest() -> None:
        while (response := await call.read()) is not grpc.aio.EOF:
            heard.take(response)

    failed = await failure(rest())
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_LOST")
    assert int(failed.info["valid_samples"]) * 2 == len(heard.audio)
    # Nothing of it is in the cache, and the other service makes all of it.
    again = await hear(door, text)
    assert again.audio[: len(heard.audio)] == heard.audio
    assert again.starts[0].cache_status == MISS


async def test_who_has_heard_nothing_yet_is_served_by_another(stack: Stack, valkey: Valkey) -> None:
    services = [await stack.service(store_cache=valkey.url, tone_card=card, **SLOW) for card in (1, 2)]
    gateway = await stack.gateway(*services, store_cache=valkey.url)
    waiting = asyncio.create_task(whole(Door(gateway), TEXT * 4))
    async with asyncio.timeout(20):
        while not (busy := [one for one in services if one.metric("chorus_batcher_requests")]):
            await asyncio.sleep(0.01)
    busy[0].signal(signal.SIGKILL)
    assert (await waiting).audio


Fault = Callable[[Valkey], Awaitable[None]]


async def kill(valkey: Valkey) -> None:
    await valkey.kill()


async def flush(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.flushall()


async def hang(valkey: Valkey) -> None:
    valkey.signal(signal.SIGSTOP)


@pytest.mark.parametrize("fault", [kill, flush, hang])
async def test_the_store_goes_while_a_speech_is_made(stack: Stack, tmp_path: Path, fault: Fault) -> None:
    (tmp_path / "store").mkdir()
    async with running_valkey(tmp_path / "store") as valkey:
        service, gateways = await two(stack, valkey.url)
        doors = [Door(gateway) for gateway in gateways]
        early = [asyncio.create_task(hear(door, TEXT * 3)) for door in doors]
        await asyncio.sleep(0.1)
        await fault(valkey)
        late = [asyncio.create_task(hear(door, TEXT * 3)) for door in doors]
        heard = await asyncio.gather(*early, *late)
        assert len({bytes(one.audio) for one in heard}) == 1
        assert runs(service) == 1  # one service: they meet there without any store
        if fault is hang:
            valkey.signal(signal.SIGCONT)


async def test_a_paused_service_loses_its_lease_and_nobody_hears_anything_wrong(stack: Stack, valkey: Valkey) -> None:
    services = [await stack.service(store_cache=valkey.url, tone_card=card, **SLOW) for card in (1, 2)]
    gateways = [await stack.gateway(service, store_cache=valkey.url) for service in services]
    paused = asyncio.create_task(hear(Door(gateways[0]), TEXT * 3, timeout=60))
    await asyncio.sleep(0.3)
    services[0].signal(signal.SIGSTOP)
    async with valkey.client() as client:
        async with asyncio.timeout(30):
            while await client.keys("flight:*"):
                await asyncio.sleep(0.05)
    other = await hear(Door(gateways[1]), TEXT * 3)
    services[0].signal(signal.SIGCONT)
    assert (await paused).audio == other.audio


async def test_random_joins_and_cancels_leave_nothing_behind(stack: Stack, valkey: Valkey) -> None:
    service, gateways = await two(stack, valkey.url, flights_linger_seconds=0, flights_kept_seconds=0)
    doors, chance = [Door(gateway) for gateway in gateways], random.Random(4)

    async def caller(number: int) -> bool:
        await asyncio.sleep(chance.random() * 0.5)
        call = asyncio.create_task(chance.choice((hear, whole))(chance.choice(doors), f"Text {number % 7}. {TEXT}"))
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() * 0.3)
            call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            return False
        return True

    whole_ones = await asyncio.gather(*(caller(number) for number in range(150)))
    assert any(whole_ones)
    for name in ("chorus_batcher_requests", "chorus_flights_open", "chorus_calls_active"):
        await service.until_metric(name, 0)
    await service.until_metric("chorus_batcher_slots_free", SLOW["tone_slots"])
    for gateway in gateways:
        await gateway.until_metric("chorus_calls_active", 0)
        assert not [line for line in gateway.log() if line["level"] == "error"]


async def test_what_the_store_forgot_is_entered_again(valkey: Valkey) -> None:
    store = Store("cache", valkey.url, StoreSettings(budget=5.0))
    go_on = asyncio.Event()

    async def speech() -> AsyncGenerator[SpeechMessage, None]:
        yield tts_pb2.StreamStart()
        await go_on.wait()

    async with (
        valkey.client() as client,
        aclosing(Directory(store, "here:1", 0.0).listed("k", speech(), here=False)) as it,
    ):
        await anext(it)
        entry = await client.get("flight:k")
        assert entry
        await client.flushall()
        async with asyncio.timeout(30):
            while await client.get("flight:k") != entry:
                await asyncio.sleep(0.1)
        go_on.set()
        assert [message async for message in it] == []
    await store.close()


async def test_a_stranger_cannot_join_under_a_key(stack: Stack) -> None:
    service = await stack.service(secret="between us", **SLOW)
    metadata = (("x-chorus-internal-speech-key", "00" * 32),)
    failed = await failure(hear(Door(service), metadata=metadata))
    assert failed.reason == "INTERNAL_METADATA"


async def test_another_revision_shares_nothing(stack: Stack, valkey: Valkey) -> None:
    service = await stack.service(store_cache=valkey.url, **SLOW)
    key = ("x-chorus-internal-speech-key", "00" * 32)
    for revision, statuses in (("another", [BYPASS, BYPASS]), ("", [BYPASS, BYPASS])):
        metadata = (key, ("x-chorus-internal-revision", revision))
        heard = await asyncio.gather(*(hear(Door(service), metadata=metadata) for _ in range(2)))
        assert [one.starts[0].cache_status for one in heard] == statuses
