"""Real speech without a model: espeak-ng, in as many processes as there are cores.

espeak-ng keeps all its state in global variables, so no two threads may use it, and one lock for all would leave the
other cores idle. Each slot therefore has a process of its own (see `espeak_worker.py`) that speaks one row at a time.
The processes are started by exec, never by a bare fork: gRPC's threads live in this one. Here everything happens on the
engine's thread, and nothing is shared with another.

A row is spoken whole: it ends in the first report that speaks of it. Its samples are its hidden states.
"""

from __future__ import annotations

import math
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

from batcher.engine import Caps, EndReason, Join, Pcm, Plan, Prediction, Report, RowRef, RowReport, Segment, Vocode
from common.errors import StartupError
from common.settings import EspeakSettings
from service.engines import espeak_worker
from service.engines.espeak_worker import FAILED, LENGTH, READY, pack, unpack
from service.text.tags import strip_tags

SAMPLE_RATE_HERTZ = 22050
SAMPLES_PER_STEP = 441
STEPS_PER_SECOND = SAMPLE_RATE_HERTZ // SAMPLES_PER_STEP
MAX_STEPS = 120 * STEPS_PER_SECOND

REVISION = 1
"""To be raised whenever something here changes the sound."""

START_SECONDS = 10.0
STOP_SECONDS = 1.0
WAIT_SECONDS = 0.008
"""How long `run` waits for rows: about a tick."""

STEP_SECONDS = 0.00007
"""A core's time for a step: 59 ordinary sentences on two virtual cores, fork and pipes included."""


@dataclass(frozen=True, slots=True)
class _Language:
    """How espeak-ng reads a language, and how long that takes in voice `female1` at speed 1."""

    file: str
    letter_seconds: float
    pause_seconds: float = 0.3
    """For each run of punctuation."""
    syllable_seconds: float = 0.22
    """For each Chinese character."""


@dataclass(frozen=True, slots=True)
class _Voice:
    """A voice variant of espeak-ng, and what we change in it."""

    variant: str
    pitch: int = 50
    """50 is the variant's own; 0 halves the frequency, 100 doubles it."""
    tempo: float = 1.0


# Several of espeak-ng's voices answer to one tag (`yue`, `en-gb`), so each is named by its file. Seconds were fitted to
# 5 to 25 sentences a language, read aloud with the pause at their end, by least squares of the relative error.
LANGUAGES = MappingProxyType(
    {
        "de": _Language("gmw/de", 0.063),
        "en-GB": _Language("gmw/en", 0.058, 0.45),
        "en-US": _Language("gmw/en-US", 0.057, 0.48),
        "es": _Language("roa/es", 0.064),
        "fr": _Language("roa/fr", 0.051),
        "it": _Language("roa/it", 0.064),
        "pt-BR": _Language("roa/pt-BR", 0.070),
        "ru": _Language("zle/ru", 0.058),
        "yue": _Language("sit/yue", 0.055, 0.2),
        "zh-CN": _Language("sit/cmn", 0.065, 0.23, syllable_seconds=0.26),
    }
)
DIGIT_SECONDS = 0.26
P90 = 1.2

WORDS_PER_MINUTE = 175
"""The pace of espeak-ng itself."""
RATE_EXPONENT = 0.87
"""Speech becomes shorter faster than its words per minute rise: with this, twice the speed is about half as long."""

VOICES = MappingProxyType(
    {
        "female1": _Voice("f2"),
        "female2": _Voice("f5", pitch=60, tempo=1.06),
        "male1": _Voice("m3", pitch=58),
        "male2": _Voice("m1", pitch=38, tempo=0.94),
    }
)

_SYLLABLE = re.compile("[\u3400-\u9fff]")
_LETTER = re.compile(r"[^\W\d_]")
_DIGIT = re.compile(r"\d")
_PAUSE = re.compile("[,.;:?!…，。、；：？！]+")
# espeak-ng takes U+0001 and U+0002 for commands, and NUL for the end.
_CONTROLS = dict.fromkeys(chain(range(0x20), range(0x7F, 0xA0)), " ")


def read_as(segment: Segment) -> _Language:
    """The language in which espeak-ng reads a segment.

    Its Mandarin and Cantonese read Latin words as English, but its English says "Chinese letter" for each Chinese
    character. So English with Chinese in it is left to Mandarin.

    Raises:
        KeyError: the segment's language is not in `LANGUAGES`.
    """
    language = LANGUAGES[segment.language]
    if segment.language.startswith("en-") and _SYLLABLE.search(segment.text):
        return LANGUAGES["zh-CN"]
    return language


def predict(segment: Segment) -> Prediction:
    """How long a segment will be, from what it is written with. Tokens are characters.

    Raises:
        KeyError: the segment's language or voice does not exist.
    """
    language, text = read_as(segment), segment.text
    syllables = len(_SYLLABLE.findall(text))
    seconds = (
        syllables * language.syllable_seconds
        + (len(_LETTER.findall(text)) - syllables) * language.letter_seconds
        + len(_DIGIT.findall(text)) * DIGIT_SECONDS
        + len(_PAUSE.findall(text)) * language.pause_seconds
    )
    seconds /= segment.controls.speed * VOICES[segment.voice].tempo
    return Prediction(prompt_tokens=len(text), steps_p50=_steps(seconds), steps_p90=_steps(seconds * P90))


