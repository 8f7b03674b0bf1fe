"""What turns samples at the format's own rate into bytes, sample by sample. Codecs with frames are in `muxed.py`."""

from __future__ import annotations

from typing import Protocol

from av.audio.codeccontext import AudioCodecContext
from av.codec import CodecContext

from audio.formats import Container, Format
from audio.frames import SAMPLE_BYTES, to_frame
from audio.headers import wav_header

FRAME_SECONDS = 0.02
"""Of G.711, as telephony sends it: 160 bytes."""


class Coder(Protocol):
    """Codes one speech. One thread at a time may use it."""

    samples: int
    """Samples that a decoder gets out of the bytes given so far."""

    def encode(self, pcm: bytes) -> bytes:
        """The bytes that can be given, with more samples at hand."""
        ...

    def finish(self) -> bytes:
        """The rest. Nothing may follow but `close`."""
        ...

    def close(self) -> None:
        """Releases everything. May be called twice."""
        ...


class PcmCoder:
    """The samples themselves, a header before them."""

    def __init__(self, format: Format) -> None:
        self.samples = 0
        self._head = wav_header(format) if format.container is Container.WAV else b""

    def encode(self, pcm: bytes) -> bytes:
        """The samples."""
        head, self._head = self._head, b""
        self.samples += len(pcm) // SAMPLE_BYTES
        return head + pcm if head else pcm

    def finish(self) -> bytes:
        """The header, if there were no samples."""
        return self.encode(b"")

    def close(self) -> None:
        """Nothing is held."""


class G711Coder:
    """μ-law and A-law, in whole frames of 20 ms; the last one may be shorter, so that the length stays exact."""

    def __init__(self, format: Format) -> None:
        self.samples = 0
        self._head = wav_header(format) if format.container is Container.WAV else b""
        self._rate = format.sample_rate_hertz
        self._frame_bytes = round(FRAME_SECONDS * self._rate) * SAMPLE_BYTES
        self._rest = b""
        codec = CodecContext.create(f"pcm_{format.codec.name.lower()}", "w")
        assert isinstance(codec, AudioCodecContext)
        self._codec = codec
        self._codec.sample_rate = self._rate
        self._codec.format = "s16"
        self._codec.layout = "mono"

    def encode(self, pcm: bytes) -> bytes:
        """The frames that are complete."""
        pcm = self._rest + pcm
        whole = len(pcm) - len(pcm) % self._frame_bytes
        self._rest = pcm[whole:]
        return self._code(pcm[:whole]) if whole else b""

    def finish(self) -> bytes:
        """The last frame, or the header, if there were no samples."""
        rest, self._rest = self._rest, b""
        return self._code(rest)

    def close(self) -> None:
        """The codec holds nothing but itself."""

    def _code(self, pcm: bytes) -> bytes:
        head, self._head = self._head, b""
        self.samples += len(pcm) // SAMPLE_BYTES
        packets = self._codec.encode(to_frame(pcm, self._rate)) if pcm else []
        return head + b"".join(bytes(packet) for packet in packets)
