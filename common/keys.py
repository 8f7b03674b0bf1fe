"""The keys of speeches and of segments: equal for what is answered by the same samples, in whatever format."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

from protos.chorus.v1 import tts_pb2

if TYPE_CHECKING:
    from batcher.engine import Segment  # gateways have no batcher

Spoken: TypeAlias = "tts_pb2.SynthesizeRequest | tts_pb2.StreamSynthesizeRequest"

DEFAULT_VOICE = "female1"


def canonical_text(text: str) -> str:
    """A text as its key has it."""
    return unicodedata.normalize("NFC", text).strip()


def revision_of(info: tts_pb2.GetServerInfoResponse) -> str:
    """What makes samples: audio of different revisions is never mixed."""
    return f"{info.engine} {info.model_revision} {info.front_end_revision}"


def speech_key(request: Spoken, revision: str, scope: str = "") -> bytes:
    """The speech key, 32 bytes. `revision`: as `revision_of` says it. `scope`: a tenant who shares with nobody.

    What means the same has the same key: a speed of 1 and none, for example.
    """
    asked = tts_pb2.SynthesizeRequest(
        text=canonical_text(request.text),
        voice=request.voice or DEFAULT_VOICE,
        language=request.language.lower().replace("_", "-"),
        refine_text=request.refine_text,
    )
    if request.HasField("controls") and request.controls.ByteSize():
        asked.controls.CopyFrom(request.controls)
        if asked.controls.speed == 1.0:
            asked.controls.ClearField("speed")
        if not asked.controls.ByteSize():
            asked.ClearField("controls")
    if request.HasField("sampling") and request.sampling.ByteSize():
        asked.sampling.CopyFrom(request.sampling)
    made_of = b"\0".join((scope.encode(), revision.encode(), asked.SerializeToString(deterministic=True)))
    return hashlib.sha256(made_of).digest()


def segment_key(segment: Segment, revision: str, scope: str = "") -> str:
    """The key of one segment of a text that is being written, in hexadecimal digits. The rest as for `speech_key`.

    All that an engine is given for it is in the key, since a row depends on nothing else.
    """
    made_of = json.dumps([scope, revision, asdict(segment)], sort_keys=True)
    return hashlib.sha256(made_of.encode()).hexdigest()


def flight_names(key: str, priority: str) -> tuple[str, ...]:
    """The flights that such a call may join, and last the one that it starts.

    Batch work joins whatever there is. What was begun as batch work may wait long, and no interactive call with it.
    """
    return (key,) if priority == "interactive" else (key, f"{key} {priority}")


def derived_seed(key: bytes) -> int:
    """The seed of a request that names none."""
    return int.from_bytes(key[:4], "big")
