"""Changes the sample rate of a stream, through libswresample.

The filter: 128 taps at the lower rate, Kaiser window (β 10), cut off at 97 % of the band, in 32-bit floats. Measured
with tones: flat to 0.01 dB up to 90 % of the band; what would alias is below -90 dB from 102 % on; the rest is the
rounding to 16 bits. libsoxr is as good and faster, but its Python package brings numpy, which a gateway has no other
need for.
"""

from __future__ import annotations

import math

from av import AudioFrame
from av.filter import Graph

from audio.frames import SAMPLE_BYTES, to_frame, to_pcm

FILTER = {
    "filter_size": "128",
    "filter_type": "kaiser",
    "kaiser_beta": "10",
    "cutoff": "0.97",
    "exact_rational": "1",
    "internal_sample_fmt": "fltp",
}

MARGIN_SECONDS = 0.1
"""Silence put around the audio: longer than the filter reaches at any rate. Without it the library would mirror the
audio at its ends, and give fewer samples than it should."""


class Resampler:
    """Resamples one stream of 16-bit samples.

    n samples give ⌈n · to ÷ from⌉, sample k of the result being the sound at k ÷ to seconds: there is no delay. However
    the stream is cut into pieces, the result is the same, bit for bit. One thread at a time may use it.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        """Rates in hertz."""
        self._rates = (from_rate, to_rate)
        self._graph = Graph()
        self._graph.threads = 1
        self._source = self._graph.add(
            "abuffer",
            sample_rate=str(from_rate),
            sample_fmt="s16",
            channel_layout="mono",
            time_base=f"1/{from_rate}",
        )
        resample = self._graph.add("aresample", sample_rate=str(to_rate), **FILTER)
        convert = self._graph.add("aformat", sample_fmts="s16")
        self._sink = self._graph.add("abuffersink")
        self._graph.link_nodes(self._source, resample, convert, self._sink).configure()
        self._taken = 0
        self._given = 0
        self._skip = 0
        """Samples of the silence before that are still to come out."""

    def resample(self, pcm: bytes) -> bytes:
        """The next samples, as far as they are certain. A few milliseconds are kept back."""
        if not pcm:
            return b""
        if not self._taken:
            self._lead_in()
        self._taken += len(pcm) // SAMPLE_BYTES
        self._push(pcm)
        return self._pull()

    def finish(self) -> bytes:
        """The rest of the samples. Nothing may follow."""
        if not self._taken:
            return b""
        self._push(bytes(SAMPLE_BYTES * math.ceil(MARGIN_SECONDS * self._rates[0])))
        from_rate, to_rate = self._rates
        left = -(-self._taken * to_rate // from_rate) - self._given
        return self._pull()[: left * SAMPLE_BYTES]

    def _lead_in(self) -> None:
        """Starts with so much silence that it becomes a whole number of samples."""
        from_rate, to_rate = self._rates
        period = from_rate // math.gcd(from_rate, to_rate)
        silence = period * math.ceil(MARGIN_SECONDS * from_rate / period)
        self._skip = silence * to_rate // from_rate
        self._push(bytes(silence * SAMPLE_BYTES))

    def _push(self, pcm: bytes) -> None:
        self._source.push(to_frame(pcm, self._rates[0]))

    def _pull(self) -> bytes:
        pieces = []
        while (frame := self._next()) is not None:
            pieces.append(to_pcm(frame))
        pcm = b"".join(pieces)
        skipped = min(self._skip, len(pcm) // SAMPLE_BYTES)
        self._skip -= skipped
        pcm = pcm[skipped * SAMPLE_BYTES :]
        self._given += len(pcm) // SAMPLE_BYTES
        return pcm

    def _next(self) -> AudioFrame | None:
        try:
            frame = self._sink.pull()
        except BlockingIOError:  # FFmpeg's "not yet"
            return None
        assert isinstance(frame, AudioFrame)
        return frame
