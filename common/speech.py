"""A speech as the contract writes it: the messages of its stream, and the format that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from audio.formats import Codec, Container, Format, FormatError, Wish
from common.errors import Violation
from protos.chorus.v1 import tts_pb2

SpeechMessage = tts_pb2.StreamStart | tts_pb2.AudioChunk | tts_pb2.SegmentMark | tts_pb2.StreamEnd

FIELDS: Mapping[type, str] = {
    tts_pb2.StreamStart: "start",
    tts_pb2.AudioChunk: "chunk",
    tts_pb2.SegmentMark: "mark",
    tts_pb2.StreamEnd: "end",
}

ANY_RATE = 24_000


def as_field(message: SpeechMessage) -> dict[str, Any]:
    """A message in its place in a stream's reply."""
    return {FIELDS[type(message)]: message}


def read_wish(asked: tts_pb2.AudioFormat) -> tuple[Wish | None, tuple[Violation, ...]]:
    """What is asked for, `None` where it cannot be had; and every faulty field."""
    return _read_wish(asked.container, asked.codec, asked.sample_rate_hertz)


@lru_cache
def wire_format(format: Format) -> tts_pb2.AudioFormat:
    """A format as the contract writes it, every field set."""
    return tts_pb2.AudioFormat(
        container=tts_pb2.Container.Value(f"CONTAINER_{format.container.name}"),
        codec=tts_pb2.Codec.Value(f"CODEC_{format.codec.name}"),
        sample_rate_hertz=format.sample_rate_hertz,
    )


@lru_cache(maxsize=1024)
def _read_wish(container: int, codec: int, rate: int) -> tuple[Wish | None, tuple[Violation, ...]]:
    wanted, faults = _member("container", tts_pb2.Container, Container, container)
    coded, codec_faults = _member("codec", tts_pb2.Codec, Codec, codec)
    # What does not go into an unknown container cannot be told.
    wish = Wish(wanted, None if faults else coded, rate)
    faults += codec_faults
    try:
        wish.at(ANY_RATE)
    except FormatError as error:
        faults += [Violation(f"format.{field}", description) for field, description in error.faults]
    return (None if faults else wish), tuple(faults)


def _member(field: str, wire: Any, plain: Any, number: int) -> tuple[Any, list[Violation]]:
    """A wire enum's number as a member of ours, `None` where it is not set; and what is wrong with it."""
    if number not in wire.values():
        return None, [Violation(f"format.{field}", f"{number} is no value of the enum")]
    return plain.__members__.get(wire.Name(number).removeprefix(f"{field.upper()}_")), []
