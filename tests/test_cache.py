"""The result cache: what was kept is what is heard, and whatever is wrong is a miss. Real server."""

from __future__ import annotations

import asyncio
import itertools
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.keys import canonical_text, derived_seed, speech_key
from common.lru import Lru
from common.objects import Objects
from common.settings import CacheSettings, StoreSettings
from common.shelf import Tags, name_of, sealed, unsealed
from common.spans import restorer
from common.store import Store
from gateway.cache import Cache, purge, purge_key
from gateway.masters import Master, Whole, gathered
from protos.chorus.v1 import tts_pb2
from tests.stack import free_port
from tests.valkey import Valkey

KEY = bytes(range(32))
TAGS = Tags("female1", "tone 1")
PATIENT = StoreSettings(budget=5.0)
RATE = 1000


def reply(samples: int = 1500, marks: tuple[int, ...] = (700, 1500), **fields: Any) -> tts_pb2.SynthesizeResponse:
    """A plain speech, with marks that end there."""
    raw = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW, codec=tts_pb2.CODEC_PCM_S16LE, sample_rate_hertz=RATE)
    made = tts_pb2.SynthesizeResponse(
        audio=bytes(i % 251 for i in range(samples * 2)),
        start=tts_pb2.StreamStart(format=raw, voice="female1", seed=7, request_id="first", engine="tone"),
        end=tts_pb2.StreamEnd(finish_reason=tts_pb2.FINISH_REASON_COMPLETE, sample_count=samples),
    )
    made.start.cache_status = tts_pb2.CACHE_STATUS_MISS
    start = 0
    for end in marks:
        made.marks.add(start_sample=start, end_sample=end, spoken_text=f"to {end}")
        start = end
    for name, value in fields.items():
        setattr(made.end, name, value)
    return made


def master(samples: int = 1500) -> Master:
    made = Master.of(Whole.of(reply(samples)))
    assert made is not None
    return made


@asynccontextmanager
async def caches(url: str | None, folder: Path, count: int = 1, **settings: Any) -> AsyncIterator[list[Cache]]:
    stores = [Store("cache", url, PATIENT) for _ in range(count)]
    objects = Objects(f"file://{folder}/objects")
    try:
        made = [Cache(store, objects, CacheSettings(**settings)) for store in stores]
        for cache in made:
            await cache.refresh()
        yield made
    finally:
        for store in stores:
            await store.close()


# --- masters


def test_a_replay_says_what_was_said_in_the_same_order() -> None:
    said, made = reply(), master()
    replayed = gathered(made.messages("second"))
    whole = made.whole("second").message()
    for heard in (replayed, whole):
        assert (heard.audio, list(heard.marks)) == (said.audio, list(said.marks))
        assert heard.start.seed == 7
        assert heard.start.request_id == "second"
        assert heard.start.cache_status == tts_pb2.CACHE_STATUS_HIT
        assert heard.end.sample_count == 1500
    samples = 0
    for message in made.messages("second"):
        if isinstance(message, tts_pb2.AudioChunk):
            assert message.start_sample == samples
            samples += len(message.data) // 2
        elif isinstance(message, tts_pb2.SegmentMark):
            assert samples - RATE // 2 < message.end_sample <= samples  # as soon as its last audio has left


def test_a_whole_is_the_reply_that_it_was_made_of() -> None:
    said, whole = reply(), Whole.of(reply())
    assert whole.SerializeToString() == said.SerializeToString()
    assert whole.ByteSize() == said.ByteSize()
    assert whole.message() == said
    assert whole.audio == said.audio


def test_a_replay_is_its_callers_own() -> None:
    made = master()
    for message in made.messages("r"):
        message.Clear()
    made.whole("r").rest.Clear()
    assert made.whole("r").message() == made.whole("r").message() != tts_pb2.SynthesizeResponse()
    assert made.whole("r").audio == reply().audio


@pytest.mark.parametrize(
    "fields",
    [
        {"finish_reason": tts_pb2.FINISH_REASON_LENGTH},
        {"finish_reason": tts_pb2.FINISH_REASON_CANCELLED},
        {"finish_reason": 0},
        {"sample_count": 1499},
        {"sample_count": 0},
    ],
)
def test_what_is_not_whole_is_no_master(fields: dict[str, Any]) -> None:
    assert Master.of(Whole.of(reply(**fields))) is None


@given(st.binary(max_size=40), st.integers(0, 3100))
@example(b"\x01", 4)
def test_damage_is_seen(noise: bytes, at: int) -> None:
    kept = sealed(KEY, master().parts())
    found = unsealed(KEY, kept)
    assert found is not None
    again = Master.from_bytes(found)
    assert again is not None
    assert again.whole("r").message() == master().whole("r").message()
    assert unsealed(bytes(32), kept) is None
    damaged = kept[:at] + noise + kept[at + len(noise) :]
    assert (unsealed(KEY, damaged) is None) == (damaged != kept)
    assert (unsealed(KEY, kept[:at]) is None) == (at < len(kept))


