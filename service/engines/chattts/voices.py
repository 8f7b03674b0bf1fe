"""Voices by name: speaker vectors, drawn by seed or written down, from `voices.toml`.

Follows `model/speaker.py` of ChatTTS 0.2.5, bit for bit: a vector is drawn and kept in fp16, and L2-normalised in fp16
when it takes the place of a prompt's `[spk_emb]`.
"""

from __future__ import annotations

import lzma
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pybase16384
import torch
import torch.nn.functional as F  # noqa: N812 (everyone's name for it)
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator
from torch import Tensor

from common.errors import StartupError

BUILT_IN = Path(__file__).with_name("voices.toml")

_FILTERS = ({"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME},)


class Voice(BaseModel):
    """An entry of `voices.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    speaker: str | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Voice:
        if (self.seed is None) == (self.speaker is None):
            raise ValueError("must have either a seed or a speaker")
        return self


class _Voices(RootModel[dict[str, Voice]]):
    pass


def read_voices(path: Path = BUILT_IN) -> Mapping[str, Voice]:
    """Name → voice.

    Raises:
        StartupError: the file cannot be read, or a voice has something missing, wrong or unknown.
    """
    try:
        return MappingProxyType(_Voices.model_validate(tomllib.loads(path.read_text("utf-8"))).root)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise StartupError(f"{path}: {faults}") from None
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StartupError(f"{path} cannot be read as TOML: {error}") from None


def speaker_vectors(voices: Mapping[str, Voice], std: Tensor, mean: Tensor) -> Mapping[str, Tensor]:
    """The vectors that take the place of `[spk_emb]`.

    Args:
        voices: by name.
        std: standard deviation of speakers, [hidden], fp16.
        mean: mean of speakers, [hidden], fp16.

    Returns:
        Name → [hidden], fp32, of length 1 as exactly as fp16 goes.

    Raises:
        StartupError: a speaker is not written down as ChatTTS does it, or is one of another model.
    """
    vectors = {}
    for name, voice in voices.items():
        try:
            vectors[name] = _embed(voice, std, mean)
        except ValueError as error:
            raise StartupError(f"voice {name}: {error}") from None
    return MappingProxyType(vectors)


def _embed(voice: Voice, std: Tensor, mean: Tensor) -> Tensor:
    speaker = decode_speaker(voice.speaker) if voice.speaker is not None else draw_speaker(voice.seed or 0, std, mean)
    if len(speaker) != len(mean):
        raise ValueError(f"its speaker has {len(speaker)} numbers, but these weights take {len(mean)}")
    return F.normalize(speaker, p=2.0, dim=0, eps=1e-12).float()


def draw_speaker(seed: int, std: Tensor, mean: Tensor) -> Tensor:
    """What upstream's `Speaker._sample_random` draws under `torch.manual_seed(seed)` on a CPU: [hidden], fp16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(std), generator=generator, dtype=std.dtype).mul_(std).add_(mean)


def decode_speaker(speaker: str) -> Tensor:
    """The vector that upstream's `Speaker._encode` wrote down: fp16.

    Raises:
        ValueError: it is written otherwise.
    """
    try:
        packed = lzma.decompress(pybase16384.decode_from_string(speaker), format=lzma.FORMAT_RAW, filters=_FILTERS)
    except lzma.LZMAError as error:
        raise ValueError(f"its speaker is not written as ChatTTS writes them: {error}") from None
    vector = np.frombuffer(packed, dtype=np.float16)
    if not np.isfinite(vector).all():
        raise ValueError("its speaker has numbers that are not finite")
    return torch.from_numpy(vector.copy())
