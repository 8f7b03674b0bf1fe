"""The ChatTTS engine: the protocol, upstream's sound, failures, the real scheduler, the real service."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from batcher.engine import (
    Controls,
    EndReason,
    EngineOutOfMemoryError,
    Join,
    Plan,
    RowRef,
    RowReport,
    Sampling,
    Segment,
    Vocode,
)
from batcher.policy import Policy
from batcher.request import Audio, RequestEnded, RequestFailed
from batcher.runner import Runner
from common.errors import StartupError
from common.settings import ChatTTSSettings
from protos.chorus.v1 import tts_pb2
from service.engines.base import SpeechEngine
from service.engines.chattts import engine as engine_module
from service.engines.chattts.decode import Kind
from service.engines.chattts.engine import PROMPT_TOKENS, ChatTTSEngine
from service.engines.chattts.linear import has_int8
from service.engines.chattts.upstream import import_chattts
from service.engines.chattts.voices import draw_speaker
from tests.stack import START_SECONDS, Stack, stream_request, text_request

SLOTS = 6
MAX_STEPS = 150
STEP = 512
PATIENCE = 60.0
GREEDY = Sampling(temperature=1e-5)


def settings_for(checkpoint: Path, **fields: Any) -> ChatTTSSettings:
    small: dict[str, Any] = {"slots": SLOTS, "max_steps": MAX_STEPS, "threads": 1, "device": "cpu", "dtype": "fp32"}
    return ChatTTSSettings(folder=checkpoint, check_sums=False, **small | fields)


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> ChatTTSEngine:
    return ChatTTSEngine(settings_for(tiny_checkpoint, deterministic=True))


@pytest.fixture
def engine(shared: ChatTTSEngine) -> Iterator[ChatTTSEngine]:
    """An engine that nobody uses, before and after."""
    yield shared
    shared.close()
    assert (shared.held_slots, shared.kept_rows) == (0, 0)


@pytest.fixture(params=[0, 1], ids=["at once", "one plan late"])
def punctual(engine: ChatTTSEngine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ChatTTSEngine:
    """The engine, which answers at once as on a CPU, or one plan late as on a GPU."""
    monkeypatch.setattr(engine, "_behind", request.param)
    return engine


def segment(text: str = "hello you", seed: int = 1, **fields: Any) -> Segment:
    return Segment(text, fields.pop("voice", "female1"), "en-US", seed=seed, **fields)


class Driver:
    """Drives an engine as a scheduler would."""

    def __init__(self, engine: ChatTTSEngine) -> None:
        self.engine = engine
        self.steps: dict[RowRef, int] = {}
        self.ended: dict[RowRef, EndReason] = {}
        self.errors: dict[RowRef, str] = {}
        self.samples: dict[RowRef, bytes] = {}
        self._numbers = itertools.count()

    def join(self, segment: Segment, slot: int = 0) -> Join:
        number = next(self._numbers)
        return Join(RowRef(number, slot, number), segment)

    def run(self, plan: Plan) -> tuple[RowReport, ...]:
        rows = self.engine.run(plan).rows
        for report in rows:
            assert report.ref not in self.errors
            assert report.steps_done >= self.steps.get(report.ref, 0)
            self.steps[report.ref] = report.steps_done
            if report.ended:
                assert report.ref not in self.ended, "told once"
                self.ended[report.ref] = report.ended
            if report.error:
                self.errors[report.ref] = report.error
            if report.pcm:
                before = self.samples.get(report.ref, b"")
                assert report.pcm.start_sample == len(before) // 2
                self.samples[report.ref] = before + report.pcm.data
        return rows

    def until_over(self, *refs: RowRef, steps: int = 1) -> None:
        for _ in range(4 * MAX_STEPS + 800):
            if all(ref in self.ended or ref in self.errors for ref in refs):
                return
            self.run(Plan(steps=steps))
        raise AssertionError("rows do not end")

    def say(self, *segments: Segment, steps: int = 4) -> list[NDArray[np.int16]]:
        """Whole rows that join together."""
        joins = [self.join(segment, slot) for slot, segment in enumerate(segments)]
        self.run(Plan(joins=(tuple(joins),), steps=steps))
        refs = [join.ref for join in joins]
        self.until_over(*refs, steps=steps)
        for ref in refs:
            self.run(Plan(vocode=(Vocode(ref, self.steps[ref]),)))
        self.run(Plan())
        return [pcm(self.samples[ref]) for ref in refs]


def pcm(data: bytes) -> NDArray[np.int16]:
    return np.frombuffer(data, dtype="<i2")


def assert_same_sound(one: NDArray[np.int16], other: NDArray[np.int16]) -> None:
    """Equal but for the rounding to 16 bits, since the vocoder's passes may be cut otherwise."""
    assert len(one) == len(other)
    assert np.abs(one.astype(int) - other).max(initial=0) <= 1


