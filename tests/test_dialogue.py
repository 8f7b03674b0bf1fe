"""Dialogues put together from shared segments, inside a service: order, offsets, who makes what. The engine is real."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batcher.engine import Controls, Sampling, Segment
from batcher.policy import Policy
from batcher.runner import Runner
from common import shelf as shelf_module
from common.calls import Call
from common.errors import ChorusError, DeadlineExceeded
from common.keys import segment_key
from common.settings import Settings, StoreSettings
from common.shelf import Tags
from common.store import Store, StoreUnavailable
from gateway.cache import purge, purge_key
from protos.chorus.v1 import tts_pb2
from service.dialogue import Account, in_parts
from service.engines.tone import ToneEngine
from service.engines.tone_code import verify
from service.flights import Deadline
from service.segments import Listener, Origin, Segments
from service.speaking import MAX_AHEAD, Terms, in_one_request, speak
from service.speech import parse_config, revision
from service.text import TextSegment
from tests.calls import until
from tests.hearing import LANGUAGE, identities
from tests.valkey import Valkey

# What is void has no sound.
TEXTS = ("Yes.", "No, not at all.", "void", "This is one that goes on for longer.", "Well.", "And another one.")
PATIENCE = 30.0
PATIENT = StoreSettings(budget=5.0)


class Written:
    """A text that is written some segments at a time, and only when it is let."""

    def __init__(self, texts: Sequence[str], at_once: int = 1) -> None:
        self.done = False
        self.gate = asyncio.Event()
        self.gate.set()
        self._parts: list[TextSegment] = []
        for number, text in enumerate(texts):
            self._parts.append(TextSegment(10 * number, 10 * number + 10, text, LANGUAGE))
        self._at_once = at_once

    async def more(self) -> list[TextSegment]:
        if not self._parts:
            self.done = True
            return []
        more, self._parts = self._parts[: self._at_once], self._parts[self._at_once :]
        await self.gate.wait()
        return more


@dataclass
class Heard:
    """What came of a dialogue."""

    texts: Sequence[str]
    seed: int
    account: Account = field(default_factory=Account)
    audio: bytearray = field(default_factory=bytearray)
    marks: list[tts_pb2.SegmentMark] = field(default_factory=list)
    starts: int = 0
    sequence: int = 0
    end: tts_pb2.StreamEnd | None = None

    def take(self, message: Any) -> None:
        """Checks as it comes: nothing is missing, doubled, or out of order."""
        assert self.end is None
        match message:
            case tts_pb2.StreamStart():
                assert not self.starts
                self.starts = 1
            case tts_pb2.AudioChunk():
                assert (message.start_sample * 2, message.sequence) == (len(self.audio), self.sequence)
                self.audio += message.data
                self.sequence += 1
            case tts_pb2.SegmentMark():
                before = self.marks[-1] if self.marks else tts_pb2.SegmentMark()
                assert (message.start_byte, message.start_sample) == (before.end_byte, before.end_sample)
                assert message.end_sample * 2 <= len(self.audio)
                self.marks.append(message)
            case tts_pb2.StreamEnd():
                self.end = message

    def check(self) -> None:
        """All that came is this dialogue's own; where it has ended, it is whole."""
        if self.end is not None:
            assert [mark.spoken_text for mark in self.marks] == list(self.texts)
            assert self.end.sample_count * 2 == len(self.audio) == self.marks[-1].end_sample * 2
        if self.audio:
            said = [
                one for text, one in zip(self.texts, identities(self.texts, self.seed), strict=True) if text != "void"
            ]
            verify(bytes(self.audio), said, whole=self.end is not None)


class Place:
    """A service without a wire."""

    def __init__(
        self, runner: Runner, engine: ToneEngine, settings: Settings, store: Store, revised: str | None
    ) -> None:
        self.runner = runner
        self.engine = engine
        self.store = store
        self.segments = Segments(settings, runner, revised or revision(engine), store)

    @property
    def rows(self) -> int:
        """Requests that the batcher was given: with one row each, the rows that were made."""
        return self.runner.stats().counters.submitted

    def speak(
        self,
        script: Written,
        heard: Heard,
        scope: str | None = "",
        priority: Any = "interactive",
        deadline: float = math.inf,
    ) -> Any:
        """A dialogue's messages. `scope`: None: it shares with nobody."""
        sampling = tts_pb2.Sampling(seed=heard.seed)
        manner = parse_config(tts_pb2.StreamConfig(language=LANGUAGE, sampling=sampling), self.engine)
        call = Call("", "")
        call.priority = priority
        begin: Any = partial(in_parts, self.segments, Listener(call, scope or "", deadline), heard.account)
        if scope is None:
            begin = partial(in_one_request, self.runner, call, Terms(2, stream=True), Deadline(math.inf, math.inf))
        return speak(begin, self.engine, manner, script, call)

    async def hear(self, texts: Sequence[str], *, seed: int = 5, leaves_after: int = 10**9, **options: Any) -> Heard:
        """Hears a dialogue, or as many of its messages."""
        heard, messages = Heard(texts, seed), 0
        async with aclosing(self.speak(Written(texts), heard, **options)) as spoken:
            async for message in spoken:
                heard.take(message)
                messages += 1
                if messages >= leaves_after:
                    break
        heard.check()
        return heard


