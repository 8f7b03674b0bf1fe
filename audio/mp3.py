"""MP3, through LAME itself: the one in PyAV's wheels is built without vector code, and a quarter as fast."""

from __future__ import annotations

import lameenc

from audio.formats import Format
from audio.frames import SAMPLE_BYTES

QUALITY = 7
"""LAME's: 1.7 times as fast as 5, twice 3 and 4 times 2, the default here, and closer to the source by correlation."""

LOWEST_MPEG1_RATE = 32_000
"""Hertz. Below it frames have half as many samples (ISO/IEC 13818-3)."""

FIRST_FRAMES = 2
"""Players take nothing for MP3 that has fewer."""

HEADER_BYTES = 4
PADDING_BIT = 0x02
"""Of a frame header's third byte: the frame is a byte longer."""


class Mp3Coder:
    """Bare frames of constant bit rate, without the frame of facts (Xing, Info) that only a whole file could fill.

    LAME counts samples, however they come, and lets go of Python's lock while it works. Bytes are given in whole
    frames: the last sample of one can be heard once its last byte is there.
    """

    def __init__(self, format: Format) -> None:
        self.samples = 0
        self._delay = format.delay_samples
        self._frame_samples = 1152 if format.sample_rate_hertz >= LOWEST_MPEG1_RATE else 576
        self._frame_bytes = self._frame_samples * format.bits_per_second // 8 // format.sample_rate_hertz
        self._lame: lameenc.Encoder | None = _lame(format)
        self._coded = bytearray()
        """Not given yet."""
        self._framed = 0
        """Of these, bytes in whole frames."""
        self._taken = 0
        self._frames = 0
        """Whole ones, in all."""

    def encode(self, pcm: bytes) -> bytes:
        """The frames that are complete. The codec's lead-in waits for the first sound, and for a second frame."""
        if pcm:
            assert self._lame is not None
            self._taken += len(pcm) // SAMPLE_BYTES
            self._add(self._lame.encode(pcm))
        if self._frames >= FIRST_FRAMES:
            self.samples = min(self._taken, max(0, self._frames * self._frame_samples - self._delay))
        return self._give() if self.samples else b""

    def finish(self) -> bytes:
        """The rest, with the codec's padding."""
        if self._taken:
            assert self._lame is not None
            self._add(self._lame.flush())
        self.samples = self._taken
        return self._give()

    def close(self) -> None:
        """Releases LAME."""
        self._lame = None

    def _add(self, coded: bytearray) -> None:
        self._coded += coded
        while len(self._coded) >= self._framed + HEADER_BYTES:
            padding = bool(self._coded[self._framed + 2] & PADDING_BIT)
            end = self._framed + self._frame_bytes + padding
            if end > len(self._coded):
                return
            self._framed = end
            self._frames += 1

    def _give(self) -> bytes:
        data = bytes(self._coded[: self._framed])
        del self._coded[: self._framed]
        self._framed = 0
        return data


def _lame(format: Format) -> lameenc.Encoder:
    lame = lameenc.Encoder()
    lame.silence()
    lame.set_channels(1)
    lame.set_in_sample_rate(format.sample_rate_hertz)
    lame.set_out_sample_rate(format.sample_rate_hertz)
    lame.set_bit_rate(format.bits_per_second // 1000)
    lame.set_quality(QUALITY)
    return lame
