"""The tone engine and its code."""

from __future__ import annotations

import fcntl
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batcher.engine import (
    Controls,
    EndReason,
    EngineOutOfMemoryError,
    Join,
    Plan,
    Prediction,
    RowRef,
    RowReport,
    Segment,
    Vocode,
)
from common.errors import StartupError
from common.settings import ToneSettings
from service.engines.base import SpeechEngine
from service.engines.tone import ToneEngine, h200
from service.engines.tone_code import (
    AMPLITUDE,
    BYTES_PER_STEP,
    SAMPLES_PER_STEP,
    CodeError,
    Identity,
    Span,
    decode,
    encode_row,
    encode_spans,
    encode_step,
    row_code,
    speech_crc,
    verify,
)
from service.engines.tone_cost import PROMPT_TOKENS, CostModel
from service.engines.tone_faults import parse_faults

ROOT = Path(__file__).parent.parent
UNHURRIED = settings(deadline=None)


# ---------------------------------------------------------------------------------------------------------- the code


@dataclass(frozen=True)
class Speech:
    """A whole request's audio and what it should be."""

    identities: list[Identity]
    steps: list[int]

    @property
    def pcm(self) -> bytes:
        return b"".join(encode_row(*row) for row in zip(self.identities, self.steps, strict=True))

    @property
    def blocks(self) -> list[bytes]:
        return [self.pcm[at : at + BYTES_PER_STEP] for at in range(0, len(self.pcm), BYTES_PER_STEP)]


def speech(seed: int = 7, texts: tuple[str, ...] = ("你好。", "Hello."), steps: tuple[int, ...] = (3, 2)) -> Speech:
    identities = [Identity.of(text, "female1", "zh-CN", seed, index) for index, text in enumerate(texts)]
    return Speech(identities, list(steps))


@st.composite
def speeches(draw: st.DrawFn, least_steps: int = 1) -> Speech:
    rows = draw(st.lists(st.tuples(st.text(max_size=9), st.integers(least_steps, 4)), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**32 - 1))
    return speech(seed, tuple(text for text, _ in rows), tuple(steps for _, steps in rows))


def fails(check: Callable[[], object]) -> CodeError:
    with pytest.raises(CodeError) as raised:
        check()
    return raised.value


@UNHURRIED
@given(speeches())
def test_what_is_encoded_is_read(speech: Speech) -> None:
    blocks = decode(speech.pcm)
    assert [block.start_sample for block in blocks] == [SAMPLES_PER_STEP * i for i in range(sum(speech.steps))]
    assert [(block.identity, block.step, block.steps) for block in blocks] == [
        (identity, step, steps)
        for identity, steps in zip(speech.identities, speech.steps, strict=True)
        for step in range(steps)
    ]
    assert verify(speech.pcm, speech.identities) == speech.steps


@UNHURRIED
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 2))
def test_a_block_is_laid_out_as_documented(seed: int, segment: int, step: int) -> None:
    identity = Identity.of("早", "male1", "yue", seed, segment)
    block = np.frombuffer(encode_step(identity, step + 1, step), "<i2")
    data = np.packbits((block[:224] & 1).astype(np.uint8)).tobytes()
    numbers = [int.from_bytes(data[at : at + 4], "big") for at in range(4, 28, 4)]
    assert numbers == [seed, speech_crc("早", "male1", "yue"), segment, step + 1, step, zlib.crc32(data[:24])]
    assert not (block[224:] & 1).any()
    assert int(np.abs(block).max()) <= AMPLITUDE + 1


@UNHURRIED
@given(speeches(), st.data())
def test_splitting_a_row_anyhow_gives_the_same_bytes(speech: Speech, data: st.DataObject) -> None:
    spans = []
    for identity, steps in zip(speech.identities, speech.steps, strict=True):
        code = row_code(identity, steps)
        cuts = data.draw(st.lists(st.integers(0, steps)))
        edges = sorted({0, steps, *cuts})
        spans += [Span(code, start, end) for start, end in pairwise(edges)]
    assert b"".join(encode_spans(spans)) == speech.pcm
    assert encode_spans([]) == []


def drop_block(speech: Speech, at: int, _: int) -> bytes:
    blocks = speech.blocks
    del blocks[at % len(blocks)]
    return b"".join(blocks)


def double_block(speech: Speech, at: int, _: int) -> bytes:
    blocks = speech.blocks
    blocks.insert(at % len(blocks), blocks[at % len(blocks)])
    return b"".join(blocks)


