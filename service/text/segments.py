"""Splits a text into segments: what one row speaks.

Three steps, each linear in the text's length:

1. `_show` makes a copy of the text in which everything an engine should not see is a NUL, character for character, so
   that places in the copy are places in the text.
2. `_find_pauses` grades the places where a speaker pauses: ends of sentences, ends of clauses.
3. `_cut` takes from the front as much as a segment holds, up to the best of those places.

Lengths are *weights*: a wide character (Chinese, Japanese, Korean; emoji) or a digit weighs 1, any other 0.4, a
combining mark 0. So equal weights take about equal time to speak.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from service.text.language import detect_language

FRONT_END_REVISION = "text-1"
"""Changes whenever the same text would be spoken in other words or other segments."""

_UNIT = 5
"""Weights are counted in fifths, to be exact."""
_MIN_MAX_CHARACTERS = 40
"""Any lower, and a letter between two runs of symbols might not fit."""
_MAX_SYMBOLS = 16
"""Symbols in a row that an engine is given at most."""
_CLAUSE, _SENTENCE = 1, 2

_REMEMBERED = 0x20000
"""Code points below this are classified once. No caller can make the tables any larger."""

_HIDDEN = "\0"
_BLANK_LETTERS = "\u115f\u1160\u3164\uffa0"
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_IDEOGRAPHS = "\u2e80-\ua4cf\U00020000-\U0003ffff"
"""Scripts that are written without spaces and may be split anywhere: Chinese, kana."""
_OPENERS = "“‘«‹「『（([【［〈《〔〖{｛"
_CLOSERS = "\"'”’»›」』）)\\]】］〉》〕〗}｝"
_FIRM_MARKS = "。！？；…‥｡．؟۔।॥།።။។"
_SOFT_MARKS = "，、：—―､﹐،؛၊"
_PLAIN_MARKS = ".!?;,:"
_TAIL = rf"[{_FIRM_MARKS}{_SOFT_MARKS}{_PLAIN_MARKS}{_CLOSERS}\0]*+"

_SPEECH = re.compile(rf"[^\W_{_BLANK_LETTERS}]")
_BLANK = re.compile(r"[ \n][ \n\0]++")
_SYMBOLS = re.compile(rf"[\W_]{{{_MAX_SYMBOLS + 1},}}+")
_PAUSE = re.compile(
    rf"""
    (?=[\n{_FIRM_MARKS}{_SOFT_MARKS}{_PLAIN_MARKS}]) (?:
      (?P<sentence> (?!(?<=\d)．\d) [{_FIRM_MARKS}] {_TAIL} [ \0]*+ | \n\0*+ )
    | (?P<clause>   (?!(?<=\d)[，：—]\d) [{_SOFT_MARKS}] {_TAIL} [ \0]*+ )
      # Neither 3.14, example.com, 12:30 nor f(a,b); but a Chinese sentence may end in a plain full stop.
    | (?P<plain>    (?!\.[^\W{_IDEOGRAPHS}] | (?<=[\0-\x7f])[{_PLAIN_MARKS}][0-9A-Za-z])
                    [{_PLAIN_MARKS}] {_TAIL} [ \0]*+ ) )
    """,
    re.VERBOSE,
)
_PLAIN_SENTENCE = re.compile(f"[{_FIRM_MARKS}.!?;]")
_BEFORE_WORD = " \n\0\"'([“‘（"
_BEFORE_ITEM = " \n\0#*•·-"
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "st", "mt", "sr", "jr", "vs", "gen", "col", "capt", "lt", "e.g", "i.e", "cf")
)
_BEFORE_NUMBERS = frozenset(("no", "nos", "nr", "fig", "figs", "vol", "vols", "pp", "ch", "sec", "art", "ver"))

_IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")
_JOINED = re.compile(
    "(?<=\u200d)"
    "|[\U0001f3fb-\U0001f3ff]"  # skin tones
    "|(?<=[\U0001f1e6-\U0001f1ff])[\U0001f1e6-\U0001f1ff]"  # the halves of flags
    "|[\u1160-\u11ff\ud7b0-\ud7fb]"  # vowels and finals of Korean syllables in parts
    "|[\u0e33\u0eb3]"
)
"""What belongs to the character before it, beside marks."""
_VIRAMA = 9
"""The combining class of the marks that tie Indic consonants together."""


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A piece of a caller's text and what an engine is given for it."""

    start_byte: int
    """Its first byte in the caller's own UTF-8 text."""
    end_byte: int
    """The byte after its last."""
    spoken_text: str
    """NFC, on one line, without control and format characters. Has something to speak."""
    language: str
    """BCP 47."""


