"""Rewrites a text by a table of words, in one pass from left to right.

At each place the longest pattern that fits is taken, and what it covers is not looked at again. A pattern fits where
its contexts do. All is found by dictionary: the work for a character is bounded by the table, not by the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BEFORE_EDGE, AFTER_EDGE = "^", "$"


@dataclass(frozen=True, slots=True)
class Context:
    """What must stand on one side of a pattern, or must not. An empty one always fits."""

    words: frozenset[str] = frozenset()
    edge: bool = False
    """The end of the text, or a character that is no letter and no digit, is one of them."""
    negated: bool = False
    lengths: frozenset[int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", frozenset(map(len, self.words)))

    def fits_before(self, text: str, at: int) -> bool:
        """Whether what ends at `at` is in here."""
        return self._fits(text[max(0, at - 1) : at], (text[max(0, at - length) : at] for length in self.lengths))

    def fits_after(self, text: str, at: int) -> bool:
        """Whether what starts at `at` is in here."""
        return self._fits(text[at : at + 1], (text[at : at + length] for length in self.lengths))

    @property
    def is_empty(self) -> bool:
        """Whether anything may stand there."""
        return not (self.words or self.edge)

    def _fits(self, neighbour: str, stretches: Iterable[str]) -> bool:
        found = (self.edge and not neighbour.isalnum()) or not self.words.isdisjoint(stretches)
        return self.is_empty or found != self.negated


ANYWHERE = Context()


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a table."""

    pattern: str
    replacement: str
    """Empty: the word is kept, in the dialect's script."""
    before: Context = ANYWHERE
    after: Context = ANYWHERE

    def fits(self, text: str, start: int) -> bool:
        """Whether its contexts fit around its pattern at `start`."""
        return (self.before is ANYWHERE or self.before.fits_before(text, start)) and (
            self.after is ANYWHERE or self.after.fits_after(text, start + len(self.pattern))
        )


class Spelling:
    """How single characters are written in the dialect's script, and which are the same to a pattern."""

    def __init__(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Each row: a simplified character, the one to write for it, and others that patterns take for it."""
        self._written: dict[int, str] = {}
        self._folded: dict[int, str] = {}
        for character, written, others in rows:
            if written != character:
                self._written[ord(character)] = written
            for other in written + others:
                if other != character:
                    self._folded.setdefault(ord(other), character)

    def write(self, text: str) -> str:
        """The text in the dialect's script, character for character."""
        return text.translate(self._written)

    def fold(self, text: str) -> str:
        """The text in simplified characters, character for character: what patterns are compared with."""
        return text.translate(self._folded)


class Matcher:
    """A table, ready to be used. Knows nothing of where it came from."""

    def __init__(self, entries: Iterable[Entry], spelling: Spelling) -> None:
        """Of entries with the same pattern, the first that fits is taken."""
        self._spelling = spelling
        self._entries: dict[str, tuple[Entry, ...]] = {}
        lengths: dict[str, set[int]] = {}
        for entry in entries:
            self._entries[entry.pattern] = (*self._entries.get(entry.pattern, ()), entry)
            lengths.setdefault(entry.pattern[0], set()).add(len(entry.pattern))
        self._lengths: Mapping[str, tuple[int, ...]] = {
            first: tuple(sorted(found, reverse=True)) for first, found in lengths.items()
        }

    def rewrite(self, text: str) -> str:
        """The text with every pattern replaced, and all else in the dialect's script."""
        folded, written = self.fold(text), self.write(text)
        pieces: list[str] = []
        kept_from = at = 0
        while at < len(folded):
            entry = self._find(folded, at)
            if entry is None:
                at += 1
                continue
            end = at + len(entry.pattern)
            if entry.replacement:
                pieces += (written[kept_from:at], entry.replacement)
                kept_from = end
            at = end
        return "".join((*pieces, written[kept_from:]))

    def find(self, text: str, at: int) -> Entry | None:
        """The entry that is used at a place of a text."""
        return self._find(self.fold(text), at)

    def fold(self, text: str) -> str:
        """The text as patterns are compared with it."""
        return self._spelling.fold(text)

    def write(self, text: str) -> str:
        """The text in the dialect's script, its wording left as it is."""
        return self._spelling.write(text)

    def _find(self, folded: str, at: int) -> Entry | None:
        for length in self._lengths.get(folded[at], ()):
            for entry in self._entries.get(folded[at : at + length], ()):
                if entry.fits(folded, at):
                    return entry
        return None