def swap_blocks(speech: Speech, at: int, other: int) -> bytes:
    blocks = speech.blocks
    i, j = at % len(blocks), other % len(blocks)
    blocks[i], blocks[j] = blocks[j], blocks[i]
    return b"".join(blocks)


def flip_bit(speech: Speech, at: int, bit: int) -> bytes:
    pcm = bytearray(speech.pcm)
    pcm[at % len(pcm)] ^= 1 << bit % 8
    return bytes(pcm)


def drop_bytes(speech: Speech, at: int, count: int) -> bytes:
    pcm = speech.pcm
    start = at % len(pcm)
    return pcm[:start] + pcm[start + 1 + count % (BYTES_PER_STEP - 1) :]


def insert_silence(speech: Speech, at: int, count: int) -> bytes:
    pcm = speech.pcm
    start = at % len(pcm)
    return pcm[:start] + bytes(1 + count % 5000) + pcm[start:]


def cut_tail(speech: Speech, at: int, _: int) -> bytes:
    return speech.pcm[: -1 - at % BYTES_PER_STEP]


@pytest.mark.parametrize(
    "mutate", [drop_block, double_block, swap_blocks, flip_bit, drop_bytes, insert_silence, cut_tail]
)
@UNHURRIED
@given(speech=speeches(least_steps=2), at=st.integers(0, 2**20), other=st.integers(0, 2**20))
def test_every_mutation_is_found(
    mutate: Callable[[Speech, int, int], bytes], speech: Speech, at: int, other: int
) -> None:
    mutated = mutate(speech, at, other)
    assume(mutated != speech.pcm)
    for error in (fails(lambda: decode(mutated)), fails(lambda: verify(mutated, speech.identities))):
        assert 0 <= error.sample <= len(mutated) // 2


@UNHURRIED
@given(speeches(), speeches(), st.data())
def test_two_requests_spliced_are_found(one: Speech, two: Speech, data: st.DataObject) -> None:
    assume(one.identities[0].seed != two.identities[0].seed)
    head = data.draw(st.integers(1, len(one.blocks)))
    tail = data.draw(st.integers(0, len(two.blocks) - 1))
    spliced = b"".join(one.blocks[:head] + two.blocks[tail:])
    assert fails(lambda: decode(spliced)).sample == head * SAMPLES_PER_STEP
    fails(lambda: verify(spliced, one.identities))
    fails(lambda: verify(spliced, two.identities))


@UNHURRIED
@given(speeches(), st.data())
def test_audio_that_stops_anywhere_is_a_beginning(speech: Speech, data: st.DataObject) -> None:
    begun = speech.pcm[: data.draw(st.integers(0, len(speech.pcm)))]
    assert len(decode(begun, whole=False)) == len(begun) // BYTES_PER_STEP
    heard = verify(begun, speech.identities, whole=False)
    assert heard == speech.steps[: len(heard)]
    if begun != speech.pcm:
        fails(lambda: verify(begun, speech.identities))


def test_an_error_tells_where_it_shows() -> None:
    whole = speech()
    flipped = bytearray(whole.pcm)
    flipped[2 * 700] ^= 1
    assert str(fails(lambda: decode(bytes(flipped)))) == "sample 512: the block that begins here is corrupted"
    shifted = whole.pcm[:1024] + bytes(20) + whole.pcm[1024:]
    assert str(fails(lambda: decode(shifted))) == "sample 512: no block begins here; the next one begins at sample 522"
    assert "nor after it" in str(fails(lambda: decode(bytes(2048))))
    assert fails(lambda: decode(whole.pcm[1024:])).sample == 0
    assert fails(lambda: decode(whole.pcm[:-1])).sample == 4 * 512
    assert fails(lambda: decode(whole.pcm[:-1024])).sample == 4 * 512


def test_whole_segments_that_are_missing_too_many_or_wrong_are_found() -> None:
    whole = speech()
    first, second = whole.identities
    assert verify(b"", []) == []
    assert fails(lambda: verify(whole.pcm[: 3 * 1024], [first, second])).sample == 3 * 512
    assert fails(lambda: verify(whole.pcm, [first])).sample == 3 * 512
    assert fails(lambda: verify(whole.pcm, [second, first])).sample == 0
    assert fails(lambda: decode(whole.pcm[3 * 1024 :] + whole.pcm[: 3 * 1024])).sample == 2 * 512
    other_voice = Identity.of("你好。", "male1", "zh-CN", 7, 0)
    assert fails(lambda: verify(whole.pcm, [other_voice, second])).sample == 0