@asynccontextmanager
async def place(
    *,
    tone: dict[str, Any] | None = None,
    policy: Policy | None = None,
    store: str | None = None,
    revised: str | None = None,
    **sections: Any,
) -> Any:
    given: dict[str, Any] = {"engine": "tone", "tone": {"steps_per_character": 1.5} | (tone or {})}
    settings = Settings(**given | sections)
    engine = ToneEngine(settings.tone)
    runner = Runner(engine, policy or Policy(), outbox_seconds=settings.batcher.outbox_seconds)
    runner.start()
    here = Place(runner, engine, settings, Store("cache", store, PATIENT), revised)
    try:
        async with asyncio.timeout(PATIENCE):
            await here.segments.refresh()
            yield here
    finally:
        await runner.stop()
        await here.store.close()


# --- keys


SEGMENT = Segment("Yes.", "female1", LANGUAGE, 1, 7, Controls(1.0, 2), Sampling(0.3), refine_text=False)


def test_equal_segments_have_equal_keys() -> None:
    assert segment_key(SEGMENT, "r", "acme") == segment_key(replace(SEGMENT), "r", "acme")
    assert len(bytes.fromhex(segment_key(SEGMENT, "r"))) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"text": "Yes!"},
        {"voice": "male1"},
        {"language": "en-GB"},
        {"index": 2},
        {"seed": 8},
        {"controls": Controls(1.1, 2)},
        {"controls": Controls(1.0, 3)},
        {"controls": Controls(1.0, 2, laugh=0)},
        {"controls": Controls(1.0, 2, pause=0)},
        {"controls": Controls(1.0)},
        {"sampling": Sampling(0.4)},
        {"sampling": Sampling(0.3, top_p=0.7)},
        {"sampling": Sampling(0.3, top_k=0)},
        {"sampling": Sampling(0.3, repetition_penalty=1.0)},
        {"refine_text": True},
    ],
)
def test_each_part_of_a_segment_changes_its_key(change: dict[str, Any]) -> None:
    assert segment_key(replace(SEGMENT, **change), "r") != segment_key(SEGMENT, "r")


def test_revisions_and_scopes_have_keys_of_their_own() -> None:
    keys = {segment_key(SEGMENT, revision, scope) for revision in ("r", "s", "") for scope in ("", "r", "acme")}
    assert len(keys) == 9


# --- what comes of it


SPEECH = ("Yes.", "No, not at all.", "Well.", "And another one.")


async def test_a_dialogue_in_parts_is_the_dialogue_in_one() -> None:
    async with place() as here:
        alone = await here.hear(SPEECH, scope=None)
        parts = await here.hear(SPEECH)
        again = await here.hear(SPEECH)
        assert alone.audio == parts.audio == again.audio
        assert alone.marks == parts.marks == again.marks
        assert alone.end.finish_reason == parts.end.finish_reason == again.end.finish_reason
        assert here.rows == 1 + len(SPEECH)
        seconds = len(alone.audio) / 2 / here.engine.caps.sample_rate_hertz
        assert parts.account.first is Origin.MADE
        assert parts.account.made_seconds == pytest.approx(seconds)
        assert (again.account.first, again.account.made_seconds, again.account.shared) == (Origin.KEPT, 0.0, 4)


