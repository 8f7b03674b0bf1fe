"""Codecs with frames, in the containers that they are streamed in, through FFmpeg's encoders and muxers."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import av

from audio.formats import Codec, Container, Format
from audio.frames import SAMPLE_BYTES, to_frame

FLAC_FRAME_SECONDS = 0.05
"""Shorter than FLAC's usual 0.1, so that audio leaves early. It costs nothing in size."""

PAGE_MICROSECONDS = 40_000
"""Of Ogg. Audio leaves a page late, since only the last page may say that it is the last."""

OPUS_CLOCK = 48_000
"""Hertz. What Ogg counts Opus samples in, at whatever rate they went in."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a codec is used. Options are FFmpeg's."""

    encoder: str
    sample_format: str
    muxer: str
    options: Mapping[str, str] = field(default_factory=dict)
    muxer_options: Mapping[str, str] = field(default_factory=dict)


RECIPES: dict[Codec, Recipe] = {
    Codec.FLAC: Recipe("flac", "s16", "flac", {"compression_level": "5"}, {"metadata_header_padding": "0"}),
    # The other coder, twoloop, is a third as fast, and not as close.
    Codec.AAC: Recipe("aac", "fltp", "adts", {"aac_coder": "fast"}),
    # "lowdelay" keeps to Opus's transform codec. The other one, for speech at low rates, does not keep the waveform.
    Codec.OPUS: Recipe(
        "libopus",
        "s16",
        "ogg",
        {"application": "lowdelay", "vbr": "constrained", "compression_level": "5"},
        {"page_duration": str(PAGE_MICROSECONDS)},
    ),
}

EVERY_CODEC = {"flags": "+bitexact", "threads": "1"}
EVERY_MUXER = {"fflags": "+bitexact+flush_packets"}
"""bitexact: no random serial number, no version, no date."""


def encoder_options(format: Format) -> dict[str, str]:
    """What FFmpeg's encoder is told, but for sample rate and format."""
    options = {**EVERY_CODEC, **RECIPES[format.codec].options}
    if format.codec is Codec.FLAC:
        return options | {"frame_size": str(round(FLAC_FRAME_SECONDS * format.sample_rate_hertz))}
    return options | {"b": str(format.bits_per_second)}


def muxer_options(format: Format) -> dict[str, str]:
    """What FFmpeg's muxer is told."""
    return {**EVERY_MUXER, **RECIPES[format.codec].muxer_options}


class MuxedCoder:
    """FLAC, AAC and Opus. Frames are cut here and in FFmpeg by counting samples, never by how they come."""

    def __init__(self, format: Format) -> None:
        self.samples = 0
        self._format = format
        self._written = _Written()
        self._pages = _Pages(format.sample_rate_hertz) if format.container is Container.OGG else None
        recipe = RECIPES[format.codec]
        self._container = av.open(self._written, "w", format=recipe.muxer, container_options=muxer_options(format))
        stream = self._container.add_stream(
            recipe.encoder,
            rate=format.sample_rate_hertz,
            options=encoder_options(format),
            layout="mono",
            format=recipe.sample_format,
        )
        assert isinstance(stream, av.AudioStream)
        self._stream = stream
        self._taken = 0
        self._coded = 0

    def encode(self, pcm: bytes) -> bytes:
        """The frames that are complete. The header and a codec's lead-in wait for the first sound."""
        if not self._taken and pcm:
            with _one_core():
                self._feed(pcm[:SAMPLE_BYTES])
            pcm = pcm[SAMPLE_BYTES:]
        if pcm:
            self._feed(pcm)
        return self._give() if self.samples else b""

    def finish(self) -> bytes:
        """The rest, with the codec's padding."""
        if self._taken:
            self._mux(None)
        else:
            self._container.start_encoding()
        self._container.close()
        self.samples = self._taken
        return self._give()

    def close(self) -> None:
        """Releases codec and muxer, which the garbage collector alone would do late."""
        self._container.close()

    def _feed(self, pcm: bytes) -> None:
        frame = to_frame(pcm, self._format.sample_rate_hertz, self._taken)
        self._taken += frame.samples
        self._mux(frame)
        self.samples = self._audible()

    def _mux(self, frame: av.AudioFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
            self._coded += self._stream.frame_size

    def _audible(self) -> int:
        if self._pages:
            return self._pages.samples_in(self._written.data)
        return min(self._taken, max(0, self._coded - self._format.delay_samples))

    def _give(self) -> bytes:
        if self._pages:
            self._pages.forget()
        data = bytes(self._written.data)
        self._written.data.clear()
        return data


class _Written:
    """The file that FFmpeg writes to."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        """Called by FFmpeg."""
        self.data += data
        return len(data)


class _Pages:
    """Counts the samples in Ogg pages, from the positions in their headers."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._read = 0
        """Bytes of the data at hand."""
        self._lead: int | None = None
        """Samples, on Opus's clock, that a decoder drops at the start."""
        self._position = 0

    def samples_in(self, data: bytearray) -> int:
        """Samples in all pages so far. `data`: whole pages, those that were read already among them."""
        while self._read < len(data):
            table = self._read + 27
            content = table + data[table - 1]
            if self._lead is None:
                (self._lead,) = struct.unpack_from("<H", data, content + 10)
            (self._position,) = struct.unpack_from("<q", data, self._read + 6)
            self._read = content + sum(data[table:content])
        return max(0, self._position - (self._lead or 0)) * self._rate // OPUS_CLOCK

    def forget(self) -> None:
        """The data at hand is given away."""
        self._read = 0


@contextmanager
def _one_core() -> Iterator[None]:
    """Lets this thread use one core only, while the encoder takes its first sample.

    PyAV then makes a filter graph of its own, which starts up to 15 threads, as many as its maker may use cores. They
    would idle as long as the stream lasts, and there is no other switch to prevent them.
    """
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    with suppress(OSError):
        os.sched_setaffinity(0, {cores[threading.get_native_id() % len(cores)]})
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, cores)