@given(st.binary(max_size=40))
def test_what_another_version_kept_is_no_master_or_a_whole_one(data: bytes) -> None:
    made = Master.from_bytes(memoryview(data))
    assert made is None or made.rate > 0


# --- the cache


@pytest.mark.parametrize("samples", [1500, 400_000])
async def test_what_one_gateway_keeps_another_finds(valkey: Valkey, tmp_path: Path, samples: int) -> None:
    async with caches(valkey.url, tmp_path, 2) as (one, other):
        assert await one.get(KEY, TAGS) is None
        one.put(KEY, TAGS, master(samples), one.generations)
        await one.settle()
        found = await other.get(KEY, TAGS)
        assert found is not None
        assert found.whole("r").message() == master(samples).whole("r").message()
        assert other.here(KEY) is found
    stored = [path for path in (tmp_path / "objects").rglob("*") if path.is_file()]
    assert len(stored) == (1 if samples > 300_000 else 0)  # large ones are not in the store


async def test_callers_at_the_same_time_share_a_lookup(valkey: Valkey, tmp_path: Path) -> None:
    async with caches(valkey.url, tmp_path) as (cache,), valkey.client() as client:
        await cache.get(b"warm", TAGS)
        before = (await client.info("commandstats")).get("cmdstat_get", {"calls": 0})["calls"]
        await asyncio.gather(*(cache.get(KEY, TAGS) for _ in range(50)))
        after = (await client.info("commandstats"))["cmdstat_get"]["calls"]
        assert after - before == 1


@pytest.mark.parametrize("damage", [b"", b"i", b"inonsense", b"pcache/2020-01-01/gone", b"x"])
async def test_a_damaged_value_is_a_miss_and_is_deleted(valkey: Valkey, tmp_path: Path, damage: bytes) -> None:
    async with caches(valkey.url, tmp_path, 2) as (one, other), valkey.client() as client:
        one.put(KEY, TAGS, master(), one.generations)
        await one.settle()
        (name,) = [name for name in await client.keys("cache:*") if name != b"cache:generations"]
        await client.set(name, damage)
        assert await other.get(KEY, TAGS) is None
        assert not await client.exists(name)


@pytest.mark.parametrize("value", [sealed(KEY, [b"\0\0\0\5\xff\xff\xff\xff\xff"], b"i"), b"p\xff\xfe"])
async def test_what_nobody_can_read_is_forgotten(valkey: Valkey, tmp_path: Path, value: bytes) -> None:
    async with caches(valkey.url, tmp_path) as (cache,), valkey.client() as client:
        name = name_of("cache", KEY, TAGS, cache.generations)
        await client.set(name, value)
        assert await cache.get(KEY, TAGS) is None
        assert not await client.exists(name)


async def test_without_a_store_memory_is_enough(tmp_path: Path) -> None:
    for url in (None, f"redis://127.0.0.1:{free_port()}"):
        async with caches(url, tmp_path) as (cache,):
            assert await cache.get(KEY, TAGS) is None
            cache.put(KEY, TAGS, master(), cache.generations)
            assert await cache.get(KEY, TAGS) is not None
            await cache.settle()


@pytest.mark.parametrize("what", ["all", "voice:female1", "revision:tone 1", "key"])
async def test_a_purge_reaches_every_gateway(valkey: Valkey, tmp_path: Path, what: str) -> None:
    other_key, other_tags = bytes(32), Tags("male1", "tone 2")
    async with caches(valkey.url, tmp_path, 2) as (one, other):
        for key, tags in ((KEY, TAGS), (other_key, other_tags)):
            one.put(key, tags, master(), one.generations)
            await one.settle()
            assert await other.get(key, tags) is not None
        store = Store("cache", valkey.url, PATIENT)
        await (purge_key(store, KEY, TAGS) if what == "key" else purge(store, what))
        await store.close()
        for cache in (one, other):
            await cache.refresh()
            assert cache.here(KEY) is None
            assert await cache.get(KEY, TAGS) is None
            assert (await cache.get(other_key, other_tags) is None) == (what == "all")


async def test_what_was_purged_while_it_was_made_is_not_kept(valkey: Valkey, tmp_path: Path) -> None:
    async with caches(valkey.url, tmp_path) as (cache,):
        asked = cache.generations
        store = Store("cache", valkey.url, PATIENT)
        await purge(store)
        await store.close()
        await cache.refresh()
        cache.put(KEY, TAGS, master(), asked)
        await cache.settle()
        assert await cache.get(KEY, TAGS) is None


