"""Ten thousand callers who may leave at any moment: no slot, task, outbox or file stays, and no audio is mixed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from protos.chorus.v1 import tts_pb2
from service.engines.tone_code import CodeError, verify
from tests.calls import Door
from tests.hearing import LANGUAGE, Heard, identities
from tests.stack import Server, Stack, stream_request, text_request

CALLS = 10_000
AT_ONCE = 60
SLOTS = 24
TEXTS = ("Short.", "A sentence that is a little longer.", "One of two. And this is the other one, which is longer.")
LEFTOVERS = (
    "chorus_batcher_requests",
    "chorus_batcher_waiting",
    "chorus_batcher_rows",
    "chorus_batcher_parked",
    "chorus_batcher_work_audio_seconds",
    "chorus_calls_active",
    "chorus_flights_open",  # they linger for a moment
    "chorus_segments_open",
)


@pytest.mark.timeout(400)
async def test_ten_thousand_random_disconnects_leave_nothing_behind(stack: Stack) -> None:
    # Steps that cost something, so that callers leave in all states: waiting, running, ended and half heard.
    service, gateway = await stack.pair(
        tone_slots=SLOTS, tone_step_base_ms=0.3, tone_steps_per_character=1, tone_lookahead_steps=4
    )
    callers = Callers(Door(gateway), Door(service))
    await callers.run(300)  # what is made once is there now
    before = [await settled(server) for server in (service, gateway)]
    await callers.run(CALLS)
    after = [await settled(server) for server in (service, gateway)]
    assert callers.whole > CALLS // 5
    assert callers.left > CALLS // 5
    for server, was, is_now in zip((service, gateway), before, after, strict=True):
        assert is_now["tasks"] <= was["tasks"], server.role
        # gRPC keeps some sockets for calls at once, sooner or later as many as there ever were; a leak would be more.
        assert is_now["files"] <= was["files"] + AT_ONCE, server.role
        assert is_now["threads"] <= was["threads"] + 2, server.role
    assert service.metric("chorus_batcher_slots_free") == SLOTS
    assert service.metric("chorus_batcher_cancel_ticks_max") <= 1
    assert not [line for server in (service, gateway) for line in server.log() if line.get("level") == "error"]


async def settled(server: Server) -> dict[str, int]:
    """What a server holds once it is at rest."""
    names = LEFTOVERS if server.role == "service" else ("chorus_calls_active",)
    for name in names:
        await server.until_metric(name, 0)
    process = Path(f"/proc/{server.process.pid}")
    return {
        "tasks": int(server.metric("chorus_tasks")),
        "files": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
    }


class Callers:
    """They call in one of three ways, through the gateway or round it, and some leave before the end."""

    def __init__(self, *doors: Door) -> None:
        self._doors = doors
        self._chance = random.Random(20)
        self._numbers = iter(range(1, 10**9))
        self.whole = 0
        self.left = 0

    async def run(self, calls: int) -> None:
        """So many calls, many at once."""
        seats = asyncio.Semaphore(AT_ONCE)

        async def seated() -> None:
            async with seats:
                await asyncio.wait_for(self._call(), 60)

        await asyncio.gather(*(seated() for _ in range(calls)))

    async def _call(self) -> None:
        chance, number = self._chance, next(self._numbers)
        text = chance.choice(TEXTS)
        door = chance.choice(self._doors)
        patience = chance.choice([0, 1, 2, 3, 1000])
        call = chance.choice([self._unary, self._stream, self._written])
        await call(door, f"{number}. {text}", number, patience)

    async def _unary(self, door: Door, text: str, seed: int, patience: int) -> None:
        options: dict[str, Any] = {"language": LANGUAGE, "sampling": tts_pb2.Sampling(seed=seed)}
        call = asyncio.ensure_future(door.speech.Synthesize(text_request(text, **options), timeout=60))
        for _ in range(patience):
            await asyncio.sleep(0.001)
            if call.done():
                break
        if not call.done() and patience < 1000:
            call.cancel()
            await asyncio.wait({call})
            self.left += 1
            return
        reply = await call
        heard = Heard(bytearray(reply.audio), [reply.start], list(reply.marks), [reply.end])
        heard.check_whole()
        self.whole += 1

    async def _stream(self, door: Door, text: str, seed: int, patience: int) -> None:
        request = stream_request(text, language=LANGUAGE, sampling=tts_pb2.Sampling(seed=seed))
        await self._hear(door.speech.StreamSynthesize(request, timeout=60), seed, patience)

    async def _written(self, door: Door, text: str, seed: int, patience: int) -> None:
        raw = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)
        config = tts_pb2.StreamConfig(language=LANGUAGE, format=raw, sampling=tts_pb2.Sampling(seed=seed))

        async def messages() -> AsyncIterator[tts_pb2.StreamSynthesizeTextRequest]:
            yield tts_pb2.StreamSynthesizeTextRequest(config=config)
            for word in text.split():
                yield tts_pb2.StreamSynthesizeTextRequest(text=word + " ")

        await self._hear(door.speech.StreamSynthesizeText(messages(), timeout=60), seed, patience)

    async def _hear(self, call: Any, seed: int, patience: int) -> None:
        """Hears so many messages and leaves, or the whole speech."""
        heard = Heard()
        if patience:
            async for response in call:
                heard.take(response)
                patience -= 1
                if not patience:
                    break
        if heard.ends:
            heard.check_whole()
            self.whole += 1
            return
        call.cancel()
        self.left += 1
        # Up to its last mark, what came is this caller's own, and whole.
        end = heard.marks[-1].end_sample if heard.marks else 0
        if end:
            verify(bytes(heard.audio[: 2 * end]), identities([mark.spoken_text for mark in heard.marks], seed))


async def test_identities_that_are_not_the_callers_own_are_noticed(stack: Stack) -> None:
    """The check above bites: a stranger's seed in the audio does not pass."""
    service = await stack.service()
    call = Door(service).speech.StreamSynthesize(
        stream_request("Mine.", language=LANGUAGE, sampling=tts_pb2.Sampling(seed=1))
    )
    heard = Heard()
    async for response in call:
        heard.take(response)
    heard.starts[0].seed = 2
    with pytest.raises(CodeError):
        heard.check_whole()
