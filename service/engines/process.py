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

import msgspec

from batcher.engine import Caps, EngineLostError, EngineOutOfMemoryError, Plan, Report
from common.errors import StartupError
from common.settings import Settings
from service.engines.base import SpeechEngine

END_SECONDS = 5.0
"""That a process may take to end."""

ENCODER = msgspec.msgpack.Encoder()
"""Of plans, and of answers."""

Load = Callable[[Settings], SpeechEngine]
"""A function or class of a module: its name is sent."""


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
        load: loads it there. A function or class of a module which is quickly imported.
        settings: what `load` is given. It takes as long as it takes: weights may have to be fetched.
        stall_seconds: how long the engine may say nothing to a plan. Then it is taken to hang, and is killed.

    Raises:
        StartupError: the engine could not be loaded.
    """

    def __init__(self, load: Load, settings: Settings, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._ending = False
        """Its end is our doing."""
        self._asking = threading.Lock()
        self._socket, theirs = socket.socketpair()
        self._connection = Connection(os.dup(self._socket.fileno()))
        with theirs:
            self._process = self._start(theirs.fileno())
        try:
            self._present(self._greet(load, settings))
            _limit_waits(self._socket, stall_seconds)
        except BaseException:
            self._end()
            raise

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
        with self._asking:
            answer = self._ask(plan)
        if answer.report is not None:
            return answer.report
        if answer.out_of_memory is not None:
            raise EngineOutOfMemoryError(answer.out_of_memory)
        raise EngineFailedError(answer.failed)

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """Calls `lost`, on a thread of its own, if the process dies, also while nothing is asked of it."""

        def wait() -> None:
            self._process.wait()
            self._hang_up()
            if not self._ending:
                lost(EngineLostError(self._mourn()))

        threading.Thread(target=wait, name="engine-watch", daemon=True).start()

    def close(self) -> None:
        """Lets the process end, or ends it. May be called while another thread waits for a report."""
        self._ending = True
        with suppress(OSError):
            self._connection.send_bytes(b"")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._end()

    # -- how it starts ------------------------------------------------------------------------------------------------

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "service.engines.worker", str(number)]
        try:
            # In a group of its own, a terminal's Ctrl-C does not reach it.
            return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number], process_group=0)  # noqa: S603 (our own module)
        except OSError as error:
            self._let_go()
            raise StartupError(f"the engine's process cannot be started: {error}") from None

    def _greet(self, load: Load, settings: Settings) -> Presentation:
        try:
            self._connection.send((load, settings))
            answer: Presentation | str = self._connection.recv()
        except (EOFError, OSError):
            raise StartupError(f"{self._mourn()} while it loaded") from None
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

    # -- how it is asked ----------------------------------------------------------------------------------------------

    def _ask(self, plan: Plan) -> Answer:
        """Sends the plan and waits for the answer.

        Raises:
            EngineLostError: none came. What the engine knows of its rows is lost as well: it is ended.
        """
        try:
            self._connection.send_bytes(ENCODER.encode(plan))
            return _ANSWERS.decode(self._connection.recv_bytes())
        except BlockingIOError:
            self._ending = True
            self._kill()
            raise EngineLostError(f"the engine said nothing for {self._stall_seconds:g} s, and was killed") from None
        except (EOFError, OSError):
            raise EngineLostError(self._mourn()) from None
        except Exception as error:
            self._ending = True
            self._kill()
            raise EngineLostError("a plan or its report cannot be sent") from error

    # -- how it ends --------------------------------------------------------------------------------------------------

    def _mourn(self) -> str:
        """How the process ended, whose socket has. One that does not end by itself is killed."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._kill()
        code = self._process.returncode
        return "the engine's process " + ("cannot even be killed" if code is None else f"ended with code {code}")

    def _kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs lets nobody die
            self._process.wait(END_SECONDS)

    def _end(self) -> None:
        """Ends the process and lets go of it."""
        self._kill()
        self._hang_up()
        with self._asking:
            self._let_go()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _hang_up(self) -> None:
        """Whoever waits for a report sees the end of the socket, also where another process holds its other end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _let_go(self) -> None:
        self._connection.close()
        self._socket.close()


def _limit_waits(end: socket.socket, seconds: float) -> None:
    """From now on reading and writing raise BlockingIOError after so long without a byte."""
    whole = int(seconds)
    limit = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)
