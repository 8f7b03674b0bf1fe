"""The engines, and the choice among them."""

from __future__ import annotations

import time

from common.errors import StartupError
from common.logs import logger
from common.settings import Settings
from service.engines.base import SpeechEngine


def load_engine(settings: Settings) -> SpeechEngine:
    """The engine that the settings name, loaded. Blocks for as long as that takes.

    Raises:
        StartupError: it cannot be loaded; says what to do.
    """
    # Each engine is imported only where it runs: they need different extras.
    match settings.engine:
        case "espeak":
            from service.engines.espeak import EspeakEngine

            return EspeakEngine(settings.espeak)
        case "tone":
            from service.engines.tone import ToneEngine

            return ToneEngine(settings.tone)
        case "chattts":
            from service.engines.process import EngineProcess

            return EngineProcess(load_chattts, settings, settings.chattts.stall_seconds)


def load_chattts(settings: Settings) -> SpeechEngine:
    """ChatTTS, loaded in this process.

    Raises:
        StartupError: it cannot be loaded; says what to do.
    """
    began = time.monotonic()
    try:
        from service.engines.chattts.engine import ChatTTSEngine
    except ModuleNotFoundError as error:
        raise StartupError(f"{error}; install it: pip install -c constraints.txt '.[chattts]'") from None

    imported = time.monotonic() - began
    engine = ChatTTSEngine(settings.chattts)
    logger().info("loaded", engine=engine.name, import_s=round(imported, 3), **engine.start_seconds)
    return engine
