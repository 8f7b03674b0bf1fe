"""Encodes a speech as it comes, from the engine's samples to the bytes of a file."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from audio.coders import Coder, G711Coder, PcmCoder
from audio.formats import G711, Codec, Format
from audio.frames import SAMPLE_BYTES
from audio.mp3 import Mp3Coder
from audio.muxed import MuxedCoder
from audio.resample import Resampler


class Encoder:
    """Encodes one speech: 16-bit samples at the engine's rate, in pieces of any size, come out as one file.

    However the samples are cut into pieces, the bytes in all are the same. Bytes leave as soon as a frame of the codec
    is complete, the header together with the first. One thread at a time may use it, not always the same one.
    """

    def __init__(self, format: Format, engine_rate: int) -> None:
        """`format`: as `resolve` gives it. `engine_rate`: in hertz."""
        same_rate = format.sample_rate_hertz == engine_rate
        self._resampler = None if same_rate else Resampler(engine_rate, format.sample_rate_hertz)
        self._coder = _coder(format)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def samples(self) -> int:
        """Samples of the speech, at the format's rate, that can be heard with the bytes given so far."""
        return self._coder.samples

    def encode(self, pcm: bytes) -> bytes:
        """Takes samples (16-bit, little-endian), and gives the next bytes of the file, if there are any yet.

        Raises:
            ValueError: a sample is cut in two.
        """
        if len(pcm) % SAMPLE_BYTES:
            raise ValueError(f"{len(pcm)} bytes are no whole number of samples")
        return self._coder.encode(self._resampler.resample(pcm) if self._resampler else pcm)

    def finish(self) -> bytes:
        """The last bytes of the file. Nothing may follow but `close`."""
        rest = self._coder.encode(self._resampler.finish()) if self._resampler else b""
        return rest + self._coder.finish()

    def close(self) -> None:
        """Releases the codec. May be called at any time, and twice."""
        self._coder.close()


def costs_nothing(format: Format, engine_rate: int) -> bool:
    """Whether a format is the engine's samples as they are."""
    return format.codec is Codec.PCM_S16LE and format.sample_rate_hertz == engine_rate


def _coder(format: Format) -> Coder:
    if format.codec is Codec.PCM_S16LE:
        return PcmCoder(format)
    if format.codec is Codec.MP3:
        return Mp3Coder(format)
    return G711Coder(format) if format.codec in G711 else MuxedCoder(format)
