"""The text front end: from a caller's text to what an engine is given, segment by segment."""

from service.text.language import detect_language
from service.text.segments import FRONT_END_REVISION, TextSegment, has_speech, split

__all__ = ["FRONT_END_REVISION", "TextSegment", "detect_language", "has_speech", "split"]
