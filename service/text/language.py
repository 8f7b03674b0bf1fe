"""Which language a text is in, from its script alone."""

from __future__ import annotations

import re

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
_OTHER_WORD = re.compile(rf"[^\W\d_{_HAN}]++")
# Characters that written Mandarin hardly has. 係 is left out in 關係 and its like, 唔 where it is a sigh.
_CANTONESE = re.compile(r"[嘅咗喺哋嚟冇啲嗰嘢佢瞓㗎噉攞]|(?<![關聯體干])係|唔(?=\w)")
_HAN_PER_CANTONESE = 20
"""In Cantonese at least one character of so many is one of those; a quotation in a Mandarin text stays below."""


def detect_language(text: str) -> str:
    """The language of the whole text: `zh-CN`, `yue`, or `en-US` for anything else.

    A Chinese character counts as much as a word of another script. That leans to Chinese, on purpose: Chinese voices
    read English words, English voices do not read Chinese characters.
    """
    han = len(_HAN_CHARACTER.findall(text))
    if not han or han < len(_OTHER_WORD.findall(text)):
        return "en-US"
    cantonese = len(_CANTONESE.findall(text))
    return "yue" if cantonese * _HAN_PER_CANTONESE >= han else "zh-CN"
