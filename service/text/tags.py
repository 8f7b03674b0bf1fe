"""Control tags: words in square brackets that ask a model for a laugh, a pause, a manner.

A tag is kept as it is, in one piece. Brackets around anything else are no tag: their words are read and the brackets
are not. That holds for the marks with which a model's own prompt is built, too, so that no caller can write those.
"""

from __future__ import annotations

import re

TAG = re.compile(
    r"\[(?:laugh(?:_[0-2])?|(?:uv_|v_|l|ll)break|break(?:_[0-7])?|oral(?:_[0-9])?|speed_[0-9]|breath|music|pure)\]"
)
LONGEST_TAG = 12
"""Characters."""


def strip_tags(text: str) -> str:
    """The text for an engine that knows no tags."""
    return " ".join(TAG.sub(" ", text).split())