def _steps(seconds: float) -> int:
    return min(MAX_STEPS, max(1, math.ceil(seconds * STEPS_PER_SECOND)))


def _request(ref: RowRef, segment: Segment) -> bytes:
    """The frame that asks a worker for a row.

    Raises:
        KeyError: the segment's language or voice does not exist.
    """
    language, voice = read_as(segment), VOICES[segment.voice]
    rate = round(WORDS_PER_MINUTE * (voice.tempo * segment.controls.speed) ** RATE_EXPONENT)
    fields = (ref.row, f"{language.file}+{voice.variant}", rate, voice.pitch, MAX_STEPS * SAMPLES_PER_STEP)
    text = strip_tags(segment.text).translate(_CONTROLS)
    return pack(*(str(field).encode("utf-8", "replace") for field in (*fields, text)))


class _Worker:
    """A process that speaks, seen from the engine."""

    def __init__(self, command: list[str]) -> None:
        """Starts it, without waiting for it.

        Raises:
            OSError: it cannot be started.
        """
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._received = bytearray()
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603 (our own file, the library's path and its data's)
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            except OSError:
                self._socket.close()
                raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fileno(self) -> int:
        """What a selector waits for."""
        return self._socket.fileno()

    def send(self, frame: bytes) -> None:
        """Sends a frame.

        Raises:
            OSError: the process has died, or does not read.
        """
        if self._socket.send(frame) < len(frame):
            raise OSError("the worker does not take all of a frame")

    def receive(self) -> list[list[bytes]]:
        """The replies that are complete now, of those that arrive: row, kind, samples or message.

        Raises:
            OSError: the process has died.
        """
        chunk = self._socket.recv(1 << 20)
        if not chunk:
            raise ConnectionResetError("the worker has died")
        self._received += chunk
        frames = iter(lambda: unpack(self._received), None)
        return [frame.split(b"\0", 2) for frame in frames if frame is not None]

    def greeting(self, deadline: float) -> str:
        """Its sample rate and version.

        Raises:
            OSError: it cannot speak, or says nothing until the deadline.
        """
        replies: list[list[bytes]] = []
        while not replies:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            replies = self.receive()
        self._socket.setblocking(False)
        _, kind, message = replies[0]
        if kind != READY:
            raise OSError(message.decode())
        return message.decode()

    def hang_up(self) -> None:
        """Tells it to end."""
        self._socket.close()

    def reap(self) -> None:
        """Waits until it has ended, and sees to it that it does."""
        self._socket.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(slots=True)
class _Speech:
    """What a row said: 16-bit samples."""

    samples: bytes
    vocoded: int = 0
    """Steps."""

    @property
    def steps(self) -> int:
        """The last one may be shorter than the others."""
        return math.ceil(len(self.samples) / 2 / SAMPLES_PER_STEP)

    def vocode(self, to_step: int) -> Pcm:
        """The samples from where it was vocoded to."""
        start, self.vocoded = self.vocoded, max(self.vocoded, min(to_step, self.steps))
        width = 2 * SAMPLES_PER_STEP
        return Pcm(self.samples[start * width : self.vocoded * width], start * SAMPLES_PER_STEP, self.vocoded)


