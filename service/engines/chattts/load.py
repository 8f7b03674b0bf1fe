"""From files on disk to weights on a device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from service.engines.chattts.checkpoint import CONFIG, DECODER, EMBED, FILES, GPT, TOKENIZER, VOCOS, Dimensions
from service.engines.chattts.package import speaker_statistics

__all__ = ["Dimensions", "Weights", "load_weights"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Weights:
    """All that the engine computes with. Tensors are on `device`."""

    dimensions: Dimensions
    gpt: Mapping[str, Tensor]
    """Names as in `gpt/model.safetensors`, in `dtype`."""
    embed_audio: Tensor
    """[codebooks, audio vocabulary, hidden], in `dtype`."""
    embed_text: Tensor
    """[text vocabulary, hidden], in `dtype`."""
    head_audio: Tensor
    """[codebooks, audio vocabulary, hidden], weight norm folded, in `dtype`."""
    head_text: Tensor
    """[text vocabulary, hidden], weight norm folded, in `dtype`."""
    decoder: Mapping[str, Tensor]
    """Names as in `Decoder.safetensors`, fp32."""
    vocos: Mapping[str, Tensor]
    """Names as in `Vocos.safetensors`, fp32."""
    tokenizer: PreTrainedTokenizerFast
    speaker_std: Tensor
    """[hidden], fp16 as published, on the CPU, where voices are made."""
    speaker_mean: Tensor
    """[hidden], fp16 as published, on the CPU, where voices are made."""
    device: torch.device
    dtype: torch.dtype
    revision: str
    """A digest of the files: changes when the weights do."""


def load_weights(folder: Path, device: str = "auto", dtype: str = "auto", *, check_sums: bool = True) -> Weights:
    """Reads a checkpoint.

    Args:
        folder: has `asset/gpt/config.json` and so on.
        device: `cuda`, `cpu`, or `auto`: a GPU where there is one.
        dtype: `bf16`, `fp16`, `fp32`, or `auto`: what is fast on the device. Decoder and Vocos are always fp32.
        check_sums: refuse weights other than the published ones. Random weights are others.

    Raises:
        StartupError: the files are missing, wrong, truncated or no checkpoint; or there is no such device.
    """
    where = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    kind = DTYPES["fp32" if dtype == "auto" else dtype]
    config = json.loads((folder / CONFIG).read_bytes())
    embed = load_file(folder / EMBED)
    codebooks = range(sum(name.startswith("emb_code.") for name in embed))
    std, mean = map(torch.from_numpy, speaker_statistics(config["hidden_size"]))
    return Weights(
        dimensions=Dimensions(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["hidden_size"] // config["num_attention_heads"],
            ffn=config["intermediate_size"],
            max_positions=config["max_position_embeddings"],
            rope_theta=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
            codebooks=len(codebooks),
            audio_vocabulary=len(embed["emb_code.0.weight"]),
            text_vocabulary=len(embed["emb_text.weight"]),
        ),
        gpt=_resident(load_file(folder / GPT), where, kind),
        embed_audio=torch.stack([embed[f"emb_code.{n}.weight"] for n in codebooks]).to(where, kind),
        embed_text=embed["emb_text.weight"].to(where, kind, copy=True),
        head_audio=torch.stack([_folded(embed, f"head_code.{n}") for n in codebooks]).to(where, kind),
        head_text=_folded(embed, "head_text").to(where, kind),
        decoder=_resident(load_file(folder / DECODER), where, torch.float32),
        vocos=_resident(load_file(folder / VOCOS), where, torch.float32),
        tokenizer=cast(PreTrainedTokenizerFast, BertTokenizerFast.from_pretrained(folder / TOKENIZER)),
        speaker_std=std,
        speaker_mean=mean,
        device=where,
        dtype=kind,
        revision=_revision(folder),
    )


def _resident(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies, so that nothing of the file stays mapped: it may change under a running service."""
    return {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}


def _folded(embed: Mapping[str, Tensor], head: str) -> Tensor:
    """A weight-normed layer's weight, in fp32, bit for bit as `torch.nn.utils.parametrizations.weight_norm` has it."""
    lengths, directions = (embed[f"{head}.parametrizations.weight.original{n}"].float() for n in range(2))
    folded: Tensor = directions * (lengths / torch.linalg.vector_norm(directions, dim=1, keepdim=True))
    return folded


def _revision(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
