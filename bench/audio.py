"""What encoding costs: each format beside FFmpeg's command line with the same encoder, settings and samples.

    python -m bench.audio [--quick] [--json]

The samples are real speech from the espeak engine (22,050 Hz), over and over. Ours gets them in pieces of 100 ms, as an
engine makes them; FFmpeg reads them from a pipe and writes to another. Both take turns, and each figure is the median
over the rounds. CPU is user and system time of all threads; of FFmpeg's, what a run without audio takes is subtracted.

Names of fields end in their unit. `ratio_to_ffmpeg`: ours over FFmpeg's `audio_s_per_cpu_s`; above 1 ours is faster.
`first_bytes_ms`: from making the encoder to its first audio bytes, the samples being there already.
`first_bytes_audio_ms`: how much audio it must be given for them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import av
import imageio_ffmpeg

from audio.encode import Encoder
from audio.formats import SERVED, Codec, Container, Format, resolve
from audio.mp3 import QUALITY
from audio.muxed import RECIPES, encoder_options, muxer_options
from audio.resample import FILTER
from batcher.engine import Join, Plan, RowRef, Segment, Vocode
from bench.report import metadata
from common.settings import EspeakSettings
from service.engines.espeak import SAMPLE_RATE_HERTZ, EspeakEngine

RATE = SAMPLE_RATE_HERTZ
SECOND_BYTES = 2 * RATE
PIECE_BYTES = SECOND_BYTES // 10
TEXT = "Good morning. The train to London leaves at nine, from the second platform. Please mind the gap."
CHEAP = 10
"""Codecs that cost little get so many times as much audio, to be measurable."""
RAW_MUXERS = {Codec.PCM_S16LE: "s16le", Codec.MULAW: "mulaw", Codec.ALAW: "alaw"}

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure."""

    rounds: int
    audio_seconds: int


TINY = Size(rounds=1, audio_seconds=2)
QUICK = Size(rounds=3, audio_seconds=20)
FULL = Size(rounds=7, audio_seconds=60)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = TINY if args.tiny else QUICK if args.quick else FULL
    formats = {name(format): format for format in _formats()}
    figures = measure(formats, _speech(size.audio_seconds), size.rounds)
    report = _metadata(size) | {"formats": figures}
    print(json.dumps(report) if args.json else _table(report, figures))


def name(format: Format) -> str:
    """For people."""
    return f"{format.container.name} {format.codec.name} {format.sample_rate_hertz}".lower()


def measure(formats: Mapping[str, Format], pcm: bytes, rounds: int) -> dict[str, Figures]:
    """The figures of each format: medians over the rounds, after one that does not count."""
    found = [{name: _round(format, pcm) for name, format in formats.items()} for _ in range(rounds + 1)][1:]
    return {name: _median([each[name] for each in found]) for name in formats}


def _formats() -> list[Format]:
    """Each that is served at its default rate, and plain samples at another."""
    served = [resolve(container, codec, 0, RATE) for container, codec in SERVED]
    return [*served, Format(Container.WAV, Codec.PCM_S16LE, 48_000)]


def _round(format: Format, pcm: bytes) -> Figures:
    samples = pcm * (1 if format.codec in (Codec.OPUS, Codec.MP3, Codec.AAC) else CHEAP)
    seconds = len(samples) / SECOND_BYTES
    ours = _ours(format, samples)
    theirs = max(_theirs(format, samples) - _theirs(format, b""), 1e-4)
    first_ms, first_audio_ms = _first_bytes(format, pcm)
    return {
        "audio_s_per_cpu_s": seconds / ours,
        "ffmpeg_audio_s_per_cpu_s": seconds / theirs,
        "ratio_to_ffmpeg": theirs / ours,
        "first_bytes_ms": first_ms,
        "first_bytes_audio_ms": first_audio_ms,
    }


