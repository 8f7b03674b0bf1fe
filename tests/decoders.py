"""Decoders that are not ours: libsndfile, and a build of FFmpeg of its own (the only one for AAC)."""

from __future__ import annotations

import io
import subprocess

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import soundfile

from audio.formats import Codec, Container, Format

Samples = npt.NDArray[np.int16]

RAW_SUBTYPES = {Codec.PCM_S16LE: "PCM_16", Codec.MULAW: "ULAW", Codec.ALAW: "ALAW"}
RAW_DEMUXERS = {Codec.PCM_S16LE: "s16le", Codec.MULAW: "mulaw", Codec.ALAW: "alaw"}
DEMUXERS = {Container.ADTS: "aac"}


def by_libsndfile(data: bytes, format: Format) -> Samples:
    """Samples at the format's rate, from any container but ADTS. It wants to be told how long a FLAC file is."""
    raw: dict[str, object] = {}
    if format.container is Container.RAW:
        raw = {
            "format": "RAW",
            "subtype": RAW_SUBTYPES[format.codec],
            "samplerate": format.sample_rate_hertz,
            "channels": 1,
        }
    samples, rate = soundfile.read(io.BytesIO(data), dtype="int16", **raw)
    assert rate == format.sample_rate_hertz
    assert isinstance(samples, np.ndarray)
    assert samples.ndim == 1
    return samples


def by_ffmpeg(data: bytes, format: Format) -> Samples:
    """Samples at the format's rate, at 48 kHz for Opus, from the start of a file that may be cut anywhere."""
    name = format.container.name.lower()
    source = ["-f", DEMUXERS.get(format.container, name)]
    if format.container is Container.RAW:
        source = ["-f", RAW_DEMUXERS[format.codec], "-ar", str(format.sample_rate_hertz)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", *source, "-i", "-", "-f", "s16le", "-ac", "1", "-"]
    done = subprocess.run(command, input=data, capture_output=True, check=True, timeout=60)
    return np.frombuffer(done.stdout[: len(done.stdout) // 2 * 2], "<i2")