async def test_a_purge_during_a_lookup_is_not_overtaken(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with caches(valkey.url, tmp_path, 2) as (one, other):
        one.put(KEY, TAGS, master(400_000), one.generations)
        await one.settle()
        fetch = Objects.get

        async def slowly(self: Objects, name: str) -> bytes | None:
            found = await fetch(self, name)
            store = Store("cache", valkey.url, PATIENT)
            await purge(store)
            await store.close()
            await other.refresh()
            return found

        monkeypatch.setattr(Objects, "get", slowly)
        assert await other.get(KEY, TAGS) is None
        assert other.here(KEY) is None


async def test_a_store_that_forgot_its_generations_finds_nothing_of_before(valkey: Valkey, tmp_path: Path) -> None:
    async with caches(valkey.url, tmp_path) as (cache,), valkey.client() as client:
        cache.put(KEY, TAGS, master(), cache.generations)
        await cache.settle()
        await client.delete("cache:generations")
        await cache.refresh()
        assert await cache.get(KEY, TAGS) is None


async def test_what_the_store_cannot_take_is_dropped_and_counted(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.shelf.MAX_PUT_BYTES", 2 * master().size)
    async with caches(valkey.url, tmp_path) as (cache,), valkey.client() as client:
        for number in range(5):
            cache.put(bytes([number]) * 32, TAGS, master(), cache.generations)
        await cache.settle()
        assert len(await client.keys("cache:*")) == 2 + 1  # and the generations
        cache.put(KEY, TAGS, master(), cache.generations)
        await cache.settle()
        assert len(await client.keys("cache:*")) == 4


# --- memory


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.booleans()), max_size=60))
def test_memory_keeps_to_its_bytes_and_forgets_the_least_used(steps: list[tuple[int, int, bool]]) -> None:
    now = 0.0
    lru: Lru[int, int] = Lru(100, 50.0, lambda: now)
    used: dict[int, tuple[int, float]] = {}  # in the order of use
    for key, size, put in steps:
        now += 3.0
        if put:
            lru.put(key, size, size)
            used.pop(key, None)
            used[key] = (size, now)
            while sum(size for size, _ in used.values()) > 100:
                del used[next(iter(used))]
        else:
            kept = used.get(key)
            if kept is not None and now - kept[1] >= 50.0:
                del used[key]
                kept = None
            elif kept is not None:
                used[key] = used.pop(key)
            assert lru.get(key) == (None if kept is None else kept[0])
        assert lru.bytes <= 100
    assert lru.bytes == sum(size for size, _ in used.values())


# --- keys


def asked(text: str = "hello", **fields: Any) -> tts_pb2.SynthesizeRequest:
    return tts_pb2.SynthesizeRequest(text=text, **fields)


def test_what_means_the_same_has_the_same_key() -> None:
    same: list[Any] = [
        asked(),
        asked(" hello\n"),
        asked(voice="female1"),
        asked(controls=tts_pb2.Controls()),
        asked(controls=tts_pb2.Controls(speed=1.0)),
        asked(sampling=tts_pb2.Sampling()),
        asked(format=tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_OGG)),
        tts_pb2.StreamSynthesizeRequest(text="hello"),
    ]
    assert len({speech_key(one, "r") for one in same}) == 1
    assert speech_key(asked("e\u0301"), "r") == speech_key(asked("\u00e9"), "r")
    other = [
        asked("hallo"),
        asked(voice="male1"),
        asked(language="en"),
        asked(refine_text=True),
        asked(controls=tts_pb2.Controls(speed=1.1)),
        asked(controls=tts_pb2.Controls(oral=0)),
        asked(sampling=tts_pb2.Sampling(seed=0)),
        asked(sampling=tts_pb2.Sampling(temperature=0.3)),
    ]
    keys = {speech_key(one, "r") for one in [*other, asked()]}
    keys |= {speech_key(asked(), "another"), speech_key(asked(), "r", "tenant")}
    assert len(keys) == len(other) + 3
    assert 0 <= derived_seed(speech_key(asked(), "r")) < 2**32


TEXTS = st.text(st.sampled_from("ab é\u0301e가각ᄀ\u1161\u11a8好\u3000\n😀ﬁÅ\u212b"), min_size=1, max_size=30)


@given(TEXTS, st.data())
def test_marks_are_those_of_the_callers_own_text(text: str, data: st.DataObject) -> None:
    canonical = canonical_text(text)
    if not canonical:
        return
    cuts = sorted(data.draw(st.sets(st.integers(0, len(canonical)), max_size=4)) | {0, len(canonical)})
    ends = [len(canonical[:cut].encode()) for cut in cuts]
    marks = [tts_pb2.SegmentMark(start_byte=a, end_byte=b) for a, b in itertools.pairwise(ends)]
    restore = restorer(text)
    if restore is None:
        assert canonical == text
        return
    for mark in marks:
        restore(mark)
    own = text.encode()
    pieces = [own[mark.start_byte : mark.end_byte].decode() for mark in marks]
    assert "".join(pieces) == text  # together they cover it
    for piece, (a, b) in zip(pieces, itertools.pairwise(cuts), strict=True):
        if unicodedata.normalize("NFC", canonical[a:b]) == unicodedata.normalize("NFC", piece).strip():
            continue
        # Cut inside what one piece of the text became: its neighbours share it.
        assert piece == "" or unicodedata.normalize("NFC", piece).strip() in canonical