# -------------------------------------------------------------------------------------------------------- the engine


@dataclass
class FakeTime:
    """A clock that only sleeping moves, and by `overrun` too far."""

    overrun: float = 0.0
    now: float = 100.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self.overrun

    def clock(self) -> float:
        return self.now


def engine(**settings: object) -> ToneEngine:
    return ToneEngine(ToneSettings.model_validate({"slots": 8, "steps_per_character": 1.0} | settings))


def ref(slot: int, row: int | None = None, generation: int = 0) -> RowRef:
    return RowRef(slot if row is None else row, slot, generation)


def join(ref: RowRef, text: str, **segment: object) -> Join:
    return Join(ref, Segment(text, "female1", "en-US", **segment))  # type: ignore[arg-type]


def joins(*texts: str) -> Plan:
    """One group, in slots 0, 1, …, as rows of the same numbers."""
    return Plan(joins=(tuple(join(ref(slot), text) for slot, text in enumerate(texts)),))


def by_row(reports: tuple[RowReport, ...]) -> dict[int, RowReport]:
    assert len({report.ref for report in reports}) == len(reports)
    return {report.ref.row: report for report in reports}


def test_it_presents_itself() -> None:
    tone: SpeechEngine = engine(slots=5, lookahead_steps=2)
    assert tone.notice is not None
    assert "does not speak" in tone.notice
    assert list(tone.languages) == sorted(tone.languages)
    assert set(tone.voices) == {"female1", "female2", "male1", "male2"}
    caps = tone.caps
    assert (caps.slots, caps.max_rows, caps.steps_per_second, caps.lookahead_steps) == (5, 5, 46.875, 2)


def test_rows_of_one_tick_share_its_passes_and_end_where_they_end() -> None:
    tone = engine()
    tone.run(joins("x", "xxx", "xxxxx"))
    reports = by_row(tone.run(Plan(steps=4)).rows)
    assert {row: (report.steps_done, report.ended) for row, report in reports.items()} == {
        0: (1, EndReason.COMPLETE),
        1: (3, EndReason.COMPLETE),
        2: (4, None),
    }
    assert (tone.prefill_calls, tone.step_calls) == (1, 4)
    assert tone.rows_per_step == {3: 1, 2: 2, 1: 1}
    assert (tone.held_slots, tone.kept_rows) == (1, 3)


def test_many_rows_take_one_pass_and_none_takes_none() -> None:
    tone = engine(slots=64)
    tone.run(Plan(steps=3))
    assert tone.step_calls == 0
    tone.run(joins(*["xx"] * 64))
    tone.run(Plan(steps=1))
    assert tone.rows_per_step == {64: 1}


def test_each_group_is_one_prefill() -> None:
    tone = engine()
    tone.run(Plan(joins=((join(ref(0), "a"), join(ref(1), "b")), (join(ref(2), "c"),), ())))
    assert tone.prefill_calls == 2


def test_length_follows_text_speed_and_cap() -> None:
    tone = engine(steps_per_character=2.0, max_steps=10)
    fast = Segment("xxxx", "female1", "en-US", controls=Controls(speed=2.0))
    tone.run(Plan(joins=((Join(ref(0), fast), join(ref(1), "xxxx"), join(ref(2), "x" * 6), join(ref(3), "")),)))
    reports = by_row(tone.run(Plan(steps=20)).rows)
    assert [(reports[row].steps_done, reports[row].ended) for row in range(4)] == [
        (4, EndReason.COMPLETE),
        (8, EndReason.COMPLETE),
        (10, EndReason.LENGTH),
        (1, EndReason.COMPLETE),
    ]
    assert tone.caps.predict(fast) == Prediction(PROMPT_TOKENS + 4, 4, 5)
    assert tone.caps.predict(Segment("x" * 99, "female1", "en-US")).steps_p90 == 10


def test_lengths_scatter_about_what_texts_let_expect_and_are_always_the_same() -> None:
    texts = [f"text {number:05}" for number in range(4000)]
    costs = CostModel(ToneSettings(steps_per_character=10.0, length_sigma=0.2))
    factors = [math.log(costs.steps(text) / costs.likely_steps(text)) for text in texts]
    assert abs(statistics.mean(factors)) < 0.01
    assert abs(statistics.stdev(factors) - 0.2) < 0.01
    assert [costs.steps(text) for text in texts] == [costs.steps(text) for text in texts]
    assert abs(costs.steps(texts[0], speed=2.0) - costs.steps(texts[0]) / 2) <= 1


