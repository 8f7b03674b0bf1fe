"""An engine that answers at once, for what a plan costs on its way to another process and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from batcher.engine import Caps, Pcm, Plan, Prediction, Report, RowRef, RowReport, Segment, Vocode
from common.settings import Settings
from service.engines.base import SpeechEngine
from service.engines.process import EngineProcess

ROWS = (8, 256)
BLOCK_BYTES = 24 * 1024
"""24 steps of 512 samples."""


def tick_ms() -> dict[str, float]:
    """Milliseconds of a plan and its report, by rows. Each row is reported; of a quarter a block of samples comes."""
    engine = EngineProcess(load_canned, Settings(), stall_seconds=60.0)
    try:
        return {str(rows): round(1e3 * _seconds(engine, rows), 3) for rows in ROWS}
    finally:
        engine.close()


def load_canned(settings: Settings) -> SpeechEngine:
    """The engine, for another process."""
    return _Canned()


class _Canned:
    name = "canned"
    model_revision = "1"
    languages: tuple[str, ...] = ("en-US",)
    voices: tuple[str, ...] = ("female1",)
    notice: str | None = None

    def __init__(self) -> None:
        self.caps = Caps(24_000, 512, 256, 256, 256, 256, 0, _predict, float, float)
        self._reports = {rows: _report(rows) for rows in ROWS}

    def run(self, plan: Plan) -> Report:
        """Answers for as many rows as there are steps."""
        return self._reports[plan.steps]

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """It lives in this process."""

    def close(self) -> None:
        """Has nothing."""


def _predict(segment: Segment) -> Prediction:
    return Prediction(1, 1, 1)


def _ref(row: int) -> RowRef:
    return RowRef(100_000 + row, row, 1000)


def _report(rows: int) -> Report:
    block = bytes(BLOCK_BYTES)
    return Report(
        tuple(RowReport(_ref(row), 100, pcm=None if row % 4 else Pcm(block, 12_288, 48)) for row in range(rows))
    )


def _seconds(engine: EngineProcess, rows: int) -> float:
    plan = Plan(steps=rows, vocode=tuple(Vocode(_ref(row), 48) for row in range(0, rows, 4)))
    found = []
    for _ in range(200):
        began = time.perf_counter()
        engine.run(plan)
        found.append(time.perf_counter() - began)
    return median(found)
