from __future__ import annotations

import itertools
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from batcher.engine import Controls, EndReason, Join, Plan, RowRef, RowReport, Segment, Vocode
from common.errors import StartupError
from common.settings import EspeakSettings
from service import voices
from service.engines import espeak
from service.engines.base import SpeechEngine
from service.engines.espeak import EspeakEngine

RATE = espeak.SAMPLE_RATE_HERTZ
TICKS = 2000
HELLO = "Good morning. The train to London leaves at nine, from the second platform."
NIHAO = "早上好，开往北京的列车九点从二号站台出发。"
LONG = "今天天气不错，我们一起去公园散步吧。" * 40
SENTENCES = {
    "de": "Guten Morgen, der Zug nach Berlin fährt um neun Uhr ab.",
    "en-GB": HELLO,
    "en-US": HELLO,
    "es": "Buenos días, el tren a Madrid sale a las nueve.",
    "fr": "Bonjour, le train pour Paris part à neuf heures.",
    "it": "Buongiorno, il treno per Roma parte alle nove.",
    "pt-BR": "Bom dia, o trem para São Paulo sai às nove horas.",
    "ru": "Доброе утро, поезд в Москву отправляется в девять часов.",
    "yue": "早晨，去北京嘅列車九點鐘喺二號月台開出。",
    "zh-CN": NIHAO,
}


class Speaker:
    """Drives an engine as a scheduler would."""

    def __init__(self, engine: EspeakEngine) -> None:
        self.engine = engine
        self._ids = itertools.count(1)

    def segment(self, text: str, language: str = "zh-CN", voice: str = "female1", speed: float = 1.0) -> Segment:
        return Segment(text, voice, language, controls=Controls(speed=speed))

    def join(self, segment: Segment, slot: int = 0) -> Join:
        row = next(self._ids)
        return Join(RowRef(row, slot, row), segment)

    def until(self, plan: Plan, *refs: RowRef) -> dict[RowRef, RowReport]:
        """Runs until each of the rows has ended or failed; no other row may be heard of."""
        reports: dict[RowRef, RowReport] = {}
        for _ in range(TICKS):
            for report in self.engine.run(plan).rows:
                assert report.ref in refs
                assert report.ref not in reports
                assert report.error or report.ended
                reports[report.ref] = report
            if len(reports) == len(refs):
                return {ref: reports[ref] for ref in refs}
            plan = Plan(steps=1)
        raise AssertionError("the rows do not end")

    def begin(self, *segments: Segment) -> list[RowReport]:
        """Speaks segments side by side, the first one in slot 0."""
        joins = tuple(self.join(segment, slot) for slot, segment in enumerate(segments))
        return list(self.until(Plan(joins=(joins,), steps=1), *(join.ref for join in joins)).values())

    def vocode(self, ref: RowRef, to_step: int) -> bytes:
        (report,) = self.engine.run(Plan(vocode=(Vocode(ref, to_step),))).rows
        assert report.pcm is not None
        return report.pcm.data

    def say_all(self, *segments: Segment) -> list[bytes]:
        reports = self.begin(*segments)
        assert [report.error for report in reports] == [None] * len(reports)
        return [self.vocode(r.ref, r.steps_done) if r.steps_done else b"" for r in reports]

    def say(self, text: str, language: str = "zh-CN", voice: str = "female1", speed: float = 1.0) -> bytes:
        return self.say_all(self.segment(text, language, voice, speed))[0]


@pytest.fixture(scope="module")
def shared() -> Iterator[EspeakEngine]:
    engine = EspeakEngine(EspeakSettings(processes=2))
    yield engine
    engine.close()


@pytest.fixture
def speaker(shared: EspeakEngine) -> Speaker:
    return Speaker(shared)


@pytest.fixture
def own() -> Iterator[Speaker]:
    """For tests that harm the engine."""
    engine = EspeakEngine(EspeakSettings(processes=2))
    yield Speaker(engine)
    engine.close()


def pid(speaker: Speaker, slot: int) -> int:
    return speaker.engine._workers[slot].pid


def seconds(data: bytes) -> float:
    return len(data) / 2 / RATE


def samples(data: bytes) -> npt.NDArray[np.float64]:
    return np.frombuffer(data, "<i2").astype(np.float64)


