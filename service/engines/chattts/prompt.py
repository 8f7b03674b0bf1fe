"""Prompts: a segment as the tokens that the model is asked with.

Follows ChatTTS 0.2.5 token for token: `norm.py` (what the model can read), `model/speaker.py` (how prompts are put
together), `core.py` (`_infer_code`, `_refine_text`), `model/tokenizer.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerFast

from batcher.engine import Controls, Segment
from service.engines.chattts.package import homophones

_MARKS = str.maketrans(
    {
        **dict.fromkeys("：；（）【】『』「」《》－", "，"),
        **dict.fromkeys("！", "。"),
        **dict.fromkeys(":;()><-", ","),
        **dict.fromkeys("!", "."),
    }
)
_FULL_WIDTH = str.maketrans(
    "!\"'#$%&(),-*+./:;<=>?@\\^`{|}~", "！“‘＃＄％＆（），－＊＋。／：；＜＝＞？＠＼＾｀｛｜｝～"
)
_UNREADABLE = re.compile(r"(\[[^\]]*\])|[^\u4e00-\u9fffA-Za-z，。、,. ]")
"""A tag, which stays; or a character that the model was not taught."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens, and which of them the speaker's vector replaces."""

    ids: list[int]
    speaker: int | None = None
    """An index of `ids`. None: the model chooses a speaker, or needs none."""


class Prompter:
    """Makes prompts with a checkpoint's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._speaker = self._number("[spk_emb]")
        self._break_0 = self._number("[break_0]")
        self.refine_end = self._number("[Ebreak]")
        """The token that ends an answer to `refine`."""

    def code(self, segment: Segment, refined: str | None = None, *, speaker: bool = True) -> Prompt:
        """Asks for a segment's sound.

        Args:
            segment: what is to be spoken.
            refined: its text as `refined` returned it; None: its own.
            speaker: leaves a place for a speaker's vector; without, the model chooses.
        """
        text = read_text(segment) if refined is None else refined
        for mark in ("[Stts]", "[spk_emb]", "[empty_spk]"):
            text = text.replace(mark, "")
        voice = "[spk_emb]" if speaker else "[empty_spk]"
        ids = self._encode(f"[Stts]{voice}{speed_tag(segment.controls.speed)}{text.strip()}[Ptts]")
        return Prompt(ids, ids.index(self._speaker) if speaker else None)

    def refine(self, segment: Segment) -> Prompt:
        """Asks for a segment's text with oral marks in it."""
        return Prompt(self._encode(f"[Sbreak]{read_text(segment)}[Pbreak]{refine_tags(segment.controls)}"))

    def refined(self, ids: Sequence[int]) -> str:
        """The text of an answer to `refine`, which may not have its last token, without tags that only prompts have."""
        text: str = self._tokenizer.decode([number for number in ids if number < self._break_0])
        return text

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _number(self, token: str) -> int:
        number = self._tokenizer.convert_tokens_to_ids(token)
        assert isinstance(number, int)
        return number


def speed_tag(speed: float) -> str:
    """`[speed_5]`, upstream's default, for 1.0; four more for double speed, four less for half.

    Between them evenly by ratio, so that faster and slower mirror each other: a tag is a factor of 1.19. How much
    faster a tag makes the model speak has no definition but the model's own.
    """
    return f"[speed_{min(9, max(0, round(5 + 4 * math.log2(speed))))}]"


def refine_tags(controls: Controls) -> str:
    """`[oral_2][laugh_0][break_6]`, those that are set; upstream's default is none."""
    levels = {"oral": controls.oral, "laugh": controls.laugh, "break": controls.pause}
    return "".join(f"[{name}_{level}]" for name, level in levels.items() if level is not None)


def read_text(segment: Segment) -> str:
    """A segment's text in the characters that the model reads: Chinese, letters, `，。、,.` and tags.

    Other marks become the nearest of these, and what has none is left out. Chinese characters that the model is known
    to misread are replaced by others of the same sound.
    """
    text = segment.text
    if segment.language.split("-")[0] in ("zh", "yue"):
        text = text.translate(_FULL_WIDTH)
    return _UNREADABLE.sub(lambda found: found[1] or "", text.translate(_MARKS).translate(_homophones()))


@cache
def _homophones() -> dict[int, str]:
    return str.maketrans(homophones())
