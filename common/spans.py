"""Where the pieces of a speech lie in its caller's own text, which may differ from the canonical one of its key."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache

from common.keys import canonical_text
from protos.chorus.v1 import tts_pb2


def restorer(text: str) -> Callable[[tts_pb2.SegmentMark], None] | None:
    """What makes marks of the canonical text marks of a caller's text; None where the two are the same."""
    canonical = canonical_text(text)
    if canonical == text:
        return None
    offsets, end, own_end = _offsets(text), len(canonical.encode()), len(text.encode())

    def restore(mark: tts_pb2.SegmentMark) -> None:
        # What was trimmed belongs to the first segment and to the last, so that together they still cover the text.
        mark.start_byte = 0 if mark.start_byte == 0 else offsets[mark.start_byte]
        mark.end_byte = own_end if mark.end_byte == end else offsets[mark.end_byte]
        for rejected in mark.rejected_characters:
            rejected.start_byte = offsets[rejected.start_byte]

    return restore


@lru_cache(maxsize=64)
def _offsets(text: str) -> list[int]:
    """For each byte of the canonical text, the byte of the text from which its piece comes."""
    lead = len(text) - len(text.lstrip())
    # Trimmed after NFC and before are the same: NFC makes no blanks and takes none away.
    stripped = text[lead : len(text.rstrip())]
    offsets: list[int] = []
    own = len(text[:lead].encode())
    for piece in _pieces(stripped):
        offsets += [own] * len(unicodedata.normalize("NFC", piece).encode())
        own += len(piece.encode())
    return [*offsets, own]


def _pieces(text: str) -> list[str]:
    """Cut where NFC composes nothing across the cut."""
    pieces: list[str] = []
    for character in text:
        if pieces and _joins(pieces[-1], character):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def _joins(piece: str, character: str) -> bool:
    normalize = unicodedata.normalize
    if unicodedata.combining(character):
        return True
    return normalize("NFC", piece + character) != normalize("NFC", piece) + normalize("NFC", character)