# -- the protocol -----------------------------------------------------------------------------------------------------


def test_it_presents_itself(engine: ChatTTSEngine, tiny_checkpoint: Path) -> None:
    speaking: SpeechEngine = engine
    assert speaking.name == "chattts"
    assert speaking.voices == ("female1", "female2", "male1", "male2")
    assert "CC BY-NC" in (speaking.notice or "")
    caps = engine.caps
    assert (caps.sample_rate_hertz, caps.samples_per_step, caps.slots, caps.max_rows) == (24_000, STEP, SLOTS, SLOTS)
    assert (caps.lookahead_steps, caps.max_steps) == (52, MAX_STEPS)
    assert 0 < caps.step_seconds(1) <= caps.step_seconds(SLOTS) * 1.5
    assert caps.prefill_seconds(10) > 0
    short, long = caps.predict(segment("hi")), caps.predict(segment("hi " * 30))
    assert short.steps_p50 < short.steps_p90 < long.steps_p50 <= MAX_STEPS
    slow = caps.predict(replace(segment("hello you"), controls=Controls(speed=0.5)))
    assert slow.steps_p50 > caps.predict(segment("hello you")).steps_p50
    other = ChatTTSEngine(settings_for(tiny_checkpoint, lookahead_steps=8, slots=1))
    assert other.caps.lookahead_steps == 8
    assert other.model_revision != engine.model_revision, "it sounds otherwise"