def pitch(data: bytes) -> float:
    """The median frequency of the voiced parts, in hertz, by autocorrelation."""
    size, lags = 2048, slice(RATE // 400, RATE // 60)
    frames = samples(data)[: len(data) // 2 // size * size].reshape(-1, size)
    voiced = frames[frames.std(axis=1) > 1000]
    spectrum = np.abs(np.fft.rfft(voiced, 2 * size)) ** 2
    return float(np.median(RATE / (lags.start + np.fft.irfft(spectrum)[:, lags].argmax(axis=1))))


# -- what it is -------------------------------------------------------------------------------------------------------


def test_it_presents_itself(shared: EspeakEngine) -> None:
    engine: SpeechEngine = shared
    assert engine.name == "espeak"
    assert re.fullmatch(r"espeak-ng-\d+\.\d+\.\d+-\d+", engine.model_revision)
    assert list(engine.languages) == sorted(engine.languages)
    assert engine.voices == tuple(voices.VOICES)
    assert engine.notice is not None
    assert "espeak-ng" in engine.notice


def test_a_slot_is_a_process(shared: EspeakEngine) -> None:
    assert (shared.caps.slots, shared.caps.max_rows, shared.caps.lookahead_steps) == (2, 2, 0)
    assert shared.caps.steps_per_second == 50.0
    assert len(shared._workers) == 2


def test_by_default_there_is_a_process_a_core() -> None:
    engine = EspeakEngine(EspeakSettings())
    engine.close()
    assert engine.caps.max_rows == espeak._cores()


def test_more_rows_than_cores_take_turns() -> None:
    step_seconds = espeak._step_seconds(cores=4)
    assert step_seconds(1) == step_seconds(4) == step_seconds(8) / 2


# -- what it says -----------------------------------------------------------------------------------------------------


def test_every_language_has_a_sentence_here(shared: EspeakEngine) -> None:
    assert tuple(SENTENCES) == shared.languages


@pytest.mark.parametrize("language", SENTENCES)
def test_it_speaks(speaker: Speaker, language: str) -> None:
    text = SENTENCES[language]
    data = speaker.say(text, language)
    loudness = samples(data)
    per_second = len(text) / seconds(data)
    assert 1000 < loudness.std() < 6000
    assert 8000 < abs(loudness).max() < 32767
    assert 3 < per_second < 6 if language in ("yue", "zh-CN") else 11 < per_second < 20


def test_voices_differ(speaker: Speaker) -> None:
    for language, text in (("zh-CN", NIHAO), ("en-US", HELLO)):
        pitches = [pitch(speaker.say(text, language, voice)) for voice in ("male2", "male1", "female1", "female2")]
        assert all(higher > 1.1 * lower for lower, higher in itertools.pairwise(pitches)), pitches


@pytest.mark.parametrize(("language", "text"), [("zh-CN", NIHAO), ("yue", NIHAO), ("en-US", HELLO)])
def test_speed(speaker: Speaker, language: str, text: str) -> None:
    slow, normal, fast = (seconds(speaker.say(text, language, speed=speed)) for speed in (0.5, 1.0, 2.0))
    assert fast == pytest.approx(normal / 2, rel=0.15)
    assert slow == pytest.approx(normal * 2, rel=0.15)


def test_latin_words_in_chinese_are_spoken(speaker: Speaker) -> None:
    for language in ("zh-CN", "yue"):
        without = seconds(speaker.say("我们用它写了服务。", language))
        assert seconds(speaker.say("我们用 Python and WebSocket 写了服务。", language)) > without + 0.8


def test_chinese_in_english_is_left_to_mandarin(speaker: Speaker) -> None:
    text = "The word 你好 means hello."
    assert speaker.say(text, "en-US") == speaker.say(text, "zh-CN")


@pytest.mark.parametrize("language", ["zh-CN", "yue", "en-US"])
@pytest.mark.parametrize(
    "text",
    [
        "say [[h@l'oU]] now",
        "<speak>hi<break time='9s'/></speak>",
        "fish &amp; chips &#65;",
        "hello 😀 world 👍🏽",
        "𠮷野家 鱻 龘",
        "P99 是 3.5GB，¥3,500.50",
        "one\n\ntwo\tthree\r\n",
        "a\0b",
        "broken \ud800 text",
        "a" * 300,
    ],
)
def test_odd_text_is_spoken(speaker: Speaker, text: str, language: str) -> None:
    assert 0.2 < seconds(speaker.say(text, language)) < 15


def test_markup_is_read_out(speaker: Speaker) -> None:
    assert seconds(speaker.say("<speak></speak>", "en-US")) > 0.5
    assert seconds(speaker.say("fish &amp; chips", "en-US")) > seconds(speaker.say("fish & chips", "en-US")) + 0.2
    assert seconds(speaker.say("[[_:_:_:_:_:]] hello", "en-US")) > seconds(speaker.say("hello", "en-US")) + 1


def test_espeak_commands_in_the_text_do_nothing(speaker: Speaker) -> None:
    assert speaker.say("hello \x01 99P world", "en-US") == speaker.say("hello   99P world", "en-US")


@pytest.mark.parametrize("text", ["", "  ", "。。。", "，" * 50, "\u200b"])
def test_nothing_speakable_ends_without_steps(speaker: Speaker, text: str) -> None:
    (report,) = speaker.begin(speaker.segment(text))
    assert (report.steps_done, report.ended, report.error) == (0, EndReason.COMPLETE, None)
    assert speaker.engine.run(Plan(vocode=(Vocode(report.ref, 1),))).rows == ()


def test_speech_without_end_is_cut(speaker: Speaker) -> None:
    (report,) = speaker.begin(speaker.segment("好" * 1000, speed=0.5))
    assert (report.steps_done, report.ended) == (espeak.MAX_STEPS, EndReason.LENGTH)
    assert len(speaker.vocode(report.ref, report.steps_done)) == 2 * espeak.MAX_STEPS * espeak.SAMPLES_PER_STEP


def test_a_row_depends_on_nothing_but_its_segment(speaker: Speaker, own: Speaker) -> None:
    for language, text in (("zh-CN", NIHAO), ("en-US", HELLO)):
        segment = speaker.segment(text, language, "female2")
        other = speaker.segment(text, "en-GB", "male2", 1.5)
        alone = own.say_all(segment)[0]
        assert speaker.say_all(segment, segment) == [alone, alone]
        assert speaker.say_all(other, segment)[1] == alone
        assert speaker.say_all(segment, other)[0] == alone


# -- rows, slots and samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 7, 1000])
def test_partial_vocoding_gives_the_same_samples(speaker: Speaker, stride: int) -> None:
    whole = speaker.say(NIHAO)
    (report,) = speaker.begin(speaker.segment(NIHAO))
    parts, done = [], 0
    while done < report.steps_done:
        (vocoded,) = speaker.engine.run(Plan(vocode=(Vocode(report.ref, done + stride),))).rows
        assert vocoded.pcm is not None
        assert vocoded.ended is None
        assert vocoded.pcm.start_sample == done * espeak.SAMPLES_PER_STEP
        assert vocoded.pcm.to_step == min(done + stride, report.steps_done)
        done = vocoded.pcm.to_step
        parts.append(vocoded.pcm.data)
    assert b"".join(parts) == whole
    assert speaker.engine.run(Plan(vocode=(Vocode(report.ref, done),))).rows == ()


def test_samples_outlive_the_slot(speaker: Speaker) -> None:
    (first,) = speaker.begin(speaker.segment(NIHAO))
    (second,) = speaker.begin(speaker.segment(HELLO, "en-US"))
    assert first.ref.slot == second.ref.slot
    assert speaker.vocode(first.ref, first.steps_done) == speaker.say(NIHAO)
    assert speaker.vocode(second.ref, second.steps_done) == speaker.say(HELLO, "en-US")


def test_samples_leave_with_their_row(speaker: Speaker) -> None:
    (report,) = speaker.begin(speaker.segment(NIHAO))
    assert speaker.engine.run(Plan(leaves=(report.ref,), vocode=(Vocode(report.ref, 9),))).rows == ()
    assert speaker.engine._speech == {}


def test_slots_are_used_again(speaker: Speaker) -> None:
    for _ in range(5):
        assert all(len(data) > RATE for data in speaker.say_all(*[speaker.segment("你好，世界")] * 2))


def test_a_row_that_leaves_is_never_heard_of_again(speaker: Speaker) -> None:
    expected = speaker.say("你好")
    for ticks in range(4):
        gone = speaker.join(speaker.segment(LONG))
        assert speaker.engine.run(Plan(joins=((gone,),), vocode=(Vocode(gone.ref, 1),))).rows == ()
        for _ in range(ticks):
            speaker.engine.run(Plan(vocode=(Vocode(gone.ref, 1),)))
        next_ = speaker.join(speaker.segment("你好"))
        reports = speaker.until(Plan(leaves=(gone.ref,), joins=((next_,),), steps=1), next_.ref)
        assert speaker.vocode(next_.ref, reports[next_.ref].steps_done) == expected
        assert speaker.engine.run(Plan(steps=1)).rows == ()


def test_a_row_may_leave_and_nobody_follow(speaker: Speaker) -> None:
    gone = [speaker.join(speaker.segment(LONG), slot) for slot in range(2)]
    speaker.engine.run(Plan(joins=(tuple(gone),), vocode=(Vocode(gone[0].ref, 1),)))
    assert speaker.engine.run(Plan(leaves=tuple(join.ref for join in gone))).rows == ()
    assert seconds(speaker.say("你好")) > 0.3


def test_a_row_that_nobody_knows_may_leave(speaker: Speaker) -> None:
    assert speaker.engine.run(Plan(leaves=(RowRef(10**6, 0, 10**6),))).rows == ()


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_killed_process_fails_its_row_alone(own: Speaker) -> None:
    victim, other = own.join(own.segment(LONG), 0), own.join(own.segment(LONG), 1)
    own.engine.run(Plan(joins=((victim, other),), vocode=(Vocode(victim.ref, 1),)))
    os.kill(pid(own, 0), signal.SIGKILL)
    reports = own.until(Plan(steps=1), victim.ref, other.ref)
    assert reports[victim.ref].error
    assert reports[other.ref].ended is EndReason.LENGTH
    assert own.say_all(own.segment(NIHAO), own.segment(NIHAO)) == [own.say(NIHAO)] * 2


def test_a_killed_process_takes_its_fork_with_it(own: Speaker) -> None:
    victim = own.join(own.segment(LONG), 0)
    own.engine.run(Plan(joins=((victim,),), vocode=(Vocode(victim.ref, 1),)))
    children = Path(f"/proc/{pid(own, 0)}/task/{pid(own, 0)}/children")
    fork = next(numbers[0] for _ in range(10**6) if (numbers := children.read_text().split()))
    os.kill(pid(own, 0), signal.SIGSTOP)
    watch = os.pidfd_open(int(fork))
    os.kill(pid(own, 0), signal.SIGKILL)
    assert select.select([watch], [], [], 10)[0]
    os.close(watch)
    assert own.until(Plan(steps=1), victim.ref)[victim.ref].error


def test_a_process_that_was_killed_while_idle_is_replaced(own: Speaker) -> None:
    before = pid(own, 0)
    watch = os.pidfd_open(before)
    os.kill(before, signal.SIGKILL)
    select.select([watch], [], [], 10)
    os.close(watch)
    assert own.engine.run(Plan()).rows == ()
    assert len(own.say(NIHAO)) > RATE
    assert pid(own, 0) != before


def test_a_process_that_died_unnoticed_fails_the_row_that_finds_out(own: Speaker) -> None:
    own.engine._workers[0]._socket.shutdown(1)
    (report,) = own.begin(own.segment(NIHAO))
    assert report.error
    assert len(own.say(NIHAO)) > RATE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_outlive_signals_to_the_group(own: Speaker, number: int) -> None:
    before = pid(own, 0)
    os.kill(before, number)
    assert len(own.say(NIHAO)) > RATE
    assert pid(own, 0) == before


def test_a_failure_inside_espeak_fails_its_row_alone(own: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pid(own, 0)
    monkeypatch.setattr(espeak, "LANGUAGES", {"zh-CN": espeak._Language("no/such", 0.1)})
    (report,) = own.begin(own.segment(NIHAO))
    monkeypatch.undo()
    assert report.error == "espeak: espeak-ng ended with 1"
    assert len(own.say(NIHAO)) > RATE
    assert pid(own, 0) == before


def test_what_cannot_be_asked_for_fails_its_row_alone(own: Speaker) -> None:
    nobody, huge = own.segment(NIHAO, voice="nobody"), own.segment("好" * 1_000_000)
    assert [report.error is not None for report in own.begin(nobody, huge)] == [True, True]
    assert len(own.say_all(own.segment(NIHAO), own.segment(NIHAO))) == 2


def test_a_process_that_cannot_be_started_again_fails_its_row(own: Speaker) -> None:
    command, own.engine._command = own.engine._command, ["/nonexistent/python"]
    os.kill(pid(own, 0), signal.SIGKILL)
    own.engine._workers[0]._process.wait()
    own.engine.run(Plan())
    (report,) = own.begin(own.segment(NIHAO))
    assert report.error
    own.engine._command = command
    assert len(own.say(NIHAO)) > RATE


def test_close_ends_the_processes() -> None:
    engine = EspeakEngine(EspeakSettings(processes=2))
    running = Speaker(engine).join(Segment(LONG, "female1", "zh-CN"))
    engine.run(Plan(joins=((running,),)))
    processes = [worker._process for worker in engine._workers.values()]
    engine.close()
    assert [process.poll() for process in processes] == [0, 0]


def test_processes_die_with_their_parent() -> None:
    script = """if True:
        import sys
        from common.settings import EspeakSettings
        from service.engines.espeak import EspeakEngine
        engine = EspeakEngine(EspeakSettings(processes=2))
        print(*(worker.pid for worker in engine._workers.values()), flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        watches = [os.pidfd_open(int(number)) for number in parent.stdout.readline().split()]
        assert len(watches) == 2
        parent.kill()
        for watch in watches:
            assert select.select([watch], [], [], 10)[0]
            os.close(watch)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(StartupError, match=re.escape("pip install 'chorus-tts[service]'")):
        EspeakEngine(EspeakSettings(processes=1))


def test_a_library_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library, data = espeak._installed()
    for wrong in (("/nonexistent.so", data), (library, str(tmp_path)), (library, "/nonexistent")):
        monkeypatch.setattr(espeak, "_installed", lambda wrong=wrong: wrong)
        with pytest.raises(StartupError, match=r"does not start: .*chorus-tts\[service\]"):
            EspeakEngine(EspeakSettings(processes=2))


# -- predictions ------------------------------------------------------------------------------------------------------


ORDINARY = [
    ("zh-CN", "妈妈做的红烧肉特别好吃，每次回家我都要吃两碗饭。"),
    ("zh-CN", "请各位乘客系好安全带，飞机即将起飞。"),
    ("zh-CN", "这家书店开了二十多年，老板认识附近的每一个孩子。"),
    ("zh-CN", "为什么天空是蓝色的？因为空气把蓝光散射得更多。"),
    ("zh-CN", "我们的 App 支持 iOS 和 Android 两个平台。"),
    ("yue", "唔該，呢度去尖沙咀要行幾耐？"),
    ("yue", "聽講今晚會落大雨，記得帶遮呀。"),
    ("en-US", "My grandmother keeps a small garden behind the house."),
    ("en-US", "Could you tell me how to get to the museum, please?"),
    ("en-US", "Water boils at a lower temperature on high mountains, because the air pressure is lower."),
    ("en-GB", "The library is closed on Sundays, but you can return your books at the front door."),
    ("en-GB", "We shall meet again next week and discuss the budget."),
    ("de", "Der Bäcker an der Ecke öffnet jeden Morgen um sechs Uhr."),
    ("fr", "Le boulanger du coin ouvre tous les matins à six heures."),
    ("es", "El panadero de la esquina abre todas las mañanas a las seis."),
]


@pytest.mark.parametrize(("language", "text"), ORDINARY)
@pytest.mark.parametrize(("voice", "speed"), [("female1", 1.0), ("male2", 1.5)])
def test_predictions(speaker: Speaker, language: str, text: str, voice: str, speed: float) -> None:
    segment = speaker.segment(text, language, voice, speed)
    prediction = speaker.engine.caps.predict(segment)
    (report,) = speaker.begin(segment)
    speaker.engine.run(Plan(leaves=(report.ref,)))
    assert prediction.prompt_tokens == len(text)
    assert prediction.steps_p50 == pytest.approx(report.steps_done, rel=0.2)
    assert prediction.steps_p90 == pytest.approx(1.2 * prediction.steps_p50, abs=2)


def test_predictions_stay_in_bounds(speaker: Speaker) -> None:
    assert speaker.engine.caps.predict(speaker.segment("")).steps_p50 == 1
    assert speaker.engine.caps.predict(speaker.segment("好" * 5000)).steps_p90 == espeak.MAX_STEPS
