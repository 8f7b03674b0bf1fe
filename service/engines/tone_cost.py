"""What speech costs and how long it gets, by the model that tests, load and benchmarks share. Times are milliseconds.

A step's time is `base + row x rows + kv x tokens of KV`, as of a model whose decoding is bound by memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from math import exp
from statistics import NormalDist

from common.settings import ToneSettings

PROMPT_TOKENS = 16
"""Tokens of a prompt besides its text, which has one a character."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs and lengths by setting. Pure."""

    settings: ToneSettings

    def step_ms(self, rows: int, kv: int) -> float:
        """A forward pass over so many rows that read so many tokens of KV, all together."""
        return self.pass_ms(rows) + self.kv_ms(kv)

    def pass_ms(self, rows: int) -> float:
        """A forward pass over so many rows, what they read of KV left out."""
        return self.settings.step_base_ms + self.settings.step_row_ms * rows

    def kv_ms(self, kv: int) -> float:
        """Reading so many tokens of KV."""
        return self.settings.step_kv_ms * kv / 1000

    def prefill_ms(self, rows: int, tokens: int) -> float:
        """A group of so many rows that joins, padded to the longest prompt, which has so many tokens."""
        return self.settings.prefill_base_ms + self.settings.prefill_token_ms * rows * tokens

    def vocode_ms(self, steps: int) -> float:
        """So many steps, of all rows together, that become samples at once."""
        return self.settings.vocode_base_ms + self.settings.vocode_step_ms * steps if steps else 0.0

    def likely_steps(self, text: str, speed: float = 1.0) -> int:
        """How long a text is likely to get."""
        return max(1, round(len(text) * self.settings.steps_per_character / speed))

    def steps(self, text: str, speed: float = 1.0) -> int:
        """How long it gets if nothing cuts it. The same text always gets as long."""
        if not self.settings.length_sigma:
            return self.likely_steps(text, speed)
        factor = exp(self.settings.length_sigma * _normal(text))
        return max(1, round(len(text) * self.settings.steps_per_character * factor / speed))


def prompt_tokens(text: str) -> int:
    """Tokens of KV that a row has before its first step."""
    return PROMPT_TOKENS + len(text)


def _normal(text: str) -> float:
    """A number drawn from the normal distribution by the text."""
    draw = int.from_bytes(blake2b(text.encode(), digest_size=4).digest())
    return _NORMAL.inv_cdf((draw + 0.5) / 2**32)
