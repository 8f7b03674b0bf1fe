"""Where a speaker pauses: the ends of sentences and of clauses, and what may not be taken apart."""

from __future__ import annotations

import re

from service.text.tags import TAG

CLAUSE, SENTENCE = 1, 2

IDEOGRAPHS = "\u2e80-\ua4cf\U00020000-\U0003ffff"
"""Scripts that are written without spaces and may be split anywhere: Chinese, kana."""
OPENERS = "“‘«‹「『（([【［〈《〔〖{｛"
_CLOSERS = "\"'”’»›」』）)\\]】］〉》〕〗}｝"
_FIRM_MARKS = "。！？；…‥｡．؟۔।॥།።။។"
_SOFT_MARKS = "，、：—―､﹐،؛၊"
_PLAIN_MARKS = ".!?;,:"
_TAIL = rf"[{_FIRM_MARKS}{_SOFT_MARKS}{_PLAIN_MARKS}{_CLOSERS}\0]*+"

_PAUSE = re.compile(
    rf"""
    (?=[\n{_FIRM_MARKS}{_SOFT_MARKS}{_PLAIN_MARKS}]) (?:
      (?P<sentence> (?!(?<=\d)．\d) [{_FIRM_MARKS}] {_TAIL} [ \0]*+ | \n\0*+ )
    | (?P<clause>   (?!(?<=\d)[，：—]\d) [{_SOFT_MARKS}] {_TAIL} [ \0]*+ )
      # Neither 3.14, example.com, 12:30 nor f(a,b); but a Chinese sentence may end in a plain full stop.
    | (?P<plain>    (?!\.[^\W{IDEOGRAPHS}] | (?<=[\0-\x7f])[{_PLAIN_MARKS}][0-9A-Za-z])
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

_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")
_LONGEST_NAME = 24
_ATOM = re.compile(
    rf"""
      {TAG.pattern}
    | “[^“”\n]{{1,{_LONGEST_NAME}}}” | ‘[^‘’\n]{{1,{_LONGEST_NAME}}}’ | 《[^《》\n]{{1,{_LONGEST_NAME}}}》
    | 「[^「」\n]{{1,{_LONGEST_NAME}}}」 | 『[^『』\n]{{1,{_LONGEST_NAME}}}』
    | "(?=\S)[^"\n]{{1,{_LONGEST_NAME}}}(?<=\S)"
    | [0-9][0-9.,:/]{{0,12}} (?:[ ]?[-~–—][ ]?[0-9][0-9.,:/]{{0,6}})?
      (?:[ ]?[A-Za-z%‰°℃℉][A-Za-z/²³]{{0,3}}(?![A-Za-z]))?
    """,
    re.VERBOSE,
)
LOOKAHEAD = _LONGEST_NAME + 2
"""So many characters on from where it begins, every atom is known."""
_QUOTES = (("“", "”"), ("‘", "’"), ("《", "》"), ("「", "」"), ("『", "』"), ('"', '"'))


def forbid_inside(shown: str, pauses: bytearray) -> bytearray:
    """Takes away the pauses inside numbers, tags and names in quotes; place → 1 for every place inside one."""
    inside = bytearray(len(shown) + 1)
    for atom in _ATOM.finditer(shown):
        start, end = atom.span()
        if end - start > 1:
            inside[start + 1 : end] = b"\1" * (end - start - 1)
            pauses[start + 1 : end] = bytes(end - start - 1)
    return inside


def open_quote(shown: str, place: int) -> int:
    """Where the last quote opens that may be a short name's and is open at a place; -1: there is none."""
    opens = -1
    for opener, closer in _QUOTES:
        at = shown.rfind(opener, max(0, place - LOOKAHEAD), place)
        if at > opens and shown.find(closer, at + 1, place) < 0:
            opens = at
    return opens


def find_pauses(shown: str, quotes: int = 0) -> bytearray:
    """Place → `SENTENCE`, `CLAUSE` or 0: what ends there.

    Args:
        shown: a cleaned text.
        quotes: straight quotes before it on its first line.
    """
    pauses = bytearray(len(shown) + 1)
    previous = counted = 0
    for match in _PAUSE.finditer(shown):
        level = _LEVELS.get(match.lastgroup) or _grade(shown, match, previous)
        if not level:
            continue
        previous = match.end()
        if '"' in match.group():
            quotes = count_quotes(shown, counted, match.start(), quotes)
            counted = match.start()
            previous = match.end() if quotes % 2 else _before_opening_quote(match)
        pauses[previous] = level
    return pauses


_LEVELS: dict[str | None, int] = {"sentence": SENTENCE, "clause": CLAUSE}


def count_quotes(shown: str, start: int, end: int, quotes: int) -> int:
    """Straight quotes on the line of `end` before it, where there are `quotes` on the line of `start` before that."""
    line = shown.rfind("\n", start, end)
    return quotes + shown.count('"', start, end) if line < 0 else shown.count('"', line, end)


def _before_opening_quote(match: re.Match[str]) -> int:
    """Where the marks end, if a straight quote that opens belongs to what comes next."""
    marks = match.group()
    return match.end() if marks[-1] in " \0" else match.start() + marks.index('"')


def _grade(shown: str, match: re.Match[str], previous: int) -> int:
    """What ends with these marks, which may be part of a word: `SENTENCE`, `CLAUSE`, or 0 for nothing."""
    start, end = match.span()
    marks = match.group()
    after = shown[end : end + 1]
    if after > "\n" and marks[-1] not in " \0" and _is_inside_word(shown[max(0, start - 1)], marks, after):
        return 0
    if marks[0] == "." and _is_abbreviated(shown, start, after, previous):
        return 0
    if _PLAIN_SENTENCE.search(marks) is None:
        return CLAUSE
    return CLAUSE if after.islower() and marks.isascii() else SENTENCE


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
