"""Unicode clean-up: what an engine may see of a text, what is refused, and how long it is.

`show` works character for character, so that places in its result are places in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_REMEMBERED = 0x20000
"""Code points below this are classified once. No caller can make the tables any larger."""
UNIT = 5
"""Weights are counted in fifths, to be exact."""
MAX_SYMBOLS = 16
"""Symbols in a row that an engine is given at most."""

HIDDEN = "\0"
_REFUSED = "\x01"
_BLANK_LETTERS = "\u115f\u1160\u3164\uffa0"
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SPOKEN_SYMBOLS = frozenset("$¥￥€£₩₽₹฿+<=>|~^`±×÷→≤≥≈≠°℃℉№−－＋＜＝＞｜～＄％＾｀￡￠￦⁄´゛゜")
"""Symbols that are said, or written for a pause. All others, emoji among them, are refused; punctuation never is."""

SPEECH = re.compile(rf"[^\W_{_BLANK_LETTERS}]")
_BLANK = re.compile(r"[ \n][ \n\0]++")
_SYMBOLS = re.compile(rf"[\W_]{{{MAX_SYMBOLS + 1},}}+")
_ODD = re.compile(r"[^\w\s!-/:-@\[-`{-~，。、：；！？“”‘’（）《》「」『』【】—…·•～￥–\u0300-\u036f]")
_CLUSTER = re.compile(
    "(?:[\U0001f1e6-\U0001f1ff]{2}|.[\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]*+"
    "(?:\u200d[^\\w\\s][\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]*+)*+)",
    re.DOTALL,
)
_FOLDED = re.compile(
    "[²³¹⁰-₉]|[\uff01-\uff5e]|[\u2100-\u214f\u2150-\u215f]|[\u2460-\u24ff\u3200-\u33ff]|[\ufb00-\ufb06]"
    "|[¼-¾]|[\U0001d400-\U0001d7ff]|[^\\W\\x00-\\x7f\\u4e00-\\u9fff]"
)
_FULL_WIDTH_PUNCTUATION = frozenset("！（），：；？［］｛｝．＂＇")
_LONGEST_FOLDED = 6
_KEPT = frozenset("²³№℃℉™")


@dataclass(frozen=True, slots=True)
class Rejected:
    """What no engine can speak."""

    character: str
    """As a reader sees it: an emoji with all its parts."""
    start_byte: int
    """Its first byte in the caller's own UTF-8 text."""


class _Shown(dict[int, str]):
    """Code point → what stands for it: itself, a space, a newline, or NUL for nothing."""

    def __missing__(self, code: int) -> str:
        shown = _show_character(chr(code))
        if code < _REMEMBERED:
            self[code] = shown
        return shown


class _Weights(dict[int, str]):
    """Code point → its weight, as a character."""

    def __missing__(self, code: int) -> str:
        weight = chr(_weigh_character(chr(code)))
        if code < _REMEMBERED:
            self[code] = weight
        return weight


_SHOWN = _Shown()
_WEIGHTS = _Weights()


def has_speech(text: str) -> bool:
    """Whether there is anything an engine can speak: a letter or a digit of any script."""
    return SPEECH.search(text) is not None


def weight(text: str) -> float:
    """How long a text is for speech, in Chinese characters: wide characters and digits 1, others 0.4, marks 0."""
    return sum(weights(text)) / UNIT


def weights(text: str) -> bytes:
    """The weight of each character, in fifths."""
    return text.translate(_WEIGHTS).encode("latin-1")


def show(text: str) -> str:
    """What an engine may see, character for character; NUL stands for what it may not."""
    shown = _BLANK.sub(_hide_blanks, text.translate(_SHOWN))
    clipped, count = _SYMBOLS.subn(_hide_symbols, shown)
    return _BLANK.sub(_hide_blanks, clipped) if count else shown


def plain(shown: str) -> str:
    """NFC on one line, without what is hidden."""
    return unicodedata.normalize("NFC", " ".join(shown.replace(HIDDEN, "").split()))


