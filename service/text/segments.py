"""Splits a text into segments: what one row speaks.

One mechanism for a whole text and for one that is still being written. `Segmenter` looks at the text from the end of
the last segment on, in a window that grows until it is certain where the next segment ends:

1. `clean.show` hides what an engine should not see, character for character.
2. `pauses` grades the places where a speaker pauses: ends of sentences, ends of clauses.
3. `_cut` takes from the front as much as a segment holds, up to the best of those places.
4. What was taken is normalised, and cut shorter where its spoken form is too long.

A segment ends where nothing that follows could move its end. So segments depend on the text and on flushes, never on
the pieces in which the text came, and only what is taken costs anything.

Lengths are *weights*: a wide character (Chinese, Japanese, Korean) or a digit weighs 1, any other 0.4, a combining mark
0. So equal weights take about equal time to speak.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from service.text.clean import SPEECH, UNIT, Rejected, has_speech, plain, rejected, show, weights
from service.text.language import Counts
from service.text.normalizer import speak
from service.text.pauses import (
    CLAUSE,
    IDEOGRAPHS,
    LOOKAHEAD,
    OPENERS,
    SENTENCE,
    count_quotes,
    find_pauses,
    forbid_inside,
    open_quote,
)

FRONT_END_REVISION = "text-2"
"""Changes whenever the same text would be spoken in other words or other segments."""

_MIN_MAX_CHARACTERS = 40
"""Any lower, and a letter between two runs of symbols might not fit."""
_WINDOW = 160
"""Characters looked at first."""
_COMPACT = 1 << 14
"""Characters that may lie behind before they are dropped."""

_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")
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
    """NFC, on one line, in words. Empty only for what is left at the very end of a stream and has nothing to speak."""
    language: str
    """BCP 47."""
    rejected: tuple[Rejected, ...] = ()
    """What of it no engine can speak, in order."""


def split(
    text: str, language: str | None = None, *, first_characters: int = 40, max_characters: int = 110
) -> Iterator[TextSegment]:
    """Splits a text into segments whose spans partition its bytes, each when it is asked for.

    A segment holds as many whole sentences as fit; a sentence that does not fit is split at the ends of clauses, then
    at spaces, then between Chinese characters, then anywhere. The first segment is shorter, so that sound starts early:
    it ends with the first sentence of at least a quarter of `first_characters`, or the first clause of a half.

    Args:
        text: what to say, without lone surrogates.
        language: BCP 47; None: detected segment by segment.
        first_characters: the first segment's length, as a weight (see the module).
        max_characters: no spoken text's weight is above this.

    Raises:
        ValueError: the text has nothing to speak, or `max_characters` is below 40.
    """
    segmenter = Segmenter(language, first_characters=first_characters, max_characters=max_characters)
    if not has_speech(text):
        raise ValueError("the text has nothing to speak")
    return segmenter.consume(text)


class Segmenter:
    """Splits a text that is still being written. Spans count in everything that was fed."""

    def __init__(self, language: str | None = None, *, first_characters: int = 40, max_characters: int = 110) -> None:
        """Takes the arguments of `split`."""
        if max_characters < _MIN_MAX_CHARACTERS:
            raise ValueError(f"max_characters must be at least {_MIN_MAX_CHARACTERS}")
        self._language = language
        self._limit = max_characters * UNIT
        self._first_limit = self._first = min(first_characters, max_characters) * UNIT
        self._text = ""
        self._at = 0
        self._byte = 0
        self._quotes = 0
        self._counts = Counts()

    def feed(self, piece: str) -> list[TextSegment]:
        """Takes a further piece, cut anywhere; returns the segments whose ends it makes certain."""
        self._text += piece
        # A segment ends only when speech follows, so nothing else can change anything.
        return list(self._closed(final=False)) if has_speech(piece) else []

    def flush(self, *, end: bool = False) -> list[TextSegment]:
        """Returns all that can be spoken now, as if the text ended here; the next segment is a first one again.

        What is left and has nothing to speak (spaces, marks) waits for the text that follows.

        Args:
            end: nothing follows: what is left is a segment without spoken text.
        """
        segments = list(self._closed(final=True))
        self._first = self._first_limit
        if end and self._at < len(self._text):
            segments.append(self._take(len(self._text) - self._at, "", self._language or self._counts.language))
        return segments

    def consume(self, text: str) -> Iterator[TextSegment]:
        """`feed` and `flush` in one, each segment when it is asked for."""
        self._text += text
        return self._closed(final=True)

    def _closed(self, *, final: bool) -> Iterator[TextSegment]:
        while segment := self._next(final):
            yield segment

    def _next(self, final: bool) -> TextSegment | None:
        """The next segment whose end is certain."""
        left = len(self._text) - self._at
        size = _WINDOW
        while True:
            whole = final and size >= left
            scan = _scan(self._text[self._at : self._at + size], self._quotes, whole=whole)
            if scan and (cut := _first_cut(scan, self._first, self._limit) or _next_cut(scan, self._limit)):
                return self._fit(scan, cut)
            if size >= left:
                return None
            size *= 2

    def _fit(self, scan: _Scan, cut: int) -> TextSegment:
        """Takes what was cut, or as much of it as is not too long when spoken."""
        language = self._language_of(scan.text[:cut])
        limit = self._limit
        while True:
            spoken = speak(scan.shown[:cut], language)
            length = sum(weights(spoken))
            if length <= self._limit:
                break
            limit = min(limit, scan.totals[cut]) * self._limit // (length + UNIT)
            shorter = _cut(scan.until(cut), limit)
            if not 0 < shorter < cut:
                break
            cut = shorter
        return self._take(cut, spoken or plain(scan.shown[:cut]), language)

    def _language_of(self, text: str) -> str:
        if self._language is not None:
            return self._language
        counts = Counts()
        counts.add(text)
        counts.include(self._counts)
        return counts.language_of(text)

    def _take(self, size: int, spoken: str, language: str) -> TextSegment:
        text = self._text[self._at : self._at + size]
        start = self._byte
        self._byte += len(text.encode())
        self._at += size
        self._quotes = count_quotes(text, 0, len(text), self._quotes)
        self._counts.add(text)
        self._first = 0
        if self._at > _COMPACT:
            self._text, self._at = self._text[self._at :], 0
        return TextSegment(start, self._byte, spoken, language, rejected(text, start))


# --- What is known of the text ahead


@dataclass(frozen=True, slots=True)
class _Scan:
    """The text ahead and what was found in it. All places are counted in characters."""

    text: str
    shown: str
    totals: list[int]
    """Place → weight of all before it, in fifths."""
    pauses: bytearray
    """Place → `SENTENCE`, `CLAUSE` or 0: what ends there."""
    inside: bytearray
    """Place → 1 inside a number, a tag, a name in quotes."""
    last_speech: int
    whole: bool
    """Nothing follows."""

    def until(self, place: int) -> _Scan:
        """What is before a place, as if nothing followed."""
        shown = self.shown[:place]
        return _Scan(
            self.text[:place],
            shown,
            self.totals[: place + 1],
            self.pauses,
            self.inside,
            _last_speech(shown),
            whole=True,
        )


def _scan(text: str, quotes: int, *, whole: bool) -> _Scan | None:
    """What is known of a text; `None` where it has nothing to speak yet."""
    last = _last_speech(text)
    if last < 0:
        return None
    if not whole:
        # Marks at the end may go on.
        text = text[: last + 1]
    shown = show(text)
    pauses = find_pauses(shown, quotes)
    inside = forbid_inside(shown, pauses)
    return _Scan(text, shown, list(accumulate(weights(shown), initial=0)), pauses, inside, last, whole)


def _last_speech(text: str) -> int:
    return next((at for at in range(len(text) - 1, -1, -1) if SPEECH.match(text, at)), -1)


# --- Where to split: each answers with a place, or 0 for none that is certain


def _first_cut(scan: _Scan, first: int, limit: int) -> int:
    """Where the first segment ends: early, but not after a word or two."""
    if not first:
        return 0
    low = _after_speech(scan)
    high = min(bisect_right(scan.totals, limit) - 1, scan.last_speech)
    for place in range(max(low, bisect_left(scan.totals, first // 4)), high + 1):
        level = scan.pauses[place]
        if level == SENTENCE or (level == CLAUSE and scan.totals[place] >= first // 2):
            enough = scan.totals[-1] - scan.totals[place] >= first // 8
            return place if enough and (scan.whole or _is_certain(scan, place)) else 0
    return 0


def _is_certain(scan: _Scan, place: int) -> bool:
    """Whether no quote that is still open may yet turn out to be a name's."""
    opens = open_quote(scan.shown, place)
    return opens < 0 or len(scan.shown) > opens + LOOKAHEAD


