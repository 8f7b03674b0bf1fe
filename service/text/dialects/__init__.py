"""Dialects: standard written Chinese in, the dialect's own wording out, before an engine sees it.

A dialect is a folder of tables beside this file, named by its language tag; `docs/dialects.md` says what is in them.

The unit is the sentence: nothing here looks across its end, so a text may be handed over segment by segment, and the
first segment never waits for the rest. Tables are read when this module is imported, not by the first caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from service.text.dialects.tables import Dialect, load_dialects

__all__ = ["DIALECTS", "apply", "revision"]

DIALECTS = load_dialects()
"""Language tag in lower case → dialect. That an engine speaks it is for the engine to say."""

_SENTENCE = re.compile(r"[^。！？!?；;….\n]*+[。！？!?；;….\n]*+")


def apply(text: str, language: str) -> str:
    """The text in the wording of its language; as it is, where the language has no tables.

    A sentence that is in the dialect already is not touched. Applying it twice changes nothing more.
    """
    dialect = _find(language)
    if dialect is None:
        return text
    return "".join(dialect.convert(sentence) for sentence in _sentences(text))


def revision(language: str) -> str:
    """Changes whenever the tables of the language do; empty where it has none. Belongs into the speech key."""
    dialect = _find(language)
    return dialect.revision if dialect else ""


def _find(language: str) -> Dialect | None:
    """The dialect of a tag, with subtags cut off from its end."""
    name = language.lower()
    while name and name not in DIALECTS:
        name = name.rpartition("-")[0]
    return DIALECTS.get(name)


def _sentences(text: str) -> Iterator[str]:
    return (match.group() for match in _SENTENCE.finditer(text))