def test_a_row_gets_as_long_as_the_scatter_says_and_is_foretold_without_it() -> None:
    text = "scattered"
    settings = ToneSettings(steps_per_character=10.0, length_sigma=0.5)
    tone = ToneEngine(settings)
    steps = CostModel(settings).steps(text)
    assert tone.caps.predict(Segment(text, "female1", "en-US")).steps_p50 == 90 != steps
    (report,) = tone.run(Plan(joins=((join(ref(0), text),),), steps=2000)).rows
    assert (report.steps_done, report.ended) == (steps, EndReason.COMPLETE)


def test_a_trace_gives_lengths_in_the_order_of_joining(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("3\n1\n\n2\n")
    tone = engine(trace=trace)
    tone.run(joins("a", "b", "c", "d"))
    reports = by_row(tone.run(Plan(steps=9)).rows)
    assert [reports[row].steps_done for row in range(4)] == [3, 1, 2, 3]


@pytest.mark.parametrize("text", ["", "1\nx\n", "-1", None])
def test_a_trace_that_cannot_be_read_stops_the_start(tmp_path: Path, text: str | None) -> None:
    trace = tmp_path / "trace"
    if text is not None:
        trace.write_text(text)
    with pytest.raises(StartupError, match=r"tone\.trace"):
        engine(trace=trace)


def speak(tone: ToneEngine, plans: Iterator[tuple[int, int]], segment: Segment) -> bytes:
    """Runs one row by ticks of (steps, steps to vocode) until all is vocoded."""
    row = ref(0)
    tone.run(Plan(joins=((Join(row, segment),),)))
    done, to_step, pcm, ended = 0, 0, b"", False
    while tone.kept_rows:
        steps, vocode = next(plans)
        ready = done if ended else max(0, done - tone.caps.lookahead_steps)
        to_step = min(to_step + vocode, ready)
        for report in tone.run(Plan(steps=steps, vocode=(Vocode(row, to_step),))).rows:
            done, ended = report.steps_done, ended or report.ended is not None
            if report.pcm is not None:
                assert (report.pcm.start_sample, report.pcm.to_step) == (len(pcm) // 2, to_step)
                pcm += report.pcm.data
    return pcm


@UNHURRIED
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20), st.integers(0, 3))
def test_vocoding_anyhow_gives_the_same_bytes(ticks: list[tuple[int, int]], lookahead: int) -> None:
    segment = Segment("twelve chars", "male2", "en-US", index=3, seed=99)
    identity = Identity.of("twelve chars", "male2", "en-US", 99, 3)
    pcm = speak(engine(lookahead_steps=lookahead), iter([*ticks, *[(12, 12)] * 3]), segment)
    assert pcm == encode_row(identity, 12)


def test_neighbours_slots_and_turns_do_not_change_a_row() -> None:
    alone, crowd = engine(), engine()
    alone.run(joins("hello"))
    crowd.run(Plan(joins=((join(ref(3), "neighbour", seed=1),),), steps=2))
    crowd.run(Plan(joins=((join(ref(5, row=8), "hello"),),)))
    one = alone.run(Plan(steps=5, vocode=(Vocode(ref(0), 5),)))
    other = crowd.run(Plan(steps=5, vocode=(Vocode(ref(3), 6), Vocode(ref(5, row=8), 5))))
    assert by_row(one.rows)[0].pcm == by_row(other.rows)[8].pcm


def test_a_slot_is_free_when_its_row_ends_and_hidden_states_stay() -> None:
    tone = engine()
    tone.run(joins("xx"))
    tone.run(Plan(steps=2))
    assert (tone.held_slots, tone.kept_rows) == (0, 1)
    successor = ref(0, row=1, generation=1)
    plan = Plan(joins=((join(successor, "yyy"),),), steps=1, vocode=(Vocode(ref(0), 9), Vocode(successor, 1)))
    reports = by_row(tone.run(plan).rows)
    past, present = reports[0].pcm, reports[1].pcm
    assert past is not None
    assert present is not None
    assert verify(past.data, [Identity.of("xx", "female1", "en-US", 0, 0)]) == [2]
    assert decode(present.data, whole=False)[0].identity.speech == speech_crc("yyy", "female1", "en-US")
    assert (reports[0].ended, reports[0].steps_done, tone.kept_rows) == (None, 2, 1)


