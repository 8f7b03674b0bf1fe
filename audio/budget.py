"""How many encoders may be open: as many as the cores can keep at the pace of real time. Arithmetic only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from audio.formats import MPEG_RATES, Codec, Format

FIRST_COSTS = {
    Codec.PCM_S16LE: 0.001,
    Codec.MULAW: 0.001,
    Codec.ALAW: 0.001,
    Codec.FLAC: 0.0015,
    Codec.MP3: 0.003,
    Codec.AAC: 0.006,
    Codec.OPUS: 0.007,
}
"""Seconds of CPU that a codec takes for a second of audio, until that is measured: a little more than it took here."""
FIRST_COSTS_RATE = 24_000
"""The rate, in hertz, at which they cost so much; at others in proportion."""
PATH_COST = 0.002
"""Seconds of CPU for a second of audio beside the codec's: the way of its pieces to the threads and to the caller, all
of it under Python's lock. Measured: 0.001 to 0.0021, in gateway and service."""
FIRST_COST_SECONDS = 5.0
"""So much audio, once measured, counts as much as the first guess."""
MEAN_SECONDS = 300.0
"""Audio that a running mean looks back on, at least half of it."""


class EncodersBusyError(Exception):
    """One encoder more, and not all could keep up."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Encoders that cost about the same. There are few kinds, whatever rates callers ask for."""

    codec: Codec
    rate: int
    """Hertz: the next higher of MPEG's rates, or the highest."""

    @classmethod
    def of(cls, format: Format) -> Kind:
        """The kind of a format's encoder."""
        rates = (rate for rate in MPEG_RATES if format.sample_rate_hertz <= rate)
        return cls(format.codec, next(rates, MPEG_RATES[-1]))


@dataclass(slots=True)
class Mean:
    """What a kind has cost of late. Both in seconds."""

    cpu: float
    audio: float

    def add(self, cpu: float, audio: float) -> None:
        """Counts what was done; what lies further back counts less."""
        self.cpu += cpu
        self.audio += audio
        if self.audio > MEAN_SECONDS:
            self.cpu /= 2
            self.audio /= 2


class Budget:
    """What the open encoders of a process would need, all at the pace of real time, beside what they may. In cores.

    What they need of Python, whose lock lets one core run it, has a bound of its own.
    """

    def __init__(self, share: float, cores: int) -> None:
        """`share`: of the process's cores, and of the one that runs Python."""
        self.max_load = share * cores
        self.max_open = int(share / PATH_COST)
        self.refused = 0
        self.cpu_seconds: dict[Codec, float] = dict.fromkeys(Codec, 0.0)
        """That encoders have used."""
        self.audio_seconds: dict[Codec, float] = dict.fromkeys(Codec, 0.0)
        """That they have encoded."""
        self._open: Counter[Kind] = Counter()
        self._means: dict[Kind, Mean] = {}

    @property
    def open(self) -> int:
        """Encoders that are open."""
        return self._open.copy().total()

    @property
    def load(self) -> float:
        """Cores that the open encoders need."""
        # A copy, since metrics are read on another thread.
        return sum(count * self.cost(kind) for kind, count in self._open.copy().items())

    def cost(self, kind: Kind) -> float:
        """Seconds of CPU that a second of audio costs, the way to its caller included."""
        mean = self._mean(kind)
        return mean.cpu / mean.audio + PATH_COST

    def take(self, kind: Kind) -> None:
        """Opens an encoder. The first is always let in, whatever it costs.

        Raises:
            EncodersBusyError: with it, not all could keep up.
        """
        if self._open and (self.load + self.cost(kind) > self.max_load or self.open >= self.max_open):
            self.refused += 1
            raise EncodersBusyError(f"{self.open} encoders are open")
        self._open[kind] += 1

    def give(self, kind: Kind) -> None:
        """Closes an encoder that was taken."""
        self._open[kind] -= 1
        if not self._open[kind]:
            del self._open[kind]

    def move(self, kind: Kind, to: Kind) -> None:
        """Turns an encoder that was taken into one of another kind."""
        self.give(kind)
        self._open[to] += 1

    def measured(self, kind: Kind, cpu_seconds: float, audio_seconds: float) -> None:
        """Learns what a piece of audio has cost a codec; the end of a file is a piece without audio."""
        self.cpu_seconds[kind.codec] += cpu_seconds
        self.audio_seconds[kind.codec] += audio_seconds
        self._mean(kind).add(cpu_seconds, audio_seconds)

    def _mean(self, kind: Kind) -> Mean:
        if kind not in self._means:
            cost = FIRST_COSTS[kind.codec] * kind.rate / FIRST_COSTS_RATE
            self._means[kind] = Mean(cost * FIRST_COST_SECONDS, FIRST_COST_SECONDS)
        return self._means[kind]
