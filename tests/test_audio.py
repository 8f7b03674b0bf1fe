"""Formats and their headers."""

from __future__ import annotations

import io
import struct
import wave

import pytest

from audio.encode import Encoder
from audio.formats import RATES, SERVED, Codec, Container, Format, FormatError, resolve, serves_rate
from audio.headers import WAV_HEADER_BYTES, wav_header, with_known_length

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
        (Container.WAV, Codec.MULAW, 0, Format(Container.WAV, Codec.MULAW, 8_000)),
        (Container.OGG, None, 0, Format(Container.OGG, Codec.OPUS, RATE)),
        (Container.MP3, None, 44_100, Format(Container.MP3, Codec.MP3, 44_100)),
        (Container.FLAC, None, 12_345, Format(Container.FLAC, Codec.FLAC, 12_345)),
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
        (Container.OGG, Codec.OPUS, 22_050, ["sample_rate_hertz"]),
        (Container.RAW, Codec.ALAW, RATE, ["sample_rate_hertz"]),
        (Container.MP3, None, 9_600, ["sample_rate_hertz"]),
        (None, None, 7_999, ["sample_rate_hertz"]),
        (None, None, 48_001, ["sample_rate_hertz"]),
    ],
)
def test_every_fault_is_named(container: Container | None, codec: Codec | None, rate: int, faulty: list[str]) -> None:
    with pytest.raises(FormatError) as caught:
        resolve(container, codec, rate, RATE)
    assert [field for field, _ in caught.value.faults] == faulty
    assert all(field in str(caught.value) for field in faulty)


@pytest.mark.parametrize("engine_rate", [22_050, RATE])
@pytest.mark.parametrize(("container", "codec"), SERVED)
def test_what_is_served_can_be_asked_for(container: Container, codec: Codec, engine_rate: int) -> None:
    format = resolve(container, codec, 0, engine_rate)
    assert (format.container, format.codec) == (container, codec)
    assert serves_rate(codec, format.sample_rate_hertz)
    assert format.sample_rate_hertz >= engine_rate or codec in (Codec.MULAW, Codec.ALAW)


@pytest.mark.parametrize("codec", RATES)
def test_a_rate_that_a_codec_does_not_take_is_told_with_those_that_it_does(codec: Codec) -> None:
    container = next(container for container, served in SERVED if served is codec)
    with pytest.raises(FormatError) as caught:
        resolve(container, codec, 9_999, RATE)
    assert all(str(rate) in str(caught.value) for rate in RATES[codec])


def test_an_engine_faster_than_a_codec_gets_its_highest_rate() -> None:
    assert resolve(Container.OGG, None, 0, 96_000).sample_rate_hertz == 48_000


@pytest.mark.parametrize(("engine_rate", "rate"), [(22_050, 8_000), (22_050, 48_000), (24_000, 11_025)])
def test_spans_stay_contiguous_at_another_rate(engine_rate: int, rate: int) -> None:
    format = Format(Container.RAW, Codec.PCM_S16LE, rate)
    places = [format.at_rate(sample, engine_rate) for sample in range(1000)]
    assert places[0] == 0
    assert places == sorted(places)
    assert all(0 <= place - k * rate / engine_rate < 1 for k, place in enumerate(places))
    assert format.at_rate(engine_rate, engine_rate) == rate


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
    encoder = Encoder(WAV, RATE)
    assert encoder.encode(b"ab") == wav_header(WAV) + b"ab"
    assert encoder.encode(b"cd") == b"cd"
    assert Encoder(RAW, RATE).encode(b"ab") == b"ab"


def test_the_length_is_put_in_where_the_container_has_one() -> None:
    assert with_known_length(wav_header(WAV) + b"abcd", WAV, 2) == wav_header(WAV, 2) + b"abcd"
    assert with_known_length(b"abcd", RAW, 2) == b"abcd"


@pytest.mark.parametrize("samples", [0, 1, 8_000])
@pytest.mark.parametrize(("codec", "tag"), [(Codec.ALAW, 6), (Codec.MULAW, 7)])
def test_a_header_of_a_companded_file(codec: Codec, tag: int, samples: int) -> None:
    format = Format(Container.WAV, codec, 8_000)
    file = with_known_length(wav_header(format) + bytes(samples), format, samples)
    assert len(file) % 2 == 0
    assert struct.unpack_from("<4sI4s", file) == (b"RIFF", len(file) - 8, b"WAVE")
    assert struct.unpack_from("<4sIHHIIHHH", file, 12) == (b"fmt ", 18, tag, 1, 8_000, 8_000, 1, 8, 0)
    assert struct.unpack_from("<4sII", file, 38) == (b"fact", 4, samples)
    assert struct.unpack_from("<4sI", file, 50) == (b"data", samples)
