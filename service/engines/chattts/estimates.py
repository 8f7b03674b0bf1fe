"""What the scheduler reckons with: how long a text will be, and what passes take. PyTorch is not needed here."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from batcher.engine import Prediction, Segment

PROMPT_FRAME = 8
"""Tokens of a prompt besides its text, about."""
CJK_STEPS = 10.4
OTHER_STEPS = 3.1
"""Steps that a character takes: 4.5 Chinese characters a second, or 15 letters. The scheduler learns what is true."""
P90 = 1.3


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long segments will be."""

    max_steps: int
    """At which they are cut."""

    def predict(self, segment: Segment) -> Prediction:
        """From a segment's characters."""
        characters = len(segment.text)
        chinese = sum("\u4e00" <= character <= "\u9fff" for character in segment.text)
        steps = (CJK_STEPS * chinese + OTHER_STEPS * (characters - chinese)) / segment.controls.speed
        p50, p90 = (min(max(1, math.ceil(steps * factor)), self.max_steps) for factor in (1, P90))
        return Prediction(PROMPT_FRAME + characters, p50, p90)


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that things take, linearly between what was measured."""

    widths: Sequence[int]
    steps: Sequence[float]
    """Of a step at each width, with the vocoding of what it makes."""
    prefill_tokens: Sequence[int]
    prefills: Sequence[float]

    def step_seconds(self, rows: int) -> float:
        """Of a step with so many rows."""
        return _between(self.widths, self.steps, rows)

    def prefill_seconds(self, tokens: int) -> float:
        """Of a prefill of so many tokens, padding included."""
        return _between(self.prefill_tokens, self.prefills, tokens)


def _between(places: Sequence[int], values: Sequence[float], place: int) -> float:
    """The value at a place, by the straight line through its neighbours. Before the first it is the first's."""
    if len(places) == 1 or place <= places[0]:
        return values[0]
    right = min(max(bisect_left(places, place), 1), len(places) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (places[right] - places[left])
    return max(values[0], values[left] + slope * (place - places[left]))
