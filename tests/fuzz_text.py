"""Throws texts at the front end: `python -m tests.fuzz_text --minutes 10`.

A seed names a text and how it is cut into pieces. Seeds that once found a fault are kept in `data/fuzz_text.txt` and
run with the tests.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
import unicodedata
from collections import Counter
from pathlib import Path

from bench.text import cases
from service.text import Segmenter, TextSegment, has_speech, normalize, split, strip_tags
from service.text.clean import weight

SEEDS = Path(__file__).parent / "data" / "fuzz_text.txt"
LANGUAGES = (None, "zh-CN", "en-US", "yue", "fr-FR")

_WRITTEN = [case.written for case in cases()]
_RANGES = [
    (0x20, 0x7F, 12),
    (0x4E00, 0x9FFF, 6),
    (0x30, 0x3A, 8),
    (0, 0x20, 1),
    (0x300, 0x370, 1),  # combining
    (0x590, 0x700, 1),  # right to left
    (0x200B, 0x2070, 1),  # zero width, direction
    (0x2000, 0x2C00, 2),  # symbols
    (0x3000, 0x3400, 2),
    (0xAC00, 0xD7A4, 1),
    (0xE000, 0xF900, 1),  # private
    (0xFE00, 0x10000, 2),
    (0x1D400, 0x1D800, 1),
    (0x1F1E6, 0x1FAFF, 2),
    (0xE0000, 0xE0200, 1),
]
_TOKENS = [
    *"0123456789,.:/-~%$¥€+=*^@#&_[](){}<>|\\'\"“”《》 \n。，！？；：年月日点个第",
    "km/h", "GB", "ms", "℃", "v1.", "http://", "www.", ".com", "P99", "XIV", "Dr.", "St.", "No.", "a.m.", "th", "e-",
    "[laugh]", "[oral_3]", "[Stts]", "½", "Ⅷ", "①", "²", "m²", "k", "万", "亿", "RTX ", "Jan ", "4C8G", "\u200d", "😀",
]  # fmt: skip


def text_of(chance: random.Random) -> str:
    """A text: of random characters, of pieces that rules look for, or of real texts that were damaged."""
    match chance.randrange(4):
        case 0:
            return "".join(_character(chance) for _ in range(chance.randrange(400)))
        case 1:
            return "".join(chance.choice(_TOKENS) for _ in range(chance.randrange(200)))
        case 2:
            return "".join(chance.choice(_WRITTEN) + chance.choice(_TOKENS) for _ in range(chance.randrange(12)))
    damaged = list("".join(chance.choice(_WRITTEN) for _ in range(chance.randrange(1, 12))))
    for _ in range(chance.randrange(20)):
        damaged[chance.randrange(len(damaged))] = _character(chance)
    return "".join(damaged)


def _character(chance: random.Random) -> str:
    low, high, _ = chance.choices(_RANGES, [share for *_, share in _RANGES])[0]
    return chr(chance.randrange(low, high))


def check(seed: int) -> None:
    """Everything that holds for any text."""
    chance = random.Random(seed)
    text = text_of(chance)
    language = chance.choice(LANGUAGES)
    limit = chance.randrange(40, 130)
    first = chance.randrange(0, 60)
    parts = _fed(chance, text, language, first, limit)
    assert "".join(text.encode()[part.start_byte : part.end_byte].decode() for part in parts) == text
    assert [part.start_byte for part in parts[1:]] == [part.end_byte for part in parts[:-1]]
    if has_speech(text):
        assert parts == list(split(text, language, first_characters=first, max_characters=limit))
    for part in parts:
        _check_part(part, limit)
    lost = _chinese(text) - _chinese("".join(part.spoken_text for part in parts))
    assert not lost or any(part.language == "yue" for part in parts)


def _chinese(text: str) -> Counter[str]:
    return Counter(char for char in text if "\u4e00" <= char <= "\u9fff")


def _fed(chance: random.Random, text: str, language: str | None, first: int, limit: int) -> list[TextSegment]:
    segmenter = Segmenter(language, first_characters=first, max_characters=limit)
    cuts = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(30)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    return [part for piece in pieces for part in segmenter.feed(piece)] + segmenter.flush(end=True)


def _check_part(part: TextSegment, limit: int) -> None:
    said = part.spoken_text
    assert weight(said) <= limit
    assert said == unicodedata.normalize("NFC", " ".join(said.split()))
    if part.language != "fr-FR":
        assert not any(unicodedata.category(char) in ("Cc", "Cf", "So", "Co", "Cn") for char in said)
        assert normalize(said, part.language) == said
        assert not any(char.isdecimal() for char in strip_tags(said))


def kept_seeds() -> list[int]:
    """The seeds that once found a fault."""
    return [int(line.split()[0]) for line in SEEDS.read_text().splitlines() if line and line[0] != "#"]


def main() -> None:
    """Runs for some minutes; prints each seed that finds a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--start", type=int, default=time.time_ns() // 10**6)
    args = parser.parse_args()
    end = time.monotonic() + args.minutes * 60
    count = faults = 0
    for seed in itertools.count(args.start):
        if time.monotonic() > end:
            break
        count += 1
        try:
            check(seed)
        except Exception as error:
            faults += 1
            print(seed, repr(error)[:200], flush=True)
    print(f"{count} texts from seed {args.start}, {faults} faults")


if __name__ == "__main__":
    main()
