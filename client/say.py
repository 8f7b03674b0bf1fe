"""`chorus say`: a text becomes a file, with progress while it grows."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from audio.formats import Codec, Container, Format
from audio.headers import with_known_length
from client.client import Client, StreamMessage
from protos.chorus.v1 import tts_pb2

SHORT_CHARACTERS = 100
"""A text up to this length is asked for as a whole, if not told otherwise."""

FORMATS = {
    "wav": tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_WAV),
    "raw": tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW),
    "mp3": tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_MP3),
    "opus": tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_OGG),
    "flac": tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_FLAC),
    "aac": tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_ADTS),
    "mulaw": tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_WAV, codec=tts_pb2.CODEC_MULAW),
    "alaw": tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_WAV, codec=tts_pb2.CODEC_ALAW),
}
"""What `--format` takes."""

SUFFIXES = {"opus": "ogg", "mulaw": "wav", "alaw": "wav"}
"""Of files whose format has another name."""

PLAYERS = (["ffplay", "-nodisp", "-autoexit", "-loglevel", "error"], ["paplay"], ["aplay", "-q"], ["afplay"])
"""Tried in this order."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How something is to be said."""

    voice: str = ""
    language: str = ""
    format: str = "wav"
    """A name of `FORMATS`."""
    rate: int = 0
    """Hertz; 0: the engine's."""

    @property
    def wire(self) -> tts_pb2.AudioFormat:
        """The format as the contract writes it."""
        wire = tts_pb2.AudioFormat()
        wire.CopyFrom(FORMATS[self.format])
        wire.sample_rate_hertz = self.rate
        return wire


@dataclass(slots=True)
class Said:
    """What became of a text."""

    path: Path
    first_audio_ms: float = 0.0
    """From the call to the first audio here."""
    total_ms: float = 0.0
    start: tts_pb2.StreamStart = field(default_factory=tts_pb2.StreamStart)
    end: tts_pb2.StreamEnd = field(default_factory=tts_pb2.StreamEnd)

    @property
    def seconds(self) -> float:
        """Of audio."""
        return float(self.end.sample_count / self.start.format.sample_rate_hertz)

    @property
    def cut(self) -> bool:
        """A part met the engine's cap on its length."""
        return self.end.finish_reason == tts_pb2.FINISH_REASON_LENGTH


async def say(client: Client, text: str, path: Path, wish: Wish, *, stream: bool, console: Console) -> Said:
    """Speaks a text into a file.

    Raises:
        CallError: the call failed; of a stream the file keeps what had come.
        OSError: the file cannot be written.
    """
    with _replacing(path) as file:
        if stream or len(text) > SHORT_CHARACTERS:
            messages = client.stream(text, voice=wish.voice, language=wish.language, format=wish.wire)
            said = await _keep(messages, file, path, console, len(text.encode()))
        else:
            return await _whole(client, text, file, path, wish)
    _write_length(path, said)
    return said


async def say_as_written(
    client: Client, lines: AsyncIterator[str], path: Path, wish: Wish, *, console: Console
) -> Said:
    """Speaks a text while it is being written into a file.

    Raises:
        CallError: the call failed; the file keeps what had come.
        OSError: the file cannot be written.
    """
    with _replacing(path) as file:
        messages = client.stream_text(lines, voice=wish.voice, language=wish.language, format=wish.wire)
        said = await _keep(messages, file, path, console, None)
    _write_length(path, said)
    return said


async def read_stdin() -> AsyncIterator[str]:
    """Standard input, line by line, as it is typed or piped."""
    try:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    except ValueError:  # a file: it never keeps one waiting
        for line in sys.stdin:
            yield line
        return
    while line := (await reader.readline()).decode(errors="replace"):
        yield line


async def play(path: Path) -> None:
    """Plays a file, where there is a player and something to hear it with."""
    command = next((player for player in PLAYERS if shutil.which(player[0])), None)
    if command is not None and sys.stdout.isatty() and os.environ.get("CHORUS_PLAY", "1") != "0":
        process = await asyncio.create_subprocess_exec(*command, str(path))
        await process.wait()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the path's place once there is something in it: a call that fails leaves the old one."""
    if path.exists() and not path.is_file():  # a device or a pipe
        with path.open("wb") as file:
            yield file
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
    finally:
        if part.exists() and part.stat().st_size:
            part.replace(path)
        else:
            part.unlink(missing_ok=True)


async def _whole(client: Client, text: str, file: BinaryIO, path: Path, wish: Wish) -> Said:
    began = time.monotonic()
    response = await client.synthesize(text, voice=wish.voice, language=wish.language, format=wish.wire)
    total_ms = (time.monotonic() - began) * 1000
    file.write(response.audio)
    return Said(path, total_ms, total_ms, response.start, response.end)


async def _keep(
    stream: AsyncGenerator[StreamMessage, None], file: BinaryIO, path: Path, console: Console, text_bytes: int | None
) -> Said:
    """Writes a stream into a file as it comes. `text_bytes`: of the whole text, where that is known."""
    began = time.monotonic()
    said = Said(path)
    with _progress(console) as progress:
        task = progress.add_task(path.name, total=text_bytes, seconds=0.0)
        async with aclosing(stream) as messages:
            async for message in messages:
                match message:
                    case tts_pb2.StreamStart():
                        said.first_audio_ms = (time.monotonic() - began) * 1000
                        said.start = message
                    case tts_pb2.AudioChunk():
                        file.write(message.data)
                        file.flush()
                    case tts_pb2.SegmentMark():
                        _show(progress, task, message, said.start.format.sample_rate_hertz)
                    case tts_pb2.StreamEnd():
                        said.end = message
    said.total_ms = (time.monotonic() - began) * 1000
    return said


def _write_length(path: Path, said: Said) -> None:
    """A streamed header does not know the length; a file's can."""
    if not path.is_file():
        return
    wire = said.start.format
    container = Container[tts_pb2.Container.Name(wire.container).removeprefix("CONTAINER_")]
    codec = Codec[tts_pb2.Codec.Name(wire.codec).removeprefix("CODEC_")]
    format = Format(container, codec, wire.sample_rate_hertz)
    path.write_bytes(with_known_length(path.read_bytes(), format, said.end.sample_count))


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[seconds]:.1f} s of audio in"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show(progress: Progress, task: TaskID, mark: tts_pb2.SegmentMark, rate: int) -> None:
    progress.update(task, completed=mark.end_byte, seconds=mark.end_sample / rate)
