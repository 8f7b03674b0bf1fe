"""Engines that tests have loaded in another process: a function's name is all that crosses over."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from batcher.engine import Plan, Report
from common.errors import StartupError
from common.settings import Settings
from service.engines.chattts.estimates import Lengths
from service.engines.tone import ToneEngine


class Tone(ToneEngine):
    """The tone engine, with costs that can be sent. A plan of so many steps makes it hang, or die."""

    HANGS, DIES = 1001, 1002

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.tone)
        self.caps = replace(self.caps, predict=Lengths(500).predict, step_seconds=_nothing, prefill_seconds=_nothing)

    def run(self, plan: Plan) -> Report:
        """As its settings say."""
        if plan.steps == self.HANGS:
            time.sleep(60)
        if plan.steps == self.DIES:
            os._exit(7)
        return super().run(plan)


def _nothing(_: int) -> float:
    return 0.0


def unloadable(settings: Settings) -> Tone:
    """Has no weights."""
    raise StartupError("there are no weights; fetch them")


def deadly(settings: Settings) -> Tone:
    """Crashes while it loads."""
    os._exit(9)


def endless(settings: Settings) -> Tone:
    """Says that it begins to load, and never ends."""
    print("loading", flush=True)
    time.sleep(60)
    return Tone(settings)