async def test_who_begins_a_segment_pays_for_it_however_it_leaves() -> None:
    slow = {"step_base_ms": 2, "steps_per_character": 10}
    texts = ("A rather long one, which takes its time, as everybody can hear.",)
    async with place(tone=slow) as here:
        rate, whole = here.engine.caps.sample_rate_hertz, 640 * 512 / here.engine.caps.sample_rate_hertz

        async def leave_early(seed: int, *, others: bool) -> Heard:
            heard = Heard(texts, seed)
            async with AsyncExitStack() as stack:
                messages = await stack.enter_async_context(aclosing(here.speak(Written(texts), heard)))
                while not heard.audio:
                    heard.take(await anext(messages))
                if others:
                    other = await stack.enter_async_context(aclosing(here.speak(Written(texts), Heard(texts, seed))))
                    await anext(other)
                    await messages.aclose()
            return heard

        alone = await leave_early(1, others=False)
        assert alone.account.made_seconds == pytest.approx(len(alone.audio) / 2 / rate)
        followed = await leave_early(2, others=True)
        assert followed.account.made_seconds == pytest.approx(whole, rel=0.1)  # as it was foretold
        # What is there in full and can be found again is paid, also by who has heard its beginning only.
        short = Heard(("Yes.",), 3)
        async with aclosing(here.speak(Written(("Yes.",)), short)) as messages:
            await anext(messages)
            await until(lambda: here.segments._kept.bytes > 0)
        assert short.account.made_seconds == pytest.approx(40 * 512 / rate)


async def test_a_long_text_is_read_as_it_is_heard() -> None:
    texts = tuple(f"Number {number}." for number in range(150))
    async with place() as here:
        script, heard = Written(texts, at_once=40), Heard(texts, 5)
        async with aclosing(here.speak(script, heard)) as messages:
            async for message in messages:
                heard.take(message)
                assert len(texts) - len(script._parts) - len(heard.marks) <= MAX_AHEAD + 2 * 40
        heard.check()
        assert heard.end is not None


async def test_what_differs_is_made_and_the_rest_is_found() -> None:
    async with place() as here:
        await here.hear(SPEECH)
        before = here.rows
        other = await here.hear(("Yes.", "And another one.", "Well."))
        assert here.rows == before + 1  # the second; the third has its old place
        assert other.account.shared == 2
        await here.hear(SPEECH, seed=6)
        await here.hear(SPEECH, scope="acme")
        assert here.rows == before + 1 + 2 * len(SPEECH)
        await here.hear(SPEECH, scope="acme")
        await here.hear(SPEECH, scope=None)
        assert here.rows == before + 2 + 2 * len(SPEECH)


async def test_what_met_a_cap_is_told_so_and_not_kept() -> None:
    async with place(tone={"faults": "long:Well", "max_steps": 40}) as here:
        for number in range(2):
            heard = Heard(SPEECH[:3], 5)
            async for message in here.speak(Written(SPEECH[:3]), heard):
                heard.take(message)
            assert heard.end is not None
            assert heard.end.finish_reason == tts_pb2.FINISH_REASON_LENGTH
            assert here.rows == 3 + number


@pytest.mark.parametrize("what", ["all", "voice:female1", "revision", "key"])
async def test_what_was_purged_is_made_again_also_what_was_on_its_way(valkey: Valkey, what: str) -> None:
    tone = {"step_base_ms": 1, "steps_per_character": 5}
    async with place(tone=tone, store=valkey.url) as here, place(tone=tone, store=valkey.url) as there:

        async def forget() -> None:
            tags = Tags("male1", revision(here.engine))
            if what == "key":  # of another speech: what is kept of dialogues has no key that anybody knows
                await purge_key(here.store, bytes(32), tags)
            else:
                await purge(here.store, f"revision:{tags.revision}" if what == "revision" else what)
            await here.segments.refresh()
            await there.segments.refresh()

        heard = Heard(SPEECH[3:], 5)
        async with aclosing(here.speak(Written(heard.texts), heard)) as messages:
            heard.take(await anext(messages))
            await forget()
            async for message in messages:
                heard.take(message)
        heard.check()
        for number in range(2):
            await here.segments.settle()
            assert (here.rows, there.rows) == (1 + number, number)
            await here.hear(heard.texts)
            await here.segments.settle()
            assert (await there.hear(heard.texts)).account.first is Origin.KEPT
            await forget()
            await there.hear(heard.texts)
            await forget()


