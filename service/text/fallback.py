"""What our own rules do not know goes through wetext, one expression at a time.

wetext's rules are weighted transducers: a call costs about 1 ms, longer texts cost more than their length, and the GIL
is held all the while. So it never sees a text, only an expression of a few characters, and never one that our own
rules know. `docs/decisions/text-normalisation.md` has the figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Literal

_UNSAID = re.compile(r"[0-9]")
_MEASURE = re.compile(r"\d++(?:\.\d++)?\s?[A-Za-z]{1,4}")

Language = Literal["zh", "en"]


def measure(text: str, language: Language) -> str:
    """A number with a unit in words; empty where wetext does not know the unit."""
    if not _MEASURE.fullmatch(text):
        return ""
    said = _normalize(text, language)
    # A unit that is still there was not known, only its number was.
    unknown = r"[A-Za-z]$" if language == "zh" else re.escape(text.lstrip("0123456789. ")) + "$"
    return "" if re.search(unknown, said) else said


def warm_up() -> None:
    """Loads the library and its rules, which takes a second or more."""
    _normalize("3 kg", "zh")
    _normalize("3 kg", "en")


def _normalize(text: str, language: Language) -> str:
    """What wetext says; empty where it fails or leaves digits."""
    try:
        said = _normalizer(language)(text)
    except (AssertionError, RuntimeError, ValueError, IndexError, KeyError):
        # It asserts that its rules found something, which they do not in any text.
        return ""
    return "" if _UNSAID.search(said) else said


@cache
def _normalizer(language: Language) -> Callable[[str], str]:
    from wetext import Normalizer  # late: the import alone takes a second

    normalize: Callable[[str], str] = Normalizer(lang=language).normalize
    return normalize