def test_leaving_forgets_slot_and_hidden_states() -> None:
    tone = engine()
    tone.run(joins("xxxx", "yyyy"))
    tone.run(Plan(steps=1))
    report = tone.run(Plan(leaves=(ref(0),), joins=((join(ref(0, row=2, generation=1), "z"),),), steps=1))
    assert set(by_row(report.rows)) == {1, 2}
    assert tone.run(Plan(leaves=(ref(0),), vocode=(Vocode(ref(0), 1),))).rows == ()
    assert tone.held_slots == 1


@pytest.mark.parametrize(
    "plan",
    [
        Plan(joins=((join(ref(0, row=9, generation=1), "x"),),)),
        Plan(leaves=(ref(0),), joins=((join(ref(0, row=9), "x"),),)),
        Plan(joins=((join(ref(1, row=0), "x"),),)),
        Plan(joins=((join(ref(8), "x"),),)),
        Plan(vocode=(Vocode(ref(0), 1),)),
        Plan(steps=2, vocode=(Vocode(ref(0), 1), Vocode(ref(0), 2))),
        Plan(leaves=(ref(2, row=0),)),
        Plan(vocode=(Vocode(ref(0), 0),) * 9),
    ],
    ids=["held", "same generation", "same row", "no slot", "too early", "twice", "other slot", "too many"],
)
def test_a_plan_against_the_protocol_fails_and_the_engine_goes_on(plan: Plan) -> None:
    tone = engine()
    tone.run(joins("xxxx"))
    with pytest.raises(ValueError, match=r".+"):
        tone.run(plan)
    assert (tone.held_slots, tone.kept_rows) == (0, 0)
    assert tone.run(joins("x")).rows[0].steps_done == 0


# --------------------------------------------------------------------------------------------------------- its costs

COSTS = {
    "step_base_ms": 2.0,
    "step_row_ms": 0.5,
    "step_kv_ms": 100.0,
    "prefill_base_ms": 3.0,
    "prefill_token_ms": 0.25,
    "vocode_base_ms": 1.0,
    "vocode_step_ms": 0.125,
}


@pytest.fixture
def private_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Locks of this test only."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def timed(time: FakeTime, **settings: object) -> ToneEngine:
    values = {"slots": 8, "steps_per_character": 1.0} | COSTS | settings
    return ToneEngine(ToneSettings.model_validate(values), time.sleep, time.clock)


def test_a_tick_sleeps_once_for_all_that_it_does(private_card: Path) -> None:
    time = FakeTime()
    tone = timed(time)
    tone.run(Plan(joins=((join(ref(0), "x"), join(ref(1), "xxx")), (join(ref(2), "xx"),))))
    prefill = (3 + 0.25 * 2 * (PROMPT_TOKENS + 3)) + (3 + 0.25 * (PROMPT_TOKENS + 2))
    assert time.slept == pytest.approx([prefill / 1000])
    tone.run(Plan(steps=3, vocode=(Vocode(ref(0), 1), Vocode(ref(1), 2))))
    kv = (PROMPT_TOKENS + 1) + 3 * (PROMPT_TOKENS + 3) + (0 + 1 + 2) + 2 * (PROMPT_TOKENS + 2) + (0 + 1)
    steps = 3 * 2.0 + 0.5 * (3 + 2 + 1) + 100 * kv / 1000
    assert time.slept[1:] == pytest.approx([(steps + 1 + 0.125 * 3) / 1000])
    assert tone.modelled_seconds == pytest.approx(sum(time.slept))


def test_the_model_is_told(private_card: Path) -> None:
    assert timed(FakeTime()).caps.step_seconds(4) == pytest.approx((2 + 0.5 * 4 + 100 * 4 * 250 / 1000) / 1000)


@pytest.mark.parametrize(("rows", "milliseconds"), [(1, 0.092), (64, 0.317), (256, 1.00)])
def test_the_h200_costs_what_the_limit_says(rows: int, milliseconds: float) -> None:
    assert ToneEngine(h200()).caps.step_seconds(rows) * 1000 == pytest.approx(milliseconds, rel=0.01)
    slowed = ToneEngine(h200(slowdown=4.0)).caps
    assert slowed.step_seconds(rows) * 250 == pytest.approx(milliseconds, rel=0.01)
    assert slowed.slots == 256


