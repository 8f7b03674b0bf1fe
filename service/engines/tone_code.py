"""Sound that a program can read: which request, segment and step each 512 samples of a tone row belong to.

A *block* is one step: 512 samples, 16-bit signed, little-endian, one channel, 1024 bytes. It is a quiet sine whose
samples are all even; the lowest bits of its first 224 samples carry 28 bytes, big-endian, highest bit first:

    sync 4 | seed 4 | speech 4 | segment 4 | steps 4 | step 4 | check 4

- speech: CRC-32 of the spoken text, the voice and the language. It also chooses one of eight pitches.
- steps: how many blocks the row has, so that a row that was cut short shows.
- check: CRC-32 of all bytes before it.

A whole number of waves fits a block, so a row sounds like one steady tone. Reading compares every sample with what it
must be: a single wrong bit is found. The code survives what is lossless, and nothing else.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, zip_longest

import numpy as np
from numpy.typing import NDArray

SAMPLES_PER_STEP = 512
BYTES_PER_STEP = 2 * SAMPLES_PER_STEP
SYNC = b"\xc5tsy"
AMPLITUDE = 2000
"""Of 32767: about 24 dB below full scale."""

_HEAD = struct.Struct(">4sIIII")
_STEP = struct.Struct(">I")
_FIELDS = np.dtype(
    [("sync", "S4"), ("seed", ">u4"), ("speech", ">u4"), ("segment", ">u4"), ("steps", ">u4"), ("step", ">u4")]
)
_HEAD_BITS = 8 * _HEAD.size
_BITS = _HEAD_BITS + 64
_SYNC_BITS = np.unpackbits(np.frombuffer(SYNC, np.uint8)).astype(np.int16)
_PITCHES = range(5, 13)
"""Waves in a block: 234 to 563 Hz at 24 kHz."""

Samples = NDArray[np.int16]
Words = NDArray[np.uint32]


class CodeError(ValueError):
    """The samples are not what was to be heard. `sample` tells where that shows first."""

    def __init__(self, sample: int, message: str) -> None:
        super().__init__(f"sample {sample}: {message}")
        self.sample = sample


@dataclass(frozen=True, slots=True)
class Identity:
    """What a row speaks, and for which request. All numbers are unsigned, of 32 bits."""

    seed: int
    speech: int
    segment: int

    @classmethod
    def of(cls, text: str, voice: str, language: str, seed: int, segment: int) -> Identity:
        """The identity of a segment, from what it speaks."""
        return cls(seed=seed, speech=speech_crc(text, voice, language), segment=segment)


@dataclass(frozen=True, slots=True)
class Block:
    """What one block says of itself, and where it stands."""

    identity: Identity
    step: int
    steps: int
    start_sample: int

    def __str__(self) -> str:
        """In the words of an error message."""
        who = self.identity
        return f"step {self.step} of {self.steps} of segment {who.segment}, seed {who.seed}, speech {who.speech:08x}"


@dataclass(frozen=True, slots=True)
class RowCode:
    """What all blocks of a row have in common, made once a row."""

    template: Samples
    """Step 0 with its step number and check left out, shape (512,)."""
    check: int
    """The check of step 0."""


@dataclass(frozen=True, slots=True)
class Span:
    """Steps `start` up to, not including, `end` of a row."""

    code: RowCode
    start: int
    end: int


def speech_crc(text: str, voice: str, language: str) -> int:
    """CRC-32 of what is spoken, by whom, in which language."""
    return zlib.crc32("\0".join((text, voice, language)).encode())


def row_code(identity: Identity, steps: int) -> RowCode:
    """Prepares the blocks of a row of `steps` steps.

    Raises:
        struct.error: a number has more than 32 bits.
    """
    head = _HEAD.pack(SYNC, identity.seed, identity.speech, identity.segment, steps)
    template = _tones()[identity.speech % len(_PITCHES)].copy()
    template[:_HEAD_BITS] |= np.unpackbits(np.frombuffer(head, np.uint8))
    return RowCode(template, zlib.crc32(head + _STEP.pack(0)))


def encode_step(identity: Identity, steps: int, step: int) -> bytes:
    """One block, 1024 bytes. For many, `encode_spans` is the fast way."""
    return encode_spans([Span(row_code(identity, steps), step, step + 1)])[0]


def encode_row(identity: Identity, steps: int) -> bytes:
    """All blocks of a row, 1024 bytes a step."""
    return encode_spans([Span(row_code(identity, steps), 0, steps)])[0]


def encode_spans(spans: Sequence[Span]) -> list[bytes]:
    """The blocks of each span, 1024 bytes a step, made in one go."""
    if not spans:
        return []
    blocks = _blocks(spans)
    ends = np.cumsum([span.end - span.start for span in spans]).tolist()
    return [blocks[start:end].tobytes() for start, end in zip([0, *ends], ends, strict=False)]


def decode(pcm: bytes, *, whole: bool = True) -> list[Block]:
    """Reads the audio of a request: consecutive segments of one seed, each with all its steps.

    With `whole=False` the audio may stop anywhere, also in the middle of a block.

    Raises:
        CodeError: something is missing, mixed, reordered, doubled, corrupted, cut or misaligned.
    """
    blocks = _read_rows(pcm, whole)
    for before, first in pairwise(block for block in blocks if block.step == 0):
        follows = (before.identity.seed, before.identity.segment + 1)
        if (first.identity.seed, first.identity.segment) != follows:
            raise CodeError(first.start_sample, f"segment {follows[1]} of seed {follows[0]} must follow, found {first}")
    return blocks


def verify(pcm: bytes, identities: Sequence[Identity], *, whole: bool = True) -> list[int]:
    """Checks that the audio is exactly these segments, each with all its steps, and returns the steps of each.

    With `whole=False` the audio may stop anywhere, also in the middle of a block.

    Raises:
        CodeError: it is anything else.
    """
    firsts = [block for block in _read_rows(pcm, whole) if block.step == 0]
    for found, expected in zip_longest(firsts, identities):
        if found is None and whole:
            raise CodeError(len(pcm) // 2, f"{expected} is missing")
        if found is not None and found.identity != expected:
            raise CodeError(found.start_sample, f"expected {expected or 'the end'}, found {found}")
    return [block.steps for block in firsts]


def _read_rows(pcm: bytes, whole: bool) -> list[Block]:
    """Blocks that form rows without a gap.

    Raises:
        CodeError: they do not, or something is no block.
    """
    blocks, damage = _read(pcm)
    _check_steps(blocks)
    if damage is not None:
        raise damage
    if whole and len(pcm) % BYTES_PER_STEP:
        raise CodeError(len(blocks) * SAMPLES_PER_STEP, f"a block is cut: {len(pcm) % BYTES_PER_STEP} bytes of 1024")
    if whole and blocks and blocks[-1].step + 1 != blocks[-1].steps:
        raise CodeError(len(pcm) // 2, f"the audio is cut after {blocks[-1]}")
    return blocks


def _check_steps(blocks: Sequence[Block]) -> None:
    if blocks and blocks[0].step != 0:
        raise CodeError(0, f"a row must begin, found {blocks[0]}")
    for before, block in pairwise(blocks):
        ended = before.step + 1 == before.steps
        if ended and block.step != 0:
            raise CodeError(block.start_sample, f"a row must begin after {before}, found {block}")
        if not ended and not _continues(before, block):
            raise CodeError(block.start_sample, f"the step after {before} is missing, found {block}")


def _read(pcm: bytes) -> tuple[list[Block], CodeError | None]:
    """The blocks before the first damage, and the damage."""
    count = len(pcm) // BYTES_PER_STEP
    if not count:
        return [], None
    samples = np.frombuffer(pcm, "<i2", count * SAMPLES_PER_STEP).reshape(count, SAMPLES_PER_STEP)
    bits = np.packbits((samples[:, : _BITS - 32] & 1).astype(np.uint8), axis=1)
    fields = bits.reshape(-1).view(_FIELDS)
    blocks = [
        Block(Identity(seed, speech, segment), step, steps, start)
        for start, (_, seed, speech, segment, steps, step) in zip(
            range(0, len(pcm) // 2, SAMPLES_PER_STEP), fields.tolist(), strict=False
        )
    ]
    damaged = np.flatnonzero((samples != _blocks(_spans(blocks))).any(axis=1))
    if not damaged.size:
        return blocks, None
    index = int(damaged[0])
    return blocks[:index], _damage(samples.reshape(-1), index * SAMPLES_PER_STEP)


def _spans(blocks: Sequence[Block]) -> list[Span]:
    """Spans that stand for the same blocks; runs of consecutive steps share one."""
    ends = [index for index, pair in enumerate(pairwise(blocks), 1) if not _continues(*pair)]
    return [
        Span(row_code(blocks[start].identity, blocks[start].steps), blocks[start].step, blocks[end - 1].step + 1)
        for start, end in pairwise([0, *ends, len(blocks)])
    ]


def _continues(before: Block, block: Block) -> bool:
    same_row = (block.identity, block.steps) == (before.identity, before.steps)
    return same_row and block.step == before.step + 1


def _damage(samples: Samples, start: int) -> CodeError:
    """Tells a damaged block from the lack of one."""
    if np.array_equal(samples[start : start + _SYNC_BITS.size] & 1, _SYNC_BITS):
        return CodeError(start, "the block that begins here is corrupted")
    windows = np.lib.stride_tricks.sliding_window_view(samples[start:] & 1, _SYNC_BITS.size)
    found = np.flatnonzero((windows == _SYNC_BITS).all(axis=1))
    where = f"the next one begins at sample {start + int(found[0])}" if found.size else "nor after it"
    return CodeError(start, f"no block begins here; {where}")


def _blocks(spans: Sequence[Span]) -> Samples:
    """All blocks of all spans, shape (blocks, 512)."""
    counts = np.array([span.end - span.start for span in spans])
    first = np.array([span.start for span in spans]) - (np.cumsum(counts) - counts)
    steps = (np.arange(counts.sum()) + np.repeat(first, counts)).astype(np.uint32)
    checks = np.repeat(np.array([span.code.check for span in spans], np.uint32), counts) ^ _step_checks(steps)
    tail = np.stack([steps, checks], axis=1).astype(">u4").view(np.uint8)
    blocks = np.repeat(np.stack([span.code.template for span in spans]), counts, axis=0)
    blocks[:, _HEAD_BITS:_BITS] |= np.unpackbits(tail, axis=1)
    return blocks


def _step_checks(steps: Words) -> Words:
    """What each step number adds to the check of step 0.

    CRC-32 is linear: check(head, step) = check(head, 0) ^ delta(step), and delta is the xor of one part for each byte
    of the step number. So no block's CRC need be computed anew.
    """
    checks = np.zeros_like(steps)
    for shift, parts in _check_parts():
        checks ^= parts[steps >> shift & 255]
    return checks


@lru_cache(maxsize=1)
def _check_parts() -> list[tuple[int, Words]]:
    """For each byte of a step number: its shift, and the value's part of the check, shape (256,)."""
    zero = zlib.crc32(_STEP.pack(0))
    return [
        (shift, np.array([zlib.crc32(_STEP.pack(value << shift)) ^ zero for value in range(256)], np.uint32))
        for shift in (0, 8, 16, 24)
    ]


@lru_cache(maxsize=1)
def _tones() -> Samples:
    """One block of each pitch, all samples even, shape (8, 512)."""
    turns = np.outer(np.array(_PITCHES), np.arange(SAMPLES_PER_STEP)) / SAMPLES_PER_STEP
    return (2 * np.round(AMPLITUDE / 2 * np.sin(2 * np.pi * turns))).astype("<i2")
