"""Runs an engine in a process of its own, for `process.py`, which starts this module and talks with it over one socket.

First it is told how to load the engine, and answers with what the engine is, or with why it cannot be loaded. From then
on each plan is answered. An empty message ends the process.

So does the end of its stdin, which the parent holds open: however the parent dies, and whatever the engine does then.
"""

from __future__ import annotations

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
from common.logs import set_up_logs
from common.process import calm_garbage_collector
from service.engines.base import SpeechEngine
from service.engines.process import ENCODER, Answer, Presentation

_PLANS = msgspec.msgpack.Decoder(Plan)


def main(number: int) -> None:
    """Runs an engine until it is told to end. `number`: of the socket's file."""
    # Ctrl-C reaches all processes of a terminal: the parent first lets its callers finish.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    os.set_inheritable(number, False)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Connection(number) as connection, suppress(EOFError, ConnectionError):
        load, settings = connection.recv()
        set_up_logs(settings.log, "engine")
        try:
            engine = load(settings)
        except StartupError as error:
            connection.send(str(error))
            return
        connection.send(_present(engine))
        calm_garbage_collector()
        _serve(engine, connection)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


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
        return Answer(out_of_memory=str(error))
    except Exception:
        return Answer(failed=traceback.format_exc())


if __name__ == "__main__":
    main(int(sys.argv[1]))
