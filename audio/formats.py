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
    (Container.RAW, Codec.PCM_S16LE),
)
"""What can be encoded; the first codec of a container is its default."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format in effect. One channel."""

    container: Container
    codec: Codec
    sample_rate_hertz: int

    @property
    def bytes_per_sample(self) -> int:
        """Of the coded samples."""
        return 2


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
    if not codecs:
        faults.append(("container", f"{wanted.name} is not served; served are {_names(c for c, _ in SERVED)}"))
    elif codec is not None and codec not in codecs:
        faults.append(("codec", f"{codec.name} does not go into {wanted.name}; it takes {_names(codecs)}"))
    if rate not in (0, engine_rate):
        faults.append(("sample_rate_hertz", f"{rate} is not served; leave it out, or ask for {engine_rate}"))
    if faults:
        raise FormatError(faults)
    return Format(wanted, codec or codecs[0], engine_rate)


def _names(values: Iterable[Enum]) -> str:
    return ", ".join(value.name for value in dict.fromkeys(values))
