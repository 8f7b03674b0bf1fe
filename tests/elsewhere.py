"""Engines that tests have loaded in another process: a function's name is all that crosses over."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from batcher.engine import Plan, Report, RowRef, RowReport
from common.errors import StartupError
from common.settings import Settings
from service.engines.chattts.estimates import Lengths
from service.engines.tone import ToneEngine


class Tone(ToneEngine):
    """The tone engine, with costs that can be sent. Plans of so many steps are its undoing."""

    HANGS, HOLDS, DIES, LEAVES, SAYS, COUNTS = range(1001, 1007)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.tone)
        self.caps = replace(self.caps, predict=Lengths(500).predict, step_seconds=_nothing, prefill_seconds=_nothing)

    def run(self, plan: Plan) -> Report:
        """As its settings say."""
        match plan.steps:
            case self.HANGS:
                time.sleep(60)
            case self.HOLDS:  # Python's lock, for ever
                re.match(r"(a+)+$", "a" * 64 + "b")
            case self.DIES:
                os._exit(7)
            case self.LEAVES:  # it hangs up, and something keeps it alive
                threading.Thread(target=time.sleep, args=(60,)).start()
                sys.exit(8)
            case self.SAYS:
                raise RuntimeError("what cannot be sent: \ud800")
            case self.COUNTS:
                steps: Any = object()
                return Report((RowReport(RowRef(1, 1, 1), steps),))
        return super().run(plan)


def _nothing(_: int) -> float:
    return 0.0


def unloadable(settings: Settings) -> Tone:
    """Has no weights."""
    raise StartupError("there are no weights; fetch them")


def deadly(settings: Settings) -> Tone:
    """Crashes while it loads."""
    os._exit(9)


def broken(settings: Settings) -> Tone:
    """Fails in a way that nobody foresaw, which is also how the end of a socket reads."""
    raise EOFError


def endless(settings: Settings) -> Tone:
    """Says that it begins to load, and never ends."""
    print("loading", flush=True)
    time.sleep(60)
    return Tone(settings)
