"""From files on disk to weights on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from common.errors import StartupError
from service.engines.chattts.check import FETCH, check_checkpoint
from service.engines.chattts.checkpoint import DECODER, EMBED, GPT, SPECIAL_TOKENS, TOKENIZER, VOCOS, Dimensions
from service.engines.chattts.linear import has_bf16, has_int8
from service.engines.chattts.package import speaker_statistics

__all__ = ["Dimensions", "Weights", "load_weights"]

Dtype = Literal["auto", "bf16", "fp16", "fp32", "int8"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.float32}
"""What everything but the products is computed in."""


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
    int8: bool
    """The transformer's products are to be made with 8-bit integers; `dtype` is fp32."""
    revision: str
    """A digest of the files: changes when the weights do."""


def load_weights(
    folder: Path,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    dtype: Dtype = "auto",
    *,
    check_sums: bool = True,
) -> Weights:
    """Reads a checkpoint.

    Args:
        folder: has `asset/gpt/config.json` and so on.
        device: `auto` is a GPU where there is one. Among several, CUDA_VISIBLE_DEVICES chooses.
        dtype: of transformer, embeddings and heads; see `choose_dtype`. Decoder and Vocos are always fp32.
        check_sums: refuse weights other than the published ones. Random weights are others.

    Raises:
        StartupError: files are missing, wrong, truncated or no checkpoint; the device is not there or too small, or
            can't compute so.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    dimensions, revision = check_checkpoint(folder, check_sums=check_sums)
    tokenizer = _load_tokenizer(folder / TOKENIZER, dimensions.text_vocabulary)
    std, mean = map(torch.from_numpy, speaker_statistics(dimensions.hidden))
    try:
        embed = load_file(folder / EMBED)
        codebooks = range(dimensions.codebooks)
        return Weights(
            dimensions=dimensions,
            gpt=_resident(load_file(folder / GPT), where, kind),
            embed_audio=torch.stack([embed[f"emb_code.{n}.weight"] for n in codebooks]).to(where, kind),
            embed_text=embed["emb_text.weight"].to(where, kind, copy=True),
            head_audio=torch.stack([_folded(embed, f"head_code.{n}") for n in codebooks]).to(where, kind),
            head_text=_folded(embed, "head_text").to(where, kind),
            decoder=_resident(load_file(folder / DECODER), where, torch.float32),
            vocos=_resident(load_file(folder / VOCOS), where, torch.float32),
            tokenizer=tokenizer,
            speaker_std=std,
            speaker_mean=mean,
            device=where,
            dtype=kind,
            int8=dtype == "int8",
            revision=revision,
        )
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"the GPU has no room for the weights: free it, or set chattts.device=cpu ({error})"
        ) from None


def choose_device(device: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """The device to compute on.

    Raises:
        StartupError: a GPU is wanted, and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
        raise StartupError(
            f"chattts.device is cuda, but torch {torch.__version__} ({built}) sees no GPU; set it to cpu"
        )
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The number format to compute in.

    `auto` is bf16 on a GPU and on processors that multiply it themselves (AMX, AVX512-BF16), and fp32 elsewhere, where
    bf16 would be emulated and slow. `int8` is about the products alone, and never chosen: it makes other tokens.

    Raises:
        StartupError: int8 is wanted where it can't be had.
    """
    if dtype == "int8" and not (device.type == "cpu" and has_int8()):
        raise StartupError("chattts.dtype is int8, which is for x86 CPUs with AVX2; set it to auto")
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.bfloat16 if device.type == "cuda" or has_bf16() else torch.float32


def _load_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer, through the class by which upstream loads it (`model/tokenizer.py`)."""
    try:
        tokenizer = cast(PreTrainedTokenizerFast, BertTokenizerFast.from_pretrained(folder))
    except Exception as error:  # transformers and its Rust half raise whatever they like, bare Exception too
        raise StartupError(f"{folder} has no tokenizer that can be read ({error}); {FETCH}") from error
    if len(tokenizer) != vocabulary:
        raise StartupError(f"{folder} has {len(tokenizer)} tokens, but the weights {vocabulary}; {FETCH}")
    broken = [token for token in SPECIAL_TOKENS if tokenizer.tokenize(token) != [token]]
    if broken:
        raise StartupError(f"{folder} does not know {', '.join(broken[:3])} as single tokens; {FETCH}")
    return tokenizer


def _resident(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies, so that nothing of the file stays mapped: it may change under a running service."""
    return {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}


def _folded(embed: Mapping[str, Tensor], head: str) -> Tensor:
    """A weight-normed layer's weight, in fp32, by the function that upstream calls at each use."""
    lengths, directions = (embed[f"{head}.parametrizations.weight.original{n}"].float() for n in range(2))
    return torch._weight_norm(directions, lengths, 0)
