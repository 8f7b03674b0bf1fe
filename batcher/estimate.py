"""How long segments will be: the engine's own guess, corrected by what became of earlier ones."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from batcher.engine import Caps, Prediction, Segment

MAX_VOICES = 1000
"""Pairs of language and voice that are remembered; beyond it the one not seen for longest is forgotten."""
RATE = 0.02
"""By how much a segment moves a quantile, as a share."""
MOST = math.log(4.0)
"""A correction goes no further than four times or a quarter."""


@dataclass(slots=True)
class _Bias:
    """Logarithms of what the engine's guesses are multiplied with."""

    p50: float = 0.0
    p90: float = 0.0


class Estimator:
    """Predicts steps. Each quantile follows the truth by small steps, up where too low and down where too high.

    A step up weighs as much as the quantile says (90 % for p90) and a step down the rest, so that it comes to lie where
    that share of the segments are shorter. Source: Robbins and Monro, "A Stochastic Approximation Method" (1951).
    """

    def __init__(self, caps: Caps) -> None:
        self._caps = caps
        self._biases: OrderedDict[tuple[str, str], _Bias] = OrderedDict()

    def predict(self, segment: Segment) -> Prediction:
        """What a segment will cost, as far as one can tell."""
        guess = self._caps.predict(segment)
        bias = self._biases.get((segment.language, segment.voice))
        if bias is None:
            return guess
        p50 = self._steps(guess.steps_p50, bias.p50)
        return Prediction(guess.prompt_tokens, p50, max(p50, self._steps(guess.steps_p90, bias.p90)))

    def learn(self, segment: Segment, steps: int) -> None:
        """A segment came to its end by itself, after so many steps."""
        guess = self._caps.predict(segment)
        if not steps or not guess.steps_p50:
            return
        bias = self._biases.setdefault((segment.language, segment.voice), _Bias())
        self._biases.move_to_end((segment.language, segment.voice))
        if len(self._biases) > MAX_VOICES:
            self._biases.popitem(last=False)
        bias.p50 = _moved(bias.p50, math.log(steps / guess.steps_p50), 0.5)
        bias.p90 = _moved(bias.p90, math.log(steps / guess.steps_p90), 0.9)

    def _steps(self, guess: int, bias: float) -> int:
        return min(math.ceil(guess * math.exp(bias)), self._caps.max_steps)


def _moved(bias: float, truth: float, quantile: float) -> float:
    step = quantile if truth > bias else quantile - 1 if truth < bias else 0.0
    return max(-MOST, min(MOST, bias + RATE * step))
