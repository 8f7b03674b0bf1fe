"""Encoders: decoded again by others, cut anywhere, fed in any pieces."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import background
from audio.background import BackgroundEncoder
from audio.budget import Budget
from audio.encode import Encoder, costs_nothing
from audio.formats import G711, RATES, SERVED, Codec, Container, Format, resolve
from audio.headers import with_known_length
from tests.decoders import Samples, by_ffmpeg, by_libsndfile
from tests.spoken import RATE, TEXTS, speech

LOSSY = (Codec.OPUS, Codec.MP3, Codec.AAC)
PADDING = {Codec.OPUS: 0, Codec.MP3: 3 * 1152, Codec.AAC: 2 * 1024}
"""Samples that may follow the last one of the speech."""

FORMATS = [resolve(container, codec, 0, RATE) for container, codec in SERVED]
FORMATS.append(Format(Container.MP3, Codec.MP3, 44_100))  # MPEG-1: its frames have twice as many samples
FREE = (8_000, 11_025, 12_345, 16_000, 24_000, 44_100, 48_000)
OTHERS = [
    Format(container, codec, rate)
    for container, codec in SERVED
    for rate in RATES.get(codec, FREE)
    if rate != RATE and codec not in G711
]

every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
coded_formats = pytest.mark.parametrize("format", [f for f in FORMATS if not costs_nothing(f, RATE)], ids=str)
lossy_formats = pytest.mark.parametrize(
    "format", [format for format in dict.fromkeys([*FORMATS, *OTHERS]) if format.codec in LOSSY], ids=str
)
language = pytest.mark.parametrize("language", TEXTS)


@dataclass(frozen=True)
class Encoded:
    data: bytes
    steps: tuple[tuple[int, int], ...]
    """After each piece: how many bytes there were, and how many samples could be heard with them."""


def encode(pcm: bytes, format: Format, *sizes: int, engine_rate: int = RATE) -> Encoded:
    """In pieces of so many samples, the rest in one."""
    ends = [0, *np.cumsum(sizes, dtype=int).tolist(), len(pcm)]
    data, steps = b"", []
    with Encoder(format, engine_rate) as encoder:
        for start, end in pairwise(ends):
            data += encoder.encode(pcm[2 * start : 2 * end])
            steps.append((len(data), encoder.samples))
        data += encoder.finish()
        steps.append((len(data), encoder.samples))
    return Encoded(data, tuple(steps))


@cache
def spoken(format: Format, language: str = "en-US") -> Encoded:
    """Real speech, in pieces of 20 ms."""
    return encode(speech(language), format, *[RATE // 50] * (len(speech(language)) // (RATE // 25)))


@cache
def source(rate: int, language: str = "en-US") -> Samples:
    """Real speech at a rate, uncoded."""
    return np.frombuffer(encode(speech(language), Format(Container.RAW, Codec.PCM_S16LE, rate)).data, "<i2")


def decoded(data: bytes, format: Format, samples: int) -> Samples:
    """A whole file, by the decoder that is least related to ours."""
    whole = with_known_length(data, format, samples)
    return by_ffmpeg(whole, format) if format.container is Container.ADTS else by_libsndfile(whole, format)


def correlation(one: npt.NDArray[np.int16], other: npt.NDArray[np.int16]) -> float:
    return float(np.corrcoef(one.astype(float), other.astype(float))[0, 1])


# --- decoded again


@language
@pytest.mark.parametrize("format", [f for f in FORMATS + OTHERS if f.codec in (Codec.PCM_S16LE, Codec.FLAC)], ids=str)
def test_lossless_forms_are_what_went_in(format: Format, language: str) -> None:
    data, samples = spoken(format, language).data, source(format.sample_rate_hertz, language)
    assert len(samples) == format.at_rate(len(speech(language)) // 2, RATE)
    assert np.array_equal(by_libsndfile(with_known_length(data, format, len(samples)), format), samples)
    assert np.array_equal(by_ffmpeg(data, format), samples)  # with the length left unknown


@language
@pytest.mark.parametrize("format", [f for f in FORMATS if f.codec in G711], ids=str)
def test_companded_forms_have_the_exact_length_and_the_speech(format: Format, language: str) -> None:
    data, samples = spoken(format, language).data, source(8_000, language)
    out = by_libsndfile(with_known_length(data, format, len(samples)), format)
    assert len(out) == len(samples)
    assert correlation(out, samples) > 0.999
    # Logarithmic steps: at most a 32nd of the sample, 8 where it is small, and half of both by rounding.
    assert (np.abs(out.astype(int) - samples) <= np.maximum(np.abs(samples.astype(int)) / 32 + 8, 16)).all()
    assert np.array_equal(by_ffmpeg(data, format), out)


@language
@lossy_formats
def test_lossy_forms_keep_the_speech_within_their_own_delay_and_padding(format: Format, language: str) -> None:
    samples = source(format.sample_rate_hertz, language)
    out = decoded(spoken(format, language).data, format, len(samples))
    assert 0 <= len(out) - format.delay_samples - len(samples) <= PADDING[format.codec]
    assert correlation(out[format.delay_samples :][: len(samples)], samples) > 0.99


@every_format
def test_a_rate_that_the_engine_has_itself_is_not_touched(format: Format) -> None:
    out = encode(speech("en-US"), format, engine_rate=format.sample_rate_hertz)
    assert out.steps[-1][1] == len(speech("en-US")) // 2


# --- pieces


@every_format
@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 6_000), max_size=12), samples=st.integers(0, 30_000))
def test_pieces_of_any_size_give_the_same_bytes(format: Format, sizes: list[int], samples: int) -> None:
    pcm = speech("zh-CN")[: 2 * (sum(sizes) + samples)]
    assert encode(pcm, format, *sizes).data == encode(pcm, format).data


@every_format
def test_pieces_of_one_sample_give_the_same_bytes(format: Format) -> None:
    pcm = speech("zh-CN")[:6_000]
    assert encode(pcm, format, *[1] * 3_000).data == encode(pcm, format).data


@every_format
def test_half_a_sample_is_refused(format: Format) -> None:
    with Encoder(format, RATE) as encoder, pytest.raises(ValueError, match="whole number"):
        encoder.encode(b"abc")


@every_format
def test_bytes_leave_early(format: Format) -> None:
    first = next(step for step, (size, _) in enumerate(spoken(format).steps) if size)
    assert (first + 1) * 20 <= 160  # ms of audio


@every_format
def test_nothing_is_sent_without_sound_in_it(format: Format) -> None:
    """A header alone would be told as the first audio."""
    with Encoder(format, RATE) as encoder:
        if not costs_nothing(format, RATE):
            assert encoder.encode(speech("en-US")[:2]) == b""
        assert encoder.encode(b"") == b"" or costs_nothing(format, RATE)


@every_format
def test_companded_frames_are_whole(format: Format) -> None:
    if format.codec in G711:
        head = spoken(format).data.find(b"data") + 8 if format.container is Container.WAV else 0
        assert all((size - head) % 160 == 0 for size, _ in spoken(format).steps[:-1] if size)


@lossy_formats
def test_mp3_starts_with_a_frame_of_sound(format: Format) -> None:
    if format.codec is Codec.MP3:
        data = spoken(format).data
        assert data[0] == 0xFF
        assert data[1] & 0xE0 == 0xE0
        assert not any(name in data for name in (b"Xing", b"Info", b"LAME3", b"ID3"))


# --- cut


@every_format
def test_a_stream_cut_anywhere_is_a_playable_file(format: Format) -> None:
    """What the encoder says can be heard is heard, and it sounds as it does in the whole."""
    data, steps = spoken(format).data, spoken(format).steps
    whole = by_ffmpeg(data, format)
    clock = 48_000 if format.codec is Codec.OPUS else format.sample_rate_hertz
    first = next(size for size, _ in steps if size)
    cuts = [first, *random.Random(3).sample(range(first, len(data)), 6)]
    for cut in cuts:
        part = by_ffmpeg(data[:cut], format)
        promised = max(samples for size, samples in steps if size <= cut)
        assert promised
        wanted = promised * clock // format.sample_rate_hertz + format.delay_samples
        assert len(part) >= wanted
        assert np.array_equal(part[:wanted], whole[:wanted])


@every_format
def test_what_can_be_heard_is_counted(format: Format) -> None:
    steps = spoken(format).steps
    samples = len(source(format.sample_rate_hertz))
    counts = [count for _, count in steps]
    assert counts == sorted(counts)
    assert counts[-1] == samples
    assert counts[-2] >= samples - 0.2 * format.sample_rate_hertz  # little is kept back


# --- extremes


@every_format
@pytest.mark.parametrize("samples", [0, 1, 2, 100])
def test_hardly_anything(format: Format, samples: int) -> None:
    pcm = speech("en-US")[2 * RATE :][: 2 * samples]
    out = encode(pcm, format)
    count = format.at_rate(samples, RATE)
    assert out.steps[-1][1] == count
    if samples:
        assert len(decoded(out.data, format, count)) >= count


@every_format
@pytest.mark.parametrize("kind", ["silence", "noise", "square"])
def test_silence_and_full_scale(format: Format, kind: str) -> None:
    samples = {
        "silence": np.zeros(RATE, "<i2"),
        "noise": np.random.default_rng(5).integers(-(2**15), 2**15, RATE, dtype=np.int16).astype("<i2"),
        "square": np.resize(np.repeat(np.array([32_767, -32_768], "<i2"), 50), RATE),
    }[kind]
    encoded = encode(samples.tobytes(), format)
    count = format.at_rate(RATE, RATE)
    out = decoded(encoded.data, format, count)[format.delay_samples :]
    assert len(out) >= count
    assert kind != "silence" or np.abs(out.astype(int)).max() <= 8  # A-law has no zero


@pytest.mark.parametrize("format", {*FORMATS, *OTHERS}, ids=str)
def test_the_bound_on_the_bytes_of_a_second_holds(format: Format) -> None:
    noise = np.random.default_rng(5).integers(-(2**15), 2**15, 4 * RATE, dtype=np.int16).astype("<i2").tobytes()
    for pcm in (noise, speech("en-US")):
        seconds = len(pcm) / 2 / RATE
        assert len(encode(pcm, format).data) <= 1_000 + format.bytes_per_second * seconds


# --- what is held


@every_format
def test_an_encoder_starts_no_threads(format: Format) -> None:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("threads can only be counted on Linux")
    before = len(list(tasks.iterdir()))
    encoders = [Encoder(format, RATE) for _ in range(4)]
    for encoder in encoders:
        encoder.encode(speech("en-US")[:20_000])
    assert len(list(tasks.iterdir())) <= before
    for encoder in encoders:
        encoder.close()


@every_format
def test_closing_is_allowed_at_any_time(format: Format) -> None:
    for size in (0, 2, 20_000):
        encoder = Encoder(format, RATE)
        encoder.encode(speech("en-US")[:size])
        encoder.close()
        encoder.close()


# --- off the event loop


@coded_formats
async def test_the_background_gives_the_same_bytes_in_order(format: Format) -> None:
    pieces = []
    with BackgroundEncoder(Budget(1.0, cores=1)) as encoder:
        encoder.reserve(format, RATE)
        for part in encoder.parts(speech("en-US")):
            pieces += [piece] if (piece := await encoder.encode(part)) else []
        pieces += [piece] if (piece := await encoder.finish()) else []
        total = encoder.samples
    assert b"".join(piece.data for piece in pieces) == encode(speech("en-US"), format).data
    starts = [piece.start_sample for piece in pieces]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert starts[-1] <= total == len(source(format.sample_rate_hertz))
    assert len(pieces) > 5


class SlowEncoder:
    """Stands in for an encoder that is at work when its caller goes away."""

    samples = 0

    def __init__(self) -> None:
        self.working, self.go_on, self.closed = threading.Event(), threading.Event(), threading.Event()
        self.threads: list[int] = []

    def encode(self, pcm: bytes) -> bytes:
        self.threads.append(threading.get_ident())
        self.working.set()
        assert self.go_on.wait(10)
        assert not self.closed.is_set()
        return pcm

    def close(self) -> None:
        self.closed.set()


async def test_a_cancelled_encoder_is_closed_once_its_thread_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowEncoder()
    monkeypatch.setattr(background, "Encoder", lambda format, engine_rate: slow)

    async def work() -> None:
        with BackgroundEncoder(Budget(1.0, cores=1)) as encoder:
            encoder.reserve(Format(Container.MP3, Codec.MP3, RATE), RATE)
            await encoder.encode(b"ab")

    task = asyncio.create_task(work())
    assert await asyncio.to_thread(slow.working.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not slow.closed.is_set()
    slow.go_on.set()
    assert await asyncio.to_thread(slow.closed.wait, 10)
    assert threading.get_ident() not in slow.threads