@dataclass(frozen=True, slots=True)
class _Scan:
    """A text and what was found in it. All places are counted in characters of the text."""

    text: str
    shown: str
    totals: list[int]
    """Place → weight of all before it, in fifths."""
    pauses: bytearray
    """Place → `_SENTENCE`, `_CLAUSE` or 0: what ends there."""
    last_speech: int

    def weight_from(self, start: int) -> int:
        """The weight of all from `start` on, in fifths."""
        return self.totals[-1] - self.totals[start]


def has_speech(text: str) -> bool:
    """Whether there is anything an engine can speak: a letter or a digit of any script."""
    return _SPEECH.search(text) is not None


def weight(text: str) -> float:
    """How long a text is for speech, in Chinese characters: wide characters and digits 1, others 0.4, marks 0."""
    return sum(_weights(text)) / _UNIT


def split(
    text: str, language: str | None = None, *, first_characters: int = 40, max_characters: int = 120
) -> list[TextSegment]:
    """Splits a text into segments whose spans partition its bytes.

    A segment holds as many whole sentences as fit; a sentence that does not fit is split at the ends of clauses, then
    at spaces, then between Chinese characters, then anywhere. The first segment is shorter, so that sound starts early:
    it ends with a sentence or a clause, within `first_characters` where one ends there, else as soon as one ends.

    Args:
        text: what to say, without lone surrogates.
        language: BCP 47; None: detected from the whole text.
        first_characters: the first segment's length, as a weight (see the module).
        max_characters: no spoken text's weight is above this.

    Raises:
        ValueError: the text has nothing to speak, or `max_characters` is below 40.
    """
    if max_characters < _MIN_MAX_CHARACTERS:
        raise ValueError(f"max_characters must be at least {_MIN_MAX_CHARACTERS}")
    if not has_speech(text):
        raise ValueError("the text has nothing to speak")
    language = language or detect_language(text)
    segments = []
    end_byte = 0
    scan = _scan(text)
    for start, end in _spans(scan, min(first_characters, max_characters) * _UNIT, max_characters * _UNIT):
        start_byte, end_byte = end_byte, end_byte + len(text[start:end].encode())
        segments.append(TextSegment(start_byte, end_byte, _spoken(scan.shown[start:end]), language))
    return segments


def _scan(text: str) -> _Scan:
    shown = _show(text)
    last_speech = next(at for at in range(len(shown) - 1, -1, -1) if _SPEECH.match(shown, at))
    totals = list(accumulate(_weights(shown), initial=0))
    return _Scan(text, shown, totals, _find_pauses(shown), last_speech)


# --- What an engine may see


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


def _show_character(char: str) -> str:
    category = unicodedata.category(char)
    if char in _LINE_ENDS:
        return "\n"
    if category in ("Cc", "Zs"):
        return " "
    # Variation selectors and their like are marks by category; enclosing marks are the boxes of keycap emoji.
    invisible = (
        category in ("Cf", "Me") or char in _BLANK_LETTERS or char in "\u034f\u17b4\u17b5\u180b\u180c\u180d\u180f"
    )
    if invisible or "\ufe00" <= char <= "\ufe0f" or "\U000e0000" <= char <= "\U000e0fff":
        return _HIDDEN
    return char


def _weigh_character(char: str) -> int:
    if char == _HIDDEN or unicodedata.category(char)[0] == "M":
        return 0
    return _UNIT if char.isdecimal() or unicodedata.east_asian_width(char) in "WF" else 2