def test_what_is_overslept_is_made_up_for(private_card: Path) -> None:
    time = FakeTime(overrun=0.003)
    tone = timed(time, step_kv_ms=0)
    tone.run(joins("x" * 100))
    start = time.now
    for _ in range(50):
        tone.run(Plan(steps=1))
    assert time.now - start == pytest.approx(50 * 0.0025, abs=0.006)


def test_a_long_suspension_is_not_made_up_for(private_card: Path) -> None:
    time = FakeTime(overrun=60.0)
    tone = timed(time, step_base_ms=150.0, step_kv_ms=0)
    tone.run(joins("x" * 9))
    tone.run(Plan(steps=1))
    assert time.slept[1] == pytest.approx(0.1505 - 0.1)


def test_what_costs_nothing_takes_neither_lock_nor_sleep(private_card: Path) -> None:
    time = FakeTime()
    free = timed(time, **dict.fromkeys(COSTS, 0.0))
    free.run(joins("xx"))
    free.run(Plan(steps=2, vocode=(Vocode(ref(0), 2),)))
    costly = timed(time)
    costly.run(Plan(leaves=(ref(0),), steps=4))
    assert time.slept == []
    assert list(private_card.iterdir()) == []


PROCESS = """
import sys
from batcher.engine import Join, Plan, RowRef, Segment
from common.settings import ToneSettings
from service.engines.tone import ToneEngine

def sleep(seconds):
    print("holds", flush=True)
    sys.stdin.readline()
    with open(sys.argv[1], "a") as log:
        log.write("first\\n")

engine = ToneEngine(ToneSettings(prefill_base_ms=1, card="a/b"), sleep, lambda: 0.0)
engine.run(Plan(joins=((Join(RowRef(0, 0, 0), Segment("x", "female1", "en-US")),),)))
"""


def test_two_processes_share_one_card(private_card: Path) -> None:
    log = private_card / "log"

    def sleep(_: float) -> None:
        with log.open("a") as lines:
            lines.write("second\n")

    second = ToneEngine(ToneSettings(prefill_base_ms=1, card="a/b"), sleep, lambda: 0.0)
    first = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(log)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(private_card)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == "holds\n"
        with second.card.lock_file.open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        waiting = threading.Thread(target=second.run, args=(joins("y"),))
        waiting.start()
        first.stdin.write("go on\n")
        first.stdin.close()
        waiting.join()
    assert first.returncode == 0
    assert log.read_text() == "first\nsecond\n"
    second.close()
    with second.card.lock_file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_another_card_is_another_lock(private_card: Path) -> None:
    one, two = timed(FakeTime(), card="0"), timed(FakeTime(), card="1")
    assert one.card.lock_file != two.card.lock_file
    with one.card.held():
        assert two.run(joins("x")).rows
    one.close()
    two.close()


# -------------------------------------------------------------------------------------------------------- its faults


@pytest.mark.parametrize("faults", ["row", "row:", "row@x:a", "step@0", "step:a", "oom", "oom>", "slow@2", "bang"])
def test_a_wrong_fault_stops_the_start_and_names_the_forms(faults: str) -> None:
    with pytest.raises(StartupError, match=r"row@STEP:TEXT.*slow@N:MS.*oom>ROWS"):
        engine(faults=f"row:a; {faults}")


def test_faults_are_separated_by_semicolons() -> None:
    assert [fault.kind for fault in parse_faults(" row@2:a, b:c ;; oom>3;slow@4:1.5 ; ")] == ["row", "oom>", "slow"]
    assert parse_faults("row@2:a, b:c")[0].text == "a, b:c"


@pytest.mark.parametrize(("faults", "done"), [("row:bad", 0), ("row@1:bad", 0), ("row@3:bad", 2)])
def test_a_row_fails_alone(faults: str, done: int) -> None:
    tone = engine(faults=faults)
    tone.run(joins("good", "a bad one"))
    reports = by_row(tone.run(Plan(steps=4, vocode=(Vocode(ref(0), 4), Vocode(ref(1), 1)))).rows)
    assert reports[0].ended is EndReason.COMPLETE
    assert reports[0].error is None
    assert (reports[1].steps_done, reports[1].ended, reports[1].pcm) == (done, None, None)
    assert reports[1].error is not None
    assert tone.rows_per_step == {2: done + 1, 1: 3 - done}
    assert (tone.held_slots, tone.kept_rows) == (0, 0)