def _ours(format: Format, pcm: bytes) -> float:
    """Seconds of CPU."""
    began = time.process_time()
    with Encoder(format, RATE) as encoder:
        for start in range(0, len(pcm), PIECE_BYTES):
            encoder.encode(pcm[start : start + PIECE_BYTES])
        encoder.finish()
    return max(time.process_time() - began, 1e-5)


def _first_bytes(format: Format, pcm: bytes) -> tuple[float, float]:
    """Milliseconds of work, and of audio, in pieces of 20 ms."""
    piece, began = SECOND_BYTES // 50, time.perf_counter()
    with Encoder(format, RATE) as encoder:
        for start in range(0, len(pcm), piece):
            if encoder.encode(pcm[start : start + piece]):
                break
        ended = time.perf_counter()
    return (ended - began) * 1e3, (start + piece) / SECOND_BYTES * 1e3


def _theirs(format: Format, pcm: bytes) -> float:
    """Seconds of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(_command(format), input=pcm, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _command(format: Format) -> list[str]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-f", "s16le", "-ar", str(RATE), "-ac", "1", "-i", "-"]
    if format.sample_rate_hertz != RATE:
        options = ":".join(f"{key}={value}" for key, value in FILTER.items())
        command += ["-af", f"aresample={format.sample_rate_hertz}:{options}"]
    return [*command, *_codec(format), "-"]


def _codec(format: Format) -> list[str]:
    if format.codec is Codec.MP3:
        facts = {"compression_level:a": QUALITY, "b:a": format.bits_per_second, "write_xing": 0, "id3v2_version": 0}
        return ["-c:a", "libmp3lame", *(f for k, v in facts.items() for f in (f"-{k}", str(v))), "-f", "mp3"]
    if format.codec not in RECIPES:
        codec = format.codec.name.lower() if format.codec is Codec.PCM_S16LE else f"pcm_{format.codec.name.lower()}"
        muxer = "wav" if format.container is Container.WAV else RAW_MUXERS[format.codec]
        return ["-c:a", codec, "-f", muxer]
    recipe = RECIPES[format.codec]
    options = [f"-{key}:a={value}" for key, value in encoder_options(format).items()]
    options += [f"-{key}={value}" for key, value in muxer_options(format).items()]
    flags = [part for option in options for part in option.split("=", 1)]
    return ["-c:a", recipe.encoder, *flags, "-f", recipe.muxer]


def _speech(seconds: int) -> bytes:
    """Whole pieces of real speech."""
    engine = EspeakEngine(EspeakSettings(processes=1))
    try:
        said = _say(engine)
    finally:
        engine.close()
    wanted = seconds * SECOND_BYTES // PIECE_BYTES * PIECE_BYTES
    return (said * (wanted // len(said) + 1))[:wanted]


def _say(engine: EspeakEngine) -> bytes:
    ref = RowRef(row=1, slot=0, generation=1)
    reports = engine.run(Plan(joins=((Join(ref, Segment(TEXT, "female1", "en-US")),),), steps=1)).rows
    while not reports:
        reports = engine.run(Plan(steps=1)).rows
    (vocoded,) = engine.run(Plan(vocode=(Vocode(ref, reports[0].steps_done),))).rows
    assert vocoded.pcm
    return vocoded.pcm.data


def _median(rounds: Sequence[Figures]) -> Figures:
    return {field: round(statistics.median(each[field] for each in rounds), 3) for field in rounds[0]}


def _metadata(size: Size) -> dict[str, object]:
    return metadata() | {
        "av": av.__version__,
        "ffmpeg_in_av": av.ffmpeg_version_info,
        "ffmpeg": imageio_ffmpeg.get_ffmpeg_version(),
        "rounds": size.rounds,
    }


def _table(report: Mapping[str, object], figures: Mapping[str, Figures]) -> str:
    lines = [f"{key:<16} {value}" for key, value in report.items() if key != "formats"]
    fields = list(next(iter(figures.values())))
    lines.append("\n" + f"{'format':<22}" + "".join(f"{field:>26}" for field in fields))
    lines += [f"{name:<22}" + "".join(f"{each[field]:>26,.2f}" for field in fields) for name, each in figures.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