async def test_a_purge_is_seen_also_before_the_store_answered_for_the_first_time(monkeypatch: Any) -> None:
    async def read(store: object) -> dict[bytes, bytes]:
        if replies[0] is None:
            raise StoreUnavailable
        return {b"all": replies[0]}

    replies = [None, b"2", b"2", None, b"3", b"3"]
    monkeypatch.setattr(shelf_module, "read_generations", read)
    async with place() as here:
        monkeypatch.setattr(here.segments._shelf, "_store", SimpleNamespace(worth_asking=True))
        monkeypatch.setattr(here.segments._shelf, "get", unavailable)
        monkeypatch.setattr(here.segments._shelf, "put", lambda *args: None)
        made = []
        while replies:
            before = here.rows
            await here.segments.refresh()
            await here.hear(SPEECH)
            made.append(here.rows > before)
            replies.pop(0)
    assert made == [True, True, False, False, True, False]


async def unavailable(*args: object) -> None:
    """A store that has nothing."""


async def test_what_is_about_to_end_is_not_joined_and_ends_nothing_of_its_successors() -> None:
    async with place(tone={"step_base_ms": 5, "steps_per_character": 100}) as here:
        listener = Listener(Call("", ""), "", math.inf)
        first, _ = here.segments.find(SEGMENT, listener, None)
        await until(lambda: first.speaking is not None)
        first.tape.cancel()
        second, origin = here.segments.find(SEGMENT, listener, None)
        assert (second is first, origin) == (False, Origin.MADE)
        await first.tape.wait_closed()
        assert here.segments.find(SEGMENT, listener, None) == (second, Origin.JOINED)
        second.tape.cancel()
        await second.tape.wait_closed()
        assert not here.segments._flights


async def test_what_is_there_is_taken_as_it_is_heard() -> None:
    texts = ("And another one.",) * 30
    async with place(batcher={"outbox_seconds": 2.0}) as here:
        await here.hear(texts)
        heard = Heard(texts, 5)
        async with aclosing(here.speak(Written(texts, at_once=30), heard)) as messages:
            await anext(messages)
            assert heard.account.shared <= 5  # of half a second each
            assert here.rows == 30


async def test_only_so_much_is_kept() -> None:
    async with place(cache={"segment_bytes": 40_000}) as here:
        for seed in range(10):
            await here.hear(SPEECH, seed=seed)
            assert here.segments._kept.bytes <= 40_000
        assert (await here.hear(SPEECH[:1], seed=9)).account.first is Origin.MADE
    async with place(cache={"enabled": False}) as here:
        await here.hear(SPEECH)
        await here.hear(SPEECH)
        assert here.rows == 2 * len(SPEECH)


async def test_the_last_of_its_listeners_ends_it_at_the_next_tick() -> None:
    slow = {"step_base_ms": 2, "steps_per_character": 20}
    async with place(tone=slow) as here:
        script = Written(SPEECH)
        dialogues = [here.speak(script, Heard(SPEECH, 5)), here.speak(Written(SPEECH), Heard(SPEECH, 5))]
        for messages in dialogues:
            await anext(messages)
        await until(lambda: here.runner.stats().requests == 2)  # the current and the next
        await dialogues[0].aclose()
        await asyncio.sleep(0.02)
        assert here.runner.stats().requests == 2
        await dialogues[1].aclose()
        await until(lambda: here.runner.stats().requests == 0)
        stats = here.runner.stats()
        assert (stats.rows, stats.counters.cancel_ticks_max) == (0, stats.counters.cancel_ticks_max)
        assert stats.counters.cancel_ticks_max <= 1


async def test_nobody_waits_with_batch_work_and_batch_work_joins_what_runs() -> None:
    texts = ("A rather long one, which takes its time.",)
    async with place(tone={"step_base_ms": 2, "steps_per_character": 10}) as here:
        origins = []
        async with AsyncExitStack() as stack:
            for priority in ("batch", "interactive", "batch"):
                heard = Heard(texts, 5)
                messages = await stack.enter_async_context(aclosing(here.speak(Written(texts), heard, "", priority)))
                heard.take(await anext(messages))
                origins.append(heard.account.first)
        assert origins == [Origin.MADE, Origin.MADE, Origin.JOINED]


async def test_a_slow_listener_holds_up_nobody_and_hears_all() -> None:
    async with place(tone={"steps_per_character": 8}) as here:
        slow = Heard(SPEECH, 5)
        async with aclosing(here.speak(Written(SPEECH), slow)) as messages:
            slow.take(await anext(messages))
            fast = await here.hear(SPEECH)
            assert fast.end is not None
            async for message in messages:
                slow.take(message)
        slow.check()
        assert slow.audio == fast.audio
        assert here.rows == len(SPEECH)