class EspeakEngine:
    """The engine `espeak`. A slot is a process."""

    def __init__(self, settings: EspeakSettings) -> None:
        """Starts all processes at once and waits for them.

        Raises:
            StartupError: espeak-ng is not installed or does not start.
        """
        self._command = [sys.executable, "-I", "-S", espeak_worker.__file__, *_installed()]
        self._running: dict[int, RowRef] = {}
        self._speech: dict[int, _Speech] = {}
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        processes = settings.processes or _cores()
        version = self._start(processes)
        self.caps = _caps(processes)
        self.name = "espeak"
        self.model_revision = f"espeak-ng-{version}-{REVISION}"
        self.languages = tuple(LANGUAGES)
        self.voices = tuple(VOICES)
        self.notice: str | None = "speech comes from espeak-ng, a robotic voice without a model; ChatTTS is not loaded"

    def run(self, plan: Plan) -> Report:
        """Does what the plan says, and waits a little if that leaves only waiting.

        A report speaks of every row that has been spoken since the last one. `plan.steps` means nothing here: rows run
        by themselves.
        """
        for ref in plan.leaves:
            self._leave(ref)
        failed = [report for join in chain.from_iterable(plan.joins) if (report := self._join(join))]
        waits = self._running and not failed and not plan.vocode
        ended = self._collect(WAIT_SECONDS if waits else 0.0)
        vocoded = [self._vocode(vocode) for vocode in plan.vocode if vocode.ref.row in self._speech]
        return Report((*failed, *ended, *vocoded))

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """A process of its workers that dies costs its row alone."""

    def close(self) -> None:
        """Ends all processes, by force where one does not end within a second."""
        for worker in self._workers.values():
            worker.hang_up()
        for worker in self._workers.values():
            worker.reap()
        self._workers.clear()
        self._selector.close()

    def _start(self, processes: int) -> str:
        """Starts the processes; returns espeak-ng's version."""
        try:
            workers = [self._worker(slot) for slot in range(processes)]
            deadline = time.monotonic() + START_SECONDS
            greetings = {worker.greeting(deadline) for worker in workers}
        except OSError as error:
            self.close()
            raise StartupError(f"espeak-ng does not start: {error}; {_ADVICE}") from error
        rate, version = greetings.pop().split()
        if int(rate) != SAMPLE_RATE_HERTZ:
            self.close()
            raise StartupError(f"this espeak-ng speaks at {rate} Hz and not at {SAMPLE_RATE_HERTZ}; {_ADVICE}")
        return version

    def _worker(self, slot: int) -> _Worker:
        """The slot's process, started again if it has died.

        Raises:
            OSError: it cannot be started.
        """
        if slot not in self._workers:
            worker = self._workers[slot] = _Worker(self._command)
            self._selector.register(worker, selectors.EVENT_READ, slot)
        return self._workers[slot]

    def _join(self, join: Join) -> RowReport | None:
        """Hands a row to its slot's process; a report says that this failed."""
        slot = join.ref.slot
        try:
            request = _request(join.ref, join.segment)
            self._worker(slot).send(request)
        except OSError as error:
            self._bury(slot)
            return RowReport(join.ref, error=f"espeak: {error}")
        except KeyError as error:
            return RowReport(join.ref, error=f"espeak: no language or voice {error}")
        self._running[slot] = join.ref
        return None

    def _leave(self, ref: RowRef) -> None:
        self._speech.pop(ref.row, None)
        if self._running.get(ref.slot) != ref:
            return
        del self._running[ref.slot]
        try:
            self._workers[ref.slot].send(pack())
        except OSError:
            self._bury(ref.slot)

    def _bury(self, slot: int) -> None:
        """Forgets a process that is of no more use. The slot's next row gets a new one."""
        worker = self._workers.pop(slot, None)
        if worker is not None:
            self._selector.unregister(worker)
            worker.reap()

    def _collect(self, seconds: float) -> list[RowReport]:
        """What became of rows, as soon as there is something to tell, or nothing after some seconds."""
        deadline = time.monotonic() + seconds
        reports: list[RowReport] = []
        while True:
            left = max(0.0, deadline - time.monotonic())
            for key, _ in self._selector.select(left):
                reports += self._receive(key.data)
            if reports or not left:
                return reports

    def _receive(self, slot: int) -> list[RowReport]:
        try:
            replies = self._workers[slot].receive()
        except OSError as error:
            self._bury(slot)
            ref = self._running.pop(slot, None)
            return [RowReport(ref, error=f"espeak: {error}")] if ref else []
        return [report for reply in replies if (report := self._ended(slot, *reply))]

    def _ended(self, slot: int, row: bytes, kind: bytes, content: bytes) -> RowReport | None:
        """Takes a reply, unless its row has left."""
        ref = self._running.get(slot)
        if ref is None or row != str(ref.row).encode():
            return None
        del self._running[slot]
        if kind == FAILED:
            return RowReport(ref, error=f"espeak: {content.decode()}")
        speech = _Speech(content)
        if content:
            self._speech[ref.row] = speech
        return RowReport(ref, speech.steps, EndReason.LENGTH if kind == LENGTH else EndReason.COMPLETE)

    def _vocode(self, vocode: Vocode) -> RowReport:
        row = vocode.ref.row
        speech = self._speech[row]
        pcm = speech.vocode(vocode.to_step)
        if pcm.to_step == speech.steps:
            del self._speech[row]
        return RowReport(vocode.ref, speech.steps, pcm=pcm)


_ADVICE = "pip install 'chorus-tts[service]' brings one that does"


def _installed() -> tuple[str, str]:
    """Where the library and its data are.

    Raises:
        StartupError: they are not there.
    """
    try:
        import espeakng_loader

        return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    except (ImportError, RuntimeError) as error:
        raise StartupError(f"espeak-ng is not installed: {error}; {_ADVICE}") from error


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _caps(processes: int) -> Caps:
    return Caps(
        sample_rate_hertz=SAMPLE_RATE_HERTZ,
        samples_per_step=SAMPLES_PER_STEP,
        slots=processes,
        max_rows=processes,
        max_vocode=max(64, processes),
        max_steps=MAX_STEPS,
        lookahead_steps=0,
        predict=predict,
        step_seconds=_step_seconds(_cores()),
        prefill_seconds=lambda tokens: 0.0,
    )


def _step_seconds(cores: int) -> Callable[[int], float]:
    """Rows share the cores: up to one a core, a row more costs nothing."""
    return lambda rows: STEP_SECONDS * max(1.0, rows / cores)
