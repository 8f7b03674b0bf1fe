"""Reads a dialect's tables.

All are UTF-8 text: columns parted by tabs, lines that start with `#` for comments. What the columns mean is said at the
head of each file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from service.text.dialects.matcher import AFTER_EDGE, ANYWHERE, BEFORE_EDGE, Context, Entry, Matcher, Spelling

WORDS = ("words.tsv", "kept.tsv", "spelling.tsv")
"""Tables of words. Of equal patterns, the one in the first of them counts."""
MARKS = "marks.tsv"
CHARACTERS = "characters.tsv"

_MAX_PASSES = 3


@dataclass(frozen=True, slots=True)
class Dialect:
    """The tables of a dialect, ready to be used."""

    matcher: Matcher
    marks: Mapping[str, Entry]
    """Characters that show that a sentence is in the dialect."""
    revision: str

    def convert(self, sentence: str) -> str:
        """The sentence in the dialect's wording.

        Only what another pass would leave alone is taken: so, whatever the tables, nothing changes when the result is
        converted again. One pass is enough for all but odd texts.
        """
        if self.is_spoken_in(sentence):
            return sentence
        before = sentence
        for _ in range(_MAX_PASSES):
            after = self.matcher.rewrite(before)
            if after == before or self.is_spoken_in(after):
                return after
            before = after
        return sentence

    def is_spoken_in(self, sentence: str) -> bool:
        """Whether a sentence is in the dialect already."""
        if self.marks.keys().isdisjoint(sentence):
            return False
        return any(mark.fits(sentence, at) for at, char in enumerate(sentence) if (mark := self.marks.get(char)))


def load_dialects() -> dict[str, Dialect]:
    """Every dialect that has a folder here, by its tag in lower case.

    Raises:
        ValueError: a line of a table cannot be read.
    """
    folders = sorted((item for item in files(__package__).iterdir() if _is_dialect(item)), key=lambda item: item.name)
    return {folder.name.lower(): _load(folder) for folder in folders}


def read_rows(table: Traversable, columns: int) -> Iterator[tuple[str, ...]]:
    """The rows of a table, columns that are left out at a line's end filled with nothing.

    Raises:
        ValueError: a line has no first column, or too many.
    """
    for number, line in enumerate(table.read_text("utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        cells = line.split("\t")
        if not cells[0] or len(cells) > columns:
            raise ValueError(f"{table.name}, line {number}: a row has 1 to {columns} columns")
        yield (*cells, *("",) * (columns - len(cells)))


def read_entries(table: Traversable) -> Iterator[Entry]:
    """The entries of a table of words. A row without a replacement keeps its word as it is."""
    for pattern, replacement, before, after in read_rows(table, 4):
        yield Entry(pattern, replacement, _context(before, BEFORE_EDGE), _context(after, AFTER_EDGE))


def _is_dialect(item: Traversable) -> bool:
    return item.is_dir() and item.joinpath(CHARACTERS).is_file()


def _load(folder: Traversable) -> Dialect:
    tables = {name: folder.joinpath(name) for name in (*WORDS, MARKS, CHARACTERS)}
    spelling = Spelling((row[0], row[1], row[2]) for row in read_rows(tables[CHARACTERS], 3))
    entries = [entry for name in WORDS for entry in read_entries(tables[name])]
    digest = hashlib.sha256(b"\0".join(table.read_bytes() for table in tables.values())).hexdigest()
    marks = {entry.pattern: entry for entry in read_entries(tables[MARKS])}
    return Dialect(Matcher(entries, spelling), marks, f"{folder.name}-{digest[:8]}")


def _context(cell: str, edge: str) -> Context:
    if not cell:
        return ANYWHERE
    words = cell.removeprefix("!").split("|")
    return Context(frozenset(words) - {edge}, edge in words, cell.startswith("!"))