async def test_of_the_next_part_no_samples_are_made_before_its_turn() -> None:
    texts = ("This is one that goes on for longer.", "And another one.", "Well.")
    async with place(tone={"steps_per_character": 50}, batcher={"outbox_seconds": 1.0}) as here:
        messages = here.speak(Written(texts, at_once=3), Heard(texts, 5))
        for _ in range(2):
            await anext(messages)  # and reads no further
        await until(lambda: here.runner.stats().parked == 2)  # both have made their steps
        current, following = here.segments._flights.values()
        assert current.samples > 0
        assert following.samples == 0
        await messages.aclose()


async def test_what_comes_next_is_as_urgent_as_playback_makes_it() -> None:
    texts = ("This is one that goes on for longer.", "And another one.")
    async with place(tone={"steps_per_character": 10, "step_base_ms": 10, "slots": 1}) as here:
        messages = here.speak(Written(texts, at_once=2), Heard(texts, 5))
        starting = asyncio.ensure_future(anext(messages))
        await until(lambda: len(here.segments._flights) == 2)
        (_, following) = here.segments._flights.values()
        foretold = following.heard_from
        await starting
        await anext(messages)
        policy = here.runner.scheduler.policy
        moved = foretold - following.heard_from
        assert 0.5 < moved < policy.reserve + policy.first_audio_patience  # it was heard sooner than a newcomer may be
        await messages.aclose()


async def test_who_joins_and_needs_it_sooner_makes_it_more_urgent() -> None:
    async with (
        place(tone={"steps_per_character": 10, "step_base_ms": 10, "slots": 1}) as here,
        aclosing(here.speak(Written(("One that holds the only slot.",)), Heard((), 5))) as holder,
    ):
        await anext(holder)
        listener, now = Listener(Call("", ""), "", math.inf), here.runner.now()
        found = [here.segments.find(SEGMENT, listener, now + seconds) for seconds in (9.0, 12.0, 7.0, 5.0)]
        assert [origin for _, origin in found] == [Origin.MADE, *[Origin.JOINED] * 3]
        (flight,) = {flight for flight, _ in found}
        assert flight.heard_from == now + 5.0
        await until(lambda: flight.speaking is not None)
        flight.need(now + 3.0)
        assert flight.speaking is not None
        assert flight.speaking._request.playback_started == now + 3.0
        flight.tape.cancel()


async def test_what_ended_for_anothers_deadline_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async with place() as here:
        made: Any = here.segments._made
        begun: list[Any] = []

        async def dying_first(*args: Any) -> AsyncGenerator[Any, None]:
            begun.append(args)
            if len(begun) == 1:
                raise DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED")
            async for event in made(*args):
                yield event

        monkeypatch.setattr(here.segments, "_made", dying_first)
        # The second comes before the first one's end is known.
        results = await asyncio.gather(here.hear(SPEECH), here.hear(SPEECH), return_exceptions=True)
        first, second = results
        assert isinstance(first, DeadlineExceeded)
        assert isinstance(second, Heard)
        assert second.account.first is Origin.MADE
        assert here.rows == len(SPEECH)


async def test_what_begins_anew_and_is_there_already_is_heard(monkeypatch: Any) -> None:
    async with place() as here:
        made: Any = here.segments._made
        dies, begun = asyncio.Event(), False

        async def dying_first(segment: Any, *args: Any) -> AsyncGenerator[Any, None]:
            nonlocal begun
            if segment.index == 1 and not begun:
                begun = True
                await dies.wait()
                raise DeadlineExceeded("the deadline passed", "DEADLINE_EXCEEDED")
            async for event in made(segment, *args):
                yield event

        monkeypatch.setattr(here.segments, "_made", dying_first)
        texts = SPEECH[:2]
        first = asyncio.ensure_future(here.hear(texts))
        await until(lambda: begun)
        slow = Heard(texts, 5)
        async with aclosing(here.speak(Written(texts, at_once=2), slow)) as messages:
            slow.take(await anext(messages))  # it reads slowly, and its second part has joined
            dies.set()
            with pytest.raises(DeadlineExceeded):
                await first
            await here.hear(texts)  # what a third has made is kept
            async with asyncio.timeout(5):
                async for message in messages:
                    slow.take(message)
        slow.check()


async def test_a_failure_reaches_all_once_and_is_not_kept() -> None:
    async with place(tone={"faults": "row@9:another", "step_base_ms": 1}, policy=Policy(max_attempts=1)) as here:

        async def fail() -> str:
            with pytest.raises(ChorusError) as caught:
                await here.hear(SPEECH)
            return caught.value.reason

        assert await asyncio.gather(*(fail() for _ in range(5))) == ["SEGMENT_FAILED"] * 5
        assert here.rows == len(SPEECH)
        assert await fail() == "SEGMENT_FAILED"
        assert here.rows == len(SPEECH) + 1


