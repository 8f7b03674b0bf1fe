"""Samples in FFmpeg's frames and out of them."""

from __future__ import annotations

from fractions import Fraction

from av import AudioFrame

SAMPLE_BYTES = 2


def to_frame(pcm: bytes, rate: int, start_sample: int = 0) -> AudioFrame:
    """16-bit samples, at least one, as a frame. `rate`: in hertz."""
    frame = AudioFrame(format="s16", layout="mono", samples=len(pcm) // SAMPLE_BYTES)
    frame.planes[0].update(pcm)
    frame.sample_rate = rate
    frame.time_base = Fraction(1, rate)
    frame.pts = start_sample
    return frame


def to_pcm(frame: AudioFrame) -> bytes:
    """A frame's 16-bit samples. Its buffer may be longer."""
    return bytes(frame.planes[0])[: frame.samples * SAMPLE_BYTES]
