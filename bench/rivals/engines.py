"""The tone engine's costs and sound, in the two forms in which others use an engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count

from batcher.engine import Join, Plan, RowRef, Segment, Vocode
from common.settings import ToneSettings
from service.engines.tone import ToneEngine
from service.engines.tone_card import Card
from service.engines.tone_code import Identity, encode_row
from service.engines.tone_cost import CostModel, prompt_tokens

VOICE, LANGUAGE = "female1", "zh-CN"
FIRST_BLOCK_STEPS, BLOCK_STEPS = 2, 6
"""A stream's first chunk and the later ones."""


class WholeUtteranceEngine:
    """Computes a batch to its longest row, as `ChatTTS.Chat.infer` does: rows that have ended go on to the end.

    Only what a row really says is vocoded: cheaper than upstream, which pads there too.
    """

    def __init__(self, settings: ToneSettings) -> None:
        self._costs = CostModel(settings)
        self._max_steps = settings.max_steps
        self._card = Card(settings.card, time.sleep, time.monotonic)

    def speak(self, texts: Sequence[str]) -> list[bytes]:
        """The samples of each text, after as long as the model says."""
        with self._card.held():
            lengths = [min(self._costs.steps(text), self._max_steps) for text in texts]
            audio = [encode_row(_identity(text), steps) for text, steps in zip(texts, lengths, strict=True)]
            self._card.spend(self._ms([prompt_tokens(text) for text in texts], lengths) / 1000)
        return audio

    def _ms(self, prompts: Sequence[int], lengths: Sequence[int]) -> float:
        rows, longest = len(lengths), max(lengths)
        kv = longest * sum(prompts) + rows * longest * (longest - 1) // 2
        decode = longest * self._costs.pass_ms(rows) + self._costs.kv_ms(kv)
        return self._costs.prefill_ms(rows, max(prompts)) + decode + self._costs.vocode_ms(sum(lengths))


@dataclass(slots=True)
class _Row:
    key: Hashable
    ref: RowRef
    stream: bool
    done: int = 0
    vocoded: int = 0

    def due(self, ended: bool) -> bool:
        """Whether its samples should be made now."""
        if not self.stream or ended:
            return ended
        return self.done - self.vocoded >= (BLOCK_STEPS if self.vocoded else FIRST_BLOCK_STEPS)


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples of a row, the last ones or not."""

    key: Hashable
    pcm: bytes
    last: bool


class StepEngine:
    """The tone engine itself, a step at a time; rows join whenever there is room."""

    def __init__(self, settings: ToneSettings) -> None:
        self._engine = ToneEngine(settings)
        self._rows: dict[int, _Row] = {}
        self._joining: deque[tuple[_Row, str]] = deque()
        self._free = list(range(settings.slots))
        self._numbers = count()

    @property
    def rows(self) -> int:
        """Rows that run or will with the next step."""
        return len(self._rows) + len(self._joining)

    def join(self, key: Hashable, text: str, stream: bool) -> None:
        """Adds a row; there must be room. From any thread."""
        number = next(self._numbers)
        self._joining.append((_Row(key, RowRef(number, self._free.pop(), number), stream), text))

    def step(self) -> list[Piece]:
        """One forward pass over all rows, and the samples that are due."""
        joins = tuple(self._join() for _ in range(len(self._joining)))
        report = self._engine.run(Plan(joins=(joins,) if joins else (), steps=1))
        due = []
        for each in report.rows:
            row = self._rows[each.ref.row]
            row.done = each.steps_done
            if each.ended:
                self._free.append(row.ref.slot)
            if row.due(each.ended is not None):
                due.append((row, each.ended is not None))
        return self._vocode(due)

    def _join(self) -> Join:
        row, text = self._joining[0]
        self._rows[row.ref.row] = row
        self._joining.popleft()
        return Join(row.ref, Segment(text, VOICE, LANGUAGE))

    def _vocode(self, due: Sequence[tuple[_Row, bool]]) -> list[Piece]:
        if not due:
            return []
        report = self._engine.run(Plan(vocode=tuple(Vocode(row.ref, row.done) for row, _ in due)))
        audio = {each.ref.row: each.pcm.data for each in report.rows if each.pcm}
        for row, ended in due:
            row.vocoded = row.done
            if ended:
                del self._rows[row.ref.row]
        return [Piece(row.key, audio.get(row.ref.row, b""), ended) for row, ended in due]


def _identity(text: str) -> Identity:
    return Identity.of(text, VOICE, LANGUAGE, 0, 0)