def test_a_row_fails_in_its_prefill() -> None:
    tone = engine(faults="row@0:bad")
    assert by_row(tone.run(joins("good", "bad")).rows)[1].error is not None
    assert (tone.held_slots, tone.kept_rows) == (1, 1)


def test_a_row_that_ends_before_its_fault_is_whole() -> None:
    tone = engine(faults="row@9:bad")
    tone.run(joins("bad"))
    assert tone.run(Plan(steps=9)).rows[0].ended is EndReason.COMPLETE


def test_an_empty_row_ends_in_its_prefill() -> None:
    tone = engine(faults="empty:hush")
    report = tone.run(joins("hush now")).rows[0]
    assert (report.steps_done, report.ended, report.pcm) == (0, EndReason.COMPLETE, None)
    assert (tone.held_slots, tone.kept_rows) == (0, 0)
    assert tone.run(Plan(steps=3, vocode=(Vocode(ref(0), 0),))).rows == ()


def test_a_long_row_meets_the_cap() -> None:
    tone = engine(faults="long:ever", max_steps=6)
    tone.run(joins("ever"))
    report = tone.run(Plan(steps=9)).rows[0]
    assert (report.steps_done, report.ended) == (6, EndReason.LENGTH)


def test_a_failed_step_forgets_all_rows() -> None:
    tone = engine(faults="step@3")
    tone.run(joins("xxxx", "yyyy"))
    tone.run(Plan(steps=2))
    with pytest.raises(RuntimeError, match="injected"):
        tone.run(Plan(steps=1))
    assert (tone.held_slots, tone.kept_rows) == (0, 0)
    tone.run(joins("xxxx"))
    assert tone.run(Plan(steps=4)).rows[0].ended is EndReason.COMPLETE


def test_a_failed_step_lets_go_of_the_card(private_card: Path) -> None:
    tone = timed(FakeTime(), faults="step@1")
    tone.run(joins("x"))
    with pytest.raises(RuntimeError):
        tone.run(Plan(steps=1))
    with tone.card.lock_file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    tone.close()


def test_out_of_memory_at_a_step_does_nothing_and_happens_once(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("5\n2\n")
    tone = engine(faults="oom@2", trace=trace)
    tone.run(joins("x"))
    plan = Plan(leaves=(ref(7),), joins=((join(ref(1), "y"),),), steps=2)
    with pytest.raises(EngineOutOfMemoryError):
        tone.run(plan)
    assert (tone.held_slots, tone.step_calls, tone.prefill_calls) == (1, 0, 1)
    reports = by_row(tone.run(plan).rows)
    assert (reports[0].steps_done, reports[1].steps_done, reports[1].ended) == (2, 2, EndReason.COMPLETE)


def test_out_of_memory_for_too_many_rows_lasts() -> None:
    tone = engine(faults="oom>2")
    tone.run(joins("xxxx", "yyyy"))
    third = join(ref(2), "z")
    for _ in range(2):
        with pytest.raises(EngineOutOfMemoryError):
            tone.run(Plan(joins=((third,),), steps=1))
    tone.run(Plan(leaves=(ref(0),), joins=((third,),), steps=1))
    assert tone.rows_per_step == {2: 1}
    ended, successors = third.ref, (join(ref(2, row=3, generation=1), "a"), join(ref(3, row=4), "b"))
    with pytest.raises(EngineOutOfMemoryError):
        tone.run(Plan(leaves=(ended,), joins=(successors,), steps=1))


def test_a_slow_step_costs_more(private_card: Path) -> None:
    time = FakeTime()
    tone = ToneEngine(ToneSettings(faults="slow@2:250"), time.sleep, time.clock)
    tone.run(joins("x"))
    for _ in range(3):
        tone.run(Plan(steps=1))
    assert time.slept == [0.25]
    tone.close()


def test_faults_can_be_set_while_it_runs() -> None:
    tone = engine()
    tone.run(joins("xxxxxx"))
    tone.run(Plan(steps=3))
    tone.faults = "step@2"
    assert tone.faults == "step@2"
    tone.run(Plan(steps=1))
    with pytest.raises(RuntimeError):
        tone.run(Plan(steps=1))
    with pytest.raises(StartupError):
        tone.faults = "nonsense"
    assert tone.faults == "step@2"
