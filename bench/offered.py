"""What the benchmark of batchers asks for: one trace of requests, the same for every system, and what a request costs.

Time is compressed: lengths, deadlines and all that a prompt costs are divided by `COMPRESSION`, while a forward pass
takes as long as it would. So a step here stands for `COMPRESSION` steps. Whatever is reported is multiplied back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from common.settings import ToneSettings
from service.engines.tone import SAMPLE_RATE_HERTZ, h200
from service.engines.tone_code import SAMPLES_PER_STEP
from service.engines.tone_cost import PROMPT_TOKENS, CostModel

COMPRESSION = 4.0
SLOWDOWN = 22.0
"""Of an H200 at its limit: the least with which a step of one row takes 2 ms. A sleep overruns by about 0.1 ms."""
ROWS = 64

MEAN_SECONDS = 6.0
SIGMA = 0.4
LONGEST_SECONDS = 20.0
SCATTER = 0.174
"""The part of `SIGMA` that no text tells: a length is at most 1.25 times the likely one in 90 % of the cases."""
CHARACTERS_PER_SECOND = 2.0
TABLE_KV = 250
"""Tokens that a row reads at each step in the table of the physical limit."""

UNARY_SECONDS, UNARY_SHARE = 1.0, 0.5
"""A whole reply is in time after so long, and this share of its audio."""
FIRST_CHUNK_SECONDS = 0.5
UNDERRUN_SECONDS = 0.1
QUEUE_SHARE = 0.5
"""Where a rival bounds its queue in time, it lets go who has waited for this share of a typical deadline, or of its
own: what leaves the queue must still be computed."""
LISTENER_SECONDS = 2.0
"""Who hears nothing for so long hangs up."""

STEPS_PER_SECOND = SAMPLE_RATE_HERTZ / SAMPLES_PER_STEP
"""Of audio as it is heard here, that is, compressed."""

ALPHABET = [
    bytes([high, low]).decode("gb2312")
    for high in range(0xB0, 0xD7)
    for low in range(0xA1, 0xFF)
    if bytes([high, low]).decode("gb2312") not in "零一二三四五六七八九十百千万亿两点年月日号时分秒元角块毛度第负到比"
]
"""Characters that are spoken as they are written, each by itself."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the trace. Times are in seconds, compressed."""

    at: float
    """After the start."""
    text: str
    stream: bool
    audio_seconds: float
    """What it will get."""

    @property
    def deadline(self) -> float:
        """How long a whole reply may take."""
        return UNARY_SECONDS / COMPRESSION + UNARY_SHARE * self.audio_seconds


def costs() -> ToneSettings:
    """The engine that all systems have."""
    table = h200(SLOWDOWN, slots=ROWS)
    return table.model_copy(
        update={
            "step_kv_ms": table.step_kv_ms * TABLE_KV / row_kv(),
            "typical_kv": row_kv(),
            "prefill_base_ms": table.prefill_base_ms / COMPRESSION,
            "prefill_token_ms": table.prefill_token_ms / COMPRESSION,
            "steps_per_character": STEPS_PER_SECOND / COMPRESSION / CHARACTERS_PER_SECOND,
            "length_sigma": SCATTER,
            "max_steps": round(LONGEST_SECONDS / COMPRESSION * STEPS_PER_SECOND),
        }
    )


def row_kv() -> int:
    """Tokens that a row here reads at a step, on average over all steps of all rows."""
    steps = MEAN_SECONDS / COMPRESSION * STEPS_PER_SECOND
    return round(PROMPT_TOKENS + MEAN_SECONDS * CHARACTERS_PER_SECOND + steps / 2 * math.exp(SIGMA**2))


def trace(seed: int, rate: float, seconds: float, streams: float = 0.5) -> list[Arrival]:
    """A Poisson stream of requests.

    Args:
        seed: the trace; no text of one is in another.
        rate: requests a second.
        seconds: how long.
        streams: their share.
    """
    draw = random.Random(seed)
    model = CostModel(costs())
    return [
        Arrival(at, text, draw.random() < streams, _audio_seconds(model, text))
        for at, text in zip(_moments(draw, rate, seconds), _texts(draw, seed), strict=False)
    ]


def _moments(draw: random.Random, rate: float, seconds: float) -> Iterator[float]:
    at = draw.expovariate(rate)
    while at < seconds:
        yield at
        at += draw.expovariate(rate)


def _texts(draw: random.Random, seed: int) -> Iterator[str]:
    """Texts of log-normal length that differ in their first characters."""
    sigma = math.sqrt(SIGMA**2 - SCATTER**2)
    mean = math.log(MEAN_SECONDS * CHARACTERS_PER_SECOND) - SIGMA**2 / 2
    number = seed * 10_000
    while True:
        length = min(draw.lognormvariate(mean, sigma), LONGEST_SECONDS * CHARACTERS_PER_SECOND)
        rest = draw.choices(ALPHABET, k=max(0, round(length) - 2))
        yield "".join([ALPHABET[number // len(ALPHABET) % len(ALPHABET)], ALPHABET[number % len(ALPHABET)], *rest])
        number += 1


def _audio_seconds(model: CostModel, text: str) -> float:
    return min(model.steps(text), model.settings.max_steps) / STEPS_PER_SECOND
