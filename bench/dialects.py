"""What a dialect's wording costs before the first audio.

Each round speaks the first segment of a text twice with the same engine: once as it is served, once with the wording
looked up instead of worked out. Both ways the engine is given the very same words, and the order changes from round to
round. So its time is one figure, the median over all; only the text's differs. The ratio is that of the sums. Beside it
stands the ratio of the whole times as the clock saw them, `…_end_to_end`: the same thing with the engine's noise, which
on a busy machine is some hundred times what is looked for.
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
Apply = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Times:
    """Of one first segment, in seconds."""

    text: float
    """Until its words are there."""
    engine: float
    """From then until its first audio."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A text both ways, round by round."""

    served: list[Times]
    bare: list[Times]

    @property
    def added_seconds(self) -> float:
        """What the wording adds."""
        return statistics.median(s.text - b.text for s, b in zip(self.served, self.bare, strict=True))

    @property
    def ratio(self) -> float:
        """First audio with the wording, to that without, the engine's time being the same."""
        engine = statistics.median(times.engine for times in (*self.served, *self.bare))
        bare = statistics.median(times.text for times in self.bare)
        return (engine + bare + self.added_seconds) / (engine + bare)

    @property
    def end_to_end(self) -> float:
        """The same, engine's noise included."""
        served, bare = (statistics.median(t.text + t.engine for t in way) for way in (self.served, self.bare))
        return served / bare


def measure(rounds: int = 40) -> dict[str, float]:
    """The figures, by name.

    `dialect_first_audio_ratio` is the largest of those by length of text; `dialect_first_segment_us` is what the
    wording adds to the first segment of 5,000 characters.
    """
    with closing(EspeakEngine(EspeakSettings(processes=1))) as engine:
        speak = _speaker(engine)
        found = {name: _compare(text, speak, rounds) for name, text in TEXTS.items()}
    return {
        "dialect_first_audio_ratio": max(comparison.ratio for comparison in found.values()),
        **{f"dialect_first_audio_ratio_{name}": comparison.ratio for name, comparison in found.items()},
        **{f"dialect_first_audio_ratio_{name}_end_to_end": comparison.end_to_end for name, comparison in found.items()},
        "dialect_first_segment_us": 1e6 * found["long"].added_seconds,
        "dialect_us_per_char": 1e6 * _seconds_per_character(),
    }


def _compare(text: str, speak: Speak, rounds: int) -> Comparison:
    """Speaks the first segment both ways, in turns. The first round warms up."""
    known = {said: _APPLY(said, LANGUAGE) for said in _asked(text)}
    ways: dict[str, Apply] = {"served": _APPLY, "bare": lambda said, _: known[said]}
    times: dict[str, list[Times]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in sorted(ways, reverse=bool(number % 2)):
            times[way].append(_first_audio(text, ways[way], speak))
    return Comparison(times["served"][1:], times["bare"][1:])


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


def _first_audio(text: str, apply: Apply, speak: Speak) -> Times:
    with mock.patch.object(dialects, "apply", apply):
        started = time.perf_counter()
        segment = next(iter(split(text, LANGUAGE)))
        worded = time.perf_counter()
    speak(segment.spoken_text)
    return Times(worded - started, time.perf_counter() - worded)


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
