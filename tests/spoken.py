"""Real speech, for tests of audio."""

from __future__ import annotations

from functools import cache

from batcher.engine import Join, Plan, RowRef, Segment, Vocode
from common.settings import EspeakSettings
from service.engines.espeak import SAMPLE_RATE_HERTZ, EspeakEngine

RATE = SAMPLE_RATE_HERTZ
TEXTS = {
    "en-US": "Good morning. The train to London leaves at nine, from the second platform.",
    "zh-CN": "早上好，开往北京的列车九点从二号站台出发。",
}
TICKS = 2000


@cache
def speech(language: str) -> bytes:
    """A sentence in 16-bit samples at `RATE` hertz."""
    engine = EspeakEngine(EspeakSettings(processes=1))
    try:
        return _say(engine, Segment(TEXTS[language], "female1", language))
    finally:
        engine.close()


def _say(engine: EspeakEngine, segment: Segment) -> bytes:
    ref = RowRef(row=1, slot=0, generation=1)
    plan = Plan(joins=((Join(ref, segment),),), steps=1)
    for _ in range(TICKS):
        for report in engine.run(plan).rows:
            assert report.ended, report.error
            (vocoded,) = engine.run(Plan(vocode=(Vocode(ref, report.steps_done),))).rows
            assert vocoded.pcm
            return vocoded.pcm.data
        plan = Plan(steps=1)
    raise AssertionError("the sentence does not end")