def rejected(text: str, start_byte: int) -> tuple[Rejected, ...]:
    """What of a text no engine can speak, counted from the byte where the text starts."""
    return tuple(_rejected(text, start_byte)) if _ODD.search(text) else ()


def fold(text: str) -> str:
    """Compatibility forms as the characters that they stand for: `３ＧＢ` → `3GB`, `㎏` → `kg`, `½` → `1/2`."""
    return _FOLDED.sub(_fold, text) if not text.isascii() else text


def _rejected(text: str, start_byte: int) -> Iterator[Rejected]:
    at = 0
    for found in _ODD.finditer(text):
        if found.start() < at or not _is_refused(found[0]):
            continue
        cluster = _CLUSTER.match(text, found.start())
        assert cluster is not None
        start_byte += len(text[at : found.start()].encode())
        yield Rejected(cluster[0], start_byte)
        start_byte += len(cluster[0].encode())
        at = cluster.end()


def _is_refused(char: str) -> bool:
    """Whether a character is neither speech nor writing: emoji and pictures, control, private and unassigned codes."""
    category = unicodedata.category(char)
    if category in ("So", "Sm", "Sc", "Sk"):
        return char not in _SPOKEN_SYMBOLS and unicodedata.normalize("NFKC", char)[0] not in "0123456789abcdefghijkLm%"
    return category in ("Co", "Cn", "Cs") or (category == "Cc" and char not in _LINE_ENDS and char != "\t")


def _show_character(char: str) -> str:
    category = unicodedata.category(char)
    if char in _LINE_ENDS:
        return "\n"
    # A space for what is refused: the words beside an emoji are still two words.
    if category in ("Cc", "Zs") or (_ODD.match(char) and _is_refused(char)):
        return " "
    # Variation selectors and their like are marks by category; enclosing marks are the boxes of keycap emoji; U+0338
    # makes other symbols of symbols.
    invisible = (
        category in ("Cf", "Me") or char in _BLANK_LETTERS or char in "\u0338\u034f\u17b4\u17b5\u180b\u180c\u180d\u180f"
    )
    if invisible or "\ufe00" <= char <= "\ufe0f" or "\U000e0000" <= char <= "\U000e0fff":
        return HIDDEN
    return char


def _weigh_character(char: str) -> int:
    if char == HIDDEN or unicodedata.category(char)[0] == "M":
        return 0
    return UNIT if char.isdecimal() or unicodedata.east_asian_width(char) in "WF" else 2


def _hide_blanks(run: re.Match[str]) -> str:
    return ("\n" if "\n" in run.group() else " ").ljust(run.end() - run.start(), HIDDEN)


def _hide_symbols(run: re.Match[str]) -> str:
    """Keeps both ends of a long run of symbols, so that a segment of few letters is short whatever surrounds them."""
    chars = list(run.group())
    visible = [at for at, char in enumerate(chars) if char != HIDDEN]
    for at in visible[MAX_SYMBOLS // 2 : -MAX_SYMBOLS // 2]:
        chars[at] = HIDDEN
    return "".join(chars) if len(visible) > MAX_SYMBOLS else run.group()


def _fold(found: re.Match[str]) -> str:
    char = found[0]
    if char in _FULL_WIDTH_PUNCTUATION or char in _KEPT or "Ⅰ" <= char <= "ⅿ":
        return char
    if char.isdecimal():
        return str(unicodedata.digit(char))
    folded = unicodedata.normalize("NFKC", char)
    if "\u2044" in folded:
        before = found.string[found.start() - 1 : found.start()] if found.start() else ""
        return (" " if before.isdecimal() else "") + folded.replace("\u2044", "/")
    if "\u2460" <= char <= "\u24ff" or "\u3200" <= char <= "\u32ff":
        return f" {folded.strip('()')} "
    if unicodedata.category(char) == "No":
        return f"^{folded}"
    # A squared unit is no longer than this; a whole phrase in one sign stays one sign.
    return folded.replace("\u2215", "/") if len(folded) <= _LONGEST_FOLDED else char
