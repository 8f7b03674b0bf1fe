"""Which language a text is in, and each run of it, from its script alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN_CHARACTER = re.compile(f"[{HAN}]")
_OTHER_WORD = re.compile(rf"[^\W\d_{HAN}]++")
# Characters that written Mandarin hardly has. 係 is left out in 關係 and its like, 唔 where it is a sigh.
_CANTONESE = re.compile(r"[嘅咗喺哋嚟冇啲嗰嘢佢瞓㗎噉攞]|(?<![關聯體干])係|唔(?=\w)")
_HAN_PER_CANTONESE = 20
"""In Cantonese at least one character of so many is one of those; a quotation in a Mandarin text stays below."""
_CERTAIN_WORDS = 8
"""So many words without Chinese characters are no name or title in a Chinese text."""

_FOREIGN = re.compile(rf"[^{HAN}，。！？；：、“”‘’（）《》「」【】…\n]++")
_FOREIGN_WORD = re.compile(r"(?<![^\s(\"'])[A-Za-z][a-z'’]++(?![^\s,.!?;:)\"'])|(?<!\S)[AI](?!\S)")
_MIN_FOREIGN_WORDS = 3
_CHINESE = re.compile(rf"(?:[0-9][0-9.,:/%\-]*+)?[{HAN}][^A-Za-z]*+")

Reading = Literal["zh", "en"]


class Counts:
    """What a text consists of, as far as it has been seen."""

    def __init__(self) -> None:
        self.han = self.words = self.cantonese = 0

    def add(self, text: str) -> None:
        """Counts the characters and words of a further piece."""
        if han := len(_HAN_CHARACTER.findall(text)):
            self.han += han
            self.cantonese += len(_CANTONESE.findall(text))
        self.words += len(_OTHER_WORD.findall(text))

    def include(self, other: Counts) -> None:
        """Adds what another has counted."""
        self.han += other.han
        self.words += other.words
        self.cantonese += other.cantonese

    @property
    def language(self) -> str:
        """The language of all of it."""
        if not self.han or self.han < self.words:
            return "en-US"
        return "yue" if self.cantonese * _HAN_PER_CANTONESE >= self.han else "zh-CN"

    def language_of(self, text: str) -> str:
        """The language of a piece that has been counted: its own where it is certain, else that of the whole."""
        here = Counts()
        here.add(text)
        if here.han and here.han >= here.words:
            return "yue" if self.cantonese * _HAN_PER_CANTONESE >= self.han else "zh-CN"
        return "en-US" if here.words >= _CERTAIN_WORDS else self.language


def detect_language(text: str) -> str:
    """The language of the whole text: `zh-CN`, `yue`, or `en-US` for anything else.

    A Chinese character counts as much as a word of another script. That leans to Chinese, on purpose: Chinese voices
    read English words, English voices do not read Chinese characters.
    """
    counts = Counts()
    counts.add(text)
    return counts.language


def reading(language: str) -> Reading | None:
    """In what its numbers are read; `None` where we do not know how to say them."""
    match language.lower().replace("_", "-").partition("-")[0]:
        case "zh" | "yue" | "cmn" | "wuu" | "nan" | "hak":
            return "zh"
        case "en":
            return "en"
    return None


def runs(text: str, base: Reading) -> Iterator[tuple[str, Reading]]:
    """The text in pieces, each with the language in which its numbers are read.

    In a Chinese text that is English only where English words stand in a row; in an English text it is Chinese only
    around Chinese characters.
    """
    if base == "en" and _HAN_CHARACTER.search(text) is None:
        yield text, "en"
        return
    finder, other = (_FOREIGN, "en") if base == "zh" else (_CHINESE, "zh")
    start = 0
    for found in finder.finditer(text):
        if base == "zh" and len(_FOREIGN_WORD.findall(found[0])) < _MIN_FOREIGN_WORDS:
            continue
        if found.start() > start:
            yield text[start : found.start()], base
        yield found[0], "en" if other == "en" else "zh"
        start = found.end()
    if start < len(text):
        yield text[start:], base
