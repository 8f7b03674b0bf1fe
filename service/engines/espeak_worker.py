"""Speaks rows with espeak-ng, in a process of its own.

`espeak.py` starts this file as a script and talks with it over one socket, its stdin. Only light modules are imported,
so that it is up within some 30 ms.

Each row is spoken in a fork of the process that has just loaded the library. Between utterances espeak-ng keeps the
phase of its pitch flutter, its gain and the state of its noise, and nothing resets them: in one process a row would
sound by the rows before it, while every fork starts from the same state. A fork also makes it safe to stop a row
anywhere, and a crash or an endless loop costs that row alone.

Frames go both ways: four bytes of length, then fields with NUL between them. To the worker: row, voice, words per
minute, pitch, samples at most, text; an empty frame says that the row is no longer wanted. From it: row, kind, then
samples or a message; the first frame has no row.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import struct
import sys
from typing import NoReturn

READY = b"ready"
COMPLETE = b"complete"
LENGTH = b"length"
FAILED = b"failed"

CPU_SECONDS = 30
"""What a row may cost. Two minutes of speech cost less than one."""

_SOCKET = 0
_HEADER = struct.Struct("!I")
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

# From espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_POSITION_CHARACTER = 1
_RATE, _VOLUME, _PITCH = 1, 2, 3
# Markup and phonemes are not interpreted, since espeakSSML and espeakPHONEMES are not among the flags. A clause's pause
# is kept at the end, so that segments can follow one another.
_CHARS_UTF8, _ENDPAUSE = 1, 0x1000

_VOLUME_PERCENT = 80
"""At 100 percent Mandarin reaches full scale and espeak-ng's limiter pumps."""


class Espeak:
    """The library, ready to speak."""

    def __init__(self, library: str, data: str) -> None:
        """Loads it.

        Raises:
            OSError: the library or its data cannot be used.
            AttributeError: the library is too old.
        """
        self._library = ctypes.CDLL(library)
        # The library cuts the path of its data off at 160 bytes.
        os.chdir(data)
        self.sample_rate: int = self._library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, b".", _INITIALIZE_DONT_EXIT)
        if self.sample_rate <= 0:
            raise OSError(f"espeak-ng does not accept the data in {data}")
        # The library seeds its noise with the time of day.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._library.espeak_SetParameter(_VOLUME, _VOLUME_PERCENT, 0)
        self._samples = bytearray()
        self._limit = 0
        self._callback = _CALLBACK(self._take)
        self._library.espeak_SetSynthCallback(self._callback)

    def version(self) -> str:
        """The library's version, such as `1.52.0`."""
        self._library.espeak_Info.restype = ctypes.c_char_p
        version: bytes = self._library.espeak_Info(ctypes.byref(ctypes.c_char_p()))
        return version.decode()

    def speak(self, voice: bytes, rate: bytes, pitch: bytes, limit: bytes, text: bytes) -> tuple[bytes, bytes]:
        """COMPLETE or LENGTH, and the samples; none if nothing in the text can be spoken.

        Raises:
            ValueError: espeak-ng has no such voice.
        """
        self._limit = 2 * int(limit)
        if self._library.espeak_SetVoiceByName(voice) != 0:
            raise ValueError(f"no voice {voice.decode()}")
        self._library.espeak_SetParameter(_RATE, int(rate), 0)
        self._library.espeak_SetParameter(_PITCH, int(pitch), 0)
        size = ctypes.c_size_t(len(text) + 1)
        self._library.espeak_Synth(text, size, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8 | _ENDPAUSE, None, None)
        samples = bytes(self._samples[: self._limit])
        return LENGTH if len(self._samples) > self._limit else COMPLETE, samples if any(samples) else b""

    def _take(self, samples: int | None, count: int, _events: int | None) -> int:
        if samples:
            self._samples += ctypes.string_at(samples, 2 * count)
        return int(len(self._samples) > self._limit)


def pack(*fields: bytes) -> bytes:
    """Fields as a frame."""
    body = b"\0".join(fields)
    return _HEADER.pack(len(body)) + body


def unpack(received: bytearray) -> bytes | None:
    """Takes the first frame's body off what was received, if all of it is there."""
    if len(received) < _HEADER.size:
        return None
    end = _HEADER.size + _HEADER.unpack_from(received)[0]
    if len(received) < end:
        return None
    body = bytes(received[_HEADER.size : end])
    del received[:end]
    return body


def _read(size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        chunk = os.read(_SOCKET, size - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def _speak_and_exit(espeak: Espeak, request: list[bytes], source: int, target: int) -> NoReturn:
    status = 1
    try:
        # Held open here, they would hide the worker's death: the socket from the engine, the pipe from this process.
        os.close(_SOCKET)
        os.close(source)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        _write(target, b"\0".join(espeak.speak(*request)))
        status = 0
    finally:
        os._exit(status)


def _collect(source: int) -> bytes | None:
    """What the fork writes until it ends; None as soon as the engine says anything, even by hanging up."""
    output = bytearray()
    while True:
        readable, _, _ = select.select([_SOCKET, source], [], [])
        if _SOCKET in readable:
            return None
        chunk = os.read(source, 1 << 20)
        if not chunk:
            return bytes(output)
        output += chunk


def _speak_apart(espeak: Espeak, request: list[bytes]) -> bytes | None:
    """Kind and samples, or None if the row is no longer wanted."""
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        _speak_and_exit(espeak, request, source, target)
    os.close(target)
    output = _collect(source)
    os.close(source)
    if output is None:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if output is None or status == 0:
        return output
    return FAILED + b"\0espeak-ng ended with %d" % status


def main(library: str, data: str) -> None:
    """Speaks what it is told until the engine hangs up."""
    # They go to the whole process group, but rows are still to be finished then; hanging up ends the process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        espeak = Espeak(library, data)
    except (OSError, AttributeError) as error:
        _write(_SOCKET, pack(b"", FAILED, str(error).encode()))
        return
    _write(_SOCKET, pack(b"", READY, f"{espeak.sample_rate} {espeak.version()}".encode()))
    while True:
        row, *request = _read(_HEADER.unpack(_read(_HEADER.size))[0]).split(b"\0")
        output = _speak_apart(espeak, request) if request else None
        if output is not None:
            _write(_SOCKET, pack(row, output))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (EOFError, ConnectionError):
        os._exit(0)
