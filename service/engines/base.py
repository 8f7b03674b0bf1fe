"""What the service knows of an engine beyond the scheduler's protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from batcher.engine import Engine


class SpeechEngine(Engine, Protocol):
    """An engine that can present itself."""

    name: str
    model_revision: str
    """Changes whenever the same request would sound different: audio of two revisions is never mixed."""
    languages: tuple[str, ...]
    """BCP 47 tags that it speaks, in the order of their names."""
    voices: tuple[str, ...]
    """Names from `service/voices.py` that it speaks with."""
    notice: str | None
    """What the person who started it should know."""

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """Calls `lost`, on any thread, if the engine is lost, also while nothing is asked of it."""
        ...