def _next_cut(scan: _Scan, limit: int) -> int:
    """Where a segment ends: with the text, or where it holds about as much as it can."""
    if scan.whole and scan.totals[-1] <= limit:
        return len(scan.text)
    if not scan.whole and scan.totals[-1] < limit + limit // 4:
        return 0
    return _cut(scan, limit) or (len(scan.text) if scan.whole else 0)


def _cut(scan: _Scan, limit: int) -> int:
    """Where a segment that cannot hold all of the text ends."""
    low, floor, high = _window(scan, limit)
    if high < low:
        return 0
    for find in _FINDERS:
        if cut := find(scan, floor, high):
            return cut
    return max(find(scan, low, high) for find in _FINDERS) or _last_cluster(scan, low, high) or high


def _window(scan: _Scan, limit: int) -> tuple[int, int, int]:
    """The first, the first good and the last place where the segment may end.

    There is speech on both sides of each. A good place leaves a quarter of `limit` at least before it; so does the last
    one after it, lest a segment be a word or two.
    """
    low = _after_speech(scan)
    floor = bisect_left(scan.totals, limit // 4)
    heaviest = min(limit, scan.totals[-1] - limit // 4)
    high = max(low, bisect_right(scan.totals, heaviest) - 1)
    return low, max(low, floor), min(high, scan.last_speech)


def _after_speech(scan: _Scan) -> int:
    speech = SPEECH.search(scan.shown)
    return speech.end() if speech else len(scan.text)


# Each finds the last place from `low` to `high` where something ends; 0: there is none.


def _last_sentence(scan: _Scan, low: int, high: int) -> int:
    return max(0, scan.pauses.rfind(SENTENCE, low, high + 1))


def _last_clause(scan: _Scan, low: int, high: int) -> int:
    return max(0, scan.pauses.rfind(CLAUSE, low, high + 1))


def _last_space(scan: _Scan, low: int, high: int) -> int:
    at = scan.shown.rfind(" ", low - 1, high) + 1
    while at and scan.inside[at]:
        at = scan.shown.rfind(" ", low - 1, at - 1) + 1
    return at


def _last_word(scan: _Scan, low: int, high: int) -> int:
    if _IDEOGRAPH.search(scan.text, low - 1, high + 1) is None:
        return 0
    return next((at for at in range(high, low - 1, -1) if _is_between_words(scan, at)), 0)


def _last_cluster(scan: _Scan, low: int, high: int) -> int:
    return next((at for at in range(high, low - 1, -1) if _is_between_clusters(scan, at)), 0)


_FINDERS = (_last_sentence, _last_clause, _last_space, _last_word)


def _is_between_words(scan: _Scan, at: int) -> bool:
    """Whether a text may be split here where no space is: beside a Chinese character, but 3 | 章 is not."""
    before, after = scan.text[at - 1], scan.text[at]
    return (
        not scan.inside[at]
        and _IDEOGRAPH.search(scan.text, at - 1, at + 1) is not None
        and after.isalnum()
        and not before.isdecimal()
        and before not in OPENERS
        and _is_between_clusters(scan, at)
    )


def _is_between_clusters(scan: _Scan, at: int) -> bool:
    """Whether no character that a reader sees as one is split here, as far as the standard library can tell."""
    is_mark = scan.totals[at] == scan.totals[at + 1]
    return not is_mark and _JOINED.match(scan.text, at) is None and unicodedata.combining(scan.text[at - 1]) != _VIRAMA