FULL: dict[str, Any] = {
    "tone": {"step_base_ms": 5, "slots": 1, "steps_per_character": 2},
    "policy": Policy(max_delay=0.1, max_steps_per_tick=1),
}
LONG = ("Something that takes its time, and then some more of it. " * 4,)


@asynccontextmanager
async def full(here: Place) -> AsyncGenerator[Any, None]:
    """While a dialogue is heard that leaves no room for another."""
    async with aclosing(here.speak(Written(LONG), Heard(LONG, 6))) as messages:
        await anext(messages)
        yield messages


async def test_who_is_refused_has_cost_nothing() -> None:
    async with place(**FULL) as here, full(here):
        before = here.runner.stats().counters
        with pytest.raises(ChorusError) as refusal:
            await anext(here.speak(Written(SPEECH, at_once=4), Heard(SPEECH, 5)))
        assert refusal.value.reason == "QUEUE_FULL"
        after = here.runner.stats().counters
        assert (after.submitted, after.refused["full"]) == (before.submitted, before.refused["full"] + 1)
        assert len(here.segments._flights) == 1


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_who_begins_with_what_is_there_hears_it_and_waits_for_room(valkey: Valkey, elsewhere: bool) -> None:
    async with place(**FULL, store=valkey.url) as here, place(**FULL, store=valkey.url) as there:
        before = there if elsewhere else here
        await before.hear(SPEECH[:1])
        await before.segments.settle()
        heard = Heard(SPEECH[:3], 5)
        async with full(here) as blocker, aclosing(here.speak(Written(heard.texts, at_once=3), heard)) as messages:
            rows = here.rows
            while not heard.marks:
                heard.take(await anext(messages))
            going_on = asyncio.ensure_future(anext(messages))
            await asyncio.sleep(0.05)
            assert (here.rows, going_on.done()) == (rows, False)
            await blocker.aclose()
            heard.take(await going_on)
            async for message in messages:
                heard.take(message)
        heard.check()
        assert heard.end is not None
        assert here.rows == rows + 2


async def test_who_waits_for_room_too_long_is_told_so() -> None:
    async with place(**FULL, batcher={"first_audio_limit": 0.1}) as here:
        await here.hear(SPEECH[:1])
        async with full(here):
            began = here.runner.now()
            with pytest.raises(ChorusError) as refusal:
                await here.hear(SPEECH[:2])
            assert refusal.value.reason == "QUEUE_FULL"
            assert here.runner.now() - began > 0.1


async def test_who_was_let_in_waits_for_nobodys_room() -> None:
    async with place(**FULL) as here:
        await here.hear(SPEECH[:1])
        writer = Written(SPEECH[:2])
        early, late = Heard(SPEECH[:2], 5), Heard(SPEECH[:2], 5)
        async with aclosing(here.speak(writer, early)) as messages:  # there is room
            while not early.marks:
                early.take(await anext(messages))
                writer.gate.clear()
            async with full(here) as blocker, aclosing(here.speak(Written(SPEECH[:2]), late)) as others:
                rows = here.rows
                while not late.marks:
                    late.take(await anext(others))
                waiting = asyncio.ensure_future(anext(others))
                await until(lambda: len(here.segments._flights) == 2)
                assert here.rows == rows
                writer.gate.set()
                going_on = asyncio.ensure_future(anext(messages))
                await until(lambda: here.rows == rows + 1)
                assert here.runner.stats().waiting == 1  # who leaves no room has its slot still
                await blocker.aclose()
                early.take(await going_on)
                async for message in messages:
                    early.take(message)
                late.take(await waiting)
                async for message in others:
                    late.take(message)
                assert here.rows == rows + 1
        early.check()
        assert early.audio == late.audio
        assert late.account.made_seconds > 0
        assert early.account.made_seconds == 0


async def test_the_deadline_of_the_first_is_not_that_of_the_others() -> None:
    # What nobody foresaw: it would have been in time.
    slow = {"step_base_ms": 1, "steps_per_character": 10, "faults": "slow@20:1000"}
    async with place(tone=slow) as here:
        deadline, patient = here.runner.now() + 0.5, Heard(SPEECH[:1], 5)
        async with aclosing(here.speak(Written(SPEECH[:1]), Heard(SPEECH[:1], 5), deadline=deadline)) as first:
            starting = asyncio.ensure_future(anext(first))
            await until(lambda: here.rows == 1)
            async for message in here.speak(Written(SPEECH[:1]), patient, deadline=deadline + 20):
                patient.take(message)
            await starting
        patient.check()
        assert here.runner.now() > deadline
        assert (here.rows, patient.account.first) == (1, Origin.JOINED)


