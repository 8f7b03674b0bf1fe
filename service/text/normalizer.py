"""From a segment as written to what is spoken. Pure; costs a few microseconds a character.

Clean → tags apart → runs of a language → rules of that language → tidy. Each step works on one segment only.
"""

from __future__ import annotations

import re
import unicodedata

from service.text import clean, dialects, en, fallback, zh
from service.text.language import Reading, reading, runs
from service.text.rules import Rules
from service.text.tags import TAG

_BOOKS: dict[Reading, Rules] = {"zh": zh.rules, "en": en.rules}
_WRITTEN = re.compile(r"[0-9#@$¥￥€£₩₽₹฿&%‰°℃℉№±×÷=<>≤≥≈≠→^~_*`|\\/+−Ⅰ-Ⅿⅰ-ⅿ²³]")
"""Without one of these, Chinese is said as it is written."""
_WRITTEN_EN = re.compile(r"[A-Za-z]\.|\b[IVXL]{2}|\bw/|\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b")
_WRITTEN_ZH = re.compile(r"[A-Za-z]\.[A-Za-z]|第[IVXL]|[\u4e00-\u9fff](?:I[IVX]|[VX]I)")
_BRACKETS = str.maketrans("[]{}", "    ")
_SPACE_BEFORE = re.compile(r" +(?=[,.;:!?)](?![A-Za-z0-9])|[，。；：！？、）”])")
_PASSES = 8
"""What is said may stand beside what was not, and now be read with it. The second pass nearly always is the last."""
_LIFTED = str.maketrans({"℃": "°C", "℉": "°F", "−": "-", "－": "-", "＋": "+"})


def normalize(text: str, language: str) -> str:
    """What is spoken for a text in a language, on one line.

    Applied to its own result it changes nothing. Where we do not know how a language says numbers, only the characters
    are cleaned.
    """
    return speak(clean.show(text), language)


def speak(shown: str, language: str) -> str:
    """As `normalize`, for a text that was cleaned."""
    text = clean.plain(shown)
    base = reading(language)
    if base is None:
        return text
    for _ in range(_PASSES):
        said = "".join(part if TAG.fullmatch(part) else _say(part, base) for part in _split_at_tags(text))
        said = _tidy(said)
        if said == text:
            break
        text = said
    return dialects.apply(text, language)


def warm_up() -> None:
    """Compiles the rules, so that the first caller need not wait for that. Takes some tenths of a second."""
    for book in _BOOKS.values():
        book.compile()


def warm_up_rare() -> None:
    """Loads what few texts need. Takes a second or more, and may be done beside serving."""
    fallback.warm_up()


def _split_at_tags(text: str) -> list[str]:
    """Text, tag, text, tag, … text."""
    return re.split(f"({TAG.pattern})", text) if "[" in text else [text]


def _say(text: str, base: Reading) -> str:
    text = clean.fold(text.translate(_BRACKETS)).translate(_LIFTED)
    if not _needs_saying(text, base):
        return text
    return "".join(_BOOKS[of].apply(run) for run, of in runs(text, base))


def _tidy(text: str) -> str:
    return unicodedata.normalize("NFC", _SPACE_BEFORE.sub("", " ".join(text.split())))


def _needs_saying(text: str, base: Reading) -> bool:
    if _WRITTEN.search(text):
        return True
    return (_WRITTEN_EN if base == "en" else _WRITTEN_ZH).search(text) is not None
