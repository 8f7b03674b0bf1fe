"""Texts that are spoken while they are written share their segments: each is made once. Real processes and sockets."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from common.errors import Unavailable
from common.settings import StoreSettings
from common.store import Store
from gateway.cache import purge
from gateway.speech import _settled
from gateway.tenants import hashed
from protos.chorus.v1 import tts_pb2
from tests.calls import Door, failure, logged, until
from tests.hearing import LANGUAGE, Heard
from tests.stack import Server, Stack
from tests.valkey import Valkey

Written = tts_pb2.StreamSynthesizeTextRequest
MISS, COALESCED, HIT, BYPASS = (
    tts_pb2.CACHE_STATUS_MISS,
    tts_pb2.CACHE_STATUS_COALESCED,
    tts_pb2.CACHE_STATUS_HIT,
    tts_pb2.CACHE_STATUS_BYPASS,
)
RAW = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)
SAID = (
    "Good morning, and thank you for calling us today. ",
    "This call may be recorded so that all of us can learn from it, as everybody does in these days, although hardly "
    "anybody ever listens to any of it again, and so nobody knows what there was to learn. ",
    "Please tell me now in a few words of your own what it is that we can do for you, and speak slowly, since I am "
    "only a machine which has been told to be as patient as anybody can be with people.",
)
TEXT = "".join(SAID)
SLOW: dict[str, Any] = {"tone_step_base_ms": 2, "tone_steps_per_character": 1, "tone_slots": 8}
"""About 10 times as fast as it is heard."""
RUNS = "chorus_batcher_submitted_total"
CANCEL = Written(cancel=tts_pb2.Cancel())


def config(**fields: Any) -> Written:
    given: dict[str, Any] = {"language": LANGUAGE, "format": RAW} | fields
    return Written(config=tts_pb2.StreamConfig(**given))


async def written(text: str = TEXT, *, size: int = 1000, **fields: Any) -> AsyncIterator[Written]:
    """A text in pieces."""
    yield config(**fields)
    for start in range(0, len(text), size):
        yield Written(text=text[start : start + size])


async def hear(door: Door, text: str = TEXT, *, size: int = 1000, metadata: Any = None, **fields: Any) -> Heard:
    """A dialogue, whose audio must be whole and its own, and whose marks must cover its text."""
    heard = Heard()
    async for response in door.speech.StreamSynthesizeText(written(text, size=size, **fields), metadata=metadata):
        heard.take(response)  # type: ignore[arg-type]
    if "voice" not in fields:
        heard.check_whole()
    assert [mark.start_byte for mark in heard.marks] == [0, *(mark.end_byte for mark in heard.marks[:-1])]
    assert heard.marks[-1].end_byte == len(text.encode())
    return heard


async def begin(door: Door, text: str = TEXT) -> tuple[Any, Heard]:
    """A dialogue that has heard its first audio, waits, and may still be written to."""
    call: Any = door.speech.StreamSynthesizeText()
    await call.write(config())
    await call.write(Written(text=text))
    heard = Heard()
    while not heard.audio:
        heard.take(await call.read())
    return call, heard


async def finish(call: Any, heard: Heard) -> Heard:
    """The rest of a dialogue, whose text is all written."""
    await call.done_writing()
    while (message := await call.read()) is not grpc.aio.EOF:
        heard.take(message)
    heard.check_whole()
    return heard


def runs(*services: Server) -> int:
    """Rows of shared segments, and speeches, that engines were given, the warm-ups left out."""
    return round(sum(service.metric(RUNS) for service in services)) - len(services)


async def three(stack: Stack, **settings: Any) -> tuple[Server, list[Door]]:
    """A service and two gateways before it, without any store."""
    service = await stack.service(**SLOW | settings)
    return service, [Door(await stack.gateway(service)) for _ in range(2)]


async def two(stack: Stack, **settings: Any) -> tuple[Server, Door]:
    """The same with one gateway."""
    service = await stack.service(**SLOW | settings)
    return service, Door(await stack.gateway(service))


def same(heard: Sequence[Heard]) -> bool:
    return len({(bytes(one.audio), *(mark.SerializeToString() for mark in one.marks)) for one in heard}) == 1


async def test_twenty_dialogues_over_two_gateways_make_each_segment_once(stack: Stack) -> None:
    service, doors = await three(stack)
    # In pieces of any size: what is said at once, and what a model writes word by word.
    heard = await asyncio.gather(*(hear(doors[n % 2], size=(5, 17, 1000)[n % 3]) for n in range(20)))
    segments = len(heard[0].marks)
    assert segments == 3
    assert runs(service) == segments
    assert same(heard)
    assert len({one.starts[0].request_id for one in heard}) == 20
    statuses = [one.starts[0].cache_status for one in heard]
    assert statuses.count(MISS) == 1
    assert set(statuses) <= {MISS, COALESCED, HIT}
    # A dialogue that shares nothing, and one that goes round the gateway, sound the same.
    apart = [await hear(doors[0], metadata=(("cache-control", "no-store"),)), await hear(Door(service))]
    assert {one.starts[0].cache_status for one in apart} == {BYPASS}
    assert same([heard[0], *apart])
    # And afterwards it costs nothing.
    before = runs(service)
    later = await hear(doors[1], size=9)
    assert (later.starts[0].cache_status, runs(service)) == (HIT, before)
    assert same([heard[0], later])
    assert service.metric("chorus_segments_total") == 21 * segments
    assert service.metric("chorus_segments_kept_bytes") > len(later.audio)
    assert service.metric("chorus_segments_open") == 0


async def test_who_comes_late_hears_it_from_the_start_at_once_and_catches_up(stack: Stack) -> None:
    service, doors = await three(stack, tone_step_base_ms=10)
    first, early = await begin(doors[0])
    while len(early.audio) < 300_000:  # the first segment, which is kept by now, and half of the second
        early.take(await first.read())
    came = time.monotonic()
    late, heard = await begin(doors[1])
    assert heard.starts[0].cache_status == HIT
    while len(heard.audio) < len(early.audio):
        heard.take(await late.read())
    # In a fraction of the time in which it was made, let alone of that in which it is heard.
    assert time.monotonic() - came < len(early.audio) / 48_000 / 5
    assert heard.audio[: len(early.audio)] == early.audio
    assert (await finish(late, heard)).audio == (await finish(first, early)).audio
    assert runs(service) == 3


async def test_the_first_leaves_or_barges_in_and_the_others_hear_on(stack: Stack) -> None:
    for leaves in ("cancel", "barge in"):
        service, doors = await three(stack)
        first, _ = await begin(doors[0])
        others = [asyncio.create_task(hear(door)) for door in doors]
        await until(lambda service=service: service.metric("chorus_segments_total") >= 4)  # type: ignore[misc]
        if leaves == "cancel":
            first.cancel()
        else:
            await first.write(CANCEL)
        assert same(await asyncio.gather(*others))
        assert runs(service) == 3


async def test_the_last_leaves_and_its_rows_stop(stack: Stack) -> None:
    service, doors = await three(stack, tone_step_base_ms=5)
    calls = [(await begin(door, TEXT * 5))[0] for door in doors]
    calls[0].cancel()
    await asyncio.sleep(0.1)
    assert service.metric("chorus_batcher_rows") > 0
    calls[1].cancel()
    for name, value in (("requests", 0), ("rows", 0), ("slots_free", SLOW["tone_slots"])):
        await service.until_metric(f"chorus_batcher_{name}", value)
    await service.until_metric("chorus_segments_open", 0)
    assert service.metric("chorus_batcher_cancel_ticks_max") <= 1


async def test_a_failure_reaches_all_once_and_nothing_of_it_is_kept(stack: Stack) -> None:
    service, doors = await three(stack, tone_faults="row@60:recorded", batcher_max_attempts=1)
    failed = await asyncio.gather(*(failure(hear(doors[n % 2])) for n in range(10)))
    assert {(one.code, one.reason) for one in failed} == {(grpc.StatusCode.INTERNAL, "SEGMENT_FAILED")}
    made = runs(service)
    assert made <= 4  # the third may have begun; one that came when it had just failed tried again
    assert (await failure(hear(doors[0]))).reason == "SEGMENT_FAILED"
    assert runs(service) <= made + 2


async def test_a_slow_listener_holds_up_nobody(stack: Stack) -> None:
    service, doors = await three(stack, tone_steps_per_character=3)
    slow, heard = await begin(doors[0], TEXT * 3)  # and reads no further
    fast = await asyncio.gather(*(hear(door, TEXT * 3) for door in doors))
    assert same(fast)
    await service.until_metric("chorus_batcher_rows", 0)
    before = runs(service)
    assert (await finish(slow, heard)).audio == fast[0].audio
    assert runs(service) == before == len(fast[0].marks)


async def test_what_sounds_otherwise_is_not_shared(stack: Stack) -> None:
    service, door = await two(stack)
    heard = [bytes((await hear(door)).audio)]
    others: list[tuple[dict[str, Any], str]] = [
        ({"voice": "male1"}, TEXT),
        ({"sampling": tts_pb2.Sampling(seed=1)}, TEXT),
        ({"controls": tts_pb2.Controls(speed=1.5)}, TEXT),
        ({"language": "zh-CN"}, TEXT),
        ({}, TEXT.replace("ood", "OOD").replace("This", "Any").replace("Please", "Just")),
        ({}, SAID[1] + SAID[2] + SAID[0]),
    ]
    for number, (fields, text) in enumerate(others, 2):
        messages = [message async for message in door.speech.StreamSynthesizeText(written(text, **fields))]
        heard.append(b"".join(message.chunk.data for message in messages if message.HasField("chunk")))
        assert runs(service) == 3 * number, fields
    assert len(set(heard)) == len(heard)


async def test_marks_are_of_the_callers_own_text(stack: Stack) -> None:
    service, door = await two(stack)
    texts = ("It is $5 and no more than that, today.", "It is five dollars and no more than that, today.")
    heard = [await hear(door, text) for text in texts]
    assert heard[0].audio == heard[1].audio
    assert heard[0].marks[0].spoken_text == heard[1].marks[0].spoken_text
    assert heard[0].marks[0].end_byte < heard[1].marks[0].end_byte
    assert runs(service) == 1


async def test_who_wants_nothing_of_the_cache_shares_nothing(stack: Stack) -> None:
    service, door = await two(stack)
    for control in ("no-store", "no-cache"):
        before, metadata = runs(service), (("cache-control", control),)
        heard = await asyncio.gather(*(hear(door, metadata=metadata) for _ in range(2)))
        assert {one.starts[0].cache_status for one in heard} == {BYPASS}
        assert runs(service) == before + 2  # each was one request
    assert (await hear(door)).starts[0].cache_status == MISS
    assert service.metric("chorus_segments_total") == 3


async def test_a_tenant_may_share_with_nobody(stack: Stack, tmp_path: Path) -> None:
    entries = [("a", "shared"), ("b", "shared"), ("c", "tenant")]
    lines = [f'[tenants.{name}]\nkeys = ["{hashed(name * 40)}"]\ncache_scope = "{scope}"\n' for name, scope in entries]
    (tmp_path / "tenants.toml").write_text("\n".join(lines))
    service = await stack.service(**SLOW)
    door = Door(await stack.gateway(service, gateway_tenants=tmp_path / "tenants.toml"))
    statuses = []
    for name in "abcca":
        heard = await hear(door, metadata=(("x-api-key", name * 40),))
        statuses.append(heard.starts[0].cache_status)
    assert statuses == [MISS, HIT, MISS, HIT, HIT]
    assert runs(service) == 6


async def test_a_stranger_shares_nothing_and_may_not_say_so(stack: Stack) -> None:
    service = await stack.service(secret="between us", **SLOW)
    failed = await failure(hear(Door(service), metadata=(("x-chorus-internal-sharing", "all"),)))
    assert failed.reason == "INTERNAL_METADATA"
    open_service = await stack.service(**SLOW)
    for word in ("", "everybody"):
        heard = await hear(Door(open_service), metadata=(("x-chorus-internal-sharing", word),))
        assert heard.starts[0].cache_status == BYPASS


async def test_what_is_made_is_charged_and_what_is_found_or_joined_is_not(stack: Stack, valkey: Valkey) -> None:
    # Room for one of these dialogues, and for not nearly two.
    service = await stack.service(**SLOW)
    room: dict[str, Any] = {"limiter_audio_seconds_per_second": 0.001, "limiter_audio_seconds_burst": 40.0}
    gateway = await stack.gateway(service, store_ledger=valkey.url, limiter_leasing=False, **room)
    door = Door(gateway)
    made = await hear(door)
    seconds = len(made.audio) / 2 / 24_000
    assert 8 < seconds < 11
    saved = gateway.metric("chorus_audio_seconds_saved_total")
    for _ in range(3):
        # It is estimated at about 29 s, which must be there, since nobody knows what will be found; and they go back.
        assert (await hear(door)).starts[0].cache_status == HIT
    assert gateway.metric("chorus_audio_seconds_saved_total") - saved == pytest.approx(3 * seconds, abs=0.1)
    await hear(door, sampling=tts_pb2.Sampling(seed=7))
    assert (await failure(hear(door))).reason == "RATE_LIMITED"


@pytest.mark.parametrize(
    ("status", "marked", "made", "error", "settled"),
    [
        (MISS, 6_000, "0.125", None, 0.125),
        (HIT, 6_000, "0.000", None, 0.0),
        (COALESCED, 6_000, "0.250", asyncio.CancelledError(), 0.25),
        (MISS, 6_000, "0.500", Unavailable("gone", "GONE"), 0.0),
        # Who hangs up is told nothing in the end, and only of its first segment before.
        (MISS, 6_000, None, asyncio.CancelledError(), 0.5),
        (HIT, 6_000, None, asyncio.CancelledError(), 0.25),
        (COALESCED, 0, None, asyncio.CancelledError(), 0.0),
        # A service that shares nothing.
        (BYPASS, 6_000, None, None, 0.5),
    ],
)
def test_a_dialogue_is_settled_by_what_its_service_tells(
    status: tts_pb2.CacheStatus.ValueType, marked: int, made: str | None, error: BaseException | None, settled: float
) -> None:
    admission: Any = SimpleNamespace(told=[])
    admission.settle = admission.told.append
    format = tts_pb2.AudioFormat(sample_rate_hertz=24_000)
    trailers = () if made is None else (("x-chorus-internal-made-seconds", made),)
    with suppress(asyncio.CancelledError, Unavailable), _settled(admission, in_parts=True) as meter:
        meter.hear(tts_pb2.StreamStart(cache_status=status, format=format))
        meter.hear(tts_pb2.AudioChunk(data=bytes(24_000)))
        for end in (marked, 12_000) if marked else ():
            meter.hear(tts_pb2.SegmentMark(end_sample=end))
        meter.hear_trailers((("x-request-id", "1"), *trailers))
        if error is not None:
            raise error
    assert admission.told == [settled]


async def test_the_log_tells_how_much_was_shared(stack: Stack) -> None:
    service, door = await two(stack)
    await hear(door)
    again = await hear(door)
    line = await logged(service, again.starts[0].request_id)
    assert (line["segments"], line["shared_segments"]) == (3, 3)


async def test_a_purge_reaches_the_services(stack: Stack, valkey: Valkey) -> None:
    service = await stack.service(store_cache=valkey.url, **SLOW)
    door = Door(await stack.gateway(service, store_cache=valkey.url))
    await hear(door)
    assert service.metric("chorus_segments_kept_bytes") > 0
    store = Store("cache", valkey.url, StoreSettings(budget=5.0))
    await purge(store, "voice:female1")
    await store.close()
    await service.until_metric("chorus_segments_kept_bytes", 0)
    assert (await hear(door)).starts[0].cache_status == MISS


async def test_another_service_finds_it_and_so_does_one_that_was_started_again(stack: Stack, valkey: Valkey) -> None:
    stores: dict[str, Any] = {"store_cache": valkey.url, "store_budget": 5.0}

    async def pair() -> tuple[Server, Door]:
        service = await stack.service(**stores, **SLOW)
        return service, Door(await stack.gateway(service, **stores))

    pairs = [await pair(), await pair()]
    services, doors = zip(*pairs, strict=True)
    made = await hear(doors[0])
    async with valkey.client() as client:
        while len(await client.keys("segment:*")) < 3:
            await asyncio.sleep(0.02)
    found = await hear(doors[1])
    assert (found.starts[0].cache_status, runs(*services)) == (HIT, 3)
    for service in services:
        service.signal(signal.SIGKILL)
    anew, door = await pair()
    again = await hear(door)
    assert (again.starts[0].cache_status, runs(anew)) == (HIT, 0)
    assert same([made, found, again])
    await valkey.kill()  # without it, all is made
    other = await hear(door, sampling=tts_pb2.Sampling(seed=1))
    assert other.starts[0].cache_status == MISS


# --- under load


BUSY: dict[str, Any] = {"tone_step_base_ms": 10, "tone_slots": 1, "batcher_max_delay": 3.0}
"""About as fast as it is heard, one row at a time."""


async def test_what_is_there_is_heard_although_the_queue_is_full_and_nobody_let_in_is_refused(stack: Stack) -> None:
    service, doors = await three(stack, **BUSY, tone_steps_per_character=1)
    greeting = SAID[0]
    await hear(doors[0], greeting)
    before = runs(service)
    # It has heard what was found while there was room, and the queue fills before it goes on.
    early: Any = doors[0].speech.StreamSynthesizeText()
    await early.write(config())
    await early.write(Written(text=greeting))
    await early.write(Written(flush=tts_pb2.Flush()))
    heard = Heard()
    while not heard.marks:
        heard.take(await early.read())
    assert heard.starts[0].cache_status == HIT
    blockers = [asyncio.create_task(hear(doors[1], f"{n} is a number. {TEXT}")) for n in range(8)]
    await until(lambda: any(blocker.done() for blocker in blockers))
    assert {(await failure(blocker)).reason for blocker in blockers if blocker.done()} == {"QUEUE_FULL"}
    assert (await hear(doors[0], greeting)).starts[0].cache_status == HIT
    assert (await failure(hear(doors[0], "Something else that nobody has said."))).reason == "QUEUE_FULL"
    await early.write(Written(text="And this has never been said by anybody until now."))
    await finish(early, heard)
    assert len(heard.marks) == 2
    assert runs(service) > before
    for blocker in blockers:
        blocker.cancel()
    await asyncio.gather(*blockers, return_exceptions=True)


async def test_a_full_queue_refuses_nobody_who_says_what_another_says(stack: Stack) -> None:
    service, doors = await three(stack, **BUSY | {"batcher_max_delay": 0.2, "tone_steps_per_character": 0.5})
    heard = await asyncio.gather(*(hear(doors[n % 2], size=(9, 1000)[n % 3 == 0]) for n in range(12)))
    assert same(heard)
    assert runs(service) == 3


async def test_while_too_much_is_in_flight_nothing_more_is_shared(stack: Stack) -> None:
    _, door = await two(stack, flights_bytes=1)
    first, heard = await begin(door)
    assert heard.starts[0].cache_status == MISS
    assert (await hear(door)).starts[0].cache_status == BYPASS
    await finish(first, heard)
    assert (await hear(door)).starts[0].cache_status == HIT
