"""What a caller asks for, checked and made plain: the wire ends here, and the batcher's terms begin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from audio.formats import Format
from batcher.engine import Controls, Sampling, Segment
from common.errors import InvalidArgument, Violation
from common.keys import derived_seed, speech_key
from common.settings import LimitSettings
from common.speech import read_wish
from protos.chorus.v1 import tts_pb2
from service.engines.base import SpeechEngine
from service.text import FRONT_END_REVISION, TextSegment, detect_language, dialects, has_speech
from service.voices import DEFAULT_VOICE

SpeechRequest = tts_pb2.SynthesizeRequest | tts_pb2.StreamSynthesizeRequest

ESTIMATED_AT_ONCE = 100
"""Characters whose length is estimated together: about a segment."""

ALIASES: Mapping[str, str] = {"zh": "zh-cn", "cmn": "zh-cn", "en": "en-us", "zh-yue": "yue", "zh-hk": "yue"}
"""Language tags that mean another one, in lower case."""

RANGES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "controls": {"speed": (0.5, 2.0), "oral": (0, 9), "laugh": (0, 2), "pause": (0, 7)},
    "sampling": {
        "temperature": (0.00001, 2.0),
        "top_p": (0.0, 1.0),
        "top_k": (1, 625),
        "repetition_penalty": (1.0, 2.0),
    },
}
"""Lowest and highest value of each field. `top_p` must be above its lowest."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How something is to be said, wholly decided."""

    voice: str
    language: str | None
    """A served tag; None: detected from the text."""
    seed: int
    format: Format
    controls: Controls
    sampling: Sampling
    refine_text: bool

    def segment(self, part: TextSegment, index: int) -> Segment:
        """A part of the text as the engine is given it."""
        return Segment(
            text=part.spoken_text,
            voice=self.voice,
            language=part.language,
            index=index,
            seed=self.seed,
            controls=self.controls,
            sampling=self.sampling,
            refine_text=self.refine_text,
        )


def parse(request: SpeechRequest, engine: SpeechEngine, limits: LimitSettings) -> Manner:
    """Checks a request for a whole text, and decides what it left open.

    Raises:
        InvalidArgument: names every faulty field.
    """
    return _manner(request, engine, text_faults(request.text, limits))


def parse_config(config: tts_pb2.StreamConfig, engine: SpeechEngine) -> Manner:
    """Checks how a text that is still being written is to be said.

    Raises:
        InvalidArgument: names every faulty field.
    """
    return _manner(config, engine, [], prefix="config.")


def estimate_steps(text: str, manner: Manner, engine: SpeechEngine) -> int:
    """Steps that a whole text may take, as far as one can tell before it is split and read."""
    language = manner.language or match_language(detect_language(text), engine.languages) or engine.languages[0]
    pieces = (text[start : start + ESTIMATED_AT_ONCE] for start in range(0, len(text), ESTIMATED_AT_ONCE))
    segments = (Segment(piece, manner.voice, language, controls=manner.controls) for piece in pieces)
    return sum(engine.caps.predict(segment).steps_p50 for segment in segments)


def front_end_revision(engine: SpeechEngine) -> str:
    """Changes whenever a text may be read otherwise, in any language that is served."""
    return " ".join(filter(None, (FRONT_END_REVISION, *(dialects.revision(tag) for tag in engine.languages))))


def revision(engine: SpeechEngine) -> str:
    """As `common.keys.revision_of` says it of what GetServerInfo tells."""
    return f"{engine.name} {engine.model_revision} {front_end_revision(engine)}"


def derive_seed(request: SpeechRequest | tts_pb2.StreamConfig, engine: SpeechEngine) -> int:
    """The seed of a request that names none: equal requests sound equal, in whatever format."""
    if isinstance(request, tts_pb2.StreamConfig):
        request = tts_pb2.StreamSynthesizeRequest(
            voice=request.voice,
            language=request.language,
            controls=request.controls,
            sampling=request.sampling,
            refine_text=request.refine_text,
        )
    return derived_seed(speech_key(request, revision(engine)))


def text_faults(text: str, limits: LimitSettings) -> list[Violation]:
    """What is wrong with a whole text."""
    if not text:
        return [Violation("text", "is empty")]
    if len(text) > limits.text_characters:
        return [Violation("text", f"has {len(text)} characters; at most {limits.text_characters} are taken")]
    if not has_speech(text):
        return [Violation("text", "has nothing to speak in it: no letter and no digit")]
    return []


def voice_faults(voice: str, engine: SpeechEngine) -> list[Violation]:
    """What is wrong with a voice's name."""
    if not voice or voice in engine.voices:
        return []
    return [Violation("voice", f"is not known; known are {', '.join(engine.voices)}")]


def language_faults(language: str, engine: SpeechEngine) -> list[Violation]:
    """What is wrong with a language's tag."""
    if not language or match_language(language, engine.languages):
        return []
    return [Violation("language", f"is not served; served are {', '.join(engine.languages)}")]


def match_language(asked: str, served: tuple[str, ...]) -> str | None:
    """The served tag for an asked one: itself, or with subtags cut off from its end (RFC 4647, lookup)."""
    by_name = {tag.lower(): tag for tag in served}
    name = asked.lower().replace("_", "-")
    while name:
        if found := by_name.get(name) or by_name.get(ALIASES.get(name, "")):
            return found
        name = name.rpartition("-")[0]
    return None


def _manner(
    request: SpeechRequest | tts_pb2.StreamConfig,
    engine: SpeechEngine,
    faults_of_text: list[Violation],
    prefix: str = "",
) -> Manner:
    wish, format_faults = read_wish(request.format)
    faults = [
        *voice_faults(request.voice, engine),
        *language_faults(request.language, engine),
        *format_faults,
        *_range_faults("controls", request.controls),
        *_range_faults("sampling", request.sampling),
    ]
    violations = faults_of_text + [Violation(prefix + fault.field, fault.description) for fault in faults]
    if violations or wish is None:
        raise InvalidArgument.of(violations)
    return Manner(
        voice=request.voice or DEFAULT_VOICE,
        language=match_language(request.language, engine.languages),
        seed=request.sampling.seed if request.sampling.HasField("seed") else derive_seed(request, engine),
        format=wish.at(engine.caps.sample_rate_hertz),
        controls=Controls(**{"speed": 1.0} | _set_fields(request.controls)),
        sampling=Sampling(**{k: v for k, v in _set_fields(request.sampling).items() if k != "seed"}),
        refine_text=request.refine_text,
    )


def _range_faults(group: str, message: tts_pb2.Controls | tts_pb2.Sampling) -> list[Violation]:
    faults = []
    for field, (lowest, highest) in RANGES[group].items():
        value = _set_fields(message).get(field)
        if value is None:
            continue
        if math.isnan(value) or not lowest <= _rounded(value) <= highest or (field == "top_p" and value == 0):
            faults.append(Violation(f"{group}.{field}", f"is {value:g}; it goes from {lowest:g} to {highest:g}"))
    return faults


def _rounded(value: float) -> float:
    """A wire float without the error of its 32 bits, so that 0.00001 is not below 0.00001."""
    return float(f"{value:.6g}")


def _set_fields(message: tts_pb2.Controls | tts_pb2.Sampling) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}