@pytest.mark.skipif(not has_int8(), reason="FBGEMM is for x86 with AVX2")
def test_int8_is_another_revision(tiny_checkpoint: Path, engine: ChatTTSEngine) -> None:
    rounded = ChatTTSEngine(settings_for(tiny_checkpoint, dtype="int8", slots=1))
    assert rounded.model_revision != engine.model_revision, "it speaks other tokens"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_steps": 4000}, "chattts.max_steps is 4000"),
        ({"lookahead_steps": 99}, "chattts.lookahead_steps: the look-ahead must be 1 to 52"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_checkpoint: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        ChatTTSEngine(settings_for(tiny_checkpoint, **fields))


def test_voices_without_the_default_one_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    voices = tmp_path / "voices.toml"
    voices.write_text('[anna]\ndescription = "Anna"\nseed = 1\n')
    with pytest.raises(StartupError, match="no voice female1"):
        ChatTTSEngine(settings_for(tiny_checkpoint, voices=voices))


def test_a_row_from_join_to_last_sample(engine: ChatTTSEngine) -> None:
    driver = Driver(engine)
    join = driver.join(segment(sampling=Sampling(temperature=0.9)))
    ref = join.ref
    calls = engine.step_calls
    (report,) = driver.run(Plan(joins=((join,),), steps=59))
    assert report.steps_done == 60, "the prefill does the first"
    assert engine.step_calls == calls + 59
    assert (engine.held_slots, engine.kept_rows) == (1, 1)
    (report,) = driver.run(Plan(vocode=(Vocode(ref, 8),)))
    assert report.pcm is not None
    assert (report.pcm.start_sample, report.pcm.to_step, len(report.pcm.data)) == (0, 8, 2 * 8 * STEP)
    driver.until_over(ref)
    assert (engine.held_slots, engine.kept_rows) == (0, 1), "hidden states outlive the slot"
    done = driver.steps[ref]
    assert not driver.run(Plan(steps=5)), "nobody runs"
    driver.run(Plan(vocode=(Vocode(ref, 20),)))
    assert len(driver.samples[ref]) == 2 * 20 * STEP, "no more than was asked for"
    driver.run(Plan(vocode=(Vocode(ref, done),)))
    assert len(driver.samples[ref]) == 2 * (STEP * done - STEP // 2)
    assert engine.kept_rows == 0
    assert not driver.run(Plan(leaves=(ref,), vocode=(Vocode(ref, done),))), "unknown rows are nobody's business"


def test_samples_do_not_depend_on_how_they_are_asked_for(punctual: ChatTTSEngine) -> None:
    engine = punctual
    driver, chance = Driver(engine), random.Random(3)
    (whole,) = driver.say(segment(seed=5))
    for _ in range(3):
        join = driver.join(segment(seed=5))
        driver.run(Plan(joins=((join,),)))
        while engine.kept_rows:
            final = driver.steps.get(join.ref, 0) - (0 if join.ref in driver.ended else 52)
            wish = Vocode(join.ref, chance.randint(0, final)) if final > 0 else None
            if join.ref in driver.ended and chance.random() < 0.1:
                wish = Vocode(join.ref, final)
            driver.run(Plan(steps=chance.randint(0, 9), vocode=(wish,) if wish else ()))
        assert_same_sound(pcm(driver.samples[join.ref]), whole)


def test_a_row_that_leaves_is_forgotten_wherever_it_is(engine: ChatTTSEngine) -> None:
    driver = Driver(engine)
    joins = [driver.join(segment(seed=n, refine_text=n == 2), n) for n in range(4)]
    driver.run(Plan(joins=(tuple(joins),), steps=3))
    driver.run(Plan(leaves=(joins[0].ref, joins[2].ref), steps=1))
    assert (engine.held_slots, engine.kept_rows) == (2, 2)
    driver.until_over(joins[1].ref, joins[3].ref)
    driver.run(Plan(leaves=(joins[1].ref, joins[3].ref, joins[0].ref)))
    assert (engine.held_slots, engine.kept_rows) == (0, 0)


def test_one_plan_late_the_next_is_launched_before_the_last_is_taken_in(
    engine: ChatTTSEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (undisturbed,) = Driver(engine).say(segment(seed=5))
    monkeypatch.setattr(engine, "_behind", 1)
    driver = Driver(engine)
    join, other = driver.join(segment(seed=5)), driver.join(segment(seed=6), 1)
    assert driver.run(Plan(joins=((join, other),), steps=60)) == ()
    assert driver.run(Plan(steps=1))[0].steps_done == 61, "the first plan's"
    assert driver.run(Plan(steps=1, vocode=(Vocode(join.ref, 9),)))[0].pcm is None
    (report,) = driver.run(Plan(steps=1, leaves=(other.ref,)))
    assert report.pcm is not None
    assert report.pcm.to_step == 9
    assert other.ref not in {report.ref for report in driver.run(Plan(steps=1))}, "what left is not spoken of"
    driver.until_over(join.ref, steps=4)
    driver.run(Plan(vocode=(Vocode(join.ref, driver.steps[join.ref]),)))
    driver.run(Plan())
    assert driver.run(Plan()) == ()
    assert_same_sound(pcm(driver.samples[join.ref]), undisturbed)


def test_a_contradiction_is_refused_and_all_is_forgotten(engine: ChatTTSEngine) -> None:
    driver = Driver(engine)
    join = driver.join(segment())
    for wrong in (Plan(joins=((join,),)), Plan(vocode=(Vocode(join.ref, 1),)), Plan(leaves=(RowRef(0, 1, 0),))):
        engine.run(Plan(joins=((Join(RowRef(0, 0, 0), segment()),),), steps=1))
        with pytest.raises(ValueError, match="0"):
            engine.run(wrong)
        assert (engine.held_slots, engine.kept_rows) == (0, 0)


def test_a_cap_of_steps_is_told(engine: ChatTTSEngine) -> None:
    driver = Driver(engine)
    joins = [driver.join(segment(seed=seed, sampling=Sampling(temperature=1.0)), seed) for seed in range(SLOTS)]
    driver.run(Plan(joins=(tuple(joins),), steps=31))
    driver.until_over(*(join.ref for join in joins), steps=31)
    steps = {driver.ended[join.ref]: driver.steps[join.ref] for join in joins}
    assert steps[EndReason.LENGTH] == MAX_STEPS
    assert steps[EndReason.COMPLETE] < MAX_STEPS
    driver.run(Plan(leaves=tuple(join.ref for join in joins)))


def test_a_text_that_refining_cuts_is_told(engine: ChatTTSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = segment("me", seed=11, refine_text=True, sampling=Sampling(temperature=1.0, top_p=1.0, top_k=600))
    reasons = []
    for end in (engine._decoder._text.end, None):
        driver = Driver(engine)
        join = driver.join(asked)
        monkeypatch.setattr(engine_module, "REFINING", replace(engine_module.REFINING, max_steps=6))
        if end is None:
            tokens = _refined_tokens(engine, asked)
            monkeypatch.setattr(engine._decoder, "_text", replace(engine._decoder._text, end=tokens[-1]))
        driver.run(Plan(joins=((join,),), steps=31))
        driver.until_over(join.ref, steps=31)
        assert driver.steps[join.ref] < MAX_STEPS, "its sound ends by itself"
        reasons.append(driver.ended[join.ref])
        driver.run(Plan(leaves=(join.ref,)))
    assert reasons == [EndReason.LENGTH, EndReason.COMPLETE]


def _refined_tokens(engine: ChatTTSEngine, asked: Segment) -> list[int]:
    """What refining draws."""
    driver = Driver(engine)
    join = driver.join(asked)
    driver.run(Plan(joins=((join,),), steps=4))
    tokens: list[int] = engine._rows[join.ref.row].decoded.tokens[:, 0].tolist()
    driver.run(Plan(leaves=(join.ref,)))
    return tokens


# -- upstream's sound -------------------------------------------------------------------------------------------------


def test_the_sound_is_upstreams(engine: ChatTTSEngine, upstream: Any) -> None:
    chat = import_chattts().Chat
    speaker = upstream.speaker._encode(draw_speaker(2, upstream.speaker.std, upstream.speaker.mean))
    for text, speed in (("hello you", 1.0), ("[uv_break]where are you[laugh]", 2.0)):
        parameters = chat.InferCodeParams(
            prompt="[speed_9]" if speed == 2.0 else "[speed_5]",
            temperature=1e-5,
            max_new_token=MAX_STEPS,
            spk_emb=speaker,
            show_tqdm=False,
        )
        (wave,) = upstream.infer(
            [text], skip_refine_text=True, split_text=False, stream=False, params_infer_code=parameters
        )
        (ours,) = Driver(engine).say(segment(text, sampling=GREEDY, controls=Controls(speed=speed)))
        # Upstream drops samples that are nearly silent.
        audible = ours[ours != 0]
        kept = np.round(wave * 32767)
        kept = kept[kept != 0]
        assert len(audible) == len(kept)
        assert np.abs(audible - kept).max() <= 2


def test_a_refined_text_is_spoken_as_upstream_would(
    engine: ChatTTSEngine, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = replace(engine_module.REFINING, temperature=1e-5, max_steps=24)
    monkeypatch.setattr(engine_module, "REFINING", greedy)
    chat = import_chattts().Chat
    parameters = chat.RefineTextParams(prompt="[oral_2]", temperature=1e-5, max_new_token=24, show_tqdm=False)
    (text,) = upstream.infer(["hello you"], refine_text_only=True, split_text=False, params_refine_text=parameters)
    asked = segment(refine_text=True, sampling=GREEDY, controls=Controls(oral=2))
    driver = Driver(engine)
    join = driver.join(asked)
    driver.run(Plan(joins=((join,),)))
    while engine._rows[join.ref.row].decoded.kind is not Kind.SPEECH:
        assert engine.held_slots == 1
        assert driver.steps.get(join.ref, 0) == 0, "refining makes no sound"
        driver.run(Plan(steps=1))
    assert engine._rows[join.ref.row].decoded.prompt == engine._prompter.code(asked, text)
    driver.until_over(join.ref)
    driver.run(Plan(vocode=(Vocode(join.ref, driver.steps[join.ref]),)))
    assert len(driver.samples[join.ref]) == 2 * (STEP * driver.steps[join.ref] - STEP // 2)


# -- rows among themselves --------------------------------------------------------------------------------------------


def test_every_row_has_its_own_voice_and_manner_and_nothing_leaks(engine: ChatTTSEngine) -> None:
    """Upstream writes a call's voice into the defaults of all later calls, and batches one voice only."""
    asked = [
        segment(),
        segment(voice="male1"),
        segment(controls=Controls(speed=2.0)),
        segment(sampling=Sampling(temperature=0.9)),
        segment(seed=2),
        segment(index=1),
    ]
    together = Driver(engine).say(*asked)
    assert len({row.tobytes() for row in together}) == len(asked)
    for number in (1, 3):
        assert_same_sound(together[number], Driver(engine).say(asked[number])[0])


# -- failures ---------------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, thing: Any, method: str, error: Exception, at_call: int = 1) -> None:
    """Lets a call of a method fail, once."""
    real, calls = getattr(thing, method), itertools.count(1)

    def fail(*args: Any) -> Any:
        if next(calls) == at_call:
            raise error
        return real(*args)

    monkeypatch.setattr(thing, method, fail)


@pytest.fixture(scope="module")
def undisturbed(shared: ChatTTSEngine) -> NDArray[np.int16]:
    """The row with seed 7."""
    return Driver(shared).say(segment(seed=7))[0]


ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory")
ON_GPU = torch.OutOfMemoryError("injected")


@pytest.mark.parametrize(("where", "error"), [("prefill", ON_GPU), ("decode", ON_CPU), ("vocode", ON_GPU)])
def test_out_of_memory_leaves_the_others_as_they_were(
    punctual: ChatTTSEngine,
    undisturbed: NDArray[np.int16],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
) -> None:
    engine = punctual
    driver = Driver(engine)
    join, newcomer = driver.join(segment(seed=7)), driver.join(segment(seed=8), 1)
    driver.run(Plan(joins=((join,),), steps=59))
    driver.run(Plan())
    thing, method = {
        "prefill": (engine._decoder._gpt, "prefill"),
        "decode": (engine._decoder._gpt, "decode"),
        "vocode": (engine._vocoder, "run"),
    }[where]
    failing(monkeypatch, thing, method, error, at_call=3 if where == "decode" else 1)
    vocode = (Vocode(join.ref, 8),)
    with pytest.raises(EngineOutOfMemoryError):
        engine.run(Plan(joins=((newcomer,),), steps=5, vocode=vocode))
    assert (engine.held_slots, engine.kept_rows) == (1, 1), "who was to join is forgotten"
    driver.run(Plan(vocode=vocode))
    driver.run(Plan(joins=((newcomer,),), steps=5))
    driver.until_over(join.ref, newcomer.ref)
    driver.run(Plan(vocode=(Vocode(join.ref, driver.steps[join.ref]),), leaves=(newcomer.ref,)))
    driver.run(Plan())
    assert_same_sound(pcm(driver.samples[join.ref]), undisturbed)


def test_another_failure_forgets_all_and_the_engine_goes_on(
    engine: ChatTTSEngine, undisturbed: NDArray[np.int16], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(engine)
    driver.run(Plan(joins=((driver.join(segment()),),), steps=2))
    failing(monkeypatch, engine._decoder._gpt, "decode", RuntimeError("injected"))
    with pytest.raises(RuntimeError, match="injected"):
        engine.run(Plan(steps=1))
    assert (engine.held_slots, engine.kept_rows) == (0, 0)
    (again,) = Driver(engine).say(segment(seed=7))
    assert_same_sound(again, undisturbed)


def test_a_prompt_that_is_too_long_fails_alone(engine: ChatTTSEngine) -> None:
    driver = Driver(engine)
    long, other = driver.join(segment("a " * PROMPT_TOKENS)), driver.join(segment("me"), 1)
    driver.run(Plan(joins=((long, other),), steps=1))
    assert "tokens; at most 512" in driver.errors[long.ref]
    assert (engine.held_slots, engine.kept_rows) == (1, 1)
    driver.run(Plan(leaves=(other.ref,)))


def test_a_row_that_ends_at_once_each_time_fails_alone(engine: ChatTTSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(engine)
    probe = driver.join(segment("hello you", sampling=GREEDY))
    driver.run(Plan(joins=((probe,),)))
    first = int(engine._rows[probe.ref.row].decoded.tokens[0, 0])
    driver.run(Plan(leaves=(probe.ref,)))
    monkeypatch.setattr(engine._decoder, "_speech", replace(engine._decoder._speech, end=first))
    wild = Sampling(temperature=2.0, top_p=1.0, top_k=600)
    empty, other = driver.join(segment(sampling=GREEDY)), driver.join(segment(sampling=wild), 1)
    driver.run(Plan(joins=((empty, other),), steps=1))
    assert "before its first step, 3 times" in driver.errors[empty.ref]
    assert other.ref not in driver.errors
    driver.run(Plan(leaves=(other.ref,)))


# -- the real scheduler and the real service --------------------------------------------------------------------------


async def hear(runner: Runner, segments: Sequence[Segment], **options: Any) -> bytes:
    heard = b""
    async with asyncio.timeout(PATIENCE), runner.speak(segments, max_rows=2, **options) as speaking:
        while not isinstance(event := await speaking.get(), RequestEnded):
            assert not isinstance(event, RequestFailed), event
            if isinstance(event, Audio):
                assert event.start_sample == len(heard) // 2
                heard += event.data
        assert event.samples == len(heard) // 2
    return heard


async def test_many_requests_through_the_real_scheduler(
    punctual: ChatTTSEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are slots, of several rows, some refined; each sounds as if it were alone."""
    engine = punctual
    # What random weights call refined is read again as several times as many tokens.
    monkeypatch.setattr(engine_module, "REFINING", replace(engine_module.REFINING, max_steps=24))
    chance = random.Random(1)
    asked = [
        [
            segment(
                "one two three four"[: chance.randint(3, 18)], seed, index=index, voice=chance.choice(engine.voices)
            )
            for index in range(chance.randint(1, 3))
        ]
        for seed in range(10)
    ]
    asked[3] = [replace(asked[3][0], refine_text=True)]
    runner = Runner(engine, Policy(max_delay=math.inf), outbox_seconds=3.0)
    runner.start()
    try:
        heard = await asyncio.gather(*(hear(runner, segments, stream=bool(n % 2)) for n, segments in enumerate(asked)))
        stats = runner.stats()
        assert (stats.rows, stats.slots_free, stats.counters.completed) == (0, SLOTS, len(asked))
        assert stats.counters.steps < stats.counters.row_steps, "rows shared their steps"
        for together, segments in zip(heard[:4], asked, strict=False):
            assert_same_sound(pcm(together), pcm(await hear(runner, segments)))
    finally:
        await runner.stop()


async def test_the_real_service_streams_what_it_gives_whole(stack: Stack, tiny_checkpoint: Path) -> None:
    service = await stack.service(
        wait=False,
        engine="chattts",
        chattts_folder=tiny_checkpoint,
        chattts_check_sums=False,
        chattts_device="cpu",
        chattts_dtype="fp32",
        chattts_slots=4,
        chattts_max_steps=MAX_STEPS,
        chattts_deterministic=True,
    )
    await service.until_healthy(2 * START_SECONDS)  # PyTorch alone takes seconds
    text = "Hello there, how are you? I am well. 你好。"
    sampling = tts_pb2.Sampling(seed=3, temperature=0.8)
    whole = await service.stub().Synthesize(text_request(text, sampling=sampling), timeout=PATIENCE)
    data, starts, ends = b"", [], []
    async for message in service.stub().StreamSynthesize(stream_request(text, sampling=sampling), timeout=PATIENCE):
        match message.WhichOneof("message"):
            case "start":
                starts.append(message.start)
            case "chunk":
                assert message.chunk.start_sample == len(data) // 2
                data += message.chunk.data
            case "end":
                ends.append(message.end)
    assert len(data) > 2 * STEP
    assert_same_sound(pcm(data), pcm(whole.audio))
    assert (starts[0].engine, starts[0].seed) == ("chattts", 3)
    assert ends[0].sample_count == len(data) // 2