def _weights(text: str) -> bytes:
    return text.translate(_WEIGHTS).encode("latin-1")


def _show(text: str) -> str:
    shown = _BLANK.sub(_hide_blanks, text.translate(_SHOWN))
    clipped, count = _SYMBOLS.subn(_hide_symbols, shown)
    return _BLANK.sub(_hide_blanks, clipped) if count else shown


def _hide_blanks(run: re.Match[str]) -> str:
    return ("\n" if "\n" in run.group() else " ").ljust(run.end() - run.start(), _HIDDEN)


def _hide_symbols(run: re.Match[str]) -> str:
    """Keeps both ends of a long run of symbols, so that a segment of few letters is short whatever surrounds them."""
    chars = list(run.group())
    visible = [at for at, char in enumerate(chars) if char != _HIDDEN]
    for at in visible[_MAX_SYMBOLS // 2 : -_MAX_SYMBOLS // 2]:
        chars[at] = _HIDDEN
    return "".join(chars) if len(visible) > _MAX_SYMBOLS else run.group()


def _spoken(shown: str) -> str:
    return unicodedata.normalize("NFC", shown.replace(_HIDDEN, "").replace("\n", " ").strip())


# --- Where a speaker pauses


def _find_pauses(shown: str) -> bytearray:
    pauses = bytearray(len(shown) + 1)
    previous = counted = quotes = 0
    for match in _PAUSE.finditer(shown):
        level = _LEVELS.get(match.lastgroup) or _grade(shown, match, previous)
        if not level:
            continue
        previous = match.end()
        if '"' in match.group():
            quotes = _count_quotes(shown, counted, match.start(), quotes)
            counted = match.start()
            previous = match.end() if quotes % 2 else _before_opening_quote(match)
        pauses[previous] = level
    return pauses


_LEVELS: dict[str | None, int] = {"sentence": _SENTENCE, "clause": _CLAUSE}


def _count_quotes(shown: str, start: int, end: int, quotes: int) -> int:
    """Straight quotes on the line of `end` before it, where there are `quotes` on the line of `start` before that."""
    line = shown.rfind("\n", start, end)
    return quotes + shown.count('"', start, end) if line < 0 else shown.count('"', line, end)


def _before_opening_quote(match: re.Match[str]) -> int:
    """Where the marks end, if a straight quote that opens belongs to what comes next."""
    marks = match.group()
    return match.end() if marks[-1] in " \0" else match.start() + marks.index('"')


def _grade(shown: str, match: re.Match[str], previous: int) -> int:
    """What ends with these marks, which may be part of a word: `_SENTENCE`, `_CLAUSE`, or 0 for nothing."""
    start, end = match.span()
    marks = match.group()
    after = shown[end : end + 1]
    if after > "\n" and marks[-1] not in " \0" and _is_inside_word(shown[max(0, start - 1)], marks, after):
        return 0
    if marks[0] == "." and _is_abbreviated(shown, start, after, previous):
        return 0
    if _PLAIN_SENTENCE.search(marks) is None:
        return _CLAUSE
    return _CLAUSE if after.islower() and marks.isascii() else _SENTENCE


def _is_inside_word(before: str, marks: str, after: str) -> bool:
    """Whether marks with no space after them are part of an address or of code."""
    if marks[0] == ".":
        return not (_IDEOGRAPH.match(before) and _IDEOGRAPH.match(after))
    return marks.isascii() and before.isascii() and after.isascii()


def _is_abbreviated(shown: str, stop: int, after: str, previous: int) -> bool:
    """Whether the full stop at `stop` follows a title, an initial, or the number of an item in a list."""
    word = shown[max(previous, stop - 8) : stop].rpartition(" ")[2].lstrip(_BEFORE_WORD).lower()
    if word.isdecimal():
        return shown[max(previous, stop - 8) : stop].lstrip(_BEFORE_ITEM) == word
    initial = word.isascii() and (len(word) == 1 or word[-2:-1] == ".")
    return initial or word in _ABBREVIATIONS or (word in _BEFORE_NUMBERS and after.isdecimal())


# --- Where to split


def _spans(scan: _Scan, first: int, limit: int) -> Iterator[tuple[int, int]]:
    """The segments' starts and ends. Limits are in fifths of a weight."""
    start = 0
    cut = _first_cut(scan, first, limit)
    while cut:
        yield start, cut
        start = cut
        cut = _cut(scan, start, limit)
    yield start, len(scan.text)


def _first_cut(scan: _Scan, first: int, limit: int) -> int:
    """Where the first segment ends; 0: with the text."""
    if scan.weight_from(0) <= first:
        return 0
    low, floor, high = _window(scan, 0, first)
    best = _last_sentence(scan, floor, high) or _last_clause(scan, floor, high)
    latest = max(_last_sentence(scan, low, high), _last_clause(scan, low, high))
    return best or latest or _next_pause(scan, low, _window(scan, 0, limit)[2]) or _cut(scan, 0, limit)


def _cut(scan: _Scan, start: int, limit: int) -> int:
    """Where the segment that starts at `start` ends; 0: with the text."""
    low, floor, high = _window(scan, start, limit)
    if scan.weight_from(start) <= limit or high < low:
        return 0
    for find in _FINDERS:
        if cut := find(scan, floor, high):
            return cut
    return max(find(scan, low, high) for find in _FINDERS) or _last_cluster(scan, low, high) or high


def _window(scan: _Scan, start: int, limit: int) -> tuple[int, int, int]:
    """The first, the first good and the last place where the segment that starts at `start` may end.

    There is speech on both sides of each. A good place leaves a quarter of `limit` at least before it; so does the last
    one after it, lest a segment be a word or two.
    """
    speech = _SPEECH.search(scan.shown, start)
    low = speech.end() if speech else len(scan.text)
    floor = bisect_left(scan.totals, scan.totals[start] + limit // 4)
    heaviest = min(scan.totals[start] + limit, scan.totals[-1] - limit // 4)
    high = max(low, bisect_right(scan.totals, heaviest) - 1)
    return low, max(low, floor), min(high, scan.last_speech)


# Each finds the last place from `low` to `high` where something ends; 0: there is none.


def _last_sentence(scan: _Scan, low: int, high: int) -> int:
    return max(0, scan.pauses.rfind(_SENTENCE, low, high + 1))


def _last_clause(scan: _Scan, low: int, high: int) -> int:
    return max(0, scan.pauses.rfind(_CLAUSE, low, high + 1))


def _last_space(scan: _Scan, low: int, high: int) -> int:
    return scan.shown.rfind(" ", low - 1, high) + 1


def _last_word(scan: _Scan, low: int, high: int) -> int:
    if _IDEOGRAPH.search(scan.text, low - 1, high + 1) is None:
        return 0
    return next((at for at in range(high, low - 1, -1) if _is_between_words(scan, at)), 0)


def _last_cluster(scan: _Scan, low: int, high: int) -> int:
    return next((at for at in range(high, low - 1, -1) if _is_between_clusters(scan, at)), 0)


_FINDERS = (_last_sentence, _last_clause, _last_space, _last_word)


def _next_pause(scan: _Scan, low: int, high: int) -> int:
    found = (scan.pauses.find(level, low, high + 1) for level in (_CLAUSE, _SENTENCE))
    return min((at for at in found if at >= 0), default=0)


def _is_between_words(scan: _Scan, at: int) -> bool:
    """Whether a text may be split here where no space is: beside a Chinese character, but 3 | 章 is not."""
    before, after = scan.text[at - 1], scan.text[at]
    return (
        _IDEOGRAPH.search(scan.text, at - 1, at + 1) is not None
        and after.isalnum()
        and not before.isdecimal()
        and before not in _OPENERS
        and _is_between_clusters(scan, at)
    )


def _is_between_clusters(scan: _Scan, at: int) -> bool:
    """Whether no character that a reader sees as one is split here, as far as the standard library can tell."""
    is_mark = scan.totals[at] == scan.totals[at + 1]
    return not is_mark and _JOINED.match(scan.text, at) is None and unicodedata.combining(scan.text[at - 1]) != _VIRAMA
