"""A rule book: patterns in written text and how each is said. One pass, the first rule that fits wins.

What one rule wrote no other rule reads, so rules cannot trip over each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Say = Callable[[re.Match[str]], str]

NUMBER = r"(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?"
"""Digits, perhaps with thousands separators, perhaps with a fraction."""
DASH = r"\s?[-~～–—−]\s?"

_TLD = "com|cn|org|net|io|ai|dev|gov|edu|app|co|me|tv|info|uk|de|jp|fr|hk|tw|eu|us|xyz|top|wiki|tech|cloud"
_HOST = rf"[A-Za-z0-9][A-Za-z0-9_-]*+(?:\.[A-Za-z0-9_-]++)*?\.(?:{_TLD})(?![A-Za-z0-9_-]|\.[A-Za-z0-9])"
_PATH = r"(?:(?::\d++)?[/?#](?:[A-Za-z0-9/_.~%+&=?#:@{}-]*+(?<![.?:~]))?+)?"
URL = rf"(?<![A-Za-z0-9@._-])(?:(?:https?|ftp|file|wss?|redis)://[A-Za-z0-9/_.~%+&=?#:@{{}}-]++(?<![.?:~])|{_HOST}{_PATH})"
EMAIL = r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+&-]++@[A-Za-z0-9-]++(?:\.[A-Za-z0-9-]++)++"
VERSION = r"(?<![\w.])[vV]?\d++(?:\.\d++){2,}+(?![\w])|(?<![\w.])[vV](?:er\.?\s?)?\d++(?:\.\d++)*+(?![\w])"
FILE_OR_MEMBER = r"(?<![\w.])[A-Za-z_]\w*+(?:\.[A-Za-z_]\w*+)++(?!\.?\w)"


class Rules:
    """Rules in the order in which they are tried."""

    def __init__(self, starts: str) -> None:
        """Makes an empty book.

        Args:
            starts: the characters with which anything that a rule takes begins, as in a class of a pattern.
        """
        self._starts = starts
        self._rules: list[tuple[str, Say]] = []
        self._each: list[re.Pattern[str]] = []
        self._any: re.Pattern[str] | None = None

    def rule(self, pattern: str) -> Callable[[Say], Say]:
        """Adds a function as what says a pattern's matches. Groups count within the pattern."""

        def add(say: Say) -> Say:
            self._rules.append((pattern, say))
            self._any = None
            return say

        return add

    def compile(self) -> None:
        """Gets ready, which `apply` does too when it must."""
        self._each = [re.compile(pattern, re.ASCII) for pattern, _ in self._rules]
        bare = (_unnamed(pattern) for pattern, _ in self._rules)
        every = "|".join(f"({pattern})" for pattern in bare)
        # ASCII: a Chinese character beside a word or a number does not belong to it.
        self._any = re.compile(f"(?=[{self._starts}])(?:{every})", re.ASCII)

    def apply(self, text: str) -> str:
        """The text with every match said."""
        if self._any is None:
            self.compile()
        assert self._any is not None
        return self._any.sub(self._say, text)

    def _say(self, found: re.Match[str]) -> str:
        assert found.lastindex is not None
        which = found.lastindex - 1
        match = self._each[which].match(found.string, found.start())
        assert match is not None
        return self._rules[which][1](match)


_GROUP = re.compile(r"(?<!\\)\((?:\?P<\w+>|(?!\?))")


def _unnamed(pattern: str) -> str:
    """The pattern with groups that are not counted, so that the one that counts tells which rule it is."""
    return _GROUP.sub("(?:", pattern)
