"""The resampler: its filter, its ends, its borders. Levels are in decibels below the tone that went in."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.resample import Resampler
from tests.spoken import RATE, speech

Signal = npt.NDArray[np.float64]

ENGINE_RATES = (22_050, 24_000)
RATES = (8_000, 8_001, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_056, 44_100, 47_999, 48_000)
PAIRS = [(source, target) for source in ENGINE_RATES for target in RATES if source != target]
AMPLITUDE = 16_000
SEED = np.random.default_rng(7)
NOISE = SEED.integers(-(2**15), 2**15, 30_000, dtype=np.int16).astype("<i2").tobytes()

every_pair = pytest.mark.parametrize(("source", "target"), PAIRS)


def resampled(pcm: bytes, source: int, target: int, *sizes: int) -> bytes:
    """In pieces of so many samples, the rest in one."""
    resampler = Resampler(source, target)
    ends = [0, *np.cumsum(sizes, dtype=int).tolist(), len(pcm)]
    pieces = [resampler.resample(pcm[2 * start : 2 * end]) for start, end in pairwise(ends)]
    return b"".join([*pieces, resampler.finish()])


def tone(hertz: float, rate: int, seconds: float = 0.5) -> bytes:
    places = np.arange(int(rate * seconds)) / rate
    return np.round(AMPLITUDE * np.sin(2 * np.pi * hertz * places + 0.3)).astype("<i2").tobytes()


def middle(pcm: bytes) -> Signal:
    """Without what the ends of a tone, which is cut off there, do to it."""
    samples = np.frombuffer(pcm, "<i2").astype(float)
    return samples[len(samples) // 8 : -len(samples) // 8]


def decibels(signal: Signal) -> float:
    """Over the tone's level."""
    return float(20 * np.log10(max(np.sqrt(np.mean(signal**2)) / (AMPLITUDE / np.sqrt(2)), 1e-9)))


@every_pair
@pytest.mark.parametrize("samples", [1, 2, 63, 441, 1_000, 5_000])
def test_the_length_is_exact(source: int, target: int, samples: int) -> None:
    assert len(resampled(NOISE[: 2 * samples], source, target)) == 2 * -(-samples * target // source)


@every_pair
def test_a_tone_stays_the_tone_that_it_was(source: int, target: int) -> None:
    for hertz in (50, 1_000, 0.45 * min(source, target)):
        ideal = tone(hertz, target)
        out = resampled(tone(hertz, source), source, target)[: len(ideal)]
        assert decibels(middle(out) - middle(ideal)) < -80  # level, phase, images, noise


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] > pair[1]])
def test_what_cannot_be_kept_does_not_come_back_as_something_else(source: int, target: int) -> None:
    for share in np.linspace(1.03, source / target - 0.01, 8):
        assert decibels(middle(resampled(tone(share * target / 2, source), source, target))) < -80


@settings(max_examples=60, deadline=None)
@given(pair=st.sampled_from(PAIRS), sizes=st.lists(st.integers(0, 900), max_size=16))
def test_pieces_of_any_size_make_no_difference(pair: tuple[int, int], sizes: list[int]) -> None:
    pcm = NOISE[: 2 * (sum(sizes) + 500)]
    assert resampled(pcm, *pair, *sizes) == resampled(pcm, *pair)


@pytest.mark.parametrize(("source", "target"), [(22_050, 8_000), (22_050, 48_000)])
def test_pieces_of_one_sample_make_no_difference(source: int, target: int) -> None:
    pcm = NOISE[:2000]
    assert resampled(pcm, source, target, *[1] * 1000) == resampled(pcm, source, target)


@every_pair
def test_what_comes_early_is_nearly_all(source: int, target: int) -> None:
    pcm = NOISE[: 2 * source // 10]
    assert len(Resampler(source, target).resample(pcm)) >= 2 * target * 0.08


@pytest.mark.parametrize("target", [rate for rate in RATES if rate != RATE])
def test_speech_is_what_an_ideal_filter_makes_of_it(target: int) -> None:
    pcm = speech("en-US")[: 2 * 2 * RATE]
    out = spectrum(resampled(pcm, RATE, target))
    ideal = spectrum(pcm)
    kept = int(0.9 * min(RATE, target))  # two seconds: two bins a hertz
    assert len(out) > kept
    difference = out[:kept] * RATE / target - ideal[:kept]
    assert np.linalg.norm(difference) < 5e-4 * np.linalg.norm(ideal[:kept])


def spectrum(pcm: bytes) -> npt.NDArray[np.complex128]:
    """Its ends are faded, so that they do not matter."""
    samples = np.frombuffer(pcm, "<i2").astype(float)
    return np.fft.rfft(samples * np.hanning(len(samples)))


@every_pair
def test_extremes(source: int, target: int) -> None:
    assert resampled(b"", source, target) == b""
    assert not any(resampled(bytes(8_000), source, target))
    loudest = np.repeat(np.array([32_767, -32_768] * 4, "<i2"), 500)
    out = np.frombuffer(resampled(loudest.tobytes(), source, target), "<i2")
    inside = [out[(k * 500 + 100) * target // source : (k * 500 + 400) * target // source] for k in range(8)]
    assert all((np.sign(part) == (1, -1)[k % 2]).all() for k, part in enumerate(inside))  # clipped, never wrapped