# --- several services


async def test_what_one_service_has_made_another_finds(valkey: Valkey) -> None:
    texts = (*TEXTS, "This is the longest of them all, and takes some seconds.")
    tone = {"faults": "empty:void"}
    async with place(store=valkey.url, tone=tone) as here, place(store=valkey.url, tone=tone) as there:
        made = await here.hear(texts)
        await here.segments.settle()
        found = await there.hear(texts)
        assert (found.audio, found.marks, found.end.sample_count) == (made.audio, made.marks, made.end.sample_count)
        assert (found.account.first, found.account.made_seconds) == (Origin.KEPT, 0.0)
        assert found.account.shared == len(texts)
        assert there.rows == 0
        # From then on it has them itself, and tells the store nothing that came from there.
        async with valkey.client() as client:
            assert len(await client.keys("segment:*")) == len(texts)
            await client.flushall()
            await there.hear(texts)
            await there.segments.settle()
            assert await client.keys("segment:*") == []
        # What is new among what is found is made, and nothing that is another's is heard.
        await here.hear(("Yes.", "Something new."), seed=6)
        await here.segments.settle()
        both = await there.hear(("Yes.", "Another thing."), seed=6)
        assert (both.account.first, both.account.shared, there.rows) == (Origin.KEPT, 1, 1)


async def test_scopes_and_revisions_are_kept_apart_in_the_store(valkey: Valkey) -> None:
    async with place(store=valkey.url) as here, place(store=valkey.url, revised="tone 2") as newer:
        await here.hear(SPEECH)
        await here.hear(SPEECH, scope="acme")
        await here.segments.settle()
        async with place(store=valkey.url) as there:
            for scope, rows in (("", 0), ("acme", 0), ("emca", len(SPEECH))):
                assert (await there.hear(SPEECH, scope=scope)).end is not None
                assert there.rows == rows
        await newer.hear(SPEECH)
        assert newer.rows == len(SPEECH)


async def test_what_is_not_whole_or_too_large_is_not_told_to_the_store(valkey: Valkey) -> None:
    async with (
        place(store=valkey.url, tone={"faults": "long:Well", "max_steps": 40}) as here,
        place(store=valkey.url, cache={"inline_bytes": 1000}) as strict,
        valkey.client() as client,
    ):
        await strict.hear(SPEECH)
        await strict.segments.settle()
        assert await client.keys("segment:*") == []
        await here.hear(LONG, leaves_after=2)
        async for _ in here.speak(Written(SPEECH), Heard(SPEECH, 5)):  # "Well." meets its cap
            pass
        await here.segments.settle()
        assert len(await client.keys("segment:*")) == len(SPEECH) - 1


async def test_whatever_is_wrong_with_the_store_all_is_made(valkey: Valkey) -> None:
    async with place(store=valkey.url) as here:
        await here.hear(SPEECH)
        await here.segments.settle()
        async with valkey.client() as client:
            for name in await client.keys("segment:*"):
                await client.set(name, b"i" + bytes(1000))
        async with place(store=valkey.url) as there:
            await there.hear(SPEECH)
            assert there.rows == len(SPEECH)
            await there.segments.settle()
            await valkey.kill()
            await there.hear(SPEECH, seed=6)
            assert there.rows == 2 * len(SPEECH)
        await valkey.start()


LONGER = ("This one goes on for much longer than all others, since it must come to far more than four seconds. ",)


async def test_what_was_found_and_is_heard_slowly_is_joined_by_nobody_after_a_purge(valkey: Valkey) -> None:
    tone = {"steps_per_character": 5}
    async with place(store=valkey.url, tone=tone) as here, place(store=valkey.url, tone=tone) as there:
        await here.hear(LONGER)
        await here.segments.settle()
        slow = Heard(LONGER, 5)
        async with aclosing(there.speak(Written(LONGER), slow)) as messages:
            slow.take(await anext(messages))
            assert slow.account.first is Origin.KEPT
            await purge(here.store)
            await there.segments.refresh()
            assert (await there.hear(LONGER)).account.first is Origin.MADE
            async for message in messages:
                slow.take(message)
        slow.check()
        assert not there.segments._flights


