"""What a request means once it is checked."""

from __future__ import annotations

from typing import Any

import pytest

from audio.formats import Codec, Container
from batcher.engine import Controls, Sampling, Segment
from common.errors import InvalidArgument
from common.settings import LimitSettings, ToneSettings
from protos.chorus.v1 import tts_pb2
from service.engines.tone import ToneEngine
from service.speech import RANGES, derive_seed, match_language, parse
from service.text import split

ENGINE = ToneEngine(ToneSettings())
SERVED = ("en-US", "yue", "zh-CN")
RAW = tts_pb2.AudioFormat(container=tts_pb2.CONTAINER_RAW)


def request(text: str = "hello", **fields: Any) -> tts_pb2.SynthesizeRequest:
    return tts_pb2.SynthesizeRequest(text=text, **fields)


def faulty(asked: tts_pb2.SynthesizeRequest, limits: LimitSettings | None = None) -> list[str]:
    """The fields that are refused."""
    try:
        parse(asked, ENGINE, limits or LimitSettings())
    except InvalidArgument as error:
        return [violation.field for violation in error.violations]
    return []


@pytest.mark.parametrize(
    ("asked", "matched"),
    [
        ("zh-CN", "zh-CN"),
        ("ZH_cn", "zh-CN"),
        ("zh", "zh-CN"),
        ("zh-Hans-CN", "zh-CN"),
        ("zh-HK", "yue"),
        ("cmn-Hans", "zh-CN"),
        ("yue-HK", "yue"),
        ("en", "en-US"),
        ("en-GB", "en-US"),
        ("en-US-x-loud", "en-US"),
        *((tag, None) for tag in ("", "-", "fr", "e", "english", "zhen", "*")),
    ],
)
def test_languages(asked: str, matched: str | None) -> None:
    assert match_language(asked, SERVED) == matched
    assert match_language(asked, ()) is None


def test_a_seed_is_derived_from_all_that_changes_the_sound() -> None:
    same = [
        request(),
        request(" hello\n"),
        request(voice="female1"),
        request(format=RAW),
        request(controls=tts_pb2.Controls(), sampling=tts_pb2.Sampling()),
    ]
    other = [
        request("hello!"),
        request("Hello"),
        request(voice="male1"),
        request(language="en-US"),
        request(controls=tts_pb2.Controls(oral=0)),
        request(controls=tts_pb2.Controls(laugh=0)),
        request(sampling=tts_pb2.Sampling(top_p=0.5)),
        request(refine_text=True),
    ]
    assert len({derive_seed(asked, ENGINE) for asked in same}) == 1
    assert derive_seed(tts_pb2.StreamSynthesizeRequest(text="hello"), ENGINE) == derive_seed(request(), ENGINE)
    assert len({derive_seed(asked, ENGINE) for asked in [*other, request()]}) == len(other) + 1
    assert all(0 <= derive_seed(asked, ENGINE) < 2**32 for asked in other)


def segments(asked: tts_pb2.SynthesizeRequest) -> list[Segment]:
    """What the engine is given for a request."""
    manner = parse(asked, ENGINE, LimitSettings())
    return [manner.segment(part, index) for index, part in enumerate(split(asked.text, manner.language))]


def test_another_model_means_another_seed() -> None:
    newer = ToneEngine(ToneSettings())
    newer.model_revision = "tone-2"
    assert derive_seed(request(), ENGINE) != derive_seed(request(), newer)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_a_seed_that_is_given_is_used(seed: int) -> None:
    asked = request(sampling=tts_pb2.Sampling(seed=seed))
    assert parse(asked, ENGINE, LimitSettings()).seed == seed
    assert {segment.seed for segment in segments(asked)} == {seed}


def test_every_control_of_the_contract_has_a_range() -> None:
    for group, message in (("controls", tts_pb2.Controls), ("sampling", tts_pb2.Sampling)):
        assert set(RANGES[group]) == set(message.DESCRIPTOR.fields_by_name) - {"seed"}


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("controls.speed", (0.5, 2.0), (0.4999, 2.0001)),
        ("controls.oral", (0, 9), (-1, 10)),
        ("controls.laugh", (0, 2), (-1, 3)),
        ("controls.pause", (0, 7), (-1, 8)),
        ("sampling.temperature", (0.00001, 2.0), (0.000009999, 2.0001)),  # 0.00001 is less as 32 bits
        ("sampling.top_p", (1e-30, 1.0), (0.0, 1.0001)),
        ("sampling.top_k", (1, 625), (0, 626)),
        ("sampling.repetition_penalty", (1.0, 2.0), (0.9999, 2.0001)),
    ],
)
def test_ranges(field: str, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    group, _, leaf = field.partition(".")
    for value in (*inside, *outside):
        asked = request()
        setattr(getattr(asked, group), leaf, value)
        assert faulty(asked) == ([field] if value in outside else [])


def test_what_is_left_open() -> None:
    asked = request("Hello. 你好。")
    speech = parse(asked, ENGINE, LimitSettings())
    assert speech.voice == "female1"
    assert (speech.format.container, speech.format.codec) == (Container.WAV, Codec.PCM_S16LE)
    assert speech.format.sample_rate_hertz == ENGINE.caps.sample_rate_hertz
    assert {(segment.controls, segment.sampling) for segment in segments(asked)} == {(Controls(), Sampling())}


def test_what_is_asked_for_reaches_every_segment() -> None:
    asked = request(
        "One sentence. " * 30,
        voice="male2",
        language="en",
        controls=tts_pb2.Controls(oral=0, pause=7),
        sampling=tts_pb2.Sampling(top_k=5, seed=9),
        refine_text=True,
    )
    assert len(segments(asked)) > 1
    for index, segment in enumerate(segments(asked)):
        assert (segment.index, segment.seed, segment.voice, segment.language) == (index, 9, "male2", "en-US")
        assert segment.controls == Controls(speed=1.0, oral=0, pause=7)
        assert segment.sampling == Sampling(top_k=5)
        assert segment.refine_text


@pytest.mark.parametrize(("text", "fits"), [("a" * 10, True), ("a" * 11, False), ("🙂a" * 5, True), ("é" * 10, True)])
def test_a_texts_length_is_counted_in_characters(text: str, fits: bool) -> None:
    assert faulty(request(text), LimitSettings(text_characters=10)) == ([] if fits else ["text"])
