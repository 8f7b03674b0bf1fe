"""Formats and their headers."""

from __future__ import annotations

import io
import struct
import wave

import pytest

from audio.encode import WAV_HEADER_BYTES, Encoder, wav_header, with_known_length
from audio.formats import SERVED, Codec, Container, Format, FormatError, resolve

RATE = 24_000
WAV = Format(Container.WAV, Codec.PCM_S16LE, RATE)
RAW = Format(Container.RAW, Codec.PCM_S16LE, RATE)


@pytest.mark.parametrize(
    ("container", "codec", "rate", "format"),
    [
        (None, None, 0, WAV),
        (None, Codec.PCM_S16LE, RATE, WAV),
        (Container.WAV, None, 0, WAV),
        (Container.RAW, None, RATE, RAW),
        (Container.RAW, Codec.PCM_S16LE, 0, RAW),
    ],
)
def test_what_is_left_open_gets_its_default(
    container: Container | None, codec: Codec | None, rate: int, format: Format
) -> None:
    assert resolve(container, codec, rate, RATE) == format


@pytest.mark.parametrize(
    ("container", "codec", "rate", "faulty"),
    [
        (None, Codec.OPUS, 0, ["codec"]),
        (Container.WAV, Codec.MP3, 0, ["codec"]),
        (Container.RAW, Codec.FLAC, -1, ["codec", "sample_rate_hertz"]),
        (Container.OGG, None, 0, ["container"]),
        (Container.OGG, Codec.OPUS, 8_000, ["container", "sample_rate_hertz"]),
        (None, None, RATE + 1, ["sample_rate_hertz"]),
    ],
)
def test_every_fault_is_named(container: Container | None, codec: Codec | None, rate: int, faulty: list[str]) -> None:
    with pytest.raises(FormatError) as caught:
        resolve(container, codec, rate, RATE)
    assert [field for field, _ in caught.value.faults] == faulty
    assert all(field in str(caught.value) for field in faulty)


def test_what_is_served_can_be_asked_for() -> None:
    for container, codec in SERVED:
        assert resolve(container, codec, 0, RATE) == Format(container, codec, RATE)


@pytest.mark.parametrize("samples", [0, 1, 24_000])
@pytest.mark.parametrize("rate", [8_000, 24_000, 48_000])
def test_a_header_of_known_length_is_read_by_others(samples: int, rate: int) -> None:
    header = wav_header(Format(Container.WAV, Codec.PCM_S16LE, rate), samples)
    assert len(header) == WAV_HEADER_BYTES
    with wave.open(io.BytesIO(header + bytes(2 * samples))) as file:
        assert file.getparams()[:4] == (1, 2, rate, samples)


def test_a_header_of_unknown_length_has_the_largest_sizes() -> None:
    header = wav_header(WAV)
    assert struct.unpack_from("<I", header, 4) == struct.unpack_from("<I", header, 40) == (2**32 - 1,)


def test_the_header_comes_once_with_the_first_samples() -> None:
    encoder = Encoder(WAV)
    assert encoder.encode(b"ab") == wav_header(WAV) + b"ab"
    assert encoder.encode(b"cd") == b"cd"
    assert Encoder(RAW).encode(b"ab") == b"ab"


def test_the_length_is_put_in_where_the_container_has_one() -> None:
    assert with_known_length(wav_header(WAV) + b"abcd", WAV, 2) == wav_header(WAV, 2) + b"abcd"
    assert with_known_length(b"abcd", RAW, 2) == b"abcd"
