"""Headers that tell how long a file is, or that it is not known yet."""

from __future__ import annotations

import struct

from audio.formats import Codec, Container, Format

UNKNOWN_SIZE = 0xFFFF_FFFF
"""In a WAV header that is sent before the length is known: players then read to the end."""

WAV_HEADER_BYTES = 44
"""With PCM_S16LE. With μ-law and A-law it is `G711_HEADER_BYTES`."""
G711_HEADER_BYTES = 58

TAGS = {Codec.PCM_S16LE: 1, Codec.ALAW: 6, Codec.MULAW: 7}
"""WAVE_FORMAT_PCM, _ALAW, _MULAW."""

FLAC_LENGTH = slice(21, 26)
"""Of a FLAC file: 4 bits of something else, then the number of samples in 36 bits, 0 where it is unknown."""


def wav_header(format: Format, samples: int | None = None) -> bytes:
    """The header of a WAV file of so many samples; of unknown length where `samples` is `None`."""
    size = UNKNOWN_SIZE if samples is None else samples * format.bytes_per_sample
    chunks = _fmt(format)
    if format.codec is not Codec.PCM_S16LE:  # the standard wants it for all others
        chunks += struct.pack("<4sII", b"fact", 4, UNKNOWN_SIZE if samples is None else samples)
    riff_size = UNKNOWN_SIZE if samples is None else 4 + len(chunks) + 8 + size + size % 2
    return struct.pack("<4sI4s", b"RIFF", riff_size, b"WAVE") + chunks + struct.pack("<4sI", b"data", size)


def with_known_length(audio: bytes, format: Format, samples: int) -> bytes:
    """A whole encoded speech, with its length in the header where the container has one."""
    match format.container:
        case Container.WAV:
            header = wav_header(format, samples)
            padding = b"\0" * (samples * format.bytes_per_sample % 2)  # chunks have even lengths
            return header + audio[len(header) :] + padding
        case Container.FLAC:
            length = int.from_bytes(audio[FLAC_LENGTH], "big") >> 36 << 36 | samples
            return audio[: FLAC_LENGTH.start] + length.to_bytes(5, "big") + audio[FLAC_LENGTH.stop :]
        case _:
            return audio


def _fmt(format: Format) -> bytes:
    rate, width = format.sample_rate_hertz, format.bytes_per_sample
    fields = struct.pack("<HHIIHH", TAGS[format.codec], 1, rate, rate * width, width, 8 * width)
    if format.codec is not Codec.PCM_S16LE:
        fields += struct.pack("<H", 0)  # no more fields
    return struct.pack("<4sI", b"fmt ", len(fields)) + fields
