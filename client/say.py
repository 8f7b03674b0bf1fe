"""`chorus say`: a text becomes a file, with progress while it grows."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from audio.formats import Codec, Container, Format
from audio.headers import wav_header
from client.client import Client
from protos.chorus.v1 import tts_pb2

SHORT_CHARACTERS = 100
"""A text up to this length is asked for as a whole, if not told otherwise."""


@dataclass(frozen=True, slots=True)
class Said:
    """What became of a text."""

    path: Path
    seconds: float
    first_audio_ms: float
    """From the call to the first audio here."""
    total_ms: float
    engine: str
    cut: bool
    """A part met the engine's cap on its length."""


async def say(client: Client, text: str, path: Path, *, voice: str, stream: bool, console: Console) -> Said:
    """Speaks a text into a WAV file.

    Raises:
        CallError: the call failed; of a stream the file keeps what had come.
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        if stream or len(text) > SHORT_CHARACTERS:
            return await _stream(client, text, file, path, voice, console)
        return await _whole(client, text, file, path, voice)


async def _whole(client: Client, text: str, file: BinaryIO, path: Path, voice: str) -> Said:
    began = time.monotonic()
    response = await client.synthesize(text, voice=voice)
    total_ms = (time.monotonic() - began) * 1000
    file.write(response.audio)
    return _said(path, response.start, response.end, total_ms, total_ms)


async def _stream(client: Client, text: str, file: BinaryIO, path: Path, voice: str, console: Console) -> Said:
    began = time.monotonic()
    first_audio_ms = 0.0
    start, end = tts_pb2.StreamStart(), tts_pb2.StreamEnd()
    with _progress(console) as progress:
        task = progress.add_task(path.name, total=len(text.encode()), seconds=0.0)
        async with aclosing(client.stream(text, voice=voice)) as messages:
            async for message in messages:
                match message:
                    case tts_pb2.StreamStart():
                        first_audio_ms = (time.monotonic() - began) * 1000
                        start = message
                    case tts_pb2.AudioChunk():
                        file.write(message.data)
                    case tts_pb2.SegmentMark():
                        _show(progress, task, message, start.format.sample_rate_hertz)
                    case tts_pb2.StreamEnd():
                        end = message
    _write_length(file, start.format.sample_rate_hertz, end.sample_count)
    return _said(path, start, end, first_audio_ms, (time.monotonic() - began) * 1000)


def _write_length(file: BinaryIO, rate: int, samples: int) -> None:
    """A streamed header does not know the length; a file's can."""
    if file.seekable():
        file.seek(0)
        file.write(wav_header(Format(Container.WAV, Codec.PCM_S16LE, rate), samples))


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


def _said(
    path: Path, start: tts_pb2.StreamStart, end: tts_pb2.StreamEnd, first_audio_ms: float, total_ms: float
) -> Said:
    seconds = end.sample_count / start.format.sample_rate_hertz
    cut = end.finish_reason == tts_pb2.FINISH_REASON_LENGTH
    return Said(path, seconds, first_audio_ms, total_ms, start.engine, cut)
