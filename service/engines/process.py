"""An engine in a process of its own: Python's lock, which each of its operators takes, is not the event loop's.

Why, and what it costs: `docs/decisions/engine-process.md`. The other end is `worker.py`.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

import msgspec

from batcher.engine import Caps, EngineLostError, EngineOutOfMemoryError, Plan, Report
from common.errors import StartupError
from common.settings import Settings
from service.engines.base import SpeechEngine

CLOSE_SECONDS = 5.0
"""Until a process that was told to end is killed."""

ENCODER = msgspec.msgpack.Encoder()

Load = Callable[[Settings], SpeechEngine]
"""A function of a module: its name is sent."""


@dataclass(frozen=True, slots=True)
class Presentation:
    """What the service must know of an engine. Sent once, pickled."""

    name: str
    model_revision: str
    languages: tuple[str, ...]
    voices: tuple[str, ...]
    notice: str | None
    caps: Caps


@dataclass(frozen=True, slots=True)
class Answer:
    """To a plan. One of its fields is set."""

    report: Report | None = None
    out_of_memory: str | None = None
    failed: str | None = None
    """The traceback."""


_ANSWERS = msgspec.msgpack.Decoder(Answer)


class EngineFailedError(Exception):
    """The engine failed. Says how, as a traceback of the other process."""


class EngineProcess:
    """A `SpeechEngine` that lives elsewhere, loaded.

    Args:
        load: loads it there. A function of a module which is quickly imported.
        settings: what `load` is given.
        stall_seconds: how long a plan may take. Then the process is taken to hang, and is killed.

    Raises:
        StartupError: the engine could not be loaded.
    """

    def __init__(self, load: Load, settings: Settings, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._closing = False
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "service.engines.worker", str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()])  # noqa: S603 (our own module)
        self._connection = Connection(ours.detach())
        try:
            self._present(self._load(load, settings))
        except BaseException:
            self.kill()
            raise
        _limit_waits(self._connection, stall_seconds)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def run(self, plan: Plan) -> Report:
        """Has the plan done there.

        Raises:
            EngineOutOfMemoryError: as the protocol says.
            EngineFailedError: as the protocol says of any exception.
            EngineLostError: the process is gone.
        """
        answer = self._ask(plan)
        if answer.report is not None:
            return answer.report
        if answer.out_of_memory is not None:
            raise EngineOutOfMemoryError(answer.out_of_memory)
        raise EngineFailedError(answer.failed)

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """Calls `lost`, on a thread of its own, if the process dies, also while nothing is asked of it."""

        def wait() -> None:
            code = self._process.wait()
            if not self._closing:
                lost(EngineLostError(f"the engine's process ended with code {code}"))

        threading.Thread(target=wait, name="engine-watch", daemon=True).start()

    def close(self) -> None:
        """Lets the process end, or ends it."""
        self._closing = True
        with suppress(OSError):
            self._connection.send_bytes(b"")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Ends the process at once."""
        self._kill()
        self._connection.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _load(self, load: Load, settings: Settings) -> Presentation:
        try:
            self._connection.send((load, settings))
            answer: Presentation | str = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise StartupError(f"the engine's process ended with code {code} while it loaded") from None
        if isinstance(answer, str):
            raise StartupError(answer)
        return answer

    def _present(self, engine: Presentation) -> None:
        self.name = engine.name
        self.model_revision = engine.model_revision
        self.languages = engine.languages
        self.voices = engine.voices
        self.notice = engine.notice
        self.caps = engine.caps

    def _ask(self, plan: Plan) -> Answer:
        try:
            self._connection.send_bytes(ENCODER.encode(plan))
            return _ANSWERS.decode(self._connection.recv_bytes())
        except BlockingIOError:
            self._kill()
            self._lose(f"the engine's process did not answer for {self._stall_seconds:g} s, and was killed")
        except (EOFError, OSError):
            self._lose(f"the engine's process ended with code {self._process.wait()}")

    def _kill(self) -> None:
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs lets nobody die
            self._process.wait(CLOSE_SECONDS)

    def _lose(self, how: str) -> NoReturn:
        raise EngineLostError(how) from None


def _limit_waits(connection: Connection, seconds: float) -> None:
    """From now on reading and writing raise BlockingIOError after so long."""
    whole = int(seconds)
    limit = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, limit)
