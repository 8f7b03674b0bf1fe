"""How many seconds of audio a text will be, as far as one can tell from its characters; corrected by what they were."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TypeAlias

from protos.chorus.v1 import tts_pb2

Spoken: TypeAlias = "tts_pb2.SynthesizeRequest | tts_pb2.StreamSynthesizeRequest"

WIDE_SECONDS = 0.22
"""A character of Chinese, Japanese or Korean."""
NARROW_SECONDS = 0.065
"""Any other."""
FIRST_WIDE = "\u2e80"

MAX_VOICES = 1000
"""Pairs of language and voice that are remembered; beyond it the one not seen for longest is forgotten."""
STEP = 0.02
"""By how much a speech moves its median, as a share."""
MOST = math.log(8.0)


class Estimator:
    """Predicts medians, one for each language and voice that are asked for.

    Each follows the truth by small steps, up where too low and down where too high: Robbins and Monro, "A Stochastic
    Approximation Method" (1951).
    """

    def __init__(self) -> None:
        self._biases: OrderedDict[tuple[str, str], float] = OrderedDict()

    def seconds(self, request: Spoken) -> float:
        """What a request will come to."""
        return _guess(request) * math.exp(self._biases.get(_key(request), 0.0))

    def learn(self, request: Spoken, seconds: float) -> None:
        """A request was spoken to its end."""
        if seconds <= 0:
            return
        key, truth = _key(request), math.log(seconds / _guess(request))
        bias = self._biases.get(key, 0.0)
        step = STEP if truth > bias else -STEP
        self._biases[key] = max(-MOST, min(MOST, bias + step))
        self._biases.move_to_end(key)
        if len(self._biases) > MAX_VOICES:
            self._biases.popitem(last=False)


def _guess(request: Spoken) -> float:
    text = request.text
    wide = sum(character >= FIRST_WIDE for character in text)
    speed = request.controls.speed if request.controls.HasField("speed") else 1.0
    return max(0.1, wide * WIDE_SECONDS + (len(text) - wide) * NARROW_SECONDS) / max(0.1, speed)


def _key(request: Spoken) -> tuple[str, str]:
    return request.language[:16], request.voice[:64]
