"""Runs an engine in a process of its own, for `process.py`, which starts this module and talks with it over one socket.

First it is told how to load the engine, and answers with what the engine is, or with why it cannot be loaded. From then
on each plan is answered. An empty message ends the process.

So does the end of its stdin, which the parent holds open: however the parent dies, and whatever the engine does then.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

import msgspec

from batcher.engine import EngineOutOfMemoryError, Plan
from common.errors import StartupError
from common.logs import logger, set_up_logs
from common.process import calm_garbage_collector
from common.settings import Settings
from service.engines.base import SpeechEngine
from service.engines.process import ENCODER, Answer, Load, Presentation

_PLANS = msgspec.msgpack.Decoder(Plan)


def main(number: int) -> None:
    """Runs an engine until it is told to end. `number`: of the socket's file."""
    # A supervisor's signal reaches all processes of a service: the parent first lets its callers finish.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    os.set_inheritable(number, False)
    _end_with_parent()
    with Connection(number) as connection, suppress(EOFError, ConnectionError):
        load, settings = connection.recv()
        set_up_logs(settings.log, "engine")
        engine = _loaded(load, settings)
        connection.send(engine if isinstance(engine, str) else _present(engine))
        if not isinstance(engine, str):
            calm_garbage_collector()
            _serve(engine, connection)


def _loaded(load: Load, settings: Settings) -> SpeechEngine | str:
    """The engine, or why there is none."""
    try:
        return load(settings)
    except StartupError as error:
        return str(error)
    except Exception as error:
        logger().error("the engine cannot be loaded", exc_info=error)
        return f"the engine cannot be loaded ({type(error).__name__}); the log says why"


def _end_with_parent() -> None:
    """The kernel kills this process when its stdin ends, also while a call into a library keeps Python's lock.

    Where there is no Linux, a thread does it, once it gets the lock.
    """

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    if sys.platform == "linux":
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    # It also sees an end that came before.
    threading.Thread(target=wait, daemon=True).start()


def _present(engine: SpeechEngine) -> Presentation:
    return Presentation(engine.name, engine.model_revision, engine.languages, engine.voices, engine.notice, engine.caps)


def _serve(engine: SpeechEngine, connection: Connection) -> None:
    while plan := connection.recv_bytes():
        answer = _answer(engine, _PLANS.decode(plan))
        connection.send_bytes(ENCODER.encode(answer))
    engine.close()


def _answer(engine: SpeechEngine, plan: Plan) -> Answer:
    try:
        return Answer(report=engine.run(plan))
    except EngineOutOfMemoryError as error:
        return Answer(out_of_memory=_sendable(str(error)))
    except Exception:
        return Answer(failed=_sendable(traceback.format_exc()))


def _sendable(text: str) -> str:
    """Without lone surrogates, which UTF-8 does not have."""
    return text.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main(int(sys.argv[1]))