# --- whatever happens


@dataclass(frozen=True)
class Part:
    """One dialogue of a random night."""

    texts: tuple[str, ...]
    seed: int
    scope: str | None
    comes_after: int
    """Turns of the event loop."""
    at_once: int
    leaves_after: int
    """Messages."""
    pauses: int
    """Turns of the event loop that its reader takes for a message."""


PARTS = st.builds(
    Part,
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=6).map(lambda texts: ("Yes.", *texts)),
    st.sampled_from((5, 5, 5, 6)),
    st.sampled_from(("", "", "", "acme", None)),
    st.integers(0, 60),
    st.integers(1, 4),
    st.one_of(st.just(10**9), st.integers(1, 12)),
    st.integers(0, 20),
)


async def turns(count: int) -> None:
    """Lets others do something."""
    for _ in range(count):
        await asyncio.sleep(0)


async def play(here: Place, part: Part) -> Heard:
    """Hears a dialogue as it is to be heard."""
    heard = Heard(part.texts, part.seed)
    await turns(part.comes_after)
    messages = 0
    async with aclosing(here.speak(Written(part.texts, part.at_once), heard, part.scope)) as spoken:
        async for message in spoken:
            heard.take(message)
            messages += 1
            if messages == part.leaves_after:
                break
            await turns(part.pauses)
    heard.check()
    return heard


NIGHT: dict[str, Any] = {"tone": {"faults": "empty:void", "slots": 4}}


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(PARTS, min_size=2, max_size=8), kept=st.sampled_from((1, 60_000, 10**9)))
def test_a_random_night(parts: list[Part], kept: int) -> None:
    async def night() -> None:
        async with place(**NIGHT, cache={"segment_bytes": kept}) as here:
            heard = await asyncio.gather(*(play(here, part) for part in parts))
            await until(lambda: here.runner.stats().requests == 0)
            assert here.runner.stats().rows == here.runner.stats().parked == 0
            assert not here.segments._flights
            for part, one in zip(parts, heard, strict=True):
                assert one.end is not None or part.leaves_after < 10**9
            shared = [one for part, one in zip(parts, heard, strict=True) if part.scope is not None]
            if all(part.leaves_after == 10**9 for part in parts) and kept == 10**9:
                lengths: dict[Any, int] = {}
                for part, one in zip(parts, heard, strict=True):
                    if part.scope is not None:
                        for number, mark in enumerate(one.marks):
                            key = (part.seed, part.scope, number, mark.spoken_text)
                            assert lengths.setdefault(key, mark.end_sample - mark.start_sample) > -1
                assert here.rows == len(lengths) + len(parts) - len(shared)
                made = sum(one.account.made_seconds for one in shared)
                assert made == pytest.approx(sum(lengths.values()) / here.engine.caps.sample_rate_hertz)

    asyncio.run(night())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(PARTS, st.booleans()), min_size=2, max_size=8),
    purged=st.one_of(st.none(), st.integers(0, 60)),
)
def test_a_random_night_of_two_services(valkey: Valkey, parts: list[tuple[Part, bool]], purged: int | None) -> None:
    async def night() -> None:
        # Nothing is kept in memory: all comes from the store, or is made.
        settings: dict[str, Any] = NIGHT | {"store": valkey.url, "cache": {"segment_bytes": 1}}
        async with place(**settings) as here, place(**settings) as there:

            async def forget() -> None:
                if purged is not None:
                    await turns(purged)
                    await purge(here.store)
                    await here.segments.refresh()
                    await there.segments.refresh()

            await here.store.command("FLUSHALL")
            await here.segments.refresh()
            await there.segments.refresh()
            calls = [play(there if elsewhere else here, part) for part, elsewhere in parts]
            *heard, _ = await asyncio.gather(*calls, forget())
            for one in (here, there):
                await until(lambda one=one: one.runner.stats().requests == 0)  # type: ignore[misc]
                assert not one.segments._flights
                await one.segments.settle()
            for (part, _), dialogue in zip(parts, heard, strict=True):
                assert dialogue is not None
                assert dialogue.end is not None or part.leaves_after < 10**9
            made = here.rows + there.rows
            again = [play(there, replace(part, comes_after=0)) for part, _ in parts if part.scope is not None]
            await asyncio.gather(*again)
            if purged is None and all(part.leaves_after == 10**9 for part, _ in parts):
                assert here.rows + there.rows == made

    asyncio.run(night())
