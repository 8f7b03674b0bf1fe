"""What a dialect's wording costs before the first audio.

Each round speaks the first segment of a text twice with the same engine: once as it is served, once with the wording
looked up instead of worked out. So both say the very same words, and the difference is the dialect's alone. The order
changes from round to round; each figure is a ratio of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from unittest import mock

from batcher.engine import Controls, Join, Plan, RowRef, Segment, Vocode
from common.settings import EspeakSettings
from service.engines.espeak import EspeakEngine
from service.text import dialects, split

LANGUAGE = "yue"
FIRST_STEPS = 10
"""Of the first audio: 0.2 s."""
PARAGRAPH = (
    "我们今天下午去看电影，你什么时候回家？他说他不知道那里的东西贵不贵，但是没有关系。"
    "您的订单已经发货，预计明天上午送到，请问还有什么可以帮您的吗？从这里坐出租车到机场要半个小时。"
)
TEXTS = {"long": (PARAGRAPH * 60)[:5000], "medium": PARAGRAPH, "short": PARAGRAPH.partition("？")[0] + "？"}

_APPLY = dialects.apply

Speak = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds until the first audio, or until the first segment's text."""

    served: float
    bare: float


def measure(rounds: int = 40) -> dict[str, float]:
    """The figures, by name.

    `dialect_first_audio_ratio` is the largest of those by length of text; `dialect_first_segment_us` is what the
    wording of the first segment takes of 5,000 characters.
    """
    with closing(EspeakEngine(EspeakSettings(processes=1))) as engine:
        speak = _speaker(engine)
        audio = {name: _compare(text, speak, rounds) for name, text in TEXTS.items()}
    figures = {f"dialect_first_audio_ratio_{name}": _ratio(found) for name, found in audio.items()}
    text_only = _compare(TEXTS["long"], lambda _: None, rounds)
    return {
        "dialect_first_audio_ratio": max(figures.values()),
        **figures,
        "dialect_first_segment_us": 1e6 * _median_difference(text_only),
        "dialect_us_per_char": 1e6 * _seconds_per_character(),
    }


def _compare(text: str, speak: Speak, rounds: int) -> list[Round]:
    """Speaks the first segment both ways, in turns. The first round warms up."""
    known = {said: _APPLY(said, LANGUAGE) for said in _asked(text)}
    found = []
    for number in range(rounds + 1):
        ways = {"served": _APPLY, "bare": lambda said, _: known[said]}
        order = sorted(ways, reverse=bool(number % 2))
        seconds = {way: _first_audio(text, ways[way], speak) for way in order}
        found.append(Round(**seconds))
    return found[1:]


def _asked(text: str) -> list[str]:
    """What the text front end asks the wording of, for the first segment."""
    asked: list[str] = []

    def listen(said: str, language: str) -> str:
        asked.append(said)
        return _APPLY(said, language)

    with mock.patch.object(dialects, "apply", listen):
        next(iter(split(text, LANGUAGE)))
    if not asked:
        raise RuntimeError("the text front end does not ask for a wording, so there is nothing to compare")
    return asked


def _first_audio(text: str, apply: Callable[[str, str], str], speak: Speak) -> float:
    with mock.patch.object(dialects, "apply", apply):
        started = time.perf_counter()
        segment = next(iter(split(text, LANGUAGE)))
        speak(segment.spoken_text)
        return time.perf_counter() - started


def _speaker(engine: EspeakEngine) -> Speak:
    """Says a text until its first samples are there."""
    rows = count(1)

    def speak(text: str) -> None:
        row = next(rows)
        ref = RowRef(row, 0, row)
        plan = Plan(joins=((Join(ref, Segment(text, "female1", LANGUAGE, controls=Controls())),),), steps=1)
        steps = next(_ends(engine, plan))
        engine.run(Plan(vocode=(Vocode(ref, min(steps, FIRST_STEPS)),)))
        engine.run(Plan(leaves=(ref,)))

    return speak


def _ends(engine: EspeakEngine, plan: Plan) -> Iterator[int]:
    """The steps of each row as it ends."""
    while True:
        for report in engine.run(plan).rows:
            if report.error:
                raise RuntimeError(report.error)
            if report.ended:
                yield report.steps_done
        plan = Plan(steps=1)


def _ratio(rounds: list[Round]) -> float:
    return statistics.median(r.served for r in rounds) / statistics.median(r.bare for r in rounds)


def _median_difference(rounds: list[Round]) -> float:
    return statistics.median(r.served - r.bare for r in rounds)


def _seconds_per_character() -> float:
    """Of the wording alone, over 5,000 characters; the best of five."""
    text = TEXTS["long"]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        _APPLY(text, LANGUAGE)
        times.append(time.perf_counter() - started)
    return min(times) / len(text)


if __name__ == "__main__":
    for name, figure in measure().items():
        print(f"{name}\t{figure:.4g}")
