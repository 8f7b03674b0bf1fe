"""The formats that audio can be delivered in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Container(Enum):
    """What the audio is wrapped in. Names as in the contract."""

    WAV = "WAV"
    RAW = "RAW"
    OGG = "OGG"
    MP3 = "MP3"
    FLAC = "FLAC"
    ADTS = "ADTS"


class Codec(Enum):
    """How the samples are coded. Names as in the contract."""

    PCM_S16LE = "PCM_S16LE"
    OPUS = "OPUS"
    MP3 = "MP3"
    FLAC = "FLAC"
    AAC = "AAC"
    MULAW = "MULAW"
    ALAW = "ALAW"


SERVED: tuple[tuple[Container, Codec], ...] = (
    (Container.WAV, Codec.PCM_S16LE),
    (Container.WAV, Codec.MULAW),
    (Container.WAV, Codec.ALAW),
    (Container.RAW, Codec.PCM_S16LE),
    (Container.RAW, Codec.MULAW),
    (Container.RAW, Codec.ALAW),
    (Container.OGG, Codec.OPUS),
    (Container.MP3, Codec.MP3),
    (Container.FLAC, Codec.FLAC),
    (Container.ADTS, Codec.AAC),
)
"""What can be encoded; the first codec of a container is its default."""

LOWEST_RATE, HIGHEST_RATE = 8_000, 48_000
"""Hertz. Codecs that are not in `RATES` take every rate between them."""

MPEG_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)

RATES: dict[Codec, tuple[int, ...]] = {
    Codec.OPUS: (8_000, 12_000, 16_000, 24_000, 48_000),
    Codec.MP3: MPEG_RATES,
    Codec.AAC: MPEG_RATES,
    Codec.MULAW: (8_000,),
    Codec.ALAW: (8_000,),
}
"""The rates, in hertz, that codecs are bound to, rising."""

G711 = (Codec.MULAW, Codec.ALAW)

BIT_RATES = ((8_000, 32_000), (16_000, 48_000), (24_000, 64_000), (HIGHEST_RATE, 96_000))
"""Up to which sample rate (hertz) lossy codecs get how many bits a second: speech is transparent, and its waveform is
kept."""

BYTES_MARGIN = {Codec.OPUS: 1.35, Codec.MP3: 1.02, Codec.AAC: 1.6, Codec.FLAC: 1.02}
"""By how much coded audio may exceed its nominal rate (white noise at full scale, headers included)."""

DELAY_SAMPLES = {Codec.MP3: 1105, Codec.AAC: 1024}
"""Samples that a decoder gives before the first one of the speech, where the container cannot tell it to drop them."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format in effect. One channel."""

    container: Container
    codec: Codec
    sample_rate_hertz: int

    @property
    def bytes_per_sample(self) -> int:
        """Of the coded samples, where each is coded by itself; else of those that go in."""
        return 1 if self.codec in G711 else 2

    @property
    def bits_per_second(self) -> int:
        """What a lossy codec aims at; of the others, what they take at most but for headers."""
        if self.codec not in (Codec.OPUS, Codec.MP3, Codec.AAC):
            return 8 * self.bytes_per_sample * self.sample_rate_hertz
        return next(bits for rate, bits in BIT_RATES if self.sample_rate_hertz <= rate)

    @property
    def bytes_per_second(self) -> float:
        """At most so many for a second of audio, headers at the start not counted."""
        return self.bits_per_second / 8 * BYTES_MARGIN.get(self.codec, 1.0)

    @property
    def delay_samples(self) -> int:
        """Samples that a decoder gives before the first one of the speech."""
        return DELAY_SAMPLES.get(self.codec, 0)

    def at_rate(self, engine_sample: int, engine_rate: int) -> int:
        """The place of an engine's sample in this format: rounded up, as the length of resampled audio is.

        Spans that touch still touch, and the end of all is the number of samples delivered. Rates in hertz.
        """
        return -(-engine_sample * self.sample_rate_hertz // engine_rate)


class FormatError(ValueError):
    """Container, codec and rate that don't go together."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        """`faults`: names of fields and what is wrong with them."""
        super().__init__("; ".join(f"{field}: {description}" for field, description in faults))
        self.faults = tuple(faults)


def resolve(container: Container | None, codec: Codec | None, rate: int, engine_rate: int) -> Format:
    """The format in effect for what was asked, `None` and 0 meaning not set. Rates in hertz.

    Raises:
        FormatError: names every field that is wrong.
    """
    faults = []
    wanted = container or Container.WAV
    codecs = [served for holder, served in SERVED if holder is wanted]
    if codec is not None and codec not in codecs:
        faults.append(("codec", f"{codec.name} does not go into {wanted.name}; it takes {_names(codecs)}"))
    coded = codec or codecs[0]
    if rate and not serves_rate(coded, rate):
        faults.append(("sample_rate_hertz", f"{rate} is not served for {coded.name}; served are {_rates(coded)}"))
    if faults:
        raise FormatError(faults)
    return Format(wanted, coded, rate or default_rate(coded, engine_rate))


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asks for, `None` and 0 meaning not set. What it comes to depends on the engine's rate."""

    container: Container | None = None
    codec: Codec | None = None
    sample_rate_hertz: int = 0

    def at(self, engine_rate: int) -> Format:
        """The format in effect. Rate in hertz.

        Raises:
            FormatError: names every field that is wrong. Which ones does not depend on the engine's rate.
        """
        return resolve(self.container, self.codec, self.sample_rate_hertz, engine_rate)


def serves_rate(codec: Codec, rate: int) -> bool:
    """Whether a codec takes a rate, in hertz."""
    return rate in RATES[codec] if codec in RATES else LOWEST_RATE <= rate <= HIGHEST_RATE


def default_rate(codec: Codec, engine_rate: int) -> int:
    """The engine's own rate, or the next higher one that the codec takes, so that nothing is lost; else its highest."""
    rates = RATES.get(codec, (engine_rate,))
    return next((rate for rate in rates if rate >= engine_rate), rates[-1])


def _rates(codec: Codec) -> str:
    if codec in RATES:
        return ", ".join(str(rate) for rate in RATES[codec])
    return f"{LOWEST_RATE} to {HIGHEST_RATE}"


def _names(values: Iterable[Enum]) -> str:
    return ", ".join(value.name for value in dict.fromkeys(values))
