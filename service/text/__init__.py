"""The text front end: from a caller's text to what an engine is given, segment by segment."""

from service.text.clean import Rejected, has_speech
from service.text.language import detect_language
from service.text.normalizer import normalize, warm_up, warm_up_rare
from service.text.segments import FRONT_END_REVISION, Segmenter, TextSegment, split
from service.text.tags import strip_tags

__all__ = [
    "FRONT_END_REVISION",
    "Rejected",
    "Segmenter",
    "TextSegment",
    "detect_language",
    "has_speech",
    "normalize",
    "split",
    "strip_tags",
    "warm_up",
    "warm_up_rare",
]
