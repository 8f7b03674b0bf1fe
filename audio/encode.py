"""Encodes 16-bit samples as they come."""

from __future__ import annotations

import struct

from audio.formats import Container, Format

UNKNOWN_SIZE = 0xFFFF_FFFF
"""In a header that is sent before the length is known: players then read to the end."""

WAV_HEADER_BYTES = 44


class Encoder:
    """Encodes one speech: the header with the first samples, then the samples.

    Both formats of today are the samples themselves, so there is nothing to flush.
    """

    def __init__(self, format: Format) -> None:
        """`format`: as `resolve` gives it."""
        self._head = wav_header(format) if format.container is Container.WAV else b""

    def encode(self, pcm: bytes) -> bytes:
        """Samples (16-bit, little-endian) as the next bytes of the file."""
        head, self._head = self._head, b""
        return head + pcm if head else pcm


def wav_header(format: Format, samples: int | None = None) -> bytes:
    """The header of a WAV file of so many samples; of unknown length where `samples` is `None`."""
    size = UNKNOWN_SIZE if samples is None else samples * format.bytes_per_sample
    riff_size = UNKNOWN_SIZE if samples is None else size + WAV_HEADER_BYTES - 8
    rate, width = format.sample_rate_hertz, format.bytes_per_sample
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * width, width, 8 * width)
    return struct.pack("<4sI4s", b"RIFF", riff_size, b"WAVE") + fmt + struct.pack("<4sI", b"data", size)


def with_known_length(audio: bytes, format: Format, samples: int) -> bytes:
    """A whole encoded speech, with its length in the header where the container has one."""
    if format.container is not Container.WAV:
        return audio
    return wav_header(format, samples) + audio[WAV_HEADER_BYTES:]
